"""`gmel gateway`, `gmel server`, `gmel key`: the processes of a live plant."""

import os
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.extras import need
from gmel.scenario.errors import InputError

__all__ = ["gateway", "key_app", "own_key", "server"]

Host = Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need --keys.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")]
KeysFile = Annotated[Path | None, typer.Option("--keys", help="File of keys (`gmel key add`).")]
Certificate = Annotated[Path | None, typer.Option("--tls-cert", help="Certificate, a PEM file; with --tls-key.")]
CertificateKey = Annotated[Path | None, typer.Option("--tls-key", help="Its private key, a PEM file.")]
Trusted = Annotated[Path | None, typer.Option("--tls-ca", help="Certificates to trust, a PEM file.")]

Traced = Annotated[
    bool,
    typer.Option(
        "--traces",
        help="Send spans of tasks to an OpenTelemetry collector (extra `otel`); see OTEL_EXPORTER_OTLP_ENDPOINT.",
    ),
]

KEY_VARIABLE = "GMEL_KEY"
"""A key on the command line would be seen by everybody on the machine."""


def own_key() -> str | None:
    """The key of this process; None where there is none."""
    return os.environ.get(KEY_VARIABLE) or None


def gateway(
    scenario: Annotated[str, typer.Argument(help="The plant: a preset or a scenario file.")] = "live",
    folder: Annotated[Path, typer.Option(help="Of the ledger and the results.")] = Path("gateway"),
    host: Host = "127.0.0.1",
    port: Port = 8420,
    policies: Annotated[Path | None, typer.Option(help="Folder of exported policies, each in its own folder.")] = None,
    policy: Annotated[
        str, typer.Option(help="In charge at the start: a rule, or one of --policies.")
    ] = "earliest-finish",
    most_open: Annotated[int, typer.Option(min=1, help="Tasks without an end; one more is turned away.")] = 2000,
    rate: Annotated[float, typer.Option(min=0.001, help="Tasks of one device per second.")] = 1000.0,
    stall: Annotated[float, typer.Option(min=2, help="Silent seconds after which a server has stopped.")] = 5.0,
    store: Annotated[
        str | None,
        typer.Option(help="URL of results and inputs, for instance s3://bucket/prefix (extra `store`); else --folder."),
    ] = None,
    most_losses: Annotated[
        int, typer.Option(min=1, help="Servers that may break off while they run a task; then it has failed.")
    ] = 10,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Days that a task is kept after its end; 0: for ever.")
    ] = 30.0,
    keep_gb: Annotated[
        float | None, typer.Option(min=0.001, help="Gigabytes of results; those of the oldest tasks go first.")
    ] = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="Take back what can be read of a damaged ledger, then go on.")
    ] = False,
    keys: KeysFile = None,
    tls_cert: Certificate = None,
    tls_key: CertificateKey = None,
    tls_ca: Trusted = None,
    engine: Annotated[str, typer.Option(help="How servers are reached: http, or ray (extra `ray`).")] = "http",
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; without: a new one on this machine.")
    ] = None,
    models: Annotated[Path | None, typer.Option(help="With --engine ray: folder of generators of its actors.")] = None,
    traces: Traced = False,
) -> None:
    """Take tasks of devices, decide where each runs, and lose none."""
    need("edge", "aiohttp", "fastapi", "httpx", "prometheus_client", "uvicorn")
    from gmel.edge.engines.engine import Engine  # noqa: PLC0415
    from gmel.edge.engines.ray import RayEngine  # noqa: PLC0415
    from gmel.edge.gateway.gateway import INPUTS, Settings  # noqa: PLC0415
    from gmel.edge.gateway.process import run_gateway  # noqa: PLC0415
    from gmel.edge.plant import Plant  # noqa: PLC0415
    from gmel.edge.serving import Place  # noqa: PLC0415
    from gmel.edge.store import store_at  # noqa: PLC0415

    settings = Settings(
        folder,
        policies,
        policy,
        most_open,
        rate,
        stall_s=stall,
        keys=keys,
        server_key=own_key(),
        verify=True if tls_ca is None else str(tls_ca),
        store=store,
        most_losses=most_losses,
        keep_days=keep_days,
        keep_gb=keep_gb,
    )
    place = Place(host, port, tls_cert, tls_key)
    if engine not in ("http", "ray"):
        raise InputError(f"--engine {engine}: must be http or ray")

    def over_ray(plant: Plant) -> Engine:
        return RayEngine(plant, models, ray_address, stall, store_at(store, folder, INPUTS))

    run_gateway(scenario, place, settings, typer.echo, recover, over_ray if engine == "ray" else None, traces)


def server(
    name: Annotated[str, typer.Argument(help="Name of the server.")],
    gateway: Annotated[str, typer.Option(help="Address of the gateway.")] = "http://127.0.0.1:8420",
    models: Annotated[
        Path | None, typer.Option(help="Folder of generators (`gmel synthesize fit`); without: it sleeps.")
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 0,
    speed: Annotated[
        float, typer.Option(min=0, help="Work units per second; default: as the gateway's plant says.")
    ] = 0.0,
    gpus: Annotated[int, typer.Option(min=1, max=64, help="Tasks at once.")] = 1,
    memory_gb: Annotated[float, typer.Option(min=0.001, help="For models; the least recently used leave.")] = 16.0,
    photo_s: Annotated[
        float, typer.Option(help="Seconds that a photo takes at least; to show unlike servers on one machine.")
    ] = 0.0,
    advertise: Annotated[str | None, typer.Option(help="Address that the gateway is told.")] = None,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch tasks: only this server opens connections.")] = False,
    together: Annotated[
        int, typer.Option(min=1, max=256, help="Photos of different tasks that are drawn together; 1: each task alone.")
    ] = 1,
    site_rows: Annotated[
        Path | None, typer.Option(help="Rows of a site to train on in federated rounds; they never leave this server.")
    ] = None,
    keys: KeysFile = None,
    tls_cert: Certificate = None,
    tls_key: CertificateKey = None,
    tls_ca: Trusted = None,
    traces: Traced = False,
) -> None:
    """Run tasks for a gateway."""
    need("edge", "fastapi", "httpx", "prometheus_client", "uvicorn")
    from gmel.edge.server.process import ServerOptions, run_server  # noqa: PLC0415
    from gmel.edge.serving import Place  # noqa: PLC0415

    options = ServerOptions(
        name,
        gateway.rstrip("/"),
        models,
        speed,
        gpus,
        memory_gb,
        photo_s,
        advertise,
        pull,
        keys,
        own_key(),
        True if tls_ca is None else str(tls_ca),
        site_rows,
        traces,
        together,
    )
    place = Place(host, port, tls_cert, tls_key)
    run_server(place, options, lambda address: typer.echo(f"server {name} at {address}"))


key_app = typer.Typer(help="Keys of devices, servers and operators.", no_args_is_help=True)

Role = Annotated[str, typer.Argument(help="device, server or operator.")]
Name = Annotated[str, typer.Argument(help="Whose it is.")]


@key_app.callback()
def _key() -> None:  # pyright: ignore[reportUnusedFunction]
    """Keys of devices, servers and operators: only their hashes are kept."""


@key_app.command("add")
def add(file: Annotated[Path, typer.Argument(help="File of keys.")], role: Role, name: Name) -> None:
    """Make a key and print it, once."""
    from gmel.edge.keys import add_key  # noqa: PLC0415

    typer.echo(add_key(file, role, name))  # pyright: ignore[reportArgumentType]


@key_app.command("revoke")
def revoke(file: Annotated[Path, typer.Argument(help="File of keys.")], role: Role, name: Name) -> None:
    """Take a key back; a gateway notices within a second."""
    from gmel.edge.keys import remove_key  # noqa: PLC0415

    remove_key(file, role, name)  # pyright: ignore[reportArgumentType]
    typer.echo(f"revoked: {role} {name}")
