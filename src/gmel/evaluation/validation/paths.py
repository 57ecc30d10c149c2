"""Exact checks, path by path: every task of a run computed again from the rules, in double precision and plain Python.

The runs are those of `recording.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gmel.evaluation.validation.check import Exact, Run, check, largest, worse
from gmel.evaluation.validation.drive import NEVER_S, explicit, queue_plant
from gmel.evaluation.validation.recording import (
    SLOTS,
    TOLERANCE_S,
    Path,
    crashing,
    gangs,
    hall,
    mixed,
    rejecting,
    run_path,
)
from gmel.physics.radio import MCS_EFFICIENCIES, MCS_SNR_THRESHOLDS
from gmel.policies.rules import Greedy
from gmel.scenario.load import load_scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.links import least_snr
from gmel.simulator.state import State


@check("lindley", "paths")
def lindley(run: Run) -> Exact:
    """One GPU: start = max(ready, end of the one before), end = start + service, in order of upload end.

    Source: Lindley 1952
    """
    path = hall(run)
    error, compared = 0.0, 0
    for _, tasks in path.at_server():
        free_s = 0.0
        for task in tasks.tolist():
            start_s = max(float(path.records.upload_end_s[task]), free_s)
            free_s = start_s + float(path.service_s[task])
            error = worse(error, path.records.start_s[task] - start_s, path.records.end_s[task] - free_s)
            compared += 1
    return Exact(error, TOLERANCE_S, compared)


@check("device-lindley", "paths")
def device_lindley(run: Run) -> Exact:
    """Devices serve their own tasks in the order of decision, one after the other.

    Source: Lindley 1952
    """
    path = hall(run)
    error, compared = 0.0, 0
    free_s: dict[int, float] = defaultdict(float)
    own = np.nonzero(path.records.option == 0)[0]
    for task in own[np.lexsort((path.row[own], path.records.decided_slot[own]))].tolist():
        device = int(path.records.device[task])
        start_s = max(float(path.records.decided_s[task]), free_s[device])
        free_s[device] = start_s + float(path.service_s[task])
        error = worse(error, path.records.start_s[task] - start_s, path.records.end_s[task] - free_s[device])
        compared += 1
    return Exact(error, TOLERANCE_S, compared)


@check("kiefer-wolfowitz", "paths")
def kiefer_wolfowitz(run: Run) -> Exact:
    """Several GPUs, model memory (least recently used leaves), discarded tasks: start, load, end of every task.

    Source: Kiefer and Wolfowitz 1955 (the GPU that is free first takes the next task)
    """
    path = mixed(run)
    records = path.records
    error, compared = 0.0, 0
    for server, tasks in path.at_server():
        spec = path.scenario.servers[server]
        memory_gb = [model.memory_gb for model in path.scenario.models]
        free_s = [0.0] * spec.gpus
        # At the start all are equally old; of those the later in the catalogue leave first.
        held = np.nonzero(path.resident[server])[0][::-1].tolist()
        for task in tasks.tolist():
            gpu = int(np.argmin(free_s))
            start_s = max(float(records.upload_end_s[task]), free_s[gpu])
            dropped = start_s > records.generated_s[task] + records.deadline_s[task]
            error = worse(error, float(dropped != records.dropped[task]))
            compared += 1
            if dropped:
                continue
            model, load_s = int(records.model[task]), 0.0
            if model in held:
                held.remove(model)
            else:
                load_s = float(path.load_s[task])
                while sum(memory_gb[other] for other in held) + memory_gb[model] > spec.memory_gb:
                    held.pop(0)
            held.append(model)
            free_s[gpu] = start_s + load_s + float(path.service_s[task])
            error = worse(
                error,
                records.start_s[task] - start_s,
                records.switch_s[task] - load_s,
                records.end_s[task] - free_s[gpu],
            )
    return Exact(error, TOLERANCE_S, compared)


@check("tasks-conserved", "paths")
def tasks_conserved(run: Run) -> Exact:
    """Every request has exactly one record, and no record is without its request.

    Source: counting
    """
    errors, compared = 0, 0
    for path in _all(run):
        slots, rows = np.nonzero(path.requests.present)
        asked = Counter(zip(slots.tolist(), rows.tolist(), strict=True))
        found = Counter(zip(path.records.decided_slot.tolist(), path.row.tolist(), strict=True))
        errors += ((asked - found) + (found - asked)).total() + path.left + path.lost
        compared += asked.total()
    return Exact(float(errors), 0.0, compared)


@check("work-conserved", "paths")
def work_conserved(run: Run) -> Exact:
    """Work left at a server falls by one second a second while there is any and rises by the service of each arrival.

    Source: virtual waiting time, Takacs 1955: the state of the next slot from that of the last and the requests
    """
    path = hall(run)
    error, compared = 0.0, 0
    for server, _, _, end_s, after_s in _virtual_work(path):
        del server
        error = worse(error, end_s - after_s)
        compared += 1
    return Exact(error, TOLERANCE_S, compared)


@check("little-work", "paths")
def little_work(run: Run) -> Exact:
    """Little's law for work: integral of the work left = sum over tasks of S W + S^2 / 2, relative error.

    Source: Little 1961; H = lambda G: Brumelle 1971. Left side from the state, right side from the records
    """
    path = hall(run)
    area = sum(area for _, area, _, _, _ in _virtual_work(path))
    tasks = path.records.option > 0
    service_s = path.records.service_s[tasks]
    paid = float(np.sum(service_s * path.records.queue_s[tasks] + 0.5 * service_s**2))
    return Exact(abs(area / paid - 1.0), 1e-10, int(tasks.sum()))


@check("little-uploads", "paths")
def little_uploads(run: Run) -> Exact:
    """Little's law for uploads: those in flight summed over slot starts = slot starts that the uploads span.

    Source: Little 1961. Left side from the state, right side from the records
    """
    path = mixed(run)
    records = path.records
    error, compared = 0, 0
    for server in range(len(path.scenario.servers)):
        own = records.option == server + 1
        crossed = np.floor(records.upload_end_s[own] / path.slot_s).astype(int) - records.decided_slot[own]
        error += abs(int(path.in_flight[:, server].sum()) - int(crossed.sum()))
        compared += int(own.sum())
    return Exact(float(error), 0.0, compared)


@check("no-idling", "paths")
def no_idling(run: Run) -> Exact:
    """Seconds in which a task waits at a server with an idle GPU, or more tasks run than it has GPUs: none.

    Source: definition of a work-conserving discipline
    """
    wrong_s, compared = 0.0, 0
    for path in (hall(run), mixed(run)):
        records = path.records
        for server, tasks in path.at_server():
            served = tasks[~records.dropped[tasks]]
            ready_s, start_s, end_s = records.upload_end_s[served], records.start_s[served], records.end_s[served]
            times = np.concatenate([ready_s, start_s, end_s])
            one, none = np.ones(served.size), np.zeros(served.size)
            order = np.argsort(times, kind="stable")
            waiting = np.cumsum(np.concatenate([one, -one, none])[order])
            running = np.cumsum(np.concatenate([none, one, -one])[order])
            lasts_s = np.diff(times[order], append=times.max())
            gpus = path.scenario.servers[server].gpus
            wrong_s += float(lasts_s[((waiting > 0) & (running < gpus)) | (running > gpus)].sum())
            compared += served.size
    return Exact(wrong_s, 1e-8, compared)


@check("latency-parts", "paths")
def latency_parts(run: Run) -> Exact:
    """Wait to slot + upload + queue + switch + service + download = result - generation; discarded: the deadline.

    Source: equation (11)
    """
    error, compared = 0.0, 0
    for path in _all(run):
        records = path.records
        through_s = records.end_s - records.generated_s + records.download_s
        waited_s = records.decided_s - records.generated_s
        expected_s = np.where(records.dropped, records.deadline_s, through_s)
        parts = np.where(
            records.dropped,
            0.0,
            np.maximum(
                np.abs(records.wait_to_slot_s - waited_s),
                np.maximum(
                    np.abs(records.upload_s - (records.upload_end_s - records.decided_s)),
                    np.abs(records.queue_s - (records.start_s - records.upload_end_s)),
                ),
            ),
        )
        error = worse(error, largest(records.latency_s - expected_s), largest(parts))
        compared += len(records)
    return Exact(error, TOLERANCE_S, compared)


@check("energy", "paths")
def energy_again(run: Run) -> Exact:
    """Energy of every task from its times and the powers of the scenario, in joules.

    Source: equations (9) and (12)
    """
    path = mixed(run)
    records, devices, servers = path.records, path.scenario.devices, path.scenario.servers
    error = 0.0
    for task in range(len(records)):
        if records.option[task] == 0:
            expected = devices.compute_power_w * records.service_s[task]
        else:
            spec = servers[int(records.option[task]) - 1]
            sent_s = records.upload_end_s[task] - records.upload_start_s[task]
            if records.dropped[task]:
                # It gives up at its deadline, in the middle of the upload where that is longer.
                sent_s = min(sent_s, records.upload_s[task])
            idle_s = records.latency_s[task] - records.wait_to_slot_s[task] - sent_s
            expected = (
                10 ** (0.1 * devices.tx_power_dbm - 3) * sent_s
                + devices.idle_power_w * max(idle_s, 0.0)
                + spec.power_w * records.service_s[task]
                + spec.switch_power_w * records.switch_s[task]
            )
        error = worse(error, records.energy_j[task] - expected)
    return Exact(error, 1e-8, len(records))


@check("rewards-telescope", "paths")
def rewards_telescope(run: Run) -> Exact:
    """Rewards of the team over an episode add up to minus the cost of all tasks, relative error.

    Source: equation (15) on the records; docs/model.md, projected reward and its sum
    """
    error, compared = 0.0, 0
    for path in _all(run):
        records, weights = path.records, path.scenario.reward
        scale_s = records.deadline_s if weights.latency_scale_s is None else weights.latency_scale_s
        cost = weights.latency * np.minimum(records.latency_s / scale_s, weights.clip)
        cost += weights.miss * ((records.latency_s > records.deadline_s) | records.dropped)
        cost += weights.energy * records.energy_j / weights.energy_scale_j
        error = worse(error, path.team_reward.sum() / -cost.sum() - 1.0)
        compared += len(records)
    return Exact(error, 1e-9, compared)


@check("shared-cell", "paths")
def shared_cell(run: Run) -> Exact:
    """OFDMA: N uploads of a cell get B / N each at N times the SNR; upload time of every task again, in seconds.

    Source: equations (3) and (4), TS 38.214 Table 5.1.3.1-2 for the rates
    """
    path = mixed(run)
    records, radio = path.records, path.scenario.radio
    snr = np.asarray(path.links.uplink_snr, float)
    fade, outage_s = np.asarray(path.requests.fade, float), np.asarray(path.requests.outage_s, float)
    bits = np.asarray(path.requests.size_bit, float)
    present = np.asarray(path.requests.present)
    error, compared = 0.0, 0
    for task in np.nonzero(records.option > 0)[0].tolist():
        slot, row, server = int(records.decided_slot[task]), int(path.row[task]), int(records.option[task]) - 1
        users = int(np.sum(present[slot] & (path.actions[slot] == server + 1))) + int(path.in_flight[slot, server])
        signal = users * snr[int(records.device[task]), server] * fade[slot, row, server]
        place = int(np.searchsorted(MCS_SNR_THRESHOLDS, signal, side="right")) - 1
        rate = radio.uplink_share * radio.bandwidth_hz / users * (MCS_EFFICIENCIES[place] if place >= 0 else 0.0)
        upload_s = outage_s[slot, row, server] + bits[slot, row] / max(rate, 1.0)
        # Relative for links that carry almost nothing.
        seen_s = records.upload_end_s[task] - records.decided_s[task]
        error = worse(error, (seen_s - upload_s) / max(1.0, upload_s))
        compared += 1
    return Exact(error, TOLERANCE_S, compared)


@check("fades-above-floor", "paths")
def fades_above_floor(run: Run) -> Exact:
    """An upload waits a whole number of slots and then meets an SNR above the floor: largest shortfall.

    Source: docs/model.md, outage
    """
    path = mixed(run)
    snr = np.asarray(path.links.uplink_snr, float)[np.asarray(path.requests.device)]
    floor = least_snr(path.scenario.radio)
    slots = np.asarray(path.requests.outage_s, float) / path.slot_s
    short = np.maximum(1.0 - snr * np.asarray(path.requests.fade, float) / floor, 0.0)
    error = max(float(short.max()), float(np.abs(slots - np.round(slots)).max()))
    return Exact(error, TOLERANCE_S, slots.size)


@check("bulletin-age", "paths")
def bulletin_age(run: Run) -> Exact:
    """With age k devices see the work left at every server exactly k slots ago, in seconds.

    Source: Mitzenmacher 2000, How Useful Is Old Information (bulletin board, delay k)
    """
    path = mixed(run)
    age = path.scenario.slot.broadcast_age_slots
    then = np.concatenate([np.zeros((age, path.wait_s.shape[1])), path.wait_s[: -age - 1]])
    return Exact(largest(path.seen_s - then), TOLERANCE_S, path.seen_s.size)


@check("herding-by-age", "paths")
def herding_by_age(run: Run) -> Exact:
    """Greedy with age a: a + 1 batches in a row go to one server, of which batch i = 0, 1, ... waits i (w - D_t).

    n requests of service s a slot, w = n s. Nobody hears of the first batch at a server before a + 1 slots have passed;
    then the next empty server gets as many. Holds while no server is empty again: w > servers x D_t.
    Source: derived; the herd of Mitzenmacher 2000 and Dahlin 2000
    """
    del run
    age, batch, service_s, slot_s, servers = 3, 4, 1.5, 1.0, 5
    with jax.enable_x64(True):
        environment = Environment.from_scenario(queue_plant(slot_s=slot_s, servers=servers, rows=batch, age=age))
        wait_s = np.asarray(_greedy_batches(environment, service_s, servers * (age + 1)))
    place = np.arange(servers * (age + 1)) % (age + 1)
    expected_s = place[:, None] * (batch * service_s - slot_s) + service_s * np.arange(batch)
    return Exact(largest(wait_s - expected_s), TOLERANCE_S, wait_s.size)


@check("single-precision", "paths")
def single_precision(run: Run) -> Exact:
    """The same run in single precision: largest difference of any latency, in seconds.

    Source: rounding of backlogs of minutes in float32, 1e-5 s a slot
    """
    # Not longer when thorough: of so many tasks two might end their uploads closer together than float32 tells apart.
    double = hall(run, SLOTS).records.latency_s
    single = run_path(load_scenario("hall-20x5", 0.6), run.seed, double=False).records.latency_s
    if single.shape != double.shape:
        return Exact(np.inf, 2e-3, double.size)
    return Exact(largest(single - double), 2e-3, double.size)


def _all(run: Run) -> tuple[Path, ...]:
    return hall(run), mixed(run), crashing(run), rejecting(run), gangs(run)


def _virtual_work(path: Path) -> Iterator[tuple[int, float, float, float, float]]:
    """Server, integral of the work left over a slot, work left at its start and end, and at the end by the state."""
    records = path.records
    for server, tasks in path.at_server():
        ready_s = records.upload_end_s[tasks]
        slots = np.floor(ready_s / path.slot_s).astype(int)
        for slot in range(path.wait_s.shape[0] - 1):
            left_s = before_s = float(path.wait_s[slot, server])
            clock_s, area = slot * path.slot_s, 0.0
            first, last = np.searchsorted(slots, [slot, slot + 1])
            arrivals = [(float(records.upload_end_s[t]), float(path.service_s[t])) for t in tasks[first:last].tolist()]
            for now_s, service_s in [*arrivals, ((slot + 1) * path.slot_s, 0.0)]:
                fallen_s = max(left_s - (now_s - clock_s), 0.0)
                area += 0.5 * (left_s**2 - fallen_s**2)
                left_s, clock_s = fallen_s + service_s, now_s
            yield server, area, before_s, left_s, float(path.wait_s[slot + 1, server])


@eqx.filter_jit
def _greedy_batches(environment: Environment, service_s: float, slots: int) -> Any:
    """Waits of batches that fill the request table in every slot, decided by greedy."""
    zero = jnp.zeros(environment.requests)
    requests = explicit(environment, zero == 0, zero, zero + service_s, zero + NEVER_S)

    def slot(state: State, key: Any) -> tuple[State, Any]:
        action = Greedy().choose(environment.observe(state), key)
        after, _, outcome = environment.step(state, action, requests=requests)
        return after, outcome.account.queue_s[environment.plant.switches.uploads :]

    state = environment.reset(seeds(0, 1)[0])._replace(requests=requests)
    return jax.lax.scan(slot, state, jax.random.split(jax.random.key(0), slots))[1]
