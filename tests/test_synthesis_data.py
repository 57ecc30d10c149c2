"""Twins, and few-shot splits that keep them on one side."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from gmel.scenario.errors import InputError
from gmel.synthesis.data.checks import check_photos, group_twins, thumbnails
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.splits import Split, few_shot_split, shortages
from gmel.synthesis.data.summary import summary
from gmel.synthesis.photo import GOOD, Photo
from small_photos import dataset, pixels


def coarse(seed: int, noise: float = 0, shape: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A photo whose thumbnail says what it shows; with other noise, a twin of itself."""
    rng = np.random.default_rng(seed)
    scene: Any = 128 + 60 * ndimage.zoom(rng.standard_normal((8, 8)), (shape[0] / 8, shape[1] / 8), order=1)
    return np.clip(scene + noise * np.random.default_rng(seed + 999).standard_normal(shape), 0, 255).astype(np.uint8)


def photo(image: np.ndarray, label: str, name: str, **other: str) -> Photo:
    return Photo(image, label, name=name, **other)  # pyright: ignore[reportArgumentType]


def found_groups(photos: list[Photo]) -> dict[str, str]:
    return {each.name: each.group for each in group_twins(photos)[0]}


def kinds(photos: list[Photo]) -> dict[str, tuple[str, ...]]:
    return {problem.kind: problem.names for problem in group_twins(photos)[1]}


def test_thumbnails_correlate_as_numpy_says() -> None:
    photos = [photo(coarse(seed, shape=(32, 32)), "pit", str(seed)) for seed in range(4)]
    expected = np.corrcoef([each.image.astype(float).ravel() for each in photos])
    rows = thumbnails(photos)
    np.testing.assert_allclose(rows @ rows.T, expected, atol=1e-5)


def test_twins_and_copies_become_groups() -> None:
    photos = [
        photo(coarse(1), "pit", "a"),
        photo(coarse(2), "pit", "b"),
        photo(coarse(1, noise=3), "pit", "twin of a"),
        photo((coarse(1) * 0.6 + 10).astype(np.uint8), "pit", "a, darker"),
        photo(coarse(2), "pit", "copy of b"),
        photo(coarse(3), "pit", "c"),
    ]
    expected = {"a": "a", "b": "b", "twin of a": "a", "a, darker": "a", "copy of b": "b", "c": "c"}
    assert found_groups(photos) == expected
    assert kinds(photos)["duplicates"] == ("b = copy of b",)
    assert "twins" in kinds(photos)


def test_groups_are_joined_along_chains_and_with_what_the_layout_knows() -> None:
    chain = [np.clip(coarse(1) + step * 0.05 * (coarse(2).astype(float) - 128), 0, 255) for step in range(12)]
    rows = thumbnails([photo(image.astype(np.uint8), "pit", "") for image in chain])
    assert (rows @ rows.T)[0, -1] < 0.99 < np.diag(rows @ rows.T, 1).min(), "only neighbours are alike"
    others = [photo(coarse(seed), "pit", f"other {seed}") for seed in range(10, 24)]
    photos = [photo(image.astype(np.uint8), "pit", str(step)) for step, image in enumerate(chain)]
    assert len(set(found_groups([*others, *photos]).values())) == 14 + 1
    known = [replace(others[0], group="board"), replace(others[1], group="board"), *others[2:]]
    assert len(set(found_groups(known).values())) == 13


def test_photos_of_different_classes_that_are_alike_are_told_but_not_joined() -> None:
    photos = [photo(coarse(1), "pit", "a"), photo(coarse(1, noise=3), "crack", "b"), photo(coarse(2), "pit", "c")]
    assert kinds(photos) == {"twins-across": ("a = b",)}
    assert found_groups(photos) == {"a": "a", "b": "b", "c": "c"}
    copies = [photo(coarse(1), "pit", "a"), photo(coarse(1), "crack", "b")]
    assert kinds(copies)["duplicates-across"] == ("a = b",)
    assert found_groups(copies) == {"a": "a", "b": "a"}, "the same pixels must not be learned from and tested on"


def test_the_same_pixels_of_another_depth_or_size_are_no_copy() -> None:
    flat = np.full((16, 16), 7, np.uint8)
    photos = [photo(flat, "pit", "a"), photo(flat.astype(np.uint16), "pit", "b"), photo(flat[:8], "pit", "c")]
    assert not kinds(photos), "and photos without any contrast are like nothing"
    assert len(set(found_groups(photos).values())) == 3


def test_what_all_photos_share_does_not_make_them_twins() -> None:
    """Strong lighting makes all thumbnails of a class alike; parts are then told apart by what differs."""
    lamp = np.linspace(20, 220, 64)[None] * np.ones((64, 1))
    parts = [lamp + 0.12 * (coarse(seed).astype(float) - 128) for seed in range(20)]
    twin = parts[0] + np.random.default_rng(0).standard_normal((64, 64)) * 0.3
    photos = [photo(np.clip(each, 0, 255).astype(np.uint8), GOOD, str(n)) for n, each in enumerate([*parts, twin])]
    rows = thumbnails(photos)
    assert (rows @ rows.T).min() > 0.99
    groups = found_groups(photos)
    assert len(set(groups.values())) == 20
    assert groups["20"] == groups["0"]
    assert "alike" in kinds(photos)
    crack = photo(np.clip(lamp, 0, 255).astype(np.uint8), "crack", "crack")
    assert "twins-across" not in kinds([*photos, crack]), "nor like every photo of another class"


def test_many_photos_are_compared_across_blocks() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2_100, 32, 32), np.uint8)
    images[2_090] = images[3]
    photos = [photo(image, "pit", f"{number:04}") for number, image in enumerate(images)]
    groups = found_groups(photos)
    assert groups["2090"] == "0003"
    assert len(set(groups.values())) == 2_099


def test_findings_without_comparison() -> None:
    plain = [photo(pixels(n), label, f"{label}{n}") for n in range(2) for label in (GOOD, "pit")]
    assert not check_photos(plain)
    told = {each.kind: each.text for each in check_photos([*plain, photo(pixels(5, dtype=np.uint16), "crack", "c")])}
    assert told["single"].startswith("crack: one photo cannot be learned from and tested on")
    assert told["depths"].startswith("4 photos of 8 bits and 1 photos of 16 bits; save all")
    assert {each.kind for each in check_photos(plain[1::2])} == {"no-good"}
    assert {each.kind for each in check_photos(plain[0::2])} == {"no-defects"}
    sizes = check_photos([*plain, photo(pixels(6, (30, 10)), "pit", "large")])
    assert [each.text.split(";")[0] for each in sizes] == ["2 sizes, 10 to 20 wide, 24 to 30 high"]
    of_sites = [replace(each, site="a") for each in plain] + [photo(pixels(6, (9, 9)), "pit", "b", site="b")]
    assert not check_photos(of_sites), "each site has a camera of its own"


GROUPS = st.dictionaries(
    st.sampled_from([GOOD, "crack", "pit", "stain"]), st.lists(st.integers(1, 4), min_size=8, max_size=14), min_size=2
)


def names(photos: tuple[Photo, ...]) -> list[str]:
    return [each.name for each in photos]


def same(one: Split, other: Split) -> bool:
    return all(names(getattr(one, part)) == names(getattr(other, part)) for part in ("shots", "good", "test"))


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, shots=st.integers(1, 4), draw=st.integers(0, 5), seed=st.integers(0, 3), data=st.data())
def test_laws_of_a_split(groups: dict[str, list[int]], shots: int, draw: int, seed: int, data: st.DataObject) -> None:
    whole = dataset(groups)
    split = few_shot_split(whole, shots, draw, split_seed=seed)
    learned = (*split.shots, *split.good)
    assert not {each.group for each in learned} & {each.group for each in split.test}
    assert len({each.group for each in learned}) == len(learned), "one photo of a group"
    counts = {label: sum(each.label == label for each in split.shots) for label in groups if label != GOOD}
    assert set(counts.values()) <= {shots}
    assert GOOD not in {each.label for each in split.shots}
    for label, sizes in groups.items():
        tested = [each for each in split.test if each.label == label]
        assert len({each.group for each in tested}) == int(len(sizes) / 2 + 0.5), "half of the groups"
        assert len(tested) == sum(sizes[int(g.rsplit("-", 1)[1])] for g in {each.group for each in tested}), "whole"
    if GOOD in groups:
        assert len(split.good) == len(groups[GOOD]) - int(len(groups[GOOD]) / 2 + 0.5)
    order = data.draw(st.permutations(whole.photos))
    assert same(split, few_shot_split(Dataset("other order", tuple(order)), shots, draw, split_seed=seed))
    other = few_shot_split(whole, 1 + shots % 4, draw + 1, split_seed=seed)
    assert names(other.test) == names(split.test), "the test set knows neither shots nor draw"
    assert names(other.good) == names(split.good)
    more = few_shot_split(whole, 4, draw, split_seed=seed)
    assert set(names(split.shots)) <= set(names(more.shots)), "more shots of a draw hold those of fewer"


def test_draws_and_seeds_differ() -> None:
    whole = dataset({GOOD: [1] * 20, "pit": [1] * 20})
    draws = {tuple(names(few_shot_split(whole, 3, draw).shots)) for draw in range(10)}
    assert len(draws) > 8
    tests = {tuple(names(few_shot_split(whole, 3, split_seed=seed).test)) for seed in range(10)}
    assert len(tests) == 10
    often = np.zeros(20)
    for draw in range(400):
        pool = [each.name for each in few_shot_split(whole, 3, draw).shots]
        often[[int(name.split("/")[1].split("-")[0]) for name in pool]] += 1
    drawn = often[often > 0]
    assert len(drawn) == 10, "the untested half, and all of it"
    assert abs(drawn - 120).max() < 5 * np.sqrt(120 * 0.7), "each as often"


def test_photos_that_nobody_compared_are_groups_of_their_own() -> None:
    whole = dataset({GOOD: [1] * 9, "pit": [1] * 9})
    bare = Dataset("bare", tuple(replace(each, group="") for each in whole.photos))
    split = few_shot_split(bare, 3)
    assert (len(split.shots), len(split.good), len(split.test)) == (3, 4, 10)
    assert not set(names(split.test)) & set(names((*split.shots, *split.good)))


def test_another_class_changes_nothing_for_the_others() -> None:
    small, large = dataset({GOOD: [1] * 9, "pit": [2] * 9}), dataset({GOOD: [1] * 9, "pit": [2] * 9, "crack": [1] * 9})
    before, after = few_shot_split(small, 2), few_shot_split(large, 2)
    assert names(before.shots) == [name for name in names(after.shots) if not name.startswith("crack")]
    assert names(before.test) == [name for name in names(after.test) if not name.startswith("crack")]


def test_fixed_number_of_photos_for_the_test() -> None:
    """The protocol of steel: so many photos a class; groups that do not fit stay on the other side."""
    whole = dataset({"pit": [1] * 280 + [2] * 10, "crack": [1] * 300})
    split = few_shot_split(whole, 10, test_per_class=200)
    assert {label: sum(each.label == label for each in split.test) for label in whole.classes} == {
        "crack": 200,
        "pit": 200,
    }
    assert not {each.group for each in split.shots} & {each.group for each in split.test}
    threes = few_shot_split(dataset({"pit": [3] * 100, "crack": [1] * 300}), 10, test_per_class=200)
    assert sum(each.label == "pit" for each in threes.test) == 198, "never more than asked for"


def test_groups_with_photos_of_several_classes() -> None:
    """Windows of one board: the board stays whole, and no two shots are of the same board."""
    photos = tuple(
        Photo(pixels(0, (8, 8)), label, group=f"board {board}", name=f"{board}{label}{copy}")
        for board in range(24)
        for label in ("open", "short", GOOD)
        for copy in range(2)
    )
    split = few_shot_split(Dataset("boards", photos), 5)
    boards = {each.group for each in split.test}
    assert len(boards) == 12
    assert len(split.test) == 12 * 6
    assert len({each.group for each in split.shots}) == 10
    assert not boards & {each.group for each in (*split.shots, *split.good)}


def test_a_group_counts_for_its_rarest_class() -> None:
    labels = [(board, label) for board in range(40) for label in ("open", "rare") if label == "open" or board < 6]
    photos = tuple(Photo(pixels(0, (8, 8)), label, group=f"{board}", name=f"{board}{label}") for board, label in labels)
    for seed in range(8):
        split = few_shot_split(Dataset("boards", photos), 2, split_seed=seed)
        assert sum(each.label == "rare" for each in split.test) == 3


def test_too_few_groups_is_said_with_the_remedy() -> None:
    whole = dataset({GOOD: [1] * 9, "pit": [5, 1, 1, 1, 1, 1, 1], "crack": [1]})
    with pytest.raises(InputError, match=r"class crack: 1 groups of photos, 1 beside the test, 1 shots .*; add photos"):
        few_shot_split(whole, 1)
    told = shortages(whole, 5)
    assert [each.names for each in told] == [("crack",), ("pit",)]
    assert told[1].text.startswith("pit: 7 groups of photos, 3 beside the test, 5 shots need as many and a test 1; ")
    assert told[1].text.endswith("take at most 3 shots, a smaller test, or add photos")
    with pytest.raises(InputError, match="class pit: 7 groups"):
        few_shot_split(dataset({GOOD: [1] * 9, "pit": [1] * 7}), 4)
    assert not shortages(dataset({GOOD: [1] * 9, "pit": [1] * 7}), 3)
    few_shot_split(dataset({GOOD: [1] * 9, "pit": [1] * 7}), 3)


def test_classes_that_take_groups_from_each_other_are_told_and_not_fatal() -> None:
    photos = tuple(
        Photo(pixels(0, (8, 8)), label, group=f"{board}", name=f"{board}{label}")
        for board in range(8)
        for label in ("open", "short")
    )
    whole = Dataset("boards", photos)
    assert not shortages(whole, 3), "4 boards are left for each"
    facts = summary(whole, 3)
    assert facts["split"] is None
    assert [problem["kind"] for problem in facts["problems"]] == ["tiny-class"]
    assert summary(whole, 2)["split"]["learn"] == {"open": 2, "short": 2}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"shots": 0}, "shots: 0, must be at least 1"),
        ({"draw": -1}, "draw: -1, must not be negative"),
        ({"split_seed": -2}, "split_seed: -2, must not be negative"),
        ({"test_share": 1.0}, "test_share: 1.0, must lie between 0 and 1"),
        ({"test_per_class": 0}, "test_per_class: 0, must be at least 1"),
    ],
)
def test_values_out_of_range(wrong: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        few_shot_split(dataset({GOOD: [1] * 9, "pit": [1] * 9}), **wrong)  # pyright: ignore[reportArgumentType]
