"""Steps and transmit power as part of the action: what they cost, what they give, who chooses well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compiled
from exported_actors import survives_export
from gmel.learning.networks import Actor
from gmel.physics.quality import logarithmic_quality, piecewise_quality, power_law_quality
from gmel.policies.central import Coordinated, EarliestFinish, SlotOptimum
from gmel.policies.rules import Greedy, expected_cost_s
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario, parse_scenario, to_toml
from gmel.scenario.schema import Scenario
from gmel.scenario.trace import write_trace
from gmel.simulator.adapters.gymnasium import GmelCentralEnv
from gmel.simulator.adapters.pettingzoo import GmelParallelEnv
from gmel.simulator.build import build_environments
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.records import task_records
from gmel.simulator.scale import scale_of
from gmel.simulator.state import OPTION_FEATURES, State, option, other_cost_s
from small_plants import EVERY_RULE, opened, plant_text, rule_keeps_to_the_mask

QUALITY = 'quality = { law = "piecewise", first_steps = 5.0, last_steps = 45.0, first = 0.1, last = 0.9 }'
STEPS = (10.0, 20.0, 40.0)
POWERS = (13.0, 23.0)
OWN_BAND = 'model = "uniform-snr"\nrate = "shannon"\nfading = "none"\nfloor = "clip"\nsharing = "none"'


def with_quality(text: str) -> str:
    """The same quality for every model of the catalogue."""
    return text.replace("\nstep_work", f"\n{QUALITY}\nstep_work")


def plant(
    steps: tuple[float, ...] = STEPS, powers: tuple[float, ...] = (), reward: str = "quality = 2.0", **more: object
) -> Scenario:
    text = plant_text(
        catalogue=True,
        tasks=f"step_options = {list(steps)}" if steps else "",
        reward=reward,
        **more,  # type: ignore[arg-type]
    )
    text = with_quality(text)
    if powers:
        text = text.replace("[devices]", f"[devices]\npower_options_dbm = {list(powers)}")
    return parse_scenario(text, "levels")


def ran(scenario: Scenario, level: int, slots: int = 40, asking: int | None = None):
    """Everything to server 1 at one level; requests come in the first `asking` slots (None: in all)."""
    environment, state = opened(scenario)

    def slot(state: State, _: None):
        if asking is not None:
            present = state.requests.present & (state.slot < asking)
            state = state._replace(requests=state.requests._replace(present=present))
        action = jnp.full(environment.requests, 1 + level * (1 + environment.servers))
        after, reward, outcome = environment.step(state, action)
        return after, (outcome, state.requests, reward)

    outcome, requests, reward = jax.jit(lambda s: jax.lax.scan(slot, s, length=slots)[1])(state)
    return environment, task_records(outcome, scenario.slot.length_s), requests, reward


@pytest.mark.parametrize("level", range(3))
def test_the_chosen_steps_give_the_work_and_the_quality(level: int) -> None:
    scenario = plant(max_uploads=96)
    _, records, requests, _ = ran(scenario, level)
    present = np.asarray(requests.present)
    models = scenario.models
    step = np.array([model.step_work.mean for model in models])
    fixed = np.array([model.fixed_work for model in models])
    # Images are what is left of the drawn work.
    drawn, steps = np.asarray(requests.work)[present], np.asarray(requests.steps)[present]
    model = np.asarray(requests.model)[present]
    images = drawn / (fixed[model] + steps * step[model])
    work = images * (fixed[model] + STEPS[level] * step[model])
    # By the end all that was decided early is known.
    records = records.where(records.decided_slot < 20)
    known = len(records)
    assert known > 30
    noise = np.asarray(requests.noise)[present]
    np.testing.assert_allclose(records.service_s, (work * noise / scenario.servers[0].speed)[:known], rtol=1e-5)
    expected = 0.1 + 0.8 * (STEPS[level] - 5) / 40
    np.testing.assert_allclose(records.quality, expected, rtol=1e-5)


def test_power_buys_rate_and_costs_energy() -> None:
    scenario = plant(steps=(), powers=POWERS, reward="energy = 1.0", max_uploads=96, radio=OWN_BAND)
    _, low, _, _ = ran(scenario, 0, slots=200)
    _, high, _, _ = ran(scenario, 1, slots=200)
    early = low.decided_slot < 20
    known = int(early.sum())
    assert known > 30
    assert (high.decided_slot[:known] < 20).all()
    assert (high.upload_s[:known] < low.upload_s[:known]).all()
    nominal = parse_scenario(to_toml(scenario).replace("power_options_dbm = [13.0, 23.0]\n", ""), "nominal")
    _, plain, _, _ = ran(nominal, 0, slots=200)
    np.testing.assert_allclose(plain.upload_s, high.upload_s, rtol=1e-5)
    np.testing.assert_allclose(plain.energy_j, high.energy_j, rtol=1e-4)
    sent_w = 10 ** (0.1 * np.array(POWERS) - 3)
    # What is left without the radio and the idling is the server's, the same for both.
    parts: list[np.ndarray] = []
    for records, watts in ((low, sent_w[0]), (high, sent_w[1])):
        idle_s = records.latency_s - records.wait_to_slot_s - records.upload_s
        parts.append((records.energy_j - watts * records.upload_s - 0.1 * idle_s)[:known])
    np.testing.assert_allclose(parts[0], parts[1], rtol=1e-4)


def test_an_option_says_what_its_action_does() -> None:
    """On an empty plant the observed latency and cost of every option are those that the environment projects."""
    scenario = plant(
        powers=POWERS, reward="quality = 2.0\nenergy = 0.1\nprice = 0.5\nlatency_scale_s = 5.0\nclip = 100.0"
    )
    text = to_toml(scenario).replace("price = 0.0\ncell", "price = 0.3\ncell")
    environment, state = opened(parse_scenario(text, "priced"))
    only = state._replace(
        requests=state.requests._replace(
            present=jnp.arange(environment.requests) == 0, noise=jnp.ones(environment.requests)
        )
    )
    seen = compiled.observe(environment, only)
    assert seen.options.shape[1] == environment.options == 4 * 6
    assert seen.options.shape[2] == len(OPTION_FEATURES) + 1
    mask = np.asarray(seen.mask[0])
    place, level = np.arange(24) % 4, np.arange(24) // 4
    assert (mask == ((place > 0) | (level < 3))).all()
    for choice in np.flatnonzero(mask):
        projected = compiled.project(environment, only, jnp.full(environment.requests, choice))
        expected = float(expected_cost_s(seen)[0, choice] - other_cost_s(seen)[0, choice])
        waited = float(-only.requests.generated_s[0])
        assert float(projected.latency_s[0]) == pytest.approx(expected + waited, rel=1e-4)
        cost_s = float(projected.cost[0]) * 5.0
        assert cost_s == pytest.approx(float(expected_cost_s(seen)[0, choice]) + waited, rel=1e-4, abs=1e-4)
    assert np.asarray(option(seen, "local"))[0, ::4].all()


@pytest.mark.slow
def test_rules_weigh_quality_against_time() -> None:
    """With no weight on quality the fewest steps win; with a great one the most."""
    for weight, level in ((0.0, 0), (1000.0, 2)):
        environment, state = opened(plant(reward=f"quality = {weight}\nenergy = 1e-9"))
        present = np.asarray(state.requests.present)
        for policy in (Greedy(), Coordinated()):
            action = np.asarray(policy.choose(compiled.observe(environment, state), jax.random.key(0)))
            assert (action[present] // 4 == level).all()
        for central in (EarliestFinish(), SlotOptimum()):
            action = np.asarray(central.assign(environment, state, jax.random.key(0)))
            assert (action[present] // 4 == level).all()


@pytest.mark.parametrize("name", EVERY_RULE)
def test_every_rule_runs_with_levels(name: str) -> None:
    environment, state = opened(plant(powers=POWERS))
    rule_keeps_to_the_mask(name, environment, state)


def test_the_sum_of_the_rewards_is_minus_the_costs() -> None:
    """With quality and price in the reward, as without them."""
    scenario = plant(reward="quality = 2.0\nmiss = 1.0\nlatency_scale_s = 5.0\nclip = 100.0", max_uploads=96)
    # Nothing is in flight at the end.
    _, records, requests, reward = ran(scenario, 1, slots=160, asking=100)
    assert len(records) == np.asarray(requests.present).sum() > 200
    late = records.latency_s > records.deadline_s
    cost = records.latency_s / 5.0 + late - 2.0 * records.quality
    total = float(np.asarray(reward.team, np.float64).sum())
    assert -total == pytest.approx(cost.sum(), rel=1e-5)


def test_too_little_quality_is_a_miss() -> None:
    text = to_toml(plant(reward="miss = 1.0\nlatency = 0.0", max_uploads=96, deadline_s=(1e4, 1e4)))
    scenario = parse_scenario(text.replace("least_quality = 0.0", "least_quality = 0.5"), "least")
    for level, missed in ((0, 1.0), (2, 0.0)):
        _, _, requests, reward = ran(scenario, level)
        count = np.asarray(requests.present).sum()
        assert -float(np.asarray(reward.team).sum()) == pytest.approx(missed * count, abs=1e-3)


def test_an_actor_starts_at_the_expected_cost_and_survives_export(tmp_path) -> None:
    scenario = plant(powers=POWERS)
    environment, state = opened(scenario)
    seen = compiled.observe(environment, state)
    scale = scale_of(scenario)
    assert (scale.levels, scale.other_costs) == (6, True)
    actor = Actor(scale, jax.random.key(0))
    logits = np.asarray(actor(seen))
    present, mask = np.asarray(seen.present), np.asarray(seen.mask)
    assert np.isfinite(logits[mask]).all()
    cost = np.asarray(expected_cost_s(seen)) / scale.time_s
    for row in np.flatnonzero(present):
        # The untrained network adds almost nothing.
        assert np.corrcoef(logits[row][mask[row]], -cost[row][mask[row]])[0, 1] > 0.99
    exported = survives_export(actor, seen, tmp_path / "policy")
    with pytest.raises(InputError, match="options: shape"):
        exported.logits(np.asarray(seen.task), np.asarray(seen.options)[..., :-1], mask)


def test_the_laws_of_quality() -> None:
    steps = jnp.array([4.0, 5.0, 20.0, 30.0, 31.0, 100.0])
    eat = logarithmic_quality(steps, 5.0, 30.0, 0.16, 6.0, -0.02, 0.27)
    np.testing.assert_allclose(eat, [0, 0.1237, 0.2475, 0.2837, 0.27, 0.27], atol=1e-4)
    agod = piecewise_quality(jnp.array([80.0, 90.0, 125.0, 160.0, 250.0]), 90.0, 160.0, 0.0, 0.7)
    np.testing.assert_allclose(agod, [0, 0, 0.35, 0.7, 0.7], atol=1e-6)
    power = power_law_quality(jnp.array([1.0, 4.0, 100.0]), 2.0, 0.9, 0.8, 0.5)
    np.testing.assert_allclose(power, [0, 0.5, 0.82], atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("quality = 2.0", "quality = 2.0", None),
        (QUALITY, "", "needs? models.quality"),
        ("last_steps = 45.0", "last_steps = 4.0", "must exceed first_steps"),
        ("step_work = 0.025", "fixed_work = 1.0", "needs models.step_work"),
    ],
)
def test_impossible_levels_are_named(old: str, new: str, part: str | None) -> None:
    text = plant_text(catalogue=True, tasks="step_options = [10.0]", reward="quality = 2.0")
    text = with_quality(text)
    if part is None:
        parse_scenario(text.replace(old, new), "fine")
        return
    with pytest.raises(InputError, match=part) as refused:
        parse_scenario(text.replace(old, new), "wrong")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_steps_can_be_chosen_for_the_requests_of_a_trace() -> None:
    text = to_toml(load_scenario("factory")).replace("[tasks]\n", "[tasks]\nstep_options = [10.0, 20.0]\n")
    environment = build_environments(parse_scenario(text, "steps")).test
    state = environment.reset(seeds(1, 1)[0], 40)
    row = int(np.argmax(np.asarray(state.requests.present)))
    levels = [compiled.project(environment, state, jnp.full(environment.requests, 1 + 6 * level)) for level in range(2)]
    assert float(levels[1].latency_s[row]) > float(levels[0].latency_s[row])


def test_a_trace_with_work_of_its_own_leaves_no_steps_to_choose(tmp_path) -> None:
    path = tmp_path / "own.csv"
    write_trace({"time_s": np.arange(300.0), "work": np.full(300, 7.0)}, path)
    text = to_toml(load_scenario("factory")).replace("[tasks]\n", "[tasks]\nstep_options = [10.0, 20.0]\n")
    with pytest.raises(InputError, match="has work of its own"):
        build_environments(parse_scenario(text, "steps"), str(path))


def test_a_miss_by_quality_is_what_options_cost_too() -> None:
    """Where a quality must be reached, an option that misses it costs more, though nothing else counts."""
    text = plant_text(catalogue=True, tasks="least_quality = 0.6", reward="miss = 1.0")
    assert parse_scenario(with_quality(text), "least").counts_more_than_latency
    assert not parse_scenario(with_quality(text.replace("least_quality = 0.6", "")), "none").counts_more_than_latency


def test_capacity_in_steps_is_that_of_the_steps_chosen() -> None:
    text = with_quality(to_toml(load_scenario("agod")))
    drawn = parse_scenario(text, "agod")
    fewer = drawn.model_copy(update={"tasks": drawn.tasks.model_copy(update={"step_options": [50.0, 100.0]})})
    mean = sum(drawn.models[0].steps.values) / len(drawn.models[0].steps.values)
    assert fewer.capacity == pytest.approx(drawn.capacity * mean / 75.0)


def test_the_search_for_rules_has_a_scale_on_every_preset() -> None:
    """Also where work is by the bit or by the square of the steps: the mean work on the mean server."""
    for name in ("amcoedge", "agod", "hall-20x5"):
        scenario = load_scenario(name)
        speeds = [server.speed for server in scenario.servers]
        found = float(Environment.from_scenario(scenario).plant.mean_service_s)
        assert found == pytest.approx(scenario.mean_work / (sum(speeds) / len(speeds)), rel=1e-6)
        assert found > 0


def test_pictures_of_agents_show_places_in_whatever_manner() -> None:
    """Every level of a place counts for it."""
    scenario = plant()
    parallel = GmelParallelEnv(scenario, slots=4, render_mode="ansi")
    parallel.reset(seed=1)
    places = 1 + len(scenario.servers)
    parallel.step({agent: 2 + places * (n % len(STEPS)) for n, agent in enumerate(parallel.agents)})
    lines = str(parallel.render()).splitlines()
    sent = {line.split()[0]: int(line.split()[2]) for line in lines[1:]}
    assert len(sent) == places
    assert sum(sent.values()) == sent["S1"] > 0


@pytest.mark.slow
def test_a_scheduler_sees_the_work_of_the_manner_chosen() -> None:
    """At every level of a place the seconds that were sent there are those of the options that were taken."""
    scenario = plant()
    made = GmelCentralEnv(scenario, slots=20, decide="request")
    columns, places = made.columns, 1 + len(scenario.servers)
    seen, _ = made.reset(seed=3)
    while seen[columns.index("waiting")] < 2:
        seen, *_ = made.step(0)
    few = 1
    took = seen[columns.index(f"option {few} service_s")]
    seen, *_ = made.step(few)
    sent = [seen[columns.index(f"option {few + places * level} sent_s")] for level in range(len(STEPS))]
    assert sent[0] == sent[1] == sent[2] > 0
    # Both are compressed by the same logarithm, and there is one GPU.
    assert sent[0] == pytest.approx(took, rel=1e-5)
