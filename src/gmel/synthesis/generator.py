"""What every mode of synthesis offers, and what its samples cost.

A mode learns from the shots of one site (3 to 10 photos a class) and its good parts, and gives photos of a class on
demand. Modes are the heterogeneous generation tasks of the offloading problem: the same interface, another cost law.
"""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.synthesis.diffusion.watching import part
from gmel.synthesis.photo import Photo

__all__ = [
    "FORMAT",
    "NO_MEANS",
    "Arrays",
    "CostLaw",
    "Generator",
    "Means",
    "OnGood",
    "Request",
    "Several",
    "Shamming",
    "load_generator",
    "sample_several",
    "save_generator",
    "steps_around",
]

FORMAT = 1
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class CostLaw:
    """What a task of a mode costs: `time = steps x (fixed_s + per_image_s x images)` on the machine that measured it.

    Attributes:
        gflop: floating-point work of one step for one image, in GFLOP (from the compiled program).
        fixed_s: seconds of a step whatever the number of images.
        per_image_s: further seconds of a step for each image.
    """

    gflop: float
    fixed_s: float
    per_image_s: float

    def seconds(self, steps: int, images: int) -> float:
        """Seconds of a task on the machine that measured the law."""
        return steps * (self.fixed_s + self.per_image_s * images)

    def work_gflop(self, steps: int, images: int) -> float:
        """GFLOP of a task."""
        return self.gflop * steps * images


@dataclass(frozen=True)
class Means:
    """Files that a fit may use, where its mode trains a network.

    Attributes:
        prior: file of the label-free prior: read where it is there, else trained on the good parts and written.
        checkpoint: stem of the files that an interrupted training leaves; with it, an interrupt ends the training and
            what was learned so far is used, without it there is nothing to keep and the interrupt goes through.
        resume: go on from these files where they are there.
        pipeline: folder of a pretrained pipeline, for the mode that adapts one.
    """

    prior: Path | None = None
    checkpoint: Path | None = None
    resume: bool = False
    pipeline: Path | None = None

    def checkpoint_of(self, part: str) -> Path | None:
        """The file of one training, for instance `STEM.prior.checkpoint`."""
        return (
            None if self.checkpoint is None else self.checkpoint.with_name(f"{self.checkpoint.name}.{part}.checkpoint")
        )

    def digests(self) -> dict[str, str]:
        """SHA-256 of the prior and the pipeline, of those that are there."""
        found: dict[str, str] = {}
        if self.prior is not None and self.prior.is_file():
            found["prior"] = hashlib.sha256(self.prior.read_bytes()).hexdigest()
        if self.pipeline is not None:
            from gmel.synthesis.pretrained.folder import PipelineFolder  # noqa: PLC0415

            found["pipeline"] = PipelineFolder.read(self.pipeline).digest
        return found

    def forget(self) -> None:
        """Removes the checkpoints of a fit that is done."""
        if self.checkpoint is not None:
            for path in self.checkpoint.parent.glob(f"{glob.escape(self.checkpoint.name)}.*.checkpoint"):
                path.unlink()


NO_MEANS = Means()


@runtime_checkable
class Shamming(Protocol):
    """A mode that also makes good parts with the traces of its work, but without a defect."""

    def sham(self, count: int, seed: int) -> list[Photo]:
        """`count` photos labelled as good parts; a detector that sees them cannot take the traces for the defect."""
        ...


@runtime_checkable
class OnGood(Protocol):
    """A mode that draws defects on good parts, also on those that it is given later."""

    def on(self, good: Sequence[Photo]) -> "Generator":
        """The generator with good parts to draw on: another site's, or those that a saved generator does not hold."""
        ...

    def draws_on_good(self, label: str) -> bool:
        """Whether defects of a class are drawn on good parts; others come as whole photos."""
        ...


@dataclass(frozen=True)
class Request:
    """Photos of one class, as `Generator.sample` takes them."""

    label: str
    count: int
    seed: int


@runtime_checkable
class Several(Protocol):
    """A mode that draws what several ask for in one go."""

    def sample_several(self, requests: Sequence[Request], steps: int | None = None) -> list[list[Photo]]:
        """The photos of each request: those that `sample` gives, up to rounding.

        Raises:
            InputError: as `sample`, where one of them cannot be drawn.
        """
        ...


class Generator(Protocol):
    """One mode of synthesis.

    Class attributes:
        mode: its name on the command line and in files.
        default_steps: steps of a sample where nobody says; 0 for a mode without denoising.
        shares_photos: what it saves holds the photos themselves (it must not leave the site).
    """

    mode: ClassVar[str]
    default_steps: ClassVar[int]
    shares_photos: ClassVar[bool]

    @classmethod
    def fit(
        cls, shots: Sequence[Photo], good: Sequence[Photo], seed: int, reporter: Reporter, means: Means = NO_MEANS
    ) -> Self:
        """Learns from a site's shots and its good parts (which may be none).

        Args:
            shots: photos of defects.
            good: photos of good parts.
            seed: of all that is random.
            reporter: told how it goes on.
            means: files; for modes that train.

        Raises:
            InputError: the mode needs what the photos lack (masks, good parts), by name and with the remedy.
        """
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that it can draw."""
        ...

    def sample(self, label: str, count: int, seed: int, steps: int | None = None) -> list[Photo]:
        """`count` photos of a class; the same seed gives the same photos.

        Raises:
            InputError: a class that it has not learned, or steps outside what the mode allows.
        """
        ...

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """Everything `from_state` needs: arrays and facts in words."""
        ...

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The generator of a state.

        Raises:
            InputError: an array is missing or has another shape.
        """
        ...


def sample_several(generator: Generator, requests: Sequence[Request], steps: int | None = None) -> list[list[Photo]]:
    """The photos of each request: drawn together where the mode can (see `Several`), else one after the other.

    Raises:
        InputError: as `Generator.sample`, where one of them cannot be drawn.
    """
    if isinstance(generator, Several):
        return generator.sample_several(requests, steps)
    made: list[list[Photo]] = []
    for number, each in enumerate(requests):
        with part(number, len(requests)):
            made.append(generator.sample(each.label, each.count, each.seed, steps))
    return made


_STEP_SHARES = (0.25, 0.5, 1.0, 2.0, 3.0)


def steps_around(usual: int) -> tuple[int, ...]:
    """Denoising steps for a curve of quality or utility: a quarter to three times the usual ones.

    Args:
        usual: steps of the mode where nobody says; 0 for none, then the curve is empty.
    """
    return tuple(sorted({max(round(usual * share), 1) for share in _STEP_SHARES})) if usual else ()


def save_generator(path: Path, generator: Generator) -> None:
    """Writes a generator as one safetensors file (no pickle), under a temporary name first."""
    arrays, facts = generator.state()
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {**facts, "format": str(FORMAT), "mode": generator.mode}
    replace_file(path, write_arrays(contiguous, metadata=metadata))


def load_generator(path: Path, modes: Mapping[str, type[Generator]], means: Means = NO_MEANS) -> Generator:
    """The generator of a file written by :func:`save_generator`.

    Args:
        path: the file.
        modes: the modes that may be in it, by name.
        means: a pipeline's folder that takes the place of the one that the file names.

    Raises:
        InputError: unreadable, corrupt, of another format, of an unknown mode, or with wrong arrays.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file of `gmel synthesize fit`") from error
    try:
        arrays: Arrays = parse_arrays(data)
        length = int.from_bytes(data[:8], "little")
        facts: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: corrupt ({error}); fit the generator anew") from error
    if facts.get("format") != str(FORMAT):
        raise InputError(f"{path}: format is {facts.get('format')!r}, this gmel reads {FORMAT}; fit the generator anew")
    mode = facts.get("mode", "")
    if mode not in modes:
        raise InputError(f"{path}: mode is {mode!r}, must be one of {', '.join(sorted(modes))}")
    if means.pipeline is not None:
        facts = {**facts, "pipeline": str(means.pipeline)}
    try:
        return modes[mode].from_state(arrays, facts)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
