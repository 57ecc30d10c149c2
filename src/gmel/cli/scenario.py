"""`gmel scenario`: what plants there are, what one says, whether a file is valid, how two differ, places from maps."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(help="List, show, check and compare scenarios.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A preset or a TOML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_presets(as_json: Json = False) -> None:
    """List the presets."""
    from gmel.scenario.load import digest, load_scenario, preset_names  # noqa: PLC0415

    presets = [load_scenario(name) for name in preset_names()]
    if as_json:
        typer.echo(json.dumps([{"name": s.name, "title": s.title, "digest": digest(s)} for s in presets]))
        return
    for scenario in presets:
        typer.echo(f"{scenario.name:12}  {scenario.title}")


@app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Print a scenario with all its defaults."""
    from gmel.scenario.load import load_scenario, to_toml  # noqa: PLC0415

    scenario = load_scenario(name)
    typer.echo(json.dumps(scenario.model_dump(mode="json")) if as_json else to_toml(scenario))


@app.command("check")
def check(name: Name, as_json: Json = False) -> None:
    """Check a scenario file; errors name the field, an offered load of 1 and more is a warning."""
    from gmel.scenario.load import digest, load_scenario, load_warning  # noqa: PLC0415

    scenario = load_scenario(name)
    rate = scenario.arrival_rate_per_s
    load = None if rate is None else rate * scenario.mean_work / scenario.capacity
    warning = None if load is None else load_warning(load)
    facts = {
        "name": scenario.name,
        "digest": digest(scenario),
        "devices": scenario.devices.count,
        "servers": len(scenario.servers),
        "requests_per_s": rate,
        "load": load,
    }
    if as_json:
        typer.echo(json.dumps({**facts, "warnings": [warning] if warning else []}))
        return
    typer.echo("valid: " + ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    if warning:
        typer.echo(f"warning: {warning}", err=True)


@app.command("diff")
def diff(a: Name, b: Name, as_json: Json = False) -> None:
    """Show the fields in which two scenarios differ, with both values."""
    from gmel.scenario.compare import ABSENT, differences  # noqa: PLC0415
    from gmel.scenario.load import load_scenario  # noqa: PLC0415

    found = differences(load_scenario(a), load_scenario(b))
    if as_json:
        rows = [
            {"field": each.field}
            | {side: value for side, value in (("a", each.a), ("b", each.b)) if value is not ABSENT}
            for each in found
        ]
        typer.echo(json.dumps({"a": a, "b": b, "differences": rows}))
        return
    if not found:
        typer.echo("no difference")
    wide = max((len(each.field) for each in found), default=0)
    for each in found:
        typer.echo(f"{each.field:{wide}}  {_short(each.a)} -> {_short(each.b)}")


@app.command("import-positions")
def import_positions(
    name: Name,
    servers: Annotated[Path, typer.Option(help="Sites: a CSV file with latitude and longitude (EUA data set).")],
    out: Annotated[Path, typer.Option(help="The scenario file to write.")],
    devices: Annotated[Path | None, typer.Option(help="Users: such a file; default: devices stay as they are.")] = None,
    count: Annotated[int | None, typer.Option(help="Sites that get a server; default: the scenario's servers.")] = None,
) -> None:
    """Put the servers and devices of a scenario where the sites and users of a map are."""
    from gmel.scenario.errors import InputError  # noqa: PLC0415
    from gmel.scenario.files import replace_file  # noqa: PLC0415
    from gmel.scenario.importers import import_places  # noqa: PLC0415
    from gmel.scenario.load import load_scenario, to_toml  # noqa: PLC0415
    from gmel.scenario.positions import place  # noqa: PLC0415

    sites = import_places(servers, f"--servers {servers}")
    users = None if devices is None else import_places(devices, f"--devices {devices}")
    placed = place(load_scenario(name), sites, users, count)
    try:
        replace_file(out, to_toml(placed.scenario).encode())
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another place") from error
    for note in placed.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"written: {out}")


def _short(value: Any, length: int = 60) -> str:
    text = repr(value) if not isinstance(value, dict | list) else json.dumps(value)
    return text if len(text) <= length else text[: length - 3] + "..."
