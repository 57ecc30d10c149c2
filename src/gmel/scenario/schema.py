"""What a plant is: the typed scenario, every field with its unit and range.

A scenario is a TOML file with the sections of :class:`Scenario`. Unknown keys are errors that name the nearest key.
Sources of the model: reference equations (1)-(15) of `docs/model.md`; radio: 3GPP TR 38.901 (Indoor Factory).
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gmel.scenario.compute import Cache, Failures, Server, Service, Stay
from gmel.scenario.demand import Arrivals, GenerationModel, LoadTime, Tasks
from gmel.scenario.laws import (
    Choice,
    Decibel,
    Finite,
    Name,
    NonNegative,
    Positive,
    Range,
    Section,
    Share,
    Spread,
    Weight,
)
from gmel.scenario.network import Mobility, Radio

__all__ = [
    "Arrivals",
    "Cache",
    "Choice",
    "Devices",
    "Episode",
    "Failures",
    "GenerationModel",
    "LoadTime",
    "Mobility",
    "Radio",
    "Range",
    "Reward",
    "Scenario",
    "Server",
    "Service",
    "Slot",
    "Spread",
    "Stay",
    "Tasks",
]

MOST_LEVELS = 256
"""Ways to do a task at a place: every one of them is looked at in each slot."""


class Slot(Section):
    """When decisions fall and what is known at them.

    `broadcast_age_slots` is the age of the freshest broadcast that devices have. Each broadcast of each server is lost
    with probability `broadcast_loss`, for all devices; they then know the one before. Unless `quality_known`, devices
    do not know which quality an option has; they then tell servers, services and models apart by their numbers.
    """

    length_s: Positive = 1.0
    broadcast_age_slots: int = Field(default=1, ge=0, le=64)
    broadcast_loss: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    latency_from: Literal["generated", "decided"] = "generated"
    quality_known: bool = True


class Episode(Section):
    """Length of an evaluation episode and the part of it that is deleted as warm-up."""

    slots: int = Field(default=1000, ge=2, le=1_000_000)
    warmup_slots: int = Field(default=100, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.warmup_slots >= self.slots:
            raise ValueError(f"warmup_slots = {self.warmup_slots} must be below slots = {self.slots}")
        return self


class Devices(Section):
    """The devices: alike but for where they stand (`positions_m`, else drawn for each episode) and what they need.

    A range of `speed` is drawn for each device and episode. Without `local` a device cannot run tasks itself. With
    `power_options_dbm` it chooses its transmit power with the place, in place of `tx_power_dbm`; with `band_weights`
    the weight of its upload: the band of a cell is shared in proportion to the weights. With `battery_j` it has a
    battery, drawn for each device, from which its tasks and `standby_power_w` take; when empty it asks no more.
    """

    count: int = Field(ge=1, le=100_000)
    speed: Spread
    local: bool = True
    compute_power_w: NonNegative = 10.0
    idle_power_w: NonNegative = 0.1
    tx_power_dbm: Decibel = 23.0
    power_options_dbm: list[Decibel] | None = Field(default=None, min_length=1, max_length=8)
    band_weights: list[Weight] | None = Field(default=None, min_length=1, max_length=8)
    memory_gb: NonNegative = 0.0
    positions_m: list[tuple[Finite, Finite]] | None = None
    mobility: Mobility | None = None
    battery_j: Spread | None = None
    standby_power_w: NonNegative = 0.0

    @model_validator(mode="after")
    def _placed(self) -> Self:
        if self.positions_m is not None and len(self.positions_m) != self.count:
            raise ValueError(f"positions_m has {len(self.positions_m)} places for count = {self.count} devices")
        return self


class Reward(Section):
    """Weights of equation (15), mixed with the team's:

    r = -w_L min(L / scale, clip) - w_d [missed] - w_E E / E_0 + w_q q - w_p price x work
        - w_l (share of a lost task that was still to be done).
    """

    latency: NonNegative = 1.0
    miss: NonNegative = 0.0
    energy: NonNegative = 0.0
    energy_scale_j: Positive = 1.0
    quality: NonNegative = 0.0
    price: NonNegative = 0.0
    loss: NonNegative = 0.0
    latency_scale_s: Positive | None = None
    clip: Positive = 3.0
    cooperation: Share = 0.5


def _all_unlike(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} with the same name: {', '.join(twice)}")


class Scenario(Section):
    """A plant: devices, servers, radio, tasks, arrivals and how performance is counted."""

    format: Literal[1] = 1
    name: Name
    title: str = Field(default="", max_length=200)
    work_unit: str = Field(default="work units", max_length=64)
    slot: Slot = Slot()
    episode: Episode = Episode()
    devices: Devices
    servers: list[Server] = Field(min_length=1, max_length=4096)
    radio: Radio = Radio()
    service: Service = Service()
    failures: Failures = Failures()
    models: list[GenerationModel] = Field(default_factory=list, max_length=256)
    switching: bool = False
    cache: Cache | None = None
    tasks: Tasks
    arrivals: Arrivals
    reward: Reward = Reward()
    max_uploads: int | None = Field(default=None, ge=1, le=16384)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tasks.kind == "catalogue" and not self.models:
            raise ValueError('tasks.kind = "catalogue" needs at least one [[models]] entry')
        if self.devices.count * len(self.servers) >= 2**24:
            raise ValueError(
                f"devices.count x servers = {self.devices.count * len(self.servers)} links, must be below {2**24}"
            )
        if self.tasks.repeat_model > 0 and self.arrivals.drawn:
            raise ValueError(
                'tasks.repeat_model needs arrivals.kind = "trace": drawn requests have no order to repeat in'
            )
        if (self.reward.quality > 0 or self.tasks.least_quality > 0) and not self.has_quality:
            raise ValueError(
                "reward.quality and tasks.least_quality need models.quality of every model, "
                "or servers.quality of every server with devices.local = false"
            )
        if self.tasks.step_options is not None and any(model.step_work is None for model in self.models):
            raise ValueError("tasks.step_options needs models.step_work of every model")
        if self.switching and self.tasks.kind != "catalogue":
            raise ValueError('switching = true needs tasks.kind = "catalogue"')
        if self.switching:
            largest = max(model.memory_gb for model in self.models)
            for server in self.servers:
                if server.memory_gb < largest:
                    raise ValueError(
                        f"server {server.name!r} has memory_gb = {server.memory_gb:g}, the largest model needs "
                        f"{largest:g}; give it at least that"
                    )
        if self.cache is not None and not self.switching:
            raise ValueError("cache needs switching = true: else no model is ever loaded")
        for what, names in (("servers", [s.name for s in self.servers]), ("models", [m.name for m in self.models])):
            _all_unlike(what, names)
        return self

    @model_validator(mode="after")
    def _few_levels(self) -> Self:
        if self.levels > MOST_LEVELS:
            counts = ", ".join(f"{name} {count}" for name, count in self.factors.items() if count > 1)
            raise ValueError(
                f"{self.levels} ways to do a task at a place ({counts}), at most {MOST_LEVELS}; shorten "
                "tasks.step_options, devices.power_options_dbm, devices.band_weights, tasks.cpu_weights, "
                "servers.services or tasks.split_options"
            )
        return self

    @model_validator(mode="after")
    def _somebody_is_there(self) -> Self:
        # Before anything asks for the capacity.
        episode_s = self.episode.slots * self.slot.length_s
        if not any(server.share_present(episode_s) > 0 for server in self.servers):
            raise ValueError(
                f"servers.present: no server is ever there in an episode of {episode_s:g} s (episode.slots x "
                "slot.length_s); let one begin earlier, or lengthen episode.slots"
            )
        return self

    @model_validator(mode="after")
    def _service_fits(self) -> Self:
        kind, shared = self.service.discipline, ("sharing", "batching")
        users = {"concurrency": shared, "places": shared, "capacity": ("capacity",)}
        needs = {"concurrency": ("batching",), "capacity": ("capacity",)}
        for server in self.servers:
            for key, kinds in users.items():
                if getattr(server, key) is not None and kind not in kinds:
                    raise ValueError(
                        f'server {server.name!r} has {key}, which service.discipline = "{kind}" does not use; '
                        f"remove it, or choose {' or '.join(kinds)}"
                    )
            for key, kinds in needs.items():
                if getattr(server, key) is None and kind in kinds:
                    raise ValueError(
                        f'service.discipline = "{kind}" needs servers.{key}; server {server.name!r} has none'
                    )
            if server.concurrency is not None and server.concurrency < server.gpus:
                raise ValueError(
                    f"server {server.name!r}: concurrency = {server.concurrency} must not be below gpus = {server.gpus}"
                )
        return self

    @model_validator(mode="after")
    def _discipline_fits(self) -> Self:
        kind = self.service.discipline
        if kind in ("capacity", "gang"):
            if self.tasks.kind != "catalogue":
                raise ValueError(f'service.discipline = "{kind}" needs tasks.kind = "catalogue"')
            if self.switching:
                raise ValueError(
                    f'switching = true does not go with service.discipline = "{kind}": '
                    + ("a gang loads its model itself (models.gangs.load_s)" if kind == "gang" else "it has no models")
                )
            if self.failures.any:
                raise ValueError(f'failures do not go with service.discipline = "{kind}"')
        if kind == "capacity" and (self.tasks.deadline == "drop" or self.service.max_wait_s is not None):
            raise ValueError('service.discipline = "capacity" has no queue: no tasks.deadline = "drop", no max_wait_s')
        if self.cache is not None and (kind != "fifo" or self.failures.any):
            other = "failures" if kind == "fifo" else f'service.discipline = "{kind}"'
            raise ValueError(
                f"cache does not go with {other}: models are loaded on GPUs that take one task each; remove one"
            )
        most = max(server.gpus for server in self.servers)
        for model in self.models:
            if (kind == "gang") != bool(model.gangs):
                raise ValueError(
                    f'model {model.name!r}: models.gangs and service.discipline = "gang" need each other; '
                    f"the discipline is {kind!r}"
                )
            if any(gang.gpus > most for gang in model.gangs):
                raise ValueError(f"model {model.name!r} asks for more GPUs than any server has ({most})")
            if model.square_work and self.tasks.step_options is not None:
                raise ValueError("tasks.step_options needs work that is linear in the steps: no models.square_work")
        return self

    @model_validator(mode="after")
    def _services_fit(self) -> Self:
        for server in self.servers:
            if server.services and not self.has_quality:
                raise ValueError(
                    f"server {server.name!r} has services, but results have no quality to choose by: give "
                    "servers.services.quality everywhere with devices.local = false, or models.quality of every model"
                )
            _all_unlike(f"server {server.name!r} has services", [service.name for service in server.services])
            for service in server.services:
                if len(service.base) not in (0, len(self.models)):
                    raise ValueError(
                        f"server {server.name!r}, service {service.name!r}: services.base has {len(service.base)} "
                        f"numbers for {len(self.models)} models; give one for each of [[models]], or none"
                    )
        if not self.slot.quality_known and not self.reward.quality > 0:
            raise ValueError("slot.quality_known = false needs reward.quality above 0: else there is nothing to learn")
        return self

    @model_validator(mode="after")
    def _weights_share(self) -> Self:
        kind, radio = self.service.discipline, self.radio
        if self.devices.band_weights is not None:
            if radio.sharing != "equal":
                raise ValueError(
                    f'devices.band_weights needs radio.sharing = "equal": with {radio.sharing!r} no band is shared; '
                    "choose that, or remove the weights"
                )
            if radio.model == "wired":
                raise ValueError('devices.band_weights needs a radio: with radio.model = "wired" no band is shared')
        if self.tasks.cpu_weights is not None and kind != "sharing":
            raise ValueError(
                f'tasks.cpu_weights needs service.discipline = "sharing": with {kind!r} tasks do not share a GPU by '
                "weight; choose that, or remove the weights"
            )
        return self

    @model_validator(mode="after")
    def _splitting_fits(self) -> Self:
        parts, radio = self.tasks.most_parts, self.radio
        if parts == 1:
            return self
        if parts > len(self.servers):
            raise ValueError(f"tasks.split_options = {self.tasks.split_options}: there are {len(self.servers)} servers")
        refused = (
            (
                self.service.discipline != "fifo" or self.failures.any,
                'needs service.discipline = "fifo" and no failures: elsewhere a part may be slowed down after others '
                "have ended",
            ),
            (
                self.tasks.deadline == "drop" or self.service.max_wait_s is not None,
                'needs tasks.deadline = "late" and no service.max_wait_s: a part could be discarded while others run',
            ),
            (self.devices.battery_j is not None, "does not go with devices.battery_j"),
            (
                any(server.quality or server.services for server in self.servers),
                "does not go with servers.quality or servers.services: parts of one result would differ; use "
                "models.quality",
            ),
            (
                any(server.present for server in self.servers),
                "does not go with servers.present: a part could wait for its server while others run",
            ),
            (radio.one_at_a_time, "does not go with radio.one_at_a_time: all parts are sent at once"),
            (
                self.routed and radio.sharing == "equal" and radio.model != "wired",
                'needs radio.sharing = "none" where tasks go over a home cell: parts would share it',
            ),
        )
        for wrong, why in refused:
            if wrong:
                raise ValueError(f"tasks.split_options above 1 {why}")
        return self

    @property
    def has_quality(self) -> bool:
        """Whether results have a quality."""
        if self.tasks.kind != "catalogue":
            return False
        of_servers = not self.devices.local and all(None not in server.laws for server in self.servers)
        return of_servers or all(model.quality is not None for model in self.models)

    @property
    def asks_steps(self) -> bool:
        """Whether the denoising steps of a request matter beside its work."""
        return self.has_quality or bool(self.tasks.step_options) or self.service.discipline == "capacity"

    @property
    def routed(self) -> bool:
        """Whether some server is reached over the cell of another."""
        return self.radio.access == "home" or not all(server.cell for server in self.servers)

    @property
    def services(self) -> int:
        """Most services that a server offers; 1 where there is no choice."""
        return max(len(server.laws) for server in self.servers)

    @property
    def factors(self) -> dict[str, int]:
        """How many there are of each thing that can be chosen with the place (1: no choice), the fastest digit of a
        level first (see `gmel.simulator.levels`)."""
        tasks, devices = self.tasks, self.devices
        return {
            "steps": len(tasks.step_options or [0]),
            "power_dbm": len(devices.power_options_dbm or [0]),
            "band_weight": len(devices.band_weights or [0]),
            "cpu_weight": len(tasks.cpu_weights or [0]),
            "service": self.services,
            "split": len(tasks.split_options or [0]),
        }

    @property
    def levels(self) -> int:
        """Ways to do a task at one place: what there is to choose from, multiplied."""
        return math.prod(self.factors.values())

    @property
    def counts_more_than_latency(self) -> bool:
        """Whether options differ in what the reward counts beside latency and deadline."""
        reward = self.reward
        manners = self.levels // self.factors["split"]
        missed = reward.miss > 0 and self.tasks.least_quality > 0
        return manners > 1 or missed or reward.quality > 0 or reward.price > 0 or reward.energy > 0

    @property
    def capacity(self) -> float:
        """Work units per second that all servers can do together, failures and absence counted."""
        return self.capacity_in(self.episode.slots)

    def capacity_in(self, slots: int) -> float:
        """The same in an episode of so many slots: a server counts for the time that it is there."""
        episode_s = slots * self.slot.length_s
        return self.failures.availability * sum(
            server.share_present(episode_s) * server.speed * self.best_rate(server) for server in self.servers
        )

    def best_rate(self, server: Server) -> float:
        """Seconds of service per second of a server with as many tasks in service as it takes."""
        if self.service.discipline == "capacity":
            return (server.capacity or 0.0) / (self._chosen_steps or self._popular(lambda model: model.steps.mean))
        if self.service.discipline == "gang":
            return server.gpus / self._popular(lambda model: model.gpus_per_speed)
        if self.service.discipline != "batching":
            return float(server.gpus)
        limit = server.concurrency or server.gpus
        return limit / (1.0 + server.round_share * (limit - server.gpus) / server.gpus)

    def _popular(self, value: Callable[[GenerationModel], float]) -> float:
        """Mean over the catalogue by popularity."""
        total = sum(model.popularity for model in self.models)
        return sum(model.popularity * value(model) for model in self.models) / total

    @property
    def mean_work(self) -> float:
        """Expected work of a request, in work units; with `tasks.step_options` the mean over them."""
        noise = math.exp(0.5 * self.tasks.noise_sigma**2)
        if self.tasks.kind == "uniform":
            assert self.tasks.work is not None  # guaranteed by Tasks
            return self.tasks.work.mean * noise
        return self._popular(lambda model: model.mean_work(self._chosen_steps)) * noise

    @property
    def _chosen_steps(self) -> float | None:
        """Mean of the steps that devices choose from; None where the model tells."""
        options = self.tasks.step_options
        return sum(options) / len(options) if options else None

    @property
    def mean_bits_in(self) -> float:
        """Expected upload of a request, in bits."""
        if self.tasks.kind == "uniform":
            assert self.tasks.bits_in is not None  # guaranteed by Tasks
            return self.tasks.bits_in.mean
        return self._popular(lambda model: model.bits_in.mean)

    @property
    def arrival_rate_per_s(self) -> float | None:
        """Requests per second of the whole plant; None for a trace that keeps its own time."""
        arrivals = self.arrivals
        if arrivals.rate_per_s is not None:
            return arrivals.rate_per_s
        if arrivals.load is not None:
            return arrivals.load * self.capacity / self.mean_work
        devices_per_s = self.devices.count / self.slot.length_s
        if arrivals.probability is not None:
            return devices_per_s * arrivals.probability * (arrivals.places or 1)
        if arrivals.count is not None:
            return devices_per_s * 0.5 * (arrivals.count[0] + arrivals.count[1])
        return None

    @property
    def request_probability(self) -> float:
        """Probability of a request in each place of a device and slot (Bernoulli arrivals)."""
        rate = self.arrival_rate_per_s
        assert rate is not None  # Arrivals demands it
        return rate * self.slot.length_s / (self.devices.count * (self.arrivals.places or 1))

    @model_validator(mode="after")
    def _arrivals_fit(self) -> Self:
        if self.arrivals.kind == "bernoulli" and self.request_probability > 1:
            raise ValueError(
                f"arrivals: the load asks for a request with probability {self.request_probability:.3g} in "
                "each place of a device and slot; at most 1: raise arrivals.places or devices.count, or lower the load"
            )
        return self

    @property
    def smallest_upload_s(self) -> float:
        """Seconds that no upload of a drawn request falls short of, alone on the best link; 0 where that is not known.

        The rate is bounded where it is fixed, or has a most bits per second and hertz.
        """
        radio, tasks = self.radio, self.tasks
        bits = tasks.bits_in.low if tasks.kind == "uniform" and tasks.bits_in else 0.0
        if tasks.kind == "catalogue":
            bits = min(model.bits_in.low for model in self.models)
        bits = bits / tasks.most_parts
        if radio.rate_bps is not None:
            return bits / radio.rate_bps.high
        most = radio.most_bits_per_s_hz
        if radio.model == "wired" or most is None:
            return 0.0
        return bits / max(radio.uplink_share * radio.bandwidth_hz * most, 1.0)

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        # A trace may have sizes and deadlines of its own.
        deadline_s, upload_s = self.tasks.deadline_s.high, self.smallest_upload_s
        if self.arrivals.drawn and deadline_s < upload_s:
            raise ValueError(
                f"tasks.deadline_s.high = {deadline_s:g} is shorter than the smallest upload, {upload_s:.3g} s: no "
                "task could be sent in time; allow more time, less bits_in, or a faster radio"
            )
        return self

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        radio = self.radio
        if self.devices.mobility is not None:
            if not radio.placed:
                raise ValueError(f'devices.mobility needs radio.model "inf" or "log-distance", not {radio.model!r}')
            if self.devices.positions_m is not None:
                raise ValueError("devices.mobility and devices.positions_m exclude each other")
        if self.devices.standby_power_w > 0 and self.devices.battery_j is None:
            raise ValueError("devices.standby_power_w needs devices.battery_j")
        if not any(server.cell for server in self.servers):
            raise ValueError("servers: at least one needs a cell")
        always = radio.model in ("fixed", "wired") or (
            radio.floor == "clip" and (radio.fading in ("block", "ar1") or radio.rate == "shannon")
        )
        if not self.devices.local and not always:
            raise ValueError(
                'devices.local = false needs links that always carry something: radio.floor = "clip" with '
                'fading = "block" or rate = "shannon", or radio.model "fixed" or "wired"'
            )
        return self
