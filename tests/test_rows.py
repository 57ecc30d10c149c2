"""Tables of tasks, compared row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.physics.rows import over_rows, ranks


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 33, 175, 599, 600, 700])
def test_ranks_are_those_of_a_stable_sort(rows: int) -> None:
    """Of short tables, compared pair by pair, and of long ones, which are sorted; with ties and absent rows."""
    random = np.random.default_rng(rows)
    key = np.where(random.random((3, rows)) < 0.3, np.inf, random.integers(0, max(2, rows // 3), (3, rows)))
    expected = np.argsort(np.argsort(key, axis=1, kind="stable"), axis=1, kind="stable")
    found = jax.jit(jax.vmap(ranks))(jnp.asarray(key, jnp.float32))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows", [1, 5, 22, 23, 40])
def test_rows_are_combined_once_each_and_in_order(rows: int) -> None:
    """With numbers and columns of their own; whatever the number of rows, none is left out or taken twice."""
    values = jnp.asarray(np.random.default_rng(rows).random(rows), jnp.float32)

    def add(found: jax.Array, number: jax.Array, value: jax.Array, twice: jax.Array) -> jax.Array:
        return 0.5 * found + value + 0.0 * twice + number

    found = jax.jit(lambda column: over_rows(add, jnp.zeros(2), column, 2 * column))(values)
    expected = 0.0
    for number, value in enumerate(np.asarray(values)):
        expected = 0.5 * expected + value + number
    np.testing.assert_allclose(found, expected, rtol=1e-5)
