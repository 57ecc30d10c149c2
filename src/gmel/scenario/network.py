"""The section of a scenario about links between devices and servers."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gmel.scenario.laws import Decibel, Finite, Positive, Range, Section, Spread

__all__ = ["MOST_NR_MCS", "MOST_TRUNCATED_SHANNON", "Mobility", "Radio"]

MOST_NR_MCS = 7.4062
"""Bits per second and hertz of MCS 27, 256QAM (TS 38.214 Table 5.1.3.1-2)."""
MOST_TRUNCATED_SHANNON = 0.4 * math.log2(1.0 + 10.0**2.2)
"""Bits per second and hertz of the uplink at the SNR where it is cut off (TR 36.942 annex A.1)."""


class Mobility(Section):
    """Devices that move. Line of sight and shadowing change with the place, correlated along the way (TR 38.901).

    `waypoint`: random waypoint in the hall, from its stationary law; a speed for each leg, a pause at its end. `route`:
    device i drives round the closed route i mod routes at a speed of its own.
    """

    kind: Literal["waypoint", "route"] = "waypoint"
    speed_m_s: Spread = Spread(low=0.5, high=2.0)
    pause_s: Range = Range(low=0.0, high=0.0)
    routes_m: tuple[tuple[tuple[Finite, Finite], ...], ...] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "route") != (self.routes_m is not None):
            raise ValueError('routes_m and kind = "route" need each other')
        if self.routes_m is not None and not all(2 <= len(route) <= 256 for route in self.routes_m or ((),)):
            raise ValueError("routes_m needs routes, each of 2 to 256 corners")
        if self.kind == "route" and self.pause_s.high > 0:
            raise ValueError('pause_s is for kind = "waypoint": on a route nobody stops')
        return self


class Radio(Section):
    """Links between devices and servers.

    `uniform-snr`: the mean SNR of a pair is drawn from `snr_db`. `inf`: positions in a hall, 3GPP TR 38.901 InF path
    loss, line of sight and shadowing. `log-distance`: positions in a hall, loss = `loss_at_1m_db` + `loss_slope_db`
    log10 d + 20 log10 carrier_ghz, d in 3D, normal shadowing of `shadowing_db`. `fixed`: the rate of a pair is drawn
    from
    `rate_bps`, whatever the band. `wired`: a device is part of its cell and sends to it in no time.

    `access`: a device sends to the cell of the server it chose (`direct`), or always to its own (`home`: the server of
    the best mean link; with `wired` and `fixed` server i mod J of device i), from where the task is forwarded
    (`servers.backhaul_bps`, `servers.backhaul_delay_s`). `visible_servers`: a device can choose that many servers
    only, those with its best links.

    `fading`: none; Rayleigh, anew for each slot (`block`) or correlated from slot to slot as at `fading_speed_m_s`
    (`ar1`, for short slots), held for an upload; or its mean over an upload (`ergodic`, for slots of seconds).

    `interference`: all cells use one band, and each hears the mean power of the uploads to the others as noise.
    `one_at_a_time`: a device sends one task after the other.
    """

    model: Literal["uniform-snr", "inf", "log-distance", "fixed", "wired"] = "inf"
    access: Literal["direct", "home"] = "direct"
    visible_servers: int | None = Field(default=None, ge=1, le=4096)
    rate_bps: Spread | None = None
    loss_at_1m_db: Annotated[float, Field(ge=0, le=200)] = 33.0
    loss_slope_db: Annotated[float, Field(ge=0, le=100)] = 25.5
    shadowing_db: Annotated[float, Field(ge=0, le=20)] = 0.0
    efficiency_cap: Annotated[float, Field(gt=0, le=100)] | None = None
    snr_db: tuple[Decibel, Decibel] = (5.0, 25.0)
    bandwidth_hz: Annotated[float, Field(ge=1, le=1e12)] = 20e6
    carrier_ghz: Positive = 3.5
    hall_m: tuple[Positive, Positive] = (120.0, 60.0)
    subscenario: Literal["SL", "DL", "SH", "DH", "HH"] = "DH"
    clutter_density: Annotated[float, Field(gt=0, lt=1)] = 0.6
    clutter_size_m: Positive = 2.0
    clutter_height_m: Positive = 6.0
    device_height_m: Positive = 1.5
    server_height_m: Positive = 8.0
    noise_figure_db: Decibel = 5.0
    device_noise_figure_db: Decibel = 9.0
    server_tx_power_dbm: Decibel = 24.0
    rate: Literal["shannon", "truncated-shannon", "nr-mcs"] = "nr-mcs"
    uplink_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    downlink_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    fading: Literal["none", "block", "ar1", "ergodic"] = "ergodic"
    fading_speed_m_s: Annotated[float, Field(ge=0, le=1000)] = 0.8
    floor: Literal["clip", "outage"] = "outage"
    floor_snr_db: Decibel = -5.0
    sharing: Literal["none", "equal"] = "equal"
    interference: bool = False
    one_at_a_time: bool = False
    download: bool = True

    @property
    def placed(self) -> bool:
        """Whether links follow from where devices and servers stand."""
        return self.model in ("inf", "log-distance")

    @property
    def most_bits_per_s_hz(self) -> float | None:
        """Spectral efficiency that no uplink exceeds; None where only the SNR limits it."""
        caps = {"nr-mcs": MOST_NR_MCS, "truncated-shannon": MOST_TRUNCATED_SHANNON}
        return caps.get(self.rate, self.efficiency_cap)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.model == "fixed" and self.rate_bps is None:
            raise ValueError('model = "fixed" needs rate_bps')
        if self.model != "fixed" and self.rate_bps is not None:
            raise ValueError(f'rate_bps is for model = "fixed", not {self.model!r}')
        if self.efficiency_cap is not None and self.rate != "shannon":
            raise ValueError(f'efficiency_cap is for rate = "shannon"; {self.rate!r} has a cap of its own')
        if self.fading == "ar1" and self.floor == "outage":
            raise ValueError(
                'fading = "ar1" needs floor = "clip": how long an outage lasts follows from the fading itself'
            )
        if self.interference and self.model in ("fixed", "wired"):
            raise ValueError(f"interference needs a radio; model = {self.model!r} has none")
        if self.one_at_a_time and self.sharing == "equal":
            raise ValueError(
                'one_at_a_time needs sharing = "none": who waits at its device does not share the cell yet'
            )
        if self.model == "wired" and self.access == "direct":
            raise ValueError('model = "wired" needs access = "home": a device is part of one cell')
        if self.visible_servers is not None and self.access == "home":
            raise ValueError('visible_servers is for access = "direct": a forwarded task can go anywhere')
        if self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db = {list(self.snr_db)} must be [low, high]")
        if self.placed and self.server_height_m < self.device_height_m:
            raise ValueError(
                f"server_height_m = {self.server_height_m:g} must not be below "
                f"device_height_m = {self.device_height_m:g}"
            )
        if self.model == "inf" and self.subscenario in ("SH", "DH") and self.clutter_height_m <= self.device_height_m:
            raise ValueError(
                f"clutter_height_m = {self.clutter_height_m:g} must exceed device_height_m = {self.device_height_m:g} "
                "in the subscenarios SH and DH"
            )
        return self
