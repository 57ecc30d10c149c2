"""`gmel benchmark`: suites that compare learners, and the tuning of the ladder."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.progress import ConsoleReporter

__all__ = ["app"]

app = typer.Typer(help="Compare learners on the same traffic; tune the ladder.", no_args_is_help=True)


@app.command("core")
def core(
    scenario: Annotated[str, typer.Option(help="A preset or a TOML file.")] = "hall-20x5",
    load: Annotated[float | None, typer.Option(help="Offered load, in place of the scenario's.")] = None,
    seeds: Annotated[int, typer.Option(help="Training seeds of each learner.")] = 3,
    algorithms: Annotated[str, typer.Option(help="Learners, separated by commas; default: all.")] = "",
    decisions: Annotated[float, typer.Option(help="Agent decisions of each training.")] = 1e6,
    episodes: Annotated[int, typer.Option(help="Evaluation episodes.")] = 8,
    slots: Annotated[int, typer.Option(help="Slots of an evaluation episode.")] = 2000,
    out: Annotated[
        Path | None, typer.Option(help="Write evaluation.json, metrics and a table into this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evaluation as JSON.")] = False,
) -> None:
    """Train every learner with the same number of decisions and show them beside the ladder."""
    from gmel.evaluation.suite import core_suite  # noqa: PLC0415
    from gmel.evaluation.table import print_table  # noqa: PLC0415
    from gmel.scenario.load import load_scenario  # noqa: PLC0415

    chosen = [name.strip() for name in algorithms.split(",") if name.strip()]
    with ConsoleReporter() as reporter:
        evaluation = core_suite(
            load_scenario(scenario, load), chosen, seeds, int(decisions), episodes, slots, out, reporter
        )
    if as_json:
        typer.echo(json.dumps(evaluation))
    else:
        print_table(evaluation)


@app.command("tune")
def tune(
    scenario: Annotated[str, typer.Argument(help="A preset or a TOML file.")],
    load: Annotated[float | None, typer.Option(help="Offered load, in place of the scenario's.")] = None,
    generations: Annotated[int, typer.Option(help="Generations of the random search of L3.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Table of tuned parameters to add the result to.")] = None,
) -> None:
    """Tune the softmax rungs L2 and L3 for a scenario on traffic of their own."""
    from gmel.evaluation.tuning import tune_scenario  # noqa: PLC0415
    from gmel.scenario.load import load_scenario  # noqa: PLC0415

    with ConsoleReporter() as reporter:
        entry = tune_scenario(load_scenario(scenario, load), generations, out, reporter)
    typer.echo(json.dumps(entry))
