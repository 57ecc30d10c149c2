"""Averages of updates: laws that hold for any updates, and what is refused."""

import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from gmel.federation.average import RULES, Rule, Update, aggregate
from gmel.scenario.errors import InputError

FLOATS = st.floats(-1e3, 1e3, width=32)
REFERENCE = {"bias": np.zeros(2, np.float32), "weights": np.zeros((2, 3), np.float32)}
TREES = st.fixed_dictionaries(
    {"bias": arrays(np.float32, (2,), elements=FLOATS), "weights": arrays(np.float32, (2, 3), elements=FLOATS)}
)


def updates_of(trees: list[Any], weights: list[float] | None = None) -> list[Update]:
    given_weights = weights or [1.0] * len(trees)
    return [Update(f"s{n:02d}", 4, w, tree) for n, (tree, w) in enumerate(zip(trees, given_weights, strict=True))]


def leaves(tree: Any) -> np.ndarray:
    return np.concatenate([tree["bias"].ravel(), tree["weights"].ravel()])


@given(
    st.lists(st.tuples(TREES, st.floats(0.1, 10.0)), min_size=3, max_size=7),
    st.sampled_from(RULES),
    st.randoms(use_true_random=False),
)
def test_order_changes_nothing_to_the_last_bit(given_updates: list[Any], name: str, random: Any) -> None:
    trees, weights = [tree for tree, _ in given_updates], [weight for _, weight in given_updates]
    updates = updates_of(trees, weights)
    shuffled = list(updates)
    random.shuffle(shuffled)
    first = aggregate(updates, REFERENCE, 4, Rule(name))
    second = aggregate(shuffled, REFERENCE, 4, Rule(name))
    assert np.array_equal(leaves(first.tree), leaves(second.tree))
    assert first.used == second.used


@given(st.lists(st.tuples(TREES, st.floats(0.1, 10.0)), min_size=1, max_size=6))
def test_the_mean_is_by_weight(given_updates: list[Any]) -> None:
    trees, weights = [tree for tree, _ in given_updates], [weight for _, weight in given_updates]
    found = leaves(aggregate(updates_of(trees, weights), REFERENCE, 4).tree)
    expected = np.average([leaves(tree).astype(np.float64) for tree in trees], axis=0, weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


@given(st.lists(TREES, min_size=1, max_size=6))
def test_nothing_trimmed_and_nothing_clipped_is_the_mean(trees: list[Any]) -> None:
    mean = leaves(aggregate(updates_of(trees), REFERENCE, 4).tree)
    for rule in (Rule("trimmed", trim=0), Rule("clipped", bound=1e9)):
        np.testing.assert_allclose(leaves(aggregate(updates_of(trees), REFERENCE, 4, rule).tree), mean, atol=1e-3)


@given(
    st.lists(TREES, min_size=3, max_size=6),
    st.lists(arrays(np.float32, (8,), elements=st.floats(-(2.0**100), 2.0**100, width=32)), min_size=1, max_size=2),
)
def test_lies_do_not_lead_out_of_the_range_of_the_honest(honest: list[Any], lies: list[np.ndarray]) -> None:
    """With at most `trim` liars the trimmed mean, and with a minority the median, stay among the honest values."""
    liars = [{"bias": lie[:2], "weights": lie[2:].reshape(2, 3)} for lie in lies]
    values = np.stack([leaves(tree) for tree in honest])
    low, high = values.min(axis=0), values.max(axis=0)
    slack = 1e-3
    for rule in (Rule("trimmed", trim=len(lies)), Rule("median")):
        found = leaves(aggregate(updates_of([*liars, *honest]), REFERENCE, 4, rule).tree)
        assert np.all(found >= low - slack)
        assert np.all(found <= high + slack)


@given(TREES, st.floats(0.01, 100.0))
def test_clipping_bounds_the_way_of_the_average(tree: Any, bound: float) -> None:
    scaled = {key: 1e6 * value for key, value in tree.items()}
    found = leaves(aggregate(updates_of([tree, scaled]), REFERENCE, 4, Rule("clipped", bound=bound)).tree)
    assert np.linalg.norm(found) <= bound * (1 + 1e-5)


def ones(**changed: Any) -> dict[str, Any]:
    return {"bias": np.ones(2, np.float32), "weights": np.ones((2, 3), np.float32), **changed}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Update("bad", 3, 1.0, ones()), "for round 3, now is round 4"),
        (Update("bad", 4, float("nan"), ones()), "weight nan"),
        (Update("bad", 4, 0.0, ones()), r"weight 0\.0"),
        (Update("bad", 4, 1.0, {"bias": np.ones(2, np.float32)}), "another structure"),
        (Update("bad", 4, 1.0, ones(bias=np.ones(3, np.float32))), r"array 1 of shape \(3,\), must be \(2,\)"),
        (Update("bad", 4, 1.0, ones(weights=np.ones((2, 3)))), "array 2 of type float64, must be float32"),
        (Update("bad", 4, 1.0, ones(bias=np.asarray([1.0, np.nan], np.float32))), "not finite"),
        (Update("bad", 4, 1.0, ones(bias=np.asarray([1.0, np.inf], np.float32))), "not finite"),
        (Update("good", 4, 1.0, ones(bias=np.zeros(2, np.float32))), "a second update"),
    ],
)
@pytest.mark.parametrize("name", RULES)
def test_unusable_updates_are_refused_and_change_nothing(bad: Update, reason: str, name: str) -> None:
    good = Update("good", 4, 2.0, ones())
    more = [Update("third", 4, 1.0, ones()), Update("fourth", 4, 1.0, ones())]
    average = aggregate([good, bad, *more], REFERENCE, 4, Rule(name))
    assert average.used == ("fourth", "good", "third")
    assert [refusal.site for refusal in average.refusals] == [bad.site]
    assert re.search(reason, average.refusals[0].reason)
    np.testing.assert_array_equal(average.tree["bias"], np.ones(2, np.float32))


def test_too_few_to_trim_and_wrong_rules() -> None:
    with pytest.raises(InputError, match="trim: 1 at either end of 2 updates"):
        aggregate(updates_of([ones(), ones()]), REFERENCE, 4, Rule("trimmed"))
    with pytest.raises(InputError, match="no update can be used"):
        aggregate([], REFERENCE, 4)
    wrong: list[dict[str, Any]] = [{"name": "krum"}, {"trim": -1}, {"bound": 0.0}]
    for kind in wrong:
        with pytest.raises(InputError, match=r"^(rule|trim|bound): "):
            Rule(**kind)
