"""Tasks that are split over servers: what becomes of the parts, and what devices are told."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compiled
from gmel.evaluation.render.scene import film
from gmel.evaluation.simulate import Simulation
from gmel.policies.central import Coordinated, EarliestFinish
from gmel.policies.rules import Greedy, expected_cost_s, expected_latency_s
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.observation import split_of
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import State, option
from small_plants import EVERY_RULE, WIRED, opened, plant_text, rule_keeps_to_the_mask
from test_equal_finish import Server, shares_by_bisection

SHARED_BAND = """
model = "uniform-snr"
snr_db = [5.0, 25.0]
rate = "shannon"
fading = "none"
floor = "clip"
sharing = "equal"
download = true
"""
FAST = SHARED_BAND.replace('"equal"', '"none"')


def plant(
    splits: tuple[int, ...] = (1, 2, 3), radio: str = SHARED_BAND, tasks: str = "bits_out = 5e5", **more: Any
) -> Scenario:
    chosen = f"split_options = {list(splits)}\n" if splits else ""
    choices: dict[str, Any] = {"max_uploads": 48, **more}
    return parse_scenario(plant_text(radio=radio, tasks=chosen + tasks, **choices), "split")


project = eqx.filter_jit(Environment.project)


def ran(scenario: Scenario, slots: int, policy: str | int = "uniform", seed: int = 1) -> tuple[Any, Any, Any, Any]:
    """Actions, states at the slot starts, rewards and outcomes of a run; a number is one option for all."""
    environment, state = opened(scenario, seed)

    def slot(state: State, key: jax.Array) -> tuple[State, Any]:
        mask = environment.observe(state).mask
        if isinstance(policy, int):
            action = jnp.full(environment.requests, policy)
        else:
            action = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
        after, reward, outcome = environment.step(state, action)
        return after, (action, state, reward, outcome)

    run = jax.jit(lambda state, keys: jax.lax.scan(slot, state, keys)[1])
    return run(state, jax.random.split(jax.random.key(seed), slots))


@dataclasses.dataclass
class Part:
    """A part in the plain replay, in absolute seconds."""

    task: int
    server: int
    sent_from_s: float
    ready_s: float
    service_s: float
    download_s: float
    start_s: float = 0.0

    @property
    def end_s(self) -> float:
        """End of its service."""
        return self.start_s + self.service_s


def replayed(scenario: Scenario, actions: Any, states: Any) -> tuple[dict[tuple[int, int], list[Part]], list[float]]:
    """The parts of every task (by slot and row) by the rules alone, event by event; and the size of each part.

    Uses of the run: requests, links and actions. Radio: `uniform-snr`, no fading, N_j = parts of the slot to a cell and
    those in flight.
    """
    slot_s, band = scenario.slot.length_s, scenario.radio.bandwidth_hz
    equal, age = scenario.radio.sharing == "equal", scenario.slot.broadcast_age_slots
    speeds, gpus = [s.speed for s in scenario.servers], [s.gpus for s in scenario.servers]
    splits, servers = scenario.tasks.split_options or [1], range(len(scenario.servers))
    snr = np.asarray(states.links.uplink_snr, float)[0]
    requests = jax.tree.map(lambda field: np.asarray(field, float), states.requests)
    known: list[Part] = []
    tasks: dict[tuple[int, int], list[Part]] = {}

    def send_s(device: int, server: int, bits: float, users: float) -> float:
        return bits * users / (band * np.log2(1 + snr[device, server] * users))

    def serve() -> None:
        """Starts of all parts, first in, first out on the GPU that is free first."""
        free = [[0.0] * count for count in gpus]
        for part in sorted(known, key=lambda p: p.ready_s):
            first = int(np.argmin(free[part.server]))
            part.start_s = max(part.ready_s, free[part.server][first])
            free[part.server][first] = part.end_s

    def waits_s(at_s: float) -> list[float]:
        """Time until a GPU is free, as a server says at a slot start: by what has reached its queue."""
        free = [[0.0] * count for count in gpus]
        for part in sorted(known, key=lambda p: p.ready_s):
            if part.ready_s < at_s:
                first = int(np.argmin(free[part.server]))
                free[part.server][first] = max(part.ready_s, free[part.server][first]) + part.service_s
        return [max(min(each) - at_s, 0.0) for each in free]

    for slot in range(actions.shape[0]):
        now_s, heard_s = slot * slot_s, max(slot - age, 0) * slot_s
        before = [part for part in known if part.task < slot]
        in_flight = [sum(p.server == j and p.ready_s >= now_s for p in before) for j in servers]
        # What was in flight when the broadcast was sent, and the queues then.
        sent_then = [p for p in before if p.task * slot_s < heard_s]
        users = [1 + sum(p.server == j and p.ready_s >= heard_s for p in sent_then) if equal else 1 for j in servers]
        heard = waits_s(heard_s) if slot else [0.0] * len(speeds)
        chosen: list[tuple[int, int, int, float]] = []
        for row in range(actions.shape[1]):
            if not requests.present[slot, row] or actions[slot, row] % (1 + len(speeds)) == 0:
                continue
            place, level = int(actions[slot, row]) % (1 + len(speeds)), int(actions[slot, row]) // (1 + len(speeds))
            device, bits = int(requests.device[slot, row]), requests.size_bit[slot, row]
            back = requests.bits_out[slot, row]
            each = [
                Server(
                    0.0,
                    send_s(device, j, bits, users[j]),
                    heard[j],
                    requests.work[slot, row] / speeds[j] + send_s(device, j, back, 1),
                    0.0,
                )
                for j in servers
            ]
            whole_s = [max(s.send_s, s.wait_s) + s.serve_s for s in each]
            others = sorted((j for j in servers if j != place - 1), key=lambda j: whole_s[j])
            members = [place - 1, *others[: splits[level] - 1]]
            shares, _ = shares_by_bisection([each[j] for j in members])
            chosen += [(row, j, device, x / sum(shares)) for j, x in zip(members, shares, strict=True) if x > 1e-7]
        now = [in_flight[j] + sum(part[1] == j for part in chosen) if equal else 1 for j in servers]
        for row, j, device, share in chosen:
            bits, work = share * requests.size_bit[slot, row], share * requests.work[slot, row]
            ready_s = now_s + send_s(device, j, bits, now[j])
            part = Part(
                slot, j, now_s, ready_s, work / speeds[j], send_s(device, j, share * requests.bits_out[slot, row], 1)
            )
            known.append(part)
            tasks.setdefault((slot, row), []).append(part)
    serve()
    return tasks, [part.service_s * speeds[part.server] for part in known]


class TestReplay:
    @pytest.mark.parametrize(("gpus", "age"), [((1, 1, 1), 1), ((1, 2, 1), 0)])
    def test_parts_end_where_a_plain_replay_says(self, gpus: tuple[int, ...], age: int) -> None:
        """Slow links: parts are in flight over several slots, and later ones overtake them."""
        scenario = plant(gpus=gpus, age=age, bandwidth_hz=1e6, arrivals="load = 0.5", slot_s=0.5)
        with jax.enable_x64(True):
            actions, states, _, outcome = ran(scenario, 60)
        assert int(states.lost[-1]) == 0
        records = task_records(outcome, scenario.slot.length_s)
        tasks, work = replayed(scenario, np.asarray(actions), states)
        present = np.asarray(states.requests.present)
        rows = np.asarray(outcome.row)[np.asarray(outcome.final)]
        slots = np.asarray(outcome.decided_slot)[np.asarray(outcome.final)]
        order = np.lexsort((rows, slots))
        split = 0
        over_slots = 0
        for number, (slot, row) in enumerate(zip(slots[order], rows[order], strict=True)):
            if records.option[number] == 0:
                assert records.parts is not None
                assert records.parts[number] == 1
                continue
            parts = tasks[int(slot), int(row)]
            last = max(parts, key=lambda part: part.end_s + part.download_s)
            split += len(parts) > 1
            over_slots += any(part.ready_s > (slot + 1) * scenario.slot.length_s for part in parts)
            assert records.parts is not None
            assert records.parts[number] == len(parts)
            finish_s = last.end_s + last.download_s
            latency_s = finish_s - records.generated_s[number]
            assert records.latency_s[number] == pytest.approx(latency_s, rel=1e-6)
            assert records.end_s[number] + records.download_s[number] == pytest.approx(finish_s, rel=1e-6)
            energy_j = 0.1 * (finish_s - last.sent_from_s - max(part.ready_s - part.sent_from_s for part in parts))
            for part in parts:
                energy_j += 10**-0.7 * (part.ready_s - part.sent_from_s) + 5.0 * part.service_s
            assert records.energy_j[number] == pytest.approx(energy_j, rel=1e-6)
        assert split > 20
        assert over_slots > 20
        # Nothing is lost and nothing is done twice.
        sent = present & (np.asarray(actions) % 4 > 0)
        assert sum(work) == pytest.approx(np.asarray(states.requests.work)[sent].sum(), rel=1e-6)

    def test_the_parts_of_the_latency_add_up(self) -> None:
        scenario = plant()
        _, _, _, outcome = ran(scenario, 40)
        records = task_records(outcome, 1.0)
        assert (records.parts > 1).sum() > 20
        taken_s = records.end_s + records.download_s - records.generated_s
        np.testing.assert_allclose(records.latency_s, taken_s, rtol=1e-4, atol=1e-4)
        for name in ("wait_to_slot_s", "upload_s", "queue_s", "service_s", "download_s"):
            assert (getattr(records, name) >= -1e-5).all(), name
        assert "parts" in records.table().column_names

    def test_the_work_in_flight_is_that_of_the_tasks(self) -> None:
        scenario = plant(splits=(3,), bandwidth_hz=3e5)
        _, states, _, _ = ran(scenario, 20, policy=1)
        parts, present = states.uploads.parts, np.asarray(states.uploads.present)
        speed = np.array([2.0, 3.0, 1.0])
        work = np.where(parts.present, parts.service_s * speed[np.asarray(parts.server)], 0.0).sum(axis=-1)[present]
        slots, rows = np.asarray(states.uploads.decided_slot)[present], np.asarray(states.uploads.row)[present]
        assert len(work) > 20
        np.testing.assert_allclose(work, np.asarray(states.requests.work)[slots, rows], rtol=1e-5)


def test_a_task_alone_on_idle_servers_ends_at_the_closed_form() -> None:
    """1 / L = sum over the servers of 1 / (upload + service)."""
    radio = 'model = "fixed"\nrate_bps = 4e6\nsharing = "none"\ndownload = false'
    environment, state = opened(plant(radio=radio, tasks="", latency_from="decided"))
    only = state._replace(requests=state.requests._replace(present=jnp.arange(environment.requests) == 0))
    work, bits = float(only.requests.work[0]), float(only.requests.size_bit[0])
    each_s = [bits / 4e6 + work / speed for speed in (3.0, 2.0, 1.0)]
    for parts in (1, 2, 3):
        action = jnp.full(environment.requests, 2 + 4 * (parts - 1))
        found = float(project(environment, only, action).latency_s[0])
        assert found == pytest.approx(1 / sum(1 / each for each in each_s[:parts]), rel=1e-5)


def test_in_one_part_all_is_as_without_splitting() -> None:
    records: list[Records] = []
    for splits in ((), (1, 2)):
        _, _, _, outcome = ran(plant(splits=splits), 40, policy=2)
        records.append(task_records(outcome, 1.0))
    whole, split = records
    assert whole.parts is None
    assert "parts" not in whole.table().column_names
    assert (split.parts == 1).all()
    assert len(whole) > 50
    for field in dataclasses.fields(whole):
        if field.name not in ("parts", "quality"):
            np.testing.assert_allclose(
                getattr(split, field.name), getattr(whole, field.name), rtol=1e-5, atol=1e-5, err_msg=field.name
            )


class TestWhatDevicesAreTold:
    REWARD = "energy = 0.3\nprice = 0.5\nlatency_scale_s = 5.0\nclip = 100.0"

    @pytest.mark.parametrize(("age", "fresh"), [(0, False), (0, True), (1, True)])
    @pytest.mark.slow
    def test_alone_the_expected_cost_is_what_happens(self, age: int, fresh: bool) -> None:
        """Behind queues, of which a device may have an old view when it splits: who sees them knows what follows."""
        text = plant_text(
            radio=FAST,
            tasks="split_options = [1, 2, 3]\nbits_out = 1e6",
            age=age,
            bandwidth_hz=3e7,
            reward=self.REWARD,
        )
        text = text.replace('name = "S1"', 'name = "S1"\nprice = 0.3')
        environment, state = opened(parse_scenario(text, "told"))
        # Queues as they are, and as they were a slot before.
        wait_s = jnp.array([[0.3, 0.1, 0.25], [0.1, 0.4, 0.0]])
        said_s = state.broadcasts.wait_s.at[:2].set(wait_s)
        state = state._replace(
            servers=state.servers._replace(free_s=wait_s[0][:, None]),
            broadcasts=state.broadcasts._replace(wait_s=said_s),
        )
        only = state._replace(requests=state.requests._replace(present=jnp.arange(environment.requests) == 0))
        seen = compiled.observe(environment, only, fresh=fresh)
        options = np.flatnonzero(np.asarray(seen.mask[0]))
        assert environment.options == seen.mask.shape[1] == 12
        assert set(options // 4) == {0, 1, 2}
        every = jax.jit(jax.vmap(lambda action: environment.project(only, action)))
        found = every(jnp.asarray(options)[:, None] * jnp.ones(environment.requests, int))
        waited_s = -float(only.requests.generated_s[0])
        np.testing.assert_allclose(
            found.latency_s[:, 0], np.asarray(expected_latency_s(seen))[0, options] + waited_s, rtol=1e-4
        )
        np.testing.assert_allclose(
            found.cost[:, 0] * 5.0, np.asarray(expected_cost_s(seen))[0, options] + waited_s, rtol=1e-4
        )

    @pytest.mark.parametrize("splits", [(1, 2, 3), (3,), (1, 3)])
    def test_no_two_options_are_the_same(self, splits: tuple[int, ...]) -> None:
        scenario = plant(splits=splits, arrivals="load = 1.2", bandwidth_hz=1e7)
        environment, _ = opened(scenario)
        _, states, _, _ = ran(scenario, 30)
        count = environment.options

        def sets(state: State) -> tuple[jax.Array, jax.Array]:
            def of(action: jax.Array) -> jax.Array:
                everybody = jnp.full(environment.requests, action)
                split = split_of(environment.plant, state, everybody % 4, everybody // 4)
                at = (split.server[..., None] == jnp.arange(3)) & (split.share > 0)[..., None]
                return jnp.any(at, axis=1) & (action % 4 > 0)

            return jax.vmap(of, out_axes=1)(jnp.arange(count)), environment.observe(state).mask

        taken, mask = jax.jit(jax.vmap(sets))(states)
        present = np.asarray(states.requests.present)
        taken, mask = np.asarray(taken)[present], np.asarray(mask)[present]
        assert mask[:, 0].all()
        assert not mask[:, 4::4].any()
        widest = 0
        for servers, allowed in zip(taken, mask, strict=True):
            found = [frozenset(np.flatnonzero(each)) for each in servers[allowed]]
            assert len(found) == len(set(found))
            # Whatever is masked is there under another number, but for the servers that would have nothing.
            assert {frozenset(np.flatnonzero(each)) for each in servers} == set(found)
            widest = max(widest, *(len(each) for each in found))
        assert widest == 3
        if splits[0] == 1:
            assert mask[:, 1:4].all()

    def test_splits_go_by_what_was_heard(self) -> None:
        """With a broadcast of age 1 a queue that has grown since is not seen."""
        environment, state = opened(plant(age=1, radio=FAST, bandwidth_hz=1e8))
        wait_s = jnp.zeros_like(state.broadcasts.wait_s).at[0, 1].set(50.0)
        state = state._replace(broadcasts=state.broadcasts._replace(wait_s=wait_s))
        every = jnp.full(environment.requests, 1), jnp.full(environment.requests, 2)
        split = split_of(environment.plant, state, *every)
        present = np.asarray(state.requests.present)
        assert (np.asarray(split.share)[present] > 0).all()
        heard = state._replace(broadcasts=state.broadcasts._replace(wait_s=jnp.broadcast_to(wait_s[:1], wait_s.shape)))
        split = split_of(environment.plant, heard, *every)
        assert (np.asarray(split.share)[np.asarray(split.server) == 1] == 0).all()


class TestRewards:
    def test_they_add_up_to_the_costs(self) -> None:
        scenario = plant(reward="latency_scale_s = 5.0\nclip = 1e6\nenergy = 0.1\ncooperation = 1.0", bandwidth_hz=1e6)
        _, states, reward, outcome = ran(scenario, 60)
        assert int(states.lost[-1]) == 0
        final = np.asarray(outcome.final)[:-1]
        latency_s = np.asarray(outcome.account.latency_s, np.float64)[:-1]
        energy_j = np.asarray(outcome.account.energy_j, np.float64)[:-1]
        cost = np.where(final, latency_s / 5.0 + 0.1 * energy_j, 0.0).sum()
        # Those in flight at the last slot start count as last projected.
        left = np.asarray(states.uploads.cost)[-1][np.asarray(states.uploads.present)[-1]].sum()
        assert left > 0
        total = -float(np.asarray(reward.team, np.float64)[:-1].sum())
        assert total == pytest.approx(cost + left, rel=1e-4)

    def test_a_difference_is_what_all_would_cost_less(self) -> None:
        scenario = plant(bandwidth_hz=5e5, arrivals="load = 1.0")
        environment, _ = opened(scenario)
        actions, states, _, _ = ran(scenario, 12)
        state = jax.tree.map(lambda field: field[-1], states)
        action = actions[-1]
        assert bool(state.uploads.present.any())

        def total(state: State) -> float:
            projection = project(environment, state, action)
            return float(projection.cost.sum() + projection.delay_cost)

        found = np.asarray(eqx.filter_jit(Environment.difference)(environment, state, action))
        for row in np.flatnonzero(np.asarray(state.requests.present)):
            without = state.requests._replace(present=state.requests.present.at[row].set(False))
            expected = total(state._replace(requests=without)) - total(state)
            assert found[row] == pytest.approx(expected, abs=1e-4)

    def test_a_projection_is_what_happens_if_nobody_comes(self) -> None:
        scenario = plant(bandwidth_hz=4e5, arrivals="load = 1.2")
        environment, _ = opened(scenario)
        actions, states, _, _ = ran(scenario, 8)
        state, action = jax.tree.map(lambda field: field[-1], states), actions[-1]
        projected = project(environment, state, action)
        nobody = state.requests._replace(present=jnp.zeros(environment.requests, bool))
        step = jax.jit(lambda state, action: environment.step(state, action, requests=nobody))
        found: dict[int, float] = {}
        for _ in range(40):
            state, _, outcome = step(state, action)
            final = np.asarray(outcome.final) & (np.asarray(outcome.decided_slot) == 7)
            latency_s = np.asarray(outcome.account.latency_s)
            found |= {int(row): float(latency_s[at]) for at, row in enumerate(np.asarray(outcome.row)) if final[at]}
        assert len(found) > 2
        for row, latency_s in found.items():
            assert float(projected.latency_s[row]) == pytest.approx(latency_s, rel=1e-4)


@pytest.mark.slow
def test_many_environments_are_as_one() -> None:
    environment, _ = opened(plant(bandwidth_hz=5e5))
    every = jax.vmap(environment.reset)(seeds(1, 3))

    def slots(state: State) -> Any:
        def slot(state: State, number: jax.Array) -> tuple[State, Any]:
            action = (number + jnp.arange(environment.requests)) % environment.options
            after, reward, _ = environment.step(state, action)
            return after, reward

        return jax.lax.scan(slot, state, jnp.arange(15))

    together = jax.jit(jax.vmap(slots))(every)
    for number in range(3):
        alone = jax.jit(slots)(jax.tree.map(lambda field, at=number: field[at], every))
        for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(np.asarray(many)[number], one, rtol=1e-5, atol=1e-5)


class TestPolicies:
    @pytest.mark.parametrize("name", EVERY_RULE)
    def test_every_rule_runs(self, name: str) -> None:
        environment, state = opened(plant())
        rule_keeps_to_the_mask(name, environment, state)

    def test_the_greedy_one_splits_as_far_as_it_can(self) -> None:
        environment, state = opened(plant(radio=FAST, bandwidth_hz=1e8))
        action = np.asarray(Greedy().choose(compiled.observe(environment, state), jax.random.key(0)))
        assert (action[np.asarray(state.requests.present)] // 4 == 2).all()

    @pytest.mark.slow
    @pytest.mark.parametrize(("gpus", "margin", "gain"), [((1, 1, 1), 1.02, 1.0), ((2, 1, 3), 1.05, 1.05)])
    def test_reservations_know_of_the_parts(self, gpus: tuple[int, ...], margin: float, gain: float) -> None:
        """Where sending takes no time, they come near to a search that sees what really follows."""
        scenario = plant(
            radio=WIRED,
            tasks="",
            age=0,
            gpus=gpus,
            arrivals='kind = "uniform"\ncount = [1, 3]',
            max_per_slot=None,
            max_uploads=96,
            device_speed=0.01,
        )
        environment, _ = opened(scenario)

        def slot(state: State, _: None) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
            seen = environment.observe(state)
            key = jax.random.key(0)
            booked = environment.project(state, Coordinated().choose(seen, key)).latency_s
            blind = environment.project(state, Greedy().choose(seen, key)).latency_s
            best = EarliestFinish().assign(environment, state, key)
            after, _, _ = environment.step(state, best)
            return after, (jnp.sum(booked), jnp.sum(environment.project(state, best).latency_s), jnp.sum(blind))

        totals = jax.jit(lambda state: jax.lax.scan(slot, state, length=8)[1])(
            compiled.reset(environment, seeds(3, 1)[0])
        )
        booked_s, best_s, blind_s = (float(total.sum()) for total in totals)
        assert booked_s < margin * best_s
        if gain == 1.0:
            # On one GPU each, to split over all is best for all of them, reservations or not.
            assert blind_s == pytest.approx(booked_s, rel=1e-5)
        else:
            assert blind_s > gain * booked_s


def test_pictures_do_not_show_a_task_at_several_servers() -> None:
    simulation = SimpleNamespace(scenario=plant(), episodes=None)
    with pytest.raises(InputError, match=r"tasks\.split_options"):
        film(cast(Simulation, simulation))


def test_own_parts_that_no_broadcast_shows_are_remembered() -> None:
    """`own_unseen_s` of a device: the service time of its parts at each server in the slot before."""
    environment, state = opened(plant(splits=(3,), age=1, tasks="noise_sigma = 0.4"))
    action = jnp.full(environment.requests, 1)
    split = split_of(environment.plant, state, action, jnp.zeros_like(action))
    after, _, _ = jax.jit(lambda state: environment.step(state, action))(state)
    work, device = np.asarray(state.requests.work), np.asarray(state.requests.device)
    sent_s = np.zeros((6, 3))
    for row in np.flatnonzero(np.asarray(state.requests.present)):
        for server, share in zip(np.asarray(split.server)[row], np.asarray(split.share)[row], strict=True):
            sent_s[device[row], server] += share * work[row] / (2.0, 3.0, 1.0)[server]
    assert (sent_s > 0).sum() > 3
    seen = compiled.observe(environment, after)
    present = np.asarray(seen.present)
    unseen_s = np.asarray(option(seen, "own_unseen_s"))[present][:, 1:4]
    np.testing.assert_allclose(unseen_s, sent_s[np.asarray(seen.device)[present]], rtol=1e-5, atol=1e-6)
