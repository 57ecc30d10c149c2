"""Bodies of requests, read no further than they may be long."""

import json
from typing import Any

from starlette.requests import Request

from gmel.scenario.errors import InputError

__all__ = ["TooLargeError", "read_bytes", "read_json"]


class TooLargeError(Exception):
    """A body that is longer than what is taken."""


async def read_bytes(request: Request, most: int) -> bytes:
    """The body, as long as it is no longer than `most` bytes.

    Raises:
        TooLargeError: it is.
    """
    said = request.headers.get("content-length", "0")
    if said.isdigit() and int(said) > most:
        raise TooLargeError(f"body: {int(said):,} bytes, at most {most:,} are taken")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise TooLargeError(f"body: at most {most:,} bytes are taken")
    return bytes(body)


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        TooLargeError: too long.
        InputError: not JSON, or no object.
    """
    body = await read_bytes(request, most)
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError("body: not JSON") from error
    if not isinstance(content, dict):
        raise InputError("body: must be a JSON object")
    return content  # pyright: ignore[reportUnknownVariableType]
