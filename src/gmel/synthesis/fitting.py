"""From a folder to a generator, a detector, photos, findings or the report: what the commands do."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.synthesis.costs import Profile, profile, write_profile
from gmel.synthesis.data.dataset import Dataset, read_dataset
from gmel.synthesis.data.paths import SUFFIXES
from gmel.synthesis.data.reading import read_grey
from gmel.synthesis.data.sheet import check_sheet_path, contact_sheet, rows_by_class, write_sheet
from gmel.synthesis.data.source import Source
from gmel.synthesis.data.splits import few_shot_split
from gmel.synthesis.data.write import check_file, check_folder, write_dataset
from gmel.synthesis.detector_file import Finding, load_detector, save_detector, train_detector
from gmel.synthesis.evaluate import Experiment, Settings, evaluate, read_experiment, write_experiment
from gmel.synthesis.generator import Generator, Means, load_generator
from gmel.synthesis.learners import TEXTURE, detector_named
from gmel.synthesis.lesson import notices
from gmel.synthesis.modes import EVERY_MODE, mode_named
from gmel.synthesis.photo import GOOD, Photo
from gmel.synthesis.pretrained.folder import PipelineFolder
from gmel.synthesis.report import photos_jpeg, write_report

__all__ = [
    "detect_in",
    "draw_samples",
    "finding_line",
    "fit_generator",
    "profile_modes",
    "run_experiment",
    "train_from_folder",
    "training_lines",
]

_MOST_SAMPLES = 100_000


def fit_generator(
    folder: Path,
    mode: str,
    layout: str,
    good: str,
    shots: int | None,
    seed: int,
    out: Path,
    reporter: Reporter,
    prior: Path | None = None,
    resume: bool = False,
    pipeline: Path | None = None,
) -> Generator:
    """A generator that has learned from a folder.

    Args:
        folder: photos of defects and good parts.
        mode: name of the mode.
        layout, good: how the folder is read.
        shots: photos of each class to learn from; all where it is none.
        seed: of the choice of shots and of the mode.
        out: where it will be written; checked before the work.
        reporter: told how it goes on.
        prior: file of the label-free prior, for modes with a network (see `Means`).
        resume: go on from what an interrupted fit has left beside `out`.
        pipeline: folder of a pretrained pipeline, for the mode that adapts one.

    Raises:
        InputError: the folder, the mode or the place to write cannot be used.
    """
    kind = mode_named(mode)
    means = _means(prior, pipeline, out, resume)
    check_file(out, "defects.safetensors")
    dataset = read_dataset(folder, layout, good, reporter=reporter)
    parts = [photo for photo in dataset.photos if photo.label == GOOD]
    if shots is None:
        chosen = [photo for photo in dataset.photos if photo.label != GOOD]
    else:
        split = few_shot_split(dataset, shots, seed)
        chosen, parts = list(split.shots), list(split.good)
    reporter.stage(f"fitting {mode} on {len(chosen)} photos of defects and {len(parts)} good parts")
    return kind.fit(chosen, parts, seed, reporter, means)


def _means(prior: Path | None, pipeline: Path | None, checkpoint: Path | None = None, resume: bool = False) -> Means:
    """Files of modes, those of the user checked before the work."""
    if prior is not None:
        check_file(prior, "prior.safetensors")
    if pipeline is not None:
        PipelineFolder.read(pipeline)
    return Means(prior, checkpoint, resume, pipeline)


def train_from_folder(
    folder: Path,
    layout: str,
    good: str,
    modes: Sequence[str],
    encoder: Path | None,
    false_alarms: float,
    seed: int,
    out: Path,
    reporter: Reporter,
    detector: str = TEXTURE,
) -> dict[str, Any]:
    """Trains a detector (by its name, texture or cnn) on all photos of a folder and writes it.

    Returns:
        What the gate chose and why, the threshold, what could not be used.

    Raises:
        InputError: the folder, the encoder or the place to write cannot be used.
    """
    detector_named(detector)
    check_file(out, "defects.safetensors")
    dataset = read_dataset(folder, layout, good, reporter=reporter)
    shots = [photo for photo in dataset.photos if photo.label != GOOD]
    parts = [photo for photo in dataset.photos if photo.label == GOOD]
    judge, decision, facts = train_detector(shots, parts, modes, encoder, false_alarms, seed, reporter, detector)
    save_detector(out, judge)
    return {
        **facts,
        "detector": detector,
        "classes": list(judge.heads.classes),
        "threshold": judge.heads.threshold if parts else None,
        "gate": {
            "detection": {label: asdict(choice) for label, choice in decision.detection.items()},
            "typing": {label: asdict(choice) for label, choice in decision.typing.items()},
            "evidence": {part: [_finite(asdict(found)) for found in rows] for part, rows in decision.evidence.items()},
        },
    }


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts for JSON: infinite errors (a class with one shot) are null."""
    return {key: None if isinstance(value, float) and value in _ENDLESS else value for key, value in facts.items()}


_ENDLESS = (float("inf"), float("-inf"))


def training_lines(facts: dict[str, Any]) -> list[str]:
    """What a person wants to know of a training."""
    out = [f"learned from {facts['shots']} photos of defects and {facts['good']} good parts"]
    for part, evidence in facts["gate"]["evidence"].items():
        chosen = facts["gate"][part]
        modes = sorted({choice["mode"] for label, choice in chosen.items() if label != GOOD})
        out.append(f"{part}: the gate chose {', '.join(modes)}")
        for found in evidence:
            error = "no error known" if found["error"] is None else f"± {found['error']:.3f}"
            out.append(f"  {found['candidate']:<16} {found['gain']:+.3f} {error} against classic augmentation")
    out += notices(facts["refused"], facts["left_out"])
    if facts["threshold"] is None:
        out.append("no good parts: it names types, it finds no defects")
    else:
        out.append(f"called a defect above a probability of {facts['threshold']:.3f}")
    return out


def detect_in(detector: Path, places: Sequence[Path], encoder: Path | None, reporter: Reporter) -> Iterator[Finding]:
    """Findings of photos and folders, in order; what cannot be read is told and left out.

    Raises:
        InputError: the detector cannot be used, a place does not exist, or nothing can be read.
    """
    judge = load_detector(detector, encoder)
    files: list[Path] = []
    for place in places:
        if place.is_dir():
            files += sorted(found for found in place.rglob("*") if found.suffix.lower() in SUFFIXES)
        elif place.is_file():
            files.append(place)
        else:
            raise InputError(f"{place}: no such photo or folder")
    read = 0
    for number, file in enumerate(files):
        try:
            photo = Photo(read_grey(file), "", name=str(file))
        except InputError as error:
            reporter.note(str(error))
            continue
        read += 1
        yield from judge.find([photo])
        reporter.advance(number + 1, len(files), f"{number + 1} of {len(files)} photos")
    if not read:
        raise InputError(f"{', '.join(map(str, places))}: no photo that can be read")


def finding_line(found: Finding, as_json: bool) -> str:
    """A finding for a person, or as a JSON object."""
    if as_json:
        return json.dumps(asdict(found), allow_nan=False)
    words = [f"{found.name}: {found.label}"]
    if found.defect is not None:
        words.append(f"defect {100 * found.defect:.0f} %")
    if found.label != GOOD:
        best = sorted(found.types.items(), key=lambda item: -item[1])[:2]
        words.append(", ".join(f"{label} {100 * chance:.0f} %" for label, chance in best))
    if found.anomaly is not None:
        words.append(f"anomaly {found.anomaly:.2f}")
    return "; ".join(words)


def draw_samples(
    generator: Path,
    out: Path,
    count: int,
    labels: str,
    steps: int | None,
    seed: int,
    sheet: Path | None,
    reporter: Reporter,
    pipeline: Path | None = None,
) -> None:
    """Writes samples of a generator as an image folder.

    Args:
        generator: its file.
        out: the folder.
        count: photos of each class.
        labels: classes with commas between them; all where there are none.
        steps: denoising steps; those of the mode where it is none.
        seed: of the photos.
        sheet: picture of all of them, if any.
        reporter: told how it goes on.
        pipeline: folder of the pretrained pipeline that was adapted, where it is not where it was.

    Raises:
        InputError: the generator cannot be read, a class is unknown, or a place to write cannot be used.
    """
    if not 1 <= count <= _MOST_SAMPLES:
        raise InputError(f"count is {count}; must be 1 to {_MOST_SAMPLES}")
    check_folder(out)
    if sheet is not None:
        check_sheet_path(sheet)
        if not sheet.resolve().parent.is_dir():
            raise InputError(f"sheet {sheet}: there is no such folder; make it or choose another place")
    made = load_generator(generator, EVERY_MODE, Means(pipeline=pipeline))
    asked = dict.fromkeys(name.strip() for name in labels.split(",") if name.strip())
    wanted = list(asked) or list(made.labels)
    photos: list[Photo] = []
    reporter.stage(f"drawing {count} photos of {len(wanted)} classes")
    try:
        for place, label in enumerate(wanted):
            photos += made.sample(label, count, seed, steps)
            reporter.advance(place + 1, len(wanted), f"{label}: {count} photos")
    except KeyboardInterrupt:
        if not photos:
            raise
        reporter.note(f"interrupted: {len(photos)} photos of the classes that were done are written")
    write_dataset(Dataset(out.name, tuple(photos)), out, reporter)
    reporter.note(f"photos in {out}")
    if sheet is not None:
        write_sheet(sheet, contact_sheet(rows_by_class(photos)))
        reporter.note(f"contact sheet in {sheet}")


def run_experiment(
    source: Source,
    settings: Settings,
    out: Path,
    resume: bool,
    reporter: Reporter,
    prior: Path | None = None,
    pipeline: Path | None = None,
) -> Experiment:
    """Evaluates on photos and leaves `experiment.json`, `report.html` and contact sheets of the first draw.

    Raises:
        InputError: photos that cannot be used, settings out of range, or a folder that holds an experiment and is not
            to be resumed.
    """
    detector_named(settings.detector)
    if settings.draws < 1:
        raise InputError(f"draws is {settings.draws}; must be 1 or more (10 for a claim)")
    means = _means(prior, pipeline)
    target = out / "experiment.json"
    kept = None
    if target.exists():
        if not resume:
            raise InputError(f"{out}: holds an experiment; resume it with --resume or choose another --out")
        kept = read_experiment(target)
    dataset = source.read(reporter)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error

    def save(found: Experiment, sheets: dict[str, list[Photo]]) -> None:
        try:
            write_experiment(target, found)
            if len(found["draws"]) == 1:  # files, so that a resumed run has them for its page
                for name, photos in sheets.items():
                    replace_file(out / f"{name}.jpg", photos_jpeg(photos))
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror}); --resume goes on from there") from error

    found, _ = evaluate(dataset, settings, reporter, kept, save, means)
    sheets = {name: out / f"{name}.jpg" for name in ("shots", *settings.modes)}
    shown = {name: place.read_bytes() for name, place in sheets.items() if place.is_file()}
    write_report(out / "report.html", found, shown)
    reporter.note(f"report in {out / 'report.html'}")
    return found


def profile_modes(
    source: Source,
    modes: Sequence[str],
    shots: int,
    samples: int,
    seed: int,
    prior: Path | None,
    out: Path,
    reporter: Reporter,
    pipeline: Path | None = None,
) -> Profile:
    """Measures modes on photos and writes what they cost.

    Raises:
        InputError: photos or modes that cannot be used, or no place to write.
    """
    check_file(out, "costs.toml")
    means = _means(prior, pipeline)
    dataset = source.read(reporter)
    found = profile(dataset, modes, reporter, shots, samples, seed, means)
    write_profile(out, found)
    reporter.note(f"costs in {out}")
    return found
