"""A gateway in the process of a test: its application called without a socket, its servers fake."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from tests.edge_plants import FakeEngine, beat, plant, until

from gmel.edge.gateway.app import gateway_app
from gmel.edge.gateway.gateway import Gateway, Settings

__all__ = ["Inside", "gateway_of"]


@dataclass
class Inside:
    """An open gateway."""

    app: FastAPI
    gateway: Gateway
    engine: FakeEngine
    client: httpx.AsyncClient

    async def beat(self, name: str, **more: Any) -> httpx.Response:
        return await self.client.put(f"/v1/servers/{name}", json={"url": "http://127.0.0.1:9", "speed": 1.0, **more})

    async def submit(self, task_id: str, **more: Any) -> httpx.Response:
        return await self.client.post("/v1/tasks", json={"id": task_id, "device": "d", "model": "part", **more})

    async def entry(self, task_id: str, wait_s: float = 20.0) -> dict[str, Any]:
        return (await self.client.get(f"/v1/tasks/{task_id}", params={"wait_s": wait_s})).json()

    async def all_ended(self) -> None:
        await until(lambda: not self.gateway.dispatcher.jobs, "all tasks ended", 60.0)

    @contextlib.asynccontextmanager
    async def beating(self, *names: str) -> AsyncGenerator[None]:
        """Servers that are heard on and on."""

        async def beat_on() -> None:
            while True:
                for name in names:
                    self.gateway.fleet.hear(name, beat(), time.monotonic())
                await asyncio.sleep(0.2)

        beats = asyncio.create_task(beat_on())
        try:
            yield
        finally:
            beats.cancel()


@contextlib.asynccontextmanager
async def gateway_of(folder: Path, *servers: str, key: str | None = None, **settings: Any) -> AsyncGenerator[Inside]:
    """A gateway whose servers are heard once."""
    engine = FakeEngine()
    app = gateway_app(plant(**dict.fromkeys(servers or ("a", "b"), 1.0)), Settings(folder, **settings), engine)
    async with app.router.lifespan_context(app):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://g", headers=headers) as client:
            inside = Inside(app, app.state.gateway, engine, client)
            for name in servers:
                assert (await inside.beat(name)).status_code == 200
            yield inside
