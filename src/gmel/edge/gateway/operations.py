"""Routes of operators: state, records, metrics, health, and the dashboard."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gmel.edge.gateway.gateway import Gateway
from gmel.edge.gateway.schema import gives

__all__ = ["add_operations"]


def add_operations(app: FastAPI, gateway: Gateway) -> None:
    """Adds the routes."""

    @app.get("/v1/state", responses=gives("state"))
    async def state(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """All that the dashboard shows."""
        gateway.operator(request)
        return JSONResponse(gateway.state())

    @app.get("/v1/records", response_class=Response, responses={200: {"content": {"application/x-ndjson": {}}}})
    async def records(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """One record per task that was done, a line of JSON each; `gmel calibrate` reads them."""
        gateway.operator(request)
        rows = await asyncio.to_thread(gateway.ledger.records)
        return Response("".join(json.dumps(row) + "\n" for row in rows), media_type="application/x-ndjson")

    @app.get("/healthz", responses=gives("healthy"))
    async def healthy() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether the process lives."""
        return JSONResponse({"status": "alive"})

    @app.get("/readyz", responses=gives("ready", 200, 503))
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether tasks are taken: the disk takes them, and a server is alive."""
        await gateway.ledger.flush()
        now = gateway.fleet.now()
        alive = sum(server.alive(now) for server in gateway.fleet.servers.values())
        return JSONResponse({"ready": alive > 0, "servers": alive}, 200 if alive else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """For Prometheus."""
        gateway.operator(request)
        return Response(gateway.exposition(), media_type="text/plain; version=0.0.4")

    page = resources.files("gmel.edge") / "dashboard"
    for path, name, kind in (
        ("/", "index.html", "text/html"),
        ("/dashboard.css", "dashboard.css", "text/css"),
        ("/dashboard.js", "dashboard.js", "text/javascript"),
    ):
        app.get(path, include_in_schema=False)(_static((page / name).read_bytes(), kind))


def _static(data: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    headers = {
        "Content-Security-Policy": (
            "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def answer() -> Response:
        return Response(data, media_type=kind, headers=headers)

    return answer
