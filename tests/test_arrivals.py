"""Arrivals: each law has the rate, the spread and the memory that it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from gmel.scenario.errors import InputError
from gmel.scenario.load import with_load
from gmel.simulator.arrivals import request_capacity
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.state import Requests
from small_plants import small_plant

SLOTS, EPISODES = 2000, 8


def drawn(arrivals: str, slots: int = SLOTS, **choices: object) -> tuple[Environment, Requests]:
    """Requests of some episodes, axes episodes, slots, requests. All run on the devices: nothing else matters."""
    environment = Environment.from_scenario(small_plant(arrivals=arrivals, max_per_slot=None, **choices))

    def episode(seed: jax.Array) -> Requests:
        def slot(state, _):
            after, _, _ = environment.step(state, jnp.zeros(environment.requests, jnp.int32))
            return after, state.requests

        return jax.lax.scan(slot, environment.reset(seed), length=slots)[1]

    return environment, jax.jit(jax.vmap(episode))(seeds(1, EPISODES))


def counts(requests: Requests) -> NDArray[np.int64]:
    return np.asarray(requests.present).sum(axis=-1)


def near(values: NDArray[np.floating] | NDArray[np.int64], expected: float, sigmas: float = 4.5) -> bool:
    """Whether the mean over episodes is within its own error of what is expected (leading axis: episodes)."""
    means = values.reshape(EPISODES, -1).mean(axis=1)
    return abs(means.mean() - expected) < sigmas * means.std(ddof=1) / np.sqrt(EPISODES) + 1e-9


def dispersion(count: NDArray[np.int64], window: int) -> float:
    """Variance over mean of the number of requests in windows of slots."""
    sums = count.reshape(EPISODES, -1, window).sum(axis=-1)
    return float(sums.var() / sums.mean())


def test_poisson_counts() -> None:
    _, requests = drawn("rate_per_s = 2.5")
    count = counts(requests)
    assert near(count, 2.5)
    assert near((count - 2.5) ** 2, 2.5)


@pytest.mark.parametrize(("places", "probability"), [(1, 0.4), (5, 0.3)])
def test_bernoulli_gives_every_device_its_own_chances(places: int, probability: float) -> None:
    text = f'kind = "bernoulli"\nplaces = {places}\nprobability = {probability}'
    environment, requests = drawn(text, max_uploads=64)
    own = np.stack([(np.asarray(requests.device) == device) & requests.present for device in range(6)], -1).sum(axis=-2)
    assert own.max() == places
    for device in range(6):
        assert near(own[..., device], places * probability)
        assert near((own[..., device] - places * probability) ** 2, places * probability * (1 - probability))
    # Devices are independent.
    assert near((own[..., 0] - places * probability) * (own[..., 1] - places * probability), 0.0)
    assert environment.requests <= 6 * places


def test_uniform_counts() -> None:
    environment, requests = drawn('kind = "uniform"\ncount = [1, 4]', max_uploads=64)
    own = np.stack([(np.asarray(requests.device) == device) & requests.present for device in range(6)], -1).sum(axis=-2)
    share = np.bincount(own.reshape(-1), minlength=6) / own.size
    np.testing.assert_allclose(share, [0, 0.25, 0.25, 0.25, 0.25, 0], atol=0.01)
    assert environment.requests == 24
    # The rows of a device stand together, in order.
    present = np.asarray(requests.present)
    assert (np.diff(np.asarray(requests.device), axis=-1)[present[..., 1:]] >= 0).all()


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.5])
def test_gamma_intervals_have_their_mean_and_variation(cv: float) -> None:
    _, requests = drawn(f'kind = "gamma"\ncv = {cv}\nrate_per_s = 1.5', max_uploads=64)
    present = np.asarray(requests.present)
    at = np.arange(SLOTS)[None, :, None] + np.asarray(requests.generated_s)
    gaps = [np.diff(at[episode][present[episode]]) for episode in range(EPISODES)]
    assert all((gap >= -1e-4).all() for gap in gaps)
    every = np.concatenate(gaps)
    error = cv / np.sqrt(every.size) / 1.5
    assert abs(every.mean() - 1 / 1.5) < 5 * error
    assert every.std() / every.mean() == pytest.approx(cv, rel=0.05)
    # Intervals are independent.
    pairs = np.concatenate([(gap[1:] - gap.mean()) * (gap[:-1] - gap.mean()) for gap in gaps]) / every.var()
    assert abs(pairs.mean()) < 5 / np.sqrt(pairs.size) * max(1.0, cv)


def test_mmpp_keeps_its_mean_rate_and_comes_in_bursts() -> None:
    burst = "burst = { ratio = 10.0, mean_quiet_s = 40.0, mean_burst_s = 10.0 }"
    _, requests = drawn(f'kind = "mmpp"\nrate_per_s = 2.0\n{burst}', slots=8000, max_uploads=64)
    count = counts(requests)
    assert near(count, 2.0)
    # Index of dispersion of counts of a two-state MMPP, long windows: 1 + 2 (l1 - l2)^2 p q tau / mean (Fischer 1993).
    quiet_ends, burst_ends = 1 - np.exp(-1 / 40), 1 - np.exp(-1 / 10)
    share = quiet_ends / (quiet_ends + burst_ends)
    quiet = 2.0 / (1 + 9 * share)
    stay = 1 - quiet_ends - burst_ends
    expected = 1 + (9 * quiet) ** 2 * share * (1 - share) * (1 + stay) / (1 - stay) / 2.0
    assert dispersion(count, 1) > 1.5
    assert dispersion(count, 500) == pytest.approx(expected, rel=0.25)


def test_a_day_has_its_high_and_its_low() -> None:
    _, requests = drawn("rate_per_s = 2.0\nday = { amplitude = 0.8, period_s = 100.0 }", max_uploads=64)
    count = counts(requests)
    assert near(count, 2.0)
    hour = count.reshape(EPISODES, -1, 100).mean(axis=(0, 1))
    # Requests of slot n came in the slot before it.
    expected = 2.0 * (1 + 0.8 * np.sin(2 * np.pi * (np.arange(100) - 0.5) / 100))
    np.testing.assert_allclose(hour, expected, atol=5 * np.sqrt(3.6 / (EPISODES * SLOTS / 100)))


@pytest.mark.parametrize(
    "arrivals",
    [
        "rate_per_s = 3.0",
        'kind = "bernoulli"\nplaces = 3\nprobability = 0.5',
        'kind = "gamma"\ncv = 3.0\nrate_per_s = 3.0',
        'kind = "gamma"\ncv = 0.3\nrate_per_s = 3.0',
        'kind = "mmpp"\nrate_per_s = 3.0\nburst = { ratio = 20.0 }',
    ],
)
def test_the_table_holds_what_comes(arrivals: str) -> None:
    """The last row is practically never used: nothing is cut off."""
    environment, requests = drawn(arrivals, max_uploads=128)
    assert counts(requests).max() < environment.requests <= 20 * 3.0 * 6


@pytest.mark.parametrize(
    ("arrivals", "part"),
    [
        ('kind = "gamma"\nload = 0.5', "needs cv"),
        ('kind = "bernoulli"', "needs one of probability"),
        ('kind = "bernoulli"\nprobability = 0.5\nload = 0.5', "needs one of probability"),
        ('kind = "bernoulli"\nload = 5.0', "arrivals.places"),
        ('kind = "uniform"', "needs count"),
        ('kind = "uniform"\ncount = [3, 2]', "[low, high]"),
        ("load = 0.5\ncv = 2.0", "cv is for kind = 'gamma'"),
        ('kind = "uniform"\ncount = [1, 2]\ndevice_skew = 0.5', "device_skew"),
        ("load = 0.5\ncount = [1, 2]", "count is for kind"),
    ],
)
def test_impossible_arrivals_are_named(arrivals: str, part: str) -> None:
    with pytest.raises(InputError) as refused:
        small_plant(arrivals=arrivals)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_load_of_bernoulli_arrivals_is_a_probability() -> None:
    plant = small_plant(arrivals='kind = "bernoulli"\nprobability = 0.5')
    heavier = with_load(plant, 0.6)
    assert heavier.arrivals.probability is None
    assert heavier.request_probability * 6 * heavier.mean_work / heavier.capacity == pytest.approx(0.6)


def test_too_many_requests_are_refused() -> None:
    with pytest.raises(InputError, match="at most 20,000"):
        request_capacity(small_plant(arrivals="rate_per_s = 1e5", max_per_slot=None))
