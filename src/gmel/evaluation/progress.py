"""Who is told how long work goes on."""

from typing import Protocol

__all__ = ["Reporter"]


class Reporter(Protocol):
    """Who is told how the work goes on."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""
        ...

    def advance(self, done: float, total: float, text: str) -> None:
        """Progress within the part."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...
