"""Low-rank adaptation (LoRA, arXiv 2106.09685) of any module: W + A B for its matrices and convolutions, the rest as it
is.

Biases, gains of norms and the table of classes are small and are trained as they are.
"""

import math
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gmel.synthesis.diffusion.edm import Denoiser

__all__ = ["LowRank", "Merged", "trained_in_low_rank"]

Model = TypeVar("Model", bound=eqx.Module)


class Factors(eqx.Module):
    """A change A B of a weight, whose last axis is its outputs. B starts at zero: the change starts at nothing."""

    a: Float[Array, "inputs rank"]
    b: Float[Array, "rank outputs"]

    def __init__(self, shape: tuple[int, ...], rank: int, key: PRNGKeyArray) -> None:
        inputs, outputs = math.prod(shape[:-1]), shape[-1]
        self.a = jax.random.normal(key, (inputs, rank)) / math.sqrt(inputs)
        self.b = jnp.zeros((rank, outputs))


class LowRank(eqx.Module, Generic[Model]):
    """A model with a low-rank change beside each weight that is larger than its factors."""

    base: Model
    factors: dict[str, Factors]

    def __init__(self, base: Model, rank: int, key: PRNGKeyArray) -> None:
        """Args:
        base: what is adapted; its large weights are not trained.
        rank: of every change.
        key: of the factors A.
        """
        self.base = base
        large = {name: leaf for name, leaf in _named(base) if _is_large(name, leaf, rank)}
        keys = jax.random.split(key, max(len(large), 1))
        self.factors = {
            name: Factors(leaf.shape, rank, each) for (name, leaf), each in zip(large.items(), keys, strict=False)
        }

    def merged(self) -> Model:
        """The adapted model, with nothing beside it."""

        def changed(where: Any, leaf: Any) -> Any:
            factors = self.factors.get(jax.tree_util.keystr(where))
            return leaf if factors is None else leaf + (factors.a @ factors.b).reshape(leaf.shape)

        return jax.tree_util.tree_map_with_path(changed, self.base)


class Merged(eqx.Module):
    """A loss of the merged model, as a loss of the low-rank one."""

    loss: Any = eqx.field(static=True)

    def __call__(self, model: LowRank[Denoiser], batch: Any, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a batch."""
        return self.loss(model.merged(), batch, key)


def trained_in_low_rank(model: LowRank[Any]) -> LowRank[Any]:
    """Marks what is trained: the factors, and the arrays of the base that have none beside them."""

    def mark(where: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(where)
        if not eqx.is_inexact_array(leaf):
            return False
        return not (name.startswith(".base") and name.removeprefix(".base") in model.factors)

    return jax.tree_util.tree_map_with_path(mark, model)


def _named(model: Any) -> list[tuple[str, Array]]:
    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_inexact_array))[0]
    return [(jax.tree_util.keystr(where), leaf) for where, leaf in leaves]


def _is_large(name: str, leaf: Array, rank: int) -> bool:
    if leaf.ndim < 2 or name.endswith(".labels"):
        return False
    return leaf.size > 2 * rank * (math.prod(leaf.shape[:-1]) + leaf.shape[-1])
