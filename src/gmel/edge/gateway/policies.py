"""Routes of policies: which one decides, and what another one would have done."""

import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gmel.edge.bodies import read_json
from gmel.edge.gateway.gateway import MOST_BODY, Gateway
from gmel.edge.gateway.schema import POLICY_BODY, gives
from gmel.scenario.errors import InputError

__all__ = ["add_policies"]


def add_policies(app: FastAPI, gateway: Gateway) -> None:
    """Adds the routes."""

    @app.get("/v1/policy", responses=gives("policy"))
    async def policy(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Which policy decides, which did before, and what one in the shadow would have done."""
        gateway.operator(request)
        return JSONResponse(gateway.policy())

    @app.put("/v1/policy", openapi_extra=POLICY_BODY, responses=gives("policy"))
    async def change(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Puts a policy in charge by its name, or with `"shadow": true` beside the one in charge."""
        gateway.operator(request)
        body = await read_json(request, MOST_BODY)
        name, shadow = body.get("name"), body.get("shadow", False)
        if not isinstance(shadow, bool) or not (isinstance(name, str) or (name is None and shadow)):
            raise InputError('body: must be {"name": NAME} or {"name": NAME or null, "shadow": true}')
        if shadow:
            gateway.decider.watch(name)
        else:
            gateway.decider.change(str(name), time.time())
        gateway.tell({"event": "policy", "name": name, "shadow": shadow})
        return JSONResponse(gateway.policy())

    @app.post("/v1/policy/rollback", responses=gives("policy"))
    async def roll_back(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Puts the policy before this one in charge again."""
        gateway.operator(request)
        gateway.decider.roll_back(time.time())
        gateway.tell({"event": "policy", "name": gateway.decider.current.name, "shadow": False})
        return JSONResponse(gateway.policy())
