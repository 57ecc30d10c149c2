"""`gmel validate`: its checks pass on the simulator, and each of them fails on a simulator that is wrong."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from gmel.evaluation.validation import queues, run
from gmel.evaluation.validation.check import CHECKS, Check, Exact, Run, Sample, check, critical_score, judge
from gmel.evaluation.validation.paths import everything_plant, run_path
from gmel.physics import channel, energy, queueing, radio
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario
from gmel.simulator import environment as simulator
from gmel.simulator import links, sending, service, traffic
from test_cli import gmel

COMPARISONS = sum(entry.statistical for entry in CHECKS.values())
# Seconds each; the others are run by make test-slow and by the command itself.
QUICK = [
    "md1-wait",
    "ergodic-rate",
    "ergodic-closed-forms",
    "outage-wait",
    "ar1-correlation",
    "inf-path-loss",
    "inf-mean-snr",
    "herding-by-age",
]


def verdict(name: str, **choices: Any) -> Any:
    entry = CHECKS[name]
    return judge(entry, entry.function(Run(3, name, **choices)), COMPARISONS, 0.0)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHECKS]
)
def test_check_passes(name: str) -> None:
    result = verdict(name)
    assert result.passed, result
    if result.statistical:
        assert result.detects < 0.1, "too little to say anything"


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


def last_in_first_out(right: Any, ready_s: Any) -> Any:
    return right(ready_s).T


def everybody_final(right: Any, servers: Any, rows: Any, horizon_s: Any, *memory: Any) -> Any:
    return right(servers, rows, jnp.inf, *memory)


def nobody_discarded(right: Any, servers: Any, rows: Any, *others: Any) -> Any:
    return right(servers, rows._replace(latest_start_s=jnp.full_like(rows.ready_s, jnp.inf)), *others)


def one_gpu_more(right: Any, servers: Any, *others: Any) -> Any:
    served, after = right(servers._replace(free_s=0.5 * servers.free_s), *others)
    return served, after


def alone_in_the_cell(right: Any, plant: Any, bits: Any, snr: Any, fade: Any, users: Any, direction: Any) -> Any:
    return right(plant, bits, snr, fade, jnp.ones_like(users), direction)


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
    "last in, first out": ("lindley", wrap(queueing, "_not_later", last_in_first_out)),
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
    "no shadowing": ("inf-snr-spread", wrap(links, "normal", lambda right, *bits: 0.0 * right(*bits))),
}
QUICK_MUTATIONS = {
    "3 % of the work lost",
    "last in, first out",
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


def entry_of(function: Callable[[Run], Any], statistical: bool = True) -> Check:
    return Check("example", "queues", statistical, function)


def example(run: Run) -> Sample:
    """A law.

    Source: a book.
    """
    return Sample(1.0, run.random.normal(1.0, 0.1, 64))


def test_right_means_pass_and_errors_of_the_stated_size_are_found() -> None:
    entry = entry_of(example)
    assert (entry.law, entry.source) == ("A law", "a book")
    random = np.random.default_rng(0)
    result = judge(entry, Sample(2.0, random.normal(2.0, 0.1, 64)), 30, 0.0)
    assert result.passed
    assert result.score == pytest.approx((result.measured - 2.0) / result.error)
    shift = 2.0 * result.detects * (0.1 / 8.0) / result.error
    found = [not judge(entry, Sample(2.0, random.normal(2.0 + shift, 0.1, 64)), 30, 0.0).passed for _ in range(400)]
    assert 0.9 < np.mean(found) < 0.99


def test_a_right_mean_hardly_ever_fails() -> None:
    # Two-sided tail of Student's t at the critical score, over all comparisons.
    limit = critical_score(63, 30)
    draws = np.random.default_rng(1).normal(size=(200_000, 64))
    scores = draws.mean(axis=1) / draws.std(axis=1, ddof=1) * 8.0
    assert np.mean(np.abs(scores) > limit) < 2e-5
    assert 4.0 < limit < 6.0


def test_what_says_nothing_fails() -> None:
    entry = entry_of(example)
    assert not judge(entry, Sample(1.0, np.full(64, np.nan)), 1, 0.0).passed
    assert not judge(entry, Sample(1.0, np.ones(64)), 1, 0.0).passed, "replications that do not differ"
    exact = entry_of(example, statistical=False)
    assert judge(exact, Exact(0.5, 1.0, 3), 1, 0.0).passed
    assert not judge(exact, Exact(2.0, 1.0, 3), 1, 0.0).passed
    assert not judge(exact, Exact(math.nan, 1.0, 3), 1, 0.0).passed
    assert not judge(exact, Exact(0.0, 1.0, 0), 1, 0.0).passed, "nothing compared"


def test_controls_take_out_what_they_explain() -> None:
    random = np.random.default_rng(2)
    control = random.normal(0.0, 1.0, 64)
    values = 5.0 + 3.0 * control + random.normal(0.0, 0.1, 64)
    entry = entry_of(example)
    plain = judge(entry, Sample(5.0, values), 1, 0.0)
    constant = np.zeros(64)
    controlled = judge(entry, Sample(5.0, values, np.stack([control, constant], axis=1)), 1, 0.0)
    assert controlled.error < 0.1 * plain.error
    assert controlled.measured == pytest.approx(5.0, abs=0.1)


def test_a_check_must_say_what_it_is() -> None:
    def silent(run: Run) -> Sample:
        """A law without a source."""
        return example(run)

    with pytest.raises(ValueError, match="Source"):
        check("silent", "queues")(silent)
    with pytest.raises(ValueError, match="new"):
        check("mm1-wait", "queues")(example)
    assert "silent" not in CHECKS


def test_random_numbers_depend_on_seed_and_name() -> None:
    draws = [Run(seed, name).random.random() for seed, name in [(0, "a"), (0, "a"), (1, "a"), (0, "b")]]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_closed_forms() -> None:
    assert queues.erlang_b(2.0, 1) == pytest.approx(2 / 3)
    assert queues.erlang_b(2.0, 3) == pytest.approx((8 / 6) / (1 + 2 + 2 + 8 / 6))
    assert queues.erlang_c_wait_s(0.6, 1) == pytest.approx(queues.pollaczek_khinchine_s(0.6, 1.0, 2.0))
    # M/M/2: rho^2 / (1 - rho^2) mean services.
    assert queues.erlang_c_wait_s(1.4, 2) == pytest.approx(0.49 / 0.51)


@pytest.mark.parametrize(("load", "choices"), [(0.5, 2), (0.9, 2), (0.9, 5)])
def test_mean_field_of_the_least_loaded(load: float, choices: int) -> None:
    """The closed form beside its differential equation, integrated."""

    def slope(_: float, state: Any) -> list[float]:
        return [-state[0] + load * state[0] ** choices, state[0] ** choices]

    solved = integrate.solve_ivp(slope, (0.0, 80.0), [load, 0.0], rtol=1e-10, atol=1e-12)
    assert queues.least_loaded_wait_s(load, choices) == pytest.approx(float(solved.y[1, -1]), rel=1e-6)


def test_exact_runs_go_through_every_feature() -> None:
    """Otherwise the exact checks would compare nothing of it."""
    path = run_path(everything_plant(), 3)
    records = path.records
    served = (records.option > 0) & ~records.dropped
    assert 0.02 < records.dropped.mean() < 0.5
    assert 0.05 < (records.switch_s[served] > 0).mean() < 0.95
    assert (records.queue_s[served] > 0).mean() > 0.1
    assert (records.upload_s > path.slot_s).mean() > 0.1, "uploads cross slot starts"
    assert (np.asarray(path.requests.outage_s) > 0).mean() > 0.01
    assert path.in_flight.max() > 2
    assert set(records.option.tolist()) == {0, 1, 2, 3}


def in_simpy(path: Any) -> dict[str, np.ndarray]:
    """The servers of a run in SimPy: one process per task, a FIFO resource per server."""
    simpy = pytest.importorskip("simpy", reason="SimPy is in the dev group: make env")
    engine, records = simpy.Environment(), path.records
    memory_gb = [model.memory_gb for model in path.scenario.models]
    servers = [simpy.Resource(engine, spec.gpus) for spec in path.scenario.servers]
    held = [np.nonzero(resident)[0][::-1].tolist() for resident in path.resident]
    found = {name: np.full(len(records), np.nan) for name in ("start_s", "end_s", "switch_s", "dropped")}

    def task(number: int, server: int, ready_s: float) -> Iterator[Any]:
        yield engine.timeout(ready_s)
        with servers[server].request() as turn:
            yield turn
            found["start_s"][number] = engine.now
            latest_s = records.generated_s[number] + records.deadline_s[number]
            found["dropped"][number] = path.scenario.tasks.deadline == "drop" and engine.now > latest_s
            if found["dropped"][number]:
                return
            load_s, model = 0.0, int(records.model[number])
            if path.scenario.switching:
                if model in held[server]:
                    held[server].remove(model)
                else:
                    load_s = path.load_s[number]
                    while sum(memory_gb[m] for m in [*held[server], model]) > path.scenario.servers[server].memory_gb:
                        held[server].pop(0)
                held[server].append(model)
            found["switch_s"][number] = load_s
            yield engine.timeout(load_s + path.service_s[number])
            found["end_s"][number] = engine.now

    for server, tasks in path.at_server():
        # Ends that differ by rounding alone must not change the order.
        ready_s = np.maximum.accumulate(records.upload_end_s[tasks])
        for number, at_s in zip(tasks.tolist(), ready_s.tolist(), strict=True):
            engine.process(task(number, server, at_s))
    engine.run()
    return found


@pytest.mark.parametrize("plant", [pytest.param("hall-20x5", marks=pytest.mark.slow), "everything"])
def test_simpy_agrees_on_the_same_trace(plant: str) -> None:
    path = run_path(everything_plant() if plant == "everything" else load_scenario(plant, 0.6), 11)
    found, records = in_simpy(path), path.records
    at_server = records.option > 0
    assert at_server.sum() > 1000
    np.testing.assert_array_equal(found["dropped"][at_server], records.dropped[at_server])
    served = at_server & ~records.dropped
    for name in ("start_s", "end_s", "switch_s"):
        np.testing.assert_allclose(found[name][served], getattr(records, name)[served], rtol=0, atol=1e-9, err_msg=name)


def test_command_prints_a_line_per_check_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "validation.json"
    code, shown, progress = gmel(capsys, "validate", "--only", "inf-path-loss,outage-share", "--out", out)
    assert code == 0
    assert "inf-path-loss" in shown
    assert "2 of 2 checks passed" in shown
    assert "outage-share" in progress
    saved = json.loads(out.read_text())
    assert saved["passed"]
    assert [result["name"] for result in saved["results"]] == ["outage-share", "inf-path-loss"]
    code, shown, _ = gmel(capsys, "validate", "--only", "inf-path-loss,outage-share", "--json")
    again = json.loads(shown)
    timeless = [{**result, "seconds": 0} for result in again["results"]]
    assert timeless == [{**result, "seconds": 0} for result in saved["results"]], "the same seed gives the same"
    table = run.markdown_table(again)
    assert table.count("\n| `") == 2
    code, other, _ = gmel(capsys, "validate", "--only", "outage-share", "--seed", 5, "--json")
    assert json.loads(other)["results"][0]["measured"] != saved["results"][0]["measured"]


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "mm1-wit"], "mm1-wait"),
        (["--seed", "-1", "--only", "inf-path-loss"], "--seed -1"),
        (["--only", "inf-path-loss", "--out", "no/such/folder/v.json"], "--out no/such/folder/v.json"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown, errors = gmel(capsys, "validate", *words)
    assert (code, shown) == (2, "")
    assert errors.splitlines()[-1].startswith("gmel: error:")
    assert said in errors


def test_groups_choose_their_checks() -> None:
    radio_checks = run.chosen_checks(["radio"])
    assert {entry.group for entry in radio_checks} == {"radio"}
    assert len(run.chosen_checks()) == len(CHECKS)
    with pytest.raises(InputError, match="nearest is 'paths'"):
        run.chosen_checks(["pathes"])
