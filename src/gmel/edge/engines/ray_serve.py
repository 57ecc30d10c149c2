"""The policy inside Ray Serve: a `RequestRouter` that chooses the replica of each request. Experimental.

For those who serve generators by Ray Serve and want its proxies and scaling, with the decision of this project in place
of the power of two choices. Ray Serve keeps nothing: here no task is promised, and none is tried again. The interface
of routers is alpha in Ray. Each replica is one server of the plant, by its rank.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gmel.edge.engines.ranking import Ranking
from gmel.edge.plant import Plant
from gmel.edge.server.runner import Runner
from gmel.edge.server.work import Sleeping, Source, Synthesis
from gmel.edge.task import Task, read_task
from gmel.scenario.errors import InputError

__all__ = ["EdgeReplica", "PolicyRouter", "policy_app"]

if find_spec("ray") is None or find_spec("ray.serve") is None:
    raise InputError("Ray Serve needs the extra 'ray': pip install 'gmel[ray]', or uv sync --extra edge --extra ray")
_routing: Any = import_module("ray.serve.request_router")
_Router: Any = _routing.RequestRouter
_UNSENT_S = 10.0
_STATS_S = 1.0
"""Between two reports of a replica; what was sent meanwhile is counted by the router itself."""


class EdgeReplica:
    """What runs in a replica: the queue of an edge server.

    Args:
        plant: as JSON; the replica of rank n is its nth server.
        models: folder of generators; none: tasks take their time.
    """

    def __init__(self, plant: dict[str, Any], models: str | None = None) -> None:
        described = Plant.from_json(plant)
        serve: Any = import_module("ray.serve")
        rank: Any = serve.get_replica_context().rank
        servers = list(described.servers.values())
        self._server = servers[int(getattr(rank, "rank", rank)) % len(servers)]
        source: Source = Sleeping(described, self._server.speed) if models is None else Synthesis(Path(models))
        self._runner = Runner(source, self._server.gpus, self._server.memory_gb)
        self._started = False

    async def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Does a task; how it ended, with the bytes of the result and the name of the server."""
        if not self._started:
            self._runner.start()  # here, since the loop of the replica runs here
            self._started = True
        run = await self._runner.take(read_task(task), 1)
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        run.watchers.append(news)
        try:
            while not run.over:
                await news.get()
        finally:
            run.watchers.remove(news)
        data = b"" if run.product is None else run.product.data
        return run.end() | {"data": data, "server": self._server.name}

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router is told: the fields of a heartbeat."""
        names = self._runner.source.names()
        return {
            "speed": self._server.speed,
            "gpus": self._server.gpus,
            "memory_gb": self._server.memory_gb,
            "resident": list(self._runner.resident),
            "models": None if names is None else list(names),
        }


class PolicyRouter(_Router):
    """Chooses replicas as a gateway chooses servers. Its arguments come from `policy_app`."""

    def initialize_state(self, plant: dict[str, Any], policy: str, policies: str | None) -> None:
        """Called by Ray Serve once, with the `request_router_kwargs` of the deployment."""
        self._ranking = Ranking(Plant.from_json(plant), policy, None if policies is None else Path(policies))
        self._under_way: dict[str, _Choice] = {}

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """One rank for each replica, the best one first; all as equals for a request that is no task.

        The best one is counted here: requests that come together are all chosen for before the first of them is sent.
        """
        task = _task_of(pending_request)
        if task is None:
            return [candidate_replicas]
        now = time.monotonic()
        self._forget_unsent(now)
        request = str(pending_request.metadata.internal_request_id)
        self._count_off(request)
        known = {_name(each.replica_id): each for each in candidate_replicas}
        self._ranking.hear({name: each.routing_stats or {} for name, each in known.items()}, now)
        order = self._ranking.rank(task, now)
        if not order:
            return [candidate_replicas]
        self._count(request, order[0], task, now)
        return [[known[name]] for name in order]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Notes where it went."""
        del result
        request, task = str(pending_request.metadata.internal_request_id), _task_of(pending_request)
        if task is None:
            return
        choice = self._under_way.get(request)
        if choice is None or choice.name != _name(replica_id):  # the best one did not take it
            self._count_off(request)
            choice = self._count(request, _name(replica_id), task, time.monotonic())
        choice.sent = True

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Counts it off."""
        del replica_id
        self._count_off(str(internal_request_id))

    def _count(self, request: str, name: str, task: Task, now: float) -> "_Choice":
        self._ranking.sent(name, replace(task, id=request))  # a task may be sent twice, a request is one
        choice = self._under_way[request] = _Choice(name, now)
        return choice

    def _count_off(self, request: str) -> None:
        choice = self._under_way.pop(request, None)
        if choice is not None:
            self._ranking.ended(choice.name, request)

    def _forget_unsent(self, now: float) -> None:
        """Requests that were given up before they were sent: nobody tells us of them."""
        for request in [
            key for key, each in self._under_way.items() if not each.sent and now - each.chosen > _UNSENT_S
        ]:
            self._count_off(request)


@dataclass
class _Choice:
    """Where a request is counted, and since when."""

    name: str
    chosen: float
    sent: bool = False


def policy_app(
    plant: Plant, policy: str = "earliest-finish", policies: Path | None = None, models: Path | None = None
) -> Any:
    """An application for `ray.serve.run`: one replica for each server of the plant, chosen by the policy.

    Args:
        plant: servers and models.
        policy: a rule, or the name of a folder in `policies`.
        policies: folder of exported policies, on the machines of the proxies.
        models: folder of generators, on every machine; none: tasks take their time.

    Raises:
        InputError: no such policy.
    """
    Ranking(plant, policy, policies)  # here rather than in every proxy
    serve: Any = import_module("ray.serve")
    config: Any = import_module("ray.serve.config")
    router = config.RequestRouterConfig(
        request_router_class=f"{__name__}.PolicyRouter",
        request_router_kwargs={
            "plant": plant.as_json(),
            "policy": policy,
            "policies": None if policies is None else str(policies.resolve()),
        },
        request_routing_stats_period_s=_STATS_S,
    )
    deployment = serve.deployment(EdgeReplica).options(
        num_replicas=len(plant.servers),
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        request_router_config=router,
    )
    return deployment.bind(plant.as_json(), None if models is None else str(models.resolve()))


def _task_of(pending_request: Any) -> Task | None:
    if pending_request is None or not pending_request.args:
        return None
    try:
        return read_task(pending_request.args[0])
    except InputError:  # the replica says what is wrong with it
        return None


def _name(replica_id: Any) -> str:
    return str(replica_id.unique_id)
