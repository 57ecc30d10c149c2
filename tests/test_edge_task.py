"""Tasks and heartbeats from JSON: a value, or one line that names the field."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.edge_plants import task

from gmel.edge.fleet import Beat, read_beat
from gmel.edge.task import Task, check_name, read_task
from gmel.scenario.errors import InputError

GOOD: dict[str, Any] = {"id": "a-1", "device": "camera.7", "model": "compose"}

# Whatever JSON can hold, and what Python's reader takes beyond it.
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, 2**63 - 1])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["a", "..", "a/b", "é", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TASK_FIELDS = st.sampled_from([*Task.__dataclass_fields__, "unknown", "\ud800"])
BEAT_FIELDS = st.sampled_from([*Beat.__dataclass_fields__, "unknown"])
ADDRESSES = st.sampled_from(
    ["http://", "http://[", "http://a:99999", "https://a b", "http://é", "ftp://a", "http://a:0"]
)


def test_what_is_left_out() -> None:
    found = read_task(GOOD)
    assert (found.images, found.steps, found.seed, found.deadline_s, found.expire, found.label) == (
        1,
        None,
        0,
        60.0,
        False,
        "",
    )
    assert read_task(found.as_json()) == found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""),
        ("id", ".."),
        ("id", "a/b"),
        ("id", "a" * 65),
        ("id", "a\n"),
        ("device", 7),
        ("model", None),
        ("label", "a\nb"),
        ("label", "a" * 65),
        ("images", 0),
        ("images", 257),
        ("images", 1.5),
        ("images", True),
        ("steps", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("deadline_s", 0),
        ("deadline_s", float("nan")),
        ("deadline_s", float("inf")),
        ("deadline_s", 10**400),
        ("deadline_s", "1"),
        ("expire", 1),
        ("size_bit", -1.0),
        ("links_bps", {"a": 0.5}),
        ("links_bps", {"a/b": 1e6}),
        ("links_bps", {"a": 10**400}),
        ("links_bps", []),
        ("links_bps", {f"s{number}": 1e6 for number in range(257)}),
        ("colour", "red"),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{field}"):
        read_task({**GOOD, field: value})


@pytest.mark.parametrize("field", ["id", "device", "model"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: missing$"):
        read_task({name: value for name, value in GOOD.items() if name != field})


@given(st.dictionaries(TASK_FIELDS, ANYTHING, max_size=6), st.booleans())
@example({"deadline_s": 10**400}, True)
@example({"links_bps": {"a": 10**400}}, True)
def test_any_object_is_a_task_or_an_input_error(content: dict[str, Any], good: bool) -> None:
    try:
        found = read_task({**GOOD, **content} if good else content)
    except InputError as error:
        assert "\n" not in str(error)
        str(error).encode()
        return
    # What is a task survives the ledger and a client's JSON reader, and keeps its digest.
    again = read_task(json.loads(json.dumps(found.as_json(), allow_nan=False)))
    assert again == found
    assert again.digest == found.digest


@given(ANYTHING)
def test_anything_else_is_an_input_error(content: object) -> None:
    if isinstance(content, dict) and set(content) >= set(GOOD):
        return
    with pytest.raises(InputError):
        read_task(content)


@given(st.dictionaries(BEAT_FIELDS, ANYTHING | ADDRESSES, max_size=5))
@example({"speed": 10**400})
@example({"speed": 1e-300})
@example({"url": "http://["})
@example({"url": "http://a:99999"})
def test_any_object_is_a_heartbeat_or_an_input_error(content: dict[str, Any]) -> None:
    try:
        found = read_beat(content)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert found.gpus >= 1
    assert found.speed == 0.0 or found.speed >= 1e-6
    json.dumps([found.speed, found.memory_gb, found.foreign_s], allow_nan=False)


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a:99999", "http://a:x", "https://a b", "ftp://a", 7])
def test_an_address_that_cannot_be_called_is_refused(url: object) -> None:
    with pytest.raises(InputError, match=r"^url: "):
        read_beat({"url": url})


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://line-a", "http://[::1]:8420", None])
def test_addresses(url: str | None) -> None:
    assert read_beat({"url": url}).url == url


def test_the_digest_tells_tasks_apart() -> None:
    assert task("a").digest == task("a").digest
    assert (
        len({task("a").digest, task("b").digest, task("a", seed=1).digest, task("a", links_bps={"x": 1}).digest}) == 4
    )


def test_a_way_that_is_not_said_is_free() -> None:
    found = task(size_bit=100.0, links_bps={"near": 50.0})
    assert (found.upload_s("near"), found.upload_s("far")) == (2.0, 0.0)


@pytest.mark.parametrize("name", [".", "..", "a/b", "-a", "a b", "", "é", "a\x00", None, 3])
def test_names_that_could_lead_elsewhere(name: object) -> None:
    with pytest.raises(InputError, match=r"^what: "):
        check_name(name, "what")


def test_whole_numbers_may_be_written_as_json_writes_others() -> None:
    assert read_task({**GOOD, "images": 2.0, "seed": 1e3}) == read_task({**GOOD, "images": 2, "seed": 1000})
