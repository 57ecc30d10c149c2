"""Modules of the extra `diffusers`: asked for when they are needed, since most installations do without them."""

from importlib import import_module
from typing import Any

from gmel.scenario.errors import InputError

__all__ = ["Tensor", "module_of_extra"]

Tensor = Any
"""A `torch.Tensor`. The type itself is not there without the extra."""


def module_of_extra(name: str) -> Any:
    """A module of PyTorch or its kin.

    Raises:
        InputError: the extra is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f"mode diffusers: {name} cannot be imported ({error}); install the extra: "
            "`pip install gmel[diffusers]` or `uv sync --extra diffusers`"
        ) from error
