"""From episodes to `evaluation.json`: metrics with intervals, decomposition, distribution, the herding picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.episodes import AnyPolicy, Episodes, Measured, run_episodes
from gmel.evaluation.ladder import Entry, information_of
from gmel.evaluation.schema import (
    SCHEMA_VERSION,
    Ccdf,
    Decomposition,
    Evaluation,
    Herding,
    Metric,
    Metrics,
    PolicyResult,
    metric_of,
)
from gmel.evaluation.statistics import Interval, gap_closed, t_interval
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment
from gmel.simulator.records import Records

__all__ = ["PARTS", "Trained", "decomposition_of", "evaluate", "metrics_of"]

PARTS = ("wait_to_slot", "upload", "queue", "switch", "service", "download")
HERDING_SLOTS = 60
_CCDF_POINTS = 160

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A learned policy: one actor per training seed."""

    name: str
    label: str
    policies: Sequence[AnyPolicy]


def metrics_of(measured: Measured) -> dict[str, Floats]:
    """Figures of each episode, each an array [episodes].

    Denominators are tasks *generated*: one that was not final at the end of the drain counts as missed.
    """
    unfinished = measured.unfinished

    def completion(records: Records, left: int) -> float:
        return float(records.in_time.sum()) / max(1, len(records) + int(left))

    count = len(measured.records)
    loads = np.zeros(count) if measured.cache_loads is None else measured.cache_loads
    load_j = np.zeros(count) if measured.cache_load_j is None else measured.cache_load_j

    def switches(records: Records, more: float) -> float:
        offloaded = records.option > 0
        return (float((records.switch_s > 0).sum()) + more) / max(1, int(offloaded.sum()))

    def energy_j(records: Records, more_j: float) -> float:
        return float(records.energy_j.mean()) + more_j / max(1, len(records))

    def quality(records: Records) -> float:
        # Of what was done in time; not a number where results have no quality.
        return float(records.quality[records.in_time].mean()) if records.in_time.any() else float("nan")

    return {
        "mean_latency_s": measured.per_episode(lambda records: float(records.latency_s.mean())),
        "p95_latency_s": measured.per_episode(lambda records: float(np.percentile(records.latency_s, 95))),
        "p99_latency_s": measured.per_episode(lambda records: float(np.percentile(records.latency_s, 99))),
        "completion_rate": np.array(
            [completion(records, left) for records, left in zip(measured.records, unfinished, strict=True)]
        ),
        "energy_j": np.array([energy_j(*each) for each in zip(measured.records, load_j, strict=True)]),
        "switches_per_offloaded_task": np.array(
            [switches(*each) for each in zip(measured.records, loads, strict=True)]
        ),
        "quality": measured.per_episode(quality),
    }


def evaluate(
    scenario: Scenario,
    environment: Environment,
    entries: Sequence[Entry],
    trained: Sequence[Trained],
    episodes: Episodes,
    load: float,
    progress: Callable[[str], None] = lambda _: None,
    seed: int = 0,
) -> Evaluation:
    """Measures every policy on the same traffic.

    Args:
        scenario: what the environment was made of (for the labels).
        environment: where to run; for a trace, its held-out part.
        entries: the ladder.
        trained: learned policies; with several training seeds the interval is over the seeds.
        episodes: the traffic.
        load: offered load, for the record.
        progress: is told the label of the policy that runs.
        seed: of the policies' own randomness.
    """
    key = jax.random.key(seed)
    per_policy: dict[str, list[dict[str, Floats]]] = {}
    first: dict[str, Measured] = {}
    for entry in entries:
        progress(entry.label)
        measured = run_episodes(environment, entry.policy, episodes, key)
        per_policy[entry.name], first[entry.name] = [metrics_of(measured)], measured
    unstable = {name: measured.overloaded(load) for name, measured in first.items()}
    for learned in trained:
        per_policy[learned.name] = []
        unstable[learned.name] = False
        for number, policy in enumerate(learned.policies):
            progress(learned.label if len(learned.policies) == 1 else f"{learned.label}, seed {number}")
            measured = run_episodes(environment, policy, episodes, key)
            per_policy[learned.name].append(metrics_of(measured))
            first.setdefault(learned.name, measured)
            unstable[learned.name] |= measured.overloaded(load)
    reference = _reference(per_policy, unstable, "softmax7")
    optimum = _reference(per_policy, unstable, "optimum")
    results: list[PolicyResult] = []
    rows = [(e.name, e.label, e.rung, e.policy, False) for e in entries]
    rows += [(t.name, t.label, None, t.policies[0], True) for t in trained]
    for name, label, rung, policy, is_trained in rows:
        measured = first[name]
        results.append(
            PolicyResult(
                name=name,
                label=label,
                ladder=rung,
                information=information_of(policy),
                mode=policy.mode,
                trained=is_trained,
                unstable=unstable[name],
                metrics=_metrics(per_policy[name], reference, optimum),
                decomposition_s=decomposition_of(measured, unstable[name]),
                ccdf=_ccdf(measured),
            )
        )
    deadline = scenario.tasks.deadline_s
    return Evaluation(
        schema=SCHEMA_VERSION,
        scenario=scenario.name,
        load=round(load, 3),
        slot_s=scenario.slot.length_s,
        episodes=episodes.count,
        slots=episodes.slots,
        warmup_slots=episodes.warmup_slots,
        training_seeds=max([len(learned.policies) for learned in trained], default=0),
        deadline=scenario.tasks.deadline,
        deadline_s=deadline.low if deadline.low == deadline.high else None,
        latency_from=scenario.slot.latency_from,
        policies=results,
        herding=_herding(scenario, first, ["greedy", *[learned.name for learned in trained[:1]]], episodes),
    )


def _reference(per_policy: dict[str, list[dict[str, Floats]]], unstable: dict[str, bool], name: str) -> Floats | None:
    """Latency per episode of a policy that gap closed refers to; None where it is missing or has no mean."""
    if name not in per_policy or unstable[name]:
        return None
    return per_policy[name][0]["mean_latency_s"]


def _metrics(seeds: list[dict[str, Floats]], reference: Floats | None, optimum: Floats | None) -> Metrics:
    # A figure that does not exist in every episode (quality where results have none) is left out.
    known = [key for key in seeds[0] if all(np.isfinite(each[key]).all() for each in seeds)]
    figures = {key: _metric([each[key] for each in seeds]) for key in known}
    latency = [each["mean_latency_s"] for each in seeds]
    gap: Metric | None = None
    # Where the optimum of single slots is no better than L3 (light load, much switching) there is no gap to close.
    finite = all(np.isfinite(each).all() for each in latency)
    if reference is not None and optimum is not None and finite and optimum.mean() < reference.mean():
        values = latency[0] if len(seeds) == 1 else np.stack(latency)
        interval = gap_closed(reference, values, optimum)
        shares = (reference - np.mean(latency, axis=0)) / (reference - optimum)
        gap = metric_of(interval, list(shares))
    return Metrics(
        mean_latency_s=figures["mean_latency_s"],
        p95_latency_s=figures["p95_latency_s"],
        p99_latency_s=figures["p99_latency_s"],
        completion_rate=figures["completion_rate"],
        energy_j=figures["energy_j"],
        switches_per_offloaded_task=figures["switches_per_offloaded_task"],
        quality=figures.get("quality"),
        gap_closed=gap,
    )


def _metric(seeds: list[Floats]) -> Metric:
    """With one seed the interval is over episodes; with several it is over the seeds' means."""
    if len(seeds) == 1:
        return metric_of(t_interval(seeds[0]), list(seeds[0]))
    table = np.stack(seeds)
    interval = t_interval(table.mean(axis=1))
    return metric_of(Interval(interval.mean, interval.low, interval.high), list(table.mean(axis=0)), table.tolist())


def decomposition_of(measured: Measured, overloaded: bool) -> Decomposition:
    """Mean latency in its parts; nothing where there is no mean."""
    if overloaded:
        return Decomposition(**dict.fromkeys(PARTS))  # type: ignore[typeddict-item]
    # Means of episodes, as the mean latency beside it.
    parts = {
        part: float(measured.per_episode(lambda records, p=part: float(getattr(records, f"{p}_s").mean())).mean())
        for part in PARTS
    }
    return Decomposition(**parts)  # type: ignore[typeddict-item]


def _ccdf(measured: Measured) -> Ccdf:
    """Share of the tasks of all episodes that took longer, at points even in the logarithm of that share."""
    latency_s = np.sort(np.concatenate([records.latency_s for records in measured.records]))
    count = len(latency_s)
    shares = np.unique(np.concatenate([np.linspace(0.01, 0.99, 60), np.geomspace(10.0 / max(count, 10), 0.5, 100)]))
    shares = shares[(shares > 0) & (shares < 1)][::-1][:_CCDF_POINTS]
    return Ccdf(latency_s=np.quantile(latency_s, 1 - shares).tolist(), probability=shares.tolist())


def _herding(scenario: Scenario, measured: dict[str, Measured], names: list[str], episodes: Episodes) -> Herding | None:
    """Server backlog of the first episode over sixty slots after the warm-up."""
    slots = min(HERDING_SLOTS, episodes.slots - episodes.warmup_slots)
    window = slice(episodes.warmup_slots, episodes.warmup_slots + slots)
    series = {name: measured[name].wait_s[0, window].tolist() for name in names if name in measured}
    if not series or slots < 2:
        return None
    return Herding(
        slots=slots,
        slot_s=scenario.slot.length_s,
        servers=[server.name for server in scenario.servers],
        series=series,
    )
