"""The gateway against its own OpenAPI description: what is valid is taken or refused with reason, what is not is
refused, every answer is one that is described and has the described shape, and nothing is a 500.

Over HTTP, on a gateway that serves, with one server that is heard.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from tests.edge_photos import name_of_photo, png
from tests.edge_plants import FakeEngine, beat, plant

from gmel.edge.gateway.app import gateway_app
from gmel.edge.gateway.gateway import Settings

schemathesis = pytest.importorskip("schemathesis", reason="is in the group dev")
positive_data_acceptance = pytest.importorskip("schemathesis.specs.openapi.checks").positive_data_acceptance

PHOTO, TASK = name_of_photo(png()), "there"

ENDLESS = {"/v1/events"}
"""Answers that have no end."""
EXAMPLES = 20


class Served:
    """A gateway in a thread of its own, so that requests are those of any HTTP client."""

    def __init__(self, folder: Path) -> None:
        self.app = gateway_app(plant(a=1.0), Settings(folder), FakeEngine())
        self._server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="error"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20.0
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

        self.url = url
        with httpx.Client(base_url=url) as client:
            assert client.put(f"/v1/inputs/{PHOTO}", content=png()).status_code == 201
            while not any(server["alive"] for server in client.get("/v1/servers").json()["servers"]):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            task = {"id": TASK, "device": "d", "model": "part"}
            assert client.post("/v1/tasks", params={"wait_s": 20}, json=task).json()["state"] == "done"

    async def _serve(self) -> None:
        serving = asyncio.create_task(self._server.serve())
        while not serving.done():  # else a test may make the only server drain
            if self._server.started:
                self.app.state.gateway.fleet.hear("a", beat(), time.monotonic())
            await asyncio.sleep(0.1)
        await serving

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    gateway = Served(tmp_path_factory.mktemp("openapi"))
    yield gateway
    gateway.close()


def _described() -> Any:
    return schemathesis.openapi.from_dict(gateway_app(plant(a=1.0), Settings(Path("unused"))).openapi())


OPERATIONS = {
    f"{found.ok().method.upper()} {found.ok().path}": found.ok()
    for found in _described().get_all_operations()
    if found.ok().path not in ENDLESS
}


UNSAID = {
    "PUT /v1/policy": "which policies there are",
    "POST /v1/policy/rollback": "whether there was one before",
    "PUT /v1/inputs/{name}": "that a name is the SHA-256 of a photo",
}
"""What a description cannot say, so that valid data may be refused."""


def _bent(case: Any, valid: bool, number: int) -> None:
    """Nobody waits for long; every other valid request is about something that is there."""
    if not valid:
        return
    if "wait_s" in case.query:
        case.query["wait_s"] = 0.01
    if isinstance(case.body, dict) and case.operation.path.endswith("/fetch"):
        case.body["wait_s"] = 0.01
    if isinstance(case.body, dict) and case.operation.path == "/v1/tasks":
        case.body.pop("input", None)  # it would have to be there
        if not str(case.body.get("label", "")).isprintable():  # no pattern says this
            del case.body["label"]
    if number % 2:
        there = {"task_id": TASK, "name": PHOTO if "inputs" in case.operation.path else "a"}
        case.path_parameters = {key: there[key] for key in case.path_parameters}


def _ask(served: Served, name: str, case: Any, valid: bool, number: int) -> None:
    _bent(case, valid, number)
    without = [positive_data_acceptance] if name in UNSAID else []
    answer = case.call_and_validate(base_url=served.url, timeout=20.0, excluded_checks=without)
    if answer.status_code >= 400 and answer.content:
        said = answer.json()
        assert "\n" not in said.get("error", "\n"), said


def _spoiled() -> list[str]:
    """Operations that take something that can be wrong."""
    return [name for name, each in OPERATIONS.items() if each.body or each.query or each.path_parameters]


@pytest.mark.parametrize(
    ("name", "valid"), [*((name, True) for name in OPERATIONS), *((name, False) for name in _spoiled())]
)
def test_every_route_keeps_to_its_description(served: Served, name: str, valid: bool) -> None:
    operation = OPERATIONS[name]
    mode = schemathesis.GenerationMode.POSITIVE if valid else schemathesis.GenerationMode.NEGATIVE

    numbers = itertools.count()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        _ask(served, name, case, valid, next(numbers))

    asked()
