"""What the gateway costs: tasks that take no time, from acceptance to result, beside a proxy that keeps nothing.

    python -m benchmarks.edge [--tasks N] [--out FILE]

One run on this machine, all processes on loopback: the gateway with its ledger (every acceptance and every result on
disk) and three edge servers that sleep for no time; a bare FastAPI proxy that hands each request to one of the same
three servers; and, where `ray[serve]` is installed, the HTTP proxy of Ray Serve before three replicas, and its handle,
which is called from Python without HTTP. One request a task, answered with its end; the same client for all but the
handle. Ratios are to the proxy of Ray Serve where it is there, else to the bare proxy. The time of a decision alone is
that of `benchmarks.decisions`.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.decisions import table_of, time_all
from gmel.edge.processes import Processes
from gmel.scenario.files import replace_file
from gmel.scenario.load import load_scenario, to_toml

CLIENTS = (1, 8, 32)
_SERVERS = ("line-a", "line-b", "line-c")


Row = dict[str, float]


async def measure(send: Callable[[], Awaitable[None]], clients: int, tasks: int) -> Row:
    """Tasks per second and latencies in ms of so many clients, each with one request at a time."""
    latencies: list[float] = []
    left = iter(range(tasks))

    async def one() -> None:
        for _ in left:
            began = time.perf_counter()
            await send()
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    wall_s = time.perf_counter() - began
    p50, p99 = np.quantile(latencies, [0.5, 0.99])
    return {"clients": clients, "per_s": tasks / wall_s, "p50_ms": 1000 * float(p50), "p99_ms": 1000 * float(p99)}


async def measure_http(url: str, path: str, clients: int, tasks: int) -> Row:
    """The same, by HTTP."""
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client:

        async def send() -> None:
            async with client.post(path, json=new_task()) as answer:
                answer.raise_for_status()
                said = await answer.json()
            assert said["state"] == "done", said

        return await measure(send, clients, tasks)


def new_task() -> dict[str, str]:
    """What a client asks for."""
    return {"id": uuid.uuid4().hex, "device": "bench", "model": "compose"}


def each_load(tasks: int) -> list[tuple[int, int]]:
    """Clients and tasks of each measurement, after those of a warm-up."""
    return [(4, 40), *((clients, max(tasks * min(clients, 8) // 8, 50)) for clients in CLIENTS)]


def series(url: str, path: str, tasks: int) -> list[Row]:
    """All numbers of clients, after a warm-up."""
    return [asyncio.run(measure_http(url, path, *load)) for load in each_load(tasks)][1:]


def proxy(servers: list[str]) -> Any:
    """The bare proxy: it keeps nothing, and asks the servers in turn."""
    from fastapi import FastAPI, Request  # noqa: PLC0415

    turn = itertools.cycle(servers)
    clients: list[aiohttp.ClientSession] = []

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            clients.append(client)
            yield

    app = FastAPI(lifespan=life)

    @app.post("/run")
    async def run(request: Request) -> dict[str, str]:
        body = {"task": await request.json(), "attempt": 1}
        async with clients[0].post(f"{next(turn)}/v1/run", json=body) as answer:
            content = await answer.read()
        last = [line for line in content.split(b"\n") if line.startswith(b"{")][-1]
        return {"state": json.loads(last)["event"]}

    return app


def serve_proxy(servers: list[str]) -> None:
    """Runs the bare proxy in this process and prints its address."""
    from gmel.edge.serving import Place, listen, run, serve  # noqa: PLC0415

    door = listen(Place())
    address = f"http://127.0.0.1:{door.getsockname()[1]}"
    run(serve(proxy(servers), door, Place(), lambda: print(f"proxy at {address}", flush=True)))


def serve_ray(tasks: int) -> None:
    """Runs three replicas, measures the handle, then prints the address of the HTTP proxy and stays."""
    from ray import serve  # noqa: PLC0415

    @serve.deployment(num_replicas=3, ray_actor_options={"num_cpus": 0.1})
    class Replica:
        async def __call__(self, request: Any) -> dict[str, str]:
            if not isinstance(request, dict):
                await request.json()
            return {"state": "done"}

    serve.start(http_options={"host": "127.0.0.1", "port": 8499})
    handle: Any = serve.run(Replica.bind(), route_prefix="/run")

    async def by_handle() -> list[Row]:
        async def send() -> None:
            said = await handle.remote(new_task())
            assert said["state"] == "done", said

        return [await measure(send, *load) for load in each_load(tasks)][1:]

    print(f"handle: {json.dumps(asyncio.run(by_handle()))}", flush=True)
    print("ray serve at http://127.0.0.1:8499", flush=True)
    time.sleep(1e6)


def child(*words: str) -> tuple["subprocess.Popen[str]", str, list[str]]:
    """This file in a process of its own, its address, and what it said before."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.edge", *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    before: list[str] = []
    for line in process.stdout:
        if " at http" in line:
            return process, line.rsplit(" at ", 1)[1].strip(), before
        before.append(line)
    raise RuntimeError(f"{words[0]}: ended without an address")


def run_all(tasks: int, note: Any) -> dict[str, Any]:
    """Everything, one after the other."""
    note("decisions alone")
    found: dict[str, Any] = {"decisions": time_all()}
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
        scenario = load_scenario("live")
        model = scenario.models[0].model_copy(update={"fixed_work": 1e-6, "load_scale": 1e-3})
        plant = Path(folder) / "plant.toml"
        plant.write_text(to_toml(scenario.model_copy(update={"models": [model]})))
        processes.start("gateway", "gateway", str(plant), "--folder", f"{folder}/gateway", "--port", "0")
        gateway = processes.address("gateway")
        for name in _SERVERS:
            processes.start(name, "server", name, "--gateway", gateway)
        servers = [processes.address(name) for name in _SERVERS]
        while sum(each["alive"] for each in httpx.get(f"{gateway}/v1/servers").json()["servers"]) < len(_SERVERS):
            time.sleep(0.1)
        found["memory_mb"] = {name: processes.memory_mb(name) for name in processes.running}
        note("gateway, durable")
        found["gateway, durable"] = series(gateway, "/v1/tasks?wait_s=30", tasks)
        text = httpx.get(f"{gateway}/metrics").text
        before_s = processor_s(processes.running["gateway"].pid)
        asyncio.run(measure_http(gateway, "/v1/tasks?wait_s=30", 8, tasks))
        found["gateway_ms_per_task"] = 1000 * (processor_s(processes.running["gateway"].pid) - before_s) / tasks
        found["decision_p99_us_at_most"] = 1e6 * bucket(text, "gmel_decision_seconds", 0.99)
        note("bare FastAPI proxy, keeps nothing")
        process, address, _ = child("--proxy", *servers)
        try:
            found["bare FastAPI proxy"] = series(address, "/run", tasks)
        finally:
            process.terminate()
            process.wait()
    if importlib.util.find_spec("ray") is not None:
        note("Ray Serve, handle and HTTP proxy, keeps nothing")
        process, address, before = child("--ray", "--tasks", str(tasks))
        try:
            said = next(line for line in before if line.startswith("handle: "))
            found["Ray Serve handle"] = json.loads(said.removeprefix("handle: "))
            found["Ray Serve HTTP proxy"] = series(address, "/run", tasks)
        finally:
            process.terminate()
            process.wait()
    return found


def processor_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bucket(text: str, name: str, share: float) -> float:
    """Upper edge of the histogram bucket in which a quantile lies."""
    edges = [
        (float(line.split('le="')[1].split('"')[0]), float(line.rsplit(" ", 1)[1]))
        for line in text.splitlines()
        if line.startswith(f"{name}_bucket")
    ]
    return next(edge for edge, count in edges if count >= share * edges[-1][1])


def main() -> int:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1500, help="of each measurement with eight clients or more")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/edge.json"))
    parser.add_argument("--proxy", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--ray", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.proxy:
        serve_proxy(options.proxy)
        return 0
    if options.ray:
        serve_ray(options.tasks)
        return 0
    console = Console(width=120)
    found = run_all(options.tasks, lambda text: console.print(f"measuring: {text}", style="dim"))
    found |= {"when": datetime.now().astimezone().isoformat(timespec="seconds"), "cores": os.cpu_count()}
    found |= {"load_average": os.getloadavg()[0]}
    base = "Ray Serve HTTP proxy" if "Ray Serve HTTP proxy" in found else "bare FastAPI proxy"
    table = Table("", "clients", "tasks/s", "p50 ms", "p99 ms", f"ratio to {base}")
    for name in ("gateway, durable", "bare FastAPI proxy", "Ray Serve HTTP proxy", "Ray Serve handle"):
        for row, other in zip(found.get(name, []), found[base], strict=False):
            cells = (f"{row[key]:.1f}" for key in ("per_s", "p50_ms", "p99_ms"))
            table.add_row(name, str(row["clients"]), *cells, f"{row['per_s'] / other['per_s']:.2f}")
    console.print(table)
    console.print(table_of(found["decisions"]))
    memory = ", ".join(f"{name} {value:.0f}" for name, value in found["memory_mb"].items())
    console.print(
        f"idle memory MB: {memory}; in the loaded gateway a decision takes at most "
        f"{found['decision_p99_us_at_most']:.0f} us in 99 of 100; "
        f"the gateway takes {found['gateway_ms_per_task']:.1f} ms of processor time a task with 8 clients"
    )
    if "Ray Serve HTTP proxy" not in found:
        console.print("Ray Serve: not installed, not measured")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.out, (json.dumps(found, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
