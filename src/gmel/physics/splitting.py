"""Splitting a task over servers so that all its parts end together.

Source: AMCoEdge (arXiv 2512.17158), whose closed form x_k = (L - w_k) / d_k, L = (1 + sum w_k / d_k) / (sum 1 / d_k)
is this one where nothing is sent during the wait and no share is negative. The source sets negative shares to 0 and
rescales once, after which the parts no longer end together; here the set that takes part is found exactly.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Way", "equal_finish"]


class Way(NamedTuple):
    """What a part meets at each server; times in seconds, from now on.

    A part of share x is there at before_s + x send_s; it starts when the server is free too (wait_s), and takes
    x serve_s and after_s more, which is spent whatever its share is.
    """

    before_s: Float[Array, "*rows servers"]
    send_s: Float[Array, "*rows servers"]
    wait_s: Float[Array, "*rows servers"]
    serve_s: Float[Array, "*rows servers"]
    after_s: Float[Array, "*rows servers"]

    def end_s(self, share: Float[Array, "*rows servers"] | float) -> Float[Array, "*rows servers"]:
        """When a part of that share ends."""
        start_s = jnp.maximum(self.before_s + share * self.send_s, self.wait_s)
        return start_s + share * self.serve_s + self.after_s


def equal_finish(
    way: Way, chosen: Bool[Array, "*rows servers"]
) -> tuple[Float[Array, "*rows servers"], Float[Array, "*rows"]]:
    """Shares of a task at the chosen servers, at least one, with which all parts end at the same time and no earlier
    end is possible.

    The share that a server gets done by the time L, max(0, min((L - before - after) / (send + serve), (L - wait -
    after) / serve)), is piecewise linear in L. The pieces change where a server begins to take part, and where the
    sending of its part outlasts the wait. L is where the shares add up to one.

    Returns:
        Shares (0 where not chosen, or where a part would end later), which add up to one, and the common end in
        seconds. `serve_s` of the chosen servers must be above 0.
    """
    serve_s = jnp.where(chosen, way.serve_s, 1.0)
    free_s, reach_s = way.wait_s + way.after_s, way.before_s + way.after_s
    # From `first` on a server has a share; from `turn` on its part is sent for longer than the server is busy.
    first_s = jnp.maximum(free_s, reach_s)
    # Counted from the earliest of them, so that float32 tells a short task behind long queues.
    origin_s = jnp.min(jnp.where(chosen, first_s, jnp.inf), axis=-1, keepdims=True)
    free_s, reach_s, first_s = free_s - origin_s, reach_s - origin_s, first_s - origin_s
    waits, sends = way.wait_s > way.before_s, way.send_s > 0
    turn_s = free_s + (way.wait_s - way.before_s) * serve_s / jnp.where(sends, way.send_s, 1.0)
    turn_s = jnp.where(waits, jnp.where(sends, turn_s, jnp.inf), first_s)

    def done_by(end_s: Float[Array, "*rows ends"]) -> Float[Array, "*rows ends servers"]:
        each_s = end_s[..., :, None]
        sent = (each_s - reach_s[..., None, :]) / (way.send_s + serve_s)[..., None, :]
        served = (each_s - free_s[..., None, :]) / serve_s[..., None, :]
        return jnp.where(chosen[..., None, :], jnp.maximum(jnp.minimum(sent, served), 0.0), 0.0)

    kinks_s = jnp.where(
        jnp.concatenate([chosen, chosen & jnp.isfinite(turn_s)], axis=-1),
        jnp.concatenate([first_s, turn_s], axis=-1),
        jnp.inf,
    )
    finite_s = jnp.where(jnp.isfinite(kinks_s), kinks_s, 0.0)
    total = jnp.where(jnp.isfinite(kinks_s), jnp.sum(done_by(finite_s), axis=-1), jnp.inf)
    # The last kink before the end; at the earliest nothing is done yet.
    last_s = jnp.max(jnp.where(total <= 1.0, kinks_s, -jnp.inf), axis=-1)
    done = jnp.sum(done_by(last_s[..., None])[..., 0, :], axis=-1)
    slope = jnp.where(last_s[..., None] < turn_s, 1.0 / serve_s, 1.0 / (way.send_s + serve_s))
    rate = jnp.sum(jnp.where(chosen & (first_s <= last_s[..., None]), slope, 0.0), axis=-1)
    end_s = last_s + (1.0 - done) / rate
    share = done_by(end_s[..., None])[..., 0, :]
    # The rest is rounding; a single server has exactly the whole.
    return share / jnp.sum(share, axis=-1, keepdims=True), end_s + origin_s[..., 0]
