"""The ladder that every claim is measured on: L0 to L5, and the rules of thumb that prove nothing when beaten.

Source: reference ladder 4.3. L2 and L3 are tuned on traffic of their own (see `tuning.py`).
"""

from dataclasses import dataclass

import jax.numpy as jnp

from gmel.evaluation.episodes import AnyPolicy
from gmel.evaluation.tuning import Tuned
from gmel.policies.central import BestResponse, Coordinated, EarliestFinish, SlotOptimum
from gmel.policies.rules import (
    Greedy,
    LeastExpectedDelay,
    Proportional,
    Softmax,
    Softmax7,
)

__all__ = ["Entry", "information_of", "ladder"]


@dataclass(frozen=True)
class Entry:
    """A policy with its name, its label in tables, and its rung (None: beside the ladder)."""

    name: str
    label: str
    rung: str | None
    policy: AnyPolicy
    trained: bool = False


def ladder(tuned: Tuned) -> list[Entry]:
    """The reference policies in the order of the ladder."""
    return [
        Entry("proportional", "random proportional", "L0", Proportional()),
        Entry("greedy", "greedy", None, Greedy()),
        Entry("led2", "LED(2)", "L1", LeastExpectedDelay()),
        Entry("softmax", "softmax, tuned", "L2", Softmax(jnp.asarray(tuned.temperature_s))),
        Entry("softmax7", "7-parameter softmax, tuned", "L3", Softmax7(jnp.asarray(tuned.theta))),
        Entry("eft", "sequential earliest finish", "L4", EarliestFinish()),
        Entry("coordinated", "coordinated in slot", "L4", Coordinated(mode="communicating")),
        Entry("nash", "best response (Nash)", "L4", BestResponse()),
        Entry("optimum", "per-slot optimum", "L5", SlotOptimum()),
    ]


def information_of(policy: AnyPolicy) -> str:
    """What a policy knows when it decides, in words for the table."""
    if policy.mode == "central":
        return "everything"
    if isinstance(policy, Proportional):
        return "none"
    known = "own, fresh broadcast" if getattr(policy, "fresh", False) else "own, stale broadcast"
    return "in-slot messages" if policy.mode == "communicating" else known
