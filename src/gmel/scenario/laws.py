"""What the sections of a scenario are made of: ranges of numbers, names, and simple random laws."""

import math
from typing import Annotated, Any, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

__all__ = [
    "Choice",
    "Decibel",
    "Finite",
    "Name",
    "NonNegative",
    "Positive",
    "Range",
    "Section",
    "Share",
    "Spread",
    "Weight",
]

Positive = Annotated[float, Field(ge=1e-12, le=1e12, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Decibel = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
# Of a share among others: the ratio of two stays within what float32 carries.
Weight = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$")]


class Section(BaseModel):
    """A table of the scenario file: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _values_are_what_they_look_like(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would read true and "1" as 1, and "yes" as true.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _asks(annotation, int, float):
            if _has(value, bool):
                raise ValueError("give a number, not true or false")
            if _has(value, str) and not _asks(annotation, str):
                raise ValueError("give a number, without quotes")
        elif _asks(annotation, bool) and value is not None and not isinstance(value, bool):
            raise ValueError("give true or false")
        return value


def _has(value: Any, kind: type) -> bool:
    return isinstance(value, kind) or (isinstance(value, list | tuple) and any(_has(each, kind) for each in value))


def _asks(annotation: Any, *kinds: type) -> bool:
    """Whether a field is of one of these types, or made of them; sections look at their own."""
    return annotation in kinds or any(_asks(each, *kinds) for each in get_args(annotation))


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


class Spread(Range):
    """A positive number, or a uniform law on [low, high] of positive numbers. In files: `x = 2.0`, `x = { low = 1,
    high = 3 }`."""

    low: Positive
    high: Positive

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, dict | Range):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError("give a number greater than 0, or { low = ..., high = ... }")
        return {"low": value, "high": value}

    @classmethod
    def constant(cls, value: float) -> Self:
        """The law of a number."""
        return cls(low=value, high=value)

    @model_serializer(mode="wrap")
    def _as_number(self, handler: SerializerFunctionWrapHandler) -> Any:
        return handler(self) if self.varies else self.low

    @property
    def varies(self) -> bool:
        """Whether it is more than a number."""
        return self.low < self.high


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
