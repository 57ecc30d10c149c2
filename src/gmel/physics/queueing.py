"""Queues: first in, first out on a server with one or more GPUs, with model switching and discarded tasks.

All times are seconds relative to the start of the slot. A row is a task on its way to a server; it joins the queue when
its upload ends (`ready_s`). Rows of one server are served in order of `ready_s`, ties by row number.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.physics.presence import Stays, next_present_s
from gmel.physics.rows import not_later, over_rows, ranks

__all__ = ["Queued", "Served", "Servers", "fifo_many_gpus", "fifo_one_gpu", "load_models", "local_queue", "models_kept"]


class Queued(NamedTuple):
    """Tasks that pass through the servers."""

    present: Bool[Array, "rows"]
    server: Int[Array, "rows"]
    ready_s: Float[Array, "rows"]
    service_s: Float[Array, "rows"]
    model: Int[Array, "rows"]
    load_s: Float[Array, "rows"]
    """Time to load the model, spent only if the server does not hold it."""
    latest_start_s: Float[Array, "rows"]
    """A task that would start later is discarded (infinite: never)."""


class Served(NamedTuple):
    """What became of them. `start_s` is the end of the wait; `end_s` = start + switch + service."""

    start_s: Float[Array, "rows"]
    switch_s: Float[Array, "rows"]
    end_s: Float[Array, "rows"]
    dropped: Bool[Array, "rows"]


class Servers(NamedTuple):
    """State of the servers between slots.

    `free_s`: when each GPU has finished what it holds (absent GPUs: infinite). `resident`: models held in memory;
    `used_s`: when each was last used. Without switching the last two have no columns.
    """

    free_s: Float[Array, "servers gpus"]
    resident: Bool[Array, "servers models"]
    used_s: Float[Array, "servers models"]
    loaded_s: Float[Array, "servers models"] | None = None
    """When each model held is loaded; only where it is chosen which are held. None: on demand."""


def fifo_one_gpu(
    free_s: Float[Array, "servers"], rows: Queued, horizon_s: float | Float[Array, ""]
) -> tuple[Served, Float[Array, "servers"]]:
    """First in, first out, one GPU per server, no switching: in closed form.

    With S_k the work of the rows up to k in order of readiness and B the time the server is free, Lindley's recursion
    C_k = max(C_{k-1}, ready_k) + service_k unrolls to C_k = S_k + max(B, max_{i<=k} (ready_i - S_{i-1})).
    All rows are compared pairwise, so nothing is sorted.

    Returns:
        The rows served to the end, and when each server is free counting only rows ready before `horizon_s`: a later
        decision may still overtake the others.
    """
    work_s = _before(rows, rows.service_s, jnp.add, 0.0)
    latest = _before(rows, rows.ready_s - (work_s - rows.service_s), jnp.maximum, -jnp.inf)
    # A row is among its own predecessors, so `latest` is finite wherever a row is present.
    end_s = jnp.where(rows.present, work_s + jnp.maximum(free_s[rows.server], latest), rows.ready_s + rows.service_s)
    # Rounding of S_k must not start a task before it is ready.
    start_s = jnp.maximum(end_s - rows.service_s, rows.ready_s)
    servers = jnp.arange(free_s.shape[0])

    def keep_busy(
        until_s: Float[Array, "servers"],
        _: Int[Array, ""],
        final: Bool[Array, ""],
        at: Int[Array, ""],
        last_s: Float[Array, ""],
    ) -> Float[Array, "servers"]:
        return jnp.maximum(until_s, jnp.where(final & (at == servers), last_s, -jnp.inf))

    final = rows.present & (rows.ready_s < horizon_s)
    free_after_s = over_rows(keep_busy, free_s, final, rows.server, end_s)
    zero = jnp.zeros_like(end_s)
    return Served(start_s, zero, end_s, jnp.zeros_like(rows.present)), free_after_s


def fifo_many_gpus(
    servers: Servers,
    rows: Queued,
    horizon_s: float | Float[Array, ""],
    model_memory: Float[Array, "models"],
    server_memory: Float[Array, "servers"],
    stays: Stays | None = None,
) -> tuple[Served, Servers]:
    """First in, first out on the earliest free GPU, with least-recently-used model memory.

    A task whose model the server does not hold spends `load_s` on its GPU first; the least recently used models leave
    until the new one fits. All GPUs of a server share what is resident. Kiefer-Wolfowitz recursion, one row a step.

    Where it is chosen which models are held (`servers.loaded_s`) nothing changes them here: a task starts no earlier
    than its model is loaded, and one whose model is not held spends `load_s` each time.

    With `stays` a task starts only while its server is there; one whose server does not come back is discarded.

    Returns:
        As :func:`fifo_one_gpu`, with the state of the servers counting only rows ready before `horizon_s`.
    """
    # Tables of numbers, one row a task or a server: a step reads and writes one row of each. Whatever is in them is
    # exact as a floating-point number.
    place = ranks(jnp.where(rows.present, rows.ready_s, jnp.inf))
    table = jnp.stack([column.astype(rows.ready_s.dtype) for column in rows], axis=1)
    in_order = jnp.zeros_like(table).at[place].set(table, unique_indices=True)
    model_axis, nowhere = servers.resident.shape[1], servers.free_s.shape[0]

    def serve_one(step: Int[Array, ""] | int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        now, committed, served = carry
        row = _row_of(jax.lax.dynamic_index_in_dim(in_order, step, keepdims=False))
        # The server of the row alone is read and written: a plant with many servers costs what its tasks cost.
        mine = _servers_of(now[row.server], servers)
        free_s, held, used_s = mine.free_s, mine.resident, mine.used_s
        start_s = jnp.maximum(row.ready_s, jnp.min(free_s))
        # Without models these are empty and cost nothing.
        wanted = jnp.arange(model_axis) == row.model
        if mine.loaded_s is not None:
            start_s = jnp.maximum(start_s, jnp.max(jnp.where(held & wanted, mine.loaded_s, -jnp.inf)))
        serve = row.present
        if stays is not None:
            there_s = next_present_s(stays.of(row.server), start_s)
            serve = serve & jnp.isfinite(there_s)
            start_s = jnp.where(jnp.isfinite(there_s), there_s, start_s)
        serve = serve & (start_s <= row.latest_start_s)
        hit = jnp.any(held & wanted) if model_axis else jnp.array(True)
        switch_s = jnp.where(hit, 0.0, row.load_s)
        end_s = start_s + switch_s + row.service_s
        taken = jnp.arange(free_s.shape[0]) == jnp.argmin(free_s)
        after = mine._replace(free_s=jnp.where(taken, end_s, free_s))
        if model_axis and mine.loaded_s is None:
            kept = models_kept(held, used_s, wanted, model_memory, server_memory[row.server])
            after = after._replace(resident=kept | wanted, used_s=jnp.where(wanted, start_s, used_s))
        # What is not served, or not final, is written nowhere.
        final = serve & (row.ready_s < horizon_s)
        table = _table_of(after)
        now = now.at[jnp.where(serve, row.server, nowhere)].set(table, mode="drop")
        committed = committed.at[jnp.where(final, row.server, nowhere)].set(table, mode="drop")
        result = [start_s, jnp.where(serve, switch_s, 0.0), end_s, (row.present & ~serve).astype(end_s.dtype)]
        return now, committed, jax.lax.dynamic_update_index_in_dim(served, jnp.stack(result), step, 0)

    # Rows that are absent come last, and the loop ends before them.
    steps = greatest(jnp.sum(rows.present, dtype=jnp.int32))
    first, nothing = _table_of(servers), jnp.zeros((rows.ready_s.shape[0], 4), rows.ready_s.dtype)
    _, committed, served = jax.lax.fori_loop(0, steps, serve_one, (first, first, nothing))
    start_s, switch_s, end_s, dropped = served[place].T
    done = Served(
        start_s=jnp.where(rows.present, start_s, rows.ready_s),
        switch_s=jnp.where(rows.present, switch_s, 0.0),
        end_s=jnp.where(rows.present, end_s, rows.ready_s + rows.service_s),
        dropped=rows.present & (dropped > 0),
    )
    return done, _servers_of(committed, servers)


def load_models(
    servers: Servers, new: Bool[Array, "servers models"], load_s: Float[Array, "servers models"]
) -> Servers:
    """The servers, now holding `new` models as well, which they load from now (time 0) on.

    Each load takes a GPU as a task would: one after the other in the order of the catalogue, each on the GPU that is
    free first, behind what the server has already taken in.
    """
    gpus = jnp.arange(servers.free_s.shape[1])

    def load_one(
        free_s: Float[Array, "servers gpus"], model: tuple[Bool[Array, "servers"], Float[Array, "servers"]]
    ) -> tuple[Float[Array, "servers gpus"], Float[Array, "servers"]]:
        loads, takes_s = model
        end_s = jnp.maximum(jnp.min(free_s, axis=1), 0.0) + takes_s
        taken = loads[:, None] & (gpus == jnp.argmin(free_s, axis=1)[:, None])
        return jnp.where(taken, end_s[:, None], free_s), end_s

    assert servers.loaded_s is not None  # where it is chosen which models are held
    free_s, end_s = jax.lax.scan(load_one, servers.free_s, (new.T, load_s.T))
    return servers._replace(
        free_s=free_s, resident=servers.resident | new, loaded_s=jnp.where(new, end_s.T, servers.loaded_s)
    )


def _row_of(numbers: Float[Array, "7"]) -> Queued:
    """A row of the tasks, from its numbers."""
    row = Queued(*numbers)
    return row._replace(present=row.present > 0, server=row.server.astype(jnp.int32), model=row.model.astype(jnp.int32))


def _table_of(servers: Servers) -> Float[Array, "*servers columns"]:
    """All that is known of servers as numbers in one table."""
    columns = [servers.free_s, servers.resident.astype(servers.free_s.dtype), servers.used_s]
    return jnp.concatenate(columns if servers.loaded_s is None else [*columns, servers.loaded_s], axis=-1)


def _servers_of(table: Float[Array, "*servers columns"], like: Servers) -> Servers:
    """The servers of a table, or one of them, with as many GPUs and models as `like`."""
    gpus, models = like.free_s.shape[1], like.resident.shape[1]
    free_s, resident, used_s, loaded_s = jnp.split(table, [gpus, gpus + models, gpus + 2 * models], axis=-1)
    return Servers(free_s, resident > 0, used_s, None if like.loaded_s is None else loaded_s)


@jax.custom_batching.custom_vmap
def greatest(count: Int[Array, ""]) -> Int[Array, ""]:
    """The same count; under `vmap` the greatest of the batch, for all.

    The number of steps of a loop that does nothing in a step too many: with one number for the whole batch nothing need
    be masked in those that are done.
    """
    return count


@greatest.def_vmap
def _greatest_of_batch(size: int, batched: list[bool], count: Int[Array, "batch"]) -> tuple[Int[Array, ""], bool]:
    del size, batched
    return greatest(jnp.max(count, axis=0)), False


def local_queue(
    present: Bool[Array, "rows"],
    device: Int[Array, "rows"],
    backlog_s: Float[Array, "rows"],
    service_s: Float[Array, "rows"],
    latest_start_s: Float[Array, "rows"] | None,
) -> Served:
    """Tasks that stay on their device: first in, first out in row order behind the device's backlog.

    `backlog_s` is that of the row's own device at the slot start. With `latest_start_s` a task that would start later
    is discarded, which makes room for those after it; then the rows pass one by one.
    """
    zero = jnp.zeros_like(service_s)
    if latest_start_s is None:
        index = jnp.arange(service_s.shape[0])

        def wait(
            start_s: Float[Array, "rows"],
            number: Int[Array, ""],
            there: Bool[Array, ""],
            owner: Int[Array, ""],
            takes_s: Float[Array, ""],
        ) -> Float[Array, "rows"]:
            before = there & (number < index) & (owner == device)
            return start_s + jnp.where(before, takes_s, 0.0)

        start_s = over_rows(wait, backlog_s, present, device, service_s)
        return Served(start_s, zero, start_s + service_s, jnp.zeros_like(present))

    def serve_one(
        waiting_s: Float[Array, "rows"], row: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[Float[Array, "rows"], Served]:
        index, is_present, own_device, own_service_s, latest_s = row
        start_s = jnp.sum(jnp.where(jnp.arange(waiting_s.shape[0]) == index, waiting_s, 0.0))
        serve = is_present & (start_s <= latest_s)
        waiting_s = waiting_s + jnp.where(serve & (device == own_device), own_service_s, 0.0)
        return waiting_s, Served(start_s, jnp.zeros_like(start_s), start_s + own_service_s, is_present & ~serve)

    rows = (jnp.arange(service_s.shape[0]), present, device, service_s, latest_start_s)
    return jax.lax.scan(serve_one, backlog_s, rows)[1]


def models_kept(
    held: Bool[Array, "models"],
    used_s: Float[Array, "models"],
    wanted: Bool[Array, "models"],
    memory: Float[Array, "models"],
    room: Float[Array, ""],
) -> Bool[Array, "models"]:
    """Which of the models held stay when `wanted` (one of them, or none) comes: the most recently used that fit beside
    it."""
    # Entry [n, m]: n is no older than m, ties by number. Summed over rows, which a processor does for all m at once.
    index = jnp.arange(used_s.shape[0])
    first = index[:, None] <= index[None, :]
    newer = jnp.where(first, used_s[:, None] >= used_s[None, :], used_s[:, None] > used_s[None, :])
    recent_memory = jnp.sum(jnp.where(newer, jnp.where(held, memory, 0.0)[:, None], 0.0), axis=0)
    wanted_memory = jnp.sum(jnp.where(wanted, memory, 0.0))
    return held & (jnp.any(held & wanted) | (recent_memory + wanted_memory <= room))


def _before(
    rows: Queued, value: Float[Array, "rows"], combine: Callable[..., jax.Array], neutral: float
) -> Float[Array, "rows"]:
    """`combine` over the values of the rows that are served at the server of each row and no later, itself among them.

    Of an absent row nothing is said.
    """
    server = jnp.where(rows.present, rows.server, -1)  # absent rows are at none

    def take(
        found: Float[Array, "rows"],
        number: Int[Array, ""],
        ready_s: Float[Array, ""],
        at: Int[Array, ""],
        of_row: Float[Array, ""],
    ) -> Float[Array, "rows"]:
        before = (at == server) & not_later(ready_s, number, rows.ready_s)
        return combine(found, jnp.where(before, of_row, neutral))

    return over_rows(take, jnp.full_like(value, neutral), rows.ready_s, server, value)
