"""`gmel calibrate`: a scenario from live records."""

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["calibrate"]


def calibrate(
    records: Annotated[Path, typer.Argument(help="Records of `gmel live`, a .parquet.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The fitted scenario, a .toml; its requests lie beside it.")],
    scenario: Annotated[str, typer.Option(help="The plant that was run: a preset or a file.")] = "live",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was fitted as JSON.")] = False,
) -> None:
    """Fit a scenario to what was measured live, and say how well the simulator then tells it."""
    from gmel.edge.calibration import calibrate_file, calibration_lines  # noqa: PLC0415

    found = calibrate_file(records, scenario, out)
    typer.echo(json.dumps(found.as_json()) if as_json else "\n".join(calibration_lines(found)))
