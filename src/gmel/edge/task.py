"""A task of a device, the states of its life, and how a request that is not one is told.

No pydantic and no web framework here: a device reads this file with the standard library alone.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from gmel.scenario.errors import InputError

__all__ = [
    "ACCEPTED",
    "CANCELLED",
    "DONE",
    "EXPIRED",
    "FAILED",
    "FINAL",
    "LEASED",
    "MOST_INPUT_BYTES",
    "MOST_INPUT_PIXELS",
    "STATES",
    "Task",
    "addresses",
    "check_digest",
    "check_name",
    "read_task",
]

ACCEPTED, LEASED, DONE = "accepted", "leased", "done"
FAILED, EXPIRED, CANCELLED = "failed", "expired", "cancelled"
FINAL = frozenset({DONE, FAILED, EXPIRED, CANCELLED})
"""States that never change again."""
STATES = (ACCEPTED, LEASED, DONE, FAILED, EXPIRED, CANCELLED)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
"""Of ids, devices, models and servers: none is `.` or `..`, none holds a slash, so each may be part of an address."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

MOST_INPUT_BYTES = 32 * 2**20
"""Of a photo that a task is drawn on."""
MOST_INPUT_PIXELS = 25_000_000
"""Of the same: a large inspection camera. It is unpacked at the gateway, and at each server that draws on it."""

_MOST_IMAGES = 256
_MOST_STEPS = 1000
_MOST_LINKS = 256


@dataclass(frozen=True)
class Task:
    """What a device asks for.

    Attributes:
        id: chosen by the client; the same id is the same task however often it is sent.
        device: who asks.
        model: name of the generator.
        label: class of the defect to draw; empty for the first one that the generator knows.
        images: how many.
        steps: denoising steps; none for those of the generator.
        seed: of the samples: the same task gives the same photos on any server.
        deadline_s: seconds from acceptance in which the result is wanted.
        expire: whether it is worth nothing after the deadline: then it is not begun any more.
        size_bit: bits that go up to the server.
        links_bps: what the device estimates of its link to servers by name; where none is said, the way is free.
        input: name of a photo at the gateway (its SHA-256) to draw on; empty for none.
    """

    id: str
    device: str
    model: str
    label: str = ""
    images: int = 1
    steps: int | None = None
    seed: int = 0
    deadline_s: float = 60.0
    expire: bool = False
    size_bit: float = 0.0
    links_bps: Mapping[str, float] = field(default_factory=dict[str, float])
    input: str = ""

    def as_json(self) -> dict[str, Any]:
        """Every field, for a body or the ledger; `input` only where there is one, so that the digests of tasks in older
        ledgers stay what they are."""
        fields = {**vars(self), "links_bps": dict(self.links_bps)}  # `asdict` copies deeply, and slowly
        if not self.input:
            del fields["input"]
        return fields

    @property
    def digest(self) -> str:
        """SHA-256 of all fields: tells the same task sent again from another one under the same id."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def upload_s(self, server: str) -> float:
        """Seconds for its bits to a server, by the device's own estimate."""
        rate = self.links_bps.get(server)
        return 0.0 if rate is None else self.size_bit / rate


def check_name(value: object, what: str) -> str:
    """A name that may be part of a path or an address.

    Raises:
        InputError: empty, too long, or with other characters.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InputError(
            f"{what}: must be 1 to 64 letters, digits, '.', '_', '+' or '-', beginning with one of the first"
        )
    return value


def check_digest(value: object, what: str) -> str:
    """The name of an input: the SHA-256 of its bytes.

    Raises:
        InputError: something else.
    """
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise InputError(f"{what}: must be a SHA-256, 64 hexadecimal digits in lower case")
    return value


def addresses(words: str) -> dict[str, str]:
    """Addresses by name, from `NAME=URL,NAME=URL`.

    Raises:
        InputError: anything else.
    """
    found: dict[str, str] = {}
    for word in filter(None, (each.strip() for each in words.split(","))):
        name, _, url = word.partition("=")
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{word[:80]!r}: must be NAME=URL, for instance line-a=http://127.0.0.1:8431")
        found[check_name(name, "name")] = url.rstrip("/")
    if not found:
        raise InputError("servers: NAME=URL,NAME=URL; none is given")
    return found


def read_task(content: object) -> Task:
    """A task from the JSON of a request.

    Raises:
        InputError: a field that is missing, unknown, or out of range, by name.
    """
    if not isinstance(content, dict):
        raise InputError("task: must be a JSON object")
    said = cast("dict[str, Any]", content)
    known = {each.name for each in fields(Task)}
    unknown = sorted(set(said) - known)
    if unknown:
        raise InputError(f"{_shown(unknown[0])}: no such field; known are {', '.join(sorted(known))}")
    for name in ("id", "device", "model"):
        if name not in said:
            raise InputError(f"{name}: missing")
        check_name(said[name], name)
    label = said.get("label", "")
    if not isinstance(label, str) or len(label) > 64 or not label.isprintable():
        raise InputError("label: must be up to 64 printable characters")
    steps = said.get("steps")
    return Task(
        id=said["id"],
        device=said["device"],
        model=said["model"],
        label=label,
        images=_whole(said, "images", 1, 1, _MOST_IMAGES),
        steps=None if steps is None else _whole(said, "steps", 1, 1, _MOST_STEPS),
        seed=_whole(said, "seed", 0, 0, 2**63 - 1),
        deadline_s=_number(said, "deadline_s", 60.0, 1e-3, 1e7),
        expire=_flag(said, "expire"),
        size_bit=_number(said, "size_bit", 0.0, 0.0, 1e13),
        links_bps=_links(said.get("links_bps", {})),
        input=check_digest(said["input"], "input") if said.get("input", "") != "" else "",
    )


def _links(value: object) -> dict[str, float]:
    if not isinstance(value, dict) or len(cast("dict[Any, Any]", value)) > _MOST_LINKS:
        raise InputError(f"links_bps: must be an object of server names and bits per second, at most {_MOST_LINKS}")
    links = cast("dict[str, Any]", value)
    return {
        check_name(name, "links_bps"): _number({f"links_bps.{name}": rate}, f"links_bps.{name}", 1.0, 1.0, 1e13)
        for name, rate in links.items()
    }


def _whole(said: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = said.get(name, default)
    if isinstance(value, float) and value.is_integer():  # JSON has one kind of number
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name}: must be a whole number from {low} to {high}")
    return value


def _number(said: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = said.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(_float(value)):
        raise InputError(f"{name}: must be a number")
    if not low <= value <= high:
        raise InputError(f"{name}: must be from {low:g} to {high:g}")
    return float(value)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any length
        return math.inf


def _flag(said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name}: must be true or false")
    return value


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:40]
