"""The ladder that every claim is measured on: L0 to L5, and the rules of thumb that prove nothing when beaten.

Source: reference ladder 4.3. L2 and L3 are tuned on traffic of their own (see `tuning.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from gmel.evaluation.episodes import AnyPolicy
from gmel.evaluation.tuning import Tuned
from gmel.policies.central import BestResponse, Coordinated, EarliestFinish, SlotOptimum
from gmel.policies.rules import (
    AllLocal,
    Greedy,
    LeastExpectedDelay,
    Nearest,
    Proportional,
    Softmax,
    Softmax7,
    UniformRandom,
)

__all__ = ["RULES", "TUNED_RULES", "Entry", "information_of", "ladder"]


@dataclass(frozen=True)
class Entry:
    """A policy with its name, its label in tables, and its rung (None: beside the ladder)."""

    name: str
    label: str
    rung: str | None
    policy: AnyPolicy
    trained: bool = False


_Make = Callable[[Tuned], AnyPolicy]

RULES: dict[str, tuple[str, _Make]] = {
    "all-local": ("all local", lambda _: AllLocal()),
    "uniform": ("uniform random", lambda _: UniformRandom()),
    "nearest": ("fastest upload", lambda _: Nearest()),
    "proportional": ("random proportional", lambda _: Proportional()),
    "greedy": ("greedy", lambda _: Greedy()),
    "led2": ("LED(2)", lambda _: LeastExpectedDelay()),
    "softmax": ("softmax, tuned", lambda tuned: Softmax(jnp.asarray(tuned.temperature_s))),
    "softmax7": ("7-parameter softmax, tuned", lambda tuned: Softmax7(jnp.asarray(tuned.theta))),
    "eft": ("sequential earliest finish", lambda _: EarliestFinish()),
    "coordinated": ("coordinated in slot", lambda _: Coordinated(mode="communicating")),
    "nash": ("best response (Nash)", lambda _: BestResponse()),
    "optimum": ("per-slot optimum", lambda _: SlotOptimum()),
}
"""Policies that need no training: name, label, how it is made of the tuned parameters."""

TUNED_RULES = ("softmax", "softmax7")
"""Those that look at the tuned parameters."""

_RUNGS = {
    "proportional": "L0",
    "greedy": None,
    "led2": "L1",
    "softmax": "L2",
    "softmax7": "L3",
    "eft": "L4",
    "coordinated": "L4",
    "nash": "L4",
    "optimum": "L5",
}


def ladder(tuned: Tuned) -> list[Entry]:
    """The reference policies in the order of the ladder."""
    return [Entry(name, RULES[name][0], rung, RULES[name][1](tuned)) for name, rung in _RUNGS.items()]


def information_of(policy: AnyPolicy) -> str:
    """What a policy knows when it decides, in words for the table."""
    if policy.mode == "central":
        return "everything"
    if isinstance(policy, Proportional):
        return "none"
    known = "own, fresh broadcast" if getattr(policy, "fresh", False) else "own, stale broadcast"
    return "in-slot messages" if policy.mode == "communicating" else known
