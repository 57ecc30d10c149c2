"""The gate: mixtures weigh what they say, every shot is judged by detectors that have not seen it, harm is refused."""

import numpy as np
import pytest

from gmel.synthesis.gate import SHARES, decide
from gmel.synthesis.photo import GOOD
from gmel.synthesis.rows import CLASSIC, NONE, Choice, Rows, joined, training_rows

TYPES = ("a", "b", "c")
PLACES = {GOOD: np.zeros(6), "a": np.eye(6)[0], "b": np.eye(6)[1], "c": np.eye(6)[2]}


def drawn(label: str, count: int, random: np.random.Generator, source: str = "", spread: float = 1.0) -> Rows:
    rows = 1.6 * PLACES[label] + spread * random.standard_normal((count, 6))
    return Rows.of(rows.astype(np.float32), [label] * count, [source] * count)


def plant(seed: int, shots: int = 5) -> tuple[Rows, Rows, Rows, np.random.Generator]:
    """Shots and good parts, their variants, judges."""
    random = np.random.default_rng(seed)
    own = [drawn(label, 1, random, f"{label}/{n}") for label in TYPES for n in range(shots)]
    good = drawn(GOOD, 40, random)
    varied = [
        Rows.of(
            shot.features + 0.1 * random.standard_normal((4, 6)).astype(np.float32),
            [shot.labels[0]] * 4,
            [shot.sources[0]] * 4,
        )
        for shot in own
    ]
    return joined(*own, good), joined(*varied, good), drawn(GOOD, 60, random), random


def test_weights_of_a_class_are_the_shares_asked() -> None:
    real, classic, _, random = plant(0)
    made = {"draw": joined(*(drawn(label, 30, random) for label in TYPES))}
    mixture = {GOOD: Choice(CLASSIC), "a": Choice(NONE), "b": Choice(CLASSIC), "c": Choice("draw", 0.2)}
    rows, synthetic, weights = training_rows(real, classic, made, mixture)
    for label in mixture:
        assert weights[rows.labels == label].sum() == pytest.approx(1.0)
    share = {label: weights[(rows.labels == label) & synthetic].sum() for label in mixture}
    assert share == pytest.approx({GOOD: 0.5, "a": 0.0, "b": 0.5, "c": 0.4 + 0.2})
    assert len(rows) == (40 + 40) + 5 + (5 + 20) + (5 + 20 + 30)


def test_a_mode_without_samples_of_a_class_leaves_it_classic() -> None:
    real, classic, _, random = plant(0)
    made = {"draw": drawn("a", 30, random)}
    both = [
        training_rows(real, classic, made, dict.fromkeys(PLACES, choice))[2].sum()
        for choice in (Choice("draw", 0.3), Choice(CLASSIC))
    ]
    assert both == pytest.approx([4.0, 4.0])


def test_each_shot_is_held_out_once_with_all_that_was_made_from_it() -> None:
    real, classic, judges, _ = plant(1)
    asked: list[frozenset[str]] = []

    def made(held: frozenset[str]) -> dict[str, Rows]:
        asked.append(held)
        return {}

    decide(real, classic, made, judges)
    folds = [held for held in asked if held]
    assert sorted(name for held in folds for name in held) == sorted(
        f"{label}/{n}" for label in TYPES for n in range(5)
    )
    assert all(len(held) == 3 for held in folds)


def test_help_is_taken() -> None:
    """Samples of the true law are worth more than the shots; with twelve of a class the gate can see it."""
    taken = {"detection": 0, "typing": 0}
    for seed in range(10):
        real, classic, judges, random = plant(seed, shots=12)
        true = {"draw": joined(*(drawn(label, 200, random) for label in TYPES), drawn(GOOD, 200, random))}
        decision = decide(real, classic, lambda held, true=true: true, judges)
        taken["detection"] += any(choice.mode == "draw" for choice in decision.detection.values())
        taken["typing"] += any(choice.mode == "draw" for choice in decision.typing.values())
    assert taken["typing"] >= 6
    assert sum(taken.values()) >= 11


def test_harm_is_refused() -> None:
    """Samples that bear the name of another type, and defects that are good parts."""
    used = 0
    for seed in range(10):
        real, classic, judges, random = plant(seed)
        wrong = [
            Rows(drawn(other, 60, random).features, np.array([label] * 60), np.array([""] * 60))
            for label, other in zip(TYPES, (GOOD, "c", "a"), strict=True)
        ]
        poison = {"draw": joined(*wrong)}
        decision = decide(real, classic, lambda held, poison=poison: poison, judges)
        used += sum(
            choice.mode == "draw" for mixture in (decision.detection, decision.typing) for choice in mixture.values()
        )
    assert used <= 4, "of 80 choices"


def test_what_changes_nothing_is_seldom_taken() -> None:
    """More of the classic variants: no information. Chance alone may move a choice now and then."""
    moved = 0
    for seed in range(20):
        real, classic, judges, random = plant(seed)
        again = Rows(
            classic.features + 0.1 * random.standard_normal(classic.features.shape).astype(np.float32),
            classic.labels,
            classic.sources,
        )
        decision = decide(
            real, classic, lambda held, again=again: {"again": again.without(held)}, judges, shares=(0.15,)
        )
        moved += any(choice.mode == "again" for choice in decision.typing.values())
    assert moved <= 8


def test_without_good_parts_types_alone_are_decided() -> None:
    real, classic, _, random = plant(3)
    bad = real.labels != GOOD
    varied = classic.where(classic.labels != GOOD)
    nobody = Rows(np.zeros((0, 6), np.float32), np.zeros(0, np.str_), np.zeros(0, np.str_))
    decision = decide(real.where(bad), varied, lambda held: {}, nobody)
    assert decision.heads.detection is None
    assert set(decision.evidence) == {"typing"}
    chance = decision.heads.probabilities(drawn("a", 50, random).features)
    assert chance.shape == (50, 3)
    np.testing.assert_allclose(chance.sum(axis=1), 1.0)


def test_one_type_is_found_and_needs_no_name() -> None:
    real, classic, judges, random = plant(4)
    keep = np.isin(real.labels, [GOOD, "a"])
    decision = decide(real.where(keep), classic.where(np.isin(classic.labels, [GOOD, "a"])), lambda held: {}, judges)
    assert decision.heads.typing is None
    chance = decision.heads.probabilities(drawn("a", 200, random).features)
    assert chance.shape == (200, 2)
    assert (chance[:, 1] > decision.heads.threshold).mean() > 0.2


def test_probabilities_are_calibrated_enough_to_be_read() -> None:
    """Of photos that are called a type with about 70 %, about 70 % are."""
    said: list[float] = []
    true: list[bool] = []
    for seed in range(12):
        real, classic, judges, random = plant(seed, shots=8)
        heads = decide(real, classic, lambda held: {}, judges, folds=8).heads
        for label in TYPES:
            chance = heads.types(drawn(label, 60, random).features)
            said += chance.max(axis=1).tolist()
            true += [TYPES[place] == label for place in chance.argmax(axis=1)]
    assert np.mean(said) == pytest.approx(np.mean(true), abs=0.08)


def test_shares_stay_below_what_has_harmed() -> None:
    assert max(SHARES) <= 0.35
