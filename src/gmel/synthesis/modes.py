"""The modes of synthesis by name."""

from importlib import import_module
from typing import cast

from gmel.scenario.errors import InputError
from gmel.synthesis.generator import Generator

__all__ = ["MODES", "mode_named", "modes_named"]

MODES: dict[str, tuple[str, str]] = {
    "compose": ("gmel.synthesis.compose", "Compose"),
    "harmonise": ("gmel.synthesis.harmonise", "Harmonise"),
    "generate": ("gmel.synthesis.generate", "Generate"),
    "langevin": ("gmel.synthesis.langevin", "Langevin"),
    "diffusers": ("gmel.synthesis.pipelines", "Diffusers"),
}
"""Where each mode is; imported when asked for, since some need JAX."""


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
