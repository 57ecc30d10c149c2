"""An edge server as a process: from options to the last task."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from gmel.edge.keys import Keys
from gmel.edge.logs import structured_logs
from gmel.edge.plant import Plant
from gmel.edge.server.app import server_app
from gmel.edge.server.inputs import GatewayPhotos
from gmel.edge.server.reporting import Reporting
from gmel.edge.server.runner import Runner
from gmel.edge.server.work import NoModels, Sleeping, Source, Synthesis
from gmel.edge.serving import Place, check_open, listen, run, serve
from gmel.edge.task import check_name
from gmel.edge.traces import Traces, traces_of
from gmel.scenario.errors import InputError

__all__ = ["ServerOptions", "plant_at", "run_server"]

_MOST_PHOTO_S = 3600.0


@dataclass(frozen=True)
class ServerOptions:
    """What an edge server is.

    Attributes:
        name: its name.
        gateway: address of the gateway; empty for none: devices that decide themselves and federated rounds alone.
        models: folder of generators; none: it only takes the time that tasks would take.
        speed: work units per second; needed without generators, else an estimate that measurement corrects.
        gpus: tasks at once.
        memory_gb: for models.
        photo_s: seconds that a photo takes at least.
        advertise: address that the gateway is told; none: that where it listens.
        pull: fetches its tasks; the gateway needs no way to it.
        keys: whom it listens to.
        key: what the gateway is shown.
        verify: certificates of the gateway that are trusted.
        site_rows: file of the rows of a site (`gmel.federation.site_file`), to take part in federated rounds.
        traced: whether spans of tasks are sent also where the environment names no collector.
        together: photos of different tasks that are drawn together; 1 for each task alone.
    """

    name: str
    gateway: str
    models: Path | None = None
    speed: float = 0.0
    gpus: int = 1
    memory_gb: float = 16.0
    photo_s: float = 0.0
    advertise: str | None = None
    pull: bool = False
    keys: Path | None = None
    key: str | None = None
    verify: bool | str = True
    site_rows: Path | None = None
    traced: bool = False
    together: int = 1


def plant_at(gateway: str, key: str | None, verify: bool | str = True) -> Plant:
    """The plant of a gateway.

    Raises:
        InputError: it does not answer, or not as a gateway would.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.get(f"{gateway}/v1/plant", headers=headers, timeout=5.0, verify=verify, trust_env=False)
        if answer.status_code != 200:
            raise InputError(f"gateway {gateway}: {answer.status_code} {answer.text[:200]}")
        return Plant.from_json(answer.json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise InputError(f"gateway {gateway}: does not answer ({error}); start it first with `gmel gateway`") from error


def run_server(place: Place, options: ServerOptions, say: Callable[[str], None]) -> None:
    """Runs an edge server until it is told to end; it finishes what it has begun (drain).

    Raises:
        InputError: anything that cannot be used.
    """
    check_name(options.name, "name")
    check_open(place, options.keys, "server")
    if options.models is not None and not options.models.is_dir():
        raise InputError(f"--models {options.models}: no such folder")
    if not 0.0 <= options.photo_s <= _MOST_PHOTO_S:
        raise InputError(f"--photo-s is {options.photo_s:g}; must be from 0 to {_MOST_PHOTO_S:g}")
    source: Source
    if options.models is not None:
        photos = GatewayPhotos(options.gateway, options.key, options.verify) if options.gateway else None
        source = Synthesis(options.models, options.photo_s, photos)
    elif not options.gateway:
        source = NoModels()
    else:
        plant = plant_at(options.gateway, options.key, options.verify)
        speed = options.speed or (plant.servers[options.name].speed if options.name in plant.servers else 0.0)
        if speed <= 0:
            raise InputError(f"server {options.name}: is not in the plant and has no --models; give its --speed")
        source = Sleeping(plant, speed)
    traces = traces_of(f"gmel-server-{options.name}", options.traced)
    door = listen(place)
    structured_logs()
    address = f"{place.scheme}://{place.host}:{door.getsockname()[1]}"
    run(_serve(door, place, options, source, address, say, traces))


async def _serve(
    door: socket.socket,
    place: Place,
    options: ServerOptions,
    source: Source,
    address: str,
    say: Callable[[str], None],
    traces: Traces,
) -> None:
    runner = Runner(source, options.gpus, options.memory_gb, together=options.together, traces=traces)
    runner.start()
    url = None if options.pull else (options.advertise or address)
    line = Reporting(options.name, options.gateway, runner, url, options.speed, options.key, options.verify)
    site = None
    if options.site_rows is not None:
        from gmel.edge.rounds import Site  # noqa: PLC0415  # JAX, which other servers do without

        site = Site.read(options.site_rows)
    app = server_app(options.name, runner, None if options.keys is None else Keys(options.keys), site)

    async def drain() -> None:
        # Said at once, else the gateway would send more until the next heartbeat; and once more when all is done, so
        # that a word that was lost on the way is not missed.
        runner.draining = True
        saying = asyncio.create_task(line.say()) if options.gateway else None
        await runner.drain()
        await line.delivered()
        if saying is not None:
            await saying
            await line.say()

    reporting = asyncio.create_task(line.keep()) if options.gateway else None
    try:
        await serve(app, door, place, lambda: say(address), drain)
    finally:
        if reporting is not None:
            reporting.cancel()
            with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
                await reporting
        await runner.close()
        await asyncio.to_thread(traces.close)
