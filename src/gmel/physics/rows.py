"""Tables of tasks, compared row by row: what comes before a row, and in which order rows are served.

A table of all pairs of rows, reduced, says the same at two to three times the cost: it is written and read again. Here
a few rows at a time are one loop of the compiled program, and no table is kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

__all__ = ["not_later", "over_rows", "ranks"]

# Rows that are combined in one step. Not all of them at once: what follows would then compute them anew for each of its
# results, because the compiler takes a chain of simple operations for cheap.
_ROWS_A_STEP = 11
# From about this length on sorting costs less than comparing all pairs (reckoned from 175 rows, where it costs three
# times as much).
_LONG = 600


def over_rows(
    combine: Callable[..., Shaped[Array, "*shape"]], first: Shaped[Array, "*shape"], *columns: Shaped[Array, "rows"]
) -> Shaped[Array, "*shape"]:
    """`first`, combined with one row of the columns after the other: `combine(so far, number of the row, *row)`."""
    rows = columns[0].shape[0]
    steps = max(2, -(-rows // _ROWS_A_STEP))
    each = -(-rows // steps)
    beyond = steps * each - rows
    padded = [jnp.pad(column, (0, beyond)) if beyond else column for column in columns]

    def step(number: Int[Array, ""], found: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        some = [jax.lax.dynamic_slice_in_dim(column, number * each, each) for column in padded]
        for offset in range(each):
            row = number * each + offset
            further = combine(found, row, *(jax.lax.index_in_dim(column, offset, keepdims=False) for column in some))
            # The last step may go past the end.
            found = jnp.where(row < rows, further, found) if beyond else further
        return found

    return jax.lax.fori_loop(0, steps, step, first)


def not_later(key: Float[Array, ""], number: Int[Array, ""], than: Float[Array, "rows"]) -> Bool[Array, "rows"]:
    """Before which rows of the keys `than` the row of this key and number comes, itself among them: those of a greater
    key, and of an equal one those below it."""
    return (key < than) | ((key == than) & (number <= jnp.arange(than.shape[0])))


def ranks(key: Float[Array, "rows"]) -> Int[Array, "rows"]:
    """Place of each row in the order of the keys, from 0 on; ties by number (a stable sort)."""
    rows = key.shape[0]
    if rows >= _LONG:
        order = jnp.argsort(key, stable=True)
        return jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)

    def count(before: Int[Array, "rows"], number: Int[Array, ""], of_row: Float[Array, ""]) -> Int[Array, "rows"]:
        return before + not_later(of_row, number, key).astype(jnp.int32)

    return over_rows(count, jnp.full(rows, -1, jnp.int32), key)
