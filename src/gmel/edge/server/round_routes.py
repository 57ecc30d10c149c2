"""The routes of a server that takes part in federated rounds (`gmel.edge.rounds`)."""

import asyncio
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gmel.edge.bodies import TooLargeError, read_bytes
from gmel.edge.keys import OPEN, Keys
from gmel.scenario.errors import InputError

if TYPE_CHECKING:
    from gmel.edge.rounds import Site  # it brings JAX; a server without a site does without

__all__ = ["round_routes"]

_MOST_HEAD_BYTES = 64 * 2**20


def round_routes(name: str, keys: Keys | None, site: "Site | None") -> list[Route]:
    """What the site would take part in, and one round.

    Args:
        name: of the server.
        keys: whom it listens to: operators alone, since the head of a site says something of its photos.
        site: its rows; none: it takes no part.
    """

    def stranger(request: Request) -> Response | None:
        caller = OPEN if keys is None else keys.caller(request.headers.get("authorization"))
        if caller is None:
            return JSONResponse({"error": "no key, or one that is not known"}, 401, {"WWW-Authenticate": "Bearer"})
        if caller.role != "operator":
            return JSONResponse({"error": "this is for operators"}, 403)
        if site is None:
            return JSONResponse({"error": f"server {name}: has no rows of a site, see --site-rows"}, 404)
        return None

    async def facts(request: Request) -> Response:
        refused = stranger(request)
        if refused is not None or site is None:
            return refused or Response(status_code=404)
        return JSONResponse(site.facts())

    async def turn(request: Request) -> Response:
        refused = stranger(request)
        if refused is not None or site is None:
            return refused or Response(status_code=404)
        try:
            learned = await asyncio.to_thread(site.turn, await read_bytes(request, _MOST_HEAD_BYTES))
        except TooLargeError as error:
            return JSONResponse({"error": str(error)}, 413)
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)
        return Response(learned, media_type="application/octet-stream")

    return [Route("/v1/rounds", facts), Route("/v1/rounds", turn, methods=["POST"])]
