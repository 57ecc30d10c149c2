"""A device as a process: its requests from a trace, to a gateway or straight to servers."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gmel.edge.device import Device, DirectDevice, Outcome, run_load
from gmel.edge.engines.http import HttpEngine
from gmel.edge.engines.transport import HttpxTransport, Links
from gmel.edge.load import tasks_of_trace
from gmel.edge.local import LocalWork
from gmel.edge.plant import Plant, plant_of
from gmel.edge.server.work import Synthesis
from gmel.edge.task import Task, addresses, check_name
from gmel.evaluation.progress import Reporter
from gmel.policies.exported import ExportedPolicy
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario
from gmel.scenario.trace import read_trace

__all__ = ["AgentOptions", "run_agent"]


@dataclass(frozen=True)
class AgentOptions:
    """What a device does.

    Attributes:
        name: of the device.
        trace: its requests; where the trace names devices, those of this one alone.
        gateway: address of the gateway.
        scenario: fills what the trace does not say.
        servers: `NAME=URL,NAME=URL`: decide here; empty: the gateway decides.
        policy: folder of an exported policy to decide by.
        key: what gateway and servers are shown.
        seed: of samples and of the policy.
        models: folder of generators for tasks that the device runs itself; none: they take their time.
        records: file for the records of tasks that it has decided on; none for no file.
    """

    name: str
    trace: Path
    gateway: str
    scenario: str
    servers: str
    policy: Path | None
    key: str | None
    seed: int
    models: Path | None = None
    records: Path | None = None


def run_agent(options: AgentOptions, reporter: Reporter) -> list[Outcome]:
    """Replays the requests; how each ended, in the order in which they did.

    Raises:
        InputError: anything that cannot be used.
    """
    check_name(options.name, "name")
    if options.policy is not None and not options.servers:
        raise InputError("--policy: a device that decides itself needs --servers NAME=URL,...")
    for name, given in (("--local-models", options.models), ("--records", options.records)):
        if given is not None and not options.servers:
            raise InputError(f"{name}: a device that decides itself needs --servers NAME=URL,...")
    scenario = load_scenario(options.scenario)
    plant = plant_of(scenario) if options.servers else None
    timed = tasks_of_trace(options.trace, scenario, (), options.seed, own_time=True)
    columns = read_trace(options.trace).columns
    if "device" in columns:
        mine = [str(each) == options.name for each in columns["device"]]
        timed = [each for each, own in zip(timed, mine, strict=True) if own]
    if not timed:
        raise InputError(f"{options.trace}: has no request of the device {options.name}")
    first = timed[0][0]
    timed = [(at_s - first, replace(task, device=options.name)) for at_s, task in timed]
    reporter.stage(f"{len(timed)} tasks")

    def told(sent: int, ended: int, outcome: Outcome | None) -> None:
        del outcome
        reporter.advance(ended, len(timed), f"{sent} tasks sent, {ended} have ended")

    async def replayed() -> list[Outcome]:
        if plant is None:
            device = Device(options.gateway, options.key)
            try:
                return await run_load(device, timed, told)
            finally:
                await device.close()
        direct = DirectDevice(
            plant,
            addresses(options.servers),
            HttpEngine(HttpxTransport(Links(key=options.key))),
            None if options.policy is None else ExportedPolicy.load(options.policy),
            rng=np.random.default_rng(options.seed),
            key=options.key,
            local=_own_work(plant, options.models),
        )
        listening = asyncio.create_task(direct.listen())
        try:
            return await run_load(_Straight(direct), timed, told)
        finally:
            listening.cancel()
            await direct.close()
            if options.records is not None:
                from gmel.edge.records import write_records  # noqa: PLC0415  # Arrow, which other devices do without

                write_records(options.records, direct.records)

    return asyncio.run(replayed())


def _own_work(plant: Plant, models: Path | None) -> LocalWork | None:
    """The device's own processor, where the scenario lets it run tasks."""
    if not plant.local and models is None:
        return None
    if models is not None and not models.is_dir():
        raise InputError(f"--local-models {models}: no such folder")
    return LocalWork(plant, None if models is None else Synthesis(models))


class _Straight:
    """A device that decides itself, as one that a load can be run on."""

    def __init__(self, direct: DirectDevice) -> None:
        self._direct = direct

    async def run(self, task: Task) -> Outcome:
        return (await self._direct.run(task))[0]
