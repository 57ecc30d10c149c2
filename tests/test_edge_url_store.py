"""A store by URL: the same promises as those of a folder, and a store that is away loses nothing."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tests.edge_gateways import gateway_of
from tests.edge_photos import name_of_photo, png
from tests.edge_plants import ran, until

from gmel.edge.engines.engine import Answer, Told
from gmel.edge.inputs import KEPT_S, Inputs
from gmel.edge.ledger import Ledger
from gmel.edge.recovery import recover_ledger
from gmel.edge.store import FolderStore, StoreError, name_of, store_at
from gmel.edge.task import Task
from gmel.scenario.errors import InputError

fsspec = pytest.importorskip("fsspec", reason="needs the extra 'store'")
memory = pytest.importorskip("fsspec.implementations.memory")

from gmel.edge.url_store import UrlStore  # noqa: E402


class Away(memory.MemoryFileSystem):  # type: ignore[misc, name-defined]
    """A file system that a test breaks: `trouble` is raised by every call, `hang` holds every call up."""

    protocol = "away"
    trouble: BaseException | None = None
    hang: threading.Event | None = None

    def _meet(self) -> None:
        if self.hang is not None:
            self.hang.wait(20)
        if self.trouble is not None:
            raise self.trouble

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **how: Any) -> None:
        self._meet()
        super().pipe_file(path, value, **how)

    def cat_file(self, path: str, *place: Any, **how: Any) -> Any:
        self._meet()
        return super().cat_file(path, *place, **how)

    def info(self, path: str, **how: Any) -> Any:
        self._meet()
        return super().info(path, **how)


@pytest.fixture
def away() -> Iterator[type[Away]]:
    fsspec.register_implementation("away", Away, clobber=True)
    Away.trouble = Away.hang = None
    yield Away
    if Away.hang is not None:
        Away.hang.set()
    Away.trouble = Away.hang = None


def fresh(kind: str = "memory") -> str:
    return f"{kind}://{uuid4().hex}/gmel"


@pytest.mark.parametrize("kind", ["memory", "folder", "local"])
def test_what_is_put_is_got_kept_listed_and_removed(tmp_path: Path, kind: str) -> None:
    url = {"memory": fresh(), "folder": f"file://{tmp_path}/a%20b", "local": f"local://{tmp_path}/x/y"}[kind]
    store = store_at(url, tmp_path, "results")
    assert isinstance(store, FolderStore) == (kind == "folder")
    assert list(store.held()) == []
    for data in (b"", b"x", b"y" * 100_000):
        name = store.put(data)
        assert name == name_of(data) == store.put(data)
        assert store.get(name) == data
        assert store.has(name)
    sizes = {each.name: each.size for each in store.held()}
    assert sizes == {name_of(data): len(data) for data in (b"", b"x", b"y" * 100_000)}
    assert all(0.0 <= each.age_s < 60.0 for each in store.held())
    store.keep(name_of(b"x"))
    store.keep("0" * 64)
    store.remove(name_of(b"x"))
    store.remove(name_of(b"x"))
    assert not store.has(name_of(b"x"))
    assert store.get(name_of(b"x")) is None
    for bad in ("", "..", "../x", "a" * 63, "A" * 64, "a" * 64 + "\n"):
        assert store.get(bad) is None
        assert not store.has(bad)
        store.remove(bad)
    assert len(list(store.held())) == 2
    again = store_at(url, tmp_path, "results")
    assert again.has(name_of(b"")), "another process finds it"
    assert not store_at(url, tmp_path, "inputs").has(name_of(b"")), "results and inputs lie apart"


def test_content_that_has_changed_is_not_served_and_heals() -> None:
    store = UrlStore(fresh())
    name = store.put(b"good data")
    store._files.pipe_file(store._path(name), b"evil data")
    assert store.get(name) is None
    assert store.put(b"good data") == name
    assert store.get(name) == b"good data"


def test_age_is_that_of_the_last_write(monkeypatch: pytest.MonkeyPatch) -> None:
    store = UrlStore(fresh())
    name, real = store.put(b"x"), time.time
    monkeypatch.setattr("gmel.edge.url_store.time.time", lambda: real() + 2 * KEPT_S)
    (held,) = store.held()
    assert held.age_s == pytest.approx(2 * KEPT_S, abs=60.0)
    assert ran(Inputs(store, 2**20).sweep(set)) == 1
    assert not store.has(name)
    for found in ({"mtime": 5.0}, {"LastModified": "1970-01-01T00:00:05+00:00"}, {"updated": "1970-01-01T00:00:05"}):
        monkeypatch.setattr(
            store._files, "find", lambda *_, found=found, **__: {"x": {"name": name, "size": 1} | found}
        )
        (held,) = store.held()
        assert held.age_s == pytest.approx(real() + 2 * KEPT_S - 5.0, abs=60.0)
    monkeypatch.setattr(store._files, "find", lambda *_, **__: {"x": {"name": name, "size": 1}})
    (held,) = store.held()
    assert held.age_s == 0.0


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be a URL"),
        ("bucket/prefix", "must be a URL"),
        ("/mnt/results", "must be a URL"),
        ("S3://bucket", "must be a URL"),
        ("nonsense://bucket", "cannot be used"),
        ("file://elsewhere/results", "another machine"),
        ("file:///dev/null/x", "cannot be made"),
    ],
)
def test_urls_that_are_none_are_told_in_a_line(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as found:
        store_at(url, tmp_path, "results")
    assert "\n" not in str(found.value)


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.url_store.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gmel\[store\]"):
        store_at("s3://bucket/prefix", tmp_path, "results")


@pytest.mark.parametrize(
    "trouble",
    [
        ConnectionError("no route"),
        PermissionError(13, "Access Denied"),
        RuntimeError("driver\nsays"),
        TimeoutError("late"),
        KeyError("x"),
    ],
    ids=lambda trouble: type(trouble).__name__,
)
def test_whatever_goes_wrong_is_one_kind_of_trouble(away: type[Away], trouble: Exception) -> None:
    store = UrlStore(fresh("away"))
    name = store.put(b"x")
    away.trouble = trouble
    for call in (lambda: store.put(b"y"), lambda: store.get(name), lambda: store.has(name), lambda: store.keep(name)):
        with pytest.raises(StoreError) as found:
            call()
        assert "\n" not in str(found.value)
    away.trouble = None
    assert store.get(name) == b"x"


def test_a_store_that_hangs_is_given_up_and_takes_no_more_than_its_threads(away: type[Away]) -> None:
    store = UrlStore(fresh("away"), timeout_s=0.05)
    away.hang = threading.Event()
    before = threading.active_count()
    for _ in range(40):
        with pytest.raises(StoreError, match="no answer"):
            store.put(b"x")
    assert threading.active_count() - before <= 32
    away.hang.set()
    deadline = time.monotonic() + 20.0
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert store.put(b"x") == name_of(b"x")


def test_a_result_that_cannot_be_stored_is_not_done_until_it_is(
    tmp_path: Path, away: type[Away], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmel.edge.dispatch._PATIENCE_S", 0.02)
    url = fresh("away")

    async def large(each: Task, told: Told) -> Answer:
        return Answer(each.id.encode() * 20_000)

    async def steps() -> None:
        async with gateway_of(tmp_path, "a", store=url) as inside:
            inside.engine.behave["a"] = large
            away.trouble = ConnectionError("no route")
            await inside.submit("t1")
            await inside.submit("t2")
            await until(lambda: inside.gateway.dispatcher.unstored > 50_000, "results wait")
            for name in ("t1", "t2"):
                assert (await inside.entry(name, 0.0))["state"] in ("accepted", "leased")
                assert (await inside.client.get(f"/v1/tasks/{name}/result")).status_code == 404
            photo = png()
            for method in ("PUT", "GET", "HEAD"):
                path = f"/v1/inputs/{name_of_photo(photo)}"
                answer = await inside.client.request(method, path, content=photo if method == "PUT" else None)
                assert answer.status_code == 503, method
                assert answer.headers["retry-after"]
            named = await inside.submit("t3", input=name_of_photo(photo))
            assert named.status_code == 503
            assert "no route" in named.json()["error"]
            # So much may wait in memory; then nothing more is promised.
            monkeypatch.setattr("gmel.edge.gateway.gateway._MOST_UNSTORED", 50_000)
            full = await inside.submit("t4")
            assert full.status_code == 503
            assert "results wait" in full.json()["error"]
            away.trouble = None
            for name in ("t1", "t2"):
                assert (await inside.entry(name))["state"] == "done"
                assert (await inside.client.get(f"/v1/tasks/{name}/result")).content == name.encode() * 20_000
            assert inside.gateway.dispatcher.unstored == 0
            assert sorted(inside.engine.submitted) == [("a", "t1"), ("a", "t2")], "nothing was made twice"
            away.trouble = PermissionError(13, "Access Denied")
            assert (await inside.client.get("/v1/tasks/t1/result")).status_code == 503, "away is not gone"
            away.trouble = None
            inside.gateway.store.remove(name_of(b"t1" * 20_000))
            assert (await inside.client.get("/v1/tasks/t1/result")).status_code == 410

    ran(steps())


def test_a_gateway_that_ends_before_the_store_is_back_runs_the_task_again(tmp_path: Path, away: type[Away]) -> None:
    url = fresh("away")

    async def large(each: Task, told: Told) -> Answer:
        return Answer(each.id.encode() * 20_000)

    async def steps() -> None:
        away.trouble = ConnectionError("no route")
        async with gateway_of(tmp_path, "a", store=url) as inside:
            inside.engine.behave["a"] = large
            await inside.submit("t")
            await until(lambda: inside.gateway.dispatcher.unstored, "it waits")
        away.trouble = None
        async with gateway_of(tmp_path, "a", store=url) as inside:
            inside.engine.behave["a"] = large
            assert (await inside.entry("t"))["state"] == "done"
            assert inside.engine.submitted == [("a", "t")]
            assert (await inside.client.get("/v1/tasks/t/result")).content == b"t" * 20_000

    ran(steps())


def test_nothing_is_taken_back_while_the_store_is_away(tmp_path: Path, away: type[Away]) -> None:
    """Else every large result would count as lost, and its task run again."""
    store, path = UrlStore(fresh("away")), tmp_path / "ledger.sqlite"
    name = store.put(b"x" * 20_000)

    async def fill() -> None:
        from tests.edge_plants import task

        ledger = Ledger(path)
        await ledger.accept(task("t"))
        await ledger.finish("t", "done", result=name, result_bytes=20_000)
        await ledger.close()

    ran(fill())
    away.trouble = ConnectionError("no route")
    with pytest.raises(StoreError):
        recover_ledger(path, store)
    away.trouble = None
    recovered = recover_ledger(path, store)
    assert (recovered.tasks, recovered.again) == (1, 0)
