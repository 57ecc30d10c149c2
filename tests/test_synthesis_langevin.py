"""Mode `langevin`: its chain against closed forms, and the mode end to end on small plates."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.edm import Given, Windows
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.generator import load_generator, save_generator
from gmel.synthesis.langevin import Chain, ContrastiveLoss, EnergyNet, Langevin, LangevinPlan, walk
from gmel.synthesis.photo import GOOD
from plates import good_plates, pitted_plates, rough_plates
from reporters import Silent

PLAN = LangevinPlan(Training(steps=4, batch=4, probe_every=0), ContrastiveLoss(steps=3), widths=(8, 16))


@pytest.mark.parametrize("step", [0.3, 1.0, 1.9])
@pytest.mark.parametrize("variance", [1.0, 2.5])
def test_stationary_variance_on_a_gaussian_energy(step: float, variance: float) -> None:
    """x <- (1 - a) x + step n, a = step^2 / (2 v): v_s = (1 - a)^2 v_s + step^2, so v_s = v / (1 - step^2 / (4 v)):
    the variance of the energy, widened by the length of the step."""
    steps, chains = 400, 20_000
    noise = jax.random.normal(jax.random.key(0), (steps, chains))
    made = np.asarray(walk(lambda x: x / variance, jnp.zeros(chains), noise, Chain(step, 1.0, 1e6)))
    wanted = variance / (1.0 - step**2 / (4.0 * variance))
    # The standard error of a variance is itself times the root of 2 / n: 1 %.
    assert made.var() == pytest.approx(wanted, rel=0.04)
    assert abs(made.mean()) < 4 * np.sqrt(wanted / chains)


def test_temperature_scales_the_stationary_deviation() -> None:
    noise = jax.random.normal(jax.random.key(1), (200, 20_000))
    hot, cold = (
        np.asarray(walk(lambda x: x, jnp.zeros(20_000), noise, Chain(1.0, temperature, 1e6))).std()
        for temperature in (1.0, 0.1)
    )
    assert cold == pytest.approx(0.1 * hot, rel=1e-3)


def test_the_walk_is_held_within_its_bound() -> None:
    made = walk(lambda x: -10.0 * x, jnp.asarray([1.0, -1.0]), jnp.zeros((20, 2)), Chain(1.0, 0.0, 6.0))
    np.testing.assert_array_equal(np.asarray(made), [6.0, -6.0])


def test_slope_is_the_difference_quotient_of_the_energy() -> None:
    net = EnergyNet(2, jax.random.key(0), (8, 16))
    x = jax.random.normal(jax.random.key(1), (1, 32, 32, 1))
    label = jnp.asarray([1], jnp.int32)
    slope = np.asarray(net.slope(x, label))[0, :, :, 0]
    for row, column in ((0, 0), (13, 20), (31, 31)):
        up, down = (float(net(x.at[0, row, column, 0].add(change), label)[0]) for change in (0.05, -0.05))
        assert slope[row, column] == pytest.approx((up - down) / 0.1, abs=2e-3)


def test_the_loss_of_equal_windows_is_that_of_its_regularisation() -> None:
    """Where nothing is drawn the run ends with the real window: what is contrasted is equal."""
    net = EnergyNet(1, jax.random.key(0), (8, 16))
    pixels = jax.random.normal(jax.random.key(1), (3, 32, 32, 1))
    given = Given(pixels, jnp.zeros_like(pixels), jnp.zeros((3, 32, 32, 2)), jnp.ones(3, jnp.int32))
    loss = ContrastiveLoss(steps=2, smoothing=0.0, regularisation=0.5)
    energy = np.asarray(net(pixels, given.label))
    found = float(loss(net, Windows(pixels, given), jax.random.key(2)))
    assert found == pytest.approx(0.5 * 2.0 * (energy**2).mean(), rel=1e-4)


@pytest.fixture(scope="module")
def generator() -> Langevin:
    return Langevin.fit([*pitted_plates(2), *rough_plates(2)], good_plates(4), 0, Silent(), plan=PLAN)


def test_it_draws_defects_on_good_parts_and_whole_photos(generator: Langevin) -> None:
    pit = generator.sample("pit", 2, 1, 3)[0]
    assert pit.template is not None
    assert pit.mask is not None
    assert (pit.label, pit.source) == ("pit", "")
    assert 0 < (pit.image != pit.template).mean() < 0.5
    rough = generator.sample("rough", 1, 1, 3)[0]
    assert rough.mask is None
    assert sorted(rough.image.shape) == [40, 48]
    again = generator.sample("pit", 1, 1, 3)[0]
    np.testing.assert_array_equal(pit.image, again.image)
    assert (generator.sample("pit", 1, 2, 3)[0].image != pit.image).any()
    assert {photo.label for photo in generator.sham(2, 0)} == {GOOD}


def test_a_file_gives_the_same_generator(generator: Langevin, tmp_path: Path) -> None:
    save_generator(tmp_path / "file", generator)
    loaded = load_generator(tmp_path / "file", {"langevin": Langevin})
    for mine, theirs in zip(generator.sample("rough", 2, 0, 3), loaded.sample("rough", 2, 0, 3), strict=True):
        np.testing.assert_array_equal(mine.image, theirs.image)


def test_what_cannot_be_done_is_said_in_one_line(generator: Langevin) -> None:
    with pytest.raises(InputError, match="steps is 0, must be from 1 to 1000"):
        generator.sample("pit", 1, 0, 0)
    with pytest.raises(InputError, match="label is 'dent'"):
        generator.sample("dent", 1, 0)
    arrays, facts = generator.state()
    with pytest.raises(InputError, match="chain is '1 2'"):
        Langevin.from_state(arrays, {**facts, "chain": "1 2"})
    name = "energy.middle.weight"
    with pytest.raises(InputError, match=r"array energy\.middle\.weight is missing"):
        Langevin.from_state({key: array for key, array in arrays.items() if key != name}, facts)
    with pytest.raises(InputError, match="must be float32"):
        Langevin.from_state({**arrays, name: arrays[name][:1]}, facts)


@pytest.mark.slow
def test_training_teaches_the_energy_to_tell_windows_from_noise() -> None:
    plan = replace(PLAN, training=Training(steps=60, batch=16, rate=1e-3, probe_every=0), widths=(24, 48))
    made = Langevin.fit(rough_plates(4), [], 0, Silent(), plan=plan)
    real = np.stack(
        [(photo.pixels()[:32, :32] - photo.pixels().mean()) / photo.pixels().std() for photo in rough_plates(8)]
    )
    label = jnp.ones(8, jnp.int32)
    noise = jax.random.normal(jax.random.key(5), (8, 32, 32, 1))

    def gap(net: EnergyNet) -> float:
        return float(net(noise, label).mean() - net(jnp.asarray(real[..., None], jnp.float32), label).mean())

    before = gap(EnergyNet(1, jax.random.key(0), plan.widths))
    assert gap(made.net) > max(before, 0.0) + 0.1
