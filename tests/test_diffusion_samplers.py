"""Preconditioning, noise levels, averages and samplers, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.synthesis.diffusion.edm import Denoiser, DenoisingLoss, Given, NoiseLevels, Windows, averaged, scalings
from gmel.synthesis.diffusion.samplers import SOLVERS, Solver, evaluations, guided, holding, karras_sigmas, solve
from gmel.synthesis.diffusion.unet import UNet, UNetSize, depth_to_space, flops, space_to_depth

MEAN, DEVIATION = 0.7, 1.6
TINY = UNetSize(channels=(8, 16), embedding=16)


def ideal(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """The posterior mean for data from N(MEAN, DEVIATION^2)."""
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def exact(x: np.ndarray, high: float, low: float) -> np.ndarray:
    """The probability flow of that law: deviations from the mean shrink with the deviation of the noisy law."""
    return MEAN + (x - MEAN) * np.sqrt((DEVIATION**2 + low**2) / (DEVIATION**2 + high**2))


def error(solver: Solver, steps: int) -> float:
    # Levels are even in the root that rho takes; the last step to 0 is exact for no order and left out.
    sigmas = karras_sigmas(steps + 1, 0.05, 20.0)[:-1]
    x = jnp.linspace(-40.0, 40.0, 9)
    made = solve(ideal, x, sigmas, solver)
    return float(np.abs(np.asarray(made) - exact(np.asarray(x), 20.0, 0.05)).max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_solvers_converge_with_their_order(solver: Solver, order: int) -> None:
    errors = [error(solver, steps) for steps in (16, 32, 64)]
    found = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
    assert np.allclose(found, order, atol=0.35), found


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_have_the_mean_and_deviation_of_the_data(solver: Solver) -> None:
    sigmas = karras_sigmas(40, 0.01, 50.0)
    noise = 50.0 * jax.random.normal(jax.random.key(0), (20_000,))
    made = np.asarray(solve(ideal, noise, sigmas, solver))
    # Starting from noise without the data shifts the mean by MEAN x DEVIATION / 50 at most.
    assert abs(made.mean() - MEAN) < 0.07
    assert abs(made.std() - DEVIATION) < (0.15 if solver == "euler" else 0.05)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted(solver: Solver) -> None:
    calls = 0

    def counting(x: jax.Array, sigma: jax.Array) -> jax.Array:
        nonlocal calls
        calls += 1
        return ideal(x, sigma)

    with jax.disable_jit():
        solve(counting, jnp.ones(3), karras_sigmas(5, 0.1, 10.0), solver)
    assert calls == evaluations(solver, 5)


def test_karras_levels_are_those_of_the_paper() -> None:
    levels = np.asarray(karras_sigmas(10, 0.002, 80.0))
    plain = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    np.testing.assert_allclose(levels, [*plain, 0.0], rtol=2e-4)
    np.testing.assert_allclose(np.asarray(karras_sigmas(1, 0.02, 30.0)), [30.0, 0.0], rtol=1e-5)


def test_one_step_is_the_estimate_itself() -> None:
    x = jnp.asarray([3.0, -2.0])
    for solver in SOLVERS:
        made = solve(ideal, x, karras_sigmas(1, 0.02, 30.0), solver)
        np.testing.assert_allclose(np.asarray(made), np.asarray(ideal(x, jnp.asarray(30.0))), rtol=1e-4)


def test_held_pixels_are_renoised_and_end_as_they_were() -> None:
    seen: list[np.ndarray] = []
    known, mask = jnp.asarray([1.0, -2.0, 0.5, 0.0]), jnp.asarray([0.0, 0.0, 1.0, 1.0])
    noise = jax.random.normal(jax.random.key(1), (4,))

    def watching(x: jax.Array, sigma: jax.Array) -> jax.Array:
        seen.append((np.asarray(x) - float(sigma) * np.asarray(noise))[:2])
        return ideal(x, sigma)

    for solver in SOLVERS:
        with jax.disable_jit():
            made = solve(holding(watching, known, mask), known + 30.0 * noise, karras_sigmas(7, 0.05, 30.0), solver)
        np.testing.assert_allclose(np.asarray(made)[:2], [1.0, -2.0], atol=1e-5)
        assert abs(float(made[2]) - 0.5) > 1e-3
    np.testing.assert_allclose(np.stack(seen), np.tile([1.0, -2.0], (len(seen), 1)), atol=1e-4)


def test_guidance_moves_away_from_the_unconditional_estimate() -> None:
    def one(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return x + 1.0

    def none(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return x

    x, sigma = jnp.zeros(2), jnp.asarray(1.0)
    assert guided(one, none, 1.0) is one
    np.testing.assert_allclose(np.asarray(guided(one, none, 3.0)(x, sigma)), 3.0)
    np.testing.assert_allclose(np.asarray(guided(one, none, 0.0)(x, sigma)), 0.0)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 1.0, 7.0, 60.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_inputs_and_targets_of_the_network_have_unit_variance(sigma: float, sigma_data: float) -> None:
    rng = np.random.default_rng(0)
    y, n = sigma_data * rng.standard_normal(200_000), sigma * rng.standard_normal(200_000)
    c = [float(value) for value in scalings(jnp.asarray(sigma), sigma_data)]
    assert abs((c[2] * (y + n)).std() - 1.0) < 0.01
    assert abs(((y - c[0] * (y + n)) / c[1]).std() - 1.0) < 0.01
    assert c[3] == pytest.approx(np.log(sigma) / 4, rel=1e-4)


def test_an_untrained_network_has_the_loss_of_its_targets_variance() -> None:
    denoiser = Denoiser(UNet(TINY, 2, jax.random.key(0)))
    pixels = jax.random.normal(jax.random.key(1), (64, 32, 32, 1))
    given = Given(pixels, jnp.ones_like(pixels), jnp.zeros((64, 32, 32, 2)), jnp.ones(64, jnp.int32))
    batch = Windows(pixels, given)
    assert float(DenoisingLoss()(denoiser, batch, jax.random.key(2))) == pytest.approx(1.0, abs=0.02)
    x, sigma = 3.0 * pixels, jnp.full(64, 2.0)
    made = denoiser(x, sigma, given)
    np.testing.assert_allclose(np.asarray(made), np.asarray(x) / 5.0, rtol=1e-5)


def test_known_pixels_count_little_and_are_read_only_outside_the_mask() -> None:
    net = UNet(TINY, 1, jax.random.key(0))
    net = jax.tree.map(lambda leaf: leaf + 0.05 if isinstance(leaf, jax.Array) else leaf, net)
    denoiser = Denoiser(net)
    x, sigma, label = jnp.ones((2, 16, 16, 1)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    mask = jnp.zeros((2, 16, 16, 1)).at[:, :8].set(1.0)
    known = jax.random.normal(jax.random.key(1), x.shape)
    given = Given(known, mask, jnp.zeros((2, 16, 16, 2)), label)
    plain = denoiser(x, sigma, given)
    hidden = denoiser(x, sigma, given._replace(known=known.at[:, :8].add(5.0)))
    shown = denoiser(x, sigma, given._replace(known=known.at[:, 8:].add(5.0)))
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(hidden))
    assert np.abs(np.asarray(plain - shown)).max() > 1e-3


def test_noise_levels_are_log_normal() -> None:
    drawn = np.log(np.asarray(NoiseLevels(0.3, 0.9).draw(jax.random.key(0), 50_000)))
    assert drawn.mean() == pytest.approx(0.3, abs=0.02)
    assert drawn.std() == pytest.approx(0.9, abs=0.02)


def test_average_of_weights_is_the_sum_of_the_law() -> None:
    rng, decay = np.random.default_rng(0), 0.9
    values = rng.standard_normal(40)
    mean = jnp.asarray(0.0)
    for step, value in enumerate(values):
        mean = averaged(mean, jnp.asarray(value), decay, jnp.asarray(step))
    decays = np.minimum(decay, (1 + np.arange(40)) / (10 + np.arange(40)))
    shares = (1 - decays) * np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    assert float(mean) == pytest.approx(float(shares @ values), abs=1e-5)


def test_space_to_depth_is_undone() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    deep = space_to_depth(x, 2)
    assert deep.shape == (2, 4, 6, 12)
    np.testing.assert_array_equal(np.asarray(depth_to_space(deep, 2)), np.asarray(x))
    np.testing.assert_array_equal(np.asarray(deep[0, 1, 2, :3]), np.asarray(x[0, 2, 4]))


def test_work_is_what_the_compiled_program_says() -> None:
    """XLA counts norms and activations as well, a few per cent."""
    net = UNet(size := UNetSize(), 3, jax.random.key(0))
    arguments = (jnp.zeros((1, 32, 32, 5)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    analysis = jax.jit(net.__call__).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    counted = analysis["flops"]
    assert 0.9 < flops(size, 32) / counted <= 1.0
    parameters = sum(leaf.size for leaf in jax.tree.leaves(net) if isinstance(leaf, jax.Array))
    assert 300_000 < parameters < 450_000
