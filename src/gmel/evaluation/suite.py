"""The core suite: every learner on one scenario, with the same number of decisions, beside the ladder."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq

from gmel.evaluation.episodes import run_episodes
from gmel.evaluation.evaluate import Trained, evaluate, metrics_of
from gmel.evaluation.job import evaluation_episodes, validation_episodes
from gmel.evaluation.ladder import ladder
from gmel.evaluation.progress import Reporter
from gmel.evaluation.schema import Evaluation, write_evaluation
from gmel.evaluation.table import markdown_table
from gmel.evaluation.tuning import shipped, tune
from gmel.learning.algorithm import make_task
from gmel.learning.registry import ALGORITHMS, make_algorithm
from gmel.learning.training import Progress, Row, Training, train
from gmel.policies.policy import Policy
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.load import digest
from gmel.scenario.schema import Scenario
from gmel.simulator.build import build_environments

__all__ = ["core_suite"]


def core_suite(
    scenario: Scenario,
    algorithms: list[str],
    seeds: int,
    decisions: int,
    episodes: int,
    slots: int,
    out: Path | None,
    report: Reporter,
) -> Evaluation:
    """Trains the learners and evaluates them on the same held-out traffic as the ladder.

    Args:
        scenario: the plant.
        algorithms: names of the registry; empty: all of them.
        seeds: training seeds of each learner (0, 1, ...).
        decisions: agent decisions of each training, rounded up to whole updates.
        episodes: evaluation episodes.
        slots: slots of an evaluation episode.
        out: folder for `evaluation.json`, `metrics.parquet`, `table.md` and `settings.json`; None: nothing is written.
        report: who is told the progress.

    Raises:
        InputError: an unknown learner, or counts below their least.
    """
    if seeds < 1 or decisions < 1:
        raise InputError(f"--seeds {seeds}, --decisions {decisions}: both must be at least 1")
    environments = build_environments(scenario)
    task = make_task(environments.train, scenario)
    learners = [(name, make_algorithm(name)) for name in algorithms or list(ALGORITHMS)]
    validation = validation_episodes(environments)

    def validate(policy: Policy[Any]) -> tuple[float, float]:
        measured = run_episodes(environments.train, policy, validation, jax.random.key(11))
        latency = measured.per_episode(lambda records: float(records.latency_s.mean()))
        return float(latency.mean()), float(metrics_of(measured)["completion_rate"].mean())

    trained: list[Trained] = []
    rows: list[Row] = []
    for name, default in learners:
        updates = math.ceil(decisions / default.decisions_per_update(task))
        # The schedules of a learner end with its training, whatever its length.
        algorithm = make_algorithm(name, updates=updates)
        policies: list[Policy[Any]] = []
        for seed in range(seeds):
            which = f"{algorithm.title}, seed {seed}"
            report.stage(f"training {which}")

            def on_progress(progress: Progress, which: str = which) -> None:
                rate = progress.decisions / max(progress.wall_s, 1e-9) / 1e3
                report.advance(progress.update, progress.updates, f"training {which}: {rate:.0f} k decisions/s")

            result = train(
                task, algorithm, Training(updates, seed, validate_every=max(1, updates // 10)), validate, on_progress
            )
            if result.stopped:
                raise KeyboardInterrupt
            policies.append(result.policy)
            rows += [{"algorithm": name, **row} for row in result.rows]  # type: ignore[dict-item]
        trained.append(Trained(name, algorithm.title, policies))
    tuned = shipped(digest(scenario)) or tune(environments.train)
    report.stage("evaluating beside the ladder")
    evaluation = evaluate(
        scenario,
        environments.test,
        ladder(tuned),
        trained,
        evaluation_episodes(scenario, environments, episodes, slots),
        environments.load,
        lambda label: report.advance(0, 1, f"evaluating: {label}"),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_evaluation(out / "evaluation.json", evaluation)
        replace_file(out / "table.md", markdown_table(evaluation).encode())
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        replace_file(out / "metrics.parquet", sink.getvalue().to_pybytes())
        settings = {name: dict(vars(algorithm)) for name, algorithm in learners}
        replace_file(out / "settings.json", (json.dumps(settings, indent=1) + "\n").encode())
    return evaluation
