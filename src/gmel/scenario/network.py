"""The section of a scenario about links between devices and servers."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gmel.scenario.laws import Finite, Positive, Section

__all__ = ["Radio"]


class Radio(Section):
    """Links between devices and servers.

    `uniform-snr`: the mean SNR of a pair is drawn from `snr_db`. `inf`: positions in a hall, 3GPP TR 38.901 InF path
    loss, line of sight and shadowing.
    """

    model: Literal["uniform-snr", "inf"] = "inf"
    snr_db: tuple[Finite, Finite] = (5.0, 25.0)
    bandwidth_hz: Positive = 20e6
    carrier_ghz: Positive = 3.5
    hall_m: tuple[Positive, Positive] = (120.0, 60.0)
    subscenario: Literal["SL", "DL", "SH", "DH", "HH"] = "DH"
    clutter_density: Annotated[float, Field(gt=0, lt=1)] = 0.6
    clutter_size_m: Positive = 2.0
    clutter_height_m: Positive = 6.0
    device_height_m: Positive = 1.5
    server_height_m: Positive = 8.0
    noise_figure_db: Finite = 5.0
    device_noise_figure_db: Finite = 9.0
    server_tx_power_dbm: Finite = 24.0
    rate: Literal["shannon", "truncated-shannon", "nr-mcs"] = "nr-mcs"
    uplink_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    downlink_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    fading: Literal["none", "block", "ergodic"] = "ergodic"
    floor: Literal["clip", "outage"] = "outage"
    floor_snr_db: Finite = -5.0
    sharing: Literal["none", "equal"] = "equal"
    download: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.snr_db[0] > self.snr_db[1]:
            raise ValueError(f"snr_db = {list(self.snr_db)} must be [low, high]")
        if self.model == "inf" and self.server_height_m < self.device_height_m:
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
