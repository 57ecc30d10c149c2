"""Weights of a module as named arrays, and back with every shape checked."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gmel.scenario.errors import InputError
from gmel.synthesis.generator import Arrays

__all__ = ["named_weights", "with_weights"]

Model = TypeVar("Model", bound=eqx.Module)


def named_weights(model: eqx.Module, prefix: str) -> Arrays:
    """Arrays of a module, named by where they are in it."""
    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_array))[0]
    return {prefix + jax.tree_util.keystr(where): np.asarray(leaf) for where, leaf in leaves}


def with_weights(template: Model, arrays: Arrays, prefix: str, remedy: str = "; fit the generator anew") -> Model:
    """The module with other weights.

    Args:
        template: has the structure and the shapes.
        arrays: as `named_weights` gives them.
        prefix: of their names.
        remedy: end of the message where they do not fit; empty where the caller says what to do.

    Raises:
        InputError: an array is missing, has another shape or type, or holds something that is no number.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(eqx.filter(template, eqx.is_array))
    found: list[jax.Array] = []
    for where, leaf in leaves:
        name = prefix + jax.tree_util.keystr(where)
        array = arrays.get(name)
        if array is None or array.shape != leaf.shape or array.dtype != leaf.dtype:
            has = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise InputError(f"array {name} is {has}, must be {leaf.dtype}{list(leaf.shape)}{remedy}")
        if not np.isfinite(array).all():
            raise InputError(f"array {name} holds values that are no numbers{remedy}")
        found.append(jnp.asarray(array))
    weights = jax.tree_util.tree_unflatten(structure, found)
    return eqx.combine(weights, template)
