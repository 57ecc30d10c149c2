"""The sections of a scenario about requests: what they ask for and when they come."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gmel.scenario.laws import Choice, Name, NonNegative, Positive, Range, Section, Share

__all__ = ["Arrivals", "GenerationModel", "LoadTime", "Tasks"]


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
