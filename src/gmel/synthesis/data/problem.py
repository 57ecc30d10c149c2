"""What is wrong with a data set, without being fatal."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Problem", "counted", "some"]


@dataclass(frozen=True)
class Problem:
    """One finding, for a person.

    Attributes:
        kind: what it is about, in one word (`unreadable`, `mask`, `twins`, ...).
        text: one line: what, how many, and the remedy.
        names: all the files or classes that it is about.
    """

    kind: str
    text: str
    names: tuple[str, ...] = ()


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few of some names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(kind: str, what: str, names: Sequence[str], remedy: str) -> Problem:
    """A finding about several files: what, how many, the first of them, and the remedy."""
    return Problem(kind, f"{what}: {len(names)} ({some(names)}); {remedy}", tuple(names))
