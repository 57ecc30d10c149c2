"""What is counted of a gateway, for Prometheus and for its own page."""

from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]

_KEPT = 2000
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_DECIDING = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)


class Metrics:
    """Counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gmel_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"gmel_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gmel_{name}", text, registry=self.registry, buckets=buckets)

        self.accepted = counter("tasks_accepted", "Tasks that were accepted.")
        self.turned_away = counter("tasks_turned_away", "Tasks that were not accepted.", "reason")
        self.ended = counter("tasks_ended", "Tasks that have ended.", "state")
        self.decisions = counter("decisions", "Decisions.", "server", "policy")
        self.retries = counter("retries", "Attempts that did not bring a result.", "server", "reason")
        self.duplicates = counter("duplicate_results", "Results that came after the one that counts.")
        self.disk_errors = counter("disk_errors", "Writes that the disk did not take.")
        self.latency_s = histogram("latency_seconds", "Acceptance to result.", _SECONDS)
        self.decision_s = histogram("decision_seconds", "Time of a decision.", _DECIDING)
        self.waiting = gauge("tasks_open", "Tasks without an end.")
        self.parked = gauge("tasks_parked", "Tasks that no server can take.")
        self.alive = gauge("server_alive", "Whether a server is heard and takes tasks.", "server")
        self.backlog = gauge("server_backlog_seconds", "Seconds until a server is free.", "server")
        self.pace = gauge("server_pace", "Measured over expected seconds of service.", "server")
        self.fallbacks = gauge("policy_fallbacks", "Decisions that the plain rule took in place of the policy.")
        self.version = gauge("policy_version", "Number of the policy in charge.")
        self._latencies: deque[tuple[float, bool]] = deque(maxlen=_KEPT)

    def note_latency(self, latency_s: float, in_time: bool) -> None:
        """Keeps the last few latencies for the page of the gateway."""
        self._latencies.append((latency_s, in_time))

    def recent(self) -> dict[str, float | int | None]:
        """Percentiles of the last tasks in seconds, and the share in time."""
        count = len(self._latencies)
        if not count:
            return {"tasks": 0, "p50_s": None, "p95_s": None, "p99_s": None, "in_time": None}
        values = sorted(latency for latency, _ in self._latencies)

        def at(share: float) -> float:
            return values[min(int(share * count), count - 1)]

        in_time = sum(fits for _, fits in self._latencies) / count
        return {"tasks": count, "p50_s": at(0.5), "p95_s": at(0.95), "p99_s": at(0.99), "in_time": in_time}
