"""An application on a port, until it is told to end."""

import asyncio
import contextlib
import ipaddress
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from gmel.scenario.errors import InputError

__all__ = ["Place", "check_open", "listen", "run", "serve"]

_GRACE_S = 5
HEAD_S = 10.0
"""For the head of a request. Who sends nothing, or drips, holds a place that others need."""
_MOST_CONNECTIONS = 4096
_MOST_FILES = 2 * _MOST_CONNECTIONS


@dataclass(frozen=True)
class Place:
    """Where to listen, and with which certificate.

    Attributes:
        host: address.
        port: 0 for a free one.
        certificate: PEM file, with `key` for TLS.
        key: PEM file.
    """

    host: str = "127.0.0.1"
    port: int = 0
    certificate: Path | None = None
    key: Path | None = None

    @property
    def loopback(self) -> bool:
        """Whether this machine alone gets there."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


def check_open(place: Place, keys: Path | None, what: str) -> None:
    """Lets nobody open a door to the network without keys.

    Raises:
        InputError: an address that others reach, and no keys.
    """
    if keys is None and not place.loopback:
        raise InputError(
            f"{what}: listens on {place.host}, which other machines reach, without keys; make some with `gmel key add "
            "FILE` and give --keys FILE, or listen on 127.0.0.1"
        )


def listen(place: Place) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the port is taken, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((place.host, place.port))
        door.listen(1024)
    except OSError as error:
        door.close()
        raise InputError(
            f"{place.host}:{place.port}: cannot listen there ({error.strerror}); choose another --port"
        ) from error
    return door


def run(serving: Coroutine[Any, Any, None]) -> None:
    """Runs until it is done, on the faster event loop where that is installed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:  # a thousand connections would be the end of it
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    factory = import_module("uvloop").new_event_loop if find_spec("uvloop") is not None else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serving)


_Protocol: Any = AutoHTTPProtocol


class _Impatient(_Protocol):
    """A connection that is closed where no request comes in time. uvicorn itself waits for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._hurry()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waits():
            self._hurry()
        else:
            self._rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _waits(self) -> bool:
        """Whether no request is there that is not answered yet."""
        return self.cycle is None or self.cycle.response_complete

    def _hurry(self) -> None:
        if self._timer is None:  # more bytes give no more time
            self._timer = self.loop.call_later(HEAD_S, self._late)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._waits() and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Signals are ours: the application ends its work first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


async def serve(
    app: Any,
    door: socket.socket,
    place: Place,
    ready: Callable[[], None],
    before_end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; a second signal ends at once.

    Args:
        app: an ASGI application.
        door: the socket.
        place: certificates.
        ready: called when requests are answered.
        before_end: awaited between the signal and the end.

    Raises:
        InputError: certificates that cannot be used.
    """
    config = uvicorn.Config(
        app,
        http=_Impatient,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024,
        limit_concurrency=_MOST_CONNECTIONS,
        ssl_certfile=place.certificate,
        ssl_keyfile=place.key,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    def stop() -> None:
        if asked.is_set():
            server.should_exit = server.force_exit = True
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        serving = asyncio.create_task(server.serve([door]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if server.started:
            ready()
        waiting = asyncio.create_task(asked.wait())
        await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if before_end is not None and not serving.done():
            ending = asyncio.ensure_future(before_end())
            while not ending.done() and not server.should_exit:
                await asyncio.wait([ending], timeout=0.1)
            ending.cancel()
        server.should_exit = True
        await serving
    except OSError as error:
        raise InputError(f"certificate: cannot be used ({error})") from error
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
