"""Servers that join and leave: when one that comes and goes starts a task.

A server whose stays are the intervals [from, to) starts tasks during them alone; what it has begun it finishes, also
after it has left (a queue with vacations in which service is not interrupted, Doshi 1986, "Queueing systems with
vacations"). A task that is to start at time t starts at the least t' >= t that lies in a stay.

All times are seconds relative to the start of the slot.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Stays", "next_present_s", "present"]


class Stays(NamedTuple):
    """When servers are there: intervals [from_s, to_s), the last axis; one that does not exist is infinite at both
    ends."""

    from_s: Float[Array, "*servers stays"]
    to_s: Float[Array, "*servers stays"]

    def of(self, server: Int[Array, "*rows"]) -> "Stays":
        """Those of one server, or of a server for each row."""
        return Stays(self.from_s[server], self.to_s[server])


def present(stays: Stays, time_s: Float[Array, "*servers"] | float) -> Bool[Array, "*servers"]:
    """Whether the server is there at a time: one time for each server."""
    time_s = jnp.asarray(time_s)[..., None]
    return jnp.any((stays.from_s <= time_s) & (time_s < stays.to_s), axis=-1)


def next_present_s(stays: Stays, time_s: Float[Array, "*servers"] | float) -> Float[Array, "*servers"]:
    """The first time from `time_s` on at which the server is there (infinite: never again)."""
    time_s = jnp.asarray(time_s)[..., None]
    begins_s = jnp.where(time_s < stays.to_s, jnp.maximum(time_s, stays.from_s), jnp.inf)
    return jnp.min(begins_s, axis=-1)
