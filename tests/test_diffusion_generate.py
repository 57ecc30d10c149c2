"""Mode `generate`, end to end on small plates: what it draws, where, and what its files hold."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.prior import prior_for
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.diffusion.unet import UNetSize
from gmel.synthesis.generate import Generate, Plan
from gmel.synthesis.generator import Means, load_generator, save_generator
from gmel.synthesis.photo import GOOD
from plates import good_plates, pitted_plates, rough_plates
from reporters import Silent

TINY = UNetSize(channels=(8, 16), embedding=16)
SHORT = Training(steps=6, batch=4, probe=4, probe_every=3)
PLAN = Plan(prior=SHORT, adaptation=SHORT, scratch=SHORT, size=TINY)


@pytest.fixture(scope="module")
def generator() -> Generate:
    shots = [*pitted_plates(2), *rough_plates(2)]
    return Generate.fit(shots, good_plates(8), 0, Silent(), plan=PLAN)


def test_defects_are_drawn_on_good_parts(generator: Generate) -> None:
    good = {photo.image.tobytes(): photo for photo in good_plates(8)}
    for index, photo in enumerate(generator.sample("pit", 3, 1, 2)):
        assert photo.template is not None
        ground = good[photo.template.tobytes()]
        assert (photo.label, photo.name, photo.source) == ("pit", f"generate pit {index}", "")
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
def test_what_cannot_be_done_is_said_in_one_line(
    generator: Generate, call: Callable[[Generate], object], words: str
) -> None:
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


@pytest.mark.slow
def test_shams_are_good_parts_drawn_over_like_defects(generator: Generate) -> None:
    shams = generator.sham(4, 1)
    assert [photo.label for photo in shams] == [GOOD] * 4
    assert all(photo.mask is None and photo.source == "" for photo in shams)
    drawn_over = [photo for photo in shams if photo.template is not None]
    assert len(drawn_over) == 2, "half stand for the pits, on good parts, half for the rough plates, drawn whole"
    for photo in drawn_over:
        assert photo.template is not None
        changed = (photo.image != photo.template).mean()
        assert 0 < changed < 0.5
    assert Generate.fit(rough_plates(2), [], 0, Silent(), plan=PLAN).sham(4, 1) == []


def test_a_prior_is_trained_once_written_and_read(tmp_path: Path) -> None:
    means, shots, good = Means(prior=tmp_path / "prior.safetensors"), rough_plates(2), good_plates(8)
    first, second, third = Silent(), Silent(), Silent()
    mine = Generate.fit(shots, good, 0, first, means, PLAN).sample("rough", 1, 0, 2)
    theirs = Generate.fit(shots, good, 0, second, means, PLAN).sample("rough", 1, 0, 2)
    np.testing.assert_array_equal(mine[0].image, theirs[0].image)
    assert "prior on 8 good parts" not in second.notes
    Generate.fit(pitted_plates(1), good, 5, third, plan=PLAN)
    assert "prior on 8 good parts" not in third.notes, "the same good parts have the same prior within a process"
    with pytest.raises(InputError, match="trained at scale 1"):
        Generate.fit(shots, [], 0, Silent(), means, replace(PLAN, scale=2))
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(InputError, match="corrupt"):
        Generate.fit(shots, [], 0, Silent(), Means(prior=tmp_path / "broken"), PLAN)


class Impatient(Silent):
    """Presses Ctrl-C after so many updates of a training."""

    def __init__(self, training: str, after: int) -> None:
        super().__init__()
        self.training, self.after = training, after

    def advance(self, done: float, total: float, text: str) -> None:
        if text.startswith(self.training) and done == self.after:
            raise KeyboardInterrupt


def test_an_interrupt_is_kept_where_asked_and_goes_on_to_the_same_generator(tmp_path: Path) -> None:
    shots, good = rough_plates(2), good_plates(9)
    means = Means(tmp_path / "prior", tmp_path / "generator")
    straight = Generate.fit(shots, good, 0, Silent(), plan=PLAN)
    with pytest.raises(KeyboardInterrupt):
        Generate.fit(shots, good, 1, Impatient("adaptation", 2), plan=PLAN)
    reporter = Impatient("adaptation", 2)
    part = Generate.fit(shots, good, 0, reporter, means, PLAN)
    assert "adaptation: interrupted after 2 of 6 updates; these are kept" in reporter.notes
    with pytest.raises(InputError, match="photos is"):
        Generate.fit(pitted_plates(2), good, 0, Silent(), replace(means, resume=True), PLAN)
    resumed = Generate.fit(shots, good, 0, Silent(), replace(means, resume=True), PLAN)
    leaf = "denoiser.net.leave.weight"
    np.testing.assert_array_equal(resumed.state()[0][leaf], straight.state()[0][leaf])
    assert (part.state()[0][leaf] != straight.state()[0][leaf]).any()
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


@pytest.mark.slow
def test_low_rank_adaptation_changes_the_prior_by_few_ranks() -> None:
    good = good_plates(8)
    full = Generate.fit(rough_plates(2), good, 0, Silent(), plan=PLAN)
    low = Generate.fit(rough_plates(2), good, 0, Silent(), plan=replace(PLAN, rank=1))
    prior = prior_for(good, Silent(), PLAN.prior, TINY, 1, Means())
    name = "denoiser.net.middle.first.weight"
    before = prior.state()[0][name]

    def ranks(generator: Generate) -> int:
        change = (generator.state()[0][name] - before).reshape(-1, before.shape[-1])
        return int((np.linalg.svd(change, compute_uv=False) > 1e-5).sum())

    assert ranks(low) == 1
    assert ranks(full) > 4


def test_half_resolution_gives_photos_of_full_size() -> None:
    shots = rough_plates(2, (70, 81))
    photo = Generate.fit(shots, [], 0, Silent(), plan=replace(PLAN, scale=2)).sample("rough", 1, 0, 2)[0]
    assert sorted(photo.image.shape) == [70, 81]
