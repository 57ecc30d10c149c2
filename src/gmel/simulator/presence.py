"""Servers that join and leave by the schedule of the scenario: a function of the slot alone, the same for all
policies."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gmel.physics.presence import Stays
from gmel.scenario.schema import Scenario

__all__ = ["NEVER_S", "Presence", "presence_of", "stays_at"]

NEVER_S = 86_400.0
"""What is said of a wait without end, for a server that does not come back or for more GPUs than it has: a day, so that
it stays a number; where such waits occur nobody says more."""


class Presence(eqx.Module):
    """When each server is there. A time is a slot and what is left: absolute seconds would lose digits in float32."""

    from_slot: Int[Array, "servers stays"]
    from_s: Float[Array, "servers stays"]
    to_slot: Int[Array, "servers stays"]
    to_s: Float[Array, "servers stays"]


def presence_of(scenario: Scenario) -> Presence | None:
    """The schedule of a scenario; None where all servers are always there."""
    plans = [server.present for server in scenario.servers]
    if all(plan is None for plan in plans):
        return None
    slot_s = scenario.slot.length_s
    most = max(len(plan) if plan else 1 for plan in plans)
    from_s, to_s = np.full((2, len(plans), most), math.inf)
    for server, plan in enumerate(plans):
        if plan is None:
            from_s[server, 0] = 0.0
            continue
        for number, stay in enumerate(plan):
            from_s[server, number] = stay.from_s
            to_s[server, number] = math.inf if stay.to_s is None else stay.to_s
    return Presence(*_slot_and_rest(from_s, slot_s), *_slot_and_rest(to_s, slot_s))


def _slot_and_rest(
    time_s: Float[np.ndarray, "servers stays"], slot_s: float
) -> tuple[Int[Array, "servers stays"], Float[Array, "servers stays"]]:
    # What lies beyond any episode stays in the rest, and slots fit 32 bits.
    slot = np.floor(np.minimum(time_s / slot_s, 2**30))
    slot = np.where(np.isfinite(time_s), slot, 0.0)
    return jnp.asarray(slot.astype(np.int32)), jnp.asarray(time_s - slot * slot_s)


def stays_at(presence: Presence | None, slot: Int[Array, ""], slot_s: Float[Array, ""]) -> Stays | None:
    """The schedule as seen from the start of a slot; None where all servers are always there."""
    if presence is None:
        return None

    def seen(number: Int[Array, "servers stays"], rest_s: Float[Array, "servers stays"]) -> Float[Array, "..."]:
        return (number - slot) * slot_s + rest_s

    return Stays(seen(presence.from_slot, presence.from_s), seen(presence.to_slot, presence.to_s))
