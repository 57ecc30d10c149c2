"""A whole plant on this machine for a minute: a gateway, unlike servers that really generate, and devices that ask."""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from gmel.edge.device import Device, Outcome, run_load
from gmel.edge.load import tasks_of_trace, trace_of_scenario
from gmel.edge.processes import Processes
from gmel.edge.records import write_records
from gmel.edge.task import DONE, Task
from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.load import load_scenario, to_toml, with_load
from gmel.scenario.schema import Scenario

__all__ = ["LiveOptions", "Summary", "run_live", "summary_lines"]

_JOIN_S = 30.0


@dataclass(frozen=True)
class LiveOptions:
    """What is run.

    Attributes:
        scenario: preset or file of the plant.
        out: folder for everything that is left behind.
        seconds: how long devices ask.
        load: offered work over capacity; none: that of the scenario.
        trace: requests from a file in place of drawn ones.
        policy: in charge.
        policies: folder of exported policies.
        models: folder of generators; none: `compose` is fitted on the built-in photos.
        sleep: servers take their time and make nothing.
        port: of the gateway.
        seed: of requests and samples.
        keep: stay up until Ctrl-C.
    """

    scenario: str = "live"
    out: Path = Path("runs/live")
    seconds: float = 60.0
    load: float | None = None
    trace: Path | None = None
    policy: str = "earliest-finish"
    policies: Path | None = None
    models: Path | None = None
    sleep: bool = False
    port: int = 8420
    seed: int = 0
    keep: bool = False


@dataclass(frozen=True)
class Summary:
    """What came of it.

    Attributes:
        tasks: that devices have sent.
        ended: by state, as the devices saw it.
        lost: tasks that were accepted and have no end.
        images: that were made.
        mean_s, p50_s, p95_s: latency of tasks that were done, as the devices saw it.
        in_time: share of all tasks that were done by their deadline.
        by_server: tasks that each server did.
        retries: attempts beyond the first.
        policy: in charge at the end.
        wall_s: seconds of the load.
        memory_mb: of each process at the end.
        records: file of records.
    """

    tasks: int
    ended: dict[str, int]
    lost: int
    images: int
    mean_s: float | None
    p50_s: float | None
    p95_s: float | None
    in_time: float
    by_server: dict[str, int]
    retries: int
    policy: str
    wall_s: float
    memory_mb: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    records: str = ""


def run_live(options: LiveOptions, reporter: Reporter, say: Callable[[str], None]) -> Summary:
    """Runs the plant (see the module).

    Args:
        options: what.
        reporter: told how it goes on.
        say: told where the dashboard is.

    Raises:
        InputError: anything that cannot be used, or a process that does not start.
    """
    scenario = _planned(options)
    if not 0 < options.seconds <= 86_400:
        raise InputError(f"seconds is {options.seconds:g}; must be above 0 and at most 86400")
    if options.out.exists() and any(options.out.iterdir()):
        raise InputError(f"{options.out}: is not empty; choose another --out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{options.out}: cannot be made ({error.strerror}); choose another --out") from error
    replace_file(options.out / "scenario.toml", to_toml(scenario).encode())
    labels: tuple[str, ...] = ()
    models: Path | None = None
    if not options.sleep:
        models = options.models or options.out / "models"
        labels = _generators(models, options.models is None, scenario, options.seed, reporter)
    timed = _requests(options, scenario, labels)
    with Processes(options.out) as processes:
        gateway = _start(processes, options, scenario, models, reporter)
        say(f"dashboard at {gateway}/")
        summary = asyncio.run(_load(gateway, timed, options, reporter))
        memory = {name: processes.memory_mb(name) for name in processes.running}
        summary = replace(summary, memory_mb=memory)
        replace_file(options.out / "summary.json", (json.dumps(asdict(summary), indent=1) + "\n").encode())
        if options.keep:
            say(f"the plant stays up at {gateway}/ until Ctrl-C")
            _until_interrupted()
    return summary


def _planned(options: LiveOptions) -> Scenario:
    """The plant, with the load that was asked for."""
    scenario = load_scenario(options.scenario)
    return scenario if options.load is None else with_load(scenario, options.load)


def _requests(options: LiveOptions, scenario: Scenario, labels: tuple[str, ...]) -> list[tuple[float, Task]]:
    """Tasks and when they are sent: of the trace that was given, else drawn."""
    trace = options.trace or options.out / "requests.csv"
    if options.trace is None:
        trace_of_scenario(scenario, options.seconds, options.seed, trace)
    # What was drawn comes as it was drawn: at that load on average, not to the digit.
    timed = tasks_of_trace(trace, scenario, labels, options.seed, own_time=options.trace is None)
    return [each for each in timed if each[0] <= options.seconds]


def _generators(folder: Path, fit: bool, scenario: Scenario, seed: int, reporter: Reporter) -> tuple[str, ...]:
    """Makes sure of the generators; the classes that all of them draw."""
    from gmel.synthesis.compose import Compose  # noqa: PLC0415
    from gmel.synthesis.data.procedural import procedural_dataset  # noqa: PLC0415
    from gmel.synthesis.generator import load_generator, save_generator  # noqa: PLC0415
    from gmel.synthesis.modes import EVERY_MODE  # noqa: PLC0415
    from gmel.synthesis.photo import GOOD  # noqa: PLC0415

    wanted = [model.name for model in scenario.models]
    if fit:
        if wanted != ["compose"]:
            raise InputError(
                f"scenario {scenario.name!r}: has the models {', '.join(wanted)}; give --models FOLDER with a file of "
                "`gmel synthesize fit` for each, or --sleep"
            )
        reporter.stage("drawing the built-in photos and fitting compose on five of each defect")
        photos = procedural_dataset(seed, good=12, defects=5, reporter=reporter).photos
        generator = Compose.fit(
            [photo for photo in photos if photo.label != GOOD],
            [photo for photo in photos if photo.label == GOOD],
            seed,
            reporter,
        )
        folder.mkdir(parents=True, exist_ok=True)
        save_generator(folder / "compose.safetensors", generator)
    known = [load_generator(folder / f"{name}.safetensors", EVERY_MODE).labels for name in wanted]
    shared = set(known[0]).intersection(*known[1:])
    return tuple(label for label in known[0] if label in shared)


def _start(
    processes: Processes,
    options: LiveOptions,
    scenario: Scenario,
    models: Path | None,
    reporter: Reporter,
) -> str:
    """Starts the gateway and the servers; the address of the gateway, once all servers are known to it."""
    reporter.stage("starting the gateway")
    words = ["--folder", str(options.out / "gateway"), "--port", str(options.port), "--policy", options.policy]
    if options.policies is not None:
        words += ["--policies", str(options.policies)]
    processes.start("gateway", "gateway", str(options.out / "scenario.toml"), *words)
    gateway = processes.address("gateway")
    reporter.stage(f"starting {len(scenario.servers)} servers")
    work = scenario.models[0].mean_work() / scenario.models[0].images.mean
    for server in scenario.servers:
        words = [server.name, "--gateway", gateway, "--speed", str(server.speed), "--gpus", str(server.gpus)]
        words += ["--memory-gb", str(server.memory_gb)]
        if models is not None:
            # As slow as the plant says it is, where this machine is not slower than that.
            words += ["--models", str(models), "--photo-s", f"{work / server.speed:.4g}"]
        processes.start(server.name, "server", *words)
    until = time.monotonic() + _JOIN_S
    while time.monotonic() < until:
        servers: list[dict[str, Any]] = httpx.get(f"{gateway}/v1/servers", timeout=5.0, trust_env=False).json()[
            "servers"
        ]
        if sum(bool(server["alive"]) for server in servers) == len(scenario.servers):
            return gateway
        time.sleep(0.1)
    for server in scenario.servers:
        processes.address(server.name)  # tells which one did not start
    raise InputError(f"servers: not all of them joined the gateway within {_JOIN_S:g} s; see {options.out}/*.log")


async def _load(gateway: str, timed: list[tuple[float, Task]], options: LiveOptions, reporter: Reporter) -> Summary:
    device = Device(gateway)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    reporter.stage(f"{len(timed)} tasks in {options.seconds:g} s")
    began = time.monotonic()

    def told(sent: int, ended: int, outcome: Outcome | None) -> None:
        del outcome
        reporter.advance(ended, len(timed), f"{sent} tasks sent, {ended} have ended, {len(timed)} in all")

    try:
        outcomes = await run_load(device, timed, told, stop)
        wall_s = time.monotonic() - began
        async with httpx.AsyncClient(base_url=gateway, timeout=30.0, trust_env=False) as client:
            state = (await client.get("/v1/state")).json()
            lines = (await client.get("/v1/records")).text.splitlines()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        await device.close()
    if stop.is_set():
        reporter.note("interrupted: no more tasks were sent; what was sent has ended")
    records = [json.loads(line) for line in lines]
    file = options.out / "records.parquet"
    write_records(file, records)
    done = [outcome for outcome in outcomes if outcome.state == DONE]
    latency = np.sort([outcome.latency_s for outcome in done])
    counts: dict[str, int] = state["counts"]
    return Summary(
        tasks=len(outcomes),
        ended=dict(Counter(outcome.state for outcome in outcomes)),
        lost=sum(counts.get(name, 0) for name in ("accepted", "leased")),
        images=sum(outcome.task.images for outcome in done),
        mean_s=float(latency.mean()) if len(latency) else None,
        p50_s=float(np.quantile(latency, 0.5)) if len(latency) else None,
        p95_s=float(np.quantile(latency, 0.95)) if len(latency) else None,
        in_time=sum(each.latency_s <= each.task.deadline_s for each in done) / max(len(outcomes), 1),
        by_server=dict(Counter(outcome.server or "" for outcome in done)),
        retries=sum(int(record["attempt"]) - 1 for record in records),
        policy=str(state["policy"]["current"]["name"]),
        wall_s=wall_s,
        records=str(file),
    )


def _until_interrupted() -> None:
    try:
        while True:
            time.sleep(1.0)
    except KeyboardInterrupt:
        return


def summary_lines(summary: Summary) -> list[str]:
    """A summary for a person."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} s"

    ended = ", ".join(f"{count} {state}" for state, count in sorted(summary.ended.items()))
    shares = ", ".join(f"{name} {count}" for name, count in sorted(summary.by_server.items()))
    memory = sum(value for value in summary.memory_mb.values() if value is not None)
    return [
        f"{summary.tasks} tasks in {summary.wall_s:.0f} s by {summary.policy}: {ended}; {summary.lost} lost",
        f"{summary.images} photos; tasks by server: {shares}; {summary.retries} retries",
        f"latency mean {seconds(summary.mean_s)}, median {seconds(summary.p50_s)}, P95 {seconds(summary.p95_s)}; "
        f"{100 * summary.in_time:.1f} % in time",
        f"memory of gateway and servers {memory:.0f} MB; records in {summary.records}",
    ]
