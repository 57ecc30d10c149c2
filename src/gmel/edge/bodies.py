"""Bodies of requests, read no further than they may be long."""

import asyncio
import json
from typing import Any

from starlette.requests import Request

from gmel.scenario.errors import InputError

__all__ = ["SlowError", "TooLargeError", "read_bytes", "read_json"]

_PATIENCE_S = 20.0
_LEAST_BYTES_PER_S = 1e6
"""Of a long body; a short one has `_PATIENCE_S`."""


class TooLargeError(Exception):
    """A body that is longer than what is taken."""


class SlowError(Exception):
    """A body that drips: whoever sends it would hold a connection for ever."""


async def read_bytes(request: Request, most: int) -> bytes:
    """The body, as long as it is no longer than `most` bytes.

    Raises:
        TooLargeError: it is.
        SlowError: it does not come to an end.
    """
    said = request.headers.get("content-length", "0")
    if said.isascii() and said.isdigit() and int(said) > most:
        raise TooLargeError(f"body: {int(said):,} bytes, at most {most:,} are taken")
    body = bytearray()
    patience_s = _PATIENCE_S + most / _LEAST_BYTES_PER_S
    try:
        async with asyncio.timeout(patience_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise TooLargeError(f"body: at most {most:,} bytes are taken")
    except TimeoutError as error:
        raise SlowError(f"body: not here after {patience_s:g} s") from error
    return bytes(body)


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        TooLargeError: too long.
        SlowError: it does not come to an end.
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
