"""What `evaluation.json` holds (schema 1): written by the evaluation, read by the tables and the report.

Numbers that do not exist (the interval of a single value, the latency of an unstable policy) are `null` in the file
and None here; the file is strict JSON.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, cast

from pydantic import TypeAdapter, ValidationError

# Pydantic checks typed dictionaries on Python 3.11 only from here; it depends on this package itself.
from typing_extensions import TypedDict

from gmel.evaluation.statistics import Interval
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file

__all__ = [
    "SCHEMA_VERSION",
    "Ccdf",
    "Decomposition",
    "Evaluation",
    "Herding",
    "Metric",
    "Metrics",
    "PolicyResult",
    "interval_of",
    "metric_of",
    "read_evaluation",
    "write_evaluation",
]

SCHEMA_VERSION = 1


class Metric(TypedDict):
    """One figure of one policy: estimate, 95 % interval, and what it was computed from.

    `values` has one entry per evaluation episode. With several training seeds it is the mean over them, and
    `by_training_seed` has the episodes of each: shape [training seeds, episodes].
    """

    mean: float | None
    low: float | None
    high: float | None
    values: list[float | None]
    by_training_seed: NotRequired[list[list[float | None]]]


class Metrics(TypedDict):
    """All figures of one policy; rates are shares between 0 and 1, `gap_closed` is a share and may be negative."""

    mean_latency_s: Metric
    p95_latency_s: Metric
    p99_latency_s: Metric
    completion_rate: Metric
    energy_j: Metric | None
    switches_per_offloaded_task: Metric | None
    quality: NotRequired[Metric | None]
    """Mean over the tasks done in time; None where results have no quality."""
    gap_closed: Metric | None


class Decomposition(TypedDict):
    """Mean latency in parts, seconds; they add up to the mean latency. None for an unstable policy."""

    wait_to_slot: float | None
    upload: float | None
    queue: float | None
    switch: float | None
    service: float | None
    download: float | None


class Ccdf(TypedDict):
    """Share of tasks slower than each latency; two lists of the same length."""

    latency_s: list[float]
    probability: list[float]


class PolicyResult(TypedDict):
    """One policy on the traffic that all of them saw. `ladder` is "L0" to "L6", or None beside the ladder."""

    name: str
    label: str
    ladder: str | None
    information: str
    mode: Literal["decentralised", "communicating", "central"]
    trained: bool
    unstable: bool
    metrics: Metrics
    decomposition_s: Decomposition
    ccdf: Ccdf


class Herding(TypedDict):
    """Server backlog in seconds at slot starts: per policy, [slots][servers]."""

    slots: int
    slot_s: float
    servers: list[str]
    series: dict[str, list[list[float]]]


class Evaluation(TypedDict):
    """A paired evaluation: every policy on the same `episodes` of `slots`, the first `warmup_slots` left out."""

    schema: int
    scenario: str
    load: float
    slot_s: float
    episodes: int
    slots: int
    warmup_slots: int
    training_seeds: int
    deadline: str
    deadline_s: float | None
    latency_from: Literal["generated", "decided"]
    policies: list[PolicyResult]
    herding: Herding | None


_ADAPTER: TypeAdapter[Evaluation] = TypeAdapter(Evaluation)


def metric_of(
    interval: Interval, values: Sequence[float], by_training_seed: Sequence[Sequence[float]] | None = None
) -> Metric:
    """An interval and its values as the file holds them; NaN and infinity become None."""
    metric = Metric(
        mean=_number(interval.mean),
        low=_number(interval.low),
        high=_number(interval.high),
        values=[_number(value) for value in values],
    )
    if by_training_seed is not None:
        metric["by_training_seed"] = [[_number(value) for value in row] for row in by_training_seed]
    return metric


def interval_of(metric: Metric | None) -> Interval:
    """The interval of a metric; NaN where the file has null or the metric is missing."""
    if metric is None:
        return Interval(math.nan, math.nan, math.nan)
    mean, low, high = (
        math.nan if metric[key] is None else float(metric[key] or 0.0) for key in ("mean", "low", "high")
    )
    return Interval(mean, low, high)


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file, checked.

    Raises:
        InputError: not readable, not JSON, another schema version, or content that does not hold together.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); evaluate the run again to write it") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); evaluate the run again to write it") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}, must be a JSON object; evaluate the run again")
    content = cast("dict[str, Any]", data)
    version = content.get("schema")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema is {version!r}, this gmel reads {SCHEMA_VERSION}; evaluate the run again")
    try:
        _ADAPTER.validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        shown = "" if first["type"] == "missing" else f", it is {str(first['input'])[:60]!r}"
        raise InputError(f"{path}: {field}: {first['msg']}{shown}; evaluate the run again") from error
    evaluation = cast("Evaluation", content)
    fault = _inconsistency(evaluation)
    if fault:
        raise InputError(f"{path}: {fault}; evaluate the run again")
    return evaluation


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes the file as `read_evaluation` reads it; NaN and infinity become null.

    Raises:
        ValueError: the evaluation does not hold together (a defect of the caller).
    """
    content = cast("Evaluation", _strict(evaluation))
    _ADAPTER.validate_python(content, strict=True)
    fault = _inconsistency(content)
    if fault:
        raise ValueError(fault)
    replace_file(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _inconsistency(evaluation: Evaluation) -> str | None:
    """The first thing types cannot say that is wrong, in words; None if all is well."""
    return next(_inconsistencies(evaluation), None)


def _inconsistencies(evaluation: Evaluation) -> Iterator[str]:
    names = [policy["name"] for policy in evaluation["policies"]]
    if not names:
        yield "policies: empty, must have at least one"
    if len(set(names)) < len(names):
        yield f"policies: names are {', '.join(names)}; each must occur once"
    for policy in evaluation["policies"]:
        for key, item in cast("dict[str, Metric | None]", policy["metrics"]).items():
            if item is not None:
                yield from _shape_faults(f"policies.{policy['name']}.metrics.{key}", item, evaluation)
        latency = policy["metrics"]["mean_latency_s"]
        numbers = [
            latency["mean"],
            *latency["values"],
            *(v for row in latency.get("by_training_seed", []) for v in row),
        ]
        if None in numbers and not policy["unstable"]:
            yield f"policies.{policy['name']}.metrics.mean_latency_s: has null, allowed only where unstable is true"
        if len(policy["ccdf"]["latency_s"]) != len(policy["ccdf"]["probability"]):
            yield f"policies.{policy['name']}.ccdf: its two lists differ in length, must be the same"
    herding = evaluation["herding"]
    if herding is None:
        return
    slots, servers = herding["slots"], len(herding["servers"])
    for name, rows in herding["series"].items():
        if len(rows) != slots or any(len(row) != servers for row in rows):
            yield f"herding.series.{name}: must be {slots} slots of {servers} servers each"


def _shape_faults(where: str, item: Metric, evaluation: Evaluation) -> Iterator[str]:
    episodes, seeds = evaluation["episodes"], item.get("by_training_seed", [])
    for row in [item["values"], *seeds]:
        if len(row) != episodes:
            yield f"{where}: {len(row)} values, must be one per episode ({episodes})"
    if len(seeds) not in (0, evaluation["training_seeds"]):
        yield f"{where}: {len(seeds)} training seeds, must be training_seeds ({evaluation['training_seeds']})"
