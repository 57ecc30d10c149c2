"""Every check of `gmel validate` fails on a wrong simulator: its equations are broken on purpose, one by one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gmel.evaluation.validation.check import CHECKS
from gmel.physics import channel, energy, gang, mobility, queueing, radio
from gmel.simulator import environment as simulator
from gmel.simulator import links, sending, service, traffic
from test_cli import gmel
from test_validation import verdict


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Breaks a function of the simulator; compiled programs of the right one are forgotten, and those of the wrong."""
    jax.clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> tuple[Any, str, Callable[..., Any]]:
    """`change` gets the right function and its arguments."""
    right = getattr(owner, name)
    return owner, name, lambda *args, **named: change(right, *args, **named)


def less_work(right: Any, free_s: Any, rows: Any, horizon_s: Any) -> Any:
    return right(free_s, rows._replace(service_s=0.97 * rows.service_s), horizon_s)


def faster_rounds(servers: Any) -> Any:
    return servers._replace(beta=1.2 * servers.beta)


def alone(servers: Any) -> Any:
    return servers._replace(beta=0.0 * servers.beta)


def a_tenth_less_work(right: Any, free_s: Any, rows: Any, horizon_s: Any) -> Any:
    return right(free_s, rows._replace(service_s=0.9 * rows.service_s), horizon_s)


def coarse_in_single_precision(right: Any, *others: Any) -> Any:
    served, free_s = right(*others)
    return served, jnp.round(free_s, 1) if free_s.dtype == jnp.float32 else free_s


def forgets_some_of_the_queue(right: Any, *others: Any) -> Any:
    account = right(*others)
    return account._replace(queue_s=0.99 * account.queue_s)


def better_links(right: Any, first: Any, second: Any, snr: Any, floor: Any) -> Any:
    return right(first, second, 1.05 * snr, floor)


def meets_half(right: Any, *others: Any) -> Any:
    start = right(*others)
    return start._replace(snr=0.5 * start.snr)


def loses_a_request(right: Any, *others: Any) -> Any:
    requests, memory = right(*others)
    return requests._replace(present=requests.present.at[3].set(False)), memory


def one_place_more(right: Any, tasks: Any, servers: Any, *others: Any) -> Any:
    return right(tasks, servers._replace(places=servers.places + 1), *others)


def half_as_much_again(right: Any, tasks: Any, capacity: Any, *others: Any) -> Any:
    return right(tasks, 1.5 * capacity, *others)


def forgets_who_runs(right: Any, tasks: Any, *others: Any) -> Any:
    return right(tasks._replace(units=jnp.where(tasks.running, 0.0, tasks.units)), *others)


def rejects(right: Any, tasks: Any, capacity: Any, slot_s: Any, on_overload: str, *others: Any) -> Any:
    del on_overload
    return right(tasks, capacity, slot_s, "reject", *others)


def crash_spares_the_new_one(right: Any, *others: Any) -> Any:
    done = right(*others)
    return done._replace(lost=done.lost & ~done.caused)


def always_warm(right: Any, servers: Any, rows: Any, *others: Any) -> Any:
    return right(servers, rows._replace(load_s=0.0 * rows.load_s), *others)


def never_warm(right: Any, *others: Any) -> Any:
    return right(*others) & False


def breaks_up_groups_first(right: Any, free_s: Any, idle: Any, grouped: Any, needed: Any) -> Any:
    return right(free_s, idle, ~grouped, needed)


def one_gpu_too_few(right: Any, free_s: Any, idle: Any, grouped: Any, needed: Any) -> Any:
    return right(free_s, idle, grouped, jnp.maximum(needed - 1, 1))


def first_gpu_early(right: Any, *others: Any) -> Any:
    served, after = right(*others)
    return served, after._replace(free_s=after.free_s.at[:, 0].add(-0.01))


def fading_without_memory(right: Any, re: Any, im: Any, rho: Any, *innovations: Any) -> Any:
    return innovations


def last_in_first_out(right: Any, ready_s: Any, number: Any, than_s: Any) -> Any:
    return right(-ready_s, number, -than_s)


def everybody_final(right: Any, servers: Any, rows: Any, horizon_s: Any, *memory: Any) -> Any:
    return right(servers, rows, jnp.inf, *memory)


def nobody_discarded(right: Any, servers: Any, rows: Any, *others: Any) -> Any:
    return right(servers, rows._replace(latest_start_s=jnp.full_like(rows.ready_s, jnp.inf)), *others)


def one_gpu_more(right: Any, servers: Any, *others: Any) -> Any:
    served, after = right(servers._replace(free_s=0.5 * servers.free_s), *others)
    return served, after


def alone_in_the_cell(right: Any, plant: Any, bits: Any, snr: Any, fade: Any, users: Any, *others: Any) -> Any:
    return right(plant, bits, snr, fade, jnp.ones_like(users), *others)


def no_news(right: Any, old: Any, *others: Any) -> Any:
    new = right(old, *others)
    return jax.tree.map(lambda fresh: jnp.concatenate([fresh[:1], fresh[:1], fresh[1:-1]]), new)


def forgets_delays(right: Any, self: Any, state: Any, decided: Any) -> Any:
    same = state.uploads._replace(cost=decided.cost[: state.uploads.cost.shape[0]])
    return right(self, state._replace(uploads=same), decided)


def no_queue_at_devices(right: Any, present: Any, device: Any, backlog_s: Any, *others: Any) -> Any:
    return right(present, device, 0.0 * backlog_s, *others)


def loses_a_row(right: Any, rows: Any, stay: Any, capacity: int, slot_s: Any) -> Any:
    kept, lost = right(rows, stay & (rows.row != 1), capacity, slot_s)
    return kept, lost


def a_slot_early(right: Any, rows: Any, stay: Any, capacity: int, slot_s: Any) -> Any:
    return right(rows._replace(ready_s=rows.ready_s - slot_s), stay, capacity, slot_s)


MUTATIONS: dict[str, tuple[str, tuple[Any, str, Callable[..., Any]]]] = {
    "noise dropped": ("mg1-lognormal-drawn", wrap(traffic, "normal", lambda right, *bits: 0.0 * right(*bits))),
    "3 % of the work lost": ("md1-wait", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, path by path": ("work-conserved", wrap(service, "fifo_one_gpu", less_work)),
    "last in, first out": ("lindley", wrap(queueing, "not_later", last_in_first_out)),
    "tasks served before their upload ends": ("kiefer-wolfowitz", wrap(service, "fifo_many_gpus", everybody_final)),
    "nobody discarded": ("mg3-loss", wrap(service, "fifo_many_gpus", nobody_discarded)),
    "backlog halved": ("no-idling", wrap(service, "fifo_many_gpus", one_gpu_more)),
    "backlog halved, steady state": ("mm3-wait", wrap(service, "fifo_many_gpus", one_gpu_more)),
    "devices without a queue": ("device-lindley", wrap(simulator, "local_queue", no_queue_at_devices)),
    "an upload lost": ("tasks-conserved", wrap(simulator, "keep", loses_a_row)),
    "uploads arrive a slot early": ("little-uploads", wrap(simulator, "keep", a_slot_early)),
    "cells not shared": ("shared-cell", wrap(sending, "transfer_s", alone_in_the_cell)),
    "broadcast a slot late": ("bulletin-age", wrap(simulator, "announce", no_news)),
    "broadcast a slot late, herd": ("herding-by-age", wrap(simulator, "announce", no_news)),
    "delays not charged": ("rewards-telescope", wrap(simulator.Environment, "_reward", forgets_delays)),
    "idle power forgotten": (
        "energy",
        wrap(energy, "offload_energy_j", lambda right, **terms: right(**{**terms, "idle_power_w": 0.0})),
    ),
    "Shannon without + 1": ("ergodic-rate", (radio, "shannon", lambda snr, **_: jnp.maximum(jnp.log2(snr), 0.0))),
    "ergodic rate off by 1e-6": (
        "ergodic-closed-forms",
        wrap(radio, "mean_log1p_exponential", lambda right, mean: right(mean) * (1 + 1e-6)),
    ),
    "fading with mean 1.02": (
        "outage-fade",
        wrap(radio, "rayleigh_power", lambda right, uniform: 1.02 * right(uniform)),
    ),
    "outage waits doubled": (
        "outage-wait",
        wrap(
            radio,
            "block_outage_wait",
            lambda right, *args: right(*args)._replace(wait_slots=2.0 * right(*args).wait_slots),
        ),
    ),
    "AR(1) without the root": (
        "ar1-correlation",
        (channel, "ar1_step", lambda value, rho, new: rho * value + (1 - rho * rho) * new),
    ),
    "path loss 0.3 dB high": (
        "inf-mean-snr",
        wrap(channel, "path_loss_db", lambda right, *args: right(*args) + 0.3),
    ),
    "path loss 1e-6 dB high": (
        "inf-path-loss",
        wrap(channel, "path_loss_db", lambda right, *args: right(*args) + 1e-6),
    ),
    "rounds that grow a fifth too fast": (
        "batching",
        wrap(service, "share", lambda right, tasks, servers, *rest: right(tasks, faster_rounds(servers), *rest)),
    ),
    "processor sharing without the sharing": (
        "mg1-sharing",
        wrap(service, "share", lambda right, tasks, servers, *rest: right(tasks, alone(servers), *rest)),
    ),
    "weights forgotten": (
        "mm1-weighted-sharing",
        wrap(
            service,
            "share",
            lambda right, tasks, *rest: right(tasks._replace(weight=jnp.ones_like(tasks.weight)), *rest),
        ),
    ),
    "3 % of the work lost, by weight": (
        "weighted-sharing-conserved",
        wrap(service, "share", lambda right, tasks, *rest: right(tasks._replace(left_s=0.97 * tasks.left_s), *rest)),
    ),
    "3 % of the work lost, area": ("little-work", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, M/M/1": ("mm1-wait", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, tail": ("mm1-waiting", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, M/E2/1": ("mg1-erlang", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, M/H2/1": ("mg1-hyperexponential", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, drawn": ("mg1-uniform-drawn", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, tandem": ("tandem-wait", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, greedy": ("greedy-central-queue", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, split": ("blind-split", wrap(service, "fifo_one_gpu", less_work)),
    "3 % of the work lost, herd": ("herding-in-slot", wrap(service, "fifo_one_gpu", less_work)),
    "a tenth of the work lost": ("two-choices-mean-field", wrap(service, "fifo_one_gpu", a_tenth_less_work)),
    "coarse in single precision": ("single-precision", wrap(service, "fifo_one_gpu", coarse_in_single_precision)),
    "nobody discarded, patience": ("mm1-patience", wrap(service, "fifo_many_gpus", nobody_discarded)),
    "a part that does not add up": ("latency-parts", wrap(simulator, "accounts", forgets_some_of_the_queue)),
    "fades below the floor": ("fades-above-floor", wrap(radio, "block_outage_wait", meets_half)),
    "links 5 % better": ("outage-share", wrap(radio, "block_outage_wait", better_links)),
    "fading with mean 1.02, capped": (
        "capped-ergodic-rate",
        wrap(channel, "rayleigh_power", lambda right, uniform: 1.02 * right(uniform)),
    ),
    "a request lost": ("poisson-count", wrap(simulator, "next_requests", loses_a_request)),
    "two GPUs that share nothing": (
        "mm2-sharing",
        wrap(service, "share", lambda right, tasks, servers, *rest: right(tasks, alone(servers), *rest)),
    ),
    "one place more": ("mm1k-loss", wrap(service, "share", one_place_more)),
    "one place more, wait": ("mm1k-wait", wrap(service, "share", one_place_more)),
    "one place more, shared": ("mg1k-sharing", wrap(service, "share", one_place_more)),
    "half as much capacity again": ("mg4-capacity", wrap(service, "host", half_as_much_again)),
    "half as much capacity again, path by path": ("capacity-in-use", wrap(service, "host", half_as_much_again)),
    "those who run take no room": ("md4-capacity", wrap(service, "host", forgets_who_runs)),
    "rejection in place of a crash": ("mm4-crash", wrap(service, "host", rejects)),
    "rejection in place of a crash, path by path": ("capacity-losses", wrap(service, "host", rejects)),
    "a crash spares the new one": ("capacity-losses", wrap(service, "host", crash_spares_the_new_one)),
    "every start warm": ("gang-wait", wrap(service, "fifo_gangs", always_warm)),
    "no start warm": ("gang-wait", wrap(gang, "_warm_group", never_warm)),
    "no start warm, EAT": ("eat-durations", wrap(gang, "_warm_group", never_warm)),
    "loaded GPUs taken first": ("gangs", wrap(gang, "_cold_gpus", breaks_up_groups_first)),
    "a gang one GPU too small": ("gang-gpus", wrap(gang, "_cold_gpus", one_gpu_too_few)),
    "one GPU of a gang is free early": ("gang-gpus", wrap(service, "fifo_gangs", first_gpu_early)),
    "one GPU of a gang is free early, path by path": ("gangs", wrap(service, "fifo_gangs", first_gpu_early)),
    "fading without memory": ("ar1-fades", wrap(mobility, "fading_step", fading_without_memory)),
    "no shadowing": ("inf-snr-spread", wrap(links, "normal", lambda right, *bits: 0.0 * right(*bits))),
}
QUICK_MUTATIONS = {
    "3 % of the work lost",
    "ergodic rate off by 1e-6",
    "path loss 0.3 dB high",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK_MUTATIONS else pytest.param(name, marks=pytest.mark.slow) for name in MUTATIONS]
)
def test_check_fails_on_a_broken_simulator(name: str, broken: pytest.MonkeyPatch) -> None:
    target, (owner, attribute, wrong) = MUTATIONS[name]
    broken.setattr(owner, attribute, wrong)
    result = verdict(target)
    assert not result.passed, result


def test_command_fails_with_1_when_a_check_fails(
    capsys: pytest.CaptureFixture[str], broken: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, (owner, attribute, wrong) = MUTATIONS["path loss 1e-6 dB high"]
    broken.setattr(owner, attribute, wrong)
    out = tmp_path / "validation.json"
    code, shown, _ = gmel(capsys, "validate", "--only", "inf-path-loss", "--out", out)
    assert code == 1
    assert "FAILED inf-path-loss" in shown
    assert not json.loads(out.read_text())["passed"]


def test_every_check_has_something_that_it_finds() -> None:
    # Others may have been registered since: the docs show how.
    ours = {name for name, entry in CHECKS.items() if entry.function.__module__.startswith("gmel.")}
    assert {target for target, _ in MUTATIONS.values()} == ours
