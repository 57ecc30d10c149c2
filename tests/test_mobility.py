"""Motion and the channel along it: exact legs, stationary laws beside independent samplers, routes, correlations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.physics import channel, mobility
from gmel.physics.mobility import Walk

# Statistics are z-scores or p-values of fixed numbers: the bounds fail a right law about once in 10^5.
Z_LIMIT, P_LIMIT = 4.5, 1e-5
HALL = (60.0, 25.0)
SPEEDS = (0.5, 2.5)
PAUSES = (2.0, 30.0)
ARGUMENTS = (HALL, *SPEEDS, *PAUSES)

step = jax.jit(mobility.walk)
start = jax.jit(mobility.first_walk)


def uniforms(shape, seed):
    """On (0, 1): cells of 2^-23 at their centres, as physics/random.py draws them."""
    return jnp.asarray((np.random.default_rng(seed).integers(0, 2**23, shape) + 0.5) * 2.0**-23, jnp.float32)


def normals(count, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(count), jnp.float32)


def z_score(sample, mean):
    sample = np.asarray(sample, float)
    return (sample.mean() - mean) / (sample.std() / math.sqrt(sample.size))


def one_device(position, target, speed, pause):
    return Walk(*(jnp.array([x], jnp.float32) for x in (position, target, speed, pause)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def after(state, key, steps, step_s, arguments=ARGUMENTS):
    """Many steps with draws of their own."""

    def one(state, key):
        draws = jax.random.uniform(key, (state.pause_s.shape[0], 4), minval=1e-7)
        return mobility.walk(state, step_s, draws, *arguments), None

    return jax.lax.scan(one, state, jax.random.split(key, steps))[0]


def legs_by_rejection(count, hall, seed):
    """Ends of legs with a density proportional to their length."""
    rng, found = np.random.default_rng(seed), []
    while sum(map(len, found)) < count:
        ends = rng.random((4 * count, 2, 2)) * hall
        length = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=-1)
        found.append(ends[rng.random(4 * count) * math.hypot(*hall) < length])
    return np.concatenate(found)[:count]


def variance_on_legs(hall):
    """Variance of x and y of a device on its way, by quadrature.

    Given dx, the middle of the leg is uniform in what room it leaves, and the place uniform on it.
    """
    a, b = hall

    def integral(of):
        def density(y, x):
            return of(x, y) * (a - x) * (b - y) * math.hypot(x, y)

        return scipy.integrate.dblquad(density, 0, a, 0, b)[0]

    whole = integral(lambda x, y: 1.0)
    return [
        integral(lambda x, y: (a - x) ** 2 + x**2) / whole / 12,
        integral(lambda x, y: (b - y) ** 2 + y**2) / whole / 12,
    ]


# Random waypoint: the laws


def test_mean_leg_is_the_one_of_ghosh():
    assert float(mobility.mean_leg_m((1.0, 1.0))) == pytest.approx(0.5214054, rel=1e-6)
    for a, b in [(60.0, 25.0), (25.0, 60.0), (120.0, 60.0), (7.0, 300.0)]:
        d = math.hypot(a, b)
        polynomial = (a**3 / b**2 + b**3 / a**2 + d * (3 - a**2 / b**2 - b**2 / a**2)) / 15
        expected = polynomial + (b**2 / a * math.acosh(d / b) + a**2 / b * math.acosh(d / a)) / 6
        assert float(mobility.mean_leg_m((a, b))) == pytest.approx(expected, rel=2e-6)
    assert float(mobility.mean_leg_m((90.0, 1e-3))) == pytest.approx(30.0, rel=1e-4)


@pytest.mark.parametrize("hall", [HALL, (10.0, 200.0), (40.0, 40.0)])
def test_first_walk_is_on_legs_as_rejection_finds_them(hall):
    count = 60_000
    state = start(uniforms((count, 8), 1), hall, *SPEEDS, 0.0, 0.0)
    assert (np.asarray(state.pause_s) == 0.0).all()
    place, target = np.asarray(state.position_m, float), np.asarray(state.target_m, float)
    ends = legs_by_rejection(count, hall, 2)
    other = ends[:, 0] + np.random.default_rng(3).random((count, 1)) * (ends[:, 1] - ends[:, 0])
    middle = np.array(hall) / 2

    def views(place, target):
        way = target - place
        yield from place.T
        yield from target.T
        yield np.linalg.norm(way, axis=-1)
        yield np.arctan2(way[:, 1], way[:, 0])
        yield np.linalg.norm(place - middle, axis=-1)
        yield (way * (place - middle)).sum(axis=-1)
        yield (target - middle)[:, 0] * (target - middle)[:, 1]

    for mine, theirs in zip(views(place, target), views(other, ends[:, 1]), strict=True):
        assert scipy.stats.ks_2samp(mine, theirs).pvalue > P_LIMIT
    low, high = SPEEDS
    logarithm = np.log(np.asarray(state.speed_m_s, float) / low) / math.log(high / low)
    assert scipy.stats.kstest(logarithm, "uniform").pvalue > P_LIMIT


def test_first_walk_in_a_corridor_has_the_parabola():
    state = start(uniforms((60_000, 8), 4), (80.0, 1e-2), *SPEEDS, 0.0, 0.0)
    along = np.asarray(state.position_m[:, 0], float) / 80.0
    assert scipy.stats.kstest(along, scipy.stats.beta(2, 2).cdf).pvalue > P_LIMIT  # 6 x (1 - x)


def test_first_walk_with_pauses():
    count = 100_000
    state = start(uniforms((count, 8), 5), *ARGUMENTS)
    low, high = SPEEDS
    ride_s = float(mobility.mean_leg_m(HALL)) * math.log(high / low) / (high - low)
    share = np.mean(PAUSES) / (np.mean(PAUSES) + ride_s)
    standing = np.asarray(state.pause_s) > 0.0
    assert abs(z_score(standing, share)) < Z_LIMIT
    place, target = np.asarray(state.position_m)[standing], np.asarray(state.target_m)[standing]
    for axis in range(2):
        assert scipy.stats.kstest(place[:, axis] / HALL[axis], "uniform").pvalue > P_LIMIT
        assert scipy.stats.kstest(target[:, axis] / HALL[axis], "uniform").pvalue > P_LIMIT
    speed = np.asarray(state.speed_m_s)[standing]
    assert scipy.stats.kstest((speed - low) / (high - low), "uniform").pvalue > P_LIMIT
    # What is left of a pause met at random: density P(pause > s) / mean pause.
    pause = np.asarray(state.pause_s, float)[standing]

    def distribution(s):
        least, most = PAUSES
        over = np.clip(s - least, 0.0, None)
        return (s - over**2 / (2 * (most - least))) / np.mean(PAUSES)

    assert scipy.stats.kstest(pause, distribution).pvalue > P_LIMIT


@pytest.mark.parametrize("begin", ["stationary", "fresh"])
def test_long_run_has_the_stationary_law(begin):
    """From the stationary start at once; from a uniform one after a while."""
    count = 20_000
    if begin == "stationary":
        state = after(start(uniforms((count, 8), 6), *ARGUMENTS), jax.random.key(7), 10, 2.0)
    else:
        u = uniforms((count, 5), 8)
        fresh = Walk(u[:, :2] * jnp.array(HALL), u[:, 2:4] * jnp.array(HALL), 0.5 + 2.0 * u[:, 4], 0.0 * u[:, 4])
        state = after(fresh, jax.random.key(9), 400, 2.0)
    low, high = SPEEDS
    ride_s = float(mobility.mean_leg_m(HALL)) * math.log(high / low) / (high - low)
    standing = np.asarray(state.pause_s) > 0.0
    assert abs(z_score(standing, np.mean(PAUSES) / (np.mean(PAUSES) + ride_s))) < Z_LIMIT
    # The mean speed on the way is the harmonic mean of the law of speeds, below its mean.
    speed = np.asarray(state.speed_m_s)[~standing]
    assert abs(z_score(speed, (high - low) / math.log(high / low))) < Z_LIMIT
    assert z_score(speed, (high + low) / 2) < -20
    middle = np.array(HALL) / 2
    squares = (np.asarray(state.position_m, float) - middle) ** 2
    for axis, variance in enumerate(variance_on_legs(HALL)):
        assert abs(z_score(squares[~standing, axis], variance)) < Z_LIMIT
        assert variance < HALL[axis] ** 2 / 12  # on the way devices are in the middle
        assert abs(z_score(squares[standing, axis], HALL[axis] ** 2 / 12)) < Z_LIMIT
    # The rest of the leg, against the stationary start.
    other = start(uniforms((count, 8), 10), *ARGUMENTS)
    for view in (lambda s: np.linalg.norm(s.target_m - s.position_m, axis=-1), lambda s: np.asarray(s.pause_s)):
        assert scipy.stats.ks_2samp(view(state), view(other)).pvalue > P_LIMIT


def test_speeds_and_pauses_of_no_width():
    state = start(uniforms((1000, 8), 11), HALL, 1.5, 1.5, 4.0, 4.0)
    np.testing.assert_allclose(state.speed_m_s, 1.5, rtol=1e-6)
    pause = np.asarray(state.pause_s)
    assert ((pause >= 0.0) & (pause <= 4.0)).all()
    assert scipy.stats.kstest(pause[pause > 0.0] / 4.0, "uniform").pvalue > P_LIMIT
    share = 4.0 / (4.0 + float(mobility.mean_leg_m(HALL)) / 1.5)
    assert abs(z_score(pause > 0.0, share)) < Z_LIMIT


# Random waypoint: the motion


def test_step_by_hand():
    hall, draws = (100.0, 100.0), jnp.array([[0.5, 0.9, 0.25, 0.5]])  # target (50, 90), 1.5 m/s, pause 3 s

    def go(state, duration_s):
        state = mobility.walk(state, duration_s, draws, hall, 1.0, 3.0, 2.0, 4.0)
        return [np.asarray(field)[0] for field in state]

    begin = one_device((20.0, 50.0), (50.0, 50.0), 2.0, 5.0)
    for duration_s, place, target, speed, pause in [
        (0.0, (20, 50), (50, 50), 2.0, 5.0),
        (4.0, (20, 50), (50, 50), 2.0, 1.0),
        (9.0, (28, 50), (50, 50), 2.0, 0.0),
        (20.0, (50, 50), (50, 90), 1.5, 3.0),  # arrives at the very end
        (22.0, (50, 50), (50, 90), 1.5, 1.0),
        (25.0, (50, 53), (50, 90), 1.5, 0.0),
        (200.0, (50, 90), (50, 90), 1.5, 0.0),  # a second arrival waits for the end of the step
    ]:
        for result, expected in zip(go(begin, duration_s), (place, target, speed, pause), strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-6)
    # and turns at the start of the next
    waiting = one_device((50.0, 10.0), (50.0, 10.0), 1.0, 0.0)
    for result, expected in zip(go(waiting, 13.0), ((50, 25), (50, 90), 1.5, 0.0), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30), duration_s=st.floats(0.0, 200.0, width=32))
def test_step_stays_in_the_hall_and_within_reach(seed, duration_s):
    state = start(uniforms((64, 8), seed), *ARGUMENTS)
    moved = step(state, jnp.float32(duration_s), uniforms((64, 4), seed + 1), *ARGUMENTS)
    way = np.linalg.norm(np.asarray(moved.position_m - state.position_m), axis=-1)
    assert (way <= SPEEDS[1] * duration_s * (1 + 1e-5) + 1e-4).all()
    for field in (moved.position_m, moved.target_m, state.position_m, state.target_m):
        assert ((np.asarray(field) >= 0.0) & (np.asarray(field) <= np.array(HALL) * (1 + 1e-6))).all()
    speed, pause = np.asarray(moved.speed_m_s), np.asarray(moved.pause_s)
    assert ((speed >= SPEEDS[0] * (1 - 1e-6)) & (speed <= SPEEDS[1] * (1 + 1e-6))).all()
    assert ((pause >= 0.0) & (pause <= PAUSES[1])).all()
    # Who does not turn follows his leg at his speed.
    same = (np.asarray(moved.target_m) == np.asarray(state.target_m)).all(axis=-1)
    ride_s = np.maximum(duration_s - np.asarray(state.pause_s), 0.0)
    np.testing.assert_allclose(way[same], (ride_s * np.asarray(state.speed_m_s))[same], rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30), duration_s=st.floats(0.125, 15.0, width=32), share=st.floats(0.0, 1.0, width=32))
def test_a_step_in_two_is_the_same_step(seed, duration_s, share):
    state, draws = start(uniforms((64, 8), seed), *ARGUMENTS), uniforms((64, 4), seed + 1)
    whole = step(state, jnp.float32(duration_s), draws, *ARGUMENTS)
    first_s = jnp.float32(duration_s * share)
    split = step(step(state, first_s, draws, *ARGUMENTS), jnp.float32(duration_s) - first_s, draws, *ARGUMENTS)
    # All but those who arrive twice.
    rest = np.linalg.norm(np.asarray(whole.target_m - whole.position_m), axis=-1)
    once = (rest > 0.01) | (np.asarray(whole.pause_s) > 0.01)
    assert once.mean() > 0.8
    # A device that arrives at the very end may count as there in one way of reckoning and not in the other.
    same = (np.asarray(whole.target_m) == np.asarray(split.target_m)).all(axis=-1)
    assert (once & ~same).sum() <= 2
    for one, two in zip(whole, split, strict=True):
        np.testing.assert_allclose(np.asarray(one)[once & same], np.asarray(two)[once & same], rtol=1e-4, atol=1e-3)


def test_walk_under_vmap_with_laws_of_their_own():
    draws = uniforms((3, 16, 8), 14)
    low, high = jnp.linspace(0.5, 1.0, 16), jnp.linspace(1.0, 3.0, 16)

    def two(u):
        state = mobility.first_walk(u, HALL, low, high, 0.0, 5.0)
        return state, mobility.walk(state, 4.0, u[:, :4], HALL, low, high, 0.0, 5.0)

    first, second = jax.jit(jax.vmap(two))(draws)
    assert second.position_m.shape == (3, 16, 2)
    alone = jax.jit(two)(draws[1])
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves((first, second)), strict=True):
        np.testing.assert_allclose(one, many[1], rtol=1e-5, atol=1e-5)
    for state in (first, second):
        speed = np.asarray(state.speed_m_s)
        assert ((speed >= np.asarray(low) * (1 - 1e-6)) & (speed <= np.asarray(high) * (1 + 1e-6))).all()


def test_walk_in_double_precision():
    with jax.enable_x64(True):
        u = jnp.asarray(np.random.default_rng(15).random((50, 8)))
        state = start(u, *ARGUMENTS)
        moved = step(state, 20.0, u[:, :4], *ARGUMENTS)
        assert {field.dtype for field in (*state, *moved)} == {jnp.dtype("float64")}


# Closed routes


place_on_route = jax.jit(mobility.route_position_m)


def test_rectangle_by_hand():
    corners = jnp.array([[[0.0, 0.0], [30.0, 0.0], [30.0, 10.0], [0.0, 10.0]]])
    np.testing.assert_allclose(mobility.route_length_m(corners), [80.0])
    travelled = jnp.array([0.0, 12.0, 30.0, 35.0, 40.0, 55.0, 70.0, 78.0, 80.0, 92.0, -2.0, 812.0])
    places = place_on_route(corners, jnp.zeros(12, jnp.int32), travelled)
    expected = [
        (0, 0),
        (12, 0),
        (30, 0),
        (30, 5),
        (30, 10),
        (15, 10),
        (0, 10),
        (0, 2),
        (0, 0),
        (12, 0),
        (0, 2),
        (12, 0),
    ]
    np.testing.assert_allclose(places, expected, atol=1e-4)


def test_padding_and_legs_of_no_length_change_nothing():
    triangle = [[5.0, 5.0], [25.0, 5.0], [5.0, 20.0]]
    corners = jnp.array(
        [
            [*triangle, triangle[-1], triangle[-1], triangle[-1]],
            [triangle[0], triangle[0], triangle[1], triangle[1], triangle[2], triangle[2]],
            [*triangle, triangle[0], triangle[0], triangle[0]],
            [[7.0, 8.0]] * 6,
        ]
    )
    np.testing.assert_allclose(mobility.route_length_m(corners), [60.0, 60.0, 60.0, 0.0], rtol=1e-6)
    travelled = jnp.linspace(-70.0, 200.0, 541)
    plain = place_on_route(jnp.array([triangle]), jnp.zeros(541, jnp.int32), travelled)
    for route in range(3):
        same = place_on_route(corners, jnp.full(541, route), travelled)
        np.testing.assert_allclose(same, plain, atol=1e-4)
    point = place_on_route(corners, jnp.full(541, 3), travelled)
    np.testing.assert_array_equal(point, np.broadcast_to([7.0, 8.0], (541, 2)).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    corners=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=6, max_size=6),
    distinct=st.integers(1, 6), begin_m=st.floats(-300.0, 300.0, width=32),
)  # fmt: skip
def test_route_is_followed_at_constant_speed(corners, distinct, begin_m):
    corners = [*corners[:distinct], *[corners[distinct - 1]] * (6 - distinct)]
    closed = np.array([*corners, corners[0]], float)
    ends = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=-1))])
    total, table = ends[-1], jnp.array([[[0.0, 0.0]] * 6, corners], jnp.float32)
    assert float(mobility.route_length_m(table)[1]) == pytest.approx(total, rel=1e-5)
    travelled = np.float32(begin_m) + np.arange(200, dtype=np.float32) * np.float32(0.75)
    places = np.asarray(place_on_route(table, jnp.ones(200, jnp.int32), jnp.asarray(travelled)))
    along = np.mod(travelled.astype(float), total) if total > 0 else np.zeros(200)
    expected = np.stack([np.interp(along, ends, closed[:, axis]) for axis in range(2)], axis=-1)
    np.testing.assert_allclose(places, expected, atol=2e-3)
    way = np.linalg.norm(np.diff(places, axis=0), axis=-1)
    assert (way <= 0.75 + 2e-3).all()
    if total > 0:  # away from corners the speed is that of the way
        leg = np.searchsorted(ends, along, side="right")
        straight = (leg[1:] == leg[:-1]) & (np.diff(along) > 0) & (total > 0.75)
        np.testing.assert_allclose(way[straight], 0.75, atol=2e-3)
    later = place_on_route(table, jnp.ones(200, jnp.int32), jnp.asarray(travelled + np.float32(total)))
    np.testing.assert_allclose(later, places, atol=2e-3)


# What changes with the place


@pytest.mark.parametrize("distance_m", [10.0, 1.0, 37.0])
def test_correlated_normal_has_its_correlation_in_any_number_of_moves(distance_m):
    count, moves_m = 100_000, (3.0, 0.5, 0.0, 4.5)
    first = value = normals(count, 20)
    for number, moved_m in enumerate(moves_m):
        value = mobility.correlated_normal(value, jnp.full(count, moved_m), normals(count, 21 + number), distance_m)
    assert abs(z_score(value, 0.0)) < Z_LIMIT
    assert abs(z_score(np.asarray(value, float) ** 2, 1.0)) < Z_LIMIT
    assert scipy.stats.kstest(np.asarray(value, float), "norm").pvalue > P_LIMIT
    product = np.asarray(first, float) * np.asarray(value, float)
    assert abs(z_score(product, math.exp(-sum(moves_m) / distance_m))) < Z_LIMIT


def test_correlated_normal_keeps_the_value_of_who_stands():
    value = normals(1000, 30)
    np.testing.assert_array_equal(mobility.correlated_normal(value, 0.0, normals(1000, 31)), value)
    far = mobility.correlated_normal(value, 1e6, normals(1000, 31))
    np.testing.assert_allclose(far, normals(1000, 31), rtol=1e-6)
    default = mobility.correlated_normal(value, 4.0, normals(1000, 31))
    given_10 = mobility.correlated_normal(value, 4.0, normals(1000, 31), 10.0)
    np.testing.assert_allclose(default, given_10, rtol=1e-6)


def test_normal_to_uniform_is_the_distribution_function_on_the_open_interval():
    value = jnp.linspace(-5.0, 5.0, 201)
    np.testing.assert_allclose(mobility.normal_to_uniform(value), scipy.stats.norm.cdf(value), rtol=1e-4)
    ends = np.asarray(mobility.normal_to_uniform(jnp.array([-jnp.inf, -40.0, 6.0, 40.0, jnp.inf])))
    assert (ends > 0.0).all()
    assert (ends < 1.0).all()
    assert scipy.stats.kstest(np.asarray(mobility.normal_to_uniform(normals(100_000, 32))), "uniform").pvalue > P_LIMIT


def test_line_of_sight_along_a_way_has_its_probability_at_every_place():
    """A way from 5 m to 65 m from the server; at each stop the share in sight is that of the place."""
    count, step_m = 40_000, 6.0
    value = normals(count, 40)
    before = None
    for number in range(11):
        distance_m = 5.0 + step_m * number
        probability = channel.los_probability(
            jnp.array(distance_m), "SL", clutter_density=0.2, clutter_size_m=10.0, clutter_height_m=2.0,
            device_height_m=1.5, base_height_m=1.5,
        )  # fmt: skip
        sight = np.asarray(mobility.normal_to_uniform(value) < probability)
        assert abs(z_score(sight, float(probability))) < Z_LIMIT
        if before is not None:  # neighbours along the way agree more often than strangers
            assert z_score(sight & before, sight.mean() * before.mean()) > 10
        before = sight
        value = mobility.correlated_normal(value, step_m, normals(count, 41 + number))
    assert bool((mobility.normal_to_uniform(jnp.array([40.0])) < 1.0).all()), "certain sight is certain"


def test_states_correlate_by_the_arcsine():
    count = 100_000
    first = normals(count, 60)
    second = mobility.correlated_normal(first, 5.0, normals(count, 61))
    signs = [2.0 * np.asarray(mobility.normal_to_uniform(x) < 0.5) - 1.0 for x in (first, second)]
    assert abs(z_score(signs[0] * signs[1], 2 / math.pi * math.asin(math.exp(-0.5)))) < Z_LIMIT


# Fading


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.97])
def test_fading_is_exponential_and_powers_correlate_by_the_square(rho):
    count, lag = 100_000, 3
    re, im = first = normals(count, 70), normals(count, 71)
    for number in range(lag):
        re, im = mobility.fading_step(re, im, rho, normals(count, 72 + 2 * number), normals(count, 73 + 2 * number))
    now, then = (np.asarray(mobility.fading_power(*gain), float) for gain in ((re, im), first))
    for power in (now, then):
        assert scipy.stats.kstest(power, "expon").pvalue > P_LIMIT
        assert abs(z_score(power, 1.0)) < Z_LIMIT
    assert abs(z_score((now - 1) * (then - 1), rho ** (2 * lag))) < Z_LIMIT
    # The complex gain: E h' h* = rho^lag, real.
    gains = [(np.asarray(a, float) + 1j * np.asarray(b, float)) / math.sqrt(2) for a, b in ((re, im), first)]
    product = gains[0] * gains[1].conj()
    assert abs(z_score(product.real, rho**lag)) < Z_LIMIT
    assert abs(z_score(product.imag, 0.0)) < Z_LIMIT


def test_fading_of_an_unlike_speed_a_device():
    doppler = channel.doppler_hz(jnp.array([0.0, 0.83, 3.0]), 3.5)
    rho = channel.jakes_correlation(doppler, 0.005)
    re, im = jnp.ones((3,)), jnp.zeros((3,))
    new_re, new_im = mobility.fading_step(re, im, rho, jnp.zeros((3,)), jnp.ones((3,)))
    np.testing.assert_allclose(new_re, rho, rtol=1e-6)
    np.testing.assert_allclose(new_im, jnp.sqrt((1 - rho) * (1 + rho)), rtol=1e-6)
    assert float(mobility.fading_power(new_re, new_im)[0]) == pytest.approx(0.5, rel=1e-6)
