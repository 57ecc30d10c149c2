"""What must not change, or must change in a known way, when the question is put differently.

Random tables of requests, every number a multiple of 1/16 and every speed a power of two: sums are exact in double
precision, so equal means equal.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.simulator.environment import Environment, seeds
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome, Requests, State
from small_plants import small_plant

SLOTS, DRAIN, ROWS, DEVICES, SERVERS = 4, 6, 4, 3, 2
SPEEDS, GPUS = (2.0, 1.0), (1, 2)
Table = dict[str, np.ndarray]

# Upload ends in [0, 4) slots, so that uploads stay in flight and overtake one another.
request = st.fixed_dictionaries(
    {
        "present": st.sampled_from([True, True, True, False]),
        "device": st.integers(0, DEVICES - 1),
        "action": st.integers(0, SERVERS),
        "ready_s": st.integers(0, 63).map(lambda n: n / 16),
        "work": st.integers(1, 48).map(lambda n: n / 16),
        "generated_s": st.integers(0, 15).map(lambda n: -n / 16),
        "deadline_s": st.integers(16, 128).map(lambda n: n / 16),
    }
)
tables = st.lists(request, min_size=SLOTS * ROWS, max_size=SLOTS * ROWS).map(
    lambda rows: {name: np.array([row[name] for row in rows]).reshape(SLOTS, ROWS) for name in rows[0]}
)
quick = settings(max_examples=25, deadline=None)


def plant(*, speeds: Any = SPEEDS, gpus: Any = GPUS, rows: int = ROWS, uploads: int = SLOTS * ROWS) -> Environment:
    """Two servers; tasks that cannot start by their deadline are discarded."""
    scenario = small_plant(
        speeds=speeds, gpus=gpus, devices=DEVICES, deadline="drop", max_per_slot=rows, max_uploads=uploads
    )
    return Environment.from_scenario(scenario)


def outcome_of(environment: Environment, table: Table, step: Any = None) -> tuple[Outcome, Any]:
    """Outcomes of all slots of a table and of empty ones after it, and the rewards of the team."""
    return jax.device_get((step or _run)(environment, _padded(table)))


def _padded(table: Table) -> dict[str, jax.Array]:
    drain = {name: np.zeros((DRAIN, values.shape[1]), values.dtype) for name, values in table.items()}
    return {name: jnp.asarray(np.concatenate([values, drain[name]])) for name, values in table.items()}


def episode(environment: Environment, table: dict[str, jax.Array]) -> tuple[Outcome, Any]:
    def requests_of(row: dict[str, jax.Array]) -> Requests:
        zero = jnp.zeros_like(row["work"])
        wide = jnp.broadcast_to(zero[:, None], (zero.shape[0], environment.servers))
        return Requests(
            present=row["present"],
            device=row["device"].astype(jnp.int32),
            generated_s=row["generated_s"],
            size_bit=zero,
            bits_out=zero,
            work=row["work"],
            noise=zero + 1.0,
            model=jnp.zeros(zero.shape, jnp.int32),
            load_s=zero,
            deadline_s=row["deadline_s"],
            fade=wide + 1.0,
            outage_s=wide + row["ready_s"][:, None],
        )

    def slot(state: State, row: dict[str, jax.Array]) -> tuple[State, Any]:
        requests = requests_of(row)
        state = state._replace(requests=requests)
        after, reward, outcome = environment.step(state, row["action"].astype(jnp.int32), requests=requests)
        return after, (outcome, reward.team)

    first = requests_of({name: values[0] for name, values in table.items()})
    start = environment.reset(seeds(0, 1)[0])._replace(requests=first)
    return jax.lax.scan(slot, start, table)[1]


_run = eqx.filter_jit(episode)
_many = eqx.filter_jit(eqx.filter_vmap(episode, in_axes=(None, 0)))


def records_of(outcome: Outcome, slot_s: float = 1.0) -> Records:
    return task_records(outcome, slot_s)


TIMES = ("generated_s", "decided_s", "upload_end_s", "start_s", "end_s", "latency_s")


def rows_of(records: Records, scale: float = 1.0) -> list[tuple[Any, ...]]:
    """One tuple per task, without the numbers of slot and row, in an order of its own."""
    columns = [records.option, records.device, records.dropped, *(getattr(records, name) * scale for name in TIMES)]
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


@pytest.fixture(autouse=True)
def double() -> Any:
    with jax.enable_x64(True):
        yield


@quick
@given(tables, st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_scaling_time_scales_every_time(table: Table, scale: float) -> None:
    environment = plant()
    before, _ = outcome_of(environment, table)
    timed = eqx.tree_at(lambda tree: tree.plant.slot_s, environment, environment.plant.slot_s * scale)
    times = {name: table[name] * scale for name in ("ready_s", "work", "generated_s", "deadline_s")}
    after, _ = outcome_of(timed, {**table, **times})
    assert rows_of(records_of(before), scale) == rows_of(records_of(after, scale))


@quick
@given(tables)
def test_names_of_servers_do_not_matter(table: Table) -> None:
    before, reward = outcome_of(plant(), table)
    swapped = np.array([0, 2, 1])[table["action"]]
    after, same = outcome_of(plant(speeds=SPEEDS[::-1], gpus=GPUS[::-1]), {**table, "action": swapped})
    records = records_of(after)
    back = Records(**{**vars(records), "option": np.array([0, 2, 1])[records.option]})
    assert rows_of(records_of(before)) == rows_of(back)
    np.testing.assert_allclose(reward, same, rtol=1e-12)


@quick
@given(tables, st.permutations(range(DEVICES)))
def test_names_of_devices_do_not_matter(table: Table, order: list[int]) -> None:
    names = np.array(order)
    before, after = (
        records_of(outcome_of(plant(), {**table, "device": device})[0])
        for device in (table["device"], names[table["device"]])
    )
    renamed = Records(**{**vars(before), "device": names[before.device]})
    assert rows_of(renamed) == rows_of(after)


@quick
@given(tables, st.permutations(range(ROWS)))
def test_order_of_rows_does_not_matter_without_ties(table: Table, order: list[int]) -> None:
    """Equal upload ends go by row, as do the tasks of a device: uploads get distinct ends, devices one task a slot."""
    places = np.arange(SLOTS * ROWS).reshape(SLOTS, ROWS)
    distinct = {**table, "ready_s": table["ready_s"] + places / 1024}
    seen: set[tuple[int, int]] = set()
    for slot, row in np.ndindex(SLOTS, ROWS):
        local = (slot, int(table["device"][slot, row]))
        if distinct["action"][slot, row] == 0 and local in seen:
            distinct["action"] = distinct["action"].copy()
            distinct["action"][slot, row] = 1
        seen.add(local)
    before, reward = outcome_of(plant(), distinct)
    after, same = outcome_of(plant(), {name: values[:, list(order)] for name, values in distinct.items()})
    assert rows_of(records_of(before)) == rows_of(records_of(after))
    np.testing.assert_allclose(reward, same, rtol=1e-12)


@quick
@given(tables, st.lists(st.integers(0, ROWS + 1), min_size=ROWS, max_size=ROWS, unique=True).map(sorted))
def test_absent_rows_and_spare_room_do_not_matter(table: Table, places: list[int]) -> None:
    before, reward = outcome_of(plant(), table)
    wide = {name: np.ones((SLOTS, ROWS + 2), values.dtype) for name, values in table.items()}
    wide["present"][:] = False
    for name, values in table.items():
        wide[name][:, places] = values
    after, same = outcome_of(plant(rows=ROWS + 2, uploads=SLOTS * ROWS + 5), wide)
    assert rows_of(records_of(before)) == rows_of(records_of(after))
    np.testing.assert_allclose(reward, same, rtol=1e-12)


@quick
@given(tables)
def test_half_the_slot_length_with_the_same_decisions_is_the_same(table: Table) -> None:
    environment = plant()
    before, reward = outcome_of(environment, table)
    halved = eqx.tree_at(lambda tree: tree.plant.slot_s, environment, 0.5 * environment.plant.slot_s)
    thinned = {name: np.zeros((2 * SLOTS, ROWS), values.dtype) for name, values in table.items()}
    for name, values in table.items():
        thinned[name][::2] = values
    after, same = outcome_of(halved, thinned)
    assert rows_of(records_of(before)) == rows_of(records_of(after, 0.5))
    # What a later decision changes is credited in its own slot; the sum is the same.
    np.testing.assert_allclose(np.sum(reward), np.sum(same), rtol=1e-12)


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(tables)
def test_compiled_or_not_is_the_same(table: Table) -> None:
    environment = plant()
    compiled, reward = outcome_of(environment, table)
    with jax.disable_jit():
        plain, same = outcome_of(environment, table, episode)
    assert rows_of(records_of(compiled)) == rows_of(records_of(plain))
    np.testing.assert_allclose(reward, same, rtol=1e-12)


@quick
@given(st.lists(tables, min_size=3, max_size=3))
def test_many_environments_together_are_each_alone(several: list[Table]) -> None:
    environment = plant()
    padded = [_padded(table) for table in several]
    together, rewards = jax.device_get(_many(environment, jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)))
    for number, table in enumerate(several):
        alone, reward = outcome_of(environment, table)
        own = jax.tree.map(lambda field, at=number: field[at], together)
        assert rows_of(records_of(own)) == rows_of(records_of(alone))
        np.testing.assert_allclose(rewards[number], reward, rtol=1e-12)


def test_the_tables_reach_what_they_are_for() -> None:
    """Waiting, discarding, overtaking and uploads over several slots all happen in tables like these."""
    random = np.random.default_rng(0)
    shape = (SLOTS, ROWS)
    table = {
        "present": np.ones(shape, bool),
        "device": random.integers(0, DEVICES, shape),
        "action": random.integers(0, SERVERS + 1, shape),
        "ready_s": random.integers(0, 64, shape) / 16,
        "work": random.integers(1, 49, shape) / 16,
        "generated_s": -random.integers(0, 16, shape) / 16,
        "deadline_s": random.integers(16, 129, shape) / 16,
    }
    records = records_of(outcome_of(plant(), table)[0])
    assert len(records) == SLOTS * ROWS
    assert records.dropped.any()
    assert (records.queue_s > 0).any()
    crossing = records.upload_end_s - records.decided_s > 1.0
    assert crossing.any()
    by_decision = [records.upload_end_s[records.option == server] for server in (1, 2)]
    assert any((np.diff(ends) < 0).any() for ends in by_decision), "a later decision overtakes"
