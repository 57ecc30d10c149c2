"""The HTTP side of an edge server: small, idempotent by task id, alive to the last byte."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gmel.edge.bodies import SlowError, TooLargeError, read_json
from gmel.edge.keys import OPEN, Caller, Keys
from gmel.edge.server.round_routes import round_routes
from gmel.edge.server.runner import Run, Runner
from gmel.edge.task import read_task
from gmel.scenario.errors import InputError

if TYPE_CHECKING:
    from gmel.edge.rounds import Site  # it brings JAX; a server without a site does without

__all__ = ["BEAT_S", "follow", "server_app"]

BEAT_S = 1.0
"""A line at least this often, so that silence means something."""


_WRONG: dict[Any, int] = {InputError: 400, TooLargeError: 413, SlowError: 408, ClientDisconnect: 400}
"""Bodies that are none, and how that is answered."""


async def _wrong(request: Request, error: Exception) -> Response:
    del request
    headers = {"Connection": "close"} if isinstance(error, SlowError) else {}
    return JSONResponse({"error": str(error) or "body: broke off"}, _WRONG[type(error)], headers)


async def follow(run: Run) -> AsyncGenerator[dict[str, Any]]:
    """What happens to a task, from now to its end; a `beat` where nothing has happened for a while."""
    news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    run.watchers.append(news)
    try:
        if run.over:
            yield run.end()
            return
        yield {"event": "queued", "share": run.share}
        if run.ready > run.queued and not run.over:
            yield {"event": "running"}
        while True:
            try:
                async with asyncio.timeout(BEAT_S):
                    line = await news.get()
                    while line["event"] == "progress" and not news.empty():
                        line = news.get_nowait()  # who reads slowly gets the newest, and the end without delay
            except TimeoutError:
                line = {"event": "beat"}
            yield line
            if line["event"] in ("done", "failed", "gone"):
                return
    finally:
        run.watchers.remove(news)


def server_app(name: str, runner: Runner, keys: Keys | None = None, site: "Site | None" = None) -> Starlette:
    """The application of a server.

    Args:
        name: of the server.
        runner: its queue.
        keys: whom it listens to; without, to everybody.
        site: what it can train on in federated rounds; none: it takes no part.
    """
    registry = CollectorRegistry()
    held = Gauge("gmel_server_tasks", "Tasks here.", registry=registry)
    held.set_function(lambda: len(runner.runs))
    Gauge("gmel_server_done", "Tasks done since the start.", registry=registry).set_function(lambda: runner.done)
    Gauge("gmel_server_loads", "Models loaded since the start.", registry=registry).set_function(lambda: runner.loads)

    def stranger(request: Request, device: str | None = None) -> Response | None:
        """Why not: gateways have a key of an operator, a device may act for itself."""
        caller: Caller | None = OPEN if keys is None else keys.caller(request.headers.get("authorization"))
        if caller is None:
            return JSONResponse({"error": "no key, or one that is not known"}, 401, {"WWW-Authenticate": "Bearer"})
        return None if caller.may("device", device) else JSONResponse({"error": "the key is for something else"}, 403)

    async def run(request: Request) -> Response:
        if (refused := stranger(request)) is not None:
            return refused
        body = await read_json(request, 64 * 1024)
        task, attempt = read_task(body.get("task")), body.get("attempt", 1)
        if (refused := stranger(request, task.device)) is not None:
            return refused
        try:
            context = request.headers.get("traceparent", "")
            taken = await runner.take(task, attempt if isinstance(attempt, int) else 1, context)
        except InputError as error:
            return JSONResponse({"error": str(error)}, 503, headers={"Retry-After": "1"})

        async def lines() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(follow(taken)) as story:
                async for line in story:
                    text = json.dumps(line).encode() + b"\n"
                    if line["event"] == "done":
                        assert taken.product is not None
                        text += taken.product.data
                    yield text

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def cancel(request: Request) -> Response:
        found = runner.find(request.path_params["id"])
        if (refused := stranger(request, None if found is None else found.task.device)) is not None:
            return refused
        return JSONResponse({"cancelled": runner.cancel(request.path_params["id"])})

    async def state(request: Request) -> Response:
        if (refused := stranger(request)) is not None:
            return refused
        return JSONResponse(
            {
                "name": name,
                "tasks": len(runner.runs),
                "backlog_s": round(runner.backlog_s(), 6),
                "resident": runner.resident,
                "memory_gb": runner.memory_gb,
                "gpus": runner.gpus,
                "done": runner.done,
                "draining": runner.draining,
            }
        )

    async def healthy(request: Request) -> Response:
        del request
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        del request
        return JSONResponse({"ready": not runner.draining}, 503 if runner.draining else 200)

    async def metrics(request: Request) -> Response:
        del request
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[
            Route("/v1/run", run, methods=["POST"]),
            Route("/v1/run/{id}", cancel, methods=["DELETE"]),
            Route("/v1/state", state),
            *round_routes(name, keys, site),
            Route("/healthz", healthy),
            Route("/readyz", ready),
            Route("/metrics", metrics),
        ],
        exception_handlers=dict.fromkeys(_WRONG, _wrong),
    )
