"""Tasks that a server draws together: which, what comes of them, and what is recorded."""

import asyncio
import io
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.edge_gateways import gateway_of
from tests.edge_plants import ran, task, until
from tests.test_edge_calibration import run_of

from gmel.edge.calibration import calibrate
from gmel.edge.engines.engine import Answer, Told, read_answer
from gmel.edge.records import COLUMNS, read_records, write_records
from gmel.edge.server.app import follow
from gmel.edge.server.runner import Run, Runner
from gmel.edge.server.work import CancelledError, Loaded, Product, Several, Tell, _Generator
from gmel.edge.task import Task
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.diffusion.unet import UNetSize
from gmel.synthesis.generate import Generate, Plan
from gmel.synthesis.generator import Generator, Request, sample_several
from gmel.synthesis.generator import Several as SeveralRequests
from gmel.synthesis.harmonise import Harmonise
from gmel.synthesis.langevin import ContrastiveLoss, Langevin, LangevinPlan
from gmel.synthesis.modes import mode_named
from plates import good_plates, pitted_plates, rough_plates
from reporters import Silent

SHORT = Training(steps=6, batch=4, probe=4, probe_every=3)
PLAN = Plan(prior=SHORT, adaptation=SHORT, scratch=SHORT, size=UNetSize(channels=(8, 16), embedding=16))


class Bench:
    """One model that can do several tasks at once, when a test says so."""

    memory_gb = 1.0

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[str]] = []
        self.wrong = ""

    def names(self) -> None:
        return None

    def load(self, name: str) -> Loaded:
        return self

    def run(self, task: Task, tell: Tell, stop: threading.Event) -> Product:
        return self.run_several([task], [tell], [stop])[0]

    def run_several(
        self, tasks: Sequence[Task], tells: Sequence[Tell], stops: Sequence[threading.Event]
    ) -> list[Product]:
        self.batches.append([task.id for task in tasks])
        while not self.gate.wait(0.005):
            if all(stop.is_set() for stop in stops):
                raise CancelledError
        if self.wrong in (task.id for task in tasks):
            raise InputError("label: not known")
        return [Product(task.id.encode(), "text/plain") for task in tasks]


def with_bench(what: Any, **options: Any) -> None:
    bench = Bench()

    async def started() -> None:
        runner = Runner(bench, **options)
        runner.start()
        try:
            await what(runner, bench)
        finally:
            bench.gate.set()
            await runner.close()

    ran(started())


async def ends(runs: Sequence[Run]) -> list[dict[str, Any]]:
    async def end(run: Run) -> dict[str, Any]:
        return [line async for line in follow(run)][-1]

    return await asyncio.gather(*(end(run) for run in runs))


async def queue(runner: Runner, bench: Bench, *tasks: Task) -> list[Run]:
    """The tasks wait behind one that is at work."""
    first = await runner.take(task("first", model="other"), 1)
    await until(lambda: bench.batches == [["first"]], "the first is at work")
    runs = [first, *[await runner.take(each, 1) for each in tasks]]
    bench.gate.set()
    return runs


TASKS = [
    task("a", images=4),
    task("b", images=4, seed=3, label="x"),
    task("c", images=1),
    task("d", images=1, steps=5),
    task("e", images=8, steps=5),
    task("f", images=2, model="other", steps=5),
    task("g", images=20, model="other", steps=5),
    task("h", images=2, model="other", steps=5),
]


@pytest.mark.parametrize(
    ("most", "batches"),
    [
        (1, [["a"], ["b"], ["c"], ["d"], ["e"], ["f"], ["g"], ["h"]]),
        (8, [["a", "b"], ["c"], ["d"], ["e"], ["f"], ["g"], ["h"]]),
        (9, [["a", "b", "c"], ["d", "e"], ["f"], ["g"], ["h"]]),
        (256, [["a", "b", "c"], ["d", "e"], ["f", "g", "h"]]),
    ],
)
def test_tasks_that_follow_one_another_are_drawn_together(most: int, batches: list[list[str]]) -> None:
    async def sent(runner: Runner, bench: Bench) -> None:
        runs = await queue(runner, bench, *TASKS)
        lines = await ends(runs)
        assert bench.batches == [["first"], *batches]
        assert [line["event"] for line in lines] == ["done"] * 9
        assert [run.product.data.decode() for run in runs if run.product] == ["first", *"abcdefgh"]
        photos = {each.id: each.images for each in TASKS}
        wanted = [sum(photos[name] for name in batch) for batch in batches for _ in batch]
        assert [line["together"] for line in lines[1:]] == wanted
        for batch in batches:
            services = [line["service_s"] for run, line in zip(runs, lines, strict=True) if run.task.id in batch]
            assert max(services) == min(services), "each has the service of all"

    with_bench(sent, together=most)


def test_one_that_is_cancelled_leaves_at_once_and_the_others_go_on() -> None:
    async def sent(runner: Runner, bench: Bench) -> None:
        first = await runner.take(task("first", model="other"), 1)
        await until(lambda: len(bench.batches) == 1, "the first is at work")
        runs = [await runner.take(task(name), 1) for name in "abc"]
        bench.gate.set()
        await ends([first])
        bench.gate.clear()
        await until(lambda: bench.batches[1:] == [["a", "b", "c"]], "three are at work")
        assert runner.cancel("b")
        assert (await ends(runs[1:2]))[0]["event"] == "gone"
        assert runner.find("b") is None
        assert not runner.cancel("b")
        bench.gate.set()
        assert [line["event"] for line in await ends(runs)] == ["done", "gone", "done"]
        assert runs[1].product is None
        # Where nobody wants any of them, the work ends.
        bench.gate.clear()
        blocker = await runner.take(task("blocker", model="other"), 1)
        await until(lambda: bench.batches[-1] == ["blocker"], "at work")
        more = [await runner.take(task(name), 1) for name in "xy"]
        runner.cancel("blocker")
        await ends([blocker])
        await until(lambda: bench.batches[-1] == ["x", "y"], "two are at work")
        for name in "xy":
            runner.cancel(name)
        assert [line["event"] for line in await ends(more)] == ["gone", "gone"]
        bench.gate.set()
        assert (await ends([await runner.take(task("z"), 1)]))[0]["event"] == "done"

    with_bench(sent, together=16)


def test_one_that_cannot_be_done_does_not_take_the_others_along() -> None:
    async def sent(runner: Runner, bench: Bench) -> None:
        bench.wrong = "b"
        runs = await queue(runner, bench, *(task(name) for name in "abc"))
        lines = await ends(runs[1:])
        assert [line["event"] for line in lines] == ["done", "failed", "done"]
        assert lines[1]["error"] == "label: not known"
        assert [line["together"] for line in lines] == [1, 1, 1], "each was done alone in the end"
        assert bench.batches[1:] == [["a", "b", "c"], ["a"], ["b"], ["c"]]

    with_bench(sent, together=16)


def test_what_a_photo_takes_is_learned_from_all_photos_of_the_work() -> None:
    async def sent(runner: Runner, bench: Bench) -> None:
        runs = await queue(runner, bench, *(task(name, images=4) for name in "abcd"))
        await ends(runs)
        took_s = runs[1].ended - runs[1].ready
        assert runner._image_s["part"] == pytest.approx(took_s / 16)

    with_bench(sent, together=16)


@pytest.fixture(scope="module")
def generators() -> dict[str, Any]:
    shots = [*pitted_plates(2), *rough_plates(2)]
    chain = LangevinPlan(Training(steps=4, batch=4, probe_every=0), ContrastiveLoss(steps=3), widths=(8, 16))
    return {
        "generate": Generate.fit(shots, good_plates(8), 0, Silent(), plan=PLAN),
        "ungrounded": Generate.fit(shots, good_plates(8), 0, Silent(), plan=PLAN).on(()),
        "harmonise": Harmonise.fit(
            [*pitted_plates(2), *pitted_plates(2, label="rough")], good_plates(3), 0, Silent(), plan=PLAN
        ),
        "langevin": Langevin.fit(shots, good_plates(4), 0, Silent(), plan=chain),
        "compose": mode_named("compose").fit(pitted_plates(3), good_plates(3), 0, Silent()),
    }


def pictures(product: Product) -> list[np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(product.data)) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return [np.asarray(Image.open(io.BytesIO(archive.read(name))), int) for name in names]


@pytest.mark.parametrize("mode", ["generate", "ungrounded", "harmonise", "langevin", "compose"])
def test_a_task_gives_the_photos_that_it_gives_alone(generators: dict[str, Any], mode: str) -> None:
    """A grey value may differ by one where rounding falls the other way; masks are the same."""
    steps = None if mode == "compose" else 5
    label = "pit" if mode == "compose" else "rough"
    tasks = [
        task("a", label="pit", images=6, seed=1, steps=steps),
        task("b", label=label, images=2, seed=2, steps=steps),
        task("c", label="pit", images=1, seed=3, steps=steps),
    ]
    model = _Generator(generators[mode], 0.1, 1.0)
    assert isinstance(model, Several)
    shares: list[list[float]] = [[], [], []]
    stops = [threading.Event() for _ in tasks]
    together = model.run_several(tasks, [each.append for each in shares], stops)
    for each, product, told in zip(tasks, together, shares, strict=True):
        alone = model.run(each, lambda share: None, threading.Event())
        mine, theirs = pictures(product), pictures(alone)
        assert len(mine) == len(theirs) >= each.images
        for one, other in zip(mine, theirs, strict=True):
            assert np.abs(one - other).max() <= 1
            assert (one != other).mean() < 1e-3
        assert told == sorted(told)
        assert told[-1] == 1.0
    assert len({product.data for product in together}) == 3


def test_a_batch_stops_between_steps_once_nobody_wants_it(generators: dict[str, Any]) -> None:
    stops = [threading.Event(), threading.Event()]
    told: list[float] = []

    def tell(share: float) -> None:
        told.append(share)
        stops[0].set()
        if len(told) == 3:
            stops[1].set()

    tasks = [task(name, label="pit", images=2, steps=10) for name in "ab"]
    with pytest.raises(CancelledError):
        _Generator(generators["generate"], 0.1, 1.0).run_several(tasks, [tell, lambda share: None], stops)
    assert told == pytest.approx([0.1, 0.2, 0.3]), "one that is not wanted does not stop the other"


def test_a_mode_that_cannot_draws_one_after_the_other(generators: dict[str, Any]) -> None:
    generator: Generator = generators["compose"]
    assert not isinstance(generator, SeveralRequests)
    assert isinstance(generators["harmonise"], SeveralRequests)
    requests = [Request("pit", 2, 1), Request("pit", 1, 2), Request("pit", 0, 2)]
    made = sample_several(generator, requests)
    assert [len(photos) for photos in made] == [2, 1, 0]
    np.testing.assert_array_equal(made[1][0].image, generator.sample("pit", 1, 2)[0].image)
    assert [len(photos) for photos in sample_several(generators["harmonise"], requests, 2)] == [2, 1, 0]


def test_a_record_says_with_how_many_and_the_pace_counts_its_share(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):

            async def batch(task: Task, told: Told) -> Answer:
                return Answer(b"x", service_s=8.0, together=8)

            inside.engine.behave["a"] = batch
            await inside.submit("t", images=2)
            record = (await inside.entry("t"))["record"]
            assert (record["service_s"], record["together"]) == (8.0, 8)
            assert inside.gateway.fleet.servers["a"].pace == pytest.approx(1.0), "2 s of 8 s, as expected"
            del inside.engine.behave["a"]
            await inside.submit("alone", images=3)
            assert (await inside.entry("alone"))["record"]["together"] == 3

    ran(steps())


def test_a_server_that_draws_together_is_sent_more_ahead(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            free = asyncio.Event()

            async def hang(task: Task, told: Told) -> Answer:
                await free.wait()
                return Answer(b"x")

            inside.engine.behave["a"] = hang
            await inside.beat("a", together=5)
            for number in range(10):
                await inside.submit(f"t{number}")
            await asyncio.sleep(0.1)
            assert len(inside.engine.submitted) == 1 + 5
            free.set()
            assert (await inside.beat("a", together=0)).status_code == 400

    ran(steps())


@pytest.mark.parametrize("wrong", [-1, 2**21, 1.5, True, "1", None])
def test_together_is_a_number_of_photos(wrong: object) -> None:
    with pytest.raises(ValueError, match="together"):
        read_answer({"together": wrong}, b"x")
    assert read_answer({"together": 7}, b"x").together == 7


def test_calibration_takes_of_a_batch_the_share_of_the_task(tmp_path: Path) -> None:
    """The same run, its records those of tasks that were drawn with as many photos again."""
    plain = run_of(300, 4)
    batched = [row | {"service_s": 2 * row["service_s"], "together": 2 * row["images"]} for row in plain]
    found: list[Any] = []
    for name, rows in (("plain", plain), ("batched", batched)):
        write_records(tmp_path / name, rows)
        found.append(calibrate(read_records(tmp_path / name), load_scenario("live")))
    for field in ("speeds", "fixed_work", "noise_sigma", "load_s"):
        assert getattr(found[0], field) == getattr(found[1], field)


def test_records_of_before_are_read(tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = run_of(40, 4)
    write_records(tmp_path / "new", rows)
    table = parquet.read_table(tmp_path / "new").drop_columns(["together"])
    parquet.write_table(table, tmp_path / "old")
    columns = read_records(tmp_path / "old")
    assert set(columns) == set(COLUMNS)
    assert columns["together"].tolist() == columns["images"].tolist()
    parquet.write_table(table.drop_columns(["images"]), tmp_path / "broken")
    with pytest.raises(InputError, match="no column 'images'"):
        read_records(tmp_path / "broken")
