"""Who decides: rules, the learned policy, the plain rule in its place, and one in the shadow."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tests.edge_plants import beat, fleet, task

from gmel.edge.deciding import FALLBACK, RULES, Decider, Version
from gmel.edge.fleet import Fleet, ServerState
from gmel.edge.observing import expected_s, observe
from gmel.learning.export import export_policy
from gmel.learning.networks import Actor
from gmel.policies.exported import OPTION_UNITS, TASK_UNITS
from gmel.scenario.errors import InputError
from gmel.simulator.scale import Scale


def decide(decider: Decider, name: str = "t", **more: Any) -> str:
    """Decides and counts the task at its server."""
    each = task(name, **more)
    decision = decider.decide(each, 0.0, 0.0)
    assert decision is not None
    decision.server.send(decider.fleet.expect(each, decision.server), decider.fleet.memory_of)
    return decision.server.name


class Broken:
    def __init__(self, scores: Any) -> None:
        self._scores = scores

    def scores(self, row: Any, options: Any, servers: Sequence[ServerState]) -> Any:
        if isinstance(self._scores, Exception):
            raise self._scores
        return self._scores


def in_charge(decider: Decider, chooser: Any) -> None:
    decider.history.append(Version(99, "broken", 0.0, chooser))


def test_earliest_finish_takes_the_least_expected_end() -> None:
    found = fleet(slow=1.0, fast=4.0)
    decider = Decider(found)
    assert decide(decider, "1") == "fast"
    # An upload that takes longer than it gains is counted.
    assert decide(decider, "2", size_bit=1e6, links_bps={"fast": 1e5, "slow": 1e9}) == "slow"


def test_round_robin_goes_around() -> None:
    decider = Decider(fleet(b=1.0, a=1.0, c=1.0))
    decider.change("round-robin", 0.0)
    assert [decide(decider, f"{number}") for number in range(6)] == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize("rule", ["least-connections", "power-of-two"])
def test_rules_that_count_tasks_spread_them(rule: str) -> None:
    decider = Decider(fleet(a=1.0, b=1.0, c=1.0))
    decider.change(rule, 0.0)
    counts = Counter(decide(decider, f"{number}") for number in range(300))
    assert max(counts.values()) - min(counts.values()) <= (1 if rule == "least-connections" else 20)


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_chooses_a_server_that_failed_the_task_while_there_is_another(rule: str) -> None:
    decider = Decider(fleet(a=1.0, b=8.0))
    decider.change(rule, 0.0)
    for number in range(5):
        decision = decider.decide(task(f"{number}"), 0.0, 0.0, without=["b"])
        assert decision is not None
        assert decision.server.name == "a"
    decision = decider.decide(task("x"), 0.0, 0.0, without=["a", "b"])
    assert decision is not None, "better one that failed it than none"
    assert decider.decide(task("x"), 99.0, 0.0) is None, "nobody is alive"


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (RuntimeError("no such tensor"), "broken: RuntimeError: no such tensor"),
        ([float("nan"), 1.0], "no finite scores"),
        ([-float("inf"), -float("inf")], "no finite scores"),
        ([1.0], "1 scores for 2 servers"),
        (None, "TypeError"),
    ],
)
def test_a_policy_that_fails_is_replaced_and_the_reason_kept(scores: Any, reason: str) -> None:
    decider = Decider(fleet(a=1.0, b=8.0))
    in_charge(decider, Broken(scores))
    decision = decider.decide(task(), 0.0, 0.0)
    assert decision is not None
    assert (decision.server.name, decision.policy) == ("b", FALLBACK)
    assert decision.fallback is not None
    assert reason in decision.fallback
    assert decider.fallbacks == 1
    assert reason in decider.reasons[-1]


def test_reasons_do_not_pile_up() -> None:
    decider = Decider(fleet(a=1.0))
    in_charge(decider, Broken(ValueError("x" * 10_000)))
    for _ in range(200):
        decider.decide(task(), 0.0, 0.0)
    assert decider.fallbacks == 200
    assert len(decider.reasons) == 50
    assert max(len(reason) for reason in decider.reasons) <= 200


def test_versions_and_back() -> None:
    decider = Decider(fleet(a=1.0))
    with pytest.raises(InputError, match="none before"):
        decider.roll_back(0.0)
    decider.change("round-robin", 1.0)
    decider.change("power-of-two", 2.0)
    assert [(version.number, version.name) for version in decider.history] == [
        (1, "earliest-finish"),
        (2, "round-robin"),
        (3, "power-of-two"),
    ]
    assert decider.roll_back(3.0).name == "round-robin"
    assert decider.current.number == 4, "going back is a version of its own"
    with pytest.raises(InputError, match="must be one of earliest-finish"):
        decider.change("nobody", 4.0)
    assert decider.current.number == 4
    for number in range(100):
        decider.change("round-robin", float(number))
    assert len(decider.history) <= 33


def test_a_policy_in_the_shadow_decides_nothing() -> None:
    decider = Decider(fleet(a=1.0, b=8.0))
    decider.watch("round-robin")
    decisions = [decider.decide(task(f"{number}"), 0.0, 0.0) for number in range(10)]
    assert {decision.server.name for decision in decisions if decision} == {"b"}
    assert decider.shadow is not None
    seen = decider.shadow.as_json()
    assert (seen["seen"], seen["agreed"], seen["failed"]) == (10, 5, 0)
    assert seen["mean_expected_difference_s"] == pytest.approx(0.5 * (1.0 - 1.0 / 8.0))
    decider.watch(None)
    assert decider.shadow is None


@pytest.mark.parametrize("scores", [RuntimeError("x"), [1.0, 2.0, 3.0], [float("nan"), 0.0]])
def test_a_shadow_that_fails_hurts_nobody(scores: Any) -> None:
    decider = Decider(fleet(a=1.0, b=8.0))
    decider.watch("round-robin")
    assert decider.shadow is not None
    decider.shadow.chooser = Broken(scores)
    decision = decider.decide(task(), 0.0, 0.0)
    assert decision is not None
    assert decision.server.name == "b"
    assert decision.fallback is None
    assert (decider.shadow.seen, decider.shadow.failed) == (1, 1)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    actor = Actor(Scale(1.0, 1e6, 1.0), jax.random.key(0), 8)
    export_policy(actor, folder / "learned", scenario_digest="x", scenario_name="test", training={"algorithm": "test"})
    return folder


def test_an_exported_actor_decides(policies: Path) -> None:
    found = fleet(a=1.0, b=2.0, c=4.0)
    decider = Decider(found, policies)
    assert decider.names() == ["learned"]
    decider.change("learned", 0.0)
    each = task("1", images=3)
    decision = decider.decide(each, 0.0, 0.5)
    assert decision is not None
    assert (decision.policy, decision.fallback, decision.version) == ("learned", None, 2)
    # What it scored is what the policy says of the same row.
    row, options = observe(each, list(found.servers.values()), found, 0.0, 0.5)
    mask = np.ones((1, 4), np.bool_)
    mask[:, 0] = False
    logits = decider.current.chooser._policy.logits(row, options, mask)[0, 1:]  # type: ignore[attr-defined]
    assert list(decision.scores.values()) == pytest.approx([float(each) for each in logits])
    assert decision.server.name == "abc"[int(np.argmax(logits))]
    decider.watch("learned")
    decider.decide(each, 0.0, 0.5)
    assert decider.shadow is not None
    assert decider.shadow.agreed == 1


def test_a_policy_that_does_not_fit_is_refused(policies: Path, tmp_path: Path) -> None:
    decider = Decider(fleet(a=1.0), tmp_path)
    broken = tmp_path / "bent"
    broken.mkdir()
    for file in (policies / "learned").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    graph = broken / "actor.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(InputError):
        decider.change("bent", 0.0)
    for name in ("../learned", "/etc", "", "missing", "a/b"):
        with pytest.raises(InputError):
            decider.change(name, 0.0)
    assert decider.current.name == FALLBACK


def test_what_a_policy_sees_are_numbers_whatever_the_fleet_says() -> None:
    found = fleet(a=1.0, b=1e-6)
    found.hear("b", beat(1e-6, foreign_s=1e9), 0.0)
    for number in range(3000):
        found.servers["b"].send(found.expect(task(f"{number}", images=256), found.servers["b"]), found.memory_of)
    each = task("x", images=256, size_bit=1e13, links_bps={"b": 1.0}, deadline_s=1e7)
    row, options = observe(each, list(found.servers.values()), found, 1.0, 1e7)
    assert (row.shape, options.shape) == ((1, len(TASK_UNITS)), (1, 3, len(OPTION_UNITS)))
    assert np.isfinite(row).all()
    assert np.isfinite(options).all()
    assert np.isfinite(expected_s(options)).all()


def test_an_unknown_model_is_expected_to_take_a_work_unit_an_image() -> None:
    found = Fleet(fleet(a=2.0).plant)
    found.hear("a", beat(2.0), 0.0)
    row, options = observe(task("x", model="new", images=4), [found.servers["a"]], found, 0.0, 0.0)
    assert row[0, 0] == 4.0
    assert expected_s(options)[1] == pytest.approx(2.0)
