"""Kills of servers and of the gateway, again and again, under load; and what that costs."""

import asyncio
import random
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.edge_processes import Client, Live, Toll, scenario, toll_of

__all__ = ["Chaos", "chaos"]

SPEEDS = {"line-a": 1.0, "line-b": 2.0, "line-c": 4.0, "line-d": 2.0, "line-e": 1.0}
FETCHES = "line-e"
"""The one that fetches its tasks."""


@dataclass
class Chaos:
    """What was done, and what came of it."""

    tasks: int
    server_kills: int = 0
    gateway_kills: int = 0
    stalls: int = 0
    left_s: list[float] = field(default_factory=list[float])
    """From the stop of a server to the moment when no task is at it or waits for it."""
    again_s: list[float] = field(default_factory=list[float])
    """From its going on to the next task that it has done."""
    seconds: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0
    most_s: float = 0.0
    toll: Toll | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def chaos(
    folder: Path, tasks: int, server_kills: int, gateway_kills: int, stalls: int, together: int = 64, seed: int = 0
) -> Chaos:
    """Runs a plant of five servers under load and breaks it.

    Args:
        folder: for everything.
        tasks: at least so many are accepted; more are sent until everything has been broken often enough.
        server_kills: how often a server is killed, at the least.
        gateway_kills: how often the gateway is.
        stalls: how often a server is stopped and goes on.
        together: tasks of clients at a time.
        seed: of the order.
    """
    rng = random.Random(seed)
    plant = scenario(folder / "plant.toml", SPEEDS)
    done = Chaos(tasks)
    with Live(folder, plant, options=("--most-open", "4000")) as live:
        live.start_gateway()
        for name in SPEEDS:
            live.begin_server(name, *(("--pull",) if name == FETCHES else ()))
        live.wait_alive(*SPEEDS)
        client = Client(live.url)
        began = time.monotonic()
        asyncio.run(_both(live, client, done, rng, (server_kills, gateway_kills, stalls), together))
        done.seconds = time.monotonic() - began
        assert live.gateway is not None
        live.gateway.send(signal.SIGTERM)
        assert live.gateway.popen.wait(30) == 0
        done.toll = toll_of(live, client)
    latencies = sorted(client.latency_s.values())
    done.p50_s, done.p99_s = (latencies[int(share * len(latencies))] for share in (0.5, 0.99))
    done.most_s = latencies[-1]
    return done


async def _both(
    live: Live, client: Client, done: Chaos, rng: random.Random, wanted: tuple[int, int, int], together: int
) -> None:
    broken = asyncio.create_task(asyncio.to_thread(_break, live, client, done, rng, wanted))
    sent = 0
    while True:
        more = [f"task-{number:06d}" for number in range(sent, sent + min(done.tasks, 1000))]
        sent += len(more)
        await client.run(more, together, most_s=600.0)
        if broken.done():
            await broken
            if sent >= done.tasks:
                return


def _break(live: Live, client: Client, done: Chaos, rng: random.Random, wanted: tuple[int, int, int]) -> None:
    plan = ["server"] * wanted[0] + ["gateway"] * wanted[1] + ["stall"] * wanted[2]
    rng.shuffle(plan)
    for number, what in enumerate(plan):
        # Spread over the whole run, however fast it goes.
        until = time.monotonic() + 60.0
        while len(client.ended) < done.tasks * number / (len(plan) + 1) and time.monotonic() < until:
            time.sleep(0.05)
        if what == "gateway":
            assert live.gateway is not None
            live.gateway.kill()
            live.start_gateway()
            live.wait_alive(*SPEEDS)
            done.gateway_kills += 1
        elif what == "server":
            name = rng.choice(list(SPEEDS))
            live.servers[name].kill()
            done.server_kills += 1
            time.sleep(rng.uniform(0.0, 1.0))
            live.start_servers(name)
        else:
            name = _busiest(live)
            live.servers[name].send(signal.SIGSTOP)
            done.left_s.append(live.wait(lambda: live.server(name)["tasks"] == 0, f"{name} left"))  # noqa: B023
            time.sleep(1.0)
            before = live.server(name)["done"]
            live.servers[name].send(signal.SIGCONT)
            done.again_s.append(live.wait(lambda: live.server(name)["done"] > before, f"{name} used again"))  # noqa: B023
            done.stalls += 1


def _busiest(live: Live) -> str:
    """The server with the most tasks, as soon as one has some."""
    found: list[str] = []

    def look() -> bool:
        servers = live.get("/v1/servers")["servers"]
        busiest = max(servers, key=lambda server: server["tasks"])
        found.append(busiest["name"])
        return busiest["tasks"] > 0 and busiest["usable"]

    live.wait(look, "a server with tasks")
    return found[-1]
