"""Gangs: tasks that need several GPUs of one server at once, first in, first out, with warm and cold starts.

An image is split into patches over k GPUs (DistriFusion, 2402.19481), and the GPUs that hold a model together form a
*group*. As in EAT (2507.10026) a task starts warm only on a group of exactly its size and model; any other choice of
GPUs loads the model, and a group that loses a GPU to another task is no longer loaded.

All times are seconds relative to the start of the slot. A row is a task on its way to a server; it joins the queue when
its upload ends (`ready_s`). Rows of one server are served in order of `ready_s`, ties by row number, and never
overtake: a task at the head of the queue that waits for its GPUs holds back those behind it, though some are idle.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.physics.presence import Stays, next_present_s
from gmel.physics.queueing import Served
from gmel.physics.rows import ranks

__all__ = ["GangQueued", "GangServers", "fifo_gangs"]


class GangQueued(NamedTuple):
    """Tasks that pass through the servers."""

    present: Bool[Array, "rows"]
    server: Int[Array, "rows"]
    ready_s: Float[Array, "rows"]
    service_s: Float[Array, "rows"]
    """Service on `gpus` GPUs, without loading."""
    gpus: Int[Array, "rows"]
    """GPUs that the task holds from its start to its end, from 1 on."""
    model: Int[Array, "rows"]
    load_s: Float[Array, "rows"]
    """Time to load the model on `gpus` GPUs, spent only if the start is cold."""
    latest_start_s: Float[Array, "rows"]
    """A task that would start later is discarded (infinite: never)."""


class GangServers(NamedTuple):
    """State of the servers between slots."""

    free_s: Float[Array, "servers gpus"]
    """When each GPU has finished what it holds (absent GPUs: infinite)."""
    head_s: Float[Array, "servers"]
    """When the last task taken from the queue starts: those behind it start no earlier, though a GPU be free."""
    group: Int[Array, "servers gpus"]
    """Group of each GPU, named by its lowest GPU (-1: none)."""
    group_model: Int[Array, "servers gpus"]
    """Model that the group of each GPU holds (-1: none)."""


def fifo_gangs(
    servers: GangServers, rows: GangQueued, horizon_s: float | Float[Array, ""], stays: Stays | None = None
) -> tuple[Served, GangServers]:
    """First in, first out without overtaking; a task starts when `gpus` GPUs of its server are free.

    A task starts warm if a group of its size and model is free then, on the one free for longest; it does not wait for
    one. Otherwise it takes GPUs outside any group before GPUs in one, each in the order in which they became free, ties
    by number, loads its model and forms a new group; the groups it takes GPUs from are dissolved.

    A discarded task holds nobody back: its start is known as soon as the tasks before it are. One that asks for no GPU,
    or for more than its server has, is discarded when it is ready. With `stays` a task starts only while its server is
    there; one whose server does not come back is discarded.

    Returns:
        As :func:`gmel.physics.queueing.fifo_many_gpus`: the rows served to the end, and the state of the servers
        counting only rows ready before `horizon_s`.
    """
    place = ranks(jnp.where(rows.present, rows.ready_s, jnp.inf))
    ordered = jax.tree.map(lambda field: jnp.zeros_like(field).at[place].set(field, unique_indices=True), rows)

    def serve_one(
        carry: tuple[GangServers, GangServers], row: GangQueued
    ) -> tuple[tuple[GangServers, GangServers], Served]:
        now, committed = carry
        here = jnp.arange(now.free_s.shape[0]) == row.server
        free_s = jnp.min(jnp.where(here[:, None], now.free_s, jnp.inf), axis=0)
        head_s = jnp.max(jnp.where(here, now.head_s, -jnp.inf))
        group = jnp.max(jnp.where(here[:, None], now.group, -1), axis=0)
        group_model = jnp.max(jnp.where(here[:, None], now.group_model, -1), axis=0)

        possible = (row.gpus >= 1) & (row.gpus <= jnp.sum(jnp.isfinite(free_s)))
        start_s = jnp.maximum(row.ready_s, jnp.maximum(head_s, _enough_free(free_s, row.gpus)))
        if stays is not None:
            there_s = next_present_s(stays.of(row.server), start_s)
            possible = possible & jnp.isfinite(there_s)
            start_s = there_s
        start_s = jnp.where(possible, start_s, row.ready_s)
        serve = row.present & possible & (start_s <= row.latest_start_s)

        together = _same_group(group)
        idle = jnp.isfinite(free_s) & (free_s <= start_s)
        warm = _warm_group(free_s, idle, together, group_model == row.model, row.gpus)
        hit = jnp.any(warm)
        taken = jnp.where(hit, warm, _cold_gpus(free_s, idle, group >= 0, row.gpus))
        switch_s = jnp.where(hit, 0.0, row.load_s)
        end_s = start_s + switch_s + row.service_s

        dissolved = jnp.any(together & taken[:, None], axis=0)
        name = jnp.argmax(taken).astype(now.group.dtype)
        new_group = jnp.where(taken, name, jnp.where(dissolved, -1, group))
        new_model = jnp.where(taken, row.model.astype(now.group_model.dtype), jnp.where(dissolved, -1, group_model))
        changed = here & serve
        after = GangServers(
            free_s=jnp.where(changed[:, None] & taken[None, :], end_s, now.free_s),
            head_s=jnp.where(changed, start_s, now.head_s),
            group=jnp.where(changed[:, None], new_group[None, :], now.group),
            group_model=jnp.where(changed[:, None], new_model[None, :], now.group_model),
        )
        final = row.present & (row.ready_s < horizon_s)
        committed = jax.tree.map(lambda new, old: jnp.where(final, new, old), after, committed)
        return (after, committed), Served(start_s, jnp.where(serve, switch_s, 0.0), end_s, row.present & ~serve)

    (_, committed), served = jax.lax.scan(serve_one, (servers, servers), ordered)
    return jax.tree.map(lambda field: field[place], served), committed


def _enough_free(free_s: Float[Array, "gpus"], needed: Int[Array, ""]) -> Float[Array, ""]:
    """When as many GPUs are free as needed (infinite: never)."""
    free_by_then = jnp.sum(free_s[None, :] <= free_s[:, None], axis=1)
    return jnp.min(jnp.where(free_by_then >= needed, free_s, jnp.inf))


def _same_group(group: Int[Array, "gpus"]) -> Bool[Array, "gpus gpus"]:
    """Entry [g, h]: both GPUs are in the same group (a GPU in a group is among its own)."""
    return (group[None, :] == group[:, None]) & (group >= 0)[:, None]


def _warm_group(
    free_s: Float[Array, "gpus"],
    idle: Bool[Array, "gpus"],
    together: Bool[Array, "gpus gpus"],
    same_model: Bool[Array, "gpus"],
    needed: Int[Array, ""],
) -> Bool[Array, "gpus"]:
    """GPUs of the idle group with this size and model that has been free for longest, ties by number; or none."""
    size = jnp.sum(together, axis=1)
    all_idle = jnp.all(idle[None, :] | ~together, axis=1)
    loaded = same_model & (size == needed) & all_idle & (size > 0)
    since_s = jnp.max(jnp.where(together, free_s[None, :], -jnp.inf), axis=1)
    first = jnp.arange(free_s.shape[0]) == jnp.argmin(jnp.where(loaded, since_s, jnp.inf))
    return jnp.any(together & (first & loaded)[:, None], axis=0)


def _cold_gpus(
    free_s: Float[Array, "gpus"], idle: Bool[Array, "gpus"], grouped: Bool[Array, "gpus"], needed: Int[Array, ""]
) -> Bool[Array, "gpus"]:
    """As many idle GPUs as needed: outside groups first, then those free for longest, ties by number."""
    number = jnp.arange(free_s.shape[0])
    # Entry [g, h]: h is taken before g.
    lower = (free_s[None, :] == free_s[:, None]) & (number[None, :] < number[:, None])
    sooner = (free_s[None, :] < free_s[:, None]) | lower
    same = grouped[None, :] == grouped[:, None]
    before = idle[None, :] & ((~grouped[None, :] & grouped[:, None]) | (same & sooner))
    return idle & (jnp.sum(before, axis=1) < needed)
