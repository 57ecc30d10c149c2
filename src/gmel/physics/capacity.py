"""Capacity instead of a queue: servers that hold tasks side by side, and crash or reject when they are full.

A task takes `units` of its server's capacity from its arrival for a duration of its own, whatever the others do. In
AGOD (2303.13052) and ADSAC (IEEE document 10845826) the units are the denoising steps in progress, and a server that is
given more than it can hold *crashes*: it loses all that it runs. With rejection it is a loss system (Erlang; with
several units a task, Kaufman 1981, "Blocking in a shared resource environment").

All times are seconds relative to the start of the slot.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Hosted", "Hosting", "host", "progress"]


class Hosting(NamedTuple):
    """Tasks at the servers or on their way to them, at the start of a slot."""

    present: Bool[Array, "rows"]
    server: Int[Array, "rows"]
    ready_s: Float[Array, "rows"]
    """When it arrives, if it is not running yet."""
    units: Float[Array, "rows"]
    """Part of the capacity that it takes. Sums are exact for whole numbers."""
    service_s: Float[Array, "rows"]
    """Duration from start to end."""
    running: Bool[Array, "rows"]
    """Whether it was accepted in an earlier slot."""
    start_s: Float[Array, "rows"]
    """When it started, if it runs (not positive)."""


class Hosted(NamedTuple):
    """What became of the tasks if none is decided later, and what runs at the end of the slot.

    A row that is lost at or after the end of the slot runs at the end of it: a later decision may still change that.
    """

    start_s: Float[Array, "rows"]
    """Its arrival, also of a task that is not accepted."""
    end_s: Float[Array, "rows"]
    """When it ends or is lost."""
    lost: Bool[Array, "rows"]
    caused: Bool[Array, "rows"]
    """Whether its own arrival crashed the server, or was rejected (such a row is lost)."""
    progress: Float[Array, "rows"]
    """Share of its duration that had passed at `end_s`: 1 unless it is lost."""
    running: Bool[Array, "rows"]
    """Whether it runs at the end of the slot, counting only rows ready before."""


class _Arrival(NamedTuple):
    """A row in order of arrival, with the capacity of its server; absent and running rows do not arrive."""

    number: Int[Array, "rows"]
    arrives: Bool[Array, "rows"]
    turned_away: Bool[Array, "rows"]
    server: Int[Array, "rows"]
    ready_s: Float[Array, "rows"]
    units: Float[Array, "rows"]
    capacity: Float[Array, "rows"]


class _Fates(NamedTuple):
    """What is known of the rows between two arrivals."""

    end_s: Float[Array, "rows"]
    lost: Bool[Array, "rows"]
    caused: Bool[Array, "rows"]


def progress(
    start_s: Float[Array, "rows"], end_s: Float[Array, "rows"], service_s: Float[Array, "rows"]
) -> Float[Array, "rows"]:
    """Share of its duration that has passed of a task that is lost at `end_s`."""
    return jnp.clip((end_s - start_s) / jnp.where(service_s > 0, service_s, 1.0), 0.0, 1.0)


def host(
    tasks: Hosting,
    capacity: Float[Array, "servers"],
    horizon_s: float | Float[Array, ""],
    on_overload: Literal["crash", "reject"] = "crash",
    there: Bool[Array, "rows"] | None = None,
) -> Hosted:
    """Tasks arrive in order of `ready_s`, ties by row number, and are accepted if their units fit beside those running.

    A task that ends at the instant of an arrival has left. If the units do not fit, the server crashes: all tasks that
    it runs and the new one are lost at that instant, after which it goes on, empty. With `on_overload="reject"`
    (static) only the new one is lost. A task of more units than the capacity never fits. A task whose server is not
    `there` when it arrives is lost alone.

    Returns:
        The tasks followed to the end, and which run at `horizon_s`, which no later decision can change.
    """
    arriving = tasks.present & ~tasks.running
    order = jnp.argsort(jnp.where(arriving, tasks.ready_s, jnp.inf), stable=True)
    start_s = jnp.where(tasks.running, tasks.start_s, tasks.ready_s)
    planned_end_s = start_s + tasks.service_s
    number = jnp.arange(start_s.shape[0])
    turned_away = jnp.zeros_like(arriving) if there is None else arriving & ~there
    room = capacity[tasks.server]
    arrivals = _Arrival(number, arriving, turned_away, tasks.server, tasks.ready_s, tasks.units, room)

    def arrive(now: _Fates, row: _Arrival) -> tuple[_Fates, None]:
        new = (number == row.number) & row.arrives
        beside = (tasks.server == row.server) & (now.end_s > row.ready_s)
        fits = jnp.sum(jnp.where(beside, tasks.units, 0.0)) + row.units <= row.capacity
        overload = row.arrives & ~fits
        victims = overload & ((new | beside) if on_overload == "crash" else new)
        if there is not None:
            victims = jnp.where(row.turned_away, new, victims)
            overload = overload | row.turned_away
        end_s = jnp.where(victims, row.ready_s, jnp.where(new, planned_end_s, now.end_s))
        return _Fates(end_s, now.lost | victims, now.caused | (overload & new)), None

    # A task that has not arrived has ended long ago, so it takes no room.
    nothing = jnp.zeros_like(tasks.present)
    first = _Fates(jnp.where(tasks.present & tasks.running, planned_end_s, -jnp.inf), nothing, nothing)
    (end_s, lost, caused), _ = jax.lax.scan(arrive, first, jax.tree.map(lambda field: field[order], arrivals))
    end_s = jnp.where(tasks.present, end_s, planned_end_s)
    # An arrival at the horizon belongs to the next slot, and so does what it crashes; a task that ends then has left.
    stands = (start_s < horizon_s) & (planned_end_s > horizon_s) & ~(lost & (end_s < horizon_s))
    return Hosted(
        start_s=start_s,
        end_s=end_s,
        lost=lost,
        caused=caused,
        progress=jnp.where(lost, progress(start_s, end_s, tasks.service_s), 1.0),
        running=tasks.present & stands,
    )
