"""`gmel simulate`: one policy on one plant."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.progress import ConsoleReporter

__all__ = ["simulate"]


def simulate(
    scenario: Annotated[str, typer.Argument(help="A preset (`gmel scenario list`) or a TOML file.")] = "factory",
    policy: Annotated[
        str,
        typer.Option(
            help="all-local, uniform, nearest, proportional, greedy, led2, softmax, softmax7, coordinated, eft, nash, "
            "optimum; or a run folder; or a policy folder."
        ),
    ] = "led2",
    episodes: Annotated[int, typer.Option(help="Episodes; intervals are over them.")] = 8,
    slots: Annotated[int | None, typer.Option(help="Slots of an episode; default: the scenario's.")] = None,
    seed: Annotated[int, typer.Option(help="0: the traffic that `gmel run` evaluates on.")] = 0,
    load: Annotated[float | None, typer.Option(help="Offered load, in place of the scenario's.")] = None,
    trace: Annotated[str | None, typer.Option(help="Replay this CSV/Parquet trace, or a shipped one by name.")] = None,
    records: Annotated[Path | None, typer.Option(help="One row per task into this .parquet or .csv file.")] = None,
    render: Annotated[
        Path | None, typer.Option(help="Picture of the first episode: .html to explore, .gif, or .png (Gantt alone).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run one policy on a plant: figures with intervals, records per task, pictures."""
    # Imported here: JAX takes a second that `gmel --help` need not wait for.
    from gmel.evaluation import simulate as simulation  # noqa: PLC0415
    from gmel.evaluation.render import write as pictures  # noqa: PLC0415
    from gmel.scenario.load import load_scenario  # noqa: PLC0415

    if render is not None:
        pictures.check_render_path(render)
    plant = load_scenario(scenario, load)
    if records is not None:
        simulation.check_records_path(records)
    with ConsoleReporter() as reporter:
        result = simulation.simulate(plant, policy, episodes, reporter, seed=seed, slots=slots, trace=trace)
        for note in result.notes:
            reporter.note(note)
        if records is not None:
            reporter.note(f"{simulation.write_records(result, records):,} records in {records}")
        if render is not None:
            pictures.render(result, render, reporter)
            reporter.note(f"picture in {render}")
    typer.echo(json.dumps(simulation.as_json(result)) if as_json else "\n".join(simulation.summary(result)))
