"""A device that decides itself and may run tasks itself: its own queue, its choice, its records."""

import asyncio
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.edge_photos import compose_in
from tests.edge_plants import beat, plant, ran, task
from tests.reporters import Silent

from gmel.edge.agent import AgentOptions, run_agent
from gmel.edge.device import DirectDevice, run_load
from gmel.edge.engines.engine import Answer, LostError, RefusedError, Told
from gmel.edge.fleet import Beat, ServerState
from gmel.edge.local import LOCAL, LocalWork
from gmel.edge.plant import Plant, plant_of
from gmel.edge.records import read_records
from gmel.edge.server.work import Synthesis
from gmel.edge.task import Task
from gmel.edge.task_record import Way, record_of
from gmel.policies.exported import OPTION_UNITS, TASK_UNITS
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario, to_toml
from gmel.scenario.trace import write_trace

PARTS = ("wait_to_slot_s", "upload_s", "queue_s", "switch_s", "service_s", "download_s")


def local_plant(speed: float = 50.0, **more: Any) -> Plant:
    """One server of speed 1; devices run tasks themselves, a photo in 1 / `speed` seconds."""
    return replace(plant(a=1.0), local=True, device_speed=speed, **more)


class Straight:
    """Servers that do what a test says, reached straight from a device."""

    def __init__(self, behave: Any = None) -> None:
        self.behave = behave
        self.submitted: list[str] = []

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        self.submitted.append(server.name)
        told("queued", {})
        if self.behave is not None:
            return await self.behave(server, task)
        return Answer(b"x", None, "text/plain")

    async def close(self) -> None: ...


def device(where: Plant, engine: Straight | None = None, policy: Any = None, heard: bool = True) -> DirectDevice:
    made = DirectDevice(where, {"a": "http://127.0.0.1:9"}, engine or Straight(), policy, local=LocalWork(where))  # type: ignore[arg-type]
    made._asked = True
    if heard:
        made.fleet.hear("a", Beat("http://127.0.0.1:9", 1.0), time.monotonic())
    return made


def test_it_takes_the_time_that_the_speed_of_devices_gives_one_after_the_other() -> None:
    async def steps() -> None:
        own = LocalWork(local_plant(20.0))
        began = time.monotonic()
        first, second = await asyncio.gather(own.run(task("a", images=2)), own.run(task("b", images=4)))
        took = time.monotonic() - began
        assert first.data == second.data == b"slept\n"
        assert 0.1 <= first.service_s < 5.0
        assert 0.2 <= second.service_s < 5.0
        assert second.wait_s >= first.service_s
        assert took >= first.service_s + second.service_s - 0.01
        assert own.backlog_s(time.monotonic()) == 0.0
        await own.close()

    ran(steps())


def test_the_backlog_is_what_was_given_and_has_not_ended() -> None:
    async def steps() -> None:
        own = LocalWork(local_plant(1.0))
        running = [asyncio.create_task(own.run(task(name, images=10))) for name in "ab"]
        await asyncio.sleep(0.2)
        assert 19.0 < own.backlog_s(time.monotonic()) < 20.0
        running[1].cancel()
        await asyncio.gather(running[1], return_exceptions=True)
        assert 9.0 < own.backlog_s(time.monotonic()) < 10.0, "who waits no longer is not waited for"
        running[0].cancel()
        await asyncio.gather(running[0], return_exceptions=True)
        assert own.backlog_s(time.monotonic()) == 0.0
        await own.close()

    ran(steps())


def test_it_runs_only_what_the_plant_lets_it() -> None:
    with pytest.raises(InputError, match=r"devices\.local = false"):
        LocalWork(plant(a=1.0))
    with pytest.raises(InputError, match=r"devices\.speed is 0"):
        LocalWork(local_plant(0.0))
    assert LocalWork(local_plant()).offers("part")
    small = LocalWork(local_plant(device_memory_gb=0.05))
    assert not small.offers("part"), "a model of 0.1 GB does not fit into 0.05"
    scenario = load_scenario("live")
    assert not plant_of(scenario).local
    allowed = scenario.model_copy(
        update={"devices": scenario.devices.model_copy(update={"local": True, "memory_gb": 2})}
    )
    found = plant_of(allowed)
    assert (found.local, found.device_memory_gb) == (True, 2)
    assert Plant.from_json(found.as_json()) == found
    older = {key: value for key, value in found.as_json().items() if key not in ("local", "device_memory_gb")}
    assert not Plant.from_json(older).local


def test_it_generates_where_there_are_models(tmp_path: Path) -> None:
    compose_in(tmp_path)

    async def steps() -> None:
        own = LocalWork(local_plant(), Synthesis(tmp_path))
        assert own.offers("compose")
        assert not own.offers("part")
        answer = await own.run(task(model="compose", images=2))
        assert answer.kind == "application/zip"
        assert "001.png" in zipfile.ZipFile(BytesIO(answer.data or b"")).namelist()
        wrong = await own.run(task("b", model="compose", label="unknown"))
        assert wrong.data is None
        assert "unknown" in str(wrong.error)
        assert (await own.run(replace(task("c", model="compose"), input="0" * 64))).data is None
        assert own.backlog_s(time.monotonic()) == 0.0
        await own.close()

    ran(steps())


@pytest.mark.parametrize(("speed", "where"), [(50.0, LOCAL), (0.01, "a")])
def test_without_a_policy_the_earliest_expected_end_decides(speed: float, where: str) -> None:
    async def steps() -> None:
        own = device(local_plant(speed))
        outcome, answer = await own.run(task())
        assert (outcome.state, outcome.server, outcome.sends) == ("done", where, 0 if where == LOCAL else 1)
        assert answer is not None
        (record,) = own.records
        assert record["server"] == where
        assert sum(record[part] for part in PARTS) == pytest.approx(record["latency_s"])
        if where == LOCAL:
            assert record["upload_s"] == 0.0, "nothing is on the way"
        await own.close()

    ran(steps())


def test_it_runs_some_itself_while_its_own_queue_is_the_shorter_one() -> None:
    async def slow(server: ServerState, task: Task) -> Answer:
        await asyncio.sleep(0.3)
        return Answer(b"x", None, "text/plain", 0.0, 0.0, 0.3)

    async def steps() -> None:
        own = device(local_plant(1.5), Straight(slow))

        class Sender:
            async def run(self, task: Task) -> Any:
                return (await own.run(task))[0]

        timed = [(0.0, task(f"t{number}")) for number in range(4)]
        outcomes = await run_load(Sender(), timed, lambda sent, ended, outcome: None)
        servers = sorted(str(each.server) for each in outcomes)
        assert set(servers) == {"a", LOCAL}, "one option alone would have made the others wait"
        await own.close()

    ran(steps(), 90.0)


class Actor:
    """Notes what it is shown and chooses an option."""

    def __init__(self, option: int) -> None:
        self.option = option
        self.seen: list[tuple[Any, Any, Any]] = []

    def act(self, row: Any, options: Any, mask: Any, rng: np.random.Generator, greedy: bool) -> Any:
        self.seen.append((row.copy(), options.copy(), mask.copy()))
        return np.array([self.option])


def test_an_actor_sees_its_own_queue_and_may_choose_option_0() -> None:
    async def steps() -> None:
        where, actor = local_plant(1.0), Actor(0)
        own = device(where, policy=actor)
        running = asyncio.create_task(own.run(task("long", images=30)))
        await asyncio.sleep(0.05)
        actor.option = 1
        outcome, _ = await own.run(task("b"))
        assert outcome.server == "a"
        row, options, mask = actor.seen[1]
        assert mask.tolist() == [[True, True]]
        backlog = list(OPTION_UNITS).index("backlog_s")
        assert 28.0 < options[0, 0, backlog] < 30.0
        assert options[0, 0, list(OPTION_UNITS).index("previous_s")] == options[0, 0, backlog]
        assert row[0, list(TASK_UNITS).index("own_backlog_s")] == options[0, 0, backlog]
        assert own.records[0]["policy"] == "policy"
        outcome, _ = await own.run(task("c", model="other"))
        assert actor.seen[2][2].tolist() == [[True, True]]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        # Where the model does not fit, the option is not there.
        narrow = device(local_plant(device_memory_gb=0.01), policy=Actor(1))
        await narrow.run(task("d"))
        assert narrow.policy.seen[0][2].tolist() == [[False, True]]  # type: ignore[union-attr]
        await own.close()
        await narrow.close()

    ran(steps())


def test_with_nobody_there_it_runs_its_tasks_itself_but_asks_first() -> None:
    async def steps() -> None:
        own = device(local_plant(), heard=False)
        outcome, _ = await own.run(task("a"))
        assert outcome.server == LOCAL
        own._asked = False
        waiting = asyncio.create_task(own.run(task("b")))
        await asyncio.sleep(0.3)
        assert not waiting.done(), "it has not asked the servers yet"
        listening = asyncio.create_task(own.listen())
        assert (await waiting)[0].server == LOCAL
        listening.cancel()
        await own.close()

    ran(steps())


def test_a_server_that_breaks_leaves_the_task_to_the_device() -> None:
    async def broken(server: ServerState, task: Task) -> Answer:
        raise LostError("gone")

    async def steps() -> None:
        engine = Straight(broken)
        own = device(local_plant(0.9), engine)
        outcome, _ = await own.run(task("t"))
        assert engine.submitted == ["a"], "the server was expected to be the faster one"
        assert (outcome.state, outcome.server, outcome.sends) == ("done", LOCAL, 1)
        assert own.fleet.servers["a"].lost == 1
        assert own.fleet.servers["a"].flights == {}
        assert own.records[0]["attempt"] == 1
        await own.close()

    ran(steps())


def test_a_server_that_is_full_is_asked_again_while_it_is_the_better_one() -> None:
    left = [2]

    async def full(server: ServerState, task: Task) -> Answer:
        if left[0]:
            left[0] -= 1
            raise RefusedError("full")
        return Answer(b"x")

    async def steps() -> None:
        own = device(local_plant(0.01), Straight(full))
        outcome, _ = await own.run(task("t"))
        assert (outcome.state, outcome.server, outcome.sends) == ("done", "a", 3)
        await own.close()

    ran(steps())


def test_the_name_of_the_device_itself_is_no_server() -> None:
    with pytest.raises(InputError, match="'local'"):
        DirectDevice(local_plant(), {LOCAL: "http://x"}, Straight())  # type: ignore[arg-type]


def test_parts_of_a_record_are_never_negative() -> None:
    answer = Answer(b"x", None, "", 100.0, 5.0, 7.0)
    record = record_of(task(size_bit=8), "a", answer, Way(10.0, 11.0, 11.0, 12.0, 14.0), 1e9, 2, "policy", 1, 3.0)
    assert all(record[part] >= 0.0 for part in PARTS)
    assert (record["wait_to_slot_s"], record["latency_s"], record["end_s"]) == (1.0, 4.0, 1e9 + 4.0)
    assert record["status"] == "done"
    assert beat().url is not None


def test_the_command_replays_a_trace_on_the_device_itself(tmp_path: Path) -> None:
    text = to_toml(load_scenario("live"))
    assert "local = false" in text
    (tmp_path / "own.toml").write_text(
        text.replace("local = false", "local = true").replace("speed = 0.1", "speed = 100")
    )
    write_trace({"time_s": np.array([0.0, 0.01, 0.02])}, tmp_path / "t.csv")
    options = AgentOptions(
        "device-00",
        tmp_path / "t.csv",
        "http://127.0.0.1:9",
        str(tmp_path / "own.toml"),
        "line-a=http://127.0.0.1:9",
        None,
        None,
        0,
        None,
        tmp_path / "records.parquet",
    )
    outcomes = run_agent(options, Silent())
    assert [(each.state, each.server) for each in outcomes] == [("done", LOCAL)] * 3
    columns = read_records(tmp_path / "records.parquet")
    assert columns["server"].tolist() == [LOCAL] * 3
    for wrong in (replace(options, servers=""), replace(options, models=tmp_path / "none")):
        with pytest.raises(InputError, match=r"--records|--local-models"):
            run_agent(wrong, Silent())
    with pytest.raises(InputError, match=r"devices\.local = false"):
        run_agent(replace(options, scenario="live", models=tmp_path), Silent())


def test_a_device_imports_no_jax() -> None:
    code = (
        "import sys, gmel.edge.local, gmel.edge.agent; "
        "print([name for name in ('jax', 'torch', 'sklearn', 'matplotlib', 'fastapi', 'starlette') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
