"""Photos that devices have given to draw on, at the gateway: checked when they come, gone when nobody wants them.

An input is known by the SHA-256 of its bytes. Sent again it is the same one and costs nothing. It stays while a task
without an end names it, and for a day after it was last sent or named.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection

from gmel.edge.store import Store, name_of
from gmel.edge.task import MOST_INPUT_PIXELS
from gmel.scenario.errors import InputError
from gmel.synthesis.data.reading import grey_of

__all__ = ["KEPT_S", "FullError", "Inputs", "check_input"]

KEPT_S = 86_400.0
_RENEW_S = 3600.0
"""An input that was sent or named within this time is there, and its age is not begun anew."""
_SWEEP_S = 900.0


class FullError(Exception):
    """No more inputs are taken now."""


def check_input(name: str, data: bytes) -> None:
    """Lets through what is a photo and has this name.

    Raises:
        InputError: something else, in one line.
    """
    found = name_of(data)
    if found != name:
        raise InputError(f"input {name}: the body has the SHA-256 {found}; send the file whose name this is")
    grey_of(data, f"input {name}", MOST_INPUT_PIXELS)


class Inputs:
    """See the module.

    Args:
        store: where they lie.
        most_bytes: of all together.
    """

    def __init__(self, store: Store, most_bytes: int) -> None:
        self._store, self._most_bytes = store, most_bytes
        self._used: dict[str, float] = {}
        """When each was sent or named last, of the monotonic clock: a wall clock that jumps removes none of these."""
        self._sizes: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._damaged: set[str] = set()
        self._checking = asyncio.Semaphore(2)  # each may take some hundred megabytes while it is unpacked

    async def has(self, name: str) -> bool:
        """Whether an input is here; if so it stays for another day.

        Raises:
            StoreError: nobody knows.
        """
        now = time.monotonic()
        used = self._used.get(name)
        if used is not None and now - used < _RENEW_S:
            return True
        if not await asyncio.to_thread(self._store.has, name) or name in self._leaving | self._damaged:
            return False
        with contextlib.suppress(OSError):  # its age on disk is for the time after a restart
            await asyncio.to_thread(self._store.keep, name)
        self._used[name] = now
        return True

    async def add(self, name: str, data: bytes) -> None:
        """Takes an input; when this returns it is in the store.

        Raises:
            InputError: no photo, or not of this name.
            FullError: too many are here.
            OSError: the store takes nothing now.
        """
        async with self._checking:
            await asyncio.to_thread(check_input, name, data)
        if sum(self._sizes.values()) + len(data) > self._most_bytes:
            raise FullError(
                f"inputs: {self._most_bytes / 1e9:g} GB are here; those that no task names leave after a day"
            )
        self._sizes[name] = len(data)  # before it is there, or several at once would pass together
        try:
            await asyncio.to_thread(self._store.put, data)
        except BaseException:
            self._sizes.pop(name, None)
            raise
        self._used[name] = time.monotonic()
        self._damaged.discard(name)

    async def get(self, name: str) -> bytes | None:
        """The bytes of an input; None where it is not here, or damaged.

        Raises:
            StoreError: nobody knows.
        """
        data = await asyncio.to_thread(self._store.get, name)
        if data is None and self._used.pop(name, None) is not None:  # whoever sends it again has to be heard
            self._damaged.add(name)
        return data

    async def sweep(self, named: Callable[[], Collection[str]]) -> int:
        """Removes those that nobody has sent or named for a day; how many.

        Args:
            named: gives the inputs of tasks without an end.

        Raises:
            OSError: the store did not let us.
        """
        before = set(self._sizes)
        found = await asyncio.to_thread(lambda: list(self._store.held()))
        came = {name: size for name, size in self._sizes.items() if name not in before}  # while we looked
        self._sizes = {each.name: each.size for each in found} | came
        gone = 0
        for each in found:
            now = time.monotonic()
            used_s = now - self._used.get(each.name, now - KEPT_S)
            if each.age_s < KEPT_S or used_s < KEPT_S or each.name in named():
                continue
            self._used.pop(each.name, None)
            self._leaving.add(each.name)  # who asks from now on hears that it is not here
            try:
                await asyncio.to_thread(self._store.remove, each.name)
            finally:
                self._leaving.discard(each.name)
            self._sizes.pop(each.name, None)
            gone += 1
        return gone

    async def keep_tidy(self, named: Callable[[], Collection[str]]) -> None:
        """Sweeps now and then, until it is cancelled."""
        while True:
            with contextlib.suppress(OSError):  # the next time
                await self.sweep(named)
            await asyncio.sleep(_SWEEP_S)
