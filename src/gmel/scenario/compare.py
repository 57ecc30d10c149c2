"""Two scenarios field by field."""

from dataclasses import dataclass
from typing import Any, cast

from gmel.scenario.schema import Scenario

__all__ = ["ABSENT", "Difference", "differences"]


class _Absent:
    def __repr__(self) -> str:
        return "-"


ABSENT = _Absent()
"""Stands for a field, server or model that one of the two does not have."""


@dataclass(frozen=True)
class Difference:
    """A field with both its values; `ABSENT` where one has it not."""

    field: str
    a: Any
    b: Any


def differences(a: Scenario, b: Scenario) -> list[Difference]:
    """Fields in which two scenarios differ, defaults filled in, in the order of the file.

    Servers and models are matched by name (`servers[l4].speed`), and another order of the same names is a difference of
    its own (`servers.order`), since options are numbered by it. Other lists are compared as a whole.
    """
    found: list[Difference] = []
    _compare(found, "", a.model_dump(mode="json"), b.model_dump(mode="json"))
    return found


def _compare(found: list[Difference], path: str, a: Any, b: Any) -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        one, other = cast("dict[str, Any]", a), cast("dict[str, Any]", b)
        for key in [*one, *[key for key in other if key not in one]]:
            _compare(found, f"{path}.{key}" if path else key, one.get(key, ABSENT), other.get(key, ABSENT))
    elif path in ("servers", "models") and isinstance(a, list) and isinstance(b, list):
        _compare_named(found, path, cast("list[dict[str, Any]]", a), cast("list[dict[str, Any]]", b))
    elif a != b:
        found.append(Difference(path, a, b))


def _compare_named(found: list[Difference], path: str, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    one, other = ({entry["name"]: entry for entry in entries} for entries in (a, b))
    for name in [*one, *[name for name in other if name not in one]]:
        _compare(found, f"{path}[{name}]", one.get(name, ABSENT), other.get(name, ABSENT))
    shared = [[name for name in names if name in one and name in other] for names in (one, other)]
    if shared[0] != shared[1]:
        found.append(Difference(f"{path}.order", shared[0], shared[1]))
