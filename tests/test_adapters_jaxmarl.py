"""The adapter in the style of JaxMARL, and learners that learn through the adapters."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmel.physics.random import seed_words
from gmel.simulator.adapters.gymnasium import GmelCentralEnv
from gmel.simulator.adapters.jaxmarl import GmelMultiAgentEnv
from gmel.simulator.state import State
from small_plants import small_plant
from test_adapters import OPTIONS, PLANT, SEED, SLOTS, agents_env, random_actions, reset, same

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond requests_per_device")

# ---- JaxMARL


@pytest.fixture(scope="module")
def marl() -> GmelMultiAgentEnv:
    return GmelMultiAgentEnv(PLANT, slots=SLOTS)


def test_jaxmarl_style_does_what_pettingzoo_does(marl: GmelMultiAgentEnv) -> None:
    parallel = agents_env()
    seen, _ = parallel.reset(seed=SEED)
    state = reset(marl.site.environment, jnp.asarray(seed_words(SEED)))
    key = jax.random.key(0)
    observation = marl.get_obs(state)
    for actions in random_actions(parallel, 3)[:-1]:
        available = marl.get_avail_actions(state)
        for agent in marl.agents:
            np.testing.assert_allclose(observation[agent], seen[agent]["observation"], atol=1e-5)
            np.testing.assert_array_equal(available[agent], seen[agent]["action_mask"].astype(bool))
        np.testing.assert_allclose(marl.world_state(state), parallel.state(), atol=1e-5)
        arrays = {agent: jnp.asarray(action) for agent, action in actions.items()}
        observation, state, rewards, dones, infos = marl.step(key, state, arrays)
        seen, expected, _, _, told = parallel.step(actions)
        assert same(list(rewards.values()), list(expected.values()))
        assert not any(bool(done) for done in dones.values())
        for number, agent in enumerate(marl.agents):
            assert int(infos["tasks"][number]) == len(told[agent]["latency_s"])
            assert float(infos["total_latency_s"][number]) == pytest.approx(sum(told[agent]["latency_s"]), abs=1e-4)
            assert int(infos["in_time"][number]) == sum(told[agent]["in_time"])
            for name in ("beyond", "replaced"):
                assert int(infos[name][number]) == told[agent][name]


def test_jaxmarl_style_resets_itself(marl: GmelMultiAgentEnv) -> None:
    """In one compiled scan over many environments; the next episode is another one."""
    count = 8

    @jax.jit
    def run(key: jax.Array) -> Any:
        keys = jax.random.split(key, count)
        _, states = jax.vmap(marl.reset)(keys)

        def slot(states: State, key: jax.Array) -> Any:
            keys = jax.random.split(key, count)
            actions = {agent: jnp.ones(count, jnp.int32) for agent in marl.agents}
            obs, states, _, dones, _ = jax.vmap(marl.step)(keys, states, actions)
            expected = jax.vmap(marl.get_obs)(states)
            agree = jnp.all(jnp.array([jnp.allclose(obs[agent], expected[agent]) for agent in marl.agents]))
            return states, (dones["__all__"], states.slot, states.seed, agree)

        return jax.lax.scan(slot, states, jax.random.split(key, 2 * SLOTS + 1))

    _, (over, slots, seeds, agree) = jax.device_get(run(jax.random.key(1)))
    assert agree.all(), "observations returned are those of the state returned"
    np.testing.assert_array_equal(over.sum(axis=0), 2)
    np.testing.assert_array_equal(slots[:, 0], [*range(1, SLOTS), 0, *range(1, SLOTS), 0, 1])
    started = seeds[[0, SLOTS, 2 * SLOTS]].reshape(-1, 2)
    assert len(np.unique(started, axis=0)) == 3 * count


def test_jaxmarl_reset_state_and_spaces(marl: GmelMultiAgentEnv) -> None:
    _, start = marl.reset(jax.random.key(0))
    _, late = marl.reset(jax.random.PRNGKey(1))
    late = late._replace(slot=jnp.asarray(SLOTS - 1, jnp.int32))
    actions = {agent: marl.action_space(agent).sample(jax.random.key(0)) for agent in marl.agents}
    _, state, _, dones, _ = marl.step(jax.random.key(2), late, actions, start)
    assert bool(dones["__all__"])
    assert same(state, start)
    assert marl.action_space("device_0").n == OPTIONS
    assert bool(marl.action_space("device_0").contains(3))
    assert not bool(marl.action_space("device_0").contains(4))
    box = marl.observation_space("device_0")
    assert box.shape == (7 + 4 * 10,)
    assert bool(box.contains(box.sample(jax.random.key(0))))
    two = GmelMultiAgentEnv(PLANT, slots=SLOTS, requests_per_device=2)
    assert two.action_space("device_0").shape == (2,)
    obs, state = two.reset(jax.random.key(0))
    assert obs["device_0"].shape == two.observation_space("device_0").shape
    assert two.get_avail_actions(state)["device_0"].shape == (2, OPTIONS)


# ---- learning through the adapters


def shared_network(key: jax.Array, inputs: int, width: int = 32) -> dict[str, jax.Array]:
    """Weights of one multilayer perceptron that all devices share, with a head for the value."""
    keys = jax.random.split(key, 4)
    orthogonal = jax.nn.initializers.orthogonal(1.4)
    return {
        "in": orthogonal(keys[0], (inputs, width)),
        "mid": orthogonal(keys[1], (width, width)),
        "logits": jax.nn.initializers.orthogonal(0.01)(keys[2], (width, OPTIONS)),
        "value": orthogonal(keys[3], (width, 1)),
    }


def forward(weights: dict[str, jax.Array], x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(jnp.tanh(x @ weights["in"]) @ weights["mid"])
    return jnp.where(mask, hidden @ weights["logits"], -1e9), (hidden @ weights["value"])[..., 0]


def ippo(marl: GmelMultiAgentEnv, updates: int, count: int = 32, steps: int = 16) -> np.ndarray:
    """Independent PPO with shared weights in the manner of PureJaxRL: team reward per update and environment slot."""
    optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))
    weights = shared_network(jax.random.key(0), marl.observation_space(marl.agents[0]).shape[0])

    def stacked(tree: dict[str, jax.Array]) -> jax.Array:
        return jnp.stack([tree[agent] for agent in marl.agents], axis=1)

    def collect(carry: Any, key: jax.Array) -> Any:
        weights, states, obs = carry
        mask = stacked(jax.vmap(marl.get_avail_actions)(states))
        logits, value = forward(weights, obs, mask)
        action = jax.random.categorical(key, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], -1)[..., 0]
        keys = jax.random.split(key, count)
        new, states, rewards, _, _ = jax.vmap(marl.step)(
            keys, states, {agent: action[:, i] for i, agent in enumerate(marl.agents)}
        )
        return (weights, states, stacked(new)), (obs, mask, action, log_prob, value, stacked(rewards))

    def loss(weights: Any, batch: Any) -> jax.Array:
        obs, mask, action, old, value, target = batch
        logits, now = forward(weights, obs, mask)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], -1)[..., 0]
        gain = target - value
        gain = (gain - gain.mean()) / (gain.std() + 1e-6)
        ratio = jnp.exp(log_prob - old)
        policy = -jnp.minimum(ratio * gain, jnp.clip(ratio, 0.8, 1.2) * gain).mean()
        entropy = -jnp.sum(jnp.where(mask, jax.nn.softmax(logits) * jax.nn.log_softmax(logits), 0.0), -1).mean()
        return policy + 0.5 * ((now - target) ** 2).mean() - 0.01 * entropy

    def update(carry: Any, key: jax.Array) -> Any:
        weights, moments, states, obs = carry
        keys = jax.random.split(key, steps)
        (_, states, obs), batch = jax.lax.scan(collect, (weights, states, obs), keys)
        # Decisions cost at once what they are projected to cost: the reward itself is the target of the value.

        def epoch(carry: Any, _: None) -> Any:
            weights, moments = carry
            step, moments = optimiser.update(jax.grad(loss)(weights, batch), moments)
            return (optax.apply_updates(weights, step), moments), None

        (weights, moments), _ = jax.lax.scan(epoch, (weights, moments), length=4)
        return (weights, moments, states, obs), batch[5].sum(axis=-1).mean()

    @jax.jit
    def train(key: jax.Array) -> jax.Array:
        obs, states = jax.vmap(marl.reset)(jax.random.split(key, count))
        start = (weights, optimiser.init(weights), states, stacked(obs))
        return jax.lax.scan(update, start, jax.random.split(key, updates))[1]

    return np.asarray(train(jax.random.key(7)))


@pytest.mark.slow
def test_independent_ppo_learns_in_one_compiled_program() -> None:
    """The first update acts at random (the logits start at zero)."""
    curve = ippo(GmelMultiAgentEnv(small_plant(devices=4), slots=50, reward="own"), updates=120)
    assert curve[:3].mean() < 0
    assert curve[-10:].mean() > 0.75 * curve[:3].mean(), "costs a quarter less than at random"


def mean_latency_s(rule: Callable[[np.ndarray], int]) -> float:
    """Mean over the tasks of an episode that nobody trained on; `rule` gets the observation."""
    judged = GmelCentralEnv("hall-20x5", slots=200)
    seen, _ = judged.reset(seed=1000)
    latency_s, tasks, over = 0.0, 0, False
    while not over:
        seen, _, _, over, info = judged.step(rule(seen))
        latency_s += info["total_latency_s"]
        tasks += info["tasks"]
    return latency_s / tasks


@pytest.mark.slow
def test_stable_baselines3_learns_through_gymnasium(capsys: pytest.CaptureFixture[str]) -> None:
    stable_baselines3 = pytest.importorskip(
        "stable_baselines3", reason="a third-party learner, not installed: pip install torch stable-baselines3"
    )
    pytest.importorskip("torch").set_num_threads(1)
    made = GmelCentralEnv("hall-20x5", slots=200)
    expected = [made.columns.index(f"option {choice} expected_s") for choice in range(6)]
    generator = np.random.default_rng(0)
    at_random = mean_latency_s(lambda seen: generator.integers(6))
    greedy = mean_latency_s(lambda seen: int(np.argmin(seen[expected])))
    model = stable_baselines3.PPO("MlpPolicy", made, n_steps=1024, batch_size=128, gamma=0.9, device="cpu", seed=0)
    began = time.process_time()
    model.learn(12_288)
    used_s = time.process_time() - began
    trained = mean_latency_s(lambda seen: int(model.predict(seen, deterministic=True)[0]))
    with capsys.disabled():
        print(f"\nmean latency: random {at_random:.3f} s, earliest without in-slot choices {greedy:.3f} s, PPO")
        print(f"{trained:.3f} s after 12,288 decisions in {used_s:.0f} s of processor time")
    assert trained < 0.6 * at_random
