"""`gmel report`: the report of a run folder, drawn again."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the results as a Markdown table.")] = False,
) -> None:
    """Draw report.html of a run folder again."""
    from gmel.evaluation.report import render_report  # noqa: PLC0415
    from gmel.evaluation.schema import read_evaluation  # noqa: PLC0415
    from gmel.evaluation.table import markdown_table, print_table  # noqa: PLC0415

    page = render_report(run)
    if (run / "evaluation.json").is_file():
        evaluation = read_evaluation(run / "evaluation.json")
        if markdown:
            typer.echo(markdown_table(evaluation))
        else:
            print_table(evaluation)
    typer.echo(f"report: {page}", err=markdown)
