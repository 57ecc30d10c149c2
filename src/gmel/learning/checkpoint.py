"""Checkpoints: a pytree in a safetensors file. No pickle, and every array is checked against what is expected."""

import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays

from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file

__all__ = ["FORMAT", "load_checkpoint", "save_checkpoint"]

FORMAT = 1
Tree = TypeVar("Tree")


def save_checkpoint(path: Path, tree: Any, facts: dict[str, str]) -> None:
    """Writes all arrays of a pytree, with `facts` (strings) beside them, under a temporary name and renames it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = {jax.tree_util.keystr(where): _plain(leaf) for where, leaf in leaves if _is_array(leaf)}
    data = write_arrays(arrays, metadata={"format": str(FORMAT), **facts})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)


def load_checkpoint(path: Path, template: Tree, facts: dict[str, str]) -> Tree:
    """The pytree of a checkpoint, in the structure of `template`.

    Args:
        path: file written by :func:`save_checkpoint`.
        template: a pytree with the same structure, shapes and types; its values are replaced.
        facts: what the checkpoint must say of itself (for instance the scenario's digest).

    Raises:
        InputError: unreadable, corrupt, of another format, of another run, or with other arrays.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"checkpoint {path.name}: cannot be read ({error.strerror}); start the run anew") from error
    try:
        arrays = parse_arrays(data)
        length = int.from_bytes(data[:8], "little")
        said: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {path.name}: corrupt ({error}); start the run anew") from error
    for name, wanted in {"format": str(FORMAT), **facts}.items():
        if said.get(name) != wanted:
            raise InputError(
                f"checkpoint {path.name}: {name} is {said.get(name)!r}, must be {wanted!r}; "
                "resume with the settings of the run, or start it anew"
            )
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    restored: list[Any] = []
    for where, leaf in leaves:
        if not _is_array(leaf):
            restored.append(leaf)
            continue
        name, expected = jax.tree_util.keystr(where), _plain(leaf)
        found = arrays.get(name)
        if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
            has = "missing" if found is None else f"{found.dtype}{list(found.shape)}"
            raise InputError(
                f"checkpoint {path.name}: array {name} is {has}, must be {expected.dtype}{list(expected.shape)}; "
                "resume with the settings of the run, or start it anew"
            )
        value = jnp.asarray(found)
        restored.append(jax.random.wrap_key_data(value) if _is_key(leaf) else value)
    return jax.tree_util.tree_unflatten(structure, restored)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> np.ndarray[Any, Any]:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
