"""Where photos come from: a folder, or the built-in set."""

from dataclasses import dataclass
from pathlib import Path

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.data.dataset import Dataset, read_dataset
from gmel.synthesis.data.procedural import procedural_dataset

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """What a user names.

    Attributes:
        folder: with the photos; none for the built-in set.
        builtin: whether the built-in set is asked for.
        layout, good, crop: how the folder is read.
        seed: of the built-in set.

    Raises:
        InputError: neither or both of folder and built-in set.
    """

    folder: Path | None = None
    builtin: bool = False
    layout: str = "auto"
    good: str = "good"
    crop: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.folder is None) != self.builtin:
            raise InputError("give a folder with photos, or --builtin, one of the two")

    def read(self, reporter: Reporter) -> Dataset:
        """The photos.

        Raises:
            InputError: the folder cannot be used.
        """
        if self.folder is None:
            return procedural_dataset(self.seed, reporter=reporter)
        return read_dataset(self.folder, self.layout, self.good, self.crop, reporter)
