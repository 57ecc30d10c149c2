"""The routes of a gateway: tasks in, results out, who may do what, and every way to be refused."""

import asyncio
import base64
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from tests.edge_gateways import Inside, gateway_of
from tests.edge_plants import ran, until

from gmel.edge.engines.engine import Answer, Told
from gmel.edge.fleet import Beat
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
            # Who waited is told at once what the ledger tells everybody later.
            assert waited.json() == {**(await inside.client.get("/v1/tasks/t3")).json(), "new": True}

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


def test_the_description_names_every_route_and_every_field_of_a_task(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            described = (await inside.client.get("/openapi.json")).json()
            assert len(described["paths"]) >= 15
            body = described["paths"]["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert set(body["properties"]) == {each.name for each in fields(Task)}
            beat = described["paths"]["/v1/servers/{name}"]["put"]["requestBody"]["content"]["application/json"][
                "schema"
            ]
            assert set(beat["properties"]) == {each.name for each in fields(Beat)}

    ran(steps())


def test_a_parameter_that_is_none_is_told_in_a_line(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            for params, name in (({"limit": "many"}, "limit"), ({"before": "x"}, "before")):
                answer = await inside.client.get("/v1/tasks", params=params)
                assert answer.status_code == 422
                assert answer.json()["error"].startswith(f"{name}: ")
                assert set(answer.json()) == {"error"}
            assert (await inside.submit("t", images=2.0)).status_code == 202, "JSON has one kind of number"
            assert (await inside.submit("u", images=2.5)).status_code == 400

    ran(steps())
