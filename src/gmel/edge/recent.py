"""What happened lately at a gateway, for its page: a bounded memory that ends with the process.

The ledger holds what has to last (tasks, results, records). This is what an operator looks at: the last decisions with
their scores, what went wrong, which devices were heard, and latency over the last minutes. Every part has a fixed size
whatever the load is.
"""

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Interval", "Recent"]

EVERY_S = 10.0
"""Length of an interval of the latencies."""
_INTERVALS = 60
_DECISIONS = 500
_INCIDENTS = 100
_DEVICES = 256
_ALIKE = ("event", "server", "error")
_SHOWN = 40
"""Decisions that a state holds; others are found by the id of their task."""
_RATIO = math.log(1.1)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0)
"""Upper ends of the bars of latency as a share of the deadline; one more is above them all."""


@dataclass
class Interval:
    """The tasks that were done in one interval. Latencies are counted in bins 10 % wide, so that a percentile costs
    nothing to keep and is off by 5 % at most."""

    number: int
    tasks: int = 0
    late: int = 0
    latencies: Counter[int] = field(default_factory=Counter[int])
    shares: Counter[int] = field(default_factory=Counter[int])

    def note(self, latency_s: float, deadline_s: float) -> None:
        """Counts a task."""
        share = latency_s / deadline_s
        self.tasks += 1
        self.late += share > 1.0
        self.latencies[math.floor(math.log(max(latency_s, 1e-4)) / _RATIO)] += 1
        self.shares[sum(share > end for end in SHARES)] += 1

    def at(self, share: float) -> float:
        """The latency that a share of the tasks did not pass, in seconds."""
        left = share * self.tasks
        for place in sorted(self.latencies):
            left -= self.latencies[place]
            if left <= 0:
                return math.exp((place + 0.5) * _RATIO)
        return math.nan


class Recent:
    """See the module. It is told every event of a gateway."""

    def __init__(self) -> None:
        self.incidents: deque[dict[str, Any]] = deque(maxlen=_INCIDENTS)
        self.turned_away: Counter[str] = Counter()
        self._decisions: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._devices: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._intervals: deque[Interval] = deque(maxlen=_INTERVALS)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Keeps what is to be kept of an event; `at_s` is its wall clock."""
        kind = event["event"]
        if kind == "decided":
            self._keep(self._decisions, event["id"], dict(event), _DECISIONS)
            device = {"name": event["device"], "at_s": event["at_s"], "server": event["server"]}
            self._keep(self._devices, event["device"], device, _DEVICES)
        elif kind == "done":
            self._interval(event["at_s"]).note(event["latency_s"], event["deadline_s"])
        elif kind in ("retried", "failed", "expired", "cancelled", "server", "policy"):
            self._incident(event)

    def _incident(self, event: Mapping[str, Any]) -> None:
        """One line for what happens to many tasks at once: a server that dies must not push everything else out."""
        last = self.incidents[-1] if self.incidents else None
        if last is not None and "id" in event and all(last.get(key) == event.get(key) for key in _ALIKE):
            self.incidents[-1] = dict(event) | {"times": last["times"] + 1}
        else:
            self.incidents.append(dict(event) | {"times": 1})

    def decision(self, task_id: str) -> dict[str, Any] | None:
        """The last decision on a task; None where it is long ago."""
        return self._decisions.get(task_id)

    def as_json(self, now_s: float) -> dict[str, Any]:
        """Everything, the newest first.

        Args:
            now_s: of the wall clock.
        """
        newest = int(now_s // EVERY_S)
        kept = [each for each in self._intervals if newest - _INTERVALS < each.number <= newest]
        shares: Counter[int] = sum((each.shares for each in kept), Counter())
        return {
            "decisions": list(reversed(self._decisions.values()))[:_SHOWN],
            "incidents": list(reversed(self.incidents)),
            "devices": [
                {"name": each["name"], "server": each["server"], "seen_s": round(max(now_s - each["at_s"], 0.0), 1)}
                for each in reversed(self._devices.values())
            ],
            "turned_away": dict(self.turned_away),
            "intervals": {
                "every_s": EVERY_S,
                "count": _INTERVALS,
                "rows": [
                    {
                        "ago": newest - each.number,
                        "tasks": each.tasks,
                        "late": each.late,
                        "p50_s": round(each.at(0.5), 4),
                        "p95_s": round(each.at(0.95), 4),
                    }
                    for each in kept
                ],
                "share_ends": list(SHARES),
                "shares": [shares[place] for place in range(len(SHARES) + 1)],
            },
        }

    def _interval(self, at_s: float) -> Interval:
        number = int(at_s // EVERY_S)
        # A wall clock that was put back goes on in the interval where it was.
        if not self._intervals or self._intervals[-1].number < number:
            self._intervals.append(Interval(number))
        return self._intervals[-1]

    @staticmethod
    def _keep(where: OrderedDict[str, dict[str, Any]], key: str, what: dict[str, Any], most: int) -> None:
        where.pop(key, None)
        where[key] = what
        if len(where) > most:
            where.popitem(last=False)
