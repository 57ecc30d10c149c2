"""Routes of inputs: photos of good parts that tasks are drawn on."""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gmel.edge.bodies import read_bytes
from gmel.edge.gateway.gateway import Gateway, RefusalError
from gmel.edge.gateway.schema import INPUT_BODY, Digest, answers, gives
from gmel.edge.inputs import FullError
from gmel.edge.store import StoreError
from gmel.edge.task import MOST_INPUT_BYTES, check_digest

__all__ = ["add_inputs"]

_MOST_UPLOADS = 16
"""At once: their bodies are in memory."""


def add_inputs(app: FastAPI, gateway: Gateway) -> None:
    """Adds the routes."""
    under_way: set[Request] = set()

    @app.put(
        "/v1/inputs/{name}",
        openapi_extra=INPUT_BODY,
        responses=gives("input", 200, 201) | answers(413, 429),
        status_code=201,
    )
    async def put(request: Request, name: Digest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Takes a photo under the SHA-256 of its bytes. 201 means that it is in the store; 200 that it was."""
        caller = gateway.caller(request)
        check_digest(name, "input")
        if caller.role == "server":
            raise RefusalError(403, "inputs come from devices and operators")
        gateway.check_rate(caller)
        if len(under_way) >= _MOST_UPLOADS:
            raise RefusalError(429, f"inputs: {_MOST_UPLOADS} are on their way", 1.0)
        under_way.add(request)
        try:
            data = await read_bytes(request, MOST_INPUT_BYTES)
            if await gateway.inputs.has(name):
                return JSONResponse({"input": name, "new": False}, 200)
            try:
                await gateway.inputs.add(name, data)
            except FullError as error:
                raise RefusalError(503, str(error), 60.0) from error
            except OSError as error:
                gateway.metrics.disk_errors.inc()
                said = str(error) if isinstance(error, StoreError) else f"the disk takes nothing ({error.strerror})"
                raise RefusalError(503, f"input {name}: {said}", 5.0) from error
            return JSONResponse({"input": name, "new": True}, 201)
        finally:
            under_way.discard(request)

    @app.head("/v1/inputs/{name}", response_class=Response, responses={404: {"description": "Not here."}})
    async def look(request: Request, name: Digest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether an input is here; it stays for another day. Whoever has it need not send it."""
        gateway.caller(request)
        found = await gateway.inputs.has(check_digest(name, "input"))
        return Response(status_code=200 if found else 404)

    @app.get(
        "/v1/inputs/{name}",
        response_class=Response,
        responses=answers(404) | {200: {"content": {"application/octet-stream": {}}}},
    )
    async def get(request: Request, name: Digest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The bytes of an input, for the server that works on them."""
        if gateway.caller(request).role == "device":
            raise RefusalError(403, "photos are given to servers and operators")
        data = await gateway.inputs.get(check_digest(name, "input"))
        if data is None:
            raise RefusalError(404, f"input {name}: not here")
        headers = {"ETag": f'"{name}"', "Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type="application/octet-stream", headers=headers)
