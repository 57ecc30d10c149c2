"""`gmel validate`: its checks pass on the simulator. That they fail on a wrong one: `test_validation_mutations.py`."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate

from gmel.evaluation.validation import closed_forms, recording, run
from gmel.evaluation.validation.check import CHECKS, Check, Exact, Run, Sample, check, critical_score, judge
from gmel.evaluation.validation.recording import SLOTS, gangs_plant, hosting_plant, mixed_plant, run_path
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario
from test_cli import gmel

COMPARISONS = sum(entry.statistical for entry in CHECKS.values())
# Seconds each; the others are run by make test-slow and by the command itself.
QUICK = [
    "md1-wait",
    "ergodic-rate",
    "ergodic-closed-forms",
    "outage-wait",
    "inf-path-loss",
    "inf-mean-snr",
    "herding-by-age",
    "eat-durations",
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
    assert closed_forms.erlang_b(2.0, 1) == pytest.approx(2 / 3)
    assert closed_forms.erlang_b(2.0, 3) == pytest.approx((8 / 6) / (1 + 2 + 2 + 8 / 6))
    assert closed_forms.erlang_c_wait_s(0.6, 1) == pytest.approx(closed_forms.pollaczek_khinchine_s(0.6, 1.0, 2.0))
    # M/M/2: rho^2 / (1 - rho^2) mean services.
    assert closed_forms.erlang_c_wait_s(1.4, 2) == pytest.approx(0.49 / 0.51)
    # M/M/1/K: one place is Erlang B with one server, and nobody waits; very many are M/M/1.
    assert closed_forms.bounded_queue(2.0, 1) == pytest.approx((2 / 3, 0.0))
    assert closed_forms.bounded_queue(0.6, 200) == pytest.approx((0.0, 0.6 / 0.4))
    # p_n = 1/3 each at load 1: one of the two accepted states waits one service.
    assert closed_forms.bounded_queue(1.0, 2) == pytest.approx((1 / 3, 0.5))
    # A server for one: the next comes too soon with p = 2 / 3, and a cycle of 1 + p arrivals then loses two.
    assert closed_forms.crash_loss(2.0, 1) == pytest.approx(2 * (2 / 3) / (1 + 2 / 3))
    # Far more than it can do: every fourth arrival crashes it, and all are lost.
    assert closed_forms.crash_loss(1e6, 3) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("load", "choices"), [(0.5, 2), (0.9, 2), (0.9, 5)])
def test_mean_field_of_the_least_loaded(load: float, choices: int) -> None:
    """The closed form beside its differential equation, integrated."""

    def slope(_: float, state: Any) -> list[float]:
        return [-state[0] + load * state[0] ** choices, state[0] ** choices]

    solved = integrate.solve_ivp(slope, (0.0, 80.0), [load, 0.0], rtol=1e-10, atol=1e-12)
    assert closed_forms.least_loaded_wait_s(load, choices) == pytest.approx(float(solved.y[1, -1]), rel=1e-6)


def test_exact_runs_go_through_every_feature() -> None:
    """Otherwise the exact checks would compare nothing of it."""
    path = run_path(mixed_plant(), 3)
    records = path.records
    served = (records.option > 0) & ~records.dropped
    assert 0.02 < records.dropped.mean() < 0.5
    assert 0.05 < (records.switch_s[served] > 0).mean() < 0.95
    assert (records.queue_s[served] > 0).mean() > 0.1
    assert (records.upload_s > path.slot_s).mean() > 0.1, "uploads cross slot starts"
    assert (np.asarray(path.requests.outage_s) > 0).mean() > 0.01
    assert path.in_flight.max() > 2
    assert set(records.option.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("on_overload", ["crash", pytest.param("reject", marks=pytest.mark.slow)])
def test_exact_runs_overload_servers_with_a_capacity(on_overload: str) -> None:
    path = run_path(hosting_plant(on_overload), 3)
    records = path.records
    there = records.option > 0
    assert 0.02 < records.dropped[there].mean() < 0.6
    assert set(records.option.tolist()) == {0, 1, 2, 3}
    began = records.dropped & (records.end_s > records.start_s + 1e-6)
    assert began.any() == (on_overload == "crash")
    long = there & ~records.dropped & (records.end_s - records.start_s > path.slot_s)
    assert long.mean() > 0.1, "tasks cross slot starts"


def test_exact_runs_start_gangs_warm_and_cold() -> None:
    path = run_path(gangs_plant(), 3)
    records = path.records
    served = (records.option > 0) & ~records.dropped
    assert 0.02 < records.dropped.mean() < 0.5
    assert 0.1 < (records.switch_s[served] > 0).mean() < 0.9
    assert (records.queue_s[served] > 0).mean() > 0.1
    for server, sizes in enumerate(({1, 2, 4}, {1, 2}, {1, 2, 4, 8})):
        assert set(path.gpus[served & (records.option == server + 1)].tolist()) == sizes
    assert path.group is not None
    assert (path.group[-1, 0] >= 0).any()


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


@pytest.mark.parametrize("plant", [pytest.param("hall-20x5", marks=pytest.mark.slow), "mixed"])
def test_simpy_agrees_on_the_same_trace(plant: str) -> None:
    path = run_path(mixed_plant() if plant == "mixed" else load_scenario(plant, 0.6), 11)
    found, records = in_simpy(path), path.records
    at_server = records.option > 0
    assert at_server.sum() > 1000
    np.testing.assert_array_equal(found["dropped"][at_server], records.dropped[at_server])
    served = at_server & ~records.dropped
    for name in ("start_s", "end_s", "switch_s"):
        np.testing.assert_allclose(found[name][served], getattr(records, name)[served], rtol=0, atol=1e-9, err_msg=name)


def test_thorough_does_more_of_the_same() -> None:
    quick = run.validate(["outage-share"])
    thorough = run.validate(["outage-share"], thorough=True)
    (few,), (many,) = quick["results"], thorough["results"]
    assert many["count"] == run.THOROUGH_BATCHES * few["count"]
    assert many["error"] == pytest.approx(few["error"] / math.sqrt(run.THOROUGH_BATCHES), rel=0.3)
    assert many["expected"] == few["expected"]
    assert (quick["thorough"], thorough["thorough"]) == (False, True)


@pytest.mark.parametrize("runs", [recording.hall, recording.mixed, recording.crashing, recording.gangs])
def test_exact_runs_have_as_many_slots_as_they_are_told(
    runs: Callable[[Run], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(recording, "run_path", lambda scenario, seed, slots: asked.append(slots))
    runs(Run(0))
    runs(Run(0, batches=8))
    assert asked == [SLOTS, 8 * SLOTS]


@pytest.mark.slow
def test_thorough_makes_exact_runs_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times as long; here of a short run."""
    monkeypatch.setattr(recording, "SLOTS", SLOTS // 8)
    compared = [run.validate(["capacity-in-use"], thorough=thorough)["results"][0] for thorough in (False, True)]
    assert all(result["passed"] for result in compared)
    assert 6 < compared[1]["count"] / compared[0]["count"] < 10


def test_command_prints_a_line_per_check_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "validation.json"
    code, shown, progress = gmel(capsys, "validate", "--only", "inf-path-loss,outage-share", "--out", out)
    assert code == 0
    assert "inf-path-loss" in shown
    assert "2 of 2 checks passed" in shown
    assert "2 checks (0 %)" in progress
    assert "(100 %)" in progress
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
