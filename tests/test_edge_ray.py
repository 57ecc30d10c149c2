"""The engine for Ray clusters; but for one test it runs where Ray is installed (extra `ray`)."""

import asyncio
import importlib.util

import pytest

from gmel.edge.engines.engine import LostError
from gmel.edge.engines.ray import RayEngine
from gmel.edge.fleet import Fleet
from gmel.edge.plant import plant_of
from gmel.edge.task import Task
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario

HERE = importlib.util.find_spec("ray") is not None


@pytest.mark.skipif(HERE, reason="ray is installed")
def test_without_ray_one_line_names_the_extra() -> None:
    with pytest.raises(InputError, match=r"extra 'ray': pip install 'gmel\[ray\]'"):
        RayEngine(plant_of(load_scenario("live")))


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="ray is not installed: uv sync --extra ray")
def test_a_task_runs_a_killed_actor_loses_it_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    plant = plant_of(load_scenario("live"))
    fleet = Fleet(plant)
    server = fleet.servers["line-a"]

    async def story() -> None:
        engine = RayEngine(plant)
        assert set(engine.servers) == set(plant.servers)
        try:
            async with asyncio.timeout(120):
                while (server.beat or (beat := await engine.heartbeat(server))) is None:
                    await asyncio.sleep(0.2)
                assert beat.models == ("compose",)
                answer = await engine.submit(server, Task("a", "d", "compose"), 1, lambda event, said: None)
                assert answer.data == b"slept\n"
                assert answer.switch_s == pytest.approx(plant.models["compose"].load_s, rel=0.5)
                long = asyncio.create_task(
                    engine.submit(server, Task("b", "d", "compose", images=256), 1, lambda event, said: None)
                )
                await asyncio.sleep(1.0)
                engine._ray.kill(engine._actors["line-a"], no_restart=False)
                with pytest.raises(LostError):
                    await long
                while await engine.heartbeat(server) is None:
                    await asyncio.sleep(0.2)
        finally:
            await engine.close()

    asyncio.run(story())
