"""The rounds of federated training through Flower: a SuperLink and one SuperNode a site, as processes on this machine.

They show that our average and our training run over a network of others, with the same result; on several machines the
operator starts the same programs. Needs the extra `flower`. Flower's telemetry and its look for updates are switched
off, and its files are in a folder that goes with the run.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.numpy import load as parse_arrays

from gmel.evaluation.progress import Reporter
from gmel.federation.average import Refusal, Rule
from gmel.federation.flower_apps import FAILED, HEAD, PROGRESS, RESULT, Job
from gmel.federation.site_file import rows_to_bytes
from gmel.federation.training import Elsewhere, Plan, RoundLog, SiteRows, Trained
from gmel.scenario.errors import InputError

__all__ = ["FlowerSettings", "Tls", "check_installed", "elsewhere_of", "train_over_flower"]

_LOOPBACK = "127.0.0.1"
_STOP_S = 5.0
"""How long a process may take to end by itself."""
_CLIENT = "gmel.federation.flower_apps:client_app"
_APP = "gmel-sites"


@dataclass(frozen=True)
class Tls:
    """Files of the connection between SuperLink and SuperNodes, PEM.

    Attributes:
        authority: certificate that the sites trust.
        certificate: of the SuperLink; must name 127.0.0.1.
        key: of the certificate.
    """

    authority: Path
    certificate: Path
    key: Path

    def __post_init__(self) -> None:
        for name in ("authority", "certificate", "key"):
            if not getattr(self, name).is_file():
                raise InputError(f"tls {name}: {getattr(self, name)} is no file")


@dataclass(frozen=True)
class FlowerSettings:
    """How the processes run.

    Attributes:
        start_s: longest wait for all of them to be there.
        round_s: longest wait for the answers of a round; then it goes on without the others.
        tls: files for encrypted connections; without encryption, which is for this machine only, where there are none.
        client: function that makes the ClientApp, `module:function`.
    """

    start_s: float = 180.0
    round_s: float = 120.0
    tls: Tls | None = None
    client: str = _CLIENT

    def __post_init__(self) -> None:
        for name in ("start_s", "round_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"flower {name}: {getattr(self, name)}, must be positive and finite")


def check_installed() -> None:
    """Says what to install where Flower is missing.

    Raises:
        InputError: it is missing.
    """
    if find_spec("flwr") is None:
        raise InputError("over: Flower is not installed; pip install 'gmel[flower]'")


def elsewhere_of(
    over: str,
    round_s: float = 120.0,
    authority: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Elsewhere | None:
    """Where the experiment trains a detector once more.

    Args:
        over: `process`: nowhere else; `flower`.
        round_s: longest wait for the answers of a round.
        authority, certificate, key: all three for encrypted connections, or none.

    Raises:
        InputError: another word, Flower is missing, or a part of the files for encryption.
    """
    if over not in ("process", "flower"):
        raise InputError(f"over: {over!r}, must be one of process, flower")
    if over == "process":
        return None
    check_installed()
    tls = None
    if authority is not None and certificate is not None and key is not None:
        tls = Tls(authority, certificate, key)
    elif not authority is certificate is key is None:
        raise InputError("tls: give the authority, the certificate and the key, or none of them")
    settings = FlowerSettings(round_s=round_s, tls=tls)

    def elsewhere(sites: Sequence[SiteRows], plan: Plan, seed: int, reporter: Reporter) -> Trained:
        return train_over_flower(sites, plan, seed, reporter, settings=settings)

    return elsewhere


def train_over_flower(
    sites: Sequence[SiteRows],
    plan: Plan,
    seed: int,
    reporter: Reporter,
    rule: Rule | None = None,
    settings: FlowerSettings | None = None,
) -> Trained:
    """Trains one head over all sites, each in a process of its own; as `train_head`, and with its result.

    All processes end with the call, also when it is interrupted or terminated.

    Args:
        sites: rows of the sites.
        plan: how.
        seed: of drop-outs and stragglers.
        reporter: told of the rounds.
        rule: how updates are averaged; by weight where it is left out.
        settings: how the processes run.

    Raises:
        InputError: Flower is missing, sites of one name or without rows, or processes that do not start.
    """
    check_installed()
    names = tuple(site.name for site in sites)
    if len(set(names)) != len(names) or not all(site.labels.size for site in sites):
        raise InputError("sites: each needs a name of its own and at least one photo")
    chosen = settings or FlowerSettings()
    job = Job(names, plan, seed, rule or Rule(), chosen.start_s, chosen.round_s)
    home = Path(tempfile.mkdtemp(prefix="gmel-flower-"))
    with _ending_on_sigterm():
        network = None
        try:
            network = _Network(home, sites, job, chosen)
            reporter.stage(f"Flower: a SuperLink and {len(sites)} SuperNodes start")
            network.start()
            network.wait(reporter)
            return _outcome(home)
        finally:
            _stop_all(home, [] if network is None else list(network.processes.values()))
            shutil.rmtree(home, ignore_errors=True)


class _Network:
    """The processes of a run, their files and their logs.

    Attributes:
        home: their folder.
        processes: those that were started here, by name; they start others.
    """

    def __init__(self, home: Path, sites: Sequence[SiteRows], job: Job, settings: FlowerSettings) -> None:
        self.home = home
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._job = job
        self._settings = settings
        self._address = f"{_LOOPBACK}:{_free_port()}"
        self._rows = [home / f"site-{place}.safetensors" for place in range(len(sites))]
        for path, site in zip(self._rows, sites, strict=True):
            path.write_bytes(rows_to_bytes(site))
        (home / "job.json").write_text(job.to_text(), "utf-8")
        self._write_app()

    def start(self) -> None:
        """Starts the SuperLink, the SuperNodes and the run."""
        tls, port = self._settings.tls, self._address.rpartition(":")[2]
        secure = ["--insecure"]
        trusting = ["--insecure"]
        if tls is not None:
            secure = ["--ssl-certfile", str(tls.certificate), "--ssl-keyfile", str(tls.key)]
            secure += ["--ssl-ca-certfile", str(tls.authority)]
            trusting = ["--root-certificates", str(tls.authority)]
        link = ["flower-superlink", *secure, "--host", _LOOPBACK, "--port", port]
        self._launch("superlink", [*link, "--disable-runtime-dependency-installation"])
        self._await_port(int(port))
        for place, path in enumerate(self._rows):
            node = ["flower-supernode", *trusting, "--superlink", self._address, "--host", _LOOPBACK]
            node += ["--port", str(_free_port()), "--node-config", f'rows="{path}"']
            self._launch(f"supernode-{place}", node)
        told = subprocess.run(
            [_program("flwr"), "run", str(self.home / _APP), "gmel"],
            env=_environment(self.home),
            capture_output=True,
            timeout=self._settings.start_s,
            check=False,
        )
        if told.returncode:
            raise InputError(f"flower: the run was not accepted: {_last_line(told.stderr or told.stdout)}")

    def wait(self, reporter: Reporter) -> None:
        """Waits for the result; no longer than all time-outs together.

        Raises:
            InputError: the server failed, or is silent for too long.
        """
        plan = self._job.plan
        # A message is under way a little longer than the server waits for it.
        end = time.monotonic() + 2 * self._job.start_s + (plan.rounds + 1) * (self._job.round_s + 5.0)
        done = 0
        while not (self.home / RESULT).exists():
            if (self.home / FAILED).exists():
                raise InputError(json.loads((self.home / FAILED).read_text("utf-8"))["reason"])
            if self.processes["superlink"].poll() is not None:
                raise InputError(f"flower: the SuperLink has ended: {self._said('superlink')}")
            if time.monotonic() > end:
                raise InputError(f"flower: no result in time; the SuperLink says: {self._said('superlink')}")
            if (self.home / PROGRESS).exists():
                done = int(json.loads((self.home / PROGRESS).read_text("utf-8"))["rounds"])
                reporter.advance(done, plan.rounds, f"Flower: round {done} of {plan.rounds}")
            time.sleep(0.1)
        reporter.advance(plan.rounds, plan.rounds, f"Flower: round {plan.rounds} of {plan.rounds}")

    def _write_app(self) -> None:
        """The app that Flower sends to its processes: it only names ours."""
        module, _, function = self._settings.client.partition(":")
        app = self.home / _APP
        (app / "gmel_sites").mkdir(parents=True)
        (app / "gmel_sites" / "__init__.py").write_text("")
        (app / "gmel_sites" / "client.py").write_text(f"from {module} import {function}\n\napp = {function}()\n")
        (app / "gmel_sites" / "server.py").write_text(
            "from gmel.federation.flower_apps import server_app\n\napp = server_app()\n"
        )
        (app / "pyproject.toml").write_text(
            f'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n\n'
            f'[project]\nname = "{_APP}"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
            f'dependencies = []\n\n[tool.flwr.app]\npublisher = "gmel"\n\n'
            f'[tool.flwr.app.components]\nserverapp = "gmel_sites.server:app"\n'
            f'clientapp = "gmel_sites.client:app"\n\n[tool.flwr.app.config]\nfolder = "{self.home}"\n'
        )
        tls = self._settings.tls
        secure = "insecure = true" if tls is None else f'root-certificates = "{tls.authority.resolve()}"'
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "gmel"\n\n[superlink.gmel]\naddress = "{self._address}"\n{secure}\n'
        )

    def _launch(self, name: str, command: list[str]) -> None:
        with (self.home / f"{name}.log").open("wb") as log:
            # A session of its own: the terminal's Ctrl-C goes to us, and we end it in order.
            self.processes[name] = subprocess.Popen(
                [_program(command[0]), *command[1:]],
                env=_environment(self.home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await_port(self, port: int) -> None:
        end = time.monotonic() + self._settings.start_s
        while True:
            with suppress(OSError), socket.create_connection((_LOOPBACK, port), timeout=1.0):
                return
            if self.processes["superlink"].poll() is not None or time.monotonic() > end:
                raise InputError(f"flower: the SuperLink does not start: {self._said('superlink')}")
            time.sleep(0.1)

    def _said(self, name: str) -> str:
        return _last_line((self.home / f"{name}.log").read_bytes())


def _outcome(home: Path) -> Trained:
    told: dict[str, Any] = json.loads((home / RESULT).read_text("utf-8"))
    head = parse_arrays((home / HEAD).read_bytes())
    log = tuple(
        RoundLog(
            entry["round"],
            tuple(entry["used"]),
            tuple(entry["absent"]),
            dict(entry["late"]),
            tuple(Refusal(**refusal) for refusal in entry["refusals"]),
            entry["note"],
        )
        for entry in told["log"]
    )
    return Trained(tuple(told["classes"]), head["weights"], head["bias"], log, int(told["sent_bytes"]))


def _environment(home: Path) -> dict[str, str]:
    """What the processes of Flower see: no telemetry, no look for updates, our packages, files in our folder."""
    found = dict(os.environ)
    found.update(
        FLWR_HOME=str(home),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
        PYTHONPATH=os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry),
        # Flower starts its parts by their bare names.
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    )
    # Sites in processes of one machine would fight for the memory of its GPU, and a head needs none.
    found.setdefault("JAX_PLATFORMS", "cpu")
    return found


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise InputError(f"over: {name} is not beside this Python nor on the path; pip install 'gmel[flower]'")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _last_line(text: bytes) -> str:
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "nothing"


def _stop_all(home: Path, started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends every process of a run, also those that Flower has started in turn: they all carry the run's folder."""
    for strength in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + _STOP_S
        for process in _processes_of(home):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, strength)
        while _processes_of(home) and time.monotonic() < end:
            time.sleep(0.05)
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)


def _processes_of(home: Path) -> list[int]:
    """Living processes whose environment names the folder as Flower's home."""
    mark = f"FLWR_HOME={home}".encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


@contextmanager
def _ending_on_sigterm() -> Generator[None]:
    """Termination ends the processes as Ctrl-C does, where signals can be caught (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
