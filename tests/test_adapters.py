"""The adapters: the checkers of the libraries themselves, the same result as the functional environment, and seeds."""

import builtins
import importlib
import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pettingzoo.test import parallel_api_test, parallel_seed_test, render_test

from gmel.physics.random import seed_words
from gmel.scenario.errors import InputError
from gmel.simulator.adapters import devices, flat
from gmel.simulator.adapters.gymnasium import GmelCentralEnv, GmelVectorEnv
from gmel.simulator.adapters.jaxmarl import GmelMultiAgentEnv
from gmel.simulator.adapters.pettingzoo import GmelParallelEnv, env, parallel_env
from gmel.simulator.environment import Environment
from gmel.simulator.records import Records, task_records
from gmel.simulator.scale import scale_of
from gmel.simulator.state import Outcome, Reward, State, option, task
from small_plants import RADIO, small_plant

SLOTS, SEED = 12, 5
PLANT = small_plant(devices=4, arrivals="load = 1.0", reward="cooperation = 0.3\nenergy = 0.5\nenergy_scale_j = 20.0")
OPTIONS = 4
Step = tuple[State, jax.Array, Reward, Outcome]

# Requests beyond what an agent decides are announced by a warning; one test asks for it, the others expect it.
pytestmark = pytest.mark.filterwarnings("ignore:.*beyond requests_per_device")


def agents_env(**choices: Any) -> GmelParallelEnv:
    return parallel_env(PLANT, **{"slots": SLOTS, **choices})


def random_actions(parallel: GmelParallelEnv, seed: int) -> list[dict[str, Any]]:
    """Actions of an episode, masked options included."""
    generator = np.random.default_rng(seed)
    shape = parallel.action_space("device_0").shape or ()
    return [{agent: generator.integers(0, OPTIONS, shape) for agent in parallel.possible_agents} for _ in range(SLOTS)]


reset = jax.jit(Environment.reset)
observe = jax.jit(Environment.observe)
step = jax.jit(Environment.step)
device_view = jax.jit(devices.device_view, static_argnums=(2, 3))
choices = jax.jit(devices.choices)


@jax.jit
def functional_step(environment: Environment, state: State, table: jax.Array) -> tuple[State, Step]:
    chosen, _ = devices.choices(environment, state, table)
    chosen, _ = devices.usable(environment.observe(state), chosen)
    after, reward, outcome = environment.step(state, chosen)
    return after, (state, chosen, reward, outcome)


def functional_episode(environment: Environment, seed: int, actions: list[dict[str, Any]]) -> list[Step]:
    """The same episode without an adapter's class around it."""
    state, steps = reset(environment, jnp.asarray(seed_words(seed))), []
    for action in actions:
        table = jnp.array([np.reshape(choice, -1) for choice in action.values()], jnp.int32)
        state, step = functional_step(environment, state, table)
        steps.append(jax.device_get(step))
    return steps


def episode(parallel: Any, actions: list[dict[str, Any]], seed: int | None = SEED) -> list[Any]:
    """First observations, then what every step gave."""
    return [parallel.reset(seed=seed), *(parallel.step(action) for action in actions)]


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, float) for leaf in jax.tree.leaves(tree)]


def same(one: Any, other: Any) -> bool:
    first, second = leaves(one), leaves(other)
    return len(first) == len(second) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(first, second, strict=True)
    )


# ---- the flat view


def test_flat_rows_by_hand() -> None:
    environment = Environment.from_scenario(PLANT)
    state = reset(environment, jnp.asarray(seed_words(SEED)))
    seen, scale = observe(environment, state), scale_of(PLANT)
    # Work 0.5 ... 2 on three servers with 6 work units/s; 1 ... 8 Mbit.
    assert tuple(scale[:3]) == pytest.approx((1.25 / 2.0, 4.5e6, 1.25))
    # Its reward counts energy: one column more for each option.
    assert scale.other_costs
    rows = np.asarray(flat.flat_rows(seen, scale))
    columns = {name: rows[:, at] for at, name in enumerate(flat.flat_columns(environment))}
    assert rows.shape[1] == len(columns) == flat.flat_width(environment) == 7 + 4 * 10
    present = np.asarray(seen.present)
    assert 0 < present.sum() < len(present)
    assert not rows[~present].any()
    np.testing.assert_array_equal(columns["has_task"], present)
    np.testing.assert_allclose(columns["work"], np.log1p(task(seen, "work") / 1.25) * present, rtol=1e-5)
    for choice in range(OPTIONS):
        times = {n: np.asarray(option(seen, n)[:, choice]) for n in ("upload_s", "backlog_s", "service_s")}
        expected = np.log1p((np.maximum(times["upload_s"], times["backlog_s"]) + times["service_s"]) / 0.625)
        np.testing.assert_allclose(columns[f"option {choice} expected_s"][present], expected[present], rtol=1e-5)
        np.testing.assert_array_equal(columns[f"option {choice} allowed"], seen.mask[:, choice] & present)


def test_flat_view_is_bounded_and_signed() -> None:
    environment = Environment.from_scenario(PLANT)
    seen = observe(environment, reset(environment, jnp.asarray(seed_words(SEED))))
    extreme = seen._replace(task=seen.task.at[0].set(-1e30), options=seen.options.at[0].set(1e30))
    rows = np.asarray(flat.flat_rows(extreme, scale_of(PLANT)))
    assert np.isfinite(rows).all()
    assert rows.min() == -flat.BOUND
    assert rows.max() == flat.BOUND


# ---- the devices' view


def with_requests(environment: Environment, of_devices: list[int]) -> State:
    """A slot in which these devices have a request, in this order."""
    state = reset(environment, jnp.asarray(seed_words(1)))
    rows = environment.requests
    device = np.zeros(rows, np.int32)
    device[: len(of_devices)] = of_devices
    present = np.arange(rows) < len(of_devices)
    requests = state.requests._replace(
        present=jnp.asarray(present), device=jnp.asarray(device), work=jnp.arange(rows) + 1.0
    )
    return state._replace(requests=requests)


def test_several_requests_of_a_device() -> None:
    """Each action decides one request in the order of the table; what is beyond them follows the last one."""
    environment, scale = Environment.from_scenario(PLANT), scale_of(PLANT)
    state = with_requests(environment, [2, 0, 2, 2, 1, 2])
    view = device_view(environment, state, scale, 2)
    work = np.asarray(view.observation).reshape(4, 2, -1)[:, :, 1]
    expected = np.log1p(np.array([[2, 0], [5, 0], [1, 3], [0, 0]]) / scale.work)
    np.testing.assert_allclose(work, expected, rtol=1e-5)
    nothing = [True, False, False, False]
    assert np.asarray(view.mask)[3].tolist() == [nothing, nothing]
    assert np.asarray(view.mask)[2].all()
    assert np.asarray(view.mask)[0].tolist() == [[True] * 4, nothing]
    actions = jnp.array([[3, 0], [0, 3], [1, 2], [3, 3]], jnp.int32)
    chosen, beyond = choices(environment, state, actions)
    assert np.asarray(chosen)[:6].tolist() == [1, 3, 2, 2, 0, 2]
    assert np.asarray(beyond).tolist() == [0, 0, 2, 0]
    chosen, beyond = choices(environment, state, actions[:, :1])
    assert np.asarray(chosen)[:6].tolist() == [1, 3, 1, 1, 0, 1]
    assert np.asarray(beyond).tolist() == [0, 0, 3, 0]


def test_masked_choices_are_replaced() -> None:
    environment = Environment.from_scenario(PLANT)
    seen = observe(environment, with_requests(environment, [0, 1, 2]))
    mask = np.ones(seen.mask.shape, bool)
    mask[0, 3], mask[1, :2] = False, False
    chosen, replaced = devices.usable(seen._replace(mask=jnp.asarray(mask)), jnp.array([3, 1, 3, 0, 0, 0, 0, 0]))
    assert np.asarray(chosen)[:3].tolist() == [0, 2, 3]
    assert np.asarray(replaced)[:4].tolist() == [True, True, False, False]


def test_beyond_is_announced_and_counted() -> None:
    parallel = agents_env()
    with pytest.warns(UserWarning, match="beyond requests_per_device = 1; they go where the last") as caught:
        steps = episode(parallel, random_actions(parallel, 0))[1:]
    assert len([w for w in caught if "beyond" in str(w.message)]) == 1
    counted = sum(info["beyond"] for step in steps for info in step[4].values())
    runs = functional_episode(parallel.site.environment, SEED, random_actions(parallel, 0))
    several = [np.bincount(state.requests.device[state.requests.present], minlength=4) for state, *_ in runs]
    assert counted == np.maximum(np.array(several) - 1, 0).sum() > 0


# ---- PettingZoo


@pytest.mark.parametrize("requests", [1, 2])
def test_pettingzoo_own_tests(requests: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*beyond requests_per_device")
        parallel_api_test(agents_env(requests_per_device=requests), num_cycles=3 * SLOTS)
        parallel_seed_test(partial(agents_env, requests_per_device=requests), num_cycles=SLOTS)


def test_pettingzoo_render_test(capsys: pytest.CaptureFixture[str]) -> None:
    render_test(lambda render_mode: env(PLANT, slots=SLOTS, render_mode=render_mode))
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("slot 1", "S0", "S1", "S2", "devices"))


def test_pictures_show_the_slot() -> None:
    text, image = agents_env(render_mode="ansi"), agents_env(render_mode="rgb_array")
    for parallel in (text, image):
        parallel.reset(seed=SEED)
    empty = image.render()
    everybody = dict.fromkeys(text.agents, 2)
    for _ in range(3):
        text.step(everybody)
        image.step(everybody)
    lines = str(text.render()).splitlines()
    assert lines[0].startswith("slot 3, reward -")
    assert "#" in next(line for line in lines if line.startswith("S1"))
    assert "#" not in next(line for line in lines if line.startswith("S2"))
    later = image.render()
    assert isinstance(empty, np.ndarray)
    assert isinstance(later, np.ndarray)
    assert later.shape == (300, 600, 3)
    assert (later != empty).any()
    assert agents_env().render() is None


@pytest.mark.parametrize("reward", ["own", "team", "mixed"])
def test_rewards_and_infos_are_those_of_the_environment(reward: str) -> None:
    parallel = agents_env(reward=reward, requests_per_device=2)
    actions = random_actions(parallel, 1)
    steps = episode(parallel, actions)[1:]
    runs = functional_episode(parallel.site.environment, SEED, actions)
    mu = {"own": 0.0, "team": 1.0, "mixed": 0.3}[reward]
    for (_, rewards, terminated, _, _), (state, _, earned, _) in zip(steps, runs, strict=True):
        present, device = state.requests.present, state.requests.device
        own = np.bincount(device[present], earned.own[present], minlength=4)
        np.testing.assert_allclose(list(rewards.values()), (1 - mu) * own + mu * earned.team, rtol=1e-4, atol=1e-5)
        assert not any(terminated.values())
    records = episode_records(runs)
    assert len(records) > 20
    for number, agent in enumerate(parallel.possible_agents):
        mine = records.where(records.device == number)
        latency_s = [value for step in steps for value in step[4][agent]["latency_s"]]
        np.testing.assert_allclose(sorted(latency_s), sorted(mine.latency_s), rtol=1e-5, atol=1e-5)
        assert sum(value for step in steps for value in step[4][agent]["in_time"]) == mine.in_time.sum()


def episode_records(runs: list[Step]) -> Records:
    outcome = jax.tree.map(lambda *leaves: np.stack(leaves), *[step[3] for step in runs])
    return task_records(outcome, 1.0)


def energy_alone(state: State, action: jax.Array, outcome: Outcome, reward: Reward) -> jax.Array:
    """A reward of one's own: the energy of a task, as projected."""
    del state, reward
    return -outcome.account.energy_j[-action.shape[0] :]


def test_reward_function() -> None:
    parallel = agents_env(reward=energy_alone)
    actions = random_actions(parallel, 1)
    steps = episode(parallel, actions)[1:]
    runs = functional_episode(parallel.site.environment, SEED, actions)
    for (_, rewards, *_), (state, _, _, outcome) in zip(steps, runs, strict=True):
        present = state.requests.present
        energy_j = outcome.account.energy_j[-len(present) :][present]
        expected = -np.bincount(state.requests.device[present], energy_j, minlength=4)
        np.testing.assert_allclose(list(rewards.values()), expected, rtol=1e-5)
    assert sum(sum(step[1].values()) for step in steps) < -100


def test_episode_ends_by_truncation() -> None:
    parallel = agents_env()
    steps = episode(parallel, random_actions(parallel, 0))[1:]
    assert [all(step[3].values()) for step in steps] == [False] * (SLOTS - 1) + [True]
    assert parallel.agents == []
    assert parallel.step({}) == ({}, {}, {}, {}, {})
    parallel.reset()
    assert parallel.agents == parallel.possible_agents


def test_global_state_lies_in_its_space() -> None:
    parallel = agents_env()
    with pytest.raises(RuntimeError, match="reset"):
        parallel.state()
    parallel.reset(seed=SEED)
    assert parallel.state() in parallel.state_space
    assert parallel.state().any()


# ---- seeds: the faults of public environments


def makers() -> dict[str, Callable[[], Any]]:
    return {
        "pettingzoo": agents_env,
        "gymnasium": lambda: GmelCentralEnv(PLANT, slots=SLOTS),
        "vector": lambda: GmelVectorEnv(2, PLANT, slots=SLOTS),
    }


@pytest.fixture(params=sorted(makers()))
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return makers()[request.param]


def test_a_seed_gives_its_episode(make: Callable[[], Any]) -> None:
    one, other = make(), make()
    first = one.reset(seed=3)
    assert same(first, other.reset(seed=3))
    assert not same(first, other.reset(seed=4))
    assert same(first, other.reset(seed=3))


def test_episodes_differ_and_follow_from_the_seed(make: Callable[[], Any]) -> None:
    one, other = make(), make()
    mine = [one.reset(seed=3), *(one.reset() for _ in range(3))]
    assert not any(same(a, b) for number, a in enumerate(mine) for b in mine[:number])
    theirs = [other.reset(seed=3), *(other.reset() for _ in range(3))]
    assert same(mine, theirs)
    assert not same(make().reset(), make().reset()), "without a seed every instance is another"


def test_instances_share_nothing(make: Callable[[], Any]) -> None:
    """What one does in between changes nothing for the other."""

    def action(of: Any) -> Any:
        return (
            dict.fromkeys(of.agents, 1) if isinstance(of, GmelParallelEnv) else np.ones_like(of.action_space.sample())
        )

    alone, disturbed, other = make(), make(), make()
    expected = [alone.reset(seed=3), *(alone.step(action(alone)) for _ in range(4))]
    other.reset(seed=9)
    got = [disturbed.reset(seed=3)]
    for _ in range(4):
        other.step(action(other))
        got.append(disturbed.step(action(disturbed)))
        other.reset(seed=3)
    assert same(expected, got)


def test_no_global_generator_is_used(make: Callable[[], Any]) -> None:
    """Not read (unseeded instances differ though the global generators agree), and NumPy's not advanced."""

    def unseeded() -> Any:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
        seen = make().reset()
        assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002
        return seen

    assert not same(unseeded(), unseeded())


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        agents_env().reset(seed=seed)


# ---- traces, limits and errors


def test_trace_starts_where_it_is_told() -> None:
    def work_of(place: int, held_out: bool = False) -> list[float]:
        """What the devices are asked for in a slot of the trace."""
        parallel = parallel_env("factory", slots=9, held_out=held_out)
        seen, _ = parallel.reset(seed=1, options={"trace_slot": place})
        return [float(seen[agent]["observation"][1]) for agent in parallel.agents]

    trace = parallel_env("factory").site.environment.trace
    assert trace is not None
    first, second = np.flatnonzero(np.asarray(trace.present).any(axis=1))[:2].tolist()
    assert work_of(first) == work_of(first)
    assert any(work_of(first))
    assert work_of(first) != work_of(second)
    assert work_of(first) != work_of(first, held_out=True)


def test_full_table_of_uploads_is_an_error() -> None:
    plant = small_plant(devices=4, max_uploads=1, bandwidth_hz=1e4, arrivals="load = 1.0")
    parallel = parallel_env(plant, slots=50)
    parallel.reset(seed=0)
    with pytest.raises(InputError, match="raise max_uploads"):
        for _ in range(50):
            parallel.step(dict.fromkeys(parallel.agents, 1))


def test_unreachable_servers_are_never_waited_for() -> None:
    """Unmasked learners choose servers without a link; the device runs the task, and it is counted."""
    radio = RADIO.replace('"clip"', '"outage"').replace("[5.0, 25.0]", "[-20.0, 10.0]")
    parallel = parallel_env(
        small_plant(devices=4, radio=radio + "\nfloor_snr_db = 0.0", arrivals="load = 1.0"), slots=20
    )
    seen, _ = parallel.reset(seed=2)
    replaced = masked = 0
    for _ in range(20):
        with_task = [agent for agent in parallel.agents if seen[agent]["observation"][0]]
        masked += sum(not seen[agent]["action_mask"][1] for agent in with_task)
        seen, _, _, _, infos = parallel.step(dict.fromkeys(parallel.agents, 1))
        replaced += sum(info["replaced"] for info in infos.values())
    assert replaced >= masked > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(agents_env, reward="mine"), "reward = 'mine'"),
        (partial(agents_env, requests_per_device=0), "requests_per_device = 0"),
        (partial(agents_env, render_mode="loud"), "human, ansi, rgb_array"),
        (partial(agents_env, slots=0), "slots = 0"),
        (partial(parallel_env, "hal-20x5"), "hall-20x5"),
        (partial(GmelCentralEnv, PLANT, decide="task"), "decide = 'task'"),
        (partial(GmelCentralEnv, PLANT, reward="own"), "reward = 'own'"),
        (partial(GmelCentralEnv, PLANT, render_mode="human"), "ansi, rgb_array"),
        (partial(GmelVectorEnv, 0, PLANT), "num_envs = 0"),
        (partial(GmelMultiAgentEnv, PLANT, reward="mine"), "reward = 'mine'"),
    ],
)
def test_wrong_choices_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_wrong_actions_are_named() -> None:
    parallel = agents_env()
    parallel.reset(seed=0)
    good = dict.fromkeys(parallel.agents, 0)
    with pytest.raises(ValueError, match=r"actions\['device_2'\] = 4.*Discrete\(4\)"):
        parallel.step(good | {"device_2": 4})
    with pytest.raises(ValueError, match="device_1"):
        parallel.step({agent: 0 for agent in parallel.agents if agent != "device_1"})
    with pytest.raises(ValueError, match="Discrete"):
        parallel.step(good | {"device_0": 1.5})
    single = GmelCentralEnv(PLANT, slots=SLOTS)
    with pytest.raises(RuntimeError, match="reset"):
        single.step(0)
    single.reset(seed=0)
    with pytest.raises(ValueError, match="Discrete"):
        single.step(OPTIONS)


@pytest.mark.parametrize(("module", "needs"), [("pettingzoo", "pettingzoo"), ("gymnasium", "gymnasium")])
def test_missing_extra_is_named(module: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == needs:
            raise ImportError(name)
        return real(name, *rest, **more)

    name = f"gmel.simulator.adapters.{module}"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "gmel\[rl\]"'):
        importlib.import_module(name)
