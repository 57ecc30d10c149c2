"""Servers that work on several tasks at once: processor sharing, by weight too, batching, limits, failures.

One discipline holds them all, limited processor sharing (Zhang, Dai and Zwart 2009, "Law of large number limits of
limited processor-sharing queues"): a server takes at most `limit` tasks into service, the others wait first in, first
out in order of readiness; with n tasks in service each progresses at the rate

    r(n) = v / (1 + beta max(n - g, 0) / g)

seconds of service per second, with g GPUs, v the speed of the slot (0 while the server is down, below 1 for a
straggler) and beta the share of a denoising round that grows with the batch:

- beta = 1, no limit: processor sharing, g / n of the server each (equation (6), "shared");
- 0 < beta < 1: batching. A round of X tasks costs a X + b (STACKING, 2511.19847), so beta = a / (a + b) on one GPU; a
  task that joins is served from the next round on, here from its arrival (fluid: at most one round apart);
- beta = 0, limit g: first in, first out on g GPUs, as `queueing.fifo_many_gpus`.

With weights (beta = 1) it is discriminatory processor sharing (Kleinrock 1967, "Time-shared systems"; Fayolle, Mitrani
and Iasnogorodski 1980): the tasks in service share the GPUs in proportion to their weights, but none has more than one
GPU. What a task of great weight cannot use goes to the others: r_i = v min(1, w_i theta), theta such that the r_i add
up to v min(n, g) (water-filling). With equal weights this is r(n).

All times are seconds relative to the start of the slot. Exact: no event falls on a grid.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.physics.presence import Stays, next_present_s
from gmel.physics.queueing import models_kept

__all__ = ["Shared", "SharedServers", "Sharing", "share", "weighted_shares"]


class Sharing(NamedTuple):
    """Tasks at the servers or on their way to them, at the start of a slot."""

    present: Bool[Array, "rows"]
    server: Int[Array, "rows"]
    ready_s: Float[Array, "rows"]
    """When the upload ends (not positive: it has ended)."""
    left_s: Float[Array, "rows"]
    """Service still to be had, at the full rate of one GPU."""
    serving: Bool[Array, "rows"]
    """Whether it has started."""
    start_s: Float[Array, "rows"]
    """When it started, if it has."""
    switch_s: Float[Array, "rows"]
    """What it has been charged for loading its model, if it has started (part of `left_s`)."""
    model: Int[Array, "rows"]
    load_s: Float[Array, "rows"]
    latest_start_s: Float[Array, "rows"]
    weight: Float[Array, "rows"] | None = None
    """In proportion to which the tasks in service share the GPUs. None: equally, by the law with beta."""


class SharedServers(NamedTuple):
    """The servers: constants of the plant, the speed in this slot, and the models they hold."""

    gpus: Float[Array, "servers"]
    limit: Float[Array, "servers"]
    beta: Float[Array, "servers"]
    speed: Float[Array, "servers"]
    """Relative speed in this slot: 1 nominal, 0 down. After the slot the nominal speed is assumed."""
    resident: Bool[Array, "servers models"]
    used_s: Float[Array, "servers models"]
    places: Float[Array, "servers"] | None = None
    """Most tasks at the server at once, waiting or in service: one that comes then is rejected. None: no limit."""
    stays: Stays | None = None
    """When each is there: away, it starts nothing and goes on with what it has begun. None: always."""


class Shared(NamedTuple):
    """What became of the tasks if none is decided later, and where they stand at the end of the slot.

    `start_s`, `switch_s`, `end_s`, `dropped` as in `queueing.Served`. `left_s`, `serving` at the end of the slot; a row
    whose `end_s` is before it is done. `resident`, `used_s`: models at the end of the slot.
    """

    start_s: Float[Array, "rows"]
    switch_s: Float[Array, "rows"]
    end_s: Float[Array, "rows"]
    dropped: Bool[Array, "rows"]
    left_s: Float[Array, "rows"]
    serving: Bool[Array, "rows"]
    resident: Bool[Array, "servers models"]
    used_s: Float[Array, "servers models"]


class _Clock(NamedTuple):
    """The servers between two events; each has a time of its own."""

    now_s: Float[Array, "servers"]
    waiting: Bool[Array, "rows"]
    coming: Bool[Array, "rows"]
    serving: Bool[Array, "rows"]
    left_s: Float[Array, "rows"]
    start_s: Float[Array, "rows"]
    switch_s: Float[Array, "rows"]
    end_s: Float[Array, "rows"]
    dropped: Bool[Array, "rows"]
    resident: Bool[Array, "servers models"]
    used_s: Float[Array, "servers models"]
    at_horizon: "_Horizon"


class _Horizon(NamedTuple):
    """What stood at the end of the slot, written when a server passes it."""

    left_s: Float[Array, "rows"]
    serving: Bool[Array, "rows"]
    resident: Bool[Array, "servers models"]
    used_s: Float[Array, "servers models"]


def share(
    tasks: Sharing,
    servers: SharedServers,
    horizon_s: float | Float[Array, ""],
    model_memory: Float[Array, "models"],
    server_memory: Float[Array, "servers"],
    passes: int = 1,
) -> Shared:
    """Serves the tasks to the end, event by event: an arrival, a start, a completion, or the end of the slot.

    Every pass of the loop takes one event of each server. A task that would start after `latest_start_s` is discarded,
    and one that finds all `places` taken, or would start on a server that does not come back. A model that is not
    resident adds `load_s` to the service of the task that starts; the least recently used leave. `passes` is for tasks
    with weights, see :func:`weighted_shares`.

    Returns:
        The tasks served to the end, and all servers at `horizon_s`, which no later decision can change.
    """
    count = tasks.present.shape[0]
    number = jnp.arange(count)
    here = tasks.server[:, None] == jnp.arange(servers.gpus.shape[0])[None, :]
    models = servers.resident.shape[1]
    horizon_s = jnp.asarray(horizon_s, tasks.ready_s.dtype)
    first = _Clock(
        now_s=jnp.zeros_like(servers.speed),
        # What arrives at this very instant has yet to be let in.
        waiting=tasks.present & ~tasks.serving & (tasks.ready_s < 0),
        coming=tasks.present & ~tasks.serving & (tasks.ready_s >= 0),
        serving=tasks.present & tasks.serving,
        left_s=tasks.left_s,
        start_s=tasks.start_s,
        switch_s=tasks.switch_s,
        end_s=jnp.zeros_like(tasks.ready_s),
        dropped=jnp.zeros(count, bool),
        resident=servers.resident,
        used_s=servers.used_s,
        at_horizon=_Horizon(tasks.left_s, tasks.present & tasks.serving, servers.resident, servers.used_s),
    )

    def of_server(values: Float[Array, "servers"]) -> Float[Array, "rows"]:
        return values[tasks.server]

    def least(values: Float[Array, "rows"], rows: Bool[Array, "rows"]) -> Float[Array, "servers"]:
        return jnp.min(jnp.where(here & rows[:, None], values[:, None], jnp.inf), axis=0)

    def first_of(values: Float[Array, "rows"], rows: Bool[Array, "rows"]) -> Bool[Array, "rows"]:
        """The row of each server with the least value, ties by number."""
        best = of_server(least(values, rows))
        tied = rows & (values == best)
        lowest = jnp.min(jnp.where(here & tied[:, None], number[:, None], count), axis=0)
        return tied & (number == lowest[tasks.server])

    def one_event(clock: _Clock) -> _Clock:
        in_service = jnp.sum(here & clock.serving[:, None], axis=0).astype(clock.now_s.dtype)
        passed = clock.now_s >= horizon_s
        speed = jnp.where(passed, 1.0, servers.speed)
        rate = speed / (1.0 + servers.beta * jnp.maximum(in_service - servers.gpus, 0.0) / servers.gpus)
        # A server that is down starts nothing.
        admits = (in_service < servers.limit) & jnp.any(here & clock.waiting[:, None], axis=0) & (speed > 0)
        admits, back_s, gone = _there(servers.stays, clock.now_s, admits)
        # Times of the next arrival, completion, end of the slot.
        arrival_s = least(tasks.ready_s, clock.coming)
        row_rate = (
            of_server(rate)
            if tasks.weight is None
            else of_server(speed)
            * weighted_shares(tasks.weight, clock.serving, here, tasks.server, servers.gpus, passes)
        )
        done_s = of_server(clock.now_s) + clock.left_s / jnp.where(row_rate > 0, row_rate, 1.0)
        done_s = jnp.where(row_rate > 0, done_s, jnp.inf)
        completion_s = least(done_s, clock.serving)
        border_s = jnp.where(passed, jnp.inf, horizon_s)
        pause_s = border_s if back_s is None else jnp.minimum(border_s, back_s)
        next_s = jnp.minimum(jnp.minimum(arrival_s, completion_s), pause_s)
        idle = ~admits & ~jnp.isfinite(next_s)
        next_s = jnp.where(admits | idle, clock.now_s, jnp.maximum(next_s, clock.now_s))
        crossing = ~admits & ~passed & (next_s >= horizon_s)
        happens = ~admits & ~crossing
        happens = happens if back_s is None else happens & (jnp.minimum(arrival_s, completion_s) <= back_s)
        completes = happens & jnp.isfinite(completion_s) & (completion_s <= arrival_s)
        arrives = happens & ~completes & jnp.isfinite(arrival_s)
        # Work done until then.
        left_s = jnp.where(clock.serving, clock.left_s - row_rate * (of_server(next_s - clock.now_s)), clock.left_s)
        ends = first_of(done_s, clock.serving) & completes[tasks.server]
        joins = first_of(tasks.ready_s, clock.coming) & arrives[tasks.server]
        rejected = _rejected(clock, joins, here, tasks.server, servers.places)
        starts = first_of(tasks.ready_s, clock.waiting) & admits[tasks.server]
        late = starts & (of_server(next_s) > tasks.latest_start_s)
        late = late if gone is None else late | (starts & gone[tasks.server])
        served = starts & ~late
        after = clock._replace(
            now_s=next_s,
            coming=clock.coming & ~joins,
            waiting=(clock.waiting | (joins & ~rejected)) & ~starts,
            serving=(clock.serving | served) & ~ends,
            left_s=jnp.where(ends, 0.0, left_s),
            start_s=jnp.where(starts | rejected, of_server(next_s), clock.start_s),
            end_s=jnp.where(ends | late | rejected, of_server(next_s), clock.end_s),
            dropped=clock.dropped | late | rejected,
        )
        if models:
            after = _load_models(after, served, here, tasks, model_memory, server_memory)
        return _note_horizon(after, crossing, tasks.server)

    def unfinished(clock: _Clock) -> Bool[Array, ""]:
        return jnp.any(clock.coming | clock.waiting | clock.serving) | jnp.any(clock.now_s < horizon_s)

    last = jax.lax.while_loop(unfinished, one_event, first)
    at = last.at_horizon
    return Shared(
        start_s=last.start_s,
        switch_s=last.switch_s,
        end_s=last.end_s,
        dropped=last.dropped,
        left_s=at.left_s,
        serving=at.serving,
        resident=at.resident,
        used_s=at.used_s,
    )


def _there(
    stays: Stays | None, now_s: Float[Array, "servers"], wanted: Bool[Array, "servers"]
) -> tuple[Bool[Array, "servers"], Float[Array, "servers"] | None, Bool[Array, "servers"] | None]:
    """Which of the servers that could start a task do now; when each of the others is back; which never are.

    A task whose server does not come back starts, and is discarded then. Without stays nothing is ever away.
    """
    if stays is None:
        return wanted, None, None
    there_s = next_present_s(stays, now_s)
    gone = ~jnp.isfinite(there_s)
    back_s = jnp.where(wanted & (there_s > now_s), there_s, jnp.inf)
    return wanted & ~jnp.isfinite(back_s), back_s, gone


def _rejected(
    clock: _Clock,
    joins: Bool[Array, "rows"],
    here: Bool[Array, "rows servers"],
    server: Int[Array, "rows"],
    places: Float[Array, "servers"] | None,
) -> Bool[Array, "rows"]:
    """Which of the tasks that come find all places taken."""
    if places is None:
        return jnp.zeros_like(joins)
    there = jnp.sum(here & (clock.serving | clock.waiting)[:, None], axis=0)
    return joins & (there >= places)[server]


def _note_horizon(clock: _Clock, crossing: Bool[Array, "servers"], server: Int[Array, "rows"]) -> _Clock:
    """Writes down what stands where a server passes the end of the slot."""
    crossed, at = crossing[server], clock.at_horizon
    return clock._replace(
        at_horizon=_Horizon(
            left_s=jnp.where(crossed, clock.left_s, at.left_s),
            serving=jnp.where(crossed, clock.serving, at.serving),
            resident=jnp.where(crossing[:, None], clock.resident, at.resident),
            used_s=jnp.where(crossing[:, None], clock.used_s, at.used_s),
        )
    )


def weighted_shares(
    weight: Float[Array, "rows"],
    serving: Bool[Array, "rows"],
    here: Bool[Array, "rows servers"],
    server: Int[Array, "rows"],
    gpus: Float[Array, "servers"],
    passes: int,
) -> Float[Array, "rows"]:
    """Share of a GPU that each task in service has: min(1, weight x theta), all GPUs given away or everybody served.

    Args:
        weight: positive.
        serving: tasks in service; of others the result means nothing.
        here: whether a row is at a server.
        server: the server of each row.
        gpus: of each server.
        passes: at least the number of different weights or the most GPUs, whichever is less. Every pass but the last
            finds a weight that is worth a whole GPU, and fewer tasks than GPUs have one to themselves while others
            share.
    """

    def total(values: Float[Array, "rows"]) -> Float[Array, "servers"]:
        return jnp.sum(jnp.where(here & serving[:, None], values[:, None], 0.0), axis=0)

    whole = jnp.zeros_like(serving)
    share = jnp.ones_like(weight)
    for _ in range(passes):
        left = gpus - total(whole.astype(weight.dtype))
        sharers = total(jnp.where(whole, 0.0, weight))
        share = weight * (left / jnp.where(sharers > 0, sharers, 1.0))[server]
        whole = whole | (share >= 1.0)
    enough = total(jnp.ones_like(weight)) <= gpus
    return jnp.where(whole | enough[server], 1.0, share)


def _load_models(
    clock: _Clock,
    starting: Bool[Array, "rows"],
    here: Bool[Array, "rows servers"],
    tasks: Sharing,
    model_memory: Float[Array, "models"],
    server_memory: Float[Array, "servers"],
) -> _Clock:
    """Charges the tasks that start with loading their model where it is missing (at most one task a server)."""
    models = model_memory.shape[0]
    wanted = tasks.model[:, None] == jnp.arange(models)[None, :]
    # [servers, models]: the model that starts on each server.
    asked = jnp.any(here[:, :, None] & starting[:, None, None] & wanted[:, None, :], axis=0)
    busy = jnp.any(asked, axis=1)
    hit = jnp.any(asked & clock.resident, axis=1)
    kept = jax.vmap(models_kept, in_axes=(0, 0, 0, None, 0))(
        clock.resident, clock.used_s, asked, model_memory, server_memory
    )
    switch_s = jnp.where(hit[tasks.server], 0.0, tasks.load_s)
    return clock._replace(
        switch_s=jnp.where(starting, switch_s, clock.switch_s),
        left_s=jnp.where(starting, clock.left_s + switch_s, clock.left_s),
        resident=jnp.where(busy[:, None], kept | asked, clock.resident),
        used_s=jnp.where(asked, clock.now_s[:, None], clock.used_s),
    )
