"""Federated rounds over edge servers: the same head as in one process, and sites that break or lie."""

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.reporters import Silent

from gmel.edge import rounds
from gmel.edge.rounds import Site, train_over_http, train_over_servers
from gmel.edge.server.app import server_app
from gmel.edge.server.runner import Runner
from gmel.edge.server.work import NoModels
from gmel.federation.site_file import rows_to_bytes
from gmel.federation.training import Plan, SiteRows, train_head
from gmel.scenario.errors import InputError

PLAN = Plan(rounds=3, local_steps=5)


def rows(name: str, labels: list[str], seed: int) -> SiteRows:
    rng = np.random.default_rng(seed)
    centres = {"good": 0.0, "pit": 2.0, "crack": -2.0}
    features = np.stack([rng.normal(centres[label], 1.0, 6) for label in labels]).astype(np.float32)
    return SiteRows(name, features, np.asarray(labels), np.ones(len(labels)))


SITES = [
    rows("a", ["good", "pit"] * 5, 1),
    rows("b", ["good", "crack"] * 4, 2),
    rows("c", ["good"] * 3 + ["pit"] * 3, 3),
]


def over_asgi(monkeypatch: pytest.MonkeyPatch, answering: dict[str, "httpx.AsyncBaseTransport"]) -> dict[str, str]:
    """Servers without sockets: the client of the rounds is given transports by host."""

    class Client(httpx.AsyncClient):
        def __init__(self, **how: object) -> None:
            mounts = {f"http://{name}": transport for name, transport in answering.items()}
            super().__init__(mounts=mounts, headers=how.get("headers"))  # type: ignore[arg-type]

    monkeypatch.setattr(rounds.httpx, "AsyncClient", Client)
    return {name: f"http://{name}" for name in answering}


def served(site: SiteRows) -> httpx.ASGITransport:
    return httpx.ASGITransport(server_app(site.name, Runner(NoModels()), None, Site(site)))


def test_the_head_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = over_asgi(monkeypatch, {site.name: served(site) for site in SITES})
    plan = Plan(rounds=4, local_steps=5, drop_out=0.3, straggler=0.5)
    here = train_head(SITES, plan, 3)
    there = train_over_http(urls, plan, 3, Silent())
    assert there.classes == here.classes
    np.testing.assert_allclose(there.weights, here.weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(there.bias, here.bias, rtol=1e-5, atol=1e-6)
    assert there.log == here.log
    assert there.sent_bytes > 0


class Broken(httpx.AsyncBaseTransport):
    """Facts as they should be; the rounds as they are told."""

    def __init__(self, site: SiteRows, turn: httpx.Response | None) -> None:
        self.site, self.turn = Site(site), turn

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=self.site.facts())
        if self.turn is None:
            raise httpx.ConnectError("gone")
        return self.turn


def nonsense() -> httpx.Response:
    from safetensors.numpy import save

    head = {"weights": np.full((3, 6), np.nan, np.float32), "bias": np.zeros(3, np.float32)}
    return httpx.Response(200, content=save(head, {"said": '{"round": 1, "mass": 5.0}'}))


@pytest.mark.parametrize("turn", [httpx.Response(200, content=b"garbage"), httpx.Response(500), nonsense()])
def test_garbage_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, turn: httpx.Response) -> None:
    a, b, c = SITES
    urls = over_asgi(monkeypatch, {"a": served(a), "b": Broken(b, turn), "c": served(c)})
    found = train_over_http(urls, PLAN, 0, Silent())
    assert [entry.used for entry in found.log] == [("a", "c")] * 3
    assert {refusal.site for entry in found.log for refusal in entry.refusals} == {"b"}
    assert np.isfinite(found.weights).all()


def test_a_site_that_goes_away_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = SITES
    urls = over_asgi(monkeypatch, {"a": served(a), "b": Broken(b, None), "c": served(c)})
    found = train_over_http(urls, PLAN, 0, Silent())
    assert [entry.absent for entry in found.log] == [("b",)] * 3


def test_a_server_without_a_site_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = over_asgi(monkeypatch, {"a": httpx.ASGITransport(server_app("a", Runner(NoModels())))})
    with pytest.raises(InputError, match=r"site a: 404 .*--site-rows"):
        train_over_http(urls, PLAN, 0, Silent())


@pytest.mark.parametrize("body", [b"", b"{}", rows_to_bytes(SITES[0])])
def test_rounds_that_are_none(body: bytes) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=served(SITES[0]), base_url="http://a") as client:
            return await client.post("/v1/rounds", content=body)

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("round: ")


def test_a_file_that_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"no")
    with pytest.raises(InputError, match="corrupt rows"):
        Site.read(tmp_path / "rows")
    with pytest.raises(InputError, match="cannot be read"):
        Site.read(tmp_path / "absent")


def test_over_real_processes() -> None:
    sites = [replace(site, name=f"plant {site.name}, hall 1") for site in SITES]  # names as people give them
    here = train_head(sites, PLAN, 0)
    there = train_over_servers(sites, PLAN, 0, Silent())
    np.testing.assert_allclose(there.weights, here.weights, rtol=1e-5, atol=1e-6)
    assert there.log == here.log
