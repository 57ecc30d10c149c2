"""The policy as an order of replicas, for routers that others run: they say who is there, it says whom to try first.

What was sent is counted here, as in a gateway (`gmel.edge.fleet`), so that requests that come together see each other.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gmel.edge.deciding import Decider
from gmel.edge.fleet import Fleet, read_beat
from gmel.edge.plant import Plant
from gmel.edge.task import Task

__all__ = ["Ranking"]


class Ranking:
    """See the module.

    Args:
        plant: what models cost; its servers are not used, since replicas come and go under names of their own.
        policy: a rule, or the name of a folder in `policies`.
        policies: folder of exported policies.
        seed: of rules that draw.

    Raises:
        InputError: no such policy, or one that cannot decide here.
    """

    def __init__(
        self, plant: Plant, policy: str = "earliest-finish", policies: Path | None = None, seed: int = 0
    ) -> None:
        self.fleet = Fleet(replace(plant, servers={}))
        self._decider = Decider(self.fleet, policies, seed)
        self._decider.change(policy, time.time())

    def hear(self, replicas: Mapping[str, Mapping[str, Any]], now: float) -> None:
        """Takes what each replica says of itself, in the fields of a heartbeat; those that are not named have gone.

        One that says nothing of use yet counts with the numbers of a server of speed 1.

        Args:
            replicas: what they say, by name.
            now: of the monotonic clock.
        """
        for name in set(self.fleet.servers) - set(replicas):
            del self.fleet.servers[name]
        for name, said in replicas.items():
            self.fleet.hear(name, read_beat({**said, "url": None}), now)

    def rank(self, task: Task, now: float) -> list[str]:
        """Names of replicas that have the model of a task, the best one first; empty where none has it."""
        decision = self._decider.decide(task, now, 0.0)
        if decision is None:
            return []
        best = decision.server.name
        others = sorted(decision.scores, key=lambda name: -decision.scores[name])
        return [best, *(name for name in others if name != best)]

    def sent(self, name: str, task: Task) -> None:
        """Counts a task that goes to a replica."""
        server = self.fleet.servers.get(name)
        if server is not None:
            server.send(self.fleet.expect(task, server), self.fleet.memory_of)

    def ended(self, name: str, task_id: str) -> None:
        """It has come back, however it ended."""
        server = self.fleet.servers.get(name)
        if server is not None:
            server.flights.pop(task_id, None)
