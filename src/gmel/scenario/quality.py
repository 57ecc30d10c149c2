"""The section of a scenario about the quality of results."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gmel.scenario.laws import Finite, NonNegative, Positive, Section, Share

__all__ = ["Quality"]


class Quality(Section):
    """Quality of a result by its denoising steps (equation (13)), from 0 to 1 but for `log`, which has no bounds.

    Below `first_steps` it is 0. `piecewise`: linear from `first` there to `last` at `last_steps`, constant above
    (AGOD). `log`: scale log_base(steps) + offset up to `last_steps`, `last` above (EAT). `power`: limit - factor
    steps^-exponent.
    """

    law: Literal["piecewise", "log", "power"] = "piecewise"
    first_steps: Annotated[float, Field(ge=0, le=1000)] = 1.0
    last_steps: Annotated[float, Field(gt=0, le=1000)] = 50.0
    first: Share = 0.0
    last: Share = 1.0
    scale: Positive = 0.16
    base: Annotated[float, Field(ge=1.01, le=1e6)] = 6.0
    offset: Finite = -0.02
    limit: Share = 1.0
    factor: NonNegative = 1.0
    exponent: Annotated[float, Field(gt=0, le=10)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.law != "power" and self.last_steps <= self.first_steps:
            raise ValueError(f"last_steps = {self.last_steps:g} must exceed first_steps = {self.first_steps:g}")
        return self
