"""The modes of synthesis by name."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import cast

from gmel.scenario.errors import InputError
from gmel.synthesis.generator import Generator

__all__ = ["EVERY_MODE", "MODES", "mode_named", "modes_named"]

MODES: dict[str, tuple[str, str]] = {
    "compose": ("gmel.synthesis.compose", "Compose"),
    "harmonise": ("gmel.synthesis.harmonise", "Harmonise"),
    "generate": ("gmel.synthesis.generate", "Generate"),
    "langevin": ("gmel.synthesis.langevin", "Langevin"),
    "diffusers": ("gmel.synthesis.pipelines", "Diffusers"),
}
"""Where each mode is; imported when asked for, since some need JAX."""


class _EveryMode(Mapping[str, type[Generator]]):
    """All modes by name; each is imported when it is asked for, since some need JAX and a server wants one alone."""

    def __getitem__(self, name: str) -> type[Generator]:
        if name not in MODES:
            raise KeyError(name)
        return mode_named(name)

    def __iter__(self) -> Iterator[str]:
        return iter(MODES)

    def __len__(self) -> int:
        return len(MODES)


EVERY_MODE: Mapping[str, type[Generator]] = _EveryMode()
"""For `gmel.synthesis.generator.load_generator`: the file says which one it needs."""


def mode_named(name: str) -> type[Generator]:
    """The class of a mode.

    Raises:
        InputError: no such mode.
    """
    if name not in MODES:
        raise InputError(f"mode {name!r}: must be one of {', '.join(sorted(MODES))}")
    module, attribute = MODES[name]
    return cast("type[Generator]", getattr(import_module(module), attribute))


def modes_named(names: str) -> tuple[str, ...]:
    """The modes of a list with commas, each known.

    Raises:
        InputError: an unknown mode.
    """
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in found:
        mode_named(name)
    return found
