"""From a folder to a generator, from a generator to photos, from a folder to the report: what the commands do."""

from collections.abc import Sequence
from pathlib import Path

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.costs import Profile, profile, write_profile
from gmel.synthesis.data.dataset import Dataset, read_dataset
from gmel.synthesis.data.procedural import procedural_dataset
from gmel.synthesis.data.sheet import check_sheet_path, contact_sheet, rows_by_class, write_sheet
from gmel.synthesis.data.splits import few_shot_split
from gmel.synthesis.data.write import check_folder, write_dataset
from gmel.synthesis.evaluate import Experiment, Settings, evaluate, read_experiment, write_experiment
from gmel.synthesis.generator import Generator, Means, load_generator
from gmel.synthesis.modes import MODES, mode_named
from gmel.synthesis.photo import GOOD, Photo
from gmel.synthesis.report import write_report

__all__ = ["draw_samples", "fit_generator", "profile_modes", "run_experiment"]

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

    Raises:
        InputError: the folder, the mode or the place to write cannot be used.
    """
    kind = mode_named(mode)
    if prior is not None:
        _check_prior(prior)
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"{out}: a file in a folder that exists is needed, for instance generator.safetensors")
    dataset = read_dataset(folder, layout, good, reporter=reporter)
    parts = [photo for photo in dataset.photos if photo.label == GOOD]
    if shots is None:
        chosen = [photo for photo in dataset.photos if photo.label != GOOD]
    else:
        split = few_shot_split(dataset, shots, seed)
        chosen, parts = list(split.shots), list(split.good)
    reporter.stage(f"fitting {mode} on {len(chosen)} photos of defects and {len(parts)} good parts")
    return kind.fit(chosen, parts, seed, reporter, Means(prior, out, resume))


def _check_prior(prior: Path) -> None:
    if prior.is_dir() or not prior.resolve().parent.is_dir():
        raise InputError(f"{prior}: a file in a folder that exists is needed, for instance prior.safetensors")


def draw_samples(
    generator: Path,
    out: Path,
    count: int,
    labels: str,
    steps: int | None,
    seed: int,
    sheet: Path | None,
    reporter: Reporter,
) -> None:
    """Writes samples of a generator as an image folder.

    Raises:
        InputError: the generator cannot be read, a class is unknown, or a place to write cannot be used.
    """
    if not 1 <= count <= _MOST_SAMPLES:
        raise InputError(f"count is {count}; must be 1 to {_MOST_SAMPLES}")
    check_folder(out)
    if sheet is not None:
        check_sheet_path(sheet)
    made = load_generator(generator, {name: mode_named(name) for name in MODES})
    wanted = [name.strip() for name in labels.split(",") if name.strip()] or list(made.labels)
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
    folder: Path | None,
    builtin: bool,
    layout: str,
    good: str,
    crop: int | None,
    settings: Settings,
    out: Path,
    resume: bool,
    reporter: Reporter,
    prior: Path | None = None,
) -> Experiment:
    """Evaluates on a folder (or the built-in set) and leaves `experiment.json` and `report.html`.

    Raises:
        InputError: neither or both of folder and built-in set, settings out of range, or a folder that holds an
            experiment and is not to be resumed.
    """
    if (folder is None) != builtin:
        raise InputError("evaluate: give a folder with photos, or --builtin, one of the two")
    if settings.draws < 1:
        raise InputError(f"draws is {settings.draws}; must be 1 or more (10 for a claim)")
    if prior is not None:
        _check_prior(prior)
    target = out / "experiment.json"
    kept = None
    if target.exists():
        if not resume:
            raise InputError(f"{out}: holds an experiment; resume it with --resume or choose another --out")
        kept = read_experiment(target)
    dataset = (
        procedural_dataset(0, reporter=reporter)
        if folder is None
        else read_dataset(folder, layout, good, crop, reporter)
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error

    def save(found: Experiment) -> None:
        try:
            write_experiment(target, found)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror}); --resume goes on from there") from error

    found, sheets = evaluate(dataset, settings, reporter, kept, save, Means(prior))
    write_report(out / "report.html", found, sheets)
    reporter.note(f"report in {out / 'report.html'}")
    return found


def profile_modes(
    folder: Path | None,
    builtin: bool,
    layout: str,
    good: str,
    crop: int | None,
    modes: Sequence[str],
    shots: int,
    samples: int,
    seed: int,
    prior: Path | None,
    out: Path,
    reporter: Reporter,
) -> Profile:
    """Measures modes on a folder (or the built-in set) and writes what they cost.

    Raises:
        InputError: neither or both of folder and built-in set, photos or modes that cannot be used, or no place to
            write.
    """
    if (folder is None) != builtin:
        raise InputError("profile: give a folder with photos, or --builtin, one of the two")
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"{out}: a file in a folder that exists is needed, for instance costs.toml")
    if prior is not None:
        _check_prior(prior)
    dataset = (
        procedural_dataset(0, reporter=reporter)
        if folder is None
        else read_dataset(folder, layout, good, crop, reporter)
    )
    found = profile(dataset, modes, reporter, shots, samples, seed, Means(prior))
    write_profile(out, found)
    reporter.note(f"costs in {out}")
    return found
