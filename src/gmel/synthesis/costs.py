"""What a task of a mode costs and what it is worth, measured here, in the form that a scenario reads.

Work: GFLOP of a step for an image, counted by the compiler. Time: images x photo_s + steps x (fixed_s + per_image_s x
images), fitted to tasks of a few sizes. Quality: kernel distance to real photos by steps, beside the distance that real
photos have from each other.
"""

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.optimize import nnls

from gmel.evaluation.progress import Reporter
from gmel.scenario.demand import GenerationModel, LoadTime
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.laws import Choice, Range, Spread
from gmel.scenario.load import tables_to_toml
from gmel.scenario.quality import Quality
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.splits import Split, few_shot_split
from gmel.synthesis.detector.features import Extractor, extractor_for
from gmel.synthesis.detector.linear import Scaling
from gmel.synthesis.diffusion.drawing import Draw
from gmel.synthesis.diffusion.stitching import Field, windows_over
from gmel.synthesis.fidelity import kernel_distance
from gmel.synthesis.generator import (
    NO_MEANS,
    CostLaw,
    Generator,
    Means,
    load_generator,
    save_generator,
    steps_around,
)
from gmel.synthesis.modes import mode_named
from gmel.synthesis.photo import GOOD, Floats, Photo

__all__ = ["ModeCost", "Profile", "clock", "cost_of", "fit_times", "profile", "quality_law", "write_profile"]

_IMAGES = (1, 4, 16)
"""Images of the tasks that are timed; the last is the size that `[[models]]` are for."""
_FEWEST_PHOTOS = 4
"""Photos of a class below which no distance is told."""


@runtime_checkable
class Networked(Protocol):
    """A mode whose samples a network draws, window by window."""

    def window_gflop(self) -> float:
        """GFLOP of one step for one window."""
        ...

    def drawn_with(self, draw: Draw, label: str, count: int, seed: int) -> list[Photo]:
        """As `sample`, with fields drawn by something else."""
        ...


@runtime_checkable
class OnPipeline(Protocol):
    """A mode whose samples a pretrained pipeline draws whole."""

    def image_gflop(self) -> float:
        """GFLOP of one step for one photo."""
        ...

    def base_bytes(self) -> int:
        """Bytes of the pipeline, which a file of the generator does not hold."""
        ...

    def forget_base(self) -> None:
        """The next generator of a file reads its pipeline anew."""
        ...


@dataclass(frozen=True)
class ModeCost:
    """What is known of one mode.

    Attributes:
        mode: its name.
        law: work and time of a step.
        photo_s: seconds for an image beside its steps: composing, sensor.
        fit_s: seconds of the fit.
        load_s: seconds to load its file.
        file_bytes: size of the file; with the pipeline, where it needs one.
        usual_steps: steps where nobody says; 0 for none.
        windows: windows that an image takes, on average over the classes; 0 for none.
        steps, kid: kernel distance of samples to real photos by steps, mean over classes; one entry, 0 steps, for a
            mode without any.
        floor: the same between two halves of the real photos.
        quality: law of 1 / (1 + max(kid - floor, 0)), by steps.
        quality_error: root mean square error of that law.
        photo_bits: bits of a photo, raw.
    """

    mode: str
    law: CostLaw
    photo_s: float
    fit_s: float
    load_s: float
    file_bytes: int
    usual_steps: int
    windows: float
    steps: tuple[int, ...]
    kid: tuple[float, ...]
    floor: float
    quality: Quality
    quality_error: float
    photo_bits: float

    def model(self) -> GenerationModel:
        """The mode as an entry of a scenario's catalogue; a unit of work is a second of the machine that was measured.

        A request has 16 images: work is in proportion to images there, so that `fixed_s` counts as for that size.
        """
        images, usual = _IMAGES[-1], max(self.usual_steps, 1)
        step_work = self.law.seconds(1, images) / images
        return GenerationModel(
            name=self.mode,
            popularity=1.0,
            step_work=Spread.constant(step_work) if step_work > 0 else None,
            fixed_work=self.photo_s,
            steps=Choice(values=[float(usual)], weights=[1.0]),
            images=Choice(values=[float(images)], weights=[1.0]),
            memory_gb=self.file_bytes / 1e9,
            bits_in=Range(low=self.photo_bits, high=self.photo_bits),
            bits_out_per_image=self.photo_bits,
            load=LoadTime(warm_share=1.0, warm_median_s=self.load_s, cold_median_s=self.load_s, sigma=0.0),
            quality=self.quality,
        )


@dataclass(frozen=True)
class Profile:
    """Costs of several modes on one data set and machine."""

    dataset: str
    shots: int
    machine: str
    cores: int
    clock: str
    modes: tuple[ModeCost, ...]
    refused: dict[str, str]

    def lines(self) -> list[str]:
        """For a person."""
        said: list[str] = []
        for cost in self.modes:
            law, curve = cost.law, zip(cost.steps, cost.kid, strict=True)
            kids = ", ".join(f"{kid:.3g} at {steps}" for steps, kid in curve)
            said.append(
                f"{cost.mode:10} {law.gflop:8.4f} GFLOP a step and image; {self.clock} time: "
                f"images x {cost.photo_s:.2g} s + steps x ({law.fixed_s:.2g} + {law.per_image_s:.2g} x images) s; "
                f"kernel distance {kids} steps, floor {cost.floor:.3g}"
            )
        return said + [f"{mode}: not used here: {why}" for mode, why in self.refused.items()]

    def tables(self) -> dict[str, Any]:
        """For TOML and JSON."""
        about = {
            "dataset": self.dataset,
            "shots": self.shots,
            "machine": self.machine,
            "cores": self.cores,
            "clock": self.clock,
            "work_unit": f"{self.clock} seconds of the machine",
        }
        modes = [
            {
                "name": cost.mode,
                "gflop_per_step_and_image": cost.law.gflop,
                "fixed_s": cost.law.fixed_s,
                "per_image_s": cost.law.per_image_s,
                "photo_s": cost.photo_s,
                "fit_s": cost.fit_s,
                "load_s": cost.load_s,
                "file_bytes": cost.file_bytes,
                "usual_steps": cost.usual_steps,
                "windows_per_image": cost.windows,
                "steps": list(cost.steps),
                "kid": list(cost.kid),
                "kid_floor": cost.floor,
                "quality_error": cost.quality_error,
            }
            for cost in self.modes
        ]
        models = [cost.model().model_dump(mode="json", exclude_none=True, exclude_defaults=True) for cost in self.modes]
        return {"profile": {**about, "refused": self.refused}, "modes": modes, "models": models}


def profile(
    dataset: Dataset,
    modes: Sequence[str],
    reporter: Reporter,
    shots: int = 5,
    samples: int = 24,
    seed: int = 0,
    means: Means = NO_MEANS,
) -> Profile:
    """Fits every mode on a few shots and measures it; test photos are what samples are compared with.

    Args:
        dataset: photos with groups.
        modes: names.
        reporter: told how it goes on.
        shots: photos of each class.
        samples: photos of each class for each number of steps of the curve of quality.
        seed: of shots, fits and samples.
        means: files that modes may use.

    Raises:
        InputError: too few photos, or samples.
    """
    if not _FEWEST_PHOTOS <= samples <= 1000:
        raise InputError(f"samples is {samples}; must be {_FEWEST_PHOTOS} to 1000")
    split = few_shot_split(dataset, shots, seed)
    extractor = extractor_for(dataset.photos)
    costs: list[ModeCost] = []
    refused: dict[str, str] = {}
    for mode in modes:
        tell = clock()
        try:
            began = tell()
            generator = mode_named(mode).fit(split.shots, split.good, seed, reporter, means)
        except InputError as error:
            refused[mode] = str(error)
            reporter.note(f"{mode}: {error}")
            continue
        reporter.stage(f"measuring {mode}")
        costs.append(cost_of(generator, split, extractor, samples, seed, reporter, tell() - began))
    if not costs:
        raise InputError(f"modes: none can be used here: {'; '.join(refused.values())}")
    machine = f"{platform.machine()} {platform.system()}"
    return Profile(dataset.name, shots, machine, _cores(), _clock_name(), tuple(costs), refused)


def cost_of(
    generator: Generator, split: Split, extractor: Extractor, samples: int, seed: int, reporter: Reporter, fit_s: float
) -> ModeCost:
    """Measures one fitted mode.

    Args:
        generator: the mode.
        split: its shots, and real photos that it has not seen.
        extractor: of the features that distances are measured by.
        samples: photos of each class for each number of steps.
        seed: of the samples.
        reporter: told how it goes on.
        fit_s: seconds of its fit.
    """
    usual = generator.default_steps
    curve = steps_around(usual) or (0,)
    timed = (curve[0], curve[len(curve) // 2]) if usual else (0,)
    parts = len(timed) * len(_IMAGES) + len(curve)
    done = 0

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        reporter.advance(done, parts, f"{generator.mode}: {what}")

    tasks: list[tuple[int, int, float]] = []
    for steps, images in product(timed, _IMAGES):
        tasks.append((steps, images, _seconds(generator, steps, images, seed)))
        tell(f"{images} images at {steps} steps")
    photo_s, fixed_s, per_image_s = fit_times(tasks)
    distances = _Distances(split, extractor)
    kid: list[float] = []
    for steps in curve:
        kid.append(distances.of(generator, steps, samples, seed))
        tell(f"kernel distance at {steps} steps")
    size, load_s = _stored(generator)
    windows, gflop = _counted(generator, seed)
    qualities = [1.0 / (1.0 + max(value - distances.floor, 0.0)) for value in kid]
    law, error = quality_law(curve, qualities)
    return ModeCost(
        mode=generator.mode,
        law=CostLaw(gflop, fixed_s, per_image_s),
        photo_s=photo_s,
        fit_s=fit_s,
        load_s=load_s,
        file_bytes=size,
        usual_steps=usual,
        windows=windows,
        steps=curve,
        kid=tuple(kid),
        floor=distances.floor,
        quality=law,
        quality_error=error,
        photo_bits=float(np.mean([8 * photo.image.nbytes for photo in split.shots])),
    )


def fit_times(tasks: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Seconds of an image, of a step, and of a step for an image: none below 0, relative errors least.

    Args:
        tasks: steps, images and seconds of each.
    """
    steps, images, seconds = (np.asarray(column, np.float64) for column in zip(*tasks, strict=True))
    columns = np.stack([images, steps, steps * images], axis=1) / seconds[:, None]
    found = np.asarray(nnls(columns, np.ones_like(seconds))[0], np.float64)
    return float(found[0]), float(found[1]), float(found[2])


def quality_law(steps: Sequence[int], qualities: Sequence[float]) -> tuple[Quality, float]:
    """The law limit - factor steps^-exponent nearest to qualities (0 to 1), and its root mean square error.

    A mode without steps, or whose quality does not rise with them, has a constant one.
    """
    values, counts = np.asarray(qualities, np.float64), np.maximum(np.asarray(steps, np.float64), 1.0)
    best = (float(np.sqrt(np.mean((values - values.mean()) ** 2))), float(values.mean()), 0.0, 1.0)
    for exponent in np.geomspace(0.1, 8.0, 60) if len(values) > 2 else []:
        falling = counts**-exponent
        slope, limit = (float(value) for value in np.polyfit(falling, values, 1))
        if limit > 1.0:
            limit = 1.0
            slope = float(falling @ (values - 1.0) / (falling @ falling))
        error = float(np.sqrt(np.mean((limit + slope * falling - values) ** 2)))
        if slope < 0.0 <= limit and error < best[0]:
            best = (error, limit, -slope, float(exponent))
    return Quality(law="power", limit=best[1], factor=best[2], exponent=best[3]), best[0]


def write_profile(path: Path, found: Profile) -> None:
    """Writes the profile as TOML, under a temporary name first. Its `[[models]]` can stand in a scenario."""
    head = (
        "# Costs of modes of synthesis, measured by `gmel synthesize profile` (docs/synthesis-diffusion.md).\n"
        f'# [[models]] can be pasted into a scenario with work_unit = "{found.tables()["profile"]["work_unit"]}":\n'
        "# there a server of speed 1 is the machine that was measured. Set popularity, steps and images.\n\n"
    )
    replace_file(path, (head + tables_to_toml(found.tables())).encode())


class _Distances:
    """Kernel distances to real photos that no mode has seen, class by class."""

    def __init__(self, split: Split, extractor: Extractor) -> None:
        self._extractor = extractor
        by_class: dict[str, list[Photo]] = {}
        for photo in split.test:
            if photo.label != GOOD:
                by_class.setdefault(photo.label, []).append(photo)
        usable = {label: photos for label, photos in by_class.items() if len(photos) >= _FEWEST_PHOTOS}
        if not usable:
            raise InputError(f"test: no class has {_FEWEST_PHOTOS} photos to compare with; give more photos")
        features = {label: extractor(photos) for label, photos in usable.items()}
        self._scaling = Scaling.fit(np.concatenate(list(features.values())))
        self._real: dict[str, Floats] = {label: self._scaling(rows) for label, rows in features.items()}
        # Photos lie in the order of their files, which may be that of the day: halves by every other one.
        self.floor = float(np.mean([kernel_distance(rows[::2], rows[1::2]) for rows in self._real.values()]))

    def of(self, generator: Generator, steps: int, samples: int, seed: int) -> float:
        labels = [label for label in generator.labels if label in self._real]
        if not labels:
            raise InputError(f"{generator.mode}: draws none of the classes that there are test photos of")
        found: list[float] = []
        for label in labels:
            photos = generator.sample(label, samples, seed, steps or None)
            found.append(kernel_distance(self._scaling(self._extractor(photos)), self._real[label]))
        return float(np.mean(found))


def _seconds(generator: Generator, steps: int, images: int, seed: int) -> float:
    """Seconds of a task, mean over the classes, without compiling: each is drawn once before."""
    tell = clock()
    found: list[float] = []
    for label in generator.labels:
        generator.sample(label, images, seed, steps or None)
        began = tell()
        generator.sample(label, images, seed, steps or None)
        found.append(tell() - began)
    return float(np.mean(found))


def _counted(generator: Generator, seed: int) -> tuple[float, float]:
    """Windows of an image, and GFLOP of a step for an image."""
    if isinstance(generator, OnPipeline):
        return 1.0, generator.image_gflop()
    if not isinstance(generator, Networked):
        return 0.0, 0.0
    windows = 0

    def count(fields: list[Field]) -> list[Floats]:
        nonlocal windows
        windows += sum(windows_over((field.start.shape[0], field.start.shape[1])) for field in fields)
        return [field.known for field in fields]

    images = 2 * _IMAGES[-1]
    for label in generator.labels:
        generator.drawn_with(count, label, images, seed)
    each = windows / (images * len(generator.labels))
    return each, each * generator.window_gflop()


def _stored(generator: Generator) -> tuple[int, float]:
    """Bytes of the file (and the pipeline, where there is one) and seconds to load it."""
    beside = 0
    if isinstance(generator, OnPipeline):
        beside = generator.base_bytes()
        generator.forget_base()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generator.safetensors"
        save_generator(path, generator)
        began = time.perf_counter()
        load_generator(path, {generator.mode: type(generator)})
        return beside + path.stat().st_size, time.perf_counter() - began


def clock() -> Any:
    """What tells seconds: of the processor, which do not count what else runs there; of the wall on an accelerator."""
    return time.process_time if _clock_name() == "processor" else time.perf_counter


def _clock_name() -> str:
    import jax  # noqa: PLC0415

    if find_spec("torch") is not None and import_module("torch").cuda.is_available():
        return "wall"
    return "processor" if jax.default_backend() == "cpu" else "wall"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
