"""Who is told how far a drawing is, after each step of a sampler, and may stop it there.

A watcher belongs to the thread that draws (a context variable), so that nothing between it and the samplers has to hand
it on. Without one, samplers run as one compiled loop, as they do for every figure that was measured.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Watch", "part", "watched", "watching"]

Watch = Callable[[int, int], None]
"""Is told steps that are done, and all steps. What it raises ends the drawing."""

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching(watch: Watch) -> Generator[None]:
    """Tells `watch` of every step that is drawn inside."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def watched() -> Watch | None:
    """Who is told; None for nobody."""
    return _watch.get()


@contextmanager
def part(number: int, parts: int) -> Generator[None]:
    """What is drawn inside is part `number` of `parts`, counted from 0: its steps count as a share of the whole.

    Parts may lie within parts. They count as equally long, which is about true: what is told rises and ends at the
    whole, but not evenly.
    """
    outer = _watch.get()
    if outer is None or parts <= 1:
        yield
        return
    with watching(lambda step, steps: outer(number * steps + step, parts * steps)):
        yield
