"""Mode `harmonise`, and how fields are stitched: what changes, what does not, and whether seams show."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from gmel.scenario.errors import InputError
from gmel.synthesis.compose import Compose
from gmel.synthesis.diffusion.prior import Prior
from gmel.synthesis.diffusion.samplers import karras_sigmas, solve
from gmel.synthesis.diffusion.stitching import Field, layout, stitched
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.diffusion.unet import UNetSize
from gmel.synthesis.generate import Plan
from gmel.synthesis.generator import load_generator, save_generator
from gmel.synthesis.harmonise import EDGE, Harmonise, harmonised
from gmel.synthesis.photo import GOOD, Floats
from plates import good_plates, pitted_plates, rough_plates
from reporters import Silent

TINY = UNetSize(channels=(8, 16), embedding=16)
PLAN = Plan(prior=Training(steps=6, batch=4, probe=4, probe_every=3), size=TINY)


@pytest.fixture(scope="module")
def generator() -> Harmonise:
    return Harmonise.fit(pitted_plates(3), good_plates(3), 0, Silent(), plan=PLAN)


def test_pixels_away_from_the_edge_are_those_of_the_composed_photo(generator: Harmonise) -> None:
    composed = Compose(generator.shots, generator.good).sample("pit", 5, 3)
    for before, after in zip(composed, generator.sample("pit", 5, 3), strict=True):
        assert before.mask is not None
        assert after.mask is not None
        mask = before.mask
        np.testing.assert_array_equal(after.mask, mask)
        ground, defect = (
            np.asarray(ndimage.binary_dilation(side, iterations=EDGE), np.bool_) for side in (mask, ~mask)
        )
        away = ~ground | ~defect
        np.testing.assert_array_equal(after.image[away], before.image[away])
        assert (after.image[~away] != before.image[~away]).mean() > 0.3
        assert after.source == before.source != ""
        assert after.name == before.name.replace("compose", "harmonise")


def test_the_network_knows_nothing_of_the_shots(generator: Harmonise) -> None:
    others = Harmonise.fit(pitted_plates(2, label="dent"), good_plates(3), 5, Silent(), plan=PLAN)
    for name, array in generator.prior.state()[0].items():
        np.testing.assert_array_equal(array, others.prior.state()[0][name])
    np.testing.assert_array_equal(generator.sensor.state()["sensor.numbers"], others.sensor.state()["sensor.numbers"])


def test_shams_are_good_parts_with_a_redrawn_edge(generator: Harmonise) -> None:
    blends = Compose(generator.shots, generator.good).sham(3, 0)
    for before, after in zip(blends, generator.sham(3, 0), strict=True):
        assert (after.label, after.mask, after.source) == (GOOD, None, "")
        assert 0 < (after.image != before.image).mean() < 0.3


def _inverted(fields: list[Field]) -> list[Floats]:
    return [-field.start for field in fields]


def test_several_defects_of_a_photo_are_all_drawn_over(generator: Harmonise) -> None:
    photo = pitted_plates(1, (40, 90))[0]
    assert photo.mask is not None
    mask = photo.mask | np.roll(photo.mask, 50, axis=1)
    made = harmonised([replace(photo, mask=mask)], 1, generator.sensor, 0, _inverted)[0]
    changed = made.image != photo.image
    assert changed[:, :40].any()
    assert changed[:, 50:].any()


def test_a_file_gives_the_same_photos(generator: Harmonise, tmp_path: Path) -> None:
    save_generator(tmp_path / "file", generator)
    loaded = load_generator(tmp_path / "file", {"harmonise": Harmonise})
    for mine, theirs in zip(generator.sample("pit", 2, 1), loaded.sample("pit", 2, 1), strict=True):
        np.testing.assert_array_equal(mine.image, theirs.image)


def test_what_cannot_be_done_is_said_in_one_line(generator: Harmonise) -> None:
    with pytest.raises(InputError, match="no shot has a mask"):
        Harmonise.fit(rough_plates(2), good_plates(2), 0, Silent(), plan=PLAN)
    with pytest.raises(InputError, match="steps is 51"):
        generator.sample("pit", 1, 0, 51)
    with pytest.raises(InputError, match="rough/0: has no mask"):
        harmonised(rough_plates(1), 1, generator.sensor, 0, lambda fields: [field.start for field in fields])
    arrays, facts = generator.state()
    for name in ("sensor.levels", "denoiser.net.enter.weight", "shot.0.image"):
        with pytest.raises(InputError, match="fit the generator anew"):
            Harmonise.from_state({key: array for key, array in arrays.items() if key != name}, facts)
    for size in ("7", "0", "x"):
        with pytest.raises(InputError, match="size of the network"):
            Prior.from_state(arrays, {**facts, "patch": size})


def test_stitched_estimates_are_those_of_the_windows_where_these_agree() -> None:
    """An estimate that knows only the pixel is the same in every window: stitching must give it back everywhere."""
    place = layout([(70, 45), (32, 32)])
    pixels = jax.random.normal(jax.random.key(0), (place.pixels,))
    whole = stitched(lambda x, _: 3.0 * x + 1.0, jnp.asarray(place.index), jnp.asarray(place.weight))
    made = np.asarray(whole(pixels, jnp.asarray(1.0)))
    used = 70 * 45 + 32 * 32
    np.testing.assert_allclose(made[:used], 3.0 * np.asarray(pixels[:used]) + 1.0, rtol=1e-5)


def _smooth_field(stitch: bool) -> np.ndarray:
    """A sample of 128 x 128 whose windows are estimated each with its own mean, which is what makes seams."""
    side = 128

    def shrink(x: jax.Array, sigma: jax.Array) -> jax.Array:
        """The posterior mean for windows that are constant, with variance 1, and white noise of variance 0.01."""
        mean = x.mean((1, 2, 3), keepdims=True)
        noise = sigma**2 / 32**2
        return mean / (1.0 + noise) + 0.01 / (0.01 + sigma**2) * (x - mean)

    place = layout([(side, side)], stride=24 if stitch else 32)
    weight = place.weight if stitch else np.where(place.weight > 0, 1.0, 0.0).astype(np.float32)
    whole = stitched(shrink, jnp.asarray(place.index), jnp.asarray(weight))
    noise = 20.0 * jax.random.normal(jax.random.key(0), (place.pixels,))
    made = np.asarray(solve(whole, noise, karras_sigmas(20, 0.02, 20.0)))
    return made[: side * side].reshape(side, side)


def test_no_seams_show_at_the_borders_of_windows() -> None:
    """Steps across the places where windows end, against steps everywhere else."""

    def excess(field: np.ndarray, stride: int) -> float:
        steps = np.abs(np.diff(field.mean(0)))
        ends = np.zeros(steps.size, bool)
        for start in range(0, 128 - 32 + 1, stride):
            ends[[column - 1 for column in (start, start + 32) if 0 < column < 128]] = True
        return float(steps[ends].mean() / steps[~ends].mean())

    assert excess(_smooth_field(stitch=False), 32) > 5.0, "windows side by side have seams"
    assert excess(_smooth_field(stitch=True), 24) < 1.5


def test_a_photo_is_the_same_alone_and_in_company(generator: Harmonise) -> None:
    many, alone = generator.sample("pit", 40, 3, 2), generator.sample("pit", 1, 3, 2)
    # Batches of another size may round differently by less than a grey value.
    assert np.abs(many[0].image.astype(int) - alone[0].image.astype(int)).max() <= 1
