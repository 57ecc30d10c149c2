"""Scenarios from files and presets: reading, checking, writing, identity."""

import difflib
import hashlib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from gmel.scenario.errors import InputError
from gmel.scenario.files import is_file
from gmel.scenario.schema import Scenario

__all__ = [
    "digest",
    "load_scenario",
    "load_warning",
    "parse_scenario",
    "preset_names",
    "to_toml",
    "validate_scenario",
    "with_load",
]

_LONGEST = 80
_PRESETS = resources.files("gmel.scenario") / "presets"


def preset_names() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(Path(entry.name).stem for entry in _PRESETS.iterdir() if entry.name.endswith(".toml"))


def load_scenario(name: str, load: float | None = None) -> Scenario:
    """A preset by its name, or a scenario file by its path.

    Args:
        name: preset (`preset_names()`) or path of a `.toml` file.
        load: offered load to use in place of the scenario's own.

    Raises:
        InputError: neither a preset nor a readable, valid file.
    """
    if name in preset_names():
        text, source = (_PRESETS / f"{name}.toml").read_text(encoding="utf-8"), f"preset {name}"
    else:
        path = Path(name)
        if not is_file(path):
            near = difflib.get_close_matches(name, preset_names(), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(
                f"scenario {_shown(name)}: no such file, and no preset of that name{hint}; "
                f"presets are {', '.join(preset_names())}"
            )
        try:
            text, source = path.read_text(encoding="utf-8"), name
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"scenario {name!r} cannot be read: {error}; give a UTF-8 TOML file") from error
    scenario = parse_scenario(text, source)
    return scenario if load is None else with_load(scenario, load)


def parse_scenario(text: str, source: str) -> Scenario:
    """A scenario from TOML text; `source` names it in errors.

    Raises:
        InputError: not TOML, or not a valid scenario; names the first field at fault.
    """
    try:
        data = tomllib.loads(text)
    except RecursionError as error:
        raise InputError(f"{source}: not valid TOML: arrays or tables too deep inside each other") from error
    except ValueError as error:  # TOMLDecodeError is one, and what Python says of a number of too many digits
        raise InputError(f"{source}: not valid TOML: {error}") from error
    return validate_scenario(data, source)


def with_load(scenario: Scenario, load: float) -> Scenario:
    """The same plant at another offered load.

    Raises:
        InputError: the scenario counts its requests (`uniform` arrivals), or its devices cannot have as many.
    """
    data = scenario.model_dump(mode="json", exclude_none=True)
    for other in ("rate_per_s", "probability"):
        data["arrivals"].pop(other, None)
    data["arrivals"]["load"] = load
    return validate_scenario(data, f"scenario {scenario.name}")


def load_warning(load: float) -> str | None:
    """What to say of an offered load that the servers cannot serve; None where they can."""
    if load < 1.0:
        return None
    return (
        f"offered load {load:.2f}: requests bring at least as much work as all servers together can do, so what the "
        "devices do not run themselves piles up without bound; lower arrivals.load or rate_per_s, or add servers"
    )


def digest(scenario: Scenario) -> str:
    """Identity of a scenario: twelve hexadecimal digits of the SHA-256 of its canonical JSON.

    Fields that have their defaults are left out, so that a new field of the schema changes no identity.
    """
    text = json.dumps(scenario.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_toml(scenario: Scenario) -> str:
    """The scenario as TOML text that :func:`parse_scenario` reads back to an equal scenario."""
    return tables_to_toml(scenario.model_dump(mode="json", exclude_none=True))


def tables_to_toml(tables: dict[str, Any]) -> str:
    """Tables of numbers, words and lists as TOML text."""
    lines: list[str] = []
    _write_table(lines, [], tables)
    return "\n".join(lines).strip() + "\n"


def validate_scenario(data: dict[str, Any], source: str) -> Scenario:
    """A scenario from the tables of a TOML file; `source` names it in errors.

    Raises:
        InputError: not a valid scenario; names the first field at fault.
    """
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first fault of a validation error as one line: field, value, remedy."""
    # An unknown key is named before what its absence causes elsewhere.
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    rest = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _keys_at(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}{rest}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{where} is missing; add it{rest}"
    if isinstance(fault.get("input"), dict) or not where:
        return f"{where + ': ' if where else ''}{message}{rest}"
    return f"{where} = {_shown(fault.get('input'))}: {message[:1].lower()}{message[1:]}{rest}"


def _shown(value: object) -> str:
    """A value as it is shown in a message: in full only if it is short."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at a location of the schema."""
    model: type[BaseModel] = Scenario
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def _write_table(lines: list[str], path: list[str], table: dict[str, Any]) -> None:
    inner: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            inner.append((key, value))
        else:
            lines.append(f"{key} = {_inline(value)}")
    for key, value in inner:
        name = ".".join([*path, key])
        for entry in value if isinstance(value, list) else [value]:
            lines.append(f"\n[[{name}]]" if isinstance(value, list) else f"\n[{name}]")
            _write_table(lines, [*path, key], entry)


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON leaves DEL as it is, TOML wants it escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_inline(entry) for entry in value) + "]"
    return repr(value)
