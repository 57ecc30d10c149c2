"""What a detector reads of a photo, and the classifier on it: laws and independent recomputation."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gmel.scenario.errors import InputError
from gmel.synthesis.augment import augmented, dihedral
from gmel.synthesis.detector.linear import LinearDetector, Scaling, alarm_threshold, fit_temperature, two_ways
from gmel.synthesis.detector.scores import score
from gmel.synthesis.detector.template import best_shift, difference_from_template
from gmel.synthesis.detector.texture import FEATURES, texture_features
from gmel.synthesis.photo import GOOD, Photo

RANDOM = np.random.default_rng(0)


def column(name: str) -> int:
    return FEATURES.index(name)


def test_pattern_histogram_is_that_of_a_plain_count() -> None:
    image = np.random.default_rng(1).integers(0, 6, (13, 17)) / 8
    around = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    counts: Counter[int] = Counter()
    for row in range(1, 12):
        for place in range(1, 16):
            bits = [image[row + down, place + right] >= image[row, place] for down, right in around]
            changes = sum(bits[n] != bits[n - 1] for n in range(8))
            counts[sum(bits) if changes <= 2 else 9] += 1
    features = texture_features(image.astype(np.float32))
    for kind in range(10):
        assert features[column(f"lbp_0_{kind}")] == pytest.approx(counts[kind] / (11 * 15))


@pytest.mark.parametrize("which", range(8))
def test_patterns_and_grey_values_do_not_change_with_a_turn(which: int) -> None:
    image = RANDOM.random((64, 64)).astype(np.float32)
    here, there = texture_features(image), texture_features(np.ascontiguousarray(dihedral(image, which)))
    still = [
        n for n, name in enumerate(FEATURES) if name.startswith(("lbp", "grey", "log_contrast", "spot_", "log_spot"))
    ]
    np.testing.assert_allclose(here[still], there[still], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("image", [np.zeros((8, 8)), np.ones((40, 9)), np.eye(33), np.full((300, 8), 0.5)])
def test_features_are_finite_on_photos_without_texture(image: np.ndarray) -> None:
    features = texture_features(image.astype(np.float32))
    assert features.shape == (len(FEATURES),)
    assert np.isfinite(features).all()


def test_a_small_spot_shows_in_the_extremes() -> None:
    image = (0.5 + 0.02 * RANDOM.standard_normal((96, 96))).astype(np.float32)
    spotted = image.copy()
    spotted[40:45, 50:55] -= 0.3
    change = texture_features(spotted) - texture_features(image)
    assert change[column("spot_0_0.001")] < -0.5
    assert abs(change[column("grey_mean")]) < 0.01


def test_whitening_divides_deviations_by_themselves_and_the_ridge() -> None:
    mix = np.diag([3.0, 1.0, 0.2]) @ np.linalg.qr(RANDOM.standard_normal((3, 3)))[0]
    rows = (RANDOM.standard_normal((4000, 3)) @ mix).astype(np.float32)
    scaling = Scaling.fit(rows, np.ones(4000, np.bool_))
    standard = np.clip((rows - rows.mean(0)) / rows.std(0), -5, 5)
    before = np.sqrt(np.linalg.eigvalsh(np.cov(standard, rowvar=False)))
    after = np.sqrt(np.linalg.eigvalsh(np.cov(scaling(rows), rowvar=False)))
    np.testing.assert_allclose(np.sort(after), np.sort(before / (before + 0.5)), rtol=1e-3)
    assert Scaling.fit(rows, np.arange(4000) < 20).whitening is None, "twenty good parts are too few"


def test_classes_weigh_the_same_whatever_their_number() -> None:
    labels = [GOOD] * 400 + ["pit"] * 4
    rows = np.concatenate([RANDOM.normal(-1, 1, (400, 2)), RANDOM.normal(1, 1, (4, 2))]).astype(np.float32)
    detector = LinearDetector.fit(rows, labels)
    assert detector.classes == (GOOD, "pit")
    fresh = np.concatenate([RANDOM.normal(-1, 1, (500, 2)), RANDOM.normal(1, 1, (500, 2))]).astype(np.float32)
    called = detector.defect_probability(fresh) > 0.5
    assert called[:500].mean() < 0.35
    assert called[500:].mean() > 0.65


def test_weights_within_a_class_are_heeded() -> None:
    rows = np.array([[-1.0], [1.0], [3.0], [-3.0]] * 20, np.float32)
    labels = ["a", "b", "a", "b"] * 20
    for weights, word in (([1, 1, 0, 0], "a"), ([0, 0, 1, 1], "b")):
        detector = LinearDetector.fit(rows, labels, weights=np.array(weights * 20, np.float64) + 1e-9)
        assert detector.classes[int(np.argmax(detector.logits(np.array([[-2.0]], np.float32))))] == word


def test_one_class_is_no_detector() -> None:
    with pytest.raises(InputError, match="two classes"):
        LinearDetector.fit(np.zeros((3, 2), np.float32), ["pit"] * 3)


def test_temperature_is_that_of_a_search() -> None:
    logits = 4.0 * RANDOM.standard_normal((200, 3))
    truth = [int(np.argmax(row + 3.0 * RANDOM.gumbel(size=3))) for row in logits]
    weight = 1.0 / np.bincount(truth, minlength=3)[truth]

    def loss(temperature: float) -> float:
        scaled = logits / temperature
        chance = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
        return float(-(weight * np.log(chance[np.arange(200), truth])).sum())

    grid = np.exp(np.linspace(np.log(0.1), np.log(15), 2000))
    best = grid[int(np.argmin([loss(one) for one in grid]))]
    assert fit_temperature(logits, truth) == pytest.approx(best, rel=0.01)


def test_defect_in_two_ways_is_the_sum_of_its_types() -> None:
    logits = RANDOM.standard_normal((50, 4)) * 3
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    both = two_ways(logits)
    np.testing.assert_allclose(1 / (1 + np.exp(both[:, 0] - both[:, 1])), 1 - chance[:, 0], rtol=1e-9)


@pytest.mark.parametrize(("parts", "rate"), [(19, 0.05), (60, 0.05), (99, 0.1), (10, 0.3)])
def test_rate_of_false_alarms_is_kept_on_average(parts: int, rate: float) -> None:
    random = np.random.default_rng(parts)
    alarms = [random.random() > alarm_threshold(random.random(parts), rate) for _ in range(8000)]
    expected = np.floor(rate * (parts + 1)) / (parts + 1)
    assert np.mean(alarms) == pytest.approx(expected, abs=4 * np.sqrt(expected / 8000))
    assert expected <= rate


def test_scores_by_hand() -> None:
    classes = (GOOD, "a", "b")
    labels = [GOOD] * 20 + ["a", "a", "b", "b"]
    good = [[0.9 - 0.01 * n, 0.05, 0.05 + 0.01 * n] for n in range(20)]
    defects = [[0.1, 0.8, 0.1], [0.75, 0.05, 0.2], [0.2, 0.3, 0.5], [0.85, 0.1, 0.05]]
    found = score(np.array(good + defects), classes, labels, threshold=0.5)
    suspicion = [1 - row[0] for row in good + defects]
    assert found.auroc == pytest.approx(roc_auc_score([0] * 20 + [1] * 4, suspicion))
    # One of twenty good parts may be called defect: the second most suspect (0.28) is the limit.
    assert found.tpr == pytest.approx(2 / 4)
    assert found.type_accuracy == pytest.approx(np.mean([1 / 2, 1 / 2]))
    assert found.recall == {GOOD: 1.0, "a": 0.5, "b": 0.5}
    assert found.balanced_accuracy == pytest.approx(2 / 3)


def test_scores_without_good_parts_are_of_types_alone() -> None:
    found = score(np.array([[0.9, 0.1], [0.6, 0.4]]), ("a", "b"), ["a", "b"])
    assert np.isnan(found.auroc)
    assert np.isnan(found.tpr)
    assert found.type_accuracy == found.balanced_accuracy == 0.5
    with pytest.raises(ValueError, match="must be among"):
        score(np.array([[1.0, 0.0]]), ("a", "b"), ["c"])


@settings(max_examples=30, deadline=None)
@given(st.integers(-4, 4), st.integers(-4, 4))
def test_a_template_is_found_where_it_lies(down: int, right: int) -> None:
    template = np.random.default_rng(5).random((40, 44)).astype(np.float32)
    assert best_shift(np.roll(template, (down, right), (0, 1)), template) == (down, right)


def test_difference_from_a_moved_template_is_the_defect() -> None:
    plain = (np.random.default_rng(6).random((48, 48)) * 200).astype(np.uint8)
    image = np.roll(plain, (2, -1), (0, 1)).copy()
    image[20:24, 20:24] = 255
    difference = difference_from_template(Photo(image, "pit", template=plain))
    changed = np.abs(difference - 0.5) > 0.01
    assert changed[20:24, 20:24].mean() > 0.9
    changed[20:24, 20:24] = False
    assert not changed.any()


def test_variants_keep_the_defect_and_depend_on_their_number_alone() -> None:
    mask = np.zeros((60, 80), np.bool_)
    mask[3:9, 70:78] = True
    shots = [Photo((RANDOM.random((60, 80)) * 65535).astype(np.uint16), "pit", mask, name=f"pit/{n}") for n in range(3)]
    made = augmented(shots, 4, seed=7)
    assert [photo.source for photo in made] == [f"pit/{n // 4}" for n in range(12)]
    for photo in made:
        assert photo.image.dtype == np.uint16
        assert photo.mask is not None
        assert photo.mask.shape == photo.image.shape
        assert photo.mask.sum() == mask.sum(), "a crop never cuts the defect"
    again = augmented(shots[:2], 2, seed=7)
    for here, there in zip(again, [made[0], made[1], made[4], made[5]], strict=True):
        np.testing.assert_array_equal(here.image, there.image)
    assert not np.array_equal(made[0].image, augmented(shots, 1, seed=8)[0].image)


def test_turns_and_flips_are_eight_and_each_has_an_inverse() -> None:
    array = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    seen = [dihedral(array, which) for which in range(8)]
    assert len({(one.shape, one.tobytes()) for one in seen}) == 8
    for one in seen:
        assert any(np.array_equal(dihedral(one, back), array) for back in range(8))
