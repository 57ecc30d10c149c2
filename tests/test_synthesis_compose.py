"""Mode compose and files of generators: the ground stays, the defect comes, what is broken is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gmel.scenario.errors import InputError
from gmel.synthesis.compose import Compose, cut_out
from gmel.synthesis.generator import load_generator, save_generator
from gmel.synthesis.photo import GOOD, Photo
from reporters import Silent

MODES = {"compose": Compose}


def part(seed: int, shape: tuple[int, int] = (60, 80), kind: type = np.uint8) -> Photo:
    full = np.iinfo(kind).max
    grey = np.random.default_rng(seed).normal(0.6, 0.02, shape).clip(0, 1) * full
    return Photo(grey.astype(kind), GOOD, name=f"good/{seed}")


def shot(
    seed: int, label: str = "pit", rows: slice = slice(20, 28), columns: slice = slice(30, 42), **of: object
) -> Photo:
    photo = part(100 + seed, **of)  # type: ignore[arg-type]
    image, mask = photo.image.copy(), np.zeros(photo.image.shape, np.bool_)
    mask[rows, columns] = True
    image[mask] = image[mask] // 4
    return Photo(image, label, mask, name=f"{label}/{seed}")


def fitted(shots: list[Photo], good: list[Photo]) -> Compose:
    return Compose.fit(shots, good, 0, Silent())


def test_the_ground_is_a_good_part_and_the_defect_lies_under_the_mask() -> None:
    good = [part(n) for n in range(3)]
    made = fitted([shot(0), shot(1)], good).sample("pit", 40, seed=5)
    for photo in made:
        assert photo.mask is not None
        assert photo.label == "pit"
        assert photo.source in {"pit/0", "pit/1"}
        ground = min(good, key=lambda one: int(np.count_nonzero(one.image != photo.image)))
        changed = photo.image != ground.image
        rows, columns = np.nonzero(photo.mask)
        near = np.zeros(changed.shape, np.bool_)
        near[max(0, rows.min() - 9) : rows.max() + 10, max(0, columns.min() - 9) : columns.max() + 10] = True
        assert not changed[~near].any(), "away from the defect nothing changes"
        assert photo.pixels()[photo.mask].mean() < 0.35
        assert abs(photo.pixels()[~photo.mask].mean() - 0.6) < 0.05


def test_samples_depend_on_seed_and_number_alone() -> None:
    generator = fitted([shot(0), shot(1)], [part(n) for n in range(3)])
    first, more = generator.sample("pit", 3, seed=1), generator.sample("pit", 6, seed=1)
    for here, there in zip(first, more, strict=False):
        np.testing.assert_array_equal(here.image, there.image)
    assert any(
        not np.array_equal(a.image, b.image) for a, b in zip(first, generator.sample("pit", 3, seed=2), strict=True)
    )


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_depth_and_size_of_the_good_part_are_kept(kind: type) -> None:
    shapes = [(60, 80), (33, 47)]
    good = [part(n, shape, kind) for n, shape in enumerate(shapes)]
    made = fitted([shot(0, kind=kind)], good).sample("pit", 20, seed=0)
    assert {photo.image.shape for photo in made} == set(shapes)
    assert {photo.image.dtype for photo in made} == {np.dtype(kind)}


@pytest.mark.parametrize(
    ("rows", "columns"), [(slice(0, 5), slice(0, 5)), (slice(55, 60), slice(70, 80)), (slice(0, 60), slice(0, 80))]
)
def test_defects_at_the_border_and_over_all_of_the_photo(rows: slice, columns: slice) -> None:
    made = fitted([shot(0, rows=rows, columns=columns)], [part(1, (20, 24))]).sample("pit", 10, seed=0)
    assert all(photo.mask is not None and photo.mask.any() and photo.image.shape == (20, 24) for photo in made)


def test_shams_hold_no_defect() -> None:
    good = [part(n) for n in range(4)]
    shams = fitted([shot(0)], good).sham(20, seed=0)
    assert {photo.label for photo in shams} == {GOOD}
    assert all(photo.mask is None for photo in shams)
    assert all(photo.pixels().min() > 0.4 for photo in shams), "nothing dark came from the shots"
    assert any(all((photo.image != one.image).any() for one in good) for photo in shams)


def test_brightness_of_the_surroundings_is_taken_over() -> None:
    dark = Photo((part(0).image // 3).astype(np.uint8), GOOD, name="good/dark")
    made = fitted([shot(0)], [dark]).sample("pit", 20, seed=0)
    ring = [float(photo.pixels()[~photo.mask].max()) for photo in made if photo.mask is not None]
    assert max(ring) < 0.35, "no bright margin comes with the cut"


def test_a_defect_stays_at_its_site() -> None:
    bright = Photo((part(0).image // 2 + 120).astype(np.uint8), GOOD, site="bright", name="good/bright")
    dim = replace(part(1), site="dim")
    shots = [replace(shot(0), site="dim"), replace(shot(1, "scratch"), site="elsewhere")]
    generator = fitted(shots, [bright, dim])
    assert {photo.site for photo in generator.sample("pit", 12, 0)} == {"dim"}
    assert {photo.site for photo in generator.sample("scratch", 12, 0)} == {"bright", "dim"}, (
        "a site without good parts"
    )


def test_what_compose_lacks_is_said() -> None:
    with pytest.raises(InputError, match="good parts"):
        fitted([shot(0)], [])
    with pytest.raises(InputError, match="mask"):
        fitted([Photo(part(0).image, "pit")], [part(1)])
    with pytest.raises(InputError, match="mask"):
        cut_out(part(0))
    generator = fitted([shot(0)], [part(1)])
    with pytest.raises(InputError, match="known are pit"):
        generator.sample("crack", 1, 0)
    with pytest.raises(InputError, match="steps"):
        generator.sample("pit", 1, 0, steps=4)


def test_file_gives_the_same_samples(tmp_path: Path) -> None:
    generator = fitted([shot(0), shot(1, "scratch")], [part(n, (40 + n, 50)) for n in range(3)])
    path = tmp_path / "g.safetensors"
    save_generator(path, generator)
    again = load_generator(path, MODES)
    assert again.labels == ("pit", "scratch")
    for here, there in zip(generator.sample("pit", 4, 9), again.sample("pit", 4, 9), strict=True):
        np.testing.assert_array_equal(here.image, there.image)
        np.testing.assert_array_equal(here.mask, there.mask)
        assert here.source == there.source


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda data: data[:50], "corrupt"),
        (lambda data: b"pickle", "corrupt"),
        (lambda data: data.replace(b'"mode":"compose"', b'"mode":"imagine"'), "mode"),
        (lambda data: data.replace(b'"format":"1"', b'"format":"7"'), "format"),
        (lambda data: data.replace(b'"shots":"1"', b'"shots":"2"'), "lacks"),
        (lambda data: data.replace(b'"shots":"1"', b'"shots":"x"'), "lacks"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, break_it: object, word: str) -> None:
    path = tmp_path / "g.safetensors"
    save_generator(path, fitted([shot(0)], [part(1)]))
    data = path.read_bytes()
    broken = break_it(data)  # type: ignore[operator]
    assert broken != data
    path.write_bytes(broken)
    with pytest.raises(InputError, match=word) as caught:
        load_generator(path, MODES)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_generator(tmp_path / "absent", MODES)
