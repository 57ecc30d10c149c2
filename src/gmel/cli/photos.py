"""Options that the verbs on photos share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Builtin",
    "Crop",
    "DetectorName",
    "Draws",
    "Folder",
    "Good",
    "Layout",
    "Modes",
    "Pipeline",
    "Prior",
    "Seed",
    "Shots",
    "SplitSeed",
    "TestPerClass",
]

Folder = Annotated[Path | None, typer.Argument(help="The folder with the photos.")]
Builtin = Annotated[bool, typer.Option("--builtin", help="The built-in procedural set in place of a folder.")]
Layout = Annotated[str, typer.Option(help="folder, voc, deeppcb, mvtec, or auto: look.")]
Good = Annotated[str, typer.Option(help="Name of the class of good parts.")]
Crop = Annotated[int | None, typer.Option(help="Cut windows of this side around boxes, one photo each.")]
Shots = Annotated[int, typer.Option(help="Photos of each defect class to learn from.")]
Draws = Annotated[int, typer.Option(help="Independent draws of the shots; 10 or more for a claim.")]
Modes = Annotated[str, typer.Option(help="Modes to try, separated by commas; the gate decides.")]
DetectorName = Annotated[
    str,
    typer.Option(
        "--detector", help="texture: statistics and logistic regression; or cnn: a small network, minutes to train."
    ),
]
TestPerClass = Annotated[int | None, typer.Option(help="Photos of each class to test on; default: half.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
SplitSeed = Annotated[int | None, typer.Option(min=0, help="Of the split into test and rest.")]
Pipeline = Annotated[
    Path | None,
    typer.Option(help="Folder of a pretrained pipeline, for the mode diffusers."),
]
Prior = Annotated[
    Path | None,
    typer.Option(help="File of the prior on good parts, for modes with a network: read, or trained and written."),
]
