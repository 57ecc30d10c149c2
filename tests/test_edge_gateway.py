"""The routes of a gateway: tasks in, results out, who may do what, and every way to be refused."""

import asyncio
import base64
import json
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from tests.edge_gateways import Inside, gateway_of
from tests.edge_plants import ran, task, until

from gmel.edge.engines.engine import Answer, Told
from gmel.edge.keys import add_key, remove_key
from gmel.edge.ledger import LedgerError
from gmel.edge.task import Task


def test_a_task_from_acceptance_to_result(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside:
            answer = await inside.submit("t1")
            assert answer.status_code == 202
            assert answer.json()["new"] is True
            entry = await inside.entry("t1")
            assert entry["state"] == "done"
            assert entry["record"]["attempt"] == 1
            result = await inside.client.get("/v1/tasks/t1/result")
            assert result.content == b"t1"
            assert result.headers["content-type"].startswith("text/plain")
            assert result.headers["content-disposition"] == "attachment"
            again = await inside.submit("t1")
            assert (again.status_code, again.json()["new"], again.json()["state"]) == (200, False, "done")
            other = await inside.submit("t1", seed=2)
            assert other.status_code == 409
            assert (await inside.client.get("/v1/tasks/t2/result")).status_code == 404
            assert (await inside.client.get("/v1/tasks/t1/preview.png")).status_code == 404
            waited = await inside.client.post(
                "/v1/tasks", params={"wait_s": 20}, json={"id": "t3", "device": "d", "model": "part"}
            )
            assert (waited.status_code, waited.json()["state"]) == (200, "done")

    ran(steps())


def test_the_same_id_at_the_same_moment_runs_once(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside:
            answers = await asyncio.gather(*(inside.submit("t") for _ in range(20)))
            assert sorted(answer.status_code for answer in answers) == [200] * 19 + [202]
            await inside.all_ended()
            assert inside.engine.submitted in ([("a", "t")], [("b", "t")])

    ran(steps())


@pytest.mark.parametrize("size", [0, 1, 16 * 1024, 16 * 1024 + 1, 2_000_000])
def test_results_of_any_size(tmp_path: Path, size: int) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:

            async def large(each: Task, told: Told) -> Answer:
                return Answer(b"\x01" * size)

            inside.engine.behave["a"] = large
            await inside.submit("t")
            assert (await inside.entry("t"))["result_bytes"] == size
            result = await inside.client.get("/v1/tasks/t/result")
            assert result.status_code == 200
            assert result.content == b"\x01" * size

    ran(steps())


def test_pages_are_complete_and_in_order(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside:
            for number in range(25):
                await inside.submit(f"t{number:02d}", device="x" if number % 5 == 0 else "y")
            await inside.all_ended()
            seen: list[str] = []
            before: dict[str, int] = {}
            while True:
                page = (await inside.client.get("/v1/tasks", params={"limit": 7, **before})).json()
                seen += [entry["id"] for entry in page["tasks"]]
                if page["next"] is None:
                    break
                before = {"before": page["next"]}
            assert seen == [f"t{number:02d}" for number in reversed(range(25))]
            for params, count in [({"device": "x"}, 5), ({"state": "done"}, 25), ({"state": "failed"}, 0)]:
                assert len((await inside.client.get("/v1/tasks", params=params)).json()["tasks"]) == count
            for bad in ({"limit": 0}, {"limit": 1001}, {"state": "dead"}, {"before": -1}, {"before": 2**70}):
                assert (await inside.client.get("/v1/tasks", params=bad)).status_code in (400, 422), bad

    ran(steps())


def hanging(inside: Inside, *names: str) -> asyncio.Event:
    """Servers that hold their tasks until the event."""
    free = asyncio.Event()

    async def hang(each: Task, told: Told) -> Answer:
        told("running", {})
        await free.wait()
        return Answer(each.id.encode())

    for name in names:
        inside.engine.behave[name] = hang
    return free


def test_cancelled_wherever_it_is(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            free = hanging(inside, "a")
            for number in range(8):  # three at the server, the others in its lane
                await inside.submit(f"t{number}")
            await until(lambda: len(inside.engine.submitted) == 3, "three are sent")
            for name in ("t0", "t7"):
                answer = await inside.client.delete(f"/v1/tasks/{name}")
                assert answer.json()["state"] == "cancelled"
                assert (await inside.client.delete(f"/v1/tasks/{name}")).json()["state"] == "cancelled"
            assert inside.engine.cancelled == [("a", "t0")]
            free.set()
            await inside.all_ended()
            assert (await inside.client.delete("/v1/tasks/t1")).json()["state"] == "done", "too late"
            assert (await inside.client.delete("/v1/tasks/none")).status_code == 404
            counts = inside.gateway.ledger.counts()
            assert counts == {"cancelled": 2, "done": 6}
            assert (await inside.client.get("/v1/tasks/t0/result")).status_code == 409
            assert inside.gateway.fleet.servers["a"].flights == {}
            metrics = (await inside.client.get("/metrics")).text
            assert 'gmel_tasks_ended_total{state="cancelled"} 2.0' in metrics

    ran(steps())


def test_expired_tasks_are_not_begun(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            free = hanging(inside, "a")
            for number in range(3):
                await inside.submit(f"t{number}")
            await inside.submit("late", deadline_s=0.05, expire=True)
            await inside.submit("patient", deadline_s=0.05)
            await asyncio.sleep(0.2)
            free.set()
            await inside.all_ended()
            assert (await inside.entry("late"))["state"] == "expired"
            assert (await inside.entry("patient"))["state"] == "done"
            assert (await inside.entry("patient"))["record"]["status"] == "late"
            assert ("a", "late") not in inside.engine.submitted
            # Also of tasks that no server can take any more.
            free.clear()
            for number in range(3):
                await inside.submit(f"u{number}")
            await inside.submit("parked", deadline_s=0.05, expire=True)
            inside.gateway.fleet.servers["a"].heard -= 100.0
            assert (await inside.entry("parked"))["state"] == "expired"

    ran(steps())


def test_busy_is_not_dead(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", most_open=3) as inside:
            free = hanging(inside, "a")
            for number in range(3):
                assert (await inside.submit(f"t{number}")).status_code == 202
            busy = await inside.submit("more")
            assert busy.status_code == 429
            assert 1 <= int(busy.headers["retry-after"]) <= 60
            assert (await inside.submit("t1")).status_code == 200, "what was accepted is known, however busy"
            assert (await inside.submit("x", model="other-thing")).status_code in (404, 429)
            assert (await inside.client.get("/readyz")).status_code == 200
            inside.gateway.fleet.servers["a"].heard -= 100.0
            dead = await inside.submit("more")
            assert dead.status_code == 503
            assert dead.headers["retry-after"]
            assert (await inside.client.get("/readyz")).status_code == 503
            assert (await inside.submit("t1")).status_code == 200
            await inside.beat("a", models=["other"])
            assert (await inside.submit("more")).status_code == 404
            await inside.beat("a")
            free.set()
            await inside.all_ended()
            assert (await inside.submit("more")).status_code == 202

    ran(steps())


def test_a_device_that_floods_is_told_to_wait(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", rate_per_s=0.001, burst=3) as inside:
            statuses = [(await inside.submit(f"t{number}")).status_code for number in range(5)]
            assert statuses == [202, 202, 202, 429, 429]
            assert (await inside.submit("other", device="e")).status_code == 202
            assert (await inside.submit("t0")).status_code == 200

    ran(steps())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 60_000, 400),
        (b'{"id": "a"}', 400),
        (b'{"id": "a", "device": "d", "model": "part", "deadline_s": 1' + b"0" * 400 + b"}", 400),
        (b'{"id": "a", "device": "d", "model": "part", "deadline_s": NaN}', 400),
        (b'{"id": "a", "device": "d", "model": "part", "x": 1}', 400),
        (b'{"id": "../a", "device": "d", "model": "part"}', 400),
        (b" " * (64 * 1024 + 1), 413),
    ],
)
def test_bodies_that_are_none(tmp_path: Path, body: bytes, status: int) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            for method, path in (("POST", "/v1/tasks"), ("PUT", "/v1/servers/a"), ("PUT", "/v1/policy")):
                answer = await inside.client.request(method, path, content=body)
                if path == "/v1/servers/a" and body == b"{}":
                    continue
                assert answer.status_code == status, path
                assert answer.json()["error"]
            assert inside.gateway.ledger.counts() == {}

    ran(steps())


def test_a_body_without_a_length_is_read_no_further_than_it_may_be(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            given = 0

            async def endless() -> Any:
                nonlocal given
                while True:
                    given += 4096
                    yield b" " * 4096

            answer = await inside.client.post("/v1/tasks", content=endless())
            assert answer.status_code == 413
            assert given < 2**20

    ran(steps())


def test_a_body_that_drips_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.bodies._PATIENCE_S", 0.2)

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:

            async def drips() -> Any:
                for _ in range(400):
                    yield b" "
                    await asyncio.sleep(0.05)

            answer = await inside.client.post("/v1/tasks", content=drips())
            assert answer.status_code == 408
            assert "not here after" in answer.json()["error"]

    ran(steps())


def test_a_disk_that_takes_nothing_is_503_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.dispatch._PATIENCE_S", 0.02)

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            free = hanging(inside, "a")
            await inside.submit("before")
            await until(lambda: inside.engine.submitted, "sent")
            writer = inside.gateway.ledger._writer
            writer.execute("PRAGMA query_only = ON")  # takes no write, as a full disk
            free.set()
            answer = await inside.submit("during")
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert (await inside.client.get("/readyz")).status_code == 503
            assert (await inside.client.get("/healthz")).status_code == 200
            assert (await inside.entry("before", 0.0))["state"] != "done"
            writer.execute("PRAGMA query_only = OFF")
            assert (await inside.entry("before"))["state"] == "done", "the result was kept until there was room"
            assert inside.engine.submitted == [("a", "before")], "and not made again"
            assert inside.gateway.ledger.get("during") is None
            assert (await inside.submit("during")).status_code == 202

    ran(steps())


def test_who_watches_sees_what_happens(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            watcher = inside.gateway.watch()
            await inside.submit("t")
            await inside.all_ended()
            events = [json.loads(watcher.get_nowait()) for _ in range(watcher.qsize())]
            assert [event["event"] for event in events if event.get("id") == "t"] == ["decided", "done"]
            # One that does not read holds no more than a thousand, and delays nobody.
            for number in range(1200):
                inside.gateway.tell({"event": "x", "number": number})
            assert watcher.qsize() == 1000
            inside.gateway.leave(watcher)
            for _ in range(100):
                inside.gateway.watch()
            assert (await inside.client.get("/v1/events")).status_code == 429

    ran(steps())


def test_who_watches_and_leaves_at_once_is_forgotten(tmp_path: Path) -> None:
    """Else a hundred pages that were opened and closed would lock the operator out."""

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            route = next(each for each in inside.app.routes if getattr(each, "path", "") == "/v1/events")
            for _ in range(150):  # an answer that is never read from: its reader left before the first line
                request = Request({"type": "http", "headers": []})
                assert (await route.endpoint(request)).status_code == 200  # type: ignore[attr-defined]
            assert inside.gateway._watchers == set()

    ran(steps())


def test_policies_over_the_wire(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside:
            put, post = inside.client.put, inside.client.post
            assert (await put("/v1/policy", json={"name": "round-robin"})).json()["current"]["name"] == "round-robin"
            assert (await put("/v1/policy", json={"name": "nobody"})).status_code == 400
            assert (await put("/v1/policy", json={"name": None})).status_code == 400
            assert (await put("/v1/policy", json={"name": "x", "shadow": 1})).status_code == 400
            shadow = (await put("/v1/policy", json={"name": "power-of-two", "shadow": True})).json()
            assert shadow["shadow"]["name"] == "power-of-two"
            assert shadow["current"]["name"] == "round-robin"
            for number in range(4):
                await inside.submit(f"t{number}")
            await inside.all_ended()
            assert (await inside.client.get("/v1/policy")).json()["shadow"]["seen"] == 4
            back = (await post("/v1/policy/rollback")).json()
            assert back["current"]["name"] == "earliest-finish"
            assert (await put("/v1/policy", json={"name": None, "shadow": True})).json()["shadow"] is None

    ran(steps())


def test_who_may_do_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.keys._LOOK_EVERY_S", -1.0)
    path = tmp_path / "keys.json"
    names = (("device", "d"), ("device", "e"), ("server", "a"), ("operator", "o"))
    keys = {name: add_key(path, role, name) for role, name in names}  # type: ignore[arg-type]

    async def steps() -> None:
        async with gateway_of(tmp_path / "g", keys=path) as inside:

            async def asked(who: str | None, method: str, path: str, **more: Any) -> int:
                headers = {} if who is None else {"Authorization": f"Bearer {keys.get(who, who)}"}
                return (await inside.client.request(method, path, headers=headers, **more)).status_code

            body = {"url": None}
            assert await asked("a", "PUT", "/v1/servers/a", json=body) == 200
            assert await asked("a", "PUT", "/v1/servers/b", json=body) == 403
            assert await asked("d", "PUT", "/v1/servers/d", json=body) == 403
            assert await asked("o", "PUT", "/v1/servers/b", json=body) == 200
            mine = {"id": "t", "device": "d", "model": "part"}
            assert await asked("e", "POST", "/v1/tasks", json=mine) == 403
            assert await asked("a", "POST", "/v1/tasks", json=mine) == 403
            assert await asked("d", "POST", "/v1/tasks", json=mine) == 202
            for who, status in (("d", 200), ("o", 200), ("e", 404), ("a", 404), (None, 401), ("wrong", 401)):
                assert await asked(who, "GET", "/v1/tasks/t") == status, who
            assert await asked("e", "DELETE", "/v1/tasks/t") == 404
            assert await asked("e", "GET", "/v1/tasks/t/result") == 404
            headers = {"Authorization": f"Bearer {keys['e']}"}
            assert (await inside.client.get("/v1/tasks?device=d", headers=headers)).json()["tasks"] == []
            for path_ in ("/v1/state", "/v1/records", "/metrics", "/v1/policy"):
                assert [await asked(who, "GET", path_) for who in ("o", "d", "a", None)] == [200, 403, 403, 401]
            assert await asked("d", "PUT", "/v1/policy", json={"name": "round-robin"}) == 403
            assert await asked("d", "GET", "/v1/events") == 403
            assert await asked("a", "POST", "/v1/servers/b/fetch", json={"wait_s": 0}) == 403
            assert await asked("a", "PUT", "/v1/servers/b/tasks/t", json={"event": "gone"}) == 403
            assert await asked(None, "GET", "/healthz") == 200
            remove_key(path, "device", "d")
            assert await asked("d", "GET", "/v1/tasks/t") == 401, "revoked"
            answer = await inside.client.get("/v1/plant")
            assert answer.headers["www-authenticate"] == "Bearer"

    ran(steps())


def test_tasks_without_an_end_are_taken_up_again(tmp_path: Path) -> None:
    """A thousand of them, as after a kill; none is asked for twice, none is forgotten."""

    names = [f"t{number}" for number in range(1000)]

    async def first() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            hanging(inside, "a")
            for first in range(0, 1000, 100):
                answers = await asyncio.gather(*(inside.submit(name) for name in names[first : first + 100]))
                assert {answer.status_code for answer in answers} == {202}

    async def second() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside, inside.beating("a", "b"):
            await inside.all_ended()
            assert inside.gateway.ledger.counts() == {"done": 1000}
            assert sorted(name for _, name in inside.engine.submitted) == sorted(names)
            assert {server for server, _ in inside.engine.submitted} == {"a", "b"}

    ran(first())
    ran(second(), 120.0)


def test_numbers_that_are_none_do_not_get_into_records(tmp_path: Path) -> None:
    """What a server says once would stay in the ledger and break every list of tasks."""

    async def steps() -> None:
        async with gateway_of(tmp_path) as inside:
            await inside.beat("p", url=None)
            await inside.submit("t")
            fetched = (await inside.client.post("/v1/servers/p/fetch", json={"room": 1, "wait_s": 5})).json()
            assert [each["task"]["id"] for each in fetched["tasks"]] == ["t"]
            put = inside.client.put
            data = base64.b64encode(b"x").decode()
            for wrong in ("NaN", "Infinity", "1" + "0" * 400, '"1"', "true", "null", "[]"):
                body = f'{{"event": "done", "data": "{data}", "service_s": {wrong}}}'
                assert (await put("/v1/servers/p/tasks/t", content=body)).status_code == 400, wrong
            for body in ('{"event": "done", "data": "é"}', '{"event": "done", "data": 5}', "{}", '{"event": 3}'):
                assert (await put("/v1/servers/p/tasks/t", content=body)).status_code == 400, body
            for share in ("NaN", "Infinity", "1" + "0" * 400, "-1", '"x"'):
                body = f'{{"event": "progress", "share": {share}}}'
                assert (await inside.client.post("/v1/servers/p/tasks/t", content=body)).status_code == 200
                assert (await inside.client.get("/v1/tasks/t")).json()["progress"] == 0.0
            kind = 'text/html"\r\nx: y'
            answer = await put("/v1/servers/p/tasks/t", json={"event": "done", "data": data, "kind": kind})
            assert answer.json() == {"wanted": True}
            assert (await inside.entry("t"))["state"] == "done"
            result = await inside.client.get("/v1/tasks/t/result")
            assert result.headers["content-type"] == "application/octet-stream"
            assert (await inside.client.get("/v1/tasks")).status_code == 200

    ran(steps())


def test_a_wall_clock_that_jumps_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            for number, seconds in enumerate((0.0, 3e8, -3e8, 86_400.0, -1e9)):
                free = hanging(inside, "a")
                await inside.submit(f"t{number}", deadline_s=50.0, expire=True)
                jump[0] = seconds
                await inside.beat("a")
                await asyncio.sleep(0.02)
                free.set()
                entry = await inside.entry(f"t{number}")
                assert entry["state"] == "done"
                assert entry["attempt"] == 1
                assert 0.0 < entry["record"]["latency_s"] < 40.0
                assert entry["record"]["status"] == "done"
            assert inside.gateway.fleet.servers["a"].alive(time.monotonic())

    ran(steps())


def test_the_ledger_is_told_from_other_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:

            def broken(*_: Any) -> Any:
                raise LedgerError("disk I/O error")

            monkeypatch.setattr(inside.gateway.ledger, "_read", broken)
            answer = await inside.client.get("/v1/tasks/t")
            assert answer.status_code == 503
            assert "disk I/O error" in answer.json()["error"]

    ran(steps())


# Bodies and parameters that are drawn from what OpenAPI says, and from anything.

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, "a", "t0", "part", "done", "round-robin", ""])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_WORDS = ("id", "device", "model", "name", "shadow", "url", "speed", "gpus", "resident", "models", "room", "wait_s")
_KEYS = st.sampled_from([*_WORDS, *task().as_json(), "event", "data", "share", "error", "bytes", "kind", "service_s"])
_TEXT = st.sampled_from(
    ["t0", "a", "done", "x y", "..", "%2e%2e", "0", "-1", "nan", "1e400", "9" * 30, "é", "\x00", ""]
)


def _like(schema: dict[str, Any]) -> st.SearchStrategy[Any]:  # noqa: PLR0911
    """Values that a schema allows, as far as it says so."""
    if "properties" in schema:
        required = {name: _like(schema["properties"][name]) for name in schema.get("required", ())}
        rest = {name: _like(each) for name, each in schema["properties"].items() if name not in required}
        return st.fixed_dictionaries(required, optional=rest)
    kind = schema.get("type")
    if kind == ["integer", "null"]:
        return st.none() | st.integers(schema["minimum"], schema["maximum"])
    if kind == "integer":
        return st.integers(schema.get("minimum", -10), schema.get("maximum", 2**40))
    if kind == "number":
        return st.floats(schema.get("minimum", -10.0), schema.get("maximum", 1e9))
    if kind == "boolean":
        return st.booleans()
    if kind == "string":
        if "pattern" in schema:
            return st.sampled_from(["t0", "part", "a"]) | st.from_regex(schema["pattern"], fullmatch=True)
        return st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=schema.get("maxLength", 20))
    if kind == "object":
        return st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), st.floats(1.0, 1e9), max_size=3)
    return _JSON


class Described(dict[str, Any]):
    """OpenAPI, told in a word where a test fails."""

    def __repr__(self) -> str:
        return "the description"


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> "Described":
    async def read() -> Described:
        async with gateway_of(tmp_path_factory.mktemp("openapi"), "a") as inside:
            return Described((await inside.client.get("/openapi.json")).json())

    return ran(read())


def test_the_description_names_every_route_and_every_field_of_a_task(described: "Described") -> None:
    assert len(described["paths"]) >= 14
    body = described["paths"]["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {each.name for each in fields(Task)}


@settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],  # to shrink a whole conversation takes minutes and shows little
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_every_answer_is_one_that_is_described(
    tmp_path_factory: pytest.TempPathFactory, described: "Described", data: st.DataObject
) -> None:
    """Whatever is sent, no route answers with a status that its description lacks, and none with 500."""
    routes = [(path, method) for path, found in described["paths"].items() for method in found]

    async def steps() -> None:
        async with gateway_of(tmp_path_factory.mktemp("fuzz"), "a") as inside:
            await inside.beat("p", url=None)
            await inside.submit("t0")
            for path, method in routes:
                if path == "/v1/events":
                    continue  # it has no end
                for _ in range(2):
                    await _ask(inside, described, path, method, data)

    ran(steps(), 120.0)


async def _ask(inside: Inside, described: "Described", path: str, method: str, data: st.DataObject) -> None:
    route = described["paths"][path][method]
    address, params = path, dict[str, str]()
    for parameter in route.get("parameters", ()):
        value = data.draw(_TEXT)
        if parameter["in"] == "path":
            address = address.replace(f"{{{parameter['name']}}}", quote(value or "x", safe=""))
        elif data.draw(st.booleans()):
            params[parameter["name"]] = (
                value
                if parameter["name"] != "wait_s"
                else data.draw(st.sampled_from(["0", "0.01", "nan", "-1", "1e9", "x"]))
            )
    content: bytes | None = None
    if method in ("post", "put"):
        schema = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        drawn = st.dictionaries(_KEYS, _JSON, max_size=5) | _JSON
        body = data.draw(drawn if schema is None else _like(schema) | drawn)
        if isinstance(body, dict) and "fetch" in path:
            body = {**body, "wait_s": data.draw(st.sampled_from([0, 0.01, -1, "x", None]))}
        content = data.draw(st.just(json.dumps(body).encode()) | st.binary(max_size=20))
    answer = await inside.client.request(method.upper(), address, params=params, content=content)
    known = {int(status) for status in route["responses"]}
    # A name with a slash, or none at all, is another route or none.
    assert answer.status_code in known | ({404, 405, 307} if address != path else set()), (
        f"{method} {address} {params} {content!r}: {answer.status_code} {answer.text[:200]}"
    )
