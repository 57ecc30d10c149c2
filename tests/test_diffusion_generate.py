"""Mode `generate`, end to end on small plates: what it draws, where, and what its files hold."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plates import Silent, good_plates, pitted_plates, rough_plates

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.prior import Prior
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.diffusion.unet import UNetSize
from gmel.synthesis.generate import Generate, Plan
from gmel.synthesis.generator import load_generator, save_generator
from gmel.synthesis.photo import GOOD

TINY = UNetSize(channels=(8, 16), embedding=16)
SHORT = Training(steps=6, batch=4, probe=4, probe_every=3)
PLAN = Plan(prior=SHORT, adaptation=SHORT, scratch=SHORT, size=TINY)


@pytest.fixture(scope="module")
def generator() -> Generate:
    shots = [*pitted_plates(2), *rough_plates(2)]
    return Generate.fit(shots, good_plates(8), 0, Silent(), plan=PLAN)


def test_defects_are_drawn_on_good_parts(generator: Generate) -> None:
    good = {photo.name: photo for photo in good_plates(8)}
    for photo in generator.sample("pit", 3, 1, 2):
        ground = good[photo.name]
        assert photo.label == "pit"
        assert photo.mask is not None
        assert 0 < photo.mask.sum() < photo.mask.size
        changed = photo.image != ground.image
        rows, columns = np.nonzero(photo.mask)
        reach = np.zeros_like(photo.mask)
        reach[max(rows.min() - 3, 0) : rows.max() + 4, max(columns.min() - 3, 0) : columns.max() + 4] = True
        assert changed.any()
        assert not changed[~reach].any(), "beyond the defect's edge every pixel is the good part's"


def test_whole_photos_have_the_size_and_level_of_the_shots(generator: Generate) -> None:
    for photo in generator.sample("rough", 3, 1, 2):
        assert sorted(photo.image.shape) == [40, 48]
        assert photo.image.dtype == np.uint8
        assert photo.mask is None
        assert abs(photo.pixels().mean() - 0.55) < 0.1


def test_same_seed_same_photos_in_any_company(generator: Generate) -> None:
    for label in generator.labels:
        first, again = generator.sample(label, 3, 7, 2), generator.sample(label, 1, 7, 2)
        np.testing.assert_array_equal(first[0].image, again[0].image)
        assert (first[0].image.shape != first[1].image.shape) or (first[0].image != first[1].image).any()
        other = generator.sample(label, 1, 8, 2)[0].image
        assert other.shape != first[0].image.shape or (other != first[0].image).any()


def test_a_file_gives_the_same_generator_and_holds_no_photo(generator: Generate, tmp_path: Path) -> None:
    path = tmp_path / "generate.safetensors"
    save_generator(path, generator)
    loaded = load_generator(path, {Generate.mode: Generate})
    assert isinstance(loaded, Generate)
    whole = generator.sample("rough", 2, 3, 2)
    for mine, theirs in zip(whole, loaded.sample("rough", 2, 3, 2), strict=True):
        np.testing.assert_array_equal(mine.image, theirs.image)
    arrays, _ = generator.state()
    assert not any(array.shape in ((40, 48), (48, 40)) for array in arrays.values())
    backed = loaded.on(good_plates(8)).sample("pit", 2, 3, 2)
    for mine, theirs in zip(generator.sample("pit", 2, 3, 2), backed, strict=True):
        np.testing.assert_array_equal(mine.image, theirs.image)
    drawn = loaded.sample("pit", 1, 3, 2)[0]
    assert drawn.mask is not None, "without good parts it draws the ground as well"
    assert drawn.mask.any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda g: g.sample("dent", 1, 0), "label is 'dent', must be one of pit, rough"),
        (lambda g: g.sample(GOOD, 1, 0), "label is 'good'"),
        (lambda g: g.sample("pit", -1, 0), "count is -1"),
        (lambda g: g.sample("pit", 1, 0, 0), "steps is 0, must be from 1 to 50"),
        (lambda g: g.sample("pit", 1, 0, 51), "steps is 51"),
        (lambda g: Generate.fit([], [], 0, Silent()), "shots: there are none"),
        (lambda g: Generate.fit(pitted_plates(1), [], 0, Silent(), plan=replace(PLAN, scale=3)), "scale is 3"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(generator: Generate, call, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(generator)
    assert "\n" not in str(caught.value)


def test_state_with_wrong_arrays_is_refused(generator: Generate) -> None:
    arrays, facts = generator.state()
    name = next(name for name in arrays if name.endswith("enter.weight"))
    with pytest.raises(InputError, match="must be float32"):
        Generate.from_state({**arrays, name: arrays[name][..., :1]}, facts)
    with pytest.raises(InputError, match="no numbers"):
        Generate.from_state({**arrays, name: np.full_like(arrays[name], np.nan)}, facts)
    for missing in ("labels", "channels", "solver"):
        with pytest.raises(InputError, match="fit the generator anew"):
            Generate.from_state(arrays, {key: value for key, value in facts.items() if key != missing})


def test_a_prior_is_saved_loaded_and_adapted(tmp_path: Path) -> None:
    prior = Prior.fit(good_plates(2), 0, Silent(), training=SHORT, size=TINY)
    prior.save(tmp_path / "prior.safetensors")
    loaded = Prior.load(tmp_path / "prior.safetensors")
    shots = rough_plates(2)
    mine = Generate.fit(shots, [], 0, Silent(), prior=prior, plan=PLAN).sample("rough", 1, 0, 2)
    theirs = Generate.fit(shots, [], 0, Silent(), prior=loaded, plan=PLAN).sample("rough", 1, 0, 2)
    np.testing.assert_array_equal(mine[0].image, theirs[0].image)
    with pytest.raises(InputError, match="trained at scale 1"):
        Generate.fit(shots, [], 0, Silent(), prior=prior, plan=replace(PLAN, scale=2))


def test_half_resolution_gives_photos_of_full_size() -> None:
    shots = rough_plates(2, (70, 81))
    photo = Generate.fit(shots, [], 0, Silent(), plan=replace(PLAN, scale=2)).sample("rough", 1, 0, 2)[0]
    assert sorted(photo.image.shape) == [70, 81]
