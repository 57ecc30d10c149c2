"""Averages of what sites send: weighted, or robust against sites that send garbage or lies.

An update is a pytree of arrays (weights of a detector or a generator). What can be seen to be unusable is refused with
the reason; what looks usable but is wrong is bounded by the rule: trimmed mean, median or clipping.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from gmel.scenario.errors import InputError

__all__ = ["RULES", "Average", "Refusal", "Rule", "Update", "admit", "aggregate"]

Tree = Any
"""A pytree of NumPy arrays."""

RULES = ("mean", "trimmed", "median", "clipped")


@dataclass(frozen=True, eq=False)
class Update:
    """What a site sends in a round.

    Attributes:
        site: who.
        round: for which round it was computed.
        weight: how much it counts in a weighted average, for instance the number of photos; positive.
        tree: the values, a pytree of arrays.
    """

    site: str
    round: int
    weight: float
    tree: Tree


@dataclass(frozen=True)
class Refusal:
    """An update that was not used, and why."""

    site: str
    round: int
    reason: str


@dataclass(frozen=True)
class Rule:
    """How updates become one.

    Attributes:
        name: `mean` (by weight); `trimmed`: of each coordinate the `trim` least and greatest values are left out;
            `median` of each coordinate; `clipped`: the mean by weight of changes cut to the norm `bound`.
        trim: values left out at either end; bears as many sites that lie.
        bound: greatest norm of a change from the reference, over all arrays together.

    Source: Yin et al. 2018 (arXiv 1803.01498) for the median and the trimmed mean; Sun et al. 2019 (arXiv 1911.07963)
    for clipping.
    """

    name: str = "mean"
    trim: int = 1
    bound: float = 10.0

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise InputError(f"rule: {self.name!r}, must be one of {', '.join(RULES)}")
        if self.trim < 0:
            raise InputError(f"trim: {self.trim}, must not be negative")
        if not 0 < self.bound < float("inf"):
            raise InputError(f"bound: {self.bound}, must be positive and finite")


@dataclass(frozen=True, eq=False)
class Average:
    """One round's outcome.

    Attributes:
        tree: the average, in the types of the reference.
        used: sites whose updates are in it, by name.
        refusals: the others.
    """

    tree: Tree
    used: tuple[str, ...]
    refusals: tuple[Refusal, ...]


def admit(updates: Sequence[Update], reference: Tree, round_number: int) -> tuple[list[Update], list[Refusal]]:
    """Tells updates that can be used from those that cannot.

    Refused are another round, another structure, shapes or types unlike the reference, values that are not finite, a
    weight that is not positive and finite, and further updates of a site.

    Returns:
        Usable updates by name of their site, whatever their order was; refusals in the order of the updates.
    """
    usable: dict[str, Update] = {}
    refusals: list[Refusal] = []
    for update in updates:
        reason = _fault(update, reference, round_number)
        if not reason and update.site in usable:
            reason = "a second update in one round"
        if reason:
            refusals.append(Refusal(update.site, update.round, reason))
        else:
            usable[update.site] = update
    return [usable[name] for name in sorted(usable)], refusals


def aggregate(updates: Sequence[Update], reference: Tree, round_number: int, rule: Rule | None = None) -> Average:
    """The average of the usable updates. It does not depend on their order, to the last bit.

    Args:
        updates: of the sites.
        reference: what the sites started from in this round, a pytree of arrays.
        round_number: the round.
        rule: how they become one; by weight where it is left out.

    Raises:
        InputError: no update can be used, or too few for the trimming.
    """
    chosen = Rule() if rule is None else rule
    usable, refusals = admit(updates, reference, round_number)
    if not usable:
        reasons = "; ".join(f"{refusal.site}: {refusal.reason}" for refusal in refusals) or "none came"
        raise InputError(f"round {round_number}: no update can be used ({reasons})")
    if chosen.name == "trimmed" and len(usable) <= 2 * chosen.trim:
        raise InputError(f"trim: {chosen.trim} at either end of {len(usable)} updates leaves none; trim fewer")
    trees = [update.tree for update in usable]
    weights = np.asarray([update.weight for update in usable], np.float64)
    # Divided by the greatest first: the sum of finite weights may be infinite.
    weights = weights / weights.max()
    weights = weights / weights.sum()
    if chosen.name == "clipped":
        trees = [_clipped(tree, reference, chosen.bound) for tree in trees]
    combine = _combination(chosen, weights)

    def joined(start: NDArray[Any], *values: NDArray[Any]) -> NDArray[Any]:
        stacked = np.stack([np.asarray(value, np.float64) for value in values])
        return np.asarray(combine(stacked)).astype(np.asarray(start).dtype)

    tree = jax.tree.map(joined, reference, *trees)
    return Average(tree, tuple(update.site for update in usable), tuple(refusals))


def _combination(rule: Rule, weights: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """From [updates, ...] to [...]."""
    if rule.name == "median":
        return lambda stacked: np.median(stacked, axis=0)
    if rule.name == "trimmed":
        return lambda stacked: np.sort(stacked, axis=0)[rule.trim : stacked.shape[0] - rule.trim].mean(axis=0)
    return lambda stacked: np.tensordot(weights, stacked, axes=1)


def _clipped(tree: Tree, reference: Tree, bound: float) -> Tree:
    change = jax.tree.map(lambda value, start: np.asarray(value, np.float64) - start, tree, reference)
    norm = float(np.sqrt(sum(float(np.sum(np.square(part))) for part in jax.tree.leaves(change))))
    factor = min(1.0, bound / norm) if norm > 0 else 1.0
    return jax.tree.map(lambda part, start: start + factor * part, change, reference)


def _fault(update: Update, reference: Tree, round_number: int) -> str:
    """Why an update cannot be used; empty where it can."""
    if update.round != round_number:
        return f"for round {update.round}, now is round {round_number}"
    if not 0 < update.weight < float("inf"):
        return f"weight {update.weight}, must be positive and finite"
    if jax.tree.structure(update.tree) != jax.tree.structure(reference):
        return "another structure than was sent out"
    pairs = zip(jax.tree.leaves(update.tree), jax.tree.leaves(reference), strict=True)
    faults = (_fault_of_array(np.asarray(value), np.asarray(start)) for value, start in pairs)
    return next((f"array {place} {fault}" for place, fault in enumerate(faults, start=1) if fault), "")


def _fault_of_array(value: NDArray[Any], start: NDArray[Any]) -> str:
    if value.shape != start.shape:
        return f"of shape {value.shape}, must be {start.shape}"
    if value.dtype != start.dtype:
        return f"of type {value.dtype}, must be {start.dtype}"
    return "" if np.isfinite(value).all() else "has values that are not finite"
