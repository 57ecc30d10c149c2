"""How long a gateway's decision takes: policies beside each other, by servers and tasks under way.

    python -m benchmarks.decisions

One thread decides one task after the other on a plant that stands still; nothing else is in the way. The learned policy
is an actor of the usual width with random weights, exported and run by onnxruntime as a gateway does.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gmel.edge.deciding import Decider
from gmel.edge.fleet import Beat, Fleet
from gmel.edge.plant import plant_of
from gmel.edge.task import Task
from gmel.scenario.load import load_scenario

POLICIES = ("earliest-finish", "power-of-two", "learned")
PLANTS = ((3, 1), (3, 16), (50, 4))
"""Servers, and tasks under way at each."""
_WARM_UP = 100


def write_actor(folder: Path) -> None:
    """Exports an actor with random weights as the policy `learned`."""
    import jax  # noqa: PLC0415

    from gmel.learning.export import export_policy  # noqa: PLC0415
    from gmel.learning.networks import Actor, Scale  # noqa: PLC0415

    actor = Actor(Scale(1.0, 1e6, 1.0), jax.random.key(0))
    export_policy(
        actor, folder / "learned", scenario_digest="none", scenario_name="none", training={"algorithm": "none"}
    )


def time_decisions(folder: Path, policy: str, servers: int, under_way: int, decisions: int) -> dict[str, float | str]:
    """Percentiles of the time of a decision, in microseconds."""
    plant = plant_of(load_scenario("live"))
    models = list(plant.models)
    fleet = Fleet(plant, lambda: 0.0)
    fleet.servers.clear()
    for number in range(servers):
        server = fleet.hear(f"server-{number}", Beat("http://127.0.0.1:1", speed=1.0 + number % 3), 0.0)
        for each in range(under_way):
            task = Task(id=f"{number}-{each}", device="camera", model=models[each % len(models)])
            server.send(fleet.expect(task, server), fleet.memory_of)
    decider = Decider(fleet, folder)
    decider.change(policy, 0.0)
    taken: list[float] = []
    for number in range(_WARM_UP + decisions):
        task = Task(id=f"new-{number}", device="camera", model=models[number % len(models)])
        began = time.perf_counter()
        decision = decider.decide(task, 0.0, 0.0)
        taken.append(time.perf_counter() - began)
        assert decision is not None
        assert decision.fallback is None, decision.fallback
    p50, p99 = np.quantile(1e6 * np.array(taken[_WARM_UP:]), [0.5, 0.99])
    return {"policy": policy, "servers": servers, "under_way": under_way, "p50_us": float(p50), "p99_us": float(p99)}


def time_all(decisions: int = 5000) -> list[dict[str, float | str]]:
    """Every policy on every plant."""
    with tempfile.TemporaryDirectory() as folder:
        write_actor(Path(folder))
        return [
            time_decisions(Path(folder), policy, servers, under_way, decisions)
            for servers, under_way in PLANTS
            for policy in POLICIES
        ]


def table_of(rows: list[dict[str, float | str]]) -> Table:
    """For people."""
    table = Table("servers", "tasks at each", "policy", "p50 us", "p99 us")
    for row in rows:
        times = (f"{row[key]:.0f}" for key in ("p50_us", "p99_us"))
        table.add_row(str(row["servers"]), str(row["under_way"]), str(row["policy"]), *times)
    return table


def main() -> int:
    """Measures and prints a table."""
    Console(width=120).print(table_of(time_all()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
