"""`gmel validate`: the simulator beside closed forms and exact recomputation."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.progress import ConsoleReporter

__all__ = ["validate"]


def validate(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Eight times the replications; longer exact runs.")
    ] = False,
    only: Annotated[str, typer.Option(help="Checks or groups, separated by commas; default: all.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the verdicts as JSON into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the verdicts as a Markdown table.")] = False,
) -> None:
    """Check the simulator: queueing laws, radio laws, every task of a run computed again. Exit code 1 if any fails."""
    from gmel.evaluation.validation import run  # noqa: PLC0415

    names = [name.strip() for name in only.split(",") if name.strip()]
    with ConsoleReporter() as reporter:
        validation = run.validate(names, seed=seed, thorough=thorough, reporter=reporter)
    if out is not None:
        run.write_validation(validation, out)
    if as_json:
        typer.echo(json.dumps(validation, allow_nan=False))
    elif markdown:
        typer.echo(run.markdown_table(validation), nl=False)
    else:
        run.print_table(validation)
    if not validation["passed"]:
        raise typer.Exit(1)
