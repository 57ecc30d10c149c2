"""The environment of `hall-20x5` in plain NumPy: what the compiled one is measured against.

Written on its own, from the model and not from the JAX code: float64, one environment (`NumpyEnvironment`: arrays where
they are long, Python numbers in the queues, where they are short) and many at once (`BatchedNumpyEnvironment`: the
same, vectorised over environments). Both do the work of a `step` of the compiled environment: draw requests and fading,
decide, transmit, serve first in, first out, account projected latencies and the reward, advance.
`tests/test_benchmarks.py` replays the same requests through both and through the compiled one.

Covered is what that scenario uses: one GPU a server, no model switching, late deadlines, links without contention. The
broadcasts and what devices remember, which only observations read, are left out: no observation is made here. Tables
are as long as the fullest environment of the slot needs; a compiled program has fixed ones.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmel.scenario.schema import Scenario

__all__ = ["BatchedNumpyEnvironment", "BatchedRequests", "Finished", "Model", "NumpyEnvironment", "SlotRequests"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class Model:
    """The numbers of a scenario that the environments need."""

    devices: int
    slot_s: float
    device_speed: float
    server_speed: Floats
    rate_per_slot: float
    work: tuple[float, float]
    size_bit: tuple[float, float]
    snr_db: tuple[float, float]
    bandwidth_hz: float
    floor: float
    latency_weight: float
    latency_scale_s: float
    clip: float

    @classmethod
    def of(cls, scenario: Scenario) -> "Model":
        """The numbers of `scenario`.

        Raises:
            ValueError: it uses something that is not built here.
        """
        radio, tasks, reward = scenario.radio, scenario.tasks, scenario.reward
        covered = (
            tasks.kind == "uniform"
            and tasks.deadline == "late"
            and tasks.noise_sigma == 0
            and not scenario.switching
            and all(server.gpus == 1 for server in scenario.servers)
            and (radio.model, radio.rate, radio.fading) == ("uniform-snr", "shannon", "block")
            and (radio.floor, radio.sharing, radio.download) == ("clip", "none", False)
            and scenario.arrivals.kind == "poisson"
            and scenario.arrivals.device_skew == 0
            and scenario.slot.latency_from == "decided"
            and not reward.miss
            and not reward.energy
        )
        rate = scenario.arrival_rate_per_s
        if not covered or rate is None or tasks.work is None or tasks.bits_in is None or reward.latency_scale_s is None:
            raise ValueError(f"{scenario.name}: the NumPy environment covers scenarios like hall-20x5 only")
        return cls(
            devices=scenario.devices.count,
            slot_s=scenario.slot.length_s,
            device_speed=scenario.devices.speed.mean,
            server_speed=np.array([server.speed for server in scenario.servers]),
            rate_per_slot=rate * scenario.slot.length_s,
            work=(tasks.work.low, tasks.work.high),
            size_bit=(tasks.bits_in.low, tasks.bits_in.high),
            snr_db=radio.snr_db,
            bandwidth_hz=radio.uplink_share * radio.bandwidth_hz,
            floor=10 ** (0.1 * radio.floor_snr_db),
            latency_weight=reward.latency,
            latency_scale_s=reward.latency_scale_s,
            clip=reward.clip,
        )

    def draw_snr(self, random: np.random.Generator) -> Floats:
        """Mean SNR of each link, devices x servers."""
        return 10 ** (0.1 * random.uniform(*self.snr_db, (self.devices, len(self.server_speed))))

    def draw(self, random: np.random.Generator) -> "SlotRequests":
        """Random requests of a slot."""
        count = int(random.poisson(self.rate_per_slot))
        return SlotRequests(
            device=random.integers(0, self.devices, count),
            work=random.uniform(*self.work, count),
            size_bit=random.uniform(*self.size_bit, count),
            fade=random.exponential(size=(count, len(self.server_speed))),
        )


class SlotRequests(NamedTuple):
    """The requests of one slot, without empty rows. `fade`: power gain of the links of the requesting device."""

    device: Integers
    work: Floats
    size_bit: Floats
    fade: Floats


class Finished(NamedTuple):
    """A task whose latency is final: the slot and the row it was decided in."""

    slot: int
    row: int
    latency_s: float


@dataclass
class _Task:
    """An upload on its way. `ready_s` is when it ends, seconds after the start of the slot."""

    slot: int
    row: int
    server: int
    ready_s: float
    service_s: float
    waited_s: float = 0.0
    latency_s: float = 0.0
    cost: float = 0.0


@dataclass
class NumpyEnvironment:
    """One environment."""

    scenario: Scenario
    seed: int
    snr: Floats | None = None
    """Mean SNR of each link, devices x servers; drawn where it is not given."""
    slot: int = field(default=0, init=False)
    flying: list[_Task] = field(default_factory=list, init=False)
    server_free_s: list[float] = field(default_factory=list, init=False)
    """Time until each server is free, tasks whose upload has ended counted: what the servers announce."""

    def __post_init__(self) -> None:
        self._model = model = Model.of(self.scenario)
        self._random = np.random.default_rng(self.seed)
        if self.snr is None:
            self.snr = model.draw_snr(self._random)
        self._snr = self.snr
        self._speed: list[float] = model.server_speed.tolist()
        self.server_free_s = [0.0] * len(self._speed)
        self._device_free_s = [0.0] * model.devices

    def draw(self) -> SlotRequests:
        """Random requests of a slot."""
        return self._model.draw(self._random)

    def random_actions(self, requests: SlotRequests) -> Integers:
        """An option of each request: 0 the device itself, j server j - 1."""
        return self._random.integers(0, len(self._speed) + 1, len(requests.device))

    def step(self, requests: SlotRequests, action: Integers) -> tuple[float, list[Finished]]:
        """One slot: the reward of the team, and the tasks whose latency became final."""
        model = self._model
        snr = np.maximum(self._snr[requests.device] * requests.fade, model.floor)
        upload_s = requests.size_bit[:, None] / (model.bandwidth_hz * np.log2(1 + snr))
        finished: list[Finished] = []
        reward = 0.0
        rows = zip(requests.device.tolist(), requests.work.tolist(), action.tolist(), strict=True)
        for row, (device, work, option) in enumerate(rows):
            if option:
                server = option - 1
                task = _Task(self.slot, row, server, float(upload_s[row, server]), work / self._speed[server])
                self.flying.append(task)
            else:
                # The device serves its own tasks one after another; nothing can change that later.
                end_s = self._device_free_s[device] + work / model.device_speed
                self._device_free_s[device] = end_s
                finished.append(Finished(self.slot, row, end_s))
                reward -= self._cost(end_s)
        reward -= self._serve(finished)
        slot_s = model.slot_s
        self._device_free_s = [max(free_s - slot_s, 0.0) for free_s in self._device_free_s]
        self.server_free_s = [max(free_s - slot_s, 0.0) for free_s in self.server_free_s]
        for task in self.flying:
            task.ready_s -= slot_s
            task.waited_s += slot_s
        self.slot += 1
        return reward, finished

    def _serve(self, finished: list[Finished]) -> float:
        """Uploads pass through their servers in order of completion; returns the change of the projected cost."""
        self.flying.sort(key=lambda task: task.ready_s)
        # Those that end after the slot are only projected: a later task may still overtake them.
        free_s = self.server_free_s.copy()
        still: list[_Task] = []
        change = 0.0
        for task in self.flying:
            end_s = max(free_s[task.server], task.ready_s) + task.service_s
            free_s[task.server] = end_s
            latency_s = end_s + task.waited_s
            cost = self._cost(latency_s)
            change += cost - task.cost
            task.latency_s, task.cost = latency_s, cost
            if task.ready_s < self._model.slot_s:
                self.server_free_s[task.server] = end_s
                finished.append(Finished(task.slot, task.row, latency_s))
            else:
                still.append(task)
        self.flying = still
        return change

    def _cost(self, latency_s: float) -> float:
        model = self._model
        return model.latency_weight * min(latency_s / model.latency_scale_s, model.clip)


class BatchedRequests(NamedTuple):
    """The requests of one slot of every environment, padded to one length."""

    present: Booleans
    device: Integers
    work: Floats
    size_bit: Floats
    fade: Floats


class _Uploads(NamedTuple):
    """Uploads on their way, one row each; all but `present` mean nothing where it is false."""

    present: Booleans
    slot: Integers
    row: Integers
    server: Integers
    ready_s: Floats
    service_s: Floats
    waited_s: Floats
    cost: Floats


class BatchedNumpyEnvironment:
    """Many environments, every operation over all of them."""

    def __init__(self, scenario: Scenario, environments: int, seed: int, snr: Floats | None = None) -> None:
        """`snr`: mean SNR of each link, environments x devices x servers; drawn where it is not given."""
        self._model = model = Model.of(scenario)
        self._random = np.random.default_rng(seed)
        servers = len(model.server_speed)
        if snr is None:
            snr = 10 ** (0.1 * self._random.uniform(*model.snr_db, (environments, model.devices, servers)))
        self._snr = snr
        self._each = np.arange(environments)
        self._server_free_s = np.zeros((environments, servers))
        self._device_free_s = np.zeros((environments, model.devices))
        self._flying = _Uploads(
            *(np.zeros((environments, 0), kind) for kind in (bool, int, int, int, float, float, float, float))
        )
        self.slot = 0

    def draw(self) -> BatchedRequests:
        """Random requests of a slot; as many rows as the environment with the most needs."""
        model, random = self._model, self._random
        count = random.poisson(model.rate_per_slot, len(self._each))
        shape = (len(self._each), int(count.max()))
        return BatchedRequests(
            present=np.arange(shape[1]) < count[:, None],
            device=random.integers(0, model.devices, shape),
            work=random.uniform(*model.work, shape),
            size_bit=random.uniform(*model.size_bit, shape),
            fade=random.exponential(size=(*shape, len(model.server_speed))),
        )

    def random_actions(self, requests: BatchedRequests) -> Integers:
        """An option of each request: 0 the device itself, j server j - 1."""
        return self._random.integers(0, len(self._model.server_speed) + 1, requests.present.shape)

    def step(self, requests: BatchedRequests, action: Integers) -> tuple[Floats, list[Finished], Integers]:
        """One slot: the reward of each team, the tasks whose latency became final, and the environment of each."""
        reward, final, uploads, latency_s = self.advance(requests, action)
        environment, place = np.nonzero(final)
        columns = zip(
            uploads.slot[environment, place].tolist(),
            uploads.row[environment, place].tolist(),
            latency_s[environment, place].tolist(),
            strict=True,
        )
        return reward, [Finished(*column) for column in columns], environment

    def advance(self, requests: BatchedRequests, action: Integers) -> tuple[Floats, Booleans, _Uploads, Floats]:
        """As `step`, with the final tasks left in their tables: local ones have no server (-1)."""
        model = self._model
        each = self._each[:, None]
        count = requests.present.shape[1]
        server = action - 1
        local = requests.present & (action == 0)
        remote = requests.present & (action > 0)
        to = np.maximum(server, 0)
        snr = self._snr[each, requests.device, to]
        fade = requests.fade[each, np.arange(count), to]
        rate_bps = model.bandwidth_hz * np.log2(1 + np.maximum(snr * fade, model.floor))
        own_end_s = self._serve_devices(requests, local)
        fresh = _Uploads(
            present=remote,
            slot=np.full(remote.shape, self.slot),
            row=np.broadcast_to(np.arange(count), remote.shape),
            server=server,
            ready_s=requests.size_bit / rate_bps,
            service_s=requests.work / model.server_speed[to],
            waited_s=np.zeros(remote.shape),
            cost=np.zeros(remote.shape),
        )
        merged = _Uploads(*(np.concatenate([old, new], axis=1) for old, new in zip(self._flying, fresh, strict=True)))
        end_s, ready_in_slot = self._serve_servers(merged)
        before = self._flying.present.shape[1]
        end_s[:, before:] = np.where(local, own_end_s, end_s[:, before:])
        is_local = np.concatenate([np.zeros((len(self._each), before), bool), local], axis=1)
        counted = merged.present | is_local
        latency_s = end_s + merged.waited_s
        cost = model.latency_weight * np.minimum(latency_s / model.latency_scale_s, model.clip)
        reward = -np.sum(np.where(counted, cost - merged.cost, 0.0), axis=1)
        final = ready_in_slot | is_local
        self._keep(merged._replace(cost=cost), merged.present & ~ready_in_slot)
        self._server_free_s = np.maximum(self._server_free_s - model.slot_s, 0.0)
        self._device_free_s = np.maximum(self._device_free_s - model.slot_s, 0.0)
        self.slot += 1
        return reward, final, merged, latency_s

    def _serve_devices(self, requests: BatchedRequests, local: Booleans) -> Floats:
        """Local tasks, one row after another: a device may have several."""
        end_s = np.zeros(local.shape)
        service_s = np.where(local, requests.work / self._model.device_speed, 0.0)
        for row in range(local.shape[1]):
            device = requests.device[:, row]
            end_s[:, row] = self._device_free_s[self._each, device] + service_s[:, row]
            self._device_free_s[self._each, device] = end_s[:, row]
        return end_s

    def _serve_servers(self, uploads: _Uploads) -> tuple[Floats, Booleans]:
        """Uploads in order of completion, the k-th of every environment together; and which end in this slot."""
        ready_s = np.where(uploads.present, uploads.ready_s, np.inf)
        order = np.argsort(ready_s, axis=1, kind="stable")
        end_s = np.zeros(ready_s.shape)
        free_s = self._server_free_s.copy()
        for place in range(int(uploads.present.sum(axis=1).max(initial=0))):
            row = order[:, place]
            some = uploads.present[self._each, row]
            environment, row = self._each[some], row[some]
            server = uploads.server[environment, row]
            task_ready_s = ready_s[environment, row]
            task_end_s = np.maximum(free_s[environment, server], task_ready_s) + uploads.service_s[environment, row]
            free_s[environment, server] = task_end_s
            end_s[environment, row] = task_end_s
            # Those that end after the slot are only projected: a later task may still overtake them.
            sure = task_ready_s < self._model.slot_s
            self._server_free_s[environment[sure], server[sure]] = task_end_s[sure]
        return end_s, ready_s < self._model.slot_s

    def _keep(self, uploads: _Uploads, stay: Booleans) -> None:
        """Uploads that go on, moved to the front of a table as long as the environment with the most needs."""
        width = int(stay.sum(axis=1).max(initial=0))
        front = np.argsort(~stay, axis=1, kind="stable")[:, :width]
        kept = _Uploads(*(np.take_along_axis(column, front, axis=1) for column in uploads))
        slot_s = self._model.slot_s
        self._flying = kept._replace(
            present=np.take_along_axis(stay, front, axis=1),
            ready_s=kept.ready_s - slot_s,
            waited_s=kept.waited_s + slot_s,
        )
