"""The table of uploads in flight: empty at the start, filled by the slots, packed to the front between them.

Where servers share their time it holds the tasks until they end (see `physics/sharing.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from gmel.scenario.schema import Failures
from gmel.simulator.plant import Switches
from gmel.simulator.state import Parts, SharedTask, Uploads

__all__ = [
    "each_part",
    "for_each_part",
    "in_cells",
    "interrupt",
    "keep",
    "no_uploads",
    "on_their_way",
    "under_way",
    "uploading",
]


def no_uploads(count: int, dtype: jnp.dtype, sizes: Switches) -> Uploads:
    """An empty table with the columns that the plant needs."""
    number, index = jnp.zeros(count, dtype), jnp.zeros(count, jnp.int32)
    return Uploads(
        present=jnp.zeros(count, bool),
        device=index,
        server=index,
        decided_slot=index,
        row=index,
        decided_s=number,
        generated_s=number,
        upload_start_s=number,
        ready_s=number,
        service_s=number,
        model=index,
        load_s=number,
        download_s=number,
        deadline_s=number,
        latency_s=number,
        cost=number,
        shared=SharedTask(number, jnp.zeros(count, bool), number, number) if sizes.shared else None,
        cell=index if sizes.routed else None,
        sent_s=number if sizes.routed else None,
        quality=number if sizes.quality else None,
        tx_power_w=number if sizes.power_options_dbm else None,
        units=number if sizes.discipline == "capacity" else None,
        gpus=index if sizes.discipline == "gang" else None,
        band_weight=number if sizes.band_weights else None,
        cpu_weight=number if sizes.cpu_weights else None,
        parts=_no_parts(count, dtype, sizes) if sizes.parts > 1 else None,
    )


def _no_parts(count: int, dtype: jnp.dtype, sizes: Switches) -> Parts:
    number, index = jnp.zeros((count, sizes.parts), dtype), jnp.zeros((count, sizes.parts), jnp.int32)
    return Parts(
        present=index > 0,
        server=index,
        upload_start_s=number,
        ready_s=number,
        service_s=number,
        download_s=number,
        start_s=number,
        switch_s=number,
        end_s=number,
        cell=index if sizes.routed else None,
        sent_s=number if sizes.routed else None,
    )


def each_part(tasks: Uploads) -> Uploads:
    """The parts of all tasks as tasks of their own, those of one task next to each other. Whole tasks stay as they
    are."""
    parts = tasks.parts
    if parts is None:
        return tasks
    rows = jax.tree.map(lambda field: for_each_part(field, tasks), tasks._replace(parts=None))
    flat = jax.tree.map(lambda field: field.reshape(-1), parts)
    return rows._replace(
        present=rows.present & flat.present,
        server=flat.server,
        upload_start_s=flat.upload_start_s,
        ready_s=flat.ready_s,
        service_s=flat.service_s,
        download_s=flat.download_s,
        cell=flat.cell,
        sent_s=flat.sent_s,
    )


def for_each_part(field: Shaped[Array, "tasks"], tasks: Uploads) -> Shaped[Array, "rows"]:
    """What is so of a task, for each of its parts, in the order of :func:`each_part`."""
    return field if tasks.parts is None else jnp.repeat(field, tasks.parts.present.shape[1], axis=0)


def under_way(tasks: Uploads) -> Uploads:
    """The table, with each part of a split task that has not reached its server in place of the task."""
    if tasks.parts is None:
        return tasks
    parts = each_part(tasks)
    return parts._replace(present=parts.present & (parts.ready_s >= 0))


def uploading(tasks: Uploads) -> Bool[Array, "uploads"]:
    """The tasks that use their link at the slot start. The table may hold others: forwarded, or shared servers."""
    if tasks.sent_s is not None:
        return tasks.present & (tasks.sent_s > 0)
    return tasks.present if tasks.shared is None else tasks.present & (tasks.ready_s > 0)


def on_their_way(tasks: Uploads) -> Bool[Array, "uploads"]:
    """The tasks that have not arrived at their server at the slot start."""
    return tasks.present if tasks.shared is None else tasks.present & (tasks.ready_s > 0)


def in_cells(tasks: Uploads, servers: int) -> Int[Array, "servers"] | Float[Array, "servers"]:
    """How many tasks, or parts of them, use each cell at the slot start; where uploads have weights, the sum of
    these."""
    tasks = under_way(tasks)
    cell = tasks.server if tasks.cell is None else tasks.cell
    if tasks.band_weight is None:
        return jnp.zeros(servers, jnp.int32).at[cell].add(uploading(tasks).astype(jnp.int32))
    weight = jnp.where(uploading(tasks), tasks.band_weight, 0.0)
    return jnp.zeros(servers, weight.dtype).at[cell].add(weight)


def keep(
    rows: Uploads, stay: Bool[Array, "rows"], capacity: int, slot_s: Float[Array, ""]
) -> tuple[Uploads, Int[Array, ""]]:
    """The rows that stay in flight, moved to the front, seen from the next slot start; and how many did not fit."""
    count = jnp.cumsum(stay, dtype=jnp.int32)
    places = jnp.where(stay, count - 1, capacity)
    source = jnp.zeros(capacity, jnp.int32).at[places].set(jnp.arange(stay.shape[0], dtype=jnp.int32), mode="drop")
    kept = jax.tree.map(lambda field: field[source], rows)
    kept = kept._replace(
        present=jnp.arange(capacity) < count[-1],
        decided_s=kept.decided_s - slot_s,
        generated_s=kept.generated_s - slot_s,
        upload_start_s=kept.upload_start_s - slot_s,
        ready_s=kept.ready_s - slot_s,
    )
    if kept.sent_s is not None:
        kept = kept._replace(sent_s=kept.sent_s - slot_s)
    if kept.parts is not None:
        kept = kept._replace(parts=_later(kept.parts, slot_s))
    if kept.shared is not None:
        kept = kept._replace(shared=kept.shared._replace(start_s=kept.shared.start_s - slot_s))
    return kept, jnp.maximum(count[-1] - capacity, 0)


def _later(parts: Parts, slot_s: Float[Array, ""]) -> Parts:
    """The parts, seen from the next slot start."""
    return parts._replace(
        upload_start_s=parts.upload_start_s - slot_s,
        ready_s=parts.ready_s - slot_s,
        start_s=parts.start_s - slot_s,
        end_s=parts.end_s - slot_s,
        sent_s=None if parts.sent_s is None else parts.sent_s - slot_s,
    )


def interrupt(tasks: Uploads, speed: Float[Array, "servers"], failures: Failures | None) -> Uploads:
    """Tasks in service on a server that is down: with `restart` they go back to the queue, all their work ahead."""
    if failures is None or failures.on_failure == "resume" or tasks.shared is None:
        return tasks
    stopped = tasks.shared.serving & (speed[tasks.server] == 0)
    return tasks._replace(
        shared=SharedTask(
            left_s=jnp.where(stopped, tasks.service_s, tasks.shared.left_s),
            serving=tasks.shared.serving & ~stopped,
            start_s=tasks.shared.start_s,
            switch_s=jnp.where(stopped, 0.0, tasks.shared.switch_s),
        )
    )
