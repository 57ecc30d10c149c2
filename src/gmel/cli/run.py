"""`gmel run`: the main job."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from gmel.cli.progress import ConsoleReporter
from gmel.scenario.errors import InputError

__all__ = ["run"]

_RUNS = Path("runs")


def run(
    scenario: Annotated[str, typer.Argument(help="A preset (`gmel scenario list`) or a TOML file.")] = "factory",
    load: Annotated[float | None, typer.Option(help="Offered load, in place of the scenario's.")] = None,
    algorithm: Annotated[str, typer.Option(help="Learner: amarl, amarl-soft, mappo, idqn, maddpg.")] = "amarl",
    seed: Annotated[int, typer.Option(help="First training seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="Training seeds; a headline needs at least 10.")] = 1,
    budget: Annotated[float | None, typer.Option(help="Most seconds of training, all seeds together.")] = None,
    updates: Annotated[int, typer.Option(help="Training updates; 0: the algorithm's own number.")] = 0,
    episodes: Annotated[int, typer.Option(help="Evaluation episodes.")] = 8,
    slots: Annotated[int | None, typer.Option(help="Slots of an evaluation episode; default: the scenario's.")] = None,
    tuning: Annotated[int, typer.Option(help="Generations of the search for L3 on a plant of your own.")] = 16,
    trace: Annotated[str | None, typer.Option(help="Replay this CSV/Parquet trace, or a shipped one by name.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter NAME=VALUE of the learner; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<scenario>-<time>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evaluation as JSON.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue --out, or the latest interrupted run.")] = False,
) -> None:
    """Train on a scenario, evaluate beside the ladder L0-L5 on the same traffic, leave a report."""
    # Imported here: JAX takes a second that `gmel --help` need not wait for.
    from gmel.evaluation.job import Job, open_run, run_job  # noqa: PLC0415
    from gmel.evaluation.table import print_table  # noqa: PLC0415
    from gmel.scenario.load import load_scenario  # noqa: PLC0415

    if resume:
        folder = out or _latest_interrupted()
        plant, job = open_run(folder)
    else:
        plant = load_scenario(scenario, load)
        job = Job(algorithm, seed, seeds, updates, budget, trace, episodes, slots, tuning, _settings(setting or []))
        folder = out or _RUNS / f"{plant.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with ConsoleReporter() as reporter:
        result = run_job(plant, job, folder, reporter, resume=resume)
    if result.evaluation is not None:
        if as_json:
            typer.echo(json.dumps(result.evaluation))
        else:
            print_table(result.evaluation)
    typer.echo(f"report: {result.folder / 'report.html'}", err=as_json)
    if result.interrupted:
        typer.echo(f"interrupted; continue with: gmel run --resume --out {result.folder}", err=True)
        raise typer.Exit(130)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Hyper-parameters from NAME=VALUE; a value that is not JSON is a word."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set {pair}: must be NAME=VALUE, for instance --set learning_rate=0.001")
        try:
            settings[name] = json.loads(text)
        except json.JSONDecodeError:
            settings[name] = text
    return settings


def _latest_interrupted() -> Path:
    """The newest run folder that was interrupted or killed."""
    found: list[tuple[float, Path]] = []
    if _RUNS.is_dir():
        for place in _RUNS.iterdir():
            manifest = place / "manifest.json"
            if manifest.is_file():
                content = json.loads(manifest.read_text(encoding="utf-8"))
                if content.get("interrupted"):
                    name = place.name.removeprefix(".").removesuffix(".part")
                    found.append((manifest.stat().st_mtime, _RUNS / name))
    if not found:
        raise InputError(f"--resume: no interrupted run in {_RUNS}/; name the run folder with --out")
    return max(found)[1]
