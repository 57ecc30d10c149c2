"""Who gets a task: the learned policy or a rule, which one is in charge, and what another one would have done.

A policy that fails, or whose observation does not fit, never stops a task: the plain rule (earliest expected end)
decides in its place and the reason is kept.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gmel.edge.fleet import Fleet, ServerState
from gmel.edge.observing import expected_s, observe
from gmel.edge.task import Task, check_name
from gmel.policies.exported import DESCRIPTION_FILE, ExportedPolicy, observation_schema
from gmel.scenario.errors import InputError

__all__ = ["RULES", "Decider", "Decision", "Shadow", "Version"]

FALLBACK = "earliest-finish"
_REASONS = 50
_TOLD = 8
"""Options of a decision that are told, the best ones."""


class Chooser(Protocol):
    """Scores the options of a task; the largest wins."""

    def scores(
        self, row: NDArray[np.float32], options: NDArray[np.float32], servers: Sequence[ServerState]
    ) -> list[float]:
        """Score of each server.

        Args:
            row: the task, [1, task features].
            options: [1, 1 + servers, option features].
            servers: the servers, in order.
        """
        ...


class EarliestFinish:
    """The server where the task is expected to end first."""

    def scores(
        self, row: NDArray[np.float32], options: NDArray[np.float32], servers: Sequence[ServerState]
    ) -> list[float]:
        del row, servers
        return [-float(value) for value in expected_s(options)[1:]]


class RoundRobin:
    """One server after the other."""

    def __init__(self, rng: np.random.Generator) -> None:
        del rng
        self._last = ""

    def scores(
        self, row: NDArray[np.float32], options: NDArray[np.float32], servers: Sequence[ServerState]
    ) -> list[float]:
        del row, options
        names = sorted(server.name for server in servers)
        after = [name for name in names if name > self._last]
        self._last = after[0] if after else names[0]
        return [1.0 if server.name == self._last else 0.0 for server in servers]


class LeastConnections:
    """The server with the fewest tasks; ties are drawn."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def scores(
        self, row: NDArray[np.float32], options: NDArray[np.float32], servers: Sequence[ServerState]
    ) -> list[float]:
        del row, options
        return [-len(server.flights) - 0.5 * float(self._rng.random()) for server in servers]


class PowerOfTwo:
    """Of two servers drawn the one with fewer tasks (Mitzenmacher 2001)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def scores(
        self, row: NDArray[np.float32], options: NDArray[np.float32], servers: Sequence[ServerState]
    ) -> list[float]:
        del row, options
        drawn = set(self._rng.permutation(len(servers))[:2].tolist())
        ties = self._rng.random(len(servers))
        return [
            -len(server.flights) - 0.5 * float(ties[place]) if place in drawn else -math.inf
            for place, server in enumerate(servers)
        ]


class Learned:
    """The exported actor: the best option by its logits. The count of the fleet keeps simultaneous tasks apart, so
    nothing has to be drawn."""

    def __init__(self, policy: ExportedPolicy) -> None:
        self._policy = policy

    def scores(
        self, row: NDArray[np.float32], options: NDArray[np.float32], servers: Sequence[ServerState]
    ) -> list[float]:
        mask = np.ones(options.shape[:2], np.bool_)
        mask[:, 0] = False  # the device has sent it away
        return [float(value) for value in self._policy.logits(row, options, mask)[0, 1:]]


RULES = ("earliest-finish", "least-connections", "power-of-two", "round-robin")


@dataclass(frozen=True)
class Version:
    """A policy that is or was in charge."""

    number: int
    name: str
    since_s: float
    chooser: Chooser

    def as_json(self) -> dict[str, Any]:
        return {"version": self.number, "name": self.name, "since_s": self.since_s}


@dataclass
class Shadow:
    """What another policy would have done.

    Attributes:
        name: of the policy.
        seen: decisions that it looked at.
        agreed: where it chose the same server.
        failed: where it could not choose.
        expected_s: sum over the decisions of the seconds expected at its choice, less those at the choice made.
    """

    name: str
    chooser: Chooser
    seen: int = 0
    agreed: int = 0
    failed: int = 0
    expected_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        mean = self.expected_s / (self.seen - self.failed) if self.seen > self.failed else None
        return {
            "name": self.name,
            "seen": self.seen,
            "agreed": self.agreed,
            "failed": self.failed,
            "mean_expected_difference_s": mean,
        }


@dataclass(frozen=True)
class Decision:
    """Where a task goes, and why."""

    server: ServerState
    policy: str
    version: int
    scores: dict[str, float]
    expected_s: float
    fallback: str | None
    backlog_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For those who watch; of many options the best ones."""
        best = self.scores if len(self.scores) <= _TOLD else dict(heapq.nlargest(_TOLD, self.scores.items(), _score))
        return {
            "server": self.server.name,
            "policy": self.policy,
            "version": self.version,
            "options": len(self.scores),
            "scores": best,
            "expected_s": self.expected_s,
            "fallback": self.fallback,
        }


@dataclass
class Decider:
    """The policy in charge, those before it, and one in the shadow.

    Attributes:
        fleet: the servers.
        folder: where policies lie that may be asked for by name; none for rules alone.
        seed: of the rules that draw.
    """

    fleet: Fleet
    folder: Path | None = None
    seed: int = 0
    history: list[Version] = field(default_factory=list[Version])
    shadow: Shadow | None = None
    reasons: deque[str] = field(default_factory=lambda: deque(maxlen=_REASONS))
    fallbacks: int = 0

    def __post_init__(self) -> None:
        self._rule = EarliestFinish()
        if not self.history:
            self.change(FALLBACK, 0.0)

    @property
    def current(self) -> Version:
        """The policy in charge."""
        return self.history[-1]

    def change(self, name: str, now_s: float) -> Version:
        """Puts a policy in charge.

        Raises:
            InputError: no such policy, or one that cannot decide here.
        """
        version = Version(1 + (self.history[-1].number if self.history else 0), name, now_s, self._chooser(name))
        self.history = [*self.history[-31:], version]
        return version

    def roll_back(self, now_s: float) -> Version:
        """Puts the policy in charge that was there before.

        Raises:
            InputError: there was none.
        """
        if len(self.history) < 2:
            raise InputError("policy: there was none before this one")
        before = self.history[-2]
        version = Version(self.current.number + 1, before.name, now_s, before.chooser)
        self.history = [*self.history[-31:], version]
        return version

    def watch(self, name: str | None) -> None:
        """Puts a policy in the shadow, or nobody.

        Raises:
            InputError: as for :meth:`change`.
        """
        self.shadow = None if name is None else Shadow(name, self._chooser(name))

    def decide(self, task: Task, now: float, waited_s: float, without: Sequence[str] = ()) -> Decision | None:
        """The server for a task, None where none may take it now. It does not count it there: the caller sends it.

        Args:
            task: the task.
            now: of the monotonic clock.
            waited_s: seconds since it was accepted.
            without: servers that have failed it.
        """
        servers = self.fleet.usable(task.model, now, without) or self.fleet.usable(task.model, now)
        if not servers:
            return None
        row, options = observe(task, servers, self.fleet, now, waited_s)
        current, reason = self.current, None
        try:
            scores = _finite(current.chooser.scores(row, options, servers), len(servers))
        except Exception as error:  # whatever a policy does, the task goes on
            reason = f"{current.name}: {type(error).__name__}: {error}"[:200]
            self.reasons.append(reason)
            self.fallbacks += 1
            scores = self._rule.scores(row, options, servers)
        best = int(np.argmax(scores))
        expected = expected_s(options)[1:]
        self._look_aside(row, options, servers, best, expected)
        return Decision(
            servers[best],
            current.name if reason is None else FALLBACK,
            current.number,
            {server.name: score for server, score in zip(servers, scores, strict=True) if math.isfinite(score)},
            float(expected[best]),
            reason,
        )

    def _look_aside(
        self,
        row: NDArray[np.float32],
        options: NDArray[np.float32],
        servers: Sequence[ServerState],
        best: int,
        expected: NDArray[np.float32],
    ) -> None:
        shadow = self.shadow
        if shadow is None:
            return
        shadow.seen += 1
        try:
            other = int(np.argmax(_finite(shadow.chooser.scores(row, options, servers), len(servers))))
        except Exception as error:  # it is only looked at
            shadow.failed += 1
            self.reasons.append(f"shadow {shadow.name}: {type(error).__name__}: {error}"[:200])
            return
        shadow.agreed += other == best
        shadow.expected_s += float(expected[other] - expected[best])

    def _chooser(self, name: str) -> Chooser:
        rng = np.random.default_rng(self.seed)
        rules: dict[str, Chooser] = {
            "earliest-finish": self._rule,
            "round-robin": RoundRobin(rng),
            "least-connections": LeastConnections(rng),
            "power-of-two": PowerOfTwo(rng),
        }
        if name in rules:
            return rules[name]
        check_name(name, "policy")
        known = ", ".join([*rules, *self.names()])
        if self.folder is None or not (self.folder / name / DESCRIPTION_FILE).is_file():
            raise InputError(f"policy {name!r}: must be one of {known}")
        policy = ExportedPolicy.load(self.folder / name)
        if policy.description.schema != observation_schema() or policy.description.levels != 1:
            raise InputError(
                f"policy {name!r}: looks at more than a live gateway knows (costs beside latency, shares, qualities or "
                "several ways to do a task); train it on a scenario without these"
            )
        return Learned(policy)

    def names(self) -> list[str]:
        """Learned policies that can be asked for."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(each.name for each in self.folder.iterdir() if (each / DESCRIPTION_FILE).is_file())


def _score(option: tuple[str, float]) -> float:
    return option[1]


def _finite(scores: list[float], servers: int) -> list[float]:
    if len(scores) != servers:
        raise ValueError(f"{len(scores)} scores for {servers} servers")
    if not any(math.isfinite(score) for score in scores) or any(math.isnan(score) for score in scores):
        raise ValueError("no finite scores")
    return scores
