"""Gaussians over features: what they learn, draw, send, and refuse."""

import numpy as np
import pytest
from safetensors.numpy import load, save

from gmel.scenario.errors import InputError
from gmel.synthesis.feature_space import GaussianFeatures
from gmel.synthesis.photo import GOOD


def rows(count: int, mean: float, seed: int, wide: int = 4) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (mean + random.standard_normal((count, wide)) * np.arange(1, wide + 1)).astype(np.float32)


@pytest.fixture
def generator() -> GaussianFeatures:
    features = np.concatenate([rows(400, 0.0, 0), rows(400, 5.0, 1)])
    return GaussianFeatures.fit(features, ["pit"] * 400 + ["crack"] * 400)


def test_means_are_those_of_the_rows_and_weights_count() -> None:
    features = np.asarray([[0, 0], [2, 4], [10, 10], [12, 10]], np.float32)
    fitted = GaussianFeatures.fit(features, ["a", "a", "b", "b"], np.asarray([1.0, 3.0, 1.0, 1.0]))
    assert fitted.labels == ("a", "b")
    np.testing.assert_allclose(fitted.means, [[1.5, 3.0], [11.0, 10.0]], rtol=1e-6)


def test_plenty_of_rows_give_the_covariance_that_made_them(generator: GaussianFeatures) -> None:
    for covariance in generator.covariances:
        np.testing.assert_allclose(np.sqrt(np.diag(covariance)), [1, 2, 3, 4], rtol=0.12)


def test_few_rows_take_the_spread_of_good_parts() -> None:
    """Two shots do not show how a class spreads; sixty good parts do."""
    features = np.concatenate([rows(60, 0.0, 0), np.full((2, 4), 7.0, np.float32)])
    fitted = GaussianFeatures.fit(features, [GOOD] * 60 + ["pit"] * 2)
    spread = np.sqrt(np.diag(fitted.covariances[fitted.labels.index("pit")]))
    np.testing.assert_allclose(spread, [1, 2, 3, 4], rtol=0.35)
    alone = GaussianFeatures.fit(features[:2], ["pit", "crack"])
    np.testing.assert_allclose(alone.covariances, np.broadcast_to(np.eye(4), (2, 4, 4)) * (20 / 21), rtol=1e-6)


def test_samples_have_the_moments_of_their_class(generator: GaussianFeatures) -> None:
    drawn = generator.sample("crack", 20_000, 3)
    place = generator.labels.index("crack")
    error = 4 * np.sqrt(np.diag(generator.covariances[place]) / 20_000)
    assert np.all(np.abs(drawn.mean(axis=0) - generator.means[place]) < error)
    np.testing.assert_allclose(np.cov(drawn, rowvar=False), generator.covariances[place], atol=0.6)
    assert np.array_equal(drawn, generator.sample("crack", 20_000, 3))
    assert not np.array_equal(drawn[:5], generator.sample("crack", 5, 4))
    assert generator.sample("pit", 0, 0).shape == (0, 4)


def test_log_likelihood_is_that_of_scipy(generator: GaussianFeatures) -> None:
    from scipy.stats import multivariate_normal

    features = rows(10, 2.0, 9)
    for place, label in enumerate(generator.labels):
        law = multivariate_normal(generator.means[place], generator.covariances[place].astype(np.float64))
        expected = law.logpdf(features) + 2.0 * np.log(2.0 * np.pi)
        np.testing.assert_allclose(generator.log_likelihood(label, features, floor=0.0), expected, rtol=1e-4)


def test_bytes_hold_everything_and_a_triangle_only(generator: GaussianFeatures) -> None:
    data = generator.to_bytes()
    again = GaussianFeatures.from_bytes(data)
    assert again.labels == generator.labels
    assert np.array_equal(again.means, generator.means)
    # The halves of a product of matrices may differ in the last bit; the triangle decides.
    np.testing.assert_allclose(again.covariances, generator.covariances, rtol=1e-5, atol=1e-6)
    numbers = 2 * 4 + 2 * (4 * 5 // 2)
    assert len(data) < 4 * numbers + 400


def damaged(data: bytes, **changed: np.ndarray) -> bytes:
    return save({**load(data), **changed}, metadata={"format": "1", "labels": '["crack", "pit"]'})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:40], "corrupt"),
        (lambda data: b"", "corrupt"),
        (lambda data: data.replace(b'"format":"1"', b'"format":"7"'), "format is '7'"),
        (lambda data: save(load(data)), "corrupt"),
        (lambda data: damaged(data, means=np.zeros((2, 3), np.float32)), "do not fit"),
        (lambda data: damaged(data, means=np.zeros((2, 4), np.float64)), "must be float32"),
        (lambda data: damaged(data, means=np.full((2, 4), np.nan, np.float32)), "not finite"),
    ],
)
def test_what_is_not_a_generator_is_refused_with_the_reason(
    generator: GaussianFeatures, change: object, said: str
) -> None:
    with pytest.raises(InputError, match=said) as error:
        GaussianFeatures.from_bytes(change(generator.to_bytes()), "site 2")  # type: ignore[operator]
    assert "site 2" in str(error.value)


def test_bad_rows_and_unknown_classes(generator: GaussianFeatures) -> None:
    with pytest.raises(InputError, match="not learned, must be one of crack, pit"):
        generator.sample("dent", 1, 0)
    with pytest.raises(InputError, match="negative"):
        generator.sample("pit", -1, 0)
    with pytest.raises(InputError, match="one row for each"):
        GaussianFeatures.fit(rows(3, 0.0, 0), ["a", "b"])
    with pytest.raises(InputError, match="finite"):
        GaussianFeatures.fit(np.full((2, 2), np.inf, np.float32), ["a", "b"])
