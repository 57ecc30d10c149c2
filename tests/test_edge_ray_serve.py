"""The policy as a router of Ray Serve: the order of replicas everywhere, the rest where Ray is installed."""

import importlib.util
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from tests.edge_plants import plant, ran, task

from gmel.edge.engines.ranking import Ranking
from gmel.scenario.errors import InputError

HERE = importlib.util.find_spec("ray") is not None
SPEEDS = {"fast": {"speed": 1.0}, "half": {"speed": 0.5}, "slow": {"speed": 0.25}}


def test_tasks_that_come_together_are_spread_by_speed() -> None:
    ranking, went = Ranking(plant()), Counter[str]()
    ranking.hear(SPEEDS, 0.0)
    for number in range(14):
        order = ranking.rank(task(f"t{number}"), 0.0)
        assert sorted(order) == sorted(SPEEDS)
        ranking.sent(order[0], task(f"t{number}"))
        went[order[0]] += 1
    assert went == {"fast": 8, "half": 4, "slow": 2}
    for number in range(14):
        for name in SPEEDS:
            ranking.ended(name, f"t{number}")
    assert all(not server.flights for server in ranking.fleet.servers.values())


def test_replicas_come_and_go() -> None:
    ranking = Ranking(plant(a=9.0))
    assert ranking.rank(task(), 0.0) == [], "servers of the plant are no replicas"
    ranking.hear(SPEEDS, 0.0)
    ranking.sent("fast", task("x"))
    ranking.hear({"half": {"speed": 0.5}, "new": {}}, 100.0)
    assert ranking.rank(task(), 100.0) == ["new", "half"], "what says nothing yet counts as speed 1"
    ranking.ended("fast", "x")
    ranking.sent("fast", task("y"))
    ranking.hear({"new": {"models": ["other"]}}, 100.0)
    assert ranking.rank(task(), 100.0) == []
    with pytest.raises(InputError, match="policy 'nobody'"):
        Ranking(plant(), "nobody")


@pytest.mark.skipif(HERE, reason="ray is installed")
def test_without_ray_one_line_names_the_extra() -> None:
    with pytest.raises(InputError, match=r"gmel\[ray\]"):
        importlib.import_module("gmel.edge.engines.ray_serve")


@pytest.mark.skipif(not HERE, reason="ray is not installed: uv sync --extra ray")
def test_the_count_of_the_router_follows_what_serve_tells_it() -> None:
    from gmel.edge.engines.ray_serve import PolicyRouter

    router: Any = object.__new__(PolicyRouter)
    router.initialize_state(plant().as_json(), "earliest-finish", None)
    replicas = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=said) for name, said in SPEEDS.items()
    ]

    def request(number: int, *args: Any) -> Any:
        return SimpleNamespace(args=args, metadata=SimpleNamespace(internal_request_id=f"r{number}"))

    def flights() -> dict[str, int]:
        return {name: len(server.flights) for name, server in router._ranking.fleet.servers.items()}

    async def steps() -> None:
        asked = [request(number, task("same").as_json()) for number in range(14)]
        went: Counter[str] = Counter()
        for each in asked:
            ranks = await router.choose_replicas(candidate_replicas=replicas, pending_request=each)
            went[ranks[0][0].replica_id.unique_id] += 1
        assert went == flights() == {"fast": 8, "half": 4, "slow": 2}
        await router.choose_replicas(replicas, asked[0])
        assert sum(flights().values()) == 14, "asked again, it is the same request"
        for each in asked:
            router.on_request_routed(each, replicas[2].replica_id, None)
        assert flights() == {"fast": 0, "half": 0, "slow": 14}, "where it went is what counts"
        for each in asked:
            router.on_request_completed(replicas[2].replica_id, each.metadata.internal_request_id)
        assert sum(flights().values()) == 0
        for wrong in (request(1), request(2, "x"), request(3, {"id": "a"}), None):
            assert await router.choose_replicas(replicas, wrong) == [replicas]
        await router.choose_replicas(replicas, asked[0])
        router._under_way["r0"].chosen -= 100.0
        await router.choose_replicas(replicas, asked[1])
        assert list(router._under_way) == ["r1"], "given up before it was sent"
        assert await router.choose_replicas(replicas, request(5, task(model="unknown").as_json()))

    ran(steps())


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="ray is not installed: uv sync --extra ray")
def test_requests_to_ray_serve_are_spread_by_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray, serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
    from gmel.edge.engines.ray_serve import policy_app

    where = plant(fast=8.0, half=4.0, slow=2.0)
    with pytest.raises(InputError, match="policy 'nobody'"):
        policy_app(where, "nobody")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False)
    try:
        handle = serve.run(policy_app(where), name="gmel", route_prefix=None)
        waiting: Any = handle.remote(task("first").as_json())
        assert waiting.result(timeout_s=60)["event"] == "done"
        import time

        time.sleep(5.0)  # until all have told their speed
        asked = [handle.remote(task(f"t{number}", images=8).as_json()) for number in range(14)]
        ends = [each.result(timeout_s=120) for each in asked]
        assert all(end["data"] == b"slept\n" for end in ends)
        assert Counter(end["server"] for end in ends) == {"fast": 8, "half": 4, "slow": 2}
    finally:
        serve.shutdown()
        ray.shutdown()
