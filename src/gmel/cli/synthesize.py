"""`gmel synthesize`: data sets of photos, and what is made of them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.progress import ConsoleReporter

__all__ = ["app"]

app = typer.Typer(help="Few-shot synthesis of defects: data.", no_args_is_help=True)


@app.callback()
def _synthesize() -> None:  # pyright: ignore[reportUnusedFunction]
    """Few-shot synthesis of defects: data."""


@app.command("data")
def data(
    folder: Annotated[Path | None, typer.Argument(help="The folder with the photos.")] = None,
    layout: Annotated[str, typer.Option(help="folder, voc, deeppcb, mvtec, or auto: look.")] = "auto",
    good: Annotated[str, typer.Option(help="Name of the class of good parts.")] = "good",
    crop: Annotated[int | None, typer.Option(help="Cut windows of this side around boxes, one photo each.")] = None,
    shots: Annotated[int, typer.Option(help="Photos of each defect class to learn from, for the split shown.")] = 5,
    builtin: Annotated[
        bool, typer.Option("--builtin", help="The built-in procedural set in place of a folder.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the built-in set.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the data set into this new folder, as PNG.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet of every class, a .png or .jpg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Read, check and show a data set: its classes, what is wrong with it, what a few-shot split would hold."""
    from gmel.scenario.errors import InputError  # noqa: PLC0415
    from gmel.synthesis.data.dataset import read_dataset  # noqa: PLC0415
    from gmel.synthesis.data.procedural import procedural_dataset  # noqa: PLC0415
    from gmel.synthesis.data.sheet import check_sheet_path, contact_sheet, rows_by_class, write_sheet  # noqa: PLC0415
    from gmel.synthesis.data.summary import summary, summary_lines  # noqa: PLC0415
    from gmel.synthesis.data.write import check_folder, write_dataset  # noqa: PLC0415

    if (folder is None) != builtin:
        raise InputError("data: give a folder with photos, or --builtin, one of the two")
    if sheet is not None:
        check_sheet_path(sheet)
    if out is not None:
        check_folder(out)
    with ConsoleReporter() as reporter:
        if folder is None:
            dataset = procedural_dataset(seed, reporter=reporter)
        else:
            dataset = read_dataset(folder, layout, good, crop, reporter)
        facts = summary(dataset, shots)
        if out is not None:
            write_dataset(dataset, out, reporter)
            reporter.note(f"data set in {out}")
        if sheet is not None:
            write_sheet(sheet, contact_sheet(rows_by_class(dataset.photos)))
            reporter.note(f"contact sheet in {sheet}")
    typer.echo(json.dumps(facts) if as_json else "\n".join(summary_lines(facts)))
