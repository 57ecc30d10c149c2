"""What a plant is: the typed scenario, every field with its unit and range.

A scenario is a TOML file with the sections of :class:`Scenario`. Unknown keys are errors that name the nearest key.
Sources of the model: reference equations (1)-(15) of `docs/model.md`; radio: 3GPP TR 38.901 (Indoor Factory).
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Arrivals",
    "Devices",
    "Episode",
    "Failures",
    "GenerationModel",
    "LoadTime",
    "Radio",
    "Reward",
    "Scenario",
    "Server",
    "Service",
    "Tasks",
]

Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$")]


class Section(BaseModel):
    """A table of the scenario file: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(Section):
    """A uniform law on [low, high]; `low = high` is a constant."""

    low: NonNegative
    high: NonNegative

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"low = {self.low:g} must not exceed high = {self.high:g}")
        return self

    @property
    def mean(self) -> float:
        """Expected value."""
        return 0.5 * (self.low + self.high)


class Choice(Section):
    """A discrete law: `values` with `weights` (need not sum to one)."""

    values: list[Positive] = Field(min_length=1, max_length=64)
    weights: list[NonNegative] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.values) != len(self.weights):
            raise ValueError(f"{len(self.values)} values but {len(self.weights)} weights")
        if sum(self.weights) <= 0:
            raise ValueError("at least one weight must be positive")
        return self

    @property
    def mean(self) -> float:
        """Expected value."""
        return sum(v * w for v, w in zip(self.values, self.weights, strict=True)) / sum(self.weights)


class Slot(Section):
    """When decisions fall and what is known at them."""

    length_s: Positive = 1.0
    broadcast_age_slots: int = Field(default=1, ge=0, le=64)
    latency_from: Literal["generated", "decided"] = "generated"


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
    """The devices: alike but for where they stand (`positions_m`, else drawn for each episode) and what they need."""

    count: int = Field(ge=1, le=100_000)
    speed: Positive
    compute_power_w: NonNegative = 10.0
    idle_power_w: NonNegative = 0.1
    tx_power_dbm: Finite = 23.0
    memory_gb: NonNegative = 0.0
    positions_m: list[tuple[Finite, Finite]] | None = None

    @model_validator(mode="after")
    def _placed(self) -> Self:
        if self.positions_m is not None and len(self.positions_m) != self.count:
            raise ValueError(f"positions_m has {len(self.positions_m)} places for count = {self.count} devices")
        return self


class Server(Section):
    """An edge server: `gpus` alike accelerators of `speed` work units per second each, one radio cell.

    `concurrency` is the most tasks in service at once where servers share their time (none: no limit), `round_share`
    the share of a denoising round that grows with the batch, a / (a + b) of a X + b (see :class:`Service`).
    """

    name: Name
    speed: Positive
    gpus: int = Field(default=1, ge=1, le=64)
    concurrency: int | None = Field(default=None, ge=1, le=1024)
    round_share: Share = 1.0
    memory_gb: Positive = 24.0
    power_w: NonNegative = 5.0
    switch_power_w: NonNegative = 5.0
    position_m: tuple[Finite, Finite] | None = None


class Service(Section):
    """How a server works on its tasks.

    `fifo`: one task a GPU, first in, first out. `sharing`: all tasks share the GPUs equally (processor sharing).
    `batching`: up to `servers.concurrency` tasks run together; one round of X tasks takes a X + b, so each is slowed
    down by 1 + round_share (X - 1) on one GPU.
    """

    discipline: Literal["fifo", "sharing", "batching"] = "fifo"


class Failures(Section):
    """Servers that fail, come back, or are slow for a slot; what happens in a slot holds for the whole slot.

    Up and down times are exponential with the given means (no `mean_up_s`: nothing fails), rounded up to slots. A
    server that is down serves nothing; uploads to it go on and wait. When it is back, the tasks in service go on where
    they stopped (`resume`) or from the beginning (`restart`). `straggle` is the probability that a server has only
    `straggle_speed` of its speed in a slot.
    """

    mean_up_s: Positive | None = None
    mean_down_s: Positive = 60.0
    on_failure: Literal["resume", "restart"] = "restart"
    straggle: Share = 0.0
    straggle_speed: Annotated[float, Field(gt=0, le=1)] = 0.25

    @property
    def any(self) -> bool:
        """Whether a server is ever slower than it should be."""
        return self.mean_up_s is not None or self.straggle > 0

    @property
    def availability(self) -> float:
        """Long-run mean of a server's relative speed."""
        up = 1.0 if self.mean_up_s is None else self.mean_up_s / (self.mean_up_s + self.mean_down_s)
        return up * (1.0 - self.straggle * (1.0 - self.straggle_speed))


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


class LoadTime(Section):
    """Bimodal load time of a model: warm (in the page cache of the host) with probability `warm_share`, else cold.

    Both modes are log-normal around their median with the same `sigma`.
    """

    warm_share: Share = 0.35
    warm_median_s: Positive = 2.8
    cold_median_s: Positive = 34.6
    sigma: Annotated[float, Field(ge=0, le=3)] = 0.3

    @property
    def mean(self) -> float:
        """Expected load time in seconds."""
        median = self.warm_share * self.warm_median_s + (1 - self.warm_share) * self.cold_median_s
        return median * math.exp(0.5 * self.sigma**2)


class GenerationModel(Section):
    """One entry of the catalogue: what a request for this model costs.

    Work = images x (fixed_work + steps x step_work), in work units (equation (1)).
    """

    name: Name
    popularity: Positive
    step_work: Positive
    fixed_work: NonNegative = 0.0
    steps: Choice
    images: Choice
    memory_gb: Positive
    bits_in: Range
    bits_out_per_image: NonNegative = 0.0
    load: LoadTime = LoadTime()
    load_scale: Positive = 1.0


class Tasks(Section):
    """What a request asks for.

    `uniform`: work and size are drawn directly. `catalogue`: a generation model is drawn by popularity, its steps
    and images give the work.
    """

    kind: Literal["uniform", "catalogue"] = "catalogue"
    work: Range | None = None
    bits_in: Range | None = None
    bits_out: NonNegative = 0.0
    deadline_s: Range
    deadline: Literal["late", "drop"] = "late"
    noise_sigma: Annotated[float, Field(ge=0, le=3)] = 0.0
    repeat_model: Share = 0.0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.deadline_s.low <= 0:
            raise ValueError("deadline_s.low must be greater than 0")
        if self.kind == "uniform":
            if self.work is None or self.bits_in is None:
                raise ValueError('kind = "uniform" needs tasks.work and tasks.bits_in')
            if self.work.low <= 0:
                raise ValueError("work.low must be greater than 0")
        return self


class Arrivals(Section):
    """When requests come: Poisson, or a trace. The rate is given by `load` or by `rate_per_s`.

    Load is offered work over the capacity of all servers. A trace is stretched in time to the wanted rate;
    without `load` and `rate_per_s` it keeps its own time. `train_share` of a trace is for training, the rest is
    held out for evaluation.
    """

    kind: Literal["poisson", "trace"] = "poisson"
    load: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    rate_per_s: Positive | None = None
    trace: str | None = None
    device_skew: Annotated[float, Field(ge=0, le=3)] = 0.0
    train_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    max_per_slot: int | None = Field(default=None, ge=1, le=4096)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.load is not None and self.rate_per_s is not None:
            raise ValueError("give load or rate_per_s, not both")
        if self.kind == "poisson" and self.load is None and self.rate_per_s is None:
            raise ValueError('kind = "poisson" needs load or rate_per_s')
        if self.kind == "trace" and self.trace is None:
            raise ValueError('kind = "trace" needs the name of a shipped trace or a file')
        return self


class Reward(Section):
    """Weights of equation (15): r = -w_L min(L / scale, clip) - w_d [late] - w_E E / E_0, mixed with the team's."""

    latency: NonNegative = 1.0
    miss: NonNegative = 0.0
    energy: NonNegative = 0.0
    energy_scale_j: Positive = 1.0
    latency_scale_s: Positive | None = None
    clip: Positive = 3.0
    cooperation: Share = 0.5


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
        if self.tasks.repeat_model > 0 and self.arrivals.kind == "poisson":
            raise ValueError(
                'tasks.repeat_model needs arrivals.kind = "trace": Poisson requests have no order to repeat in'
            )
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
        for what, names in (("servers", [s.name for s in self.servers]), ("models", [m.name for m in self.models])):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} with the same name: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _concurrency_fits(self) -> Self:
        kind = self.service.discipline
        for server in self.servers:
            if server.concurrency is None:
                if kind == "batching":
                    raise ValueError(
                        f'service.discipline = "batching" needs servers.concurrency; server {server.name!r} has none'
                    )
                continue
            if kind == "fifo":
                raise ValueError(
                    f'server {server.name!r} has concurrency, which service.discipline = "fifo" does not use; '
                    'remove it, or choose "sharing" or "batching"'
                )
            if server.concurrency < server.gpus:
                raise ValueError(
                    f"server {server.name!r}: concurrency = {server.concurrency} must not be below gpus = {server.gpus}"
                )
        return self

    @property
    def capacity(self) -> float:
        """Work units per second that all servers can do together, failures counted."""
        return self.failures.availability * sum(server.speed * self.best_rate(server) for server in self.servers)

    def best_rate(self, server: Server) -> float:
        """Seconds of service per second of a server with as many tasks in service as it takes."""
        if self.service.discipline != "batching":
            return float(server.gpus)
        limit = server.concurrency or server.gpus
        return limit / (1.0 + server.round_share * (limit - server.gpus) / server.gpus)

    @property
    def mean_work(self) -> float:
        """Expected work of a request, in work units."""
        noise = math.exp(0.5 * self.tasks.noise_sigma**2)
        if self.tasks.kind == "uniform":
            assert self.tasks.work is not None  # guaranteed by Tasks
            return self.tasks.work.mean * noise
        total = sum(model.popularity for model in self.models)
        work = sum(m.popularity * m.images.mean * (m.fixed_work + m.steps.mean * m.step_work) for m in self.models)
        return work / total * noise

    @property
    def mean_bits_in(self) -> float:
        """Expected upload of a request, in bits."""
        if self.tasks.kind == "uniform":
            assert self.tasks.bits_in is not None  # guaranteed by Tasks
            return self.tasks.bits_in.mean
        total = sum(model.popularity for model in self.models)
        return sum(model.popularity * model.bits_in.mean for model in self.models) / total

    @property
    def arrival_rate_per_s(self) -> float | None:
        """Requests per second of the whole plant; None for a trace that keeps its own time."""
        if self.arrivals.rate_per_s is not None:
            return self.arrivals.rate_per_s
        if self.arrivals.load is not None:
            return self.arrivals.load * self.capacity / self.mean_work
        return None
