"""Devices that move: random waypoint, closed routes, and the channel along their way.

Every function is pure. Random quantities are made from uniforms on (0, 1) and standard normals that the caller draws,
so the same draws give the same motion and the same channel whatever the actions were.

**Random waypoint** (Johnson and Maltz 1996): a device stands for a while, picks a target anywhere in the hall and a
speed, goes there in a straight line, and begins again. Neither the place nor the speed of a device at some time has
the law from which targets and speeds are drawn: legs cross the middle of the hall, and slow legs last longer. The mean
speed is the harmonic mean of the law of speeds; with speeds down to 0 the mean time of a leg is infinite, no stationary
law exists, and the mean speed decays to 0 as long as one simulates (Yoon, Liu and Noble, "Random waypoint considered
harmful", INFOCOM 2003). So speeds are uniform on a range with a positive lower end, and :func:`first_walk` starts in
the stationary law (Navidi and Camp, "Stationary distributions for the random waypoint mobility model", IEEE Trans.
Mobile Computing 3(1), 2004), where nothing has to be simulated first and thrown away.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Int

from gmel.physics import channel

__all__ = [
    "Walk",
    "correlated_normal",
    "fading_power",
    "fading_step",
    "first_walk",
    "mean_leg_m",
    "normal_to_uniform",
    "route_length_m",
    "route_position_m",
    "walk",
]

Real: TypeAlias = Float[Array, "..."] | float
Sides: TypeAlias = Float[Array, "2"] | tuple[Real, Real]

_HALVINGS = 24  # of (0, 1): as fine as the uniforms of physics/random.py


class Walk(NamedTuple):
    """Where devices are and where they go next: each stands for `pause_s`, then goes to its target."""

    position_m: Float[Array, "devices 2"]
    target_m: Float[Array, "devices 2"]
    """End of the leg that the device is on, or will set off on after its pause."""
    speed_m_s: Float[Array, "devices"]
    """Speed on that leg; while `pause_s` is positive the device stands."""
    pause_s: Float[Array, "devices"]
    """Time left to pause before the leg; 0 on the leg itself."""


def mean_leg_m(hall_m: Sides) -> Float[Array, ""]:
    """Mean distance in metres of two independent uniform points of a rectangle: the mean leg of a random waypoint.

    0.5214 times the side of a square (Ghosh, "Random distances within a rectangle and between two rectangles", Bull.
    Calcutta Math. Soc. 43, 1951).
    """
    hall = _array(hall_m)
    one = jnp.ones((), hall.dtype)
    return 4.0 * (_weight_m(hall[0], hall[1], one) + _weight_m(hall[1], hall[0], one))


def first_walk(
    uniforms: Float[Array, "devices 8"],
    hall_m: Sides,
    speed_low_m_s: Real,
    speed_high_m_s: Real,
    pause_low_s: Real,
    pause_high_s: Real,
) -> Walk:
    """Random waypoint at a moment of its stationary law (Navidi and Camp 2004; without discarding any draw).

    A device stands with the share of time that pauses have: then it is anywhere in the hall with equal probability,
    and a long pause is likelier to be met than a short one. Otherwise it is at a uniform point of a leg, whose two ends
    have a density proportional to their distance, at a speed with a density proportional to its reciprocal.

    Args:
        uniforms: on (0, 1), independent.
        hall_m: sides of the rectangle in which the devices stay, from corner (0, 0).
        speed_low_m_s, speed_high_m_s: speeds are uniform in between. The lower one must be positive.
        pause_low_s, pause_high_s: pauses are uniform in between (0 and 0: none).
    """
    hall = _array(hall_m)
    dtype = uniforms.dtype
    standing_u, angle_u, length_u, x_u, y_u, along_u, speed_u, pause_u = jnp.unstack(uniforms, axis=1)

    # Mean of 1 / speed, log(high / low) / (high - low), also for a range of no width.
    spread = jnp.asarray(speed_high_m_s, dtype) / speed_low_m_s - 1.0
    some = jnp.where(spread > 0.0, spread, 1.0)
    slowness = jnp.where(spread > 0.0, jnp.log1p(some) / some, 1.0) / speed_low_m_s
    mean_pause_s = 0.5 * (jnp.asarray(pause_low_s, dtype) + pause_high_s)
    standing = standing_u * (mean_pause_s + mean_leg_m(hall) * slowness) < mean_pause_s

    size_m = _leg_m(angle_u, length_u, hall)
    # One number on (-1, 1) an axis: its sign is the direction of the leg, its size the place of the nearer end in the
    # room that the leg leaves.
    side = 2.0 * jnp.stack([x_u, y_u], axis=-1) - 1.0
    low_m = jnp.abs(side) * (hall - size_m)
    target_m = jnp.where(side > 0.0, low_m + size_m, low_m)
    start_m = jnp.where(side > 0.0, low_m, low_m + size_m)
    on_leg_m = start_m + along_u[:, None] * (target_m - start_m)

    # What is left of the pause that is met: a uniform share of it, the pause itself weighted by its length.
    left_s = pause_u * mean_pause_s
    pause_width_s = jnp.asarray(pause_high_s, dtype) - pause_low_s
    tail_s = pause_high_s - jnp.sqrt((1.0 - pause_u) * 2.0 * mean_pause_s * pause_width_s)
    left_s = jnp.where(left_s <= pause_low_s, left_s, tail_s)

    here, elsewhere = jnp.stack([angle_u, length_u], axis=-1), jnp.stack([x_u, y_u], axis=-1)
    return Walk(
        position_m=jnp.where(standing[:, None], here * hall, on_leg_m),
        target_m=jnp.where(standing[:, None], elsewhere * hall, target_m),
        speed_m_s=jnp.where(
            standing,
            speed_low_m_s + speed_u * (jnp.asarray(speed_high_m_s, dtype) - speed_low_m_s),
            speed_low_m_s * jnp.exp(speed_u * jnp.log1p(spread)),
        ),
        pause_s=jnp.where(standing, left_s, 0.0),
    )


def walk(
    state: Walk,
    duration_s: Real,
    uniforms: Float[Array, "devices 4"],
    hall_m: Sides,
    speed_low_m_s: Real,
    speed_high_m_s: Real,
    pause_low_s: Real,
    pause_high_s: Real,
) -> Walk:
    """Random waypoint after `duration_s`: exact, with at most one arrival of each device on the way.

    At the arrival the device draws its next target, speed and pause, and spends the rest of the time on them. Should it
    reach the new target as well, it waits there for the end of the step, and draws anew at the start of the next: the
    step should be short against a leg with its pause, or is best split.

    Args:
        state: at the start of the step.
        duration_s: length of the step.
        uniforms: on (0, 1), independent of those of all other steps: target (x, y), speed, pause. A device that does
            not arrive leaves them unused.
        hall_m, speed_low_m_s, speed_high_m_s, pause_low_s, pause_high_s: as :func:`first_walk`.
    """
    dtype = uniforms.dtype
    span_s = jnp.broadcast_to(jnp.asarray(duration_s, dtype), state.pause_s.shape)
    moved, left_s = _go(state, span_s)
    arrived = left_s >= 0.0
    drawn = Walk(
        position_m=state.target_m,
        target_m=uniforms[:, :2] * _array(hall_m),
        speed_m_s=speed_low_m_s + uniforms[:, 2] * (jnp.asarray(speed_high_m_s, dtype) - speed_low_m_s),
        pause_s=pause_low_s + uniforms[:, 3] * (jnp.asarray(pause_high_s, dtype) - pause_low_s),
    )
    turned, _ = _go(drawn, jnp.maximum(left_s, 0.0))
    return Walk(
        position_m=jnp.where(arrived[:, None], turned.position_m, moved.position_m),
        target_m=jnp.where(arrived[:, None], turned.target_m, moved.target_m),
        speed_m_s=jnp.where(arrived, turned.speed_m_s, moved.speed_m_s),
        pause_s=jnp.where(arrived, turned.pause_s, moved.pause_s),
    )


def route_length_m(corners_m: Float[Array, "routes points 2"]) -> Float[Array, "routes"]:
    """Length of closed routes in metres, the leg from the last corner back to the first included."""
    return jnp.sum(_route_legs(corners_m)[1], axis=-1)


def route_position_m(
    corners_m: Float[Array, "routes points 2"], route: Int[Array, "devices"], travelled_m: Float[Array, "devices"]
) -> Float[Array, "devices 2"]:
    """Place of vehicles on closed routes (automated guided vehicles) in metres.

    Args:
        corners_m: corners of each route in the order of travel; the last one leads back to the first. A route with
            fewer corners repeats its last one; legs of no length, wherever they are, change nothing.
        route: route of each device.
        travelled_m: way from the first corner, of any size or sign (the place repeats after :func:`route_length_m`).
            A caller that adds up steps does well to take the remainder: metres in single precision are coarse after
            long ways (8 mm after 100 km).
    """
    legs_m, length_m = _route_legs(corners_m)
    end_m = jnp.cumsum(length_m, axis=-1)[route]
    total_m = end_m[:, -1]
    # A route of one point only: everything is that point.
    along_m = jnp.mod(travelled_m, jnp.where(total_m > 0.0, total_m, 1.0))
    # Legs of no length end where they begin and are never the first to end later. The remainder may round up to the
    # whole length, which is the end of the last leg.
    leg = jnp.minimum(jnp.sum(end_m <= along_m[:, None], axis=-1), corners_m.shape[1] - 1)
    leg_m = length_m[route, leg]
    before_m = jnp.take_along_axis(end_m, leg[:, None], axis=-1)[:, 0] - leg_m
    share = jnp.clip((along_m - before_m) / jnp.where(leg_m > 0.0, leg_m, 1.0), 0.0, 1.0)
    return corners_m[route, leg] + share[:, None] * legs_m[route, leg]


def correlated_normal(
    value: Float[Array, "..."],
    moved_m: Real,
    innovation: Float[Array, "..."],
    distance_m: Real = channel.SHADOWING_DISTANCE_M,
) -> Float[Array, "..."]:
    """Standard normal of a link after its device has moved: AR(1), correlation exp(-|dx| / distance).

    For what changes with the place: shadowing in units of its standard deviation (TR 38.901 eq. 7.4-5; InF 10 m, Table
    7.5-6), or, through :func:`normal_to_uniform`, line of sight (InF: half the size of the clutter, Table 7.6.3.1-2).
    The process follows the way of the device: it does not remember a place to which the device comes back, and two
    devices at one place are independent.

    Args:
        value: standard normal at the old place.
        moved_m: distance from the old place to the new one.
        innovation: standard normal, independent of all before.
        distance_m: correlation distance, positive.
    """
    scaled_m = jnp.asarray(moved_m) * (channel.SHADOWING_DISTANCE_M / jnp.asarray(distance_m))
    return channel.ar1_step(value, channel.shadowing_correlation(scaled_m), innovation)


def normal_to_uniform(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """Uniform on the open interval (0, 1) of a standard normal: its distribution function.

    With it a state can be correlated along a way and yet have the right probability at every place: in line of sight
    where `normal_to_uniform(value) < los_probability(...)` is the hard form of TR 38.901 eq. 7.6-18. The state itself
    is less correlated than `value`: with probability 1/2, (2 / pi) arcsin(rho).
    """
    uniform = ndtr(value)
    limits = jnp.finfo(uniform.dtype)
    return jnp.clip(uniform, limits.tiny, 1.0 - limits.epsneg)


def fading_step(
    re: Float[Array, "..."],
    im: Float[Array, "..."],
    correlation: Real,
    innovation_re: Float[Array, "..."],
    innovation_im: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Next complex Rayleigh gain h' = rho h + sqrt(1 - rho^2) w, an AR(1) process.

    The parts are in units of their standard deviation, h = (re + i im) / sqrt(2) with mean power 1: standard normals at
    the start, standard normals as innovations. `correlation` is that of h, from
    :func:`gmel.physics.channel.jakes_correlation`; powers have its square (Jakes, "Microwave mobile communications",
    1974).
    """
    return channel.ar1_step(re, correlation, innovation_re), channel.ar1_step(im, correlation, innovation_im)


def fading_power(re: Float[Array, "..."], im: Float[Array, "..."]) -> Float[Array, "..."]:
    """Power gain |h|^2 of a gain as in :func:`fading_step`: exponential with mean 1."""
    return 0.5 * (re * re + im * im)


def _array(sides_m: Sides) -> Float[Array, "2"]:
    return jnp.asarray(sides_m, jnp.result_type(float))


def _go(state: Walk, span_s: Float[Array, "devices"]) -> tuple[Walk, Float[Array, "devices"]]:
    """Pause and leg of each device for a time, to the target at most; and the time left there (negative: not there)."""
    way_m = state.target_m - state.position_m
    need_s = jnp.sqrt(jnp.sum(way_m * way_m, axis=-1)) / state.speed_m_s
    left_s = span_s - state.pause_s - need_s
    there = left_s >= 0.0
    ride_s = jnp.maximum(span_s - state.pause_s, 0.0)
    share = jnp.minimum(ride_s / jnp.where(need_s > 0.0, need_s, 1.0), 1.0)
    return Walk(
        position_m=jnp.where(there[:, None], state.target_m, state.position_m + share[:, None] * way_m),
        target_m=state.target_m,
        speed_m_s=state.speed_m_s,
        pause_s=jnp.maximum(state.pause_s - span_s, 0.0),
    ), left_s


# Legs weighted by their length, in a hall of sides a and b. The density of |dx| and |dy| is (a - |dx|) (b - |dy|) times
# the length. Where |dx| / a > |dy| / b, put |dx| = a t and |dy| = b t k: the density in t and k, both on (0, 1), is
#     t^2 (1 - t) (1 - k t) sqrt(a^2 + b^2 k^2),
# whose integral over t is (1/12 - k/20) sqrt(a^2 + b^2 k^2). The others are the same with x and y exchanged.


def _weight_m(along_m: Real, across_m: Real, slant: Float[Array, "..."]) -> Float[Array, "..."]:
    """Integral over k from 0 to `slant` of (1/12 - k/20) sqrt(along^2 + across^2 k^2)."""
    rise_m = across_m * slant
    root_m = jnp.hypot(along_m, rise_m)
    first = 0.5 * (slant * root_m + along_m**2 / across_m * jnp.arcsinh(rise_m / along_m))
    # (root^3 - along^3) / (3 across^2), without the difference
    second = slant**2 * (root_m**2 + root_m * along_m + along_m**2) / (3.0 * (root_m + along_m))
    return first / 12.0 - second / 20.0


def _leg_m(
    angle_u: Float[Array, "devices"], length_u: Float[Array, "devices"], hall_m: Float[Array, "2"]
) -> Float[Array, "devices 2"]:
    """|dx| and |dy| of a leg whose ends have a density proportional to their distance, by inversion."""
    one = jnp.ones((), hall_m.dtype)
    both_m = jnp.stack([_weight_m(hall_m[0], hall_m[1], one), _weight_m(hall_m[1], hall_m[0], one)])
    sought_m = angle_u * jnp.sum(both_m)
    along_x = sought_m < both_m[0]
    sought_m = jnp.where(along_x, sought_m, sought_m - both_m[0])
    along_m = jnp.where(along_x, hall_m[0], hall_m[1])
    across_m = jnp.where(along_x, hall_m[1], hall_m[0])
    slant = _bisect(lambda k: _weight_m(along_m, across_m, k), sought_m)

    def below(t: Float[Array, "devices"]) -> Float[Array, "devices"]:
        return t**3 * (1.0 / 3.0 - t * (0.25 * (1.0 + slant) - 0.2 * t * slant))

    size = _bisect(below, length_u * below(jnp.ones_like(slant)))
    longer_m, shorter_m = along_m * size, across_m * size * slant
    return jnp.stack([jnp.where(along_x, longer_m, shorter_m), jnp.where(along_x, shorter_m, longer_m)], axis=-1)


def _bisect(rising: Callable[[jax.Array], jax.Array], sought: Float[Array, "devices"]) -> Float[Array, "devices"]:
    """Where a rising function on (0, 1) takes the value sought."""

    def halve(number: Int[Array, ""] | int, low: Float[Array, "devices"]) -> Float[Array, "devices"]:
        middle = low + jnp.exp2(-1.0 - jnp.asarray(number, low.dtype))
        return jnp.where(rising(middle) < sought, middle, low)

    low = jax.lax.fori_loop(0, _HALVINGS, halve, jnp.zeros_like(sought))
    return low + math.ldexp(0.5, -_HALVINGS)


def _route_legs(
    corners_m: Float[Array, "routes points 2"],
) -> tuple[Float[Array, "routes points 2"], Float[Array, "routes points"]]:
    """Leg from each corner to the next, and its length."""
    legs_m = jnp.roll(corners_m, -1, axis=1) - corners_m
    return legs_m, jnp.sqrt(jnp.sum(legs_m * legs_m, axis=-1))
