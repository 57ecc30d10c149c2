"""The main job: train on a scenario, judge beside the ladder, leave a run folder with a report.

A run folder is written under a temporary name beside its own and renamed at the end, also after an interrupt; what a
killed process leaves behind is taken up by `resume`.
"""

import contextlib
import json
import math
import platform
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import gmel
from gmel.evaluation.episodes import Episodes, run_episodes
from gmel.evaluation.evaluate import Trained as TrainedEntry
from gmel.evaluation.evaluate import evaluate, metrics_of
from gmel.evaluation.ladder import ladder
from gmel.evaluation.manifest import RUN_FORMAT, read_manifest
from gmel.evaluation.progress import Reporter
from gmel.evaluation.report import render_report
from gmel.evaluation.schema import Evaluation, write_evaluation
from gmel.evaluation.tuning import Tuned, shipped, tune
from gmel.learning.algorithm import Algorithm, make_task
from gmel.learning.export import export_policy
from gmel.learning.registry import make_algorithm
from gmel.learning.training import Progress, Row, Trained, Training, train
from gmel.policies.policy import Policy
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.load import digest, parse_scenario, to_toml
from gmel.scenario.schema import Scenario
from gmel.simulator.build import Environments, build_environments

__all__ = [
    "Job",
    "JobResult",
    "evaluation_episodes",
    "open_run",
    "run_job",
    "validation_episodes",
]

EVALUATION_SEED, VALIDATION_SEED = 1_000, 3_000_000


@dataclass(frozen=True)
class Job:
    """What to run. `updates` 0 means the algorithm's own number."""

    algorithm: str = "amarl"
    seed: int = 0
    seeds: int = 1
    updates: int = 0
    budget_s: float | None = None
    trace: str | None = None
    episodes: int = 8
    slots: int | None = None
    tuning: int = 16
    """Generations of the random search that tunes L3 on a plant the package has no parameters for."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Hyper-parameters of the algorithm that differ from its defaults."""

    def __post_init__(self) -> None:
        least = {"seeds": 1, "episodes": 2, "seed": 0, "tuning": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value < lowest:
                raise InputError(f"--{name} {value}: must be at least {lowest}")
        if self.budget_s is not None and not self.budget_s > 0:
            raise InputError(f"--budget {self.budget_s:g}: must be more than 0 seconds")
        if self.slots is not None and self.slots < 2:
            raise InputError(f"--slots {self.slots}: must be at least 2")


@dataclass(frozen=True)
class JobResult:
    """Where the run folder is; the evaluation is None after an interrupt before it."""

    folder: Path
    evaluation: Evaluation | None
    interrupted: bool


def run_job(scenario: Scenario, job: Job, out: Path, report: Reporter, *, resume: bool = False) -> JobResult:
    """Runs the main job into the folder `out`.

    Raises:
        InputError: something the user gave cannot be used; nothing is left behind then.
    """
    started = time.monotonic()
    work = out.with_name(f".{out.name}.part")
    beside = out.parent.exists()
    earlier_s = _prepare(out, work, resume)
    try:
        environments = build_environments(scenario, job.trace)
        for note in environments.notes:
            report.note(note)
        manifest = _manifest(scenario, job, environments)
        _write_toml(work, scenario, job)
        try:
            interrupted, evaluation = _stages(scenario, job, environments, work, report, resume, manifest)
        except KeyboardInterrupt:
            # Between two parts of the work, where nothing is half done.
            interrupted, evaluation = True, None
        manifest["wall_s"] = round(earlier_s + time.monotonic() - started, 1)
        manifest["interrupted"] = interrupted
        _write_manifest(work, manifest)
        report.stage("writing the report")
        render_report(work)
        work.replace(out)
    except InputError:
        # A new run leaves nothing; a run that could not be resumed stands where it stood.
        if resume and not out.exists():
            work.replace(out)
        else:
            shutil.rmtree(work, ignore_errors=True)
            if not beside:
                with contextlib.suppress(OSError):  # another run may have begun there
                    out.parent.rmdir()
        raise
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}); make room, then continue with --resume --out {out}"
        ) from error
    return JobResult(out, evaluation, interrupted)


def open_run(folder: Path) -> tuple[Scenario, Job]:
    """The scenario and the job of a run folder (or of what a killed run left of it).

    Raises:
        InputError: not a run folder, or of another version.
    """
    part = folder.with_name(f".{folder.name}.part")
    place = folder if folder.is_dir() else part
    if not place.is_dir():
        raise InputError(f"--resume {folder}: no such run folder; give the folder of an interrupted run with --out")
    read_manifest(place)
    try:
        job = json.loads((place / "job.json").read_text(encoding="utf-8"))
        text = (place / "scenario.toml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a run folder ({error}); start a new run") from error
    try:
        return parse_scenario(text, f"{folder}/scenario.toml"), Job(**job)
    except TypeError as error:
        raise InputError(f"{folder}/job.json: {error}; start a new run") from error


def _stages(
    scenario: Scenario,
    job: Job,
    environments: Environments,
    work: Path,
    report: Reporter,
    resume: bool,
    manifest: dict[str, Any],
) -> tuple[bool, Evaluation | None]:
    """Tuning, training, evaluation; each leaves its files in the folder. Returns whether it was interrupted."""
    _write_manifest(work, {**manifest, "interrupted": True})
    replace_file(work / "job.json", (json.dumps(asdict(job), indent=1) + "\n").encode())
    algorithm = make_algorithm(job.algorithm, **job.settings)
    rows: list[Row] = []
    policies: list[Policy[Any]] = []
    interrupted = False
    for number in range(job.seeds):
        trained = _train_seed(scenario, job, environments, algorithm, number, work, report, resume)
        rows += trained.rows
        policies.append(trained.policy)
        _write_metrics(work, rows)
        if trained.stopped == "interrupt":
            return True, None
        manifest["training_decisions"] = manifest.get("training_decisions", 0) + trained.decisions
        manifest["training_s"] = round(manifest.get("training_s", 0.0) + trained.wall_s, 1)
        if trained.stopped:
            report.note(f"seed {job.seed + number}: stopped by the budget after {len(trained.rows)} updates")
    best = _best_seed(rows, job)
    _export(scenario, policies[best], work, {"seed": job.seed + best, "algorithm": job.algorithm})
    evaluation: Evaluation | None = None
    try:
        tuned = _tuned(scenario, job, environments, work, report)
        evaluation = _evaluate(scenario, job, environments, tuned, algorithm, policies, report)
        write_evaluation(work / "evaluation.json", evaluation)
    except KeyboardInterrupt:
        interrupted = True
    return interrupted, evaluation


def _train_seed(
    scenario: Scenario,
    job: Job,
    environments: Environments,
    algorithm: Algorithm[Any],
    number: int,
    work: Path,
    report: Reporter,
    resume: bool,
) -> Trained:
    seed = job.seed + number
    task = make_task(environments.train, scenario)
    updates = job.updates or algorithm.updates
    which = f"{algorithm.title}, seed {seed}" if job.seeds > 1 else algorithm.title
    report.stage(f"training {which}: compiling")
    validation = validation_episodes(environments)

    def validate(policy: Policy[Any]) -> tuple[float, float]:
        measured = run_episodes(environments.train, policy, validation, jax.random.key(11))
        latency = measured.per_episode(lambda records: float(records.latency_s.mean()))
        return float(latency.mean()), float(metrics_of(measured)["completion_rate"].mean())

    last: list[float] = []

    def on_progress(progress: Progress) -> None:
        if progress.validation_latency_s is not None:
            last.append(progress.validation_latency_s)
        rate = progress.decisions / max(progress.wall_s, 1e-9)
        latency = f", validation {last[-1]:.3f} s" if last else ""
        text = f"training {which}: {progress.decisions / 1e6:.1f} M decisions, {rate / 1e3:.0f} k/s{latency}"
        report.advance(progress.update, progress.updates, text)

    settings = Training(
        updates=updates,
        seed=seed,
        validate_every=max(1, updates // 12),
        checkpoint=work / "checkpoints" / f"seed-{seed}.safetensors",
        facts={
            "scenario": digest(scenario),
            "algorithm": job.algorithm,
            "settings": json.dumps(job.settings, sort_keys=True),
            "seed": str(seed),
            "updates": str(updates),
        },
        budget_s=math.inf if job.budget_s is None else job.budget_s / job.seeds,
    )
    return train(task, algorithm, settings, validate, on_progress, resume=resume)


def validation_episodes(environments: Environments) -> Episodes:
    """Traffic for choosing among updates of one training: of the training part, with seeds of its own."""
    trace = environments.train.trace
    if trace is None:
        return Episodes(16, 400, 60, VALIDATION_SEED)
    slots = trace.present.shape[0]
    length = min(300, slots)
    return Episodes(16, length, length // 10, VALIDATION_SEED, tuple(int(k * slots / 16) for k in range(16)))


def _tuned(scenario: Scenario, job: Job, environments: Environments, work: Path, report: Reporter) -> Tuned:
    """The tuned rungs: those of the package for its own scenarios, else tuned now."""
    # The package's parameters are for the scenario's own traffic.
    known = shipped(digest(scenario)) if job.trace is None else None
    if known is None:
        report.stage("tuning the softmax rungs of the ladder")
        known = tune(
            environments.train,
            generations=job.tuning,
            progress=lambda done, total: report.advance(done, total, "tuning the softmax rungs of the ladder"),
        )
    replace_file(work / "tuned.json", (json.dumps(asdict(known), indent=1) + "\n").encode())
    return known


def _evaluate(
    scenario: Scenario,
    job: Job,
    environments: Environments,
    tuned: Tuned,
    algorithm: Algorithm[Any],
    policies: list[Policy[Any]],
    report: Reporter,
) -> Evaluation:
    entries = ladder(tuned)
    total, done = len(entries) + len(policies), 0

    def on_policy(label: str) -> None:
        nonlocal done
        report.advance(done, total, f"evaluating: {label}")
        done += 1

    report.stage("evaluating beside the ladder, all on the same traffic")
    return evaluate(
        scenario,
        environments.test,
        entries,
        [TrainedEntry(job.algorithm, algorithm.title, policies)],
        evaluation_episodes(scenario, environments, job.episodes, job.slots),
        environments.load,
        on_policy,
    )


def evaluation_episodes(
    scenario: Scenario, environments: Environments, count: int, slots: int | None = None
) -> Episodes:
    """The traffic that policies are judged on: a trace's held-out part is divided evenly among the episodes."""
    length = slots or scenario.episode.slots
    trace = environments.test.trace
    available = length * count if trace is None else trace.present.shape[0]
    # Episodes must not overlap: they would not be independent.
    length = max(2, min(length, available // count))
    warmup = min(scenario.episode.warmup_slots, length // 4)
    if trace is None:
        return Episodes(count, length, warmup, EVALUATION_SEED)
    starts = tuple(int(k * available / count) for k in range(count))
    return Episodes(count, length, warmup, EVALUATION_SEED, starts)


def _best_seed(rows: list[Row], job: Job) -> int:
    """Number of the seed with the best validation latency."""
    best = [math.inf] * job.seeds
    for row in rows:
        latency, number = row["validation_latency_s"], int(row["seed"] or 0) - job.seed
        if latency is not None:
            best[number] = min(best[number], latency)
    return int(np.argmin(best))


def _export(scenario: Scenario, policy: Policy[Any], work: Path, training: dict[str, Any]) -> None:
    actor = getattr(policy, "actor", None)
    if actor is not None:
        export_policy(
            actor,
            work / "policy",
            scenario_digest=digest(scenario),
            scenario_name=scenario.name,
            training=training,
        )


def _prepare(out: Path, work: Path, resume: bool) -> float:
    """Makes the working folder; returns the wall seconds that the run has taken before.

    Raises:
        InputError: the folder exists (without `resume`), or cannot be written.
    """
    if resume:
        if out.is_dir():
            out.replace(work)
        try:
            return float(json.loads((work / "manifest.json").read_text(encoding="utf-8")).get("wall_s") or 0.0)
        except (OSError, ValueError):
            return 0.0
    if out.exists():
        raise InputError(f"--out {out}: exists; choose another folder, or continue it with --resume")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    return 0.0


def _write_toml(work: Path, scenario: Scenario, job: Job) -> None:
    replace_file(work / "scenario.toml", to_toml(scenario).encode())
    algorithm = make_algorithm(job.algorithm, **job.settings)
    lines = [f'algorithm = "{job.algorithm}"']
    for name, value in sorted(vars(algorithm).items()):
        if value is not None:
            lines.append(f"{name} = {json.dumps(value)}")
    replace_file(work / "config.toml", ("\n".join(lines) + "\n").encode())


def _write_metrics(work: Path, rows: list[Row]) -> None:
    if not rows:
        return
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    replace_file(work / "metrics.parquet", sink.getvalue().to_pybytes())


def _write_manifest(work: Path, manifest: dict[str, Any]) -> None:
    replace_file(work / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())


def _manifest(scenario: Scenario, job: Job, environments: Environments) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "equinox", "optax", "numpy", "onnxruntime")
    return {
        "run_format": RUN_FORMAT,
        "gmel": gmel.__version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "device": f"{jax.devices()[0].platform}: {platform.machine()}, {jax.device_count()} device(s)",
        "git_commit": _git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "scenario": scenario.name,
        "scenario_digest": digest(scenario),
        "load": round(environments.load, 4),
        "trace": job.trace or scenario.arrivals.trace,
        "algorithm": job.algorithm,
        "seed": job.seed,
        "seeds": job.seeds,
    }


def _git_commit() -> str | None:
    """Commit of the checkout that the package runs from, if it runs from one."""
    try:
        folder = Path(gmel.__file__).parent
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
