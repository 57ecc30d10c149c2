"""`gmel live`, `gmel submit`, `gmel device`: a plant on this machine, and those who ask it."""

import asyncio
import json
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.extras import need
from gmel.cli.gateway import own_key
from gmel.cli.progress import ConsoleReporter

__all__ = ["device", "live", "submit"]

Gateway = Annotated[str, typer.Option(help="Address of the gateway.")]


def live(
    scenario: Annotated[str, typer.Argument(help="The plant: a preset or a scenario file.")] = "live",
    out: Annotated[Path, typer.Option(help="Folder for what is left behind; must be new or empty.")] = Path(
        "runs/live"
    ),
    seconds: Annotated[float, typer.Option(help="How long devices ask.")] = 60.0,
    load: Annotated[
        float | None, typer.Option(min=0.01, max=10, help="Offered work over capacity; default: the scenario's.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Requests from a trace in place of drawn ones.")] = None,
    policy: Annotated[str, typer.Option(help="In charge: a rule, or one of --policies.")] = "earliest-finish",
    policies: Annotated[Path | None, typer.Option(help="Folder of exported policies.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder of generators; default: compose, on the built-in photos.")
    ] = None,
    sleep: Annotated[bool, typer.Option("--sleep", help="Servers take their time and make nothing.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the gateway; 0 for a free one.")] = 8420,
    seed: Annotated[int, typer.Option(min=0, help="Of requests and samples.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Stay up afterwards, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run a whole plant on this machine: a gateway, unlike servers that really generate, devices that ask."""
    need("edge", "aiohttp", "fastapi", "httpx", "prometheus_client", "uvicorn")
    from gmel.edge.live import LiveOptions, run_live, summary_lines  # noqa: PLC0415

    options = LiveOptions(scenario, out, seconds, load, trace, policy, policies, models, sleep, port, seed, keep)
    with ConsoleReporter() as reporter:
        summary = run_live(options, reporter, reporter.note)
    typer.echo(json.dumps(asdict(summary)) if as_json else "\n".join(summary_lines(summary)))


def submit(
    model: Annotated[str, typer.Argument(help="Name of the generator.")],
    gateway: Gateway = "http://127.0.0.1:8420",
    device: Annotated[str, typer.Option(help="Who asks.")] = "operator",
    label: Annotated[str, typer.Option("--class", help="Class to draw; default: the first one.")] = "",
    images: Annotated[int, typer.Option(help="How many photos.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: those of the mode.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    deadline: Annotated[float, typer.Option(help="Seconds in which the result is wanted.")] = 60.0,
    task_id: Annotated[str | None, typer.Option("--id", help="Sent again, it is the same task.")] = None,
    on: Annotated[
        Path | None, typer.Option("--on", help="Photo of a good part to draw on, in place of the generator's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the result, a .zip.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Give one task to a gateway and wait for its result."""
    need("edge", "httpx")
    from gmel.edge.device import Device, read_photo  # noqa: PLC0415
    from gmel.edge.task import DONE, read_task  # noqa: PLC0415
    from gmel.scenario.errors import InputError  # noqa: PLC0415
    from gmel.scenario.files import replace_file  # noqa: PLC0415

    said = {"id": task_id or uuid.uuid4().hex, "device": device, "model": model, "label": label, "images": images}
    task = read_task(said | {"steps": steps, "seed": seed, "deadline_s": deadline})
    photo = None if on is None else read_photo(on)

    async def ask() -> dict[str, object]:
        asker = Device(gateway.rstrip("/"), own_key(), patience_s=max(4 * deadline, 30.0))
        try:
            asked = task if photo is None else replace(task, input=await asker.upload(photo))
            outcome = await asker.run(asked)
            if outcome.state != DONE:
                why = f" ({outcome.error})" if outcome.error else ""
                raise InputError(f"task {task.id}: {outcome.state} after {outcome.latency_s:.1f} s{why}")
            data = await asker.result(task.id)
            if out is not None:
                replace_file(out, data)
            return {"id": task.id, "server": outcome.server, "latency_s": outcome.latency_s, "bytes": len(data)}
        finally:
            await asker.close()

    found = asyncio.run(ask())
    where = "" if out is None else f", in {out}"
    line = f"{found['id']}: {found['bytes']} bytes by {found['server']} in {found['latency_s']:.2f} s{where}"
    typer.echo(json.dumps(found) if as_json else line)


def device(
    name: Annotated[str, typer.Argument(help="Name of the device.")],
    trace: Annotated[Path, typer.Argument(help="Its requests, a trace; those of other devices are left out.")],
    gateway: Gateway = "http://127.0.0.1:8420",
    scenario: Annotated[str, typer.Option(help="Fills what the trace does not say.")] = "live",
    servers: Annotated[str, typer.Option(help="Decide here and send straight to servers: NAME=URL,NAME=URL.")] = "",
    policy: Annotated[Path | None, typer.Option(help="Exported policy to decide by, with --servers.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and of the policy.")] = 0,
    local_models: Annotated[
        Path | None, typer.Option(help="Generators for tasks that the device runs itself; without: it sleeps.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="File for the records of its tasks, Parquet; with --servers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a task.")] = False,
) -> None:
    """Replay the requests of a device: to a gateway, or, deciding itself, straight to servers."""
    need("edge", "httpx")
    from gmel.edge.agent import AgentOptions, run_agent  # noqa: PLC0415

    options = AgentOptions(
        name, trace, gateway.rstrip("/"), scenario, servers, policy, own_key(), seed, local_models, records
    )
    with ConsoleReporter() as reporter:
        for outcome in run_agent(options, reporter):
            fields = {"id": outcome.task.id, "state": outcome.state, "server": outcome.server}
            fields |= {"latency_s": round(outcome.latency_s, 4), "sends": outcome.sends}
            typer.echo(json.dumps(fields) if as_json else " ".join(str(value) for value in fields.values()))
