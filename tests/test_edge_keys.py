"""Keys: who may do what, and how soon a change counts."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmel.edge.keys import OPEN, Caller, Keys, add_key, read_keys, remove_key
from gmel.scenario.errors import InputError


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "device", "camera")
    assert key not in path.read_text("utf-8")
    assert path.stat().st_mode & 0o077 == 0
    keys = Keys(path)
    assert keys.caller(f"Bearer {key}") == Caller("device", "camera")
    for header in (None, "", key, f"Basic {key}", f"Bearer {key}x", "Bearer ", f"bearer {key}", "Bearer é"):
        assert keys.caller(header) is None


def test_one_key_for_each_name_and_role(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "device", "a")
    with pytest.raises(InputError, match="has a key"):
        add_key(path, "device", "a")
    add_key(path, "server", "a")
    with pytest.raises(InputError, match="role"):
        add_key(path, "king", "a")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        add_key(path, "device", "../a")
    with pytest.raises(InputError, match="has no key"):
        remove_key(path, "device", "b")
    assert len(read_keys(path)) == 2


def test_a_revoked_key_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "device", "a")
    keys = Keys(path)
    assert keys.caller(f"Bearer {key}") is not None
    remove_key(path, "device", "a")
    other = add_key(path, "device", "b")
    monkeypatch.setattr("gmel.edge.keys._LOOK_EVERY_S", -1.0)
    assert keys.caller(f"Bearer {key}") is None
    assert keys.caller(f"Bearer {other}") == Caller("device", "b")


@pytest.mark.parametrize("content", [None, "", "{", '{"keys": [{"role": "king"}]}', '{"keys": 3}', "[]"])
def test_while_the_file_cannot_be_read_the_keys_before_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "device", "a")
    keys = Keys(path)
    monkeypatch.setattr("gmel.edge.keys._LOOK_EVERY_S", -1.0)
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    assert keys.caller(f"Bearer {key}") == Caller("device", "a")
    assert keys.caller("Bearer other") is None
    with pytest.raises(InputError):
        read_keys(path)
    path.unlink(missing_ok=True)
    other = add_key(path, "device", "b")
    assert keys.caller(f"Bearer {other}") == Caller("device", "b")
    assert keys.caller(f"Bearer {key}") is None, "a file that can be read counts again"


def test_roles() -> None:
    device, server = Caller("device", "a"), Caller("server", "a")
    assert device.may("device", "a")
    assert device.may("device")
    assert not device.may("device", "b")
    assert not device.may("server", "a")
    assert server.may("server", "a")
    assert not server.may("device", "a")
    assert OPEN.may("device", "x")
    assert OPEN.may("server", "y")


@given(
    st.recursive(st.none() | st.text(max_size=4) | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_file_is_keys_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.getbasetemp() / f"keys-{os.getpid()}.json"
    path.write_text(json.dumps({"keys": [content]}), encoding="utf-8")
    with pytest.raises(InputError, match="not a file of keys"):
        read_keys(path)
