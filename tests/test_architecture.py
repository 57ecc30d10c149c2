"""The floors of docs/architecture.md, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

import gmel

ROOT = Path(gmel.__file__).parent
FLOORS = {
    "scenario": 0,
    "physics": 1,
    "simulator": 2,
    "policies": 3,
    "learning": 4,
    "evaluation": 5,
    "synthesis": 6,
    "federation": 7,
    "edge": 8,
    "cli": 9,
}
FILES = sorted(ROOT.rglob("*.py"))
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = module.split(".")
                base = parts[: len(parts) - node.level + is_package]
                start = ".".join([*base, *([node.module] if node.module else [])])
            else:
                start = node.module or ""
            names |= {start} | {f"{start}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    parts = ["gmel", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    return imported_modules(ast.parse(path.read_text("utf-8")), module_name(path), path.name == "__init__.py")


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "gmel" and len(parts) > 1 and parts[1] in FLOORS else None


def faults(room: str, imported: set[str]) -> list[str]:
    """Imports that climb: from another room on the same floor or above."""
    rooms = {name: room_of(name) for name in imported}
    return sorted(name for name, other in rooms.items() if other and other != room and FLOORS[other] >= FLOORS[room])


def test_every_room_has_a_floor() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(FLOORS), "a new room needs a floor here and in docs/architecture.md"
    assert {"scenario", "physics", "simulator", "policies"} <= rooms


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    room = room_of(module)
    if room is None:
        assert not {name for name in imports_of(path) if room_of(name)}, "the package itself opens no room"
        return
    assert not faults(room, imports_of(path)), module


def test_rooms_do_not_import_in_a_circle() -> None:
    below: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(module_name(path))
        if room:
            others = {room_of(name) for name in imports_of(path)} - {None, room}
            below.setdefault(room, set()).update(other for other in others if other)
    done: set[str] = set()
    while len(done) < len(below):
        free = {room for room, others in below.items() if room not in done and others <= done}
        assert free, f"circle among {sorted(set(below) - done)}"
        done |= free


@pytest.mark.parametrize("path", sorted((ROOT / "scenario").rglob("*.py")), ids=module_name)
def test_scenario_room_needs_no_jax(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports_of(path)} & {"jax", "jaxlib", "equinox", "optax"}
    assert not heavy


@pytest.mark.parametrize("folder", [ROOT, Path(__file__).parent], ids=["src", "tests"])
def test_names_say_what_a_file_holds(folder: Path) -> None:
    vague = [path for path in folder.rglob("*") if path.stem.lower().removeprefix("test_") in VAGUE]
    assert not vague


def test_reading_of_imports_finds_what_it_must() -> None:
    inner = "    from gmel.policies.rules import Greedy\n"
    source = "import gmel.cli.main\nfrom ..evaluation import table\ndef f():\n" + inner
    found = imported_modules(ast.parse(source), "gmel.physics.radio", False)
    assert {"gmel.cli.main", "gmel.evaluation.table", "gmel.policies.rules.Greedy"} <= found
    assert faults("physics", found) == sorted(name for name in found if name.startswith("gmel"))
    assert not faults("policies", {"gmel.policies.rules", "gmel.simulator.state", "jax"})
    assert faults("synthesis", {"gmel.federation.weights"}), "a neighbour on the same floor is another room"
    inside = imported_modules(ast.parse("from . import radio\nfrom ..cli import main"), "gmel.physics", True)
    assert {"gmel.physics.radio", "gmel.cli.main"} <= inside
