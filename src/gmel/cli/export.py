"""`gmel export`: the policy of a run as a folder that runs anywhere."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Where the policy goes: actor.onnx, actor.safetensors, policy.json.")],
) -> None:
    """Export the trained actor to ONNX and check it against JAX."""
    from gmel.evaluation.deploy import export_run  # noqa: PLC0415

    difference = export_run(run, out)
    typer.echo(f"exported to {out}; largest difference between ONNX and JAX: {difference:.1e}")
