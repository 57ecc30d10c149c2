"""The Gymnasium adapters: one scheduler, alone and vectorised."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gmel.physics.random import seed_words
from gmel.simulator.adapters.gymnasium import GmelCentralEnv, GmelVectorEnv
from test_adapters import OPTIONS, PLANT, SEED, SLOTS, energy_alone, reset, same, step

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond requests_per_device")

# ---- Gymnasium


@pytest.mark.parametrize("decide", ["slot", "request"])
def test_check_env_without_a_warning(decide: str) -> None:
    made = gymnasium.make("gmel/Central-v0", scenario=PLANT, decide=decide, slots=SLOTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)
    assert made.unwrapped.observation_space.shape == (len(made.unwrapped.get_wrapper_attr("columns")),)


def central_episode(made: GmelCentralEnv, rule: Callable[[np.ndarray], Any]) -> tuple[float, dict[str, float]]:
    """Return of an episode and the sums of its infos; `rule` gets the mask."""
    _, info = made.reset(seed=SEED)
    total, over, sums = 0.0, False, dict.fromkeys(("tasks", "in_time", "total_latency_s", "total_energy_j"), 0.0)
    while not over:
        _, reward, _, over, info = made.step(rule(info["action_mask"]))
        total += reward
        sums = {name: value + info[name] for name, value in sums.items()}
    return total, sums


@pytest.mark.parametrize("reward", [None, energy_alone])
def test_request_by_request_pays_what_the_slot_costs(reward: Any) -> None:
    """The same decisions asked for in two ways have the same return and the same tasks."""
    make = partial(GmelCentralEnv, PLANT, slots=SLOTS, reward=reward)
    second = partial(central_episode, rule=lambda mask: np.full(mask.shape[:-1], 2)[()])
    by_slot, tasks = second(make(decide="slot"))
    by_request, same_tasks = second(make(decide="request"))
    assert by_request == pytest.approx(by_slot, rel=1e-5)
    assert by_slot < -10
    assert tasks["tasks"] > 20
    assert same_tasks == pytest.approx(tasks)


def test_requests_see_those_before_them() -> None:
    made = GmelCentralEnv(PLANT, slots=SLOTS, decide="request")
    columns = made.columns
    seen, info = made.reset(seed=SEED)
    waiting = seen[columns.index("waiting")]
    for sent in range(int(waiting)):
        assert info["slot"] == 0
        assert seen[columns.index("waiting")] == waiting - sent
        assert seen[columns.index("option 3 sent")] == sent
        assert (seen[columns.index("option 3 sent_s")] > 0) == (sent > 0)
        seen, _, _, _, info = made.step(3)
    assert waiting > 1
    assert info["slot"] > 0
    assert seen[columns.index("option 3 sent")] == 0


def test_marginal_rewards_are_what_the_request_costs() -> None:
    """The first of a slot pays for itself alone, however many come after it."""
    made = GmelCentralEnv(PLANT, slots=SLOTS, decide="request")
    made.reset(seed=SEED)
    environment = made.site.environment
    state = reset(environment, jnp.asarray(seed_words(SEED)))
    alone = state._replace(requests=state.requests._replace(present=jnp.arange(environment.requests) == 0))
    _, reward, _ = step(environment, alone, jnp.full(environment.requests, 1, jnp.int32))
    assert made.step(1)[1] == pytest.approx(float(reward.team), rel=1e-5)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("decide", ["slot", "request"])
def test_vector_environment_is_a_row_of_single_ones(decide: str, mode: AutoresetMode) -> None:
    """Observations, rewards, ends and infos as Gymnasium's own vector environment gives them, over several episodes."""
    make = partial(GmelCentralEnv, PLANT, slots=2, decide=decide)
    ours = GmelVectorEnv(2, PLANT, slots=2, decide=decide, autoreset_mode=mode)
    theirs = SyncVectorEnv([make] * 2, autoreset_mode=mode)
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.action_space == theirs.action_space
    assert same(ours.reset(seed=8), theirs.reset(seed=8))
    generator, ends = np.random.default_rng(0), 0
    for _ in range(24):
        actions = generator.integers(0, OPTIONS, ours.action_space.shape)
        got, expected = ours.step(actions), theirs.step(actions)
        assert same(got[:4], expected[:4])
        ends += int(got[3].sum())
        if mode is AutoresetMode.DISABLED and got[3].any():
            with pytest.raises(RuntimeError, match="reset them first"):
                ours.step(actions)
            fresh, known = (v.reset(options={"reset_mask": got[3].copy()}) for v in (ours, theirs))
            assert same(fresh[0], known[0])
            assert same_infos(fresh[1], known[1], got[3])
        else:
            assert same_infos(got[4], expected[4], np.ones(2, bool))
        if mode is AutoresetMode.SAME_STEP:
            assert ("final_obs" in got[4]) == got[3].any()
            for index in np.flatnonzero(got[3]):
                np.testing.assert_allclose(got[4]["final_obs"][index], expected[4]["final_obs"][index], atol=1e-5)
    assert ends >= 4


def same_infos(ours: dict[str, Any], theirs: dict[str, Any], which: np.ndarray) -> bool:
    keys = {name for name in theirs if not name.startswith(("_", "final"))}
    assert keys == {name for name in ours if not name.startswith(("_", "final"))}
    return all(same(ours[name][which], theirs[name][which]) for name in keys) and all(
        np.array_equal(ours[f"_{name}"], theirs[f"_{name}"]) for name in keys
    )


def test_make_vec_gives_the_compiled_one() -> None:
    made = gymnasium.make_vec(
        "gmel/Central-v0", num_envs=2, vectorization_mode="vector_entry_point", scenario=PLANT, slots=SLOTS
    )
    assert isinstance(made.unwrapped, GmelVectorEnv)
    observation, _ = made.reset(seed=[4, 9])
    alone = GmelCentralEnv(PLANT, slots=SLOTS)
    np.testing.assert_allclose(observation[1], alone.reset(seed=9)[0], atol=1e-6)
    with pytest.raises(ValueError, match="3 seeds for 2"):
        made.reset(seed=[1, 2, 3])


def test_masks_for_maskable_learners() -> None:
    single = GmelCentralEnv(PLANT, slots=SLOTS, decide="slot")
    _, info = single.reset(seed=SEED)
    assert single.action_masks().dtype == bool
    np.testing.assert_array_equal(single.action_masks(), info["action_mask"].reshape(-1))
    many = GmelVectorEnv(2, PLANT, slots=SLOTS, decide="slot")
    many.reset(seed=SEED)
    np.testing.assert_array_equal(many.action_masks()[0], single.action_masks())
