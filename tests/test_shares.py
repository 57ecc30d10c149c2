"""Shares as part of an action: the band of a cell and the time of a server, divided in proportion to chosen weights."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compiled
from exported_actors import survives_export
from gmel.evaluation.episodes import Episodes, run_episodes
from gmel.learning.algorithm import make_task
from gmel.learning.amarl import Amarl
from gmel.learning.networks import Actor
from gmel.learning.training import Training, train
from gmel.policies.policy import StatelessPolicy
from gmel.policies.rules import expected_cost_s, expected_latency_s
from gmel.scenario.load import parse_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.levels import manner, split_action
from gmel.simulator.records import task_records
from gmel.simulator.scale import scale_of
from gmel.simulator.state import OPTION_FEATURES, Requests, State, option, share_weights
from small_plants import RADIO, opened, plant_text

BAND, CPU = (0.5, 1.0, 2.0), (1.0, 4.0)
SHARED_BAND = RADIO.replace('sharing = "none"', 'sharing = "equal"')
FIXED = 'model = "fixed"\nrate_bps = 1e6\nfading = "none"\nfloor = "clip"\nsharing = "equal"\ndownload = false'
NEVER = math.inf


def plant(
    band: Sequence[float] = (), cpu: Sequence[float] = (), service: str = "sharing", more: str = "", **choices: Any
) -> Scenario:
    """A small plant with weights to choose from; `more` is added to its [devices]."""
    choices = {"radio": SHARED_BAND, "max_uploads": 80, **choices}
    tasks = f"{choices.pop('tasks', '')}\n" + (f"cpu_weights = {list(cpu)}" if cpu else "")
    text = plant_text(**choices, tasks=tasks)
    devices = f"band_weights = {list(band)}\n{more}" if band else more
    text = text.replace("[devices]", f"[devices]\n{devices}")
    return parse_scenario(f'{text}\n[service]\ndiscipline = "{service}"', "shares")


def asked(environment: Environment, work: Sequence[float], bits: Sequence[float], deadline_s: Sequence[float]) -> Any:
    """Requests of devices 0, 1, ... decided as they come."""
    count = len(work)

    def column(values: Any, dtype: Any = float) -> jax.Array:
        return jnp.zeros(environment.requests, dtype).at[:count].set(jnp.asarray(values, dtype))

    links = jnp.ones((environment.requests, environment.servers))
    return Requests(
        present=column([True] * count, bool),
        device=column(range(count), jnp.int32),
        generated_s=column([0.0] * count),
        size_bit=column(bits),
        bits_out=column([0.0] * count),
        work=column(work),
        noise=jnp.ones(environment.requests),
        model=column([0] * count, jnp.int32),
        load_s=column([0.0] * count),
        deadline_s=column(deadline_s),
        fade=links,
        outage_s=0.0 * links,
    )


stepped, projected_by = eqx.filter_jit(Environment.step), eqx.filter_jit(Environment.project)
seen_by = eqx.filter_jit(Environment.observe)


def everything() -> Scenario:
    """Steps, powers and both weights to choose from: 2 x 2 x 3 x 2 levels."""
    return plant(
        BAND, CPU, catalogue=True, tasks="step_options = [10.0, 20.0]", more="power_options_dbm = [13.0, 23.0]"
    )


# The level


def test_a_level_counts_steps_first_then_power_band_and_processor() -> None:
    scenario = everything()
    environment, state = opened(scenario)
    # The last index of a product moves fastest.
    order = [each[::-1] for each in itertools.product(CPU, BAND, (13.0, 23.0), (10.0, 20.0))]
    assert scenario.levels == environment.plant.switches.levels == len(order) == 24
    assert environment.options == 4 * 24
    all_levels = jnp.arange(24)
    how = at_levels(environment, state, all_levels)
    steps, power_dbm, band, cpu = np.transpose(order)
    np.testing.assert_array_equal(how.steps[:, 0], steps)
    np.testing.assert_allclose(how.tx_power_w[:, 0], 10 ** (power_dbm / 10 - 3), rtol=1e-5)
    np.testing.assert_array_equal(how.band_weight[:, 0], band)
    np.testing.assert_array_equal(how.cpu_weight[:, 0], cpu)
    static = manner(environment.plant, state.requests, 17)
    for one, other in zip(static, how, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other[17], rtol=1e-6)
    place, level = split_action(environment.plant, 2 + 4 * all_levels)
    assert (np.asarray(place) == 2).all()
    np.testing.assert_array_equal(level, all_levels)


def at_levels(environment: Environment, state: State, levels: jax.Array) -> Any:
    """What each level means, first axis levels."""
    rows = jnp.zeros(environment.requests, jnp.int32)
    return jax.jit(jax.vmap(lambda level: manner(environment.plant, state.requests, rows + level)))(levels)


def test_what_could_be_chosen_before_keeps_its_numbers() -> None:
    _, state = opened(everything())
    new, old = (
        Environment.from_scenario(each)
        for each in (
            everything(),
            plant(catalogue=True, tasks="step_options = [10.0, 20.0]", more="power_options_dbm = [13.0, 23.0]"),
        )
    )
    first, second = (at_levels(each, state, jnp.arange(4)) for each in (new, old))
    for name in ("work", "steps", "tx_power_w"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert second.band_weight is None
    assert second.cpu_weight is None


def test_on_the_device_there_is_no_share_to_choose() -> None:
    environment, state = opened(everything())
    seen = seen_by(environment, state)
    present, mask = np.asarray(seen.present), np.asarray(seen.mask)
    assert present.any()
    level = np.arange(environment.options) // 4
    assert (mask[present][:, ::4] == (level[::4] < 2)).all()
    for server in (1, 2, 3):
        assert mask[present][:, server::4].all()
    assert (mask[~present] == (np.arange(environment.options) == 0)).all()
    weights = np.asarray(share_weights(seen, 2))[present]
    # One more for other costs, two for the weights.
    assert seen.options.shape[-1] == len(OPTION_FEATURES) + 3
    assert (weights[:, ::4] == 1.0).all()
    np.testing.assert_array_equal(weights[0, 1::4], [[b, c] for c in CPU for b in BAND for _ in range(4)])


# The band


def test_the_band_of_a_cell_is_shared_by_weight() -> None:
    """Three uploads by hand, then one more beside those in flight; rates hold, and weights are announced."""
    environment, state = opened(plant(BAND, service="fifo", radio=FIXED))
    bits = [2e6, 3e6, 4e6, 0.5e6]
    state = state._replace(requests=asked(environment, [1.0] * 4, bits, [9.0] * 4))
    # Weights 0.5, 1 and 2 in the cell of server 2; the fourth is alone in that of server 1.
    action = jnp.zeros(environment.requests, jnp.int32).at[:4].set(jnp.array([2, 2 + 4, 2 + 8, 1 + 8]))
    later = asked(environment, [1.0], [1e6], [9.0])
    after, _, outcome = stepped(environment, state, action, requests=later)
    ready_s = np.asarray(outcome.upload_end_s[-environment.requests :])[:4]
    np.testing.assert_allclose(ready_s, [2 * 3.5 / 0.5, 3 * 3.5 / 1.0, 4 * 3.5 / 2.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(after.broadcasts.uploads[0], [0.0, 3.5, 0.0], rtol=1e-6)
    action = jnp.zeros(environment.requests, jnp.int32).at[0].set(2 + 8)
    _, _, outcome = stepped(environment, after, action, requests=later)
    ready_s = np.asarray(outcome.upload_end_s[-environment.requests :])
    assert float(ready_s[0]) == pytest.approx((3.5 + 2.0) / 2.0, rel=1e-6)
    held_s = np.sort(np.asarray(outcome.upload_end_s[: -environment.requests])[np.asarray(after.uploads.present)])
    np.testing.assert_allclose(held_s, np.sort([14.0, 10.5, 7.0]) - 1.0, rtol=1e-5)
    # What a device expects: itself beside what it heard, at each of its weights.
    upload_s = np.asarray(option(seen_by(environment, after, fresh=True), "upload_s"))[0, 2::4]
    np.testing.assert_allclose(upload_s, [1 + 3.5 / weight for weight in BAND], rtol=1e-6)


def test_full_power_goes_on_the_part_of_the_band_that_a_weight_gives() -> None:
    radio = SHARED_BAND.replace('fading = "block"', 'fading = "none"')
    environment, state = opened(plant(BAND, service="fifo", radio=radio))
    state = state._replace(requests=asked(environment, [1.0] * 3, [1e6, 2e6, 3e6], [9.0] * 3))
    action = jnp.zeros(environment.requests, jnp.int32).at[:3].set(jnp.array([1, 1 + 4, 1 + 8]))
    _, _, outcome = stepped(environment, state, action)
    ready_s = np.asarray(outcome.upload_end_s[-environment.requests :])[:3]
    snr = np.asarray(state.links.uplink_snr)[:3, 0]
    for row, (weight, bits) in enumerate(zip(BAND, (1e6, 2e6, 3e6), strict=True)):
        band_hz = 1e6 * weight / 3.5
        # The noise is that of the narrow band, the power is all there is.
        rate_bps = band_hz * math.log2(1.0 + snr[row] * 1e6 / band_hz)
        assert ready_s[row] == pytest.approx(bits / rate_bps, rel=1e-5)


# In the environment


def driven(scenario: Scenario, choose: Any, slots: int = 40) -> Any:
    """Random places, levels by `choose(key, count)`; outcomes, rewards and the last state, in double precision."""
    environment = Environment.from_scenario(scenario)
    places = 1 + environment.servers

    def slot(state: State, key: jax.Array) -> Any:
        place_key, level_key = jax.random.split(key)
        place = jax.random.randint(place_key, (environment.requests,), 0, places)
        action = place + places * choose(level_key, environment)
        projection = environment.project(state, action)
        state, reward, outcome = environment.step(state, action)
        return state, (projection, reward, outcome)

    run = eqx.filter_jit(lambda s: jax.lax.scan(slot, s, jax.random.split(jax.random.key(5), slots)))
    last, history = jax.device_get(run(compiled.reset(environment, seeds(2, 1)[0])))
    assert int(last.lost) == 0
    return history, last


def any_level(key: jax.Array, environment: Environment) -> jax.Array:
    return jax.random.randint(key, (environment.requests,), 0, environment.plant.switches.levels)


def first_level(key: jax.Array, environment: Environment) -> jax.Array:
    del key
    return jnp.zeros(environment.requests, jnp.int32)


@pytest.mark.slow
def test_with_equal_weights_it_is_as_without() -> None:
    choices: dict[str, Any] = {"gpus": (2, 1, 3), "arrivals": "load = 0.9", "reward": "miss = 1.0\nenergy = 0.1"}
    with jax.enable_x64(True):
        plain = driven(plant(**choices), first_level)
        alike = driven(plant((0.7, 0.7), (0.3, 0.3, 0.3), **choices), any_level)
    assert np.asarray(plain[0][2].final).sum() > 60
    # The states have more columns with weights; what is in both must agree.
    for one, other in zip(plain[0], alike[0], strict=True):
        for name in one._fields:
            for a, b in zip(jax.tree.leaves(getattr(one, name)), jax.tree.leaves(getattr(other, name)), strict=True):
                np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=1e-12, atol=1e-11, err_msg=name)
    for name in ("ready_s", "latency_s", "cost", "service_s"):
        a, b = (np.asarray(getattr(last.uploads, name)) for last in (plain[1], alike[1]))
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-11, err_msg=name)


def test_team_rewards_add_up_to_the_cost_of_all_tasks() -> None:
    reward = "latency_scale_s = 1.0\nclip = 1000.0"
    environment = Environment.from_scenario(plant(BAND, CPU, gpus=(2, 1, 1), reward=reward, arrivals="load = 0.4"))

    def slot(state: State, key: jax.Array) -> Any:
        state = state._replace(requests=state.requests._replace(present=state.requests.present & (state.slot < 40)))
        action = jax.random.randint(key, (environment.requests,), 0, environment.options)
        after, reward, outcome = environment.step(state, action)
        return after, (reward.team, outcome)

    run = eqx.filter_jit(lambda s: jax.lax.scan(slot, s, jax.random.split(jax.random.key(0), 160)))
    last, (team, outcome) = jax.device_get(run(compiled.reset(environment, seeds(1, 1)[0])))
    assert not last.uploads.present.any()
    records = task_records(outcome, 1.0)
    assert len(records) > 60
    assert float(np.sum(team)) == pytest.approx(-records.latency_s.sum(), rel=1e-4)


def test_an_option_says_what_its_action_does_beside_one_other_task() -> None:
    """One task that has long to go is at the server: the estimate of each weight is what the environment projects."""
    environment, state = opened(plant((1.0, 2.0), CPU, radio=FIXED, speeds=(2.0,), age=0))
    light, heavy = 1, 1 + 2 * 2
    state = state._replace(requests=asked(environment, [40.0], [0.1e6], [99.0]))
    for held in (light, heavy):
        action = jnp.full(environment.requests, held)
        following = asked(environment, [3.0], [0.5e6], [99.0])
        after, _, _ = stepped(environment, state, action, requests=following)
        assert after.broadcasts.weight is not None
        np.testing.assert_allclose(after.broadcasts.weight[0], [4.0 if held == heavy else 1.0])
        seen = seen_by(environment, after)
        expected = np.asarray(expected_latency_s(seen))[0]
        for choice in np.flatnonzero(np.asarray(seen.mask)[0]):
            projected = projected_by(environment, after, jnp.full(environment.requests, choice))
            assert float(projected.latency_s[0]) == pytest.approx(expected[choice], rel=1e-5), choice


@pytest.mark.parametrize("gpus", [1, 3])
def test_the_estimate_is_a_bound_while_nobody_else_comes(gpus: int) -> None:
    """Beside tasks of any weight and work none takes longer than it is told; and a heavy one is told of its weight."""
    weights = (0.5, 1.0, 4.0)
    environment, state = opened(plant(cpu=weights, radio=FIXED, speeds=(1.0,), gpus=(gpus,), age=0))
    rng = np.random.default_rng(6)
    closer = 0
    for _ in range(12):
        there = asked(environment, rng.exponential(3.0, 5).tolist(), [1e2] * 5, [99.0] * 5)
        action = jnp.asarray(1 + 2 * rng.integers(0, 3, environment.requests), jnp.int32)
        comes = asked(environment, [float(rng.exponential(2.0))], [float(rng.uniform(0, 2e6))], [99.0])
        after, _, _ = stepped(environment, state._replace(requests=there), action, requests=comes)
        seen = seen_by(environment, after)
        expected = np.asarray(expected_latency_s(seen))[0]
        work_left_s = float(after.broadcasts.wait_s[0, 0])
        # What a row without a request would do is nobody's: it sees all the work there.
        np.testing.assert_array_equal(np.asarray(option(seen, "backlog_s"))[1:, 1::2], work_left_s)
        for choice in (1, 3, 5):
            projected = projected_by(environment, after, jnp.full(environment.requests, choice))
            assert float(projected.latency_s[0]) <= expected[choice] * (1 + 1e-5)
        upload_s, service_s = (float(option(seen, name)[0, 1]) for name in ("upload_s", "service_s"))
        assert (np.diff(expected[[1, 3, 5]]) <= 1e-6).all()
        closer += expected[5] < max(upload_s, work_left_s) + service_s - 0.01
    assert closer >= 3


URGENT, PATIENT = 0, 1


def urgent_and_patient(scenario: Scenario, deadline_s: tuple[float, float]) -> tuple[Environment, State]:
    """Two alike tasks of 1 Mbit and 1 s of work, one of which is urgent."""
    environment, state = opened(scenario)
    return environment, state._replace(requests=asked(environment, [1.0, 1.0], [1e6, 1e6], list(deadline_s)))


@pytest.mark.parametrize(
    ("band", "cpu", "rate", "deadline_s"),
    [
        # Equal shares end both at 2; 4 to 1 ends the urgent one at 1.25 and the other still at 2.
        ((), (1.0, 4.0), 1e9, (1.5, 3.0)),
        # Equal shares send either in 2 s; 4 to 1 in 1.25 and 5 s, and the service follows.
        ((1.0, 4.0), (), 1e6, (2.5, 6.5)),
        ((1.0, 4.0), (1.0, 4.0), 1e6, (2.5, 6.5)),
    ],
)
def test_the_best_joint_action_prefers_the_urgent_task(
    band: tuple[float, ...], cpu: tuple[float, ...], rate: float, deadline_s: tuple[float, float]
) -> None:
    """By brute force; equal weights cannot do it, and what the environment says of joint actions shows why."""
    scenario = plant(
        band,
        cpu,
        radio=FIXED.replace("1e6", f"{rate}"),
        speeds=(1.0,),
        device_speed=0.01,
        latency_from="decided",
        reward="miss = 1.0\nlatency = 0.0",
    )
    environment, state = urgent_and_patient(scenario, deadline_s)
    levels = environment.plant.switches.levels
    project, difference = (eqx.filter_jit(each) for each in (environment.project, environment.difference))

    def joint(urgent: int, patient: int) -> jax.Array:
        level = jnp.zeros(environment.requests, jnp.int32).at[URGENT].set(urgent).at[PATIENT].set(patient)
        return 1 + 2 * level

    cost = {pair: float(project(state, joint(*pair)).cost.sum()) for pair in itertools.product(range(levels), repeat=2)}
    best = min(cost, key=lambda pair: cost[pair])
    assert cost[best] == 0.0
    assert all(cost[level, level] == 1.0 for level in range(levels)), "equal weights miss the urgent deadline"
    heaviest = levels - 1
    assert cost[heaviest, 0] == 0.0
    # As heavy as the urgent one, the patient one makes it miss, and is charged for that; light, it is not.
    charged = np.asarray(difference(state, joint(heaviest, heaviest)))
    spared = np.asarray(difference(state, joint(heaviest, 0)))
    np.testing.assert_allclose(charged[:2], [-1.0, -1.0], atol=1e-6)
    np.testing.assert_allclose(spared[:2], [0.0, 0.0], atol=1e-6)


class Fixed(StatelessPolicy):
    """The only server, always at one level."""

    level: int = eqx.field(static=True)

    def choose(self, observation: Any, key: jax.Array) -> jax.Array:
        """Place 1."""
        del key
        return jnp.full(observation.present.shape, 1 + 2 * self.level, jnp.int32)


class ByDeadline(StatelessPolicy):
    """The heaviest weight for those whose deadline is near, the least for the others."""

    level: int = eqx.field(static=True)
    near_s: float

    def choose(self, observation: Any, key: jax.Array) -> jax.Array:
        """Place 1."""
        del key
        near = observation.task[..., 2] < self.near_s
        return jnp.where(near, 1 + 2 * self.level, 1).astype(jnp.int32)


@pytest.mark.slow
def test_a_learner_finds_out_whom_to_prefer() -> None:
    """Alike tasks with deadlines of their own on one server: every fixed weight is the same, AMARL is better, and near
    the best rule that prefers who must be done soon."""
    scenario = plant(
        cpu=(1.0, 16.0),
        radio=FIXED.replace("1e6", "1e9"),
        devices=4,
        speeds=(4.0,),
        device_speed=0.001,
        slot_s=1.0,
        latency_from="decided",
        deadline_s=(0.4, 2.0),
        arrivals='kind = "bernoulli"\nprobability = 0.5',
        max_per_slot=None,
        reward="miss = 1.0\nlatency = 0.0",
    )
    environment = Environment.from_scenario(scenario)
    traffic = Episodes(count=8, slots=400, warmup_slots=20, first_seed=900)

    def missed(policy: Any) -> np.ndarray:
        measured = run_episodes(environment, policy, traffic, jax.random.key(0))
        return measured.per_episode(lambda records: 1.0 - records.in_time.mean())

    def validate(policy: Any) -> tuple[float, float]:
        share = float(missed(policy).mean())
        return share, 1.0 - share

    task = make_task(environment, scenario)
    learner = Amarl(updates=60, environments=64)
    learned = train(task, learner, Training(updates=60, validate_every=20), validate).policy
    alike = [missed(Fixed(level)) for level in range(2)]
    np.testing.assert_allclose(alike[0], alike[1], atol=0.01)
    rule = min(float(missed(ByDeadline(1, near_s)).mean()) for near_s in (0.6, 0.8, 1.0, 1.2, 1.5))
    found = missed(learned)
    gain = alike[0] - found
    assert gain.mean() > 4 * gain.std(ddof=1) / math.sqrt(len(gain))
    assert rule < alike[0].mean()
    assert gain.mean() > 0.7 * (alike[0].mean() - rule)


def test_a_rule_and_an_actor_run_with_weights_and_survive_export(tmp_path) -> None:
    scenario = plant(BAND, CPU)
    environment, state = opened(scenario)
    seen = seen_by(environment, state)
    scale = scale_of(scenario)
    assert (scale.levels, scale.other_costs, scale.share_weights) == (6, True, ("band_weight", "cpu_weight"))
    actor = Actor(scale, jax.random.key(0))
    logits = np.asarray(actor(seen))
    present, mask = np.asarray(seen.present), np.asarray(seen.mask)
    assert np.isfinite(logits[mask]).all()
    cost = np.asarray(expected_cost_s(seen)) / scale.time_s
    for row in np.flatnonzero(present):
        assert np.corrcoef(logits[row][mask[row]], -cost[row][mask[row]])[0, 1] > 0.99
    # On an empty plant all weights promise the same; the network must be able to tell them apart all the same.
    apart = np.asarray(actor(seen))[np.flatnonzero(present)[0], 1::4]
    assert len(np.unique(apart)) == 6
    survives_export(actor, seen, tmp_path / "policy")
