"""How a request reaches an edge server and its answer comes back, byte by byte, while it is made.

Two ways, by two libraries, which do the same. A gateway sends every task of a plant, many at once, for which aiohttp
takes several times less processor time than httpx. A device sends its own few, and has httpx anyway.
"""

import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from gmel.edge.engines.engine import LostError, SilentError
from gmel.scenario.errors import InputError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["AiohttpTransport", "HttpxTransport", "Links", "Reply", "Transport"]

_CONNECT_S = 2.0
_MOST_IDLE = 256
_IDLE_S = 15.0
"""A connection without a request is closed after; the servers do it after thirty, and who comes first loses no task."""


@dataclass(frozen=True)
class Links:
    """How servers are reached.

    Attributes:
        stall_s: silence after which a server has stopped.
        key: what the servers are shown, where they ask for it.
        verify: false, or a file of certificates to trust in place of the usual ones.
    """

    stall_s: float = 5.0
    key: str | None = None
    verify: bool | str = True

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


@dataclass(frozen=True)
class Reply:
    """An answer whose head has come: its status, and its bytes as they come."""

    status: int
    chunks: AsyncIterator[bytes]


class Transport(Protocol):
    """Carries requests. Breaking one off closes its connection."""

    def post(self, url: str, body: Any, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Reply]:
        """Sends JSON.

        Raises:
            SilentError: nothing came for `stall_s`, while waiting or reading.
            LostError: it cannot be reached, or broke off.
        """
        ...

    async def delete(self, url: str, most_s: float) -> None:
        """Asks for a deletion; whether it is heard is not told."""
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...


@dataclass(frozen=True)
class _Errors:
    """Failures of a library."""

    silent: tuple[type[Exception], ...]
    lost: tuple[type[Exception], ...]

    @contextlib.contextmanager
    def as_ours(self) -> Generator[None]:
        """Raises them as those of engines."""
        try:
            yield
        except self.silent as error:
            raise SilentError(f"silent ({type(error).__name__})") from error
        except self.lost as error:
            raise LostError(f"{type(error).__name__} {error}".strip()) from error

    async def chunks(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """What comes, until it fails."""
        with self.as_ours():
            async for chunk in chunks:
                yield chunk


class HttpxTransport:
    """By httpx."""

    def __init__(self, links: Links) -> None:
        import httpx  # noqa: PLC0415

        timeout = httpx.Timeout(links.stall_s, connect=min(links.stall_s, _CONNECT_S), pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_MOST_IDLE, keepalive_expiry=_IDLE_S)
        self._client = httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=links.headers, verify=links.verify, trust_env=False
        )
        self._errors = _Errors((httpx.TimeoutException,), (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError))

    @contextlib.asynccontextmanager
    async def post(self, url: str, body: Any, headers: Mapping[str, str]) -> AsyncGenerator[Reply]:
        """As :meth:`Transport.post`."""
        with self._errors.as_ours():
            async with self._client.stream("POST", url, json=body, headers=headers) as response:
                yield Reply(response.status_code, self._errors.chunks(response.aiter_raw()))

    async def delete(self, url: str, most_s: float) -> None:
        """As :meth:`Transport.delete`."""
        with contextlib.suppress(LostError), self._errors.as_ours():
            await self._client.delete(url, timeout=most_s)

    async def close(self) -> None:
        """As :meth:`Transport.close`."""
        with anyio.CancelScope(shield=True):
            await self._client.aclose()


class AiohttpTransport:
    """By aiohttp; to be used from one event loop."""

    def __init__(self, links: Links) -> None:
        """Reads the certificates.

        Raises:
            InputError: they cannot be used.
        """
        import aiohttp  # noqa: PLC0415

        self._library, self._links = aiohttp, links
        self._session: aiohttp.ClientSession | None = None
        self._errors = _Errors((aiohttp.ServerTimeoutError,), (aiohttp.ClientError, OSError, ValueError))
        self._ssl: ssl.SSLContext | bool = links.verify is not False
        if isinstance(links.verify, str):
            try:
                self._ssl = ssl.create_default_context(cafile=links.verify)
            except OSError as error:
                raise InputError(f"{links.verify}: no certificates that can be used ({error})") from error

    def _open(self) -> "aiohttp.ClientSession":
        """The session, made with the first request: it wants a running loop."""
        session = self._session
        if session is None:
            library, links = self._library, self._links
            session = self._session = library.ClientSession(
                connector=library.TCPConnector(limit=0, keepalive_timeout=_IDLE_S, ssl=self._ssl),
                timeout=library.ClientTimeout(
                    total=None, sock_connect=min(links.stall_s, _CONNECT_S), sock_read=links.stall_s
                ),
                headers=links.headers,
                cookie_jar=library.DummyCookieJar(),
                auto_decompress=False,
            )
        return session

    @contextlib.asynccontextmanager
    async def post(self, url: str, body: Any, headers: Mapping[str, str]) -> AsyncGenerator[Reply]:
        """As :meth:`Transport.post`."""
        session = self._open()
        with self._errors.as_ours():
            async with session.post(url, json=body, headers=headers, allow_redirects=False) as response:
                yield Reply(response.status, self._errors.chunks(response.content.iter_any()))

    async def delete(self, url: str, most_s: float) -> None:
        """As :meth:`Transport.delete`."""
        session, limit = self._open(), self._library.ClientTimeout(total=most_s)
        with contextlib.suppress(LostError), self._errors.as_ours():
            async with session.delete(url, timeout=limit, allow_redirects=False):
                pass

    async def close(self) -> None:
        """As :meth:`Transport.close`."""
        if self._session is not None:
            with anyio.CancelScope(shield=True):
                await self._session.close()
