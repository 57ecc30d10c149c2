"""The application of a gateway: its routes, its life, and how what goes wrong is told."""

import contextlib
import math
from collections.abc import AsyncGenerator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from gmel import __version__
from gmel.edge.bodies import SlowError, TooLargeError
from gmel.edge.engines.engine import Engine
from gmel.edge.gateway.gateway import Gateway, RefusalError, Settings
from gmel.edge.gateway.inputs import add_inputs
from gmel.edge.gateway.operations import add_operations
from gmel.edge.gateway.policies import add_policies
from gmel.edge.gateway.schema import ERROR, answers
from gmel.edge.gateway.servers import add_servers
from gmel.edge.gateway.tasks import add_tasks
from gmel.edge.ledger import LedgerError
from gmel.edge.plant import Plant
from gmel.edge.store import StoreError
from gmel.edge.traces import OFF, Traces
from gmel.scenario.errors import InputError

__all__ = ["gateway_app"]


def gateway_app(plant: Plant, settings: Settings, engine: Engine | None = None, traces: Traces = OFF) -> FastAPI:
    """The application.

    Args:
        plant: servers and models.
        settings: see there.
        engine: how servers with an address are reached; HTTP if left out.
        traces: where spans of tasks go.

    Raises:
        InputError: settings that cannot be used.
    """
    gateway = Gateway(plant, settings, engine, traces)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        await gateway.open()
        try:
            yield
        finally:
            await gateway.close()

    app = FastAPI(
        title="GMEL gateway",
        version=__version__,
        description="Takes generation tasks of devices, decides where each runs, and loses none.",
        lifespan=life,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=dict.fromkeys((400, 401, 403), ERROR) | answers(408, 413, 422, 503),
    )
    app.state.gateway = gateway

    @app.exception_handler(RefusalError)
    async def refusal(request: Request, error: RefusalError) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request
        headers = {} if error.after_s is None else {"Retry-After": str(min(max(math.ceil(error.after_s), 1), 60))}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": error.message}, error.status, headers)

    @app.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"[:200]}, 422)

    @app.exception_handler(TooLargeError)
    async def too_large(request: Request, error: TooLargeError) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request
        return JSONResponse({"error": str(error)}, 413)

    @app.exception_handler(SlowError)
    async def too_slow(request: Request, error: SlowError) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request
        return JSONResponse({"error": str(error)}, 408, {"Connection": "close"})

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request, error
        return JSONResponse({"error": "body: broke off"}, 400)  # nobody reads it

    @app.exception_handler(LedgerError)
    async def no_ledger(request: Request, error: LedgerError) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request
        gateway.metrics.disk_errors.inc()
        return JSONResponse({"error": f"the ledger cannot be written: {error}"}, 503, {"Retry-After": "5"})

    @app.exception_handler(StoreError)
    async def no_store(request: Request, error: StoreError) -> Response:  # pyright: ignore[reportUnusedFunction]
        del request
        gateway.metrics.disk_errors.inc()
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": "5"})

    add_tasks(app, gateway)
    add_inputs(app, gateway)
    add_servers(app, gateway)
    add_policies(app, gateway)
    add_operations(app, gateway)
    return app
