"""The sections of a scenario about requests: what they ask for and when they come."""

import itertools
import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gmel.scenario.laws import Choice, Finite, Name, NonNegative, Positive, Range, Section, Share, Spread, Weight
from gmel.scenario.quality import Quality

__all__ = ["Arrivals", "Burst", "DayCycle", "Gang", "GenerationModel", "LoadTime", "Tasks"]


MOST_STEPS = 10_000
"""Most denoising steps, and most images, of a request: quality is a table over the steps."""


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


class Gang(Section):
    """One way to run a model: on `gpus` GPUs together, `speedup` times as fast as on one, cold after `load_s` more."""

    gpus: int = Field(ge=1, le=64)
    weight: Positive = 1.0
    speedup: Positive = 1.0
    load_s: NonNegative = 0.0


class GenerationModel(Section):
    """One entry of the catalogue: what a request for this model costs.

    Work = images x (fixed_work + steps x step_work + steps^2 x square_work) + bits_in x work_per_bit, in work units
    (equation (1)). A range of `step_work` is drawn anew for each request.
    """

    name: Name
    popularity: Positive
    step_work: Spread | None = None
    work_per_bit: Spread | None = None
    fixed_work: Finite = 0.0
    square_work: NonNegative = 0.0
    steps: Choice
    images: Choice
    memory_gb: Positive
    bits_in: Range
    bits_out_per_image: NonNegative = 0.0
    load: LoadTime = LoadTime()
    load_scale: Positive = 1.0
    quality: Quality | None = None
    gangs: tuple[Gang, ...] = Field(default=(), max_length=16)

    @property
    def gpus_per_speed(self) -> float:
        """GPU-seconds that a second of work on one GPU takes, on average over the gangs."""
        if not self.gangs:
            return 1.0
        weight = sum(gang.weight for gang in self.gangs)
        return sum(gang.weight * gang.gpus / gang.speedup for gang in self.gangs) / weight

    def mean_work(self, steps: float | None = None) -> float:
        """Expected work of a request for this model, without noise; at `steps`, or over those asked for."""
        step_work = self.step_work.mean if self.step_work else 0.0
        bit_work = self.work_per_bit.mean if self.work_per_bit else 0.0
        total = sum(self.steps.weights)
        square = sum(w * v**2 for v, w in zip(self.steps.values, self.steps.weights, strict=True)) / total
        mean, square = (self.steps.mean, square) if steps is None else (steps, steps**2)
        each = self.fixed_work + mean * step_work + square * self.square_work
        return self.images.mean * each + self.bits_in.mean * bit_work

    @model_validator(mode="after")
    def _countable(self) -> Self:
        for what, law in (("steps", self.steps), ("images", self.images)):
            if max(law.values) > MOST_STEPS:
                raise ValueError(f"{what}.values = {max(law.values):g}: at most {MOST_STEPS:,}")
        return self

    @model_validator(mode="after")
    def _works(self) -> Self:
        least = min(self.steps.values)
        step_work = self.step_work.low if self.step_work else 0.0
        bit_work = self.work_per_bit.low if self.work_per_bit else 0.0
        work = min(self.images.values) * (self.fixed_work + least * step_work + least**2 * self.square_work)
        if work + self.bits_in.low * bit_work <= 0:
            raise ValueError(
                f"the smallest request would have {work + self.bits_in.low * bit_work:g} work units, must be above 0: "
                "give step_work, fixed_work, or work_per_bit with bits_in.low > 0"
            )
        return self


class Tasks(Section):
    """What a request asks for.

    `uniform`: work and size are drawn directly. `catalogue`: a generation model is drawn by popularity, its steps
    and images give the work. With `step_options` the device chooses the denoising steps with the place, in place of
    those drawn. A result of less than `least_quality` counts as missed. With `cpu_weights` the device chooses with the
    place the weight of its task where a server shares its time: speeds are in proportion to the weights.

    With `split_options`, numbers of servers in rising order, the device chooses with the place over how many servers
    its task is split, so that all parts end together (AMCoEdge); 1 is a whole task.
    """

    kind: Literal["uniform", "catalogue"] = "catalogue"
    work: Range | None = None
    bits_in: Range | None = None
    bits_out: NonNegative = 0.0
    deadline_s: Range
    deadline: Literal["late", "drop"] = "late"
    noise_sigma: Annotated[float, Field(ge=0, le=3)] = 0.0
    repeat_model: Share = 0.0
    step_options: list[Annotated[float, Field(gt=0, le=1000)]] | None = Field(default=None, min_length=1, max_length=16)
    cpu_weights: list[Weight] | None = Field(default=None, min_length=1, max_length=8)
    split_options: list[Annotated[int, Field(ge=1, le=16)]] | None = Field(default=None, min_length=1, max_length=8)
    least_quality: Share = 0.0

    @property
    def most_parts(self) -> int:
        """Most servers that work on one task."""
        return max(self.split_options or [1])

    @model_validator(mode="after")
    def _rising(self) -> Self:
        options = self.split_options or []
        if any(more <= fewer for fewer, more in itertools.pairwise(options)):
            raise ValueError(f"split_options = {options} must rise, each number once")
        return self

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.step_options is not None and self.kind != "catalogue":
            raise ValueError('step_options needs kind = "catalogue": other tasks have no steps')
        if self.deadline_s.low <= 0:
            raise ValueError("deadline_s.low must be greater than 0")
        if self.kind == "uniform":
            if self.work is None or self.bits_in is None:
                raise ValueError('kind = "uniform" needs tasks.work and tasks.bits_in')
            if self.work.low <= 0:
                raise ValueError("work.low must be greater than 0")
        return self


class Burst(Section):
    """The bursts of an MMPP: the rate is `ratio` times as high in a burst; both times are exponential, in whole slots.

    A two-state Markov-modulated Poisson process (Fischer and Meier-Hellstern 1993, "The MMPP cookbook") whose state
    changes at slot starts.
    """

    ratio: Annotated[float, Field(gt=1, le=1e4)] = 5.0
    mean_quiet_s: Positive = 60.0
    mean_burst_s: Positive = 15.0


class DayCycle(Section):
    """A rate that follows the time of day: rate x (1 + amplitude sin(2 pi t / period_s)), t = 0 at the reset."""

    amplitude: Share = 0.5
    period_s: Positive = 86_400.0


class Arrivals(Section):
    """When requests come.

    `poisson`, `mmpp` (with `burst`) and `gamma` (renewals, intervals of coefficient of variation `cv`) make one stream
    of the whole plant, each request from a device drawn by its weight. `bernoulli`: each device has `places` chances a
    slot, each gives a request with `probability`. `uniform`: each device has a whole number of requests a slot,
    uniform on
    `count`. `trace`: replayed.

    The rate is given by `load` or by `rate_per_s` (`bernoulli` also by `probability`, `uniform` by `count`). Load is
    offered work over the capacity of all servers. A trace is stretched in time to the wanted rate; without `load` and
    `rate_per_s` it keeps its own time. `train_share` of a trace is for training, the rest is held out for evaluation.
    """

    kind: Literal["poisson", "mmpp", "gamma", "bernoulli", "uniform", "trace"] = "poisson"
    load: Annotated[float, Field(ge=1e-6, le=10, allow_inf_nan=False)] | None = None
    rate_per_s: Positive | None = None
    trace: str | None = None
    cv: Annotated[float, Field(ge=0.05, le=20)] | None = None
    burst: Burst | None = None
    day: DayCycle | None = None
    probability: Annotated[float, Field(gt=0, le=1)] | None = None
    places: int | None = Field(default=None, ge=1, le=4096)
    count: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1, le=4096)]] | None = None
    device_skew: Annotated[float, Field(ge=0, le=3)] = 0.0
    train_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    max_per_slot: int | None = Field(default=None, ge=1, le=4096)

    @property
    def rate_is_given(self) -> bool:
        """Whether `load` or `rate_per_s` is."""
        return self.load is not None or self.rate_per_s is not None

    @property
    def drawn(self) -> bool:
        """Whether requests are drawn; else they are replayed."""
        return self.kind != "trace"

    @property
    def per_device(self) -> bool:
        """Whether each device draws its own number of requests."""
        return self.kind in ("bernoulli", "uniform")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.load is not None and self.rate_per_s is not None:
            raise ValueError("give load or rate_per_s, not both")
        if self.kind in ("poisson", "mmpp", "gamma") and not self.rate_is_given:
            raise ValueError(f'kind = "{self.kind}" needs load or rate_per_s')
        if self.kind == "bernoulli" and self.rate_is_given == (self.probability is not None):
            raise ValueError('kind = "bernoulli" needs one of probability, load and rate_per_s')
        if self.kind == "uniform" and (self.count is None or self.rate_is_given):
            raise ValueError('kind = "uniform" needs count, and neither load nor rate_per_s')
        if self.count is not None and self.count[0] > self.count[1]:
            raise ValueError(f"count = {list(self.count)} must be [low, high]")
        if self.kind == "trace" and self.trace is None:
            raise ValueError('kind = "trace" needs the name of a shipped trace or a file')
        if self.kind == "gamma" and self.cv is None:
            raise ValueError('kind = "gamma" needs cv, the coefficient of variation of the times between requests')
        return self

    @model_validator(mode="after")
    def _nothing_unused(self) -> Self:
        users: dict[str, tuple[str, ...]] = {
            "cv": ("gamma",),
            "burst": ("mmpp",),
            "day": ("poisson", "mmpp"),
            "probability": ("bernoulli",),
            "places": ("bernoulli",),
            "count": ("uniform",),
        }
        for key, kinds in users.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key} is for kind = {' and '.join(repr(kind) for kind in kinds)}, not {self.kind!r}")
        if self.per_device and self.device_skew > 0:
            raise ValueError(
                f"device_skew has no effect with kind = {self.kind!r}: every device draws its own requests"
            )
        return self
