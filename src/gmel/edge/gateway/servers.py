"""Routes of servers: heartbeats, and the tasks of those that fetch them."""

import base64
import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gmel.edge.bodies import read_json
from gmel.edge.engines.engine import Answer
from gmel.edge.fleet import read_beat
from gmel.edge.gateway.gateway import MOST_BODY, MOST_WAIT_S, Gateway
from gmel.edge.gateway.schema import answers
from gmel.scenario.errors import InputError

__all__ = ["add_servers"]


def add_servers(app: FastAPI, gateway: Gateway) -> None:
    """Adds the routes."""

    @app.put("/v1/servers/{name}", responses=answers(200))
    async def beat(request: Request, name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The heartbeat of a server, every second. The first one is how it joins."""
        gateway.server(request, name)
        said = read_beat(await read_json(request, MOST_BODY))
        server = gateway.fleet.hear(name, said, time.monotonic())
        return JSONResponse({"name": name, "tasks": len(server.flights)})

    @app.get("/v1/servers", responses=answers(200))
    async def servers(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """What is known of each server."""
        gateway.caller(request)
        return JSONResponse({"servers": gateway.servers(time.monotonic())})

    @app.get("/v1/plant", responses=answers(200))
    async def described(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The plant: servers and models, for devices and servers that need it."""
        gateway.caller(request)
        return JSONResponse(gateway.plant.as_json())

    @app.post("/v1/servers/{name}/fetch", responses=answers(200))
    async def fetch(request: Request, name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Tasks for a server that fetches them; answers when there are some, or after `wait_s`."""
        gateway.server(request, name)
        body = await read_json(request, MOST_BODY)
        room, wait_s = body.get("room", 1), body.get("wait_s", 20.0)
        if isinstance(room, bool) or not isinstance(room, int) or not 0 <= room <= 1000:
            raise InputError("room: must be a whole number from 0 to 1000")
        if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 <= wait_s <= MOST_WAIT_S:
            raise InputError(f"wait_s: must be a number from 0 to {MOST_WAIT_S:g}")
        return JSONResponse(await gateway.pull.fetch(name, room, float(wait_s)))

    @app.post("/v1/servers/{name}/tasks/{task_id}", responses=answers(200))
    async def hear(request: Request, name: str, task_id: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        """What a server says of a task that it has fetched."""
        gateway.server(request, name)
        body = await read_json(request, MOST_BODY)
        event = body.pop("event", "beat")
        return JSONResponse({"wanted": gateway.pull.hear(name, task_id, str(event)[:20], body)})

    @app.put("/v1/servers/{name}/tasks/{task_id}", responses=answers(200, 413))
    async def bring(request: Request, name: str, task_id: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The end of a task that a server has fetched."""
        gateway.server(request, name)
        body = await read_json(request, 256 * 2**20)
        try:
            wait_s, switch_s, service_s = (
                max(float(body.get(key, 0.0)), 0.0) for key in ("wait_s", "switch_s", "service_s")
            )
            data = base64.b64decode(body.get("data", ""), validate=True)
        except (ValueError, TypeError) as error:
            raise InputError("data: must be base64, and times numbers") from error
        event, reason = body.get("event"), str(body.get("error", ""))[:500]
        if event == "done":
            kind = str(body.get("kind", "application/octet-stream"))[:100]
            answer = Answer(data, None, kind, wait_s, switch_s, service_s)
        elif event == "failed":
            answer = Answer(None, reason or "failed", wait_s=wait_s, switch_s=switch_s, service_s=service_s)
        else:
            answer = None
        return JSONResponse({"wanted": gateway.pull.bring(name, task_id, answer, reason)})
