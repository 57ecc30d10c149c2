"""Progress on the terminal: a bar where there is one, a line every few seconds where there is not."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ConsoleReporter"]

_LINE_EVERY_S = 5.0


class ConsoleReporter:
    """Tells a person how long work goes on; writes to stderr, so that results on stdout stay clean."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._said = -_LINE_EVERY_S

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """A new part of the work: its own bar or line."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=None)
        self._line(text, force=True)

    def advance(self, done: float, total: float, text: str) -> None:
        """Progress within the part."""
        if self._task is None:
            self._task = self._progress.add_task(text, total=total)
        self._progress.update(self._task, completed=done, total=total, description=text)
        self._line(f"{text} ({100 * done / max(total, 1e-9):.0f} %)", force=done >= total)

    def note(self, text: str) -> None:
        """Something the user should know, kept on the screen."""
        self._progress.console.print(f"note: {text}", style="dim", highlight=False, markup=False, soft_wrap=True)

    def _line(self, text: str, *, force: bool) -> None:
        if self._console.is_terminal:
            return
        now = time.monotonic()
        if force or now - self._said >= _LINE_EVERY_S:
            self._said = now
            self._console.print(f"[{now - self._began:6.1f} s] {text}", highlight=False, markup=False, soft_wrap=True)
