"""The view of the devices: the table of requests as agents, one for each device, and their choices back in the table.

In a slot most devices have no request and some have several. An agent decides for the first `k` requests of its device
(in the order of the table); requests beyond those go where its last one goes, and are counted.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.simulator.adapters.episode import Credit, RewardFunction
from gmel.simulator.adapters.flat import flat_rows
from gmel.simulator.environment import Environment
from gmel.simulator.scale import Scale
from gmel.simulator.state import Observation, Outcome, State

__all__ = [
    "DeviceSlot",
    "DeviceView",
    "Finished",
    "Places",
    "choices",
    "device_slot",
    "device_view",
    "finished",
    "in_time",
    "of_devices",
    "places",
    "usable",
]


class Places(NamedTuple):
    """Which request stands where in the view of the devices."""

    order: Int[Array, "requests"]
    """How many requests of the same device stand before each request."""
    row: Int[Array, "devices k"]
    """Row of the k-th request of each device; the number of rows where there is none."""


class DeviceView(NamedTuple):
    """What the agents see."""

    observation: Float[Array, "devices width"]
    """`k` flat rows (`gmel.simulator.adapters.flat`), one behind the other."""
    mask: Bool[Array, "devices k options"]
    """What may be chosen; without a request only option 0."""


class Finished(NamedTuple):
    """The tasks that became final in a slot, added up for each device."""

    tasks: Int[Array, "devices"]
    in_time: Int[Array, "devices"]
    latency_s: Float[Array, "devices"]
    energy_j: Float[Array, "devices"]


def places(environment: Environment, state: State, k: int) -> Places:
    """Where the requests of the slot stand in the view of the devices."""
    requests, rows = state.requests, environment.requests
    same = requests.present[None, :] & (requests.device[None, :] == requests.device[:, None])
    order = jnp.sum(jnp.tril(same, -1), axis=1, dtype=jnp.int32)
    table = jnp.full((environment.plant.switches.devices, k), rows, jnp.int32)
    # What is absent or beyond k points outside of the table and is dropped.
    device = jnp.where(requests.present, requests.device, environment.plant.switches.devices)
    return Places(order, table.at[device, order].set(jnp.arange(rows, dtype=jnp.int32), mode="drop"))


def device_view(environment: Environment, state: State, scale: Scale, k: int) -> DeviceView:
    """What each device knows, as a vector and a mask of fixed size."""
    seen = environment.observe(state)
    row = places(environment, state, k).row
    flat = flat_rows(seen, scale)
    # One more row: what a device without a request sees.
    flat = jnp.concatenate([flat, jnp.zeros_like(flat[:1])])
    nothing = jnp.arange(environment.options) == 0
    mask = jnp.concatenate([seen.mask, nothing[None, :]])
    return DeviceView(flat[row].reshape(row.shape[0], -1), mask[row])


def choices(
    environment: Environment, state: State, action: Int[Array, "devices k"]
) -> tuple[Int[Array, "requests"], Int[Array, "devices"]]:
    """Option of each request from the actions of the agents; and how many requests of each device came beyond its k."""
    k = action.shape[1]
    order = places(environment, state, k).order
    option = action[state.requests.device, jnp.minimum(order, k - 1)]
    beyond = of_devices(environment, state, (order >= k).astype(jnp.float32))
    return option, beyond.astype(jnp.int32)


def usable(
    observation: Observation, option: Int[Array, "requests"]
) -> tuple[Int[Array, "requests"], Bool[Array, "requests"]]:
    """Masked options replaced by the first that is allowed (the device itself where it can); and which were replaced.

    An upload without a link would never end. Random and unmasked learners choose such options all the time.
    """
    allowed = jnp.take_along_axis(observation.mask, option[:, None], axis=1)[:, 0]
    first = jnp.argmax(observation.mask, axis=1).astype(option.dtype)
    return jnp.where(allowed, option, first), observation.present & ~allowed


def of_devices(environment: Environment, state: State, values: Float[Array, "requests"]) -> Float[Array, "devices"]:
    """Sum over the requests of each device."""
    total = jnp.zeros(environment.plant.switches.devices, values.dtype)
    return total.at[state.requests.device].add(jnp.where(state.requests.present, values, 0.0))


def in_time(outcome: Outcome) -> Bool[Array, "rows"]:
    """Final and done by the deadline."""
    # As in the records: the tolerance is that of float32 sums.
    done = outcome.account.latency_s <= outcome.deadline_s * (1 + 1e-6)
    return outcome.final & ~outcome.dropped & done


def finished(environment: Environment, outcome: Outcome) -> Finished:
    """The tasks that became final in a slot, by device."""
    final = outcome.final
    devices = environment.plant.switches.devices

    def count(rows: Bool[Array, "rows"]) -> Int[Array, "devices"]:
        return jnp.zeros(devices, jnp.int32).at[outcome.device].add(rows.astype(jnp.int32))

    def total(values: Float[Array, "rows"]) -> Float[Array, "devices"]:
        return jnp.zeros(devices, values.dtype).at[outcome.device].add(jnp.where(final, values, 0.0))

    return Finished(
        count(final), count(in_time(outcome)), total(outcome.account.latency_s), total(outcome.account.energy_j)
    )


class DeviceSlot(NamedTuple):
    """One slot, seen from the devices."""

    state: State
    outcome: Outcome
    option: Int[Array, "requests"]
    """What was done with each request."""
    reward: Float[Array, "devices"]
    team: Float[Array, ""]
    beyond: Int[Array, "devices"]
    """Requests beyond the k that the agent decides itself."""
    replaced: Int[Array, "devices"]
    """Masked choices that were replaced."""


def device_slot(
    environment: Environment, state: State, action: Int[Array, "devices k"], reward: Credit | RewardFunction
) -> DeviceSlot:
    """Steps the environment with the actions of all agents.

    A device gets the sum over its requests of `own` or of the given function; `team` to everybody; `mixed` =
    (1 - mu) own + mu team, also for devices without a request.
    """
    option, beyond = choices(environment, state, action)
    option, replaced = usable(environment.observe(state), option)
    after, earned, outcome = environment.step(state, option)
    if callable(reward):
        paid = of_devices(environment, state, reward(state, option, outcome, earned))
    else:
        mu = {"own": 0.0, "team": 1.0, "mixed": environment.plant.switches.reward.cooperation}[reward]
        paid = (1 - mu) * of_devices(environment, state, earned.own) + mu * earned.team
    count = of_devices(environment, state, replaced.astype(jnp.float32)).astype(jnp.int32)
    return DeviceSlot(after, outcome, option, paid, earned.team, beyond, count)
