"""Inputs of tasks: photos that are checked when they come, drawn on where they are wanted, and gone afterwards."""

import asyncio
import io
import json
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.edge_apps import served
from tests.edge_gateways import gateway_of
from tests.edge_photos import SIDE, compose_in, name_of_photo, png
from tests.edge_plants import plant, ran, task, until

from gmel.edge.device import Device, read_photo
from gmel.edge.gateway.app import gateway_app
from gmel.edge.gateway.gateway import Settings
from gmel.edge.inputs import KEPT_S, FullError, Inputs
from gmel.edge.keys import add_key
from gmel.edge.server.app import server_app
from gmel.edge.server.inputs import AwayError, GatewayPhotos, drawn_on
from gmel.edge.server.reporting import Reporting
from gmel.edge.server.runner import Runner
from gmel.edge.server.work import Synthesis
from gmel.edge.store import PARTS, FolderStore, Held, StoreError
from gmel.edge.task import MOST_INPUT_BYTES, read_task
from gmel.scenario.errors import InputError
from gmel.synthesis.data.reading import grey_of
from gmel.synthesis.generator import load_generator
from gmel.synthesis.modes import EVERY_MODE


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is enormous."""

    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 1000)) + part(b"IEND", b"")


def test_a_photo_comes_once_and_is_named_by_tasks(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            photo, client = png(), inside.client
            name = name_of_photo(photo)
            path = f"/v1/inputs/{name}"
            assert (await client.head(path)).status_code == 404
            assert (await client.get(path)).status_code == 404
            refused = await inside.submit("t", input=name)
            assert refused.status_code == 400
            assert "upload it first" in refused.json()["error"]
            assert inside.gateway.ledger.counts() == {}
            first = await client.put(path, content=photo)
            assert (first.status_code, first.json()) == (201, {"input": name, "new": True})
            again = await client.put(path, content=photo)
            assert (again.status_code, again.json()["new"]) == (200, False)
            assert (await client.head(path)).status_code == 200
            got = await client.get(path)
            assert got.content == photo
            assert got.headers["content-type"] == "application/octet-stream", "never shown as what it is not"
            assert (await inside.submit("t", input=name)).status_code == 202
            entry = await inside.entry("t")
            assert (entry["state"], entry["request"]["input"]) == ("done", name)
            # A task that was accepted is known, also when its input has left.
            inside.gateway.inputs._store.remove(name)
            inside.gateway.inputs._used.clear()
            assert (await inside.submit("t", input=name)).status_code == 200
            assert (await inside.submit("u", input=name)).status_code == 400

    ran(steps())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (png()[:200], "truncated or corrupt"),
        (b"%PDF-1.4" + bytes(100), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (bomb(30_000, 30_000), "more than 25,000,000 pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "pixels"),
        (bomb(4000, 4000), "truncated or corrupt"),
        (png(side=4), "at least 8 a side"),
    ],
    ids=["empty", "text", "cut", "pdf", "program", "bomb", "overflow", "hollow", "small"],
)
def test_what_is_no_photo_is_refused_in_a_line(tmp_path: Path, body: bytes, said: str) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            name = name_of_photo(body)
            answer = await inside.client.put(f"/v1/inputs/{name}", content=body)
            assert answer.status_code == 400
            assert said in answer.json()["error"]
            assert "\n" not in answer.json()["error"]
            assert (await inside.client.head(f"/v1/inputs/{name}")).status_code == 404
            assert list(inside.gateway.inputs._store.held()) == []

    ran(steps())


def test_other_names_and_lengths_are_refused(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            put, photo = inside.client.put, png()
            wrong = await put(f"/v1/inputs/{'0' * 64}", content=photo)
            assert wrong.status_code == 400
            assert name_of_photo(photo) in wrong.json()["error"]
            for name in ("x", "A" * 64, "a" * 63, "a" * 65, ".."):
                assert (await put(f"/v1/inputs/{name}", content=photo)).status_code in (400, 404, 405), name
                assert (await inside.submit("t", input=name)).status_code == 400
            for name in (5, None, [], True):
                assert (await inside.submit("t", input=name)).status_code == 400, name
            long = await put(f"/v1/inputs/{'0' * 64}", content=bytes(MOST_INPUT_BYTES + 1))
            assert long.status_code == 413
            assert not list(tmp_path.glob("inputs/??/*"))

    ran(steps())


def test_who_may_do_what_with_photos(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = {role: add_key(keys, role, "d") for role in ("device", "server", "operator")}  # type: ignore[arg-type]

    async def steps() -> None:
        async with gateway_of(tmp_path / "g", keys=keys, rate_per_s=0.001, burst=2) as inside:
            path, photo = f"/v1/inputs/{name_of_photo(png())}", png()

            async def ask(method: str, role: str | None) -> int:
                headers = {} if role is None else {"Authorization": f"Bearer {key[role]}"}
                content = photo if method == "PUT" else None
                return (await inside.client.request(method, path, content=content, headers=headers)).status_code

            assert [await ask("PUT", role) for role in (None, "server", "device")] == [401, 403, 201]
            assert [await ask("GET", role) for role in (None, "device", "server", "operator")] == [401, 403, 200, 200]
            assert [await ask("HEAD", role) for role in (None, "device", "server")] == [401, 200, 200]
            assert [await ask("PUT", "device") for _ in range(3)] == [200, 429, 429]

    ran(steps())


def test_inputs_together_are_bounded(tmp_path: Path) -> None:
    async def steps() -> None:
        photos = [png(number) for number in range(3)]
        async with gateway_of(tmp_path, "a", inputs_bytes=sum(map(len, photos[:2]))) as inside:
            answers = [await inside.client.put(f"/v1/inputs/{name_of_photo(each)}", content=each) for each in photos]
            assert [each.status_code for each in answers] == [201, 201, 503]
            assert answers[2].headers["retry-after"]
            assert (
                await inside.client.put(f"/v1/inputs/{name_of_photo(photos[0])}", content=photos[0])
            ).status_code == 200

    ran(steps())


def test_inputs_that_come_at_once_or_during_a_sweep_are_counted(tmp_path: Path) -> None:
    photos = [png(number) for number in range(3)]
    store = FolderStore(tmp_path)
    looked, go_on = threading.Event(), threading.Event()

    class Slow(FolderStore):
        def held(self, parts: range = range(PARTS)) -> Iterator[Held]:
            found = list(store.held(parts))
            looked.set()
            go_on.wait(20)
            return iter(found)

    async def steps() -> None:
        inputs = Inputs(Slow(tmp_path), sum(map(len, photos[:2])))
        sweep = asyncio.create_task(inputs.sweep(set))
        await asyncio.to_thread(looked.wait, 20)
        await inputs.add(name_of_photo(photos[0]), photos[0])
        go_on.set()
        await sweep
        both = [inputs.add(name_of_photo(each), each) for each in photos[1:]]
        ends = await asyncio.gather(*both, return_exceptions=True)
        assert {type(each) for each in ends} == {FullError, type(None)}

    ran(steps())


def test_a_disk_that_takes_nothing_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            path = f"/v1/inputs/{name_of_photo(png())}"
            with monkeypatch.context() as patch:
                patch.setattr("os.fsync", full)
                answer = await inside.client.put(path, content=png())
            assert answer.status_code == 503
            assert "No space" in answer.json()["error"]
            assert (await inside.client.head(path)).status_code == 404
            assert (await inside.client.put(path, content=png())).status_code == 201

    ran(steps())


def test_what_nobody_names_for_a_day_leaves(tmp_path: Path) -> None:
    async def steps() -> None:
        store = FolderStore(tmp_path)
        old, named, fresh = (store.put(png(number)) for number in range(3))
        (tmp_path / "not-a-name").write_bytes(b"x")
        for name in (old, named):
            os.utime(tmp_path / name[:2] / name, (1e9, 1e9))
        inputs = Inputs(store, 2**30)
        assert await inputs.sweep(lambda: {named}) == 1
        assert [store.has(name) for name in (old, named, fresh)] == [False, True, True]
        # The task has ended, and somebody has asked for it since: the day begins anew, also on disk.
        assert await inputs.has(named)
        assert await inputs.sweep(set) == 0
        assert next(each for each in store.held() if each.name == named).age_s < KEPT_S
        # A clock that jumps by years removes nothing that was just named.
        os.utime(tmp_path / named[:2] / named, (1e9, 1e9))
        assert await inputs.sweep(set) == 0
        assert await Inputs(store, 2**30).sweep(set) == 1
        assert (tmp_path / "not-a-name").exists()

    ran(steps())


def test_what_is_just_leaving_is_not_promised(tmp_path: Path) -> None:
    async def steps() -> None:
        store = FolderStore(tmp_path)
        name = store.put(png())
        os.utime(tmp_path / name[:2] / name, (1e9, 1e9))
        inputs, begun, go = Inputs(store, 2**30), threading.Event(), threading.Event()
        remove = store.remove

        def slow(name: str) -> None:
            begun.set()
            go.wait(20)
            remove(name)

        store.remove = slow  # type: ignore[method-assign]
        sweeping = asyncio.create_task(inputs.sweep(set))
        await asyncio.to_thread(begun.wait, 20)
        assert not await inputs.has(name)
        go.set()
        assert await sweeping == 1

    ran(steps())


# At a server.


def photos_from(answer: httpx.Response | Exception) -> tuple[GatewayPhotos, list[str]]:
    asked: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return GatewayPhotos("http://g", transport=httpx.MockTransport(handle)), asked


def test_a_server_keeps_what_it_has_fetched() -> None:
    photos, asked = photos_from(httpx.Response(200, content=png()))
    name = name_of_photo(png())
    for _ in range(3):
        assert np.array_equal(photos.photo(name), grey_of(png(), "x"))
    assert asked == [f"/v1/inputs/{name}"]


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (httpx.Response(404), InputError, "not at the gateway any more"),
        (httpx.Response(503), AwayError, "503"),
        (httpx.Response(401), AwayError, "401"),
        (httpx.ConnectError("refused"), AwayError, "refused"),
        (httpx.ReadTimeout("silent"), AwayError, "silent"),
        (httpx.Response(200, content=png(1)), InputError, "other bytes"),
        (httpx.Response(200, content=bytes(MOST_INPUT_BYTES + 1)), InputError, "longer than"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_whatever_a_gateway_answers_is_told_in_a_line(
    answer: httpx.Response | Exception, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as found:
        photos_from(answer)[0].photo(name_of_photo(png()))
    assert "\n" not in str(found.value)


def test_a_model_draws_on_the_photo_or_says_why_not(tmp_path: Path) -> None:
    compose_in(tmp_path)
    generator = load_generator(tmp_path / "compose.safetensors", EVERY_MODE)
    photos, _ = photos_from(httpx.Response(200, content=png(5)))
    asked = replace(task(model="compose"), input=name_of_photo(png(5)))
    (made,) = drawn_on(generator, "dot", asked, photos).sample("dot", 1, 0)
    ground = grey_of(png(5), "x")
    assert made.mask is not None
    far = np.ones_like(made.mask)
    rows, columns = np.nonzero(made.mask)
    far[max(rows.min() - 12, 0) : rows.max() + 13, max(columns.min() - 12, 0) : columns.max() + 13] = False
    assert np.array_equal(made.image[far], ground[far]), "the surface is the one that was sent"
    assert made.image[made.mask].mean() < ground[made.mask].mean() - 10, "with the defect on it"
    with pytest.raises(InputError, match="no gateway"):
        drawn_on(generator, "dot", asked, None)
    large, _ = photos_from(httpx.Response(200, content=png(1, 1000)))
    many = replace(task(model="compose", images=256), input=name_of_photo(png(1, 1000)))
    with pytest.raises(InputError, match="256 of 1000 x 1000 pixels"):
        drawn_on(generator, "dot", many, large)

    class Whole:
        mode, labels = "whole", ("dot",)

    class Unmasked(Whole):
        def on(self, good: Any) -> Any: ...

        def draws_on_good(self, label: str) -> bool:
            return False

    for other in (Whole(), Unmasked()):
        with pytest.raises(InputError, match=r"compose \(whole\) draws whole photos of the class 'dot'"):
            drawn_on(other, "dot", asked, photos)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["push", "pull"])
def test_the_whole_way_from_the_photo_to_the_result(tmp_path: Path, way: str) -> None:
    compose_in(tmp_path / "models")
    (tmp_path / "part.png").write_bytes(png(7))
    app = gateway_app(plant(a=1.0), Settings(tmp_path / "g"))

    async def steps() -> None:
        async with served(app) as gateway:
            runner = Runner(Synthesis(tmp_path / "models", photos=GatewayPhotos(gateway)))
            runner.start()
            device = Device(gateway, patience_s=30.0)
            async with served(server_app("a", runner)) as server:
                line = Reporting("a", gateway, runner, server if way == "push" else None)
                keeping = asyncio.create_task(line.keep())
                try:
                    name = await device.upload(read_photo(tmp_path / "part.png"))
                    asked = read_task({"id": "t", "device": "d", "model": "compose", "images": 2, "input": name})
                    outcome = await device.run(asked)
                    assert outcome.state == "done", outcome.error
                    with zipfile.ZipFile(io.BytesIO(await device.result("t"))) as archive:
                        assert json.loads(archive.read("task.json"))["input"] == name
                        for number in range(2):
                            image = np.array(Image.open(io.BytesIO(archive.read(f"{number:03d}.png"))))
                            same = image == np.array(Image.open(tmp_path / "part.png"))
                            assert image.shape == (SIDE, SIDE)
                            assert 0.5 < same.mean() < 1.0
                    # A photo that is damaged at the gateway fails the task with its reason, and is asked for again.
                    other = await device.upload(png(8))
                    store = app.state.gateway.inputs._store
                    (store.folder / other[:2] / other).write_bytes(b"bent")
                    failed = await device.run(replace(asked, id="u", input=other))
                    assert failed.state == "failed"
                    assert "upload it again" in str(failed.error)
                    assert await device.upload(png(8)) == other
                    assert (await device.run(replace(asked, id="v", input=other))).state == "done"
                finally:
                    keeping.cancel()
                    await asyncio.gather(keeping, return_exceptions=True)
                    await device.close()
                    await runner.close()

    ran(steps(), 120.0)


def test_a_gateway_that_is_away_is_no_fault_of_the_task(tmp_path: Path) -> None:
    compose_in(tmp_path)
    photos, _ = photos_from(httpx.ConnectError("refused"))

    async def steps() -> None:
        runner = Runner(Synthesis(tmp_path, photos=photos))
        runner.start()
        run = await runner.take(replace(task(model="compose"), input="0" * 64), 1)
        await until(lambda: run.over, "ended")
        assert run.end()["event"] == "gone"
        assert "refused" in run.end()["error"]
        await runner.close()

    ran(steps())


def test_reading_a_photo_to_send(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_photo(tmp_path / "none.png")
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(MOST_INPUT_BYTES + 1)
    with pytest.raises(InputError, match="at most"):
        read_photo(tmp_path / "long.png")


def test_tasks_without_an_input_are_what_they_were() -> None:
    """Ledgers of before hold the digests of their tasks."""
    digest = "6418f88d87a22c83fa1235484867d178ae66eb44d5529cf19a5f82243d068d11"
    old = task("a")
    assert "input" not in old.as_json()
    assert old.digest == digest
    assert read_task({**old.as_json(), "input": ""}) == old
    assert replace(old, input="0" * 64).digest != digest
    assert StoreError.__mro__[1] is OSError
