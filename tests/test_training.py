"""The training loop: interrupted and resumed it ends, bit for bit, where it would have ended."""

from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from gmel.learning.algorithm import Task, make_task
from gmel.learning.amarl import Amarl
from gmel.learning.training import Progress, Trained, Training, train
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario
from gmel.simulator.environment import Environment
from small_plants import plant_text

ALGORITHM = Amarl(updates=6, environments=8, slots=4, epochs=1, minibatches=2, width=8, critic_width=8, heads=2)
FACTS = {"scenario": "small", "seed": "0"}


@pytest.fixture(scope="module")
def task() -> Task:
    scenario = parse_scenario(plant_text(), "small")
    return make_task(Environment.from_scenario(scenario), scenario)


def count_weights(policy: object) -> tuple[float, float]:
    """A validation that depends on the weights alone, so that the best policy is not always the last."""
    total = sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(eqx.filter(policy, eqx.is_array)))
    return abs(np.sin(1e4 * total)) + 0.1, 0.5


def run(task: Task, checkpoint: Path | None, *, resume: bool = False, stop_at: int | None = None) -> Trained:
    def on_progress(progress: Progress) -> None:
        if progress.update == stop_at:
            raise KeyboardInterrupt

    settings = Training(updates=6, validate_every=2, checkpoint=checkpoint, facts=FACTS)
    return train(task, ALGORITHM, settings, count_weights, on_progress, resume=resume)


def assert_same(one: Trained, other: Trained) -> None:
    first, second = (jax.tree.leaves(eqx.filter(each.policy, eqx.is_array)) for each in (one, other))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert len(one.rows) == len(other.rows)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert {k: v for k, v in a.items() if k != "wall_s"} == {k: v for k, v in b.items() if k != "wall_s"}


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_interrupted_and_resumed_is_uninterrupted(task: Task, tmp_path: Path, stop_at: int) -> None:
    whole = run(task, None)
    assert whole.finished
    assert whole.stopped is None
    part = run(task, tmp_path / "c.safetensors", stop_at=stop_at)
    assert part.stopped == "interrupt"
    assert not part.finished
    assert len(part.rows) == stop_at
    resumed = run(task, tmp_path / "c.safetensors", resume=True)
    assert resumed.finished
    assert_same(whole, resumed)


def test_resume_of_a_finished_training_changes_nothing(task: Task, tmp_path: Path) -> None:
    whole = run(task, tmp_path / "c.safetensors")
    assert_same(whole, run(task, tmp_path / "c.safetensors", resume=True))


def test_the_best_policy_is_kept(task: Task) -> None:
    whole = run(task, None)
    validated = [row["validation_latency_s"] for row in whole.rows if row["validation_latency_s"] is not None]
    assert len(validated) == 3
    assert count_weights(whole.policy)[0] == pytest.approx(min(validated), abs=1e-6)


def test_other_seed_other_policy(task: Task) -> None:
    settings = Training(updates=1, validate_every=1)
    a = train(task, ALGORITHM, settings, count_weights)
    b = train(task, ALGORITHM, Training(updates=1, seed=1, validate_every=1), count_weights)
    leaves = [jax.tree.leaves(eqx.filter(each.policy, eqx.is_array)) for each in (a, b)]
    assert any(not np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def test_budget_stops_between_updates(task: Task) -> None:
    result = train(task, ALGORITHM, Training(updates=6, budget_s=1e-9), count_weights)
    assert result.stopped == "budget"
    assert len(result.rows) < 6


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "corrupt"),
        (lambda data: b"", "corrupt"),
        (lambda data: b"\xff" * 100, "corrupt"),
    ],
)
def test_corrupt_checkpoint(task: Task, tmp_path: Path, damage: object, words: str) -> None:
    path = tmp_path / "c.safetensors"
    run(task, path, stop_at=2)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError, match=words) as caught:
        run(task, path, resume=True)
    assert "\n" not in str(caught.value)


def test_checkpoint_of_another_run(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    run(task, path, stop_at=2)
    other = Training(updates=6, checkpoint=path, facts={**FACTS, "scenario": "another"})
    with pytest.raises(InputError, match="scenario is 'small', must be 'another'"):
        train(task, ALGORITHM, other, count_weights, resume=True)
    wider = eqx.tree_at(lambda a: a, ALGORITHM, Amarl(updates=6, environments=8, slots=4, width=16, critic_width=8))
    with pytest.raises(InputError, match="must be"):
        train(task, wider, Training(updates=6, checkpoint=path, facts=FACTS), count_weights, resume=True)
