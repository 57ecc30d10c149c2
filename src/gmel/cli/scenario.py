"""`gmel scenario`: what plants there are, what one says, whether a file is valid."""

import json
from typing import Annotated

import typer

from gmel.scenario.load import digest, load_scenario, preset_names, to_toml

__all__ = ["app"]

app = typer.Typer(help="List, show and check scenarios.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A preset or a TOML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_presets(as_json: Json = False) -> None:
    """List the presets."""
    presets = [load_scenario(name) for name in preset_names()]
    if as_json:
        typer.echo(json.dumps([{"name": s.name, "title": s.title, "digest": digest(s)} for s in presets]))
        return
    for scenario in presets:
        typer.echo(f"{scenario.name:12}  {scenario.title}")


@app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Print a scenario with all its defaults."""
    scenario = load_scenario(name)
    typer.echo(json.dumps(scenario.model_dump(mode="json")) if as_json else to_toml(scenario))


@app.command("check")
def check(name: Name, as_json: Json = False) -> None:
    """Check a scenario file; errors name the field."""
    scenario = load_scenario(name)
    rate = scenario.arrival_rate_per_s
    facts = {
        "name": scenario.name,
        "digest": digest(scenario),
        "devices": scenario.devices.count,
        "servers": len(scenario.servers),
        "requests_per_s": rate,
        "load": None if rate is None else rate * scenario.mean_work / scenario.capacity,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo("valid: " + ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
