"""One scheduler for all requests of a slot, as pure functions: what the Gymnasium adapters compile.

Two ways to ask it. `slot`: one action for the whole table of requests. `request`: one request after the other, each
seeing where those before it in the slot were sent; the slot happens after the last, and slots without a request pass by
themselves.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.simulator.adapters.devices import in_time, usable
from gmel.simulator.adapters.episode import RewardFunction
from gmel.simulator.adapters.flat import BOUND, compressed, flat_columns, flat_rows, flat_width
from gmel.simulator.environment import Environment
from gmel.simulator.scale import Scale
from gmel.simulator.state import Observation, Outcome, State, option

__all__ = [
    "Central",
    "Decide",
    "Seen",
    "Tally",
    "central_columns",
    "central_reset",
    "central_step",
    "central_width",
    "look",
]

Decide = Literal["slot", "request"]

TURN_FEATURES = ("sent", "sent_s")
"""Of each option, with `decide="request"`: requests of this slot that were sent there before, and their service time
(of option 0: those of the same device)."""


class Tally(NamedTuple):
    """What became final during a step."""

    tasks: Int[Array, ""]
    in_time: Int[Array, ""]
    latency_s: Float[Array, ""]
    """Sum over the tasks."""
    energy_j: Float[Array, ""]
    """Sum over the tasks."""
    replaced: Int[Array, ""]
    """Masked choices that were replaced."""


class Central(NamedTuple):
    """State of the environment and of the round of decisions in its slot."""

    state: State
    option: Int[Array, "requests"]
    """Decided so far."""
    decided: Bool[Array, "requests"]
    paid: Float[Array, ""]
    """Cost of the slot as projected with what is decided so far."""


class Seen(NamedTuple):
    """What one step gives."""

    central: Central
    observation: Float[Array, "width"]
    mask: Bool[Array, "..."]
    """`slot`: [requests, options]; `request`: [options]."""
    reward: Float[Array, ""]
    truncated: Bool[Array, ""]
    tally: Tally


_Round = tuple[Central, Float[Array, ""], Tally]


def central_columns(environment: Environment, decide: Decide) -> tuple[str, ...]:
    """Names of the entries of an observation, in order."""
    if decide == "slot":
        return flat_columns(environment, environment.requests)
    more = [f"option {choice} {name}" for choice in range(environment.options) for name in TURN_FEATURES]
    return (*flat_columns(environment), *more, "waiting")


def central_width(environment: Environment, decide: Decide) -> int:
    """Length of an observation."""
    row = flat_width(environment)
    more = environment.options * len(TURN_FEATURES) + 1
    return environment.requests * row if decide == "slot" else row + more


def central_reset(
    environment: Environment,
    seed: UInt32[Array, "2"],
    place: Int[Array, ""],
    scale: Scale,
    slots: Int[Array, ""] | int,
    decide: Decide,
) -> Seen:
    """The first decision of an episode."""
    central, reward, tally = _open(environment.reset(seed, place)), jnp.zeros(()), _nothing(environment)
    if decide == "request":
        central, _, tally = _pass(environment, central, reward, tally, slots, None)
    return look(environment, central, jnp.zeros_like(reward), tally, scale, slots, decide)


def central_step(
    environment: Environment,
    central: Central,
    action: Int[Array, "..."],
    scale: Scale,
    slots: Int[Array, ""] | int,
    decide: Decide,
    reward: RewardFunction | None,
) -> Seen:
    """One decision: of a slot, or of a request."""
    if decide == "slot":
        central, earned, tally = _decide_slot(environment, central, action, reward)
    else:
        central, earned, tally = _decide_request(environment, central, action, slots, reward)
    return look(environment, central, earned, tally, scale, slots, decide)


def look(
    environment: Environment,
    central: Central,
    reward: Float[Array, ""],
    tally: Tally,
    scale: Scale,
    slots: Int[Array, ""] | int,
    decide: Decide,
) -> Seen:
    """What the scheduler sees: the servers as they are, uploads in flight included."""
    seen = environment.observe(central.state, fresh=True)
    rows = flat_rows(seen, scale)
    over = central.state.slot >= slots
    if decide == "slot":
        return Seen(central, rows.reshape(-1), seen.mask, reward, over, tally)
    waiting = seen.present & ~central.decided
    turn = jnp.argmax(waiting)
    # The levels of a place share its queue.
    place = jnp.arange(environment.options) % (1 + environment.servers)
    there = central.decided[:, None] & (central.option[:, None] % (1 + environment.servers) == place)
    same = (seen.device == seen.device[turn])[:, None] | (place > 0)
    there = there & same
    sent = jnp.sum(there, axis=0)
    took_s = _chosen_s(seen, central.option)
    sent_s = jnp.sum(jnp.where(there, took_s, 0.0), axis=0)
    more = jnp.stack([sent.astype(sent_s.dtype), compressed(sent_s / scale.time_s)], axis=-1).reshape(-1)
    count = jnp.sum(waiting).astype(more.dtype)[None]
    none = ~jnp.any(waiting)
    entries = jnp.concatenate([jnp.where(none, 0.0, rows[turn]), more, count])
    entries = jax.lax.convert_element_type(jnp.clip(entries, -BOUND, BOUND), jnp.float32)
    mask = jnp.where(none, jnp.arange(environment.options) == 0, seen.mask[turn])
    return Seen(central, entries, mask, reward, over, tally)


def _chosen_s(seen: Observation, chosen: Int[Array, "requests"]) -> Float[Array, "requests options"]:
    """GPU seconds that the chosen option of each request puts on the place of each option."""
    rows, gpus = jnp.arange(chosen.shape[0]), option(seen, "gpus")
    if seen.parts_s is None:
        return (option(seen, "service_s") / gpus)[rows, chosen][:, None] * jnp.ones_like(gpus)
    # Of a task that is split every server has its part; the device itself has the whole or nothing.
    place = jnp.arange(gpus.shape[1]) % (1 + seen.parts_s.shape[2])
    of_server = seen.parts_s[rows, chosen][:, jnp.maximum(place - 1, 0)]
    itself = option(seen, "service_s")[rows, chosen][:, None]
    return jnp.where(place > 0, of_server, itself) / gpus


def _open(state: State) -> Central:
    """A slot in which nothing is decided."""
    rows = state.requests.present.shape[0]
    return Central(
        state, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), jnp.zeros((), state.device_backlog_s.dtype)
    )


def _nothing(environment: Environment) -> Tally:
    zero = jnp.zeros((), environment.plant.slot_s.dtype)
    count = jnp.zeros((), jnp.int32)
    return Tally(count, count, zero, zero, count)


def _add(tally: Tally, outcome: Outcome) -> Tally:
    final = outcome.final
    return Tally(
        tally.tasks + jnp.sum(final, dtype=jnp.int32),
        tally.in_time + jnp.sum(in_time(outcome), dtype=jnp.int32),
        tally.latency_s + jnp.sum(jnp.where(final, outcome.account.latency_s, 0.0)),
        tally.energy_j + jnp.sum(jnp.where(final, outcome.account.energy_j, 0.0)),
        tally.replaced,
    )


def _slot(
    environment: Environment,
    state: State,
    chosen: Int[Array, "requests"],
    tally: Tally,
    reward: RewardFunction | None,
) -> tuple[State, Float[Array, ""], Tally]:
    """One slot, and its reward: the team's, or the sum of the given function."""
    after, earned, outcome = environment.step(state, chosen)
    total = earned.team
    if reward is not None:
        total = jnp.sum(jnp.where(state.requests.present, reward(state, chosen, outcome, earned), 0.0))
    return after, total, _add(tally, outcome)


def _decide_slot(
    environment: Environment, central: Central, action: Int[Array, "requests"], reward: RewardFunction | None
) -> tuple[Central, Float[Array, ""], Tally]:
    seen = environment.observe(central.state, fresh=True)
    chosen, replaced = usable(seen, action)
    tally = _nothing(environment)._replace(replaced=jnp.sum(replaced, dtype=jnp.int32))
    after, earned, tally = _slot(environment, central.state, chosen, tally, reward)
    return _open(after), earned, tally


def _decide_request(
    environment: Environment,
    central: Central,
    action: Int[Array, ""],
    slots: Int[Array, ""] | int,
    reward: RewardFunction | None,
) -> tuple[Central, Float[Array, ""], Tally]:
    """One request. Its reward is minus what the slot costs more with it, so that the rewards of a slot add up to the
    team's; a reward function is paid when the slot happens."""
    state = central.state
    seen = environment.observe(state, fresh=True)
    waiting = seen.present & ~central.decided
    now = waiting & (jnp.arange(environment.requests) == jnp.argmax(waiting))
    wanted = jnp.where(now, action, central.option)
    chosen, replaced = usable(seen, wanted)
    chosen = jnp.where(now, chosen, central.option)
    decided = central.decided | now
    tally = _nothing(environment)._replace(replaced=jnp.sum(replaced & now, dtype=jnp.int32))
    earned = jnp.zeros((), central.paid.dtype)
    paid = central.paid
    if reward is None:
        known = state._replace(requests=state.requests._replace(present=decided))
        projection = environment.project(known, chosen)
        paid = jnp.sum(projection.cost) + projection.delay_cost
        earned = central.paid - paid
    central = Central(state, chosen, decided, paid)
    return _pass(environment, central, earned, tally, slots, reward)


def _pass(
    environment: Environment,
    central: Central,
    earned: Float[Array, ""],
    tally: Tally,
    slots: Int[Array, ""] | int,
    reward: RewardFunction | None,
) -> tuple[Central, Float[Array, ""], Tally]:
    """Lets slots happen until there is something to decide or the episode is over."""

    def idle(carry: _Round) -> Bool[Array, ""]:
        central = carry[0]
        waiting = central.state.requests.present & ~central.decided
        return ~jnp.any(waiting) & (central.state.slot < slots)

    def happen(carry: _Round) -> _Round:
        central, earned, tally = carry
        after, total, tally = _slot(environment, central.state, central.option, tally, reward)
        # Most of the team's reward was paid request by request: all but what nobody decided, as loads by choice.
        return _open(after), earned + total + (central.paid if reward is None else 0.0), tally

    return jax.lax.while_loop(idle, happen, (central, earned, tally))
