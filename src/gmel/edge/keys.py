"""Keys of devices, servers and operators: only their hashes are kept."""

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from gmel.edge.task import check_name
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file

__all__ = ["OPEN", "Caller", "Keys", "Role", "add_key", "read_keys", "remove_key"]

Role = Literal["device", "server", "operator"]
_ROLES = ("device", "server", "operator")
_LOOK_EVERY_S = 1.0
_log = logging.getLogger("gmel.keys")


@dataclass(frozen=True)
class Caller:
    """Who calls. A device acts for itself alone, a server speaks for itself alone, an operator may do everything."""

    role: Role
    name: str

    def may(self, role: Role, name: str | None = None) -> bool:
        """Whether the caller may act in a role, as the one of that name."""
        return self.role == "operator" or (self.role == role and name in (None, self.name))


OPEN = Caller("operator", "anybody")
"""Everybody, where there are no keys; only on this machine."""


class Keys:
    """The keys of a file. A change of the file (a key added or revoked) counts within a second; while it cannot be
    read, the keys that were known before count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = read_keys(path)
        self._changed = self._stamp()
        self._looked = time.monotonic()

    def caller(self, header: str | None) -> Caller | None:
        """Who shows this `Authorization` header; None for nobody that is known."""
        if time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._look()
        if header is None or not header.startswith("Bearer "):
            return None
        # Keys are 256 random bits: their hash needs neither salt nor slowness, and finding it tells nothing of a key.
        return self._known.get(_hash(header.removeprefix("Bearer ").strip()))

    def _look(self) -> None:
        self._looked = time.monotonic()
        stamp = self._stamp()
        if stamp == self._changed:
            return
        self._changed = stamp
        try:
            self._known = read_keys(self.path)
        except InputError as error:
            _log.warning("%s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


def read_keys(path: Path) -> dict[str, Caller]:
    """Callers by the hash of their key.

    Raises:
        InputError: not readable or not a file of keys.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Caller] = {}
        for each in content["keys"]:
            if each["role"] not in _ROLES:
                raise ValueError(f"role {each['role']!r}")
            found[str(each["sha256"])] = Caller(cast("Role", each["role"]), check_name(each["name"], "name"))
        return found
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); add a key with `gmel key add`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of keys ({error}); make a new one with `gmel key add`") from error


def add_key(path: Path, role: Role, name: str) -> str:
    """Makes a key and writes its hash; the key itself is returned and kept nowhere.

    Raises:
        InputError: a bad name, one that has a key already, or a file that is no file of keys.
    """
    check_name(name, "name")
    if role not in _ROLES:
        raise InputError(f"role {role!r}: must be one of {', '.join(_ROLES)}")
    known = read_keys(path) if path.exists() else {}
    if any(caller == Caller(role, name) for caller in known.values()):
        raise InputError(f"{role} {name}: has a key; revoke it first")
    key = f"gmel_{secrets.token_urlsafe(32)}"
    _write(path, {**known, _hash(key): Caller(role, name)})
    return key


def remove_key(path: Path, role: Role, name: str) -> None:
    """Revokes a key.

    Raises:
        InputError: there is none.
    """
    known = read_keys(path)
    left = {hashed: caller for hashed, caller in known.items() if caller != Caller(role, name)}
    if len(left) == len(known):
        raise InputError(f"{role} {name}: has no key in {path}")
    _write(path, left)


def _write(path: Path, known: Mapping[str, Caller]) -> None:
    keys = [{"role": caller.role, "name": caller.name, "sha256": hashed} for hashed, caller in known.items()]
    replace_file(path, (json.dumps({"keys": keys}, indent=1) + "\n").encode())
    path.chmod(0o600)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
