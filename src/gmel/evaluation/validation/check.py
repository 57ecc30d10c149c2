"""What a check is, what it returns, and how it is judged.

A check is one function with the law in the first line of its docstring and the source in a line `Source: ...`. It
drives the simulator and returns a `Sample` (a closed form and one value per independent replication) or an `Exact`
(the largest error of a recomputation).
"""

# SciPy ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import inspect
import math
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "CHECKS",
    "Check",
    "Exact",
    "Result",
    "Run",
    "Sample",
    "Shared",
    "check",
    "critical_score",
    "judge",
    "largest",
    "worse",
]

Floats = NDArray[np.float64]
Group = Literal["queues", "paths", "radio"]
Value = TypeVar("Value")

FAMILY_ERROR = 1e-4
"""Probability that any check of a correct simulator fails, all statistical checks together, were their means normal.

Means over replications are a little skewed, which can multiply the tail by a few; the promise made is 1e-3.
"""
POWER = 0.95
"""Probability with which an error of the size `Result.detects` is found."""


@dataclass(frozen=True)
class Sample:
    """A closed form beside one measured value per independent replication, in any unit.

    `controls` [replications, k] have mean 0 by construction and go along with the values: the part of the spread that
    they explain is taken out by regression (Lavenberg and Welch 1981). They must come from what the check itself drew,
    never from what the simulator made of it, or they would hide its errors.
    """

    expected: float
    values: Floats
    controls: Floats | None = None


@dataclass(frozen=True)
class Exact:
    """Largest absolute error of a recomputation over `compared` numbers, beside what rounding may cause."""

    error: float
    tolerance: float
    compared: int


class Shared:
    """What several checks look at, each made once, by the first that asks for it; checks may run side by side."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._locks: dict[str, threading.Lock] = {}

    def once(self, key: str, make: Callable[[], Value]) -> Value:
        """The value of `make`. Who asks while it is being made waits for it."""
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._values:
                self._values[key] = make()
            return self._values[key]


@dataclass(frozen=True)
class Run:
    """What a check gets: its own random numbers, and how much to do.

    `replications` independent ones in each of `batches`; exact runs are `batches` times as long. `shared` keeps what
    several checks look at, for the length of one validation.
    """

    seed: int
    name: str = ""
    replications: int = 64
    batches: int = 1
    shared: Shared = field(default_factory=Shared)

    @property
    def random(self) -> np.random.Generator:
        """A generator that depends on the seed and the name of the check alone: the same at every call."""
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])

    def once(self, key: str, make: Callable[[], Value]) -> Value:
        """The value of `make`, made by the first check that asks for it."""
        return self.shared.once(key, make)

    def repeat(self, batch: Callable[[np.random.Generator], tuple[Floats, ...]]) -> tuple[Floats, ...]:
        """What all batches gave, one after the other; each call gives arrays with a row per replication."""
        random = self.random
        parts = [batch(random) for _ in range(self.batches)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@dataclass(frozen=True)
class Check:
    """A registered check."""

    name: str
    group: Group
    statistical: bool
    function: Callable[[Run], Sample | Exact]

    @property
    def law(self) -> str:
        """First line of the docstring."""
        return _document(self.function)[0].rstrip(".")

    @property
    def source(self) -> str:
        """What follows `Source:` in the docstring."""
        lines = [line for line in _document(self.function) if line.startswith("Source:")]
        return lines[0].removeprefix("Source:").strip().rstrip(".") if lines else ""


CHECKS: dict[str, Check] = {}
"""All checks by name, in order of definition."""


def check(name: str, group: Group) -> Callable[[Callable[[Run], Value]], Callable[[Run], Value]]:
    """Registers a function as a check; whether it is statistical is read from its return type.

    Raises:
        ValueError: a second check of that name, or one that does not say its source or return type.
    """

    def register(function: Callable[[Run], Value]) -> Callable[[Run], Value]:
        kind = inspect.get_annotations(function).get("return")
        if name in CHECKS or kind not in (Sample, Exact):
            raise ValueError(f"check {name}: the name must be new and the return type Sample or Exact")
        entry = Check(name, group, kind is Sample, function)  # type: ignore[arg-type]
        if not entry.source:
            raise ValueError(f"check {name}: the docstring must have a line 'Source: ...'")
        CHECKS[name] = entry
        return function

    return register


@dataclass(frozen=True)
class Result:
    """The verdict on one check.

    Statistical: `error` is the standard error, `score` the t-score, `limit` its critical value, `detects` the smallest
    relative error of the measured quantity that is found with 95 % probability. Exact: `error` = `score` is the
    largest absolute error, `limit` = `detects` the tolerance; `count` is then the count of compared numbers, else of
    replications.
    """

    name: str
    group: Group
    law: str
    source: str
    statistical: bool
    expected: float | None
    measured: float | None
    error: float | None
    score: float | None
    limit: float
    detects: float | None
    count: int
    passed: bool
    seconds: float


def critical_score(degrees: int, comparisons: int) -> float:
    """Two-sided critical t-score at which all `comparisons` together fail a correct simulator with `FAMILY_ERROR`."""
    return float(stats.t.isf(0.5 * FAMILY_ERROR / comparisons, degrees))


def judge(entry: Check, found: Sample | Exact, comparisons: int, seconds: float) -> Result:
    """The verdict; `comparisons` is the number of statistical checks that share the error.

    A value that is not finite, too few replications, or nothing compared fails.
    """
    about = (entry.name, entry.group, entry.law, entry.source, entry.statistical)
    if isinstance(found, Exact):
        passed = found.compared > 0 and found.error <= found.tolerance
        error, limit = found.error, found.tolerance
        return Result(*about, None, None, error, error, limit, limit, found.compared, passed, seconds)
    measured, error, degrees = _mean_and_error(found)
    limit = critical_score(degrees, comparisons)
    score = (measured - found.expected) / error if error > 0 else math.nan
    # The standard error is itself uncertain, by 1 / sqrt(2 degrees): the spread of a non-central t.
    spread = math.sqrt(1.0 + limit**2 / (2.0 * degrees))
    detects = (limit + float(stats.norm.ppf(POWER)) * spread) * error / abs(found.expected)
    passed = math.isfinite(score) and abs(score) <= limit
    return Result(*about, found.expected, measured, error, score, limit, detects, found.values.size, passed, seconds)


def largest(differences: Floats) -> float:
    """The largest absolute value; what is not a number counts as infinite."""
    return float(np.max(np.nan_to_num(np.abs(differences), nan=np.inf, posinf=np.inf)))


def worse(error: float, *more: Any) -> float:
    """The larger error; what is not a number counts as infinite."""
    return max([error, *(abs(float(value)) if np.isfinite(value) else np.inf for value in more)])


def _mean_and_error(sample: Sample) -> tuple[float, float, int]:
    """Mean, its standard error and degrees of freedom; with controls, those of the regression at controls of 0."""
    values = np.asarray(sample.values, float)
    columns = [np.ones(values.size)]
    if sample.controls is not None:
        # A control that does not vary explains nothing (constant work).
        columns += [column / column.std() for column in sample.controls.T if column.std() > 0]
    design = np.stack(columns, axis=1)
    degrees = values.size - design.shape[1]
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ values
    variance = float(np.sum((values - design @ coefficients) ** 2)) / degrees
    return float(coefficients[0]), math.sqrt(variance * float(inverse[0, 0])), degrees


def _document(function: Callable[..., Any]) -> list[str]:
    return (inspect.getdoc(function) or "").splitlines()
