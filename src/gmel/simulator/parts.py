"""Tasks that are split over servers: which servers, which shares, and the way of the parts to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from gmel.physics.splitting import Way, equal_finish
from gmel.simulator.levels import Manner
from gmel.simulator.plant import Plant
from gmel.simulator.sending import Sending, send
from gmel.simulator.state import Parts, State

__all__ = ["Split", "at_members", "parts_on_their_way", "send_parts", "split_over", "unique_split"]


class Split(NamedTuple):
    """A task over a few servers; the first is the one that was chosen. Where a share is 0 there is no part."""

    server: Int[Array, "*choices parts"]
    share: Float[Array, "*choices parts"]


def split_over(
    way: Way,
    usable: Bool[Array, "requests servers"],
    server: Int[Array, "requests *places"],
    parts: Int[Array, "requests *places"] | int,
    most: int,
) -> Split:
    """Each task over `parts` servers, at most `most`: `server` and those others where the whole task would end first,
    with the shares of :func:`gmel.physics.splitting.equal_finish`. Where fewer are usable: over fewer."""
    order = jnp.argsort(jnp.where(usable, way.end_s(1.0), jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    places = server.reshape(server.shape[0], -1)
    own_rank = jnp.take_along_axis(rank, places, axis=1)
    number = jnp.arange(1, most)
    # The others in their order, without the server itself.
    others = number - 1 + (number - 1 >= own_rank[..., None])
    rows = jnp.arange(places.shape[0])[:, None, None]
    member = jnp.concatenate([places[..., None], order[rows, others]], axis=-1)
    wanted = jnp.broadcast_to(jnp.asarray(parts), server.shape).reshape(places.shape)
    chosen = (jnp.arange(most) < wanted[..., None]) & usable[rows, member]
    chosen = chosen.at[..., 0].set(True)
    share, _ = equal_finish(Way(*(field[rows, member] for field in way)), chosen)
    shape = (*server.shape, most)
    return Split(member.reshape(shape).astype(jnp.int32), share.reshape(shape))


def unique_split(split: Split, over_fewer: list[Split], servers: int) -> Bool[Array, "requests servers"]:
    """Which places stand for a split of their own, in `split` of all places over the same number of servers.

    Where a set of servers is the same whichever of them is chosen, the one with the largest share stands for it; where
    a split over fewer servers comes to the same, that does. A server without a share stands for nothing.
    """
    own, there = split.share[..., 0], _members(split, servers, split.server.shape[-1])
    alike = jnp.all(there[:, :, None] == there[:, None, :], axis=-1)
    index = jnp.arange(servers)
    larger = own[:, None, :] > own[:, :, None]
    first = (own[:, None, :] == own[:, :, None]) & (index[None, :] < index[:, None])
    again = jnp.any(alike & (larger | first), axis=2)
    for other in over_fewer:
        same = jnp.all(there[:, :, None] == _members(other, servers, there.shape[-1])[:, None, :], axis=-1)
        again = again | jnp.any(same & (other.share[:, None, :, 0] > 0), axis=2)
    return (own > 0) & ~again


def _members(split: Split, servers: int, most: int) -> Int[Array, "requests places parts"]:
    """The servers that have a part, in rising order; behind them the number `servers`, up to `most` columns."""
    member = jnp.sort(jnp.where(split.share > 0, split.server, servers), axis=-1)
    return jnp.pad(member, ((0, 0), (0, 0), (0, most - member.shape[-1])), constant_values=servers)


def at_members(
    field: Num[Array, "... servers"], server: Int[Array, "requests servers parts"]
) -> Num[Array, "requests servers parts"]:
    """What is known of each server, of the servers of each split."""
    rows = jnp.arange(server.shape[0])[:, None, None]
    return jnp.broadcast_to(field, server.shape[:2])[rows, server]


def send_parts(plant: Plant, state: State, remote: Bool[Array, "requests"], split: Split, how: Manner) -> Sending:
    """The uploads of all parts of a slot together, those of a task next to each other."""
    count = split.server.shape[1]
    share = split.share.reshape(-1)
    each = jax.tree.map(lambda field: jnp.repeat(field, count, axis=0), state.requests)
    each = each._replace(size_bit=each.size_bit * share, bits_out=each.bits_out * share)
    parts = jnp.repeat(remote, count) & (share > 0)
    alike = jax.tree.map(lambda field: jnp.repeat(field, count, axis=0), how)
    return send(plant, state._replace(requests=each), parts, split.server.reshape(-1), alike)


def parts_on_their_way(
    plant: Plant,
    split: Split,
    way: Sending,
    local: Bool[Array, "requests"],
    own_service_s: Float[Array, "requests"],
    work: Float[Array, "requests"],
) -> Parts:
    """The parts of new tasks. A task on its device is one part, and is not sent."""
    away = ~local[:, None]

    def of(field: Float[Array, "rows"]) -> Float[Array, "requests parts"]:
        return jnp.where(away, field.reshape(split.share.shape), 0.0)

    service_s = work[:, None] * split.share / plant.server_speed[split.server]
    service_s = jnp.where(away, service_s, own_service_s[:, None])
    ready_s = of(way.ready_s)
    return Parts(
        present=split.share > 0,
        server=split.server,
        upload_start_s=of(way.start_s),
        ready_s=ready_s,
        service_s=service_s,
        download_s=of(way.download_s),
        start_s=ready_s,
        switch_s=jnp.zeros_like(ready_s),
        end_s=ready_s + service_s,
        cell=None if way.cell is None else way.cell.reshape(split.server.shape),
        sent_s=None if way.cell is None else of(way.sent_s),
    )
