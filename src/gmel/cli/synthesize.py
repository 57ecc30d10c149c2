"""`gmel synthesize`: data sets of photos, and what is made of them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.photos import (
    Builtin,
    Crop,
    DetectorName,
    Draws,
    Folder,
    Good,
    Layout,
    Modes,
    Pipeline,
    Prior,
    Seed,
    Shots,
    SplitSeed,
    TestPerClass,
)
from gmel.cli.progress import ConsoleReporter

__all__ = ["app"]

app = typer.Typer(help="Few-shot synthesis of defects: photos, generators, detectors.", no_args_is_help=True)


@app.callback()
def _synthesize() -> None:  # pyright: ignore[reportUnusedFunction]
    """Few-shot synthesis of defects: data sets, generators, and what they are worth."""


@app.command("data")
def data(
    folder: Folder = None,
    layout: Layout = "auto",
    good: Good = "good",
    crop: Crop = None,
    shots: Annotated[int, typer.Option(help="Photos of each defect class to learn from, for the split shown.")] = 5,
    builtin: Builtin = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the built-in set.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the data set into this new folder, as PNG.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet of every class, a .png or .jpg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Read, check and show a data set: its classes, what is wrong with it, what a few-shot split would hold."""
    from gmel.synthesis.data.sheet import check_sheet_path, contact_sheet, rows_by_class, write_sheet  # noqa: PLC0415
    from gmel.synthesis.data.source import Source  # noqa: PLC0415
    from gmel.synthesis.data.summary import summary, summary_lines  # noqa: PLC0415
    from gmel.synthesis.data.write import check_folder, write_dataset  # noqa: PLC0415

    source = Source(folder, builtin, layout, good, crop, seed)
    if sheet is not None:
        check_sheet_path(sheet)
    if out is not None:
        check_folder(out)
    with ConsoleReporter() as reporter:
        dataset = source.read(reporter)
        facts = summary(dataset, shots)
        if out is not None:
            write_dataset(dataset, out, reporter)
            reporter.note(f"data set in {out}")
        if sheet is not None:
            write_sheet(sheet, contact_sheet(rows_by_class(dataset.photos)))
            reporter.note(f"contact sheet in {sheet}")
    typer.echo(json.dumps(facts) if as_json else "\n".join(summary_lines(facts)))


@app.command("fit")
def fit(
    folder: Annotated[Path, typer.Argument(help="The folder with photos of defects and good parts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of the generator, .safetensors.")],
    mode: Annotated[str, typer.Option(help="Mode: compose, harmonise, generate, langevin or diffusers.")] = "compose",
    layout: Layout = "auto",
    good: Good = "good",
    shots: Annotated[int | None, typer.Option(help="Learn from so many photos of each class; default: all.")] = None,
    seed: Seed = 0,
    prior: Prior = None,
    pipeline: Pipeline = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted fit has left.")] = False,
) -> None:
    """Fit a generator on the photos of a folder."""
    from gmel.synthesis.fitting import fit_generator  # noqa: PLC0415
    from gmel.synthesis.generator import save_generator  # noqa: PLC0415

    with ConsoleReporter() as reporter:
        generator = fit_generator(folder, mode, layout, good, shots, seed, out, reporter, prior, resume, pipeline)
        save_generator(out, generator)
        size = out.stat().st_size
        reporter.note(f"{mode} of {', '.join(generator.labels)} in {out} ({size / 1e6:.1f} MB)")
        if generator.shares_photos:
            reporter.note("the file holds the photos themselves: it must not leave the site")


@app.command("sample")
def sample(
    generator: Annotated[Path, typer.Argument(help="A file of `gmel synthesize fit`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the photos, as PNG with masks.")],
    count: Annotated[int, typer.Option(help="Photos of each class.")] = 20,
    label: Annotated[str, typer.Option("--class", help="Classes, separated by commas; default: all.")] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: those of the mode.")] = None,
    seed: Seed = 0,
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet, a .png or .jpg.")] = None,
    pipeline: Pipeline = None,
) -> None:
    """Draw photos from a generator."""
    from gmel.synthesis.fitting import draw_samples  # noqa: PLC0415

    with ConsoleReporter() as reporter:
        draw_samples(generator, out, count, label, steps, seed, sheet, reporter, pipeline)


@app.command("evaluate")
def evaluate(
    folder: Folder = None,
    layout: Layout = "auto",
    good: Good = "good",
    crop: Crop = None,
    builtin: Builtin = False,
    shots: Shots = 5,
    draws: Draws = 10,
    modes: Modes = "compose",
    test_per_class: TestPerClass = None,
    seed: SplitSeed = None,
    curves: Annotated[
        bool, typer.Option("--curves", help="Also measure utility by number of samples and by denoising steps.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for experiment.json and report.html.")] = Path("runs/synthesis"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    prior: Prior = None,
    pipeline: Pipeline = None,
    detector: Annotated[
        str, typer.Option(help="texture; or cnn: rows of a small network trained from scratch stand beside those.")
    ] = "texture",
    as_json: Annotated[bool, typer.Option("--json", help="Print the experiment as JSON.")] = False,
) -> None:
    """Measure what synthesis is worth on a data set: detectors with and without it, on the same test photos."""
    from gmel.synthesis.data.source import Source  # noqa: PLC0415
    from gmel.synthesis.data.splits import SPLIT_SEED  # noqa: PLC0415
    from gmel.synthesis.evaluate import Settings  # noqa: PLC0415
    from gmel.synthesis.fitting import run_experiment  # noqa: PLC0415
    from gmel.synthesis.modes import modes_named  # noqa: PLC0415
    from gmel.synthesis.report import headline, lines  # noqa: PLC0415

    source = Source(folder, builtin, layout, good, crop)
    split_seed = SPLIT_SEED if seed is None else seed
    settings = Settings(shots, draws, modes_named(modes), test_per_class, split_seed, curves=curves, detector=detector)
    with ConsoleReporter() as reporter:
        found = run_experiment(source, settings, out, resume, reporter, prior, pipeline)
    typer.echo(json.dumps(found, allow_nan=False) if as_json else "\n".join([*lines(found), headline(found)]))


@app.command("train")
def train(
    folder: Annotated[Path, typer.Argument(help="The folder with photos of defects and good parts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of the detector, .safetensors.")],
    layout: Layout = "auto",
    good: Good = "good",
    modes: Modes = "compose",
    encoder: Annotated[Path | None, typer.Option(help="A frozen ONNX encoder in place of texture features.")] = None,
    detector: DetectorName = "texture",
    false_alarms: Annotated[float, typer.Option(help="Share of good parts that may be called defect.")] = 0.05,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the gate found as JSON.")] = False,
) -> None:
    """Train a detector on all photos of a folder; the gate decides what synthesis adds to it."""
    from gmel.synthesis.fitting import train_from_folder, training_lines  # noqa: PLC0415
    from gmel.synthesis.modes import modes_named  # noqa: PLC0415

    with ConsoleReporter() as reporter:
        facts = train_from_folder(
            folder, layout, good, modes_named(modes), encoder, false_alarms, seed, out, reporter, detector
        )
        reporter.note(f"detector in {out}")
    typer.echo(json.dumps(facts, allow_nan=False) if as_json else "\n".join(training_lines(facts)))


@app.command("detect")
def detect(
    detector: Annotated[Path, typer.Argument(help="A file of `gmel synthesize train`.")],
    photos: Annotated[list[Path], typer.Argument(help="Photos, or folders of photos.")],
    encoder: Annotated[Path | None, typer.Option(help="The ONNX encoder that it was trained on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a photo.")] = False,
) -> None:
    """Say of photos whether they show a defect, which one, and how sure that is."""
    from gmel.synthesis.fitting import detect_in, finding_line  # noqa: PLC0415

    with ConsoleReporter() as reporter:
        findings = detect_in(detector, photos, encoder, reporter)
        for found in findings:
            typer.echo(finding_line(found, as_json))


@app.command("profile")
def profile(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of the costs, .toml.")],
    folder: Folder = None,
    layout: Layout = "auto",
    good: Good = "good",
    crop: Crop = None,
    builtin: Builtin = False,
    modes: Annotated[str, typer.Option(help="Modes, separated by commas; default: all.")] = "",
    shots: Shots = 5,
    samples: Annotated[int, typer.Option(help="Photos of each class for each number of steps.")] = 24,
    seed: Seed = 0,
    prior: Prior = None,
    pipeline: Pipeline = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the costs as JSON.")] = False,
) -> None:
    """Measure work, time and quality by steps of every mode here, as models for a scenario."""
    from gmel.synthesis.data.source import Source  # noqa: PLC0415
    from gmel.synthesis.fitting import profile_modes  # noqa: PLC0415
    from gmel.synthesis.modes import MODES, modes_named  # noqa: PLC0415

    source = Source(folder, builtin, layout, good, crop)
    chosen = modes_named(modes) or tuple(MODES)
    with ConsoleReporter() as reporter:
        found = profile_modes(source, chosen, shots, samples, seed, prior, out, reporter, pipeline)
    typer.echo(json.dumps(found.tables(), allow_nan=False) if as_json else "\n".join(found.lines()))
