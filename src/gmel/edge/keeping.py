"""How long what has ended is kept: old tasks leave the ledger, and results that no task refers to leave the store.

Little by little, through the one writer, so that accepting does not wait. A task without an end never leaves.
"""

import asyncio
import logging
import math
import time
from collections.abc import Container, Sequence

from gmel.edge.ledger import Ledger
from gmel.edge.store import PARTS, Store

__all__ = ["Keeper"]

_FIRST_S = 30.0
EVERY_S = 600.0
"""Between looks."""
_DAY_S = 86400.0
_TOGETHER = 100
"""Tasks that leave in one transaction, and names that are looked up at once."""
_REST_S = 0.05
_PARTS_EACH = 8
"""Parts of the store that are looked through each time, for results that were left there by a crash."""
_FRESH_S = 3600.0
"""A result that was put there lately may belong to a task whose end is being written."""
_log = logging.getLogger("gmel.gateway")


class Keeper:
    """See the module.

    Args:
        ledger: tasks.
        store: larger results.
        writing: names of results whose task is about to refer to them.
        leaving: is told the names of results while they are taken away.
        days: that a task is kept after its end; 0 for ever.
        gb: results of at most so many gigabytes; those of the tasks that ended first go first. None: any number.
    """

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        writing: Container[str],
        leaving: set[str],
        days: float = 0.0,
        gb: float | None = None,
    ) -> None:
        self._ledger, self._store, self._writing, self._leaving = ledger, store, writing, leaving
        self._days, self._gb = days, gb
        self._began, self._began_s = time.monotonic(), time.time()
        self._part = 0
        self.tasks = 0
        """That have left."""

    async def keep(self) -> None:
        """Looks again and again, until it is cancelled."""
        if self._days <= 0 and self._gb is None:
            return
        await asyncio.sleep(_FIRST_S)
        while True:
            try:
                await self.look()
            except Exception:  # without it the disk would fill
                _log.exception("keeping: goes on later")
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Takes out what is too old or too much now.

        Raises:
            LedgerError: the ledger cannot be written now.
            OSError: a result cannot be taken away.
        """
        before = self.tasks
        if self._days > 0:
            await self._forget(self.now_s() - self._days * _DAY_S, None)
        if self._gb is not None:
            over = await asyncio.to_thread(self._ledger.result_bytes) - int(self._gb * 1e9)
            if over > 0:
                await self._forget(math.inf, over)
        await self._sweep(range(self._part, self._part + _PARTS_EACH))
        self._part = (self._part + _PARTS_EACH) % PARTS
        if self.tasks > before:
            _log.info("keeping: %d old tasks have left", self.tasks - before)

    def now_s(self) -> float:
        """The wall clock, but not what it was put ahead since the start: that would make everything old at once."""
        return min(time.time(), self._began_s + time.monotonic() - self._began)

    async def _forget(self, before_s: float, over: int | None) -> None:
        while over is None or over > 0:
            gone = await self._ledger.forget(before_s, _TOGETHER, over)
            self.tasks += gone.tasks
            await self._remove(gone.results)
            if over is not None:
                over -= gone.result_bytes
            if gone.tasks == 0 or (over is None and gone.tasks < _TOGETHER):
                return
            await asyncio.sleep(_REST_S)

    async def _sweep(self, parts: range) -> None:
        """Takes away what nobody refers to in some parts of the store."""
        held = await asyncio.to_thread(lambda: list(self._store.held(parts)))
        names = [each.name for each in held if each.age_s > _FRESH_S]
        for first in range(0, len(names), _TOGETHER):
            await self._remove(names[first : first + _TOGETHER])
            await asyncio.sleep(_REST_S)

    async def _remove(self, names: Sequence[str]) -> None:
        """Takes away what nobody refers to. From the looks on, whoever makes the same again waits for us."""
        if not names:
            return
        referred = self._ledger.referred(names)
        gone = {name for name in names if name not in referred and name not in self._writing}
        self._leaving |= gone
        try:
            for name in sorted(gone):
                await asyncio.to_thread(self._store.remove, name)
        finally:
            self._leaving -= gone
