"""Processes of a plant on this machine: started, waited for, ended, whatever happens."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from gmel.scenario.errors import InputError

__all__ = ["Processes"]

_START_S = 60.0
_END_S = 10.0
_KEPT_LINES = 50


class Processes:
    """Commands of `gmel` that print their address when they are ready. On leaving all of them are ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.running: dict[str, subprocess.Popen[str]] = {}
        self._said: dict[str, deque[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        until = time.monotonic() + _END_S
        for process in self.running.values():
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, name: str, *words: str) -> None:
        """Starts `gmel WORDS`; what it says is kept in `NAME.log`."""
        log = (self._folder / f"{name}.log").open("w", encoding="utf-8")
        command = [sys.executable, "-m", "gmel.cli.main", *words]
        # A group of its own: Ctrl-C reaches us alone, and we end them in order.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env={**os.environ}
        )
        log.close()
        self.running[name] = process
        self._said[name] = deque(maxlen=_KEPT_LINES)
        assert process.stdout is not None
        threading.Thread(target=self._read, args=(name, process.stdout), daemon=True).start()

    def address(self, name: str) -> str:
        """Waits for the address that a process prints.

        Raises:
            InputError: it ended first, or took too long.
        """
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            for line in list(self._said[name]):
                if " at http" in line:
                    return line.rsplit(" at ", 1)[1].strip()
            if self.running[name].poll() is not None:
                break
            time.sleep(0.02)
        said = (self._folder / f"{name}.log").read_text(encoding="utf-8").strip().splitlines()
        raise InputError(f"{name}: did not start ({said[-1] if said else 'it said nothing'})")

    def memory_mb(self, name: str) -> float | None:
        """Resident memory of a process; None where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.running[name].pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _read(self, name: str, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):
            for line in stream:
                self._said[name].append(line)
