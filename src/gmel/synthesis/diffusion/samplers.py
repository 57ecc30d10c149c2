"""From noise to a sample: solvers of dx/dsigma = (x - D(x; sigma)) / sigma, for any estimate D of the clean sample.

D is a function, so that what is known can be held, guidance applied and windows stitched by wrapping it: the solvers
know of none of that.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "SOLVERS",
    "Denoise",
    "Levels",
    "Solver",
    "advanced",
    "evaluations",
    "guided",
    "holding",
    "karras_sigmas",
    "levels_of_steps",
    "solve",
]

Denoise = Callable[[Float[Array, "*shape"], Float[Array, ""]], Float[Array, "*shape"]]
"""The estimate of the clean sample from a noisy one and its noise level."""
Levels = tuple[Array, Array, Array, Array]
"""Of a step: noise level at its start, at its end, at the start of the step before, and whether it is the first."""
Solver = Literal["euler", "heun", "dpm++"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)


def karras_sigmas(steps: int, low: float, high: float, rho: float = 7.0) -> Float[Array, "steps_and_one"]:
    """Noise levels from `high` to `low` in `steps`, then 0 (Karras et al. 2022, equation 5)."""
    ramp = jnp.linspace(0.0, 1.0, steps) if steps > 1 else jnp.zeros(1)
    levels = (high ** (1.0 / rho) + ramp * (low ** (1.0 / rho) - high ** (1.0 / rho))) ** rho
    return jnp.append(levels, 0.0)


def evaluations(solver: Solver, steps: int) -> int:
    """Evaluations of the network for a sample: Heun takes two a step, but one in the last, to zero."""
    return 2 * steps - 1 if solver == "heun" else steps


def solve(
    denoise: Denoise, x: Float[Array, "*shape"], sigmas: Float[Array, "levels"], solver: Solver = "dpm++"
) -> Float[Array, "*shape"]:
    """Follows the probability flow from `sigmas[0]` to `sigmas[-1]`. Draws nothing: the sample depends on `x` alone.

    Args:
        denoise: the estimate of the clean sample.
        x: the noisy sample at `sigmas[0]`.
        sigmas: falling noise levels; the last may be 0, where the last step is the estimate itself.
        solver: `euler` (order 1), `heun` (order 2, two evaluations a step; EDM algorithm 1 without noise) or `dpm++`
            (order 2, one evaluation a step; DPM-Solver++(2M), arXiv 2211.01095 algorithm 2 with alpha = 1).
    """

    def advance(carry: tuple[Array, Array], levels: Levels) -> tuple[tuple[Array, Array], None]:
        return advanced(denoise, carry, levels, solver), None

    (x, _), _ = jax.lax.scan(advance, (x, jnp.zeros_like(x)), levels_of_steps(sigmas))
    return x


def levels_of_steps(sigmas: Float[Array, "levels"]) -> Levels:
    """The levels of every step, each [steps]: what `solve` goes through, and who takes single steps."""
    before = jnp.concatenate([sigmas[:1], sigmas[:-2]])
    return sigmas[:-1], sigmas[1:], before, jnp.arange(sigmas.shape[0] - 1) == 0


def advanced(denoise: Denoise, carry: tuple[Array, Array], levels: Levels, solver: Solver) -> tuple[Array, Array]:
    """One step of `solve`.

    Args:
        denoise: the estimate of the clean sample.
        carry: the sample, and the estimate of the step before (zeros in the first step).
        levels: of this step.
        solver: see `solve`.
    """
    return {"euler": _euler, "heun": _heun, "dpm++": _dpm}[solver](denoise, *carry, *levels)


def _euler(
    denoise: Denoise, x: Array, last: Array, sigma: Array, after: Array, before: Array, first: Array
) -> tuple[Array, Array]:
    clean = denoise(x, sigma)
    return clean + after / sigma * (x - clean), clean


def _heun(
    denoise: Denoise, x: Array, last: Array, sigma: Array, after: Array, before: Array, first: Array
) -> tuple[Array, Array]:
    slope = (x - denoise(x, sigma)) / sigma
    ahead = x + (after - sigma) * slope

    def correct(_: None) -> Array:
        return x + (after - sigma) * 0.5 * (slope + (ahead - denoise(ahead, after)) / after)

    return jax.lax.cond(after > 0.0, correct, lambda _: ahead, None), last


def _dpm(
    denoise: Denoise, x: Array, last: Array, sigma: Array, after: Array, before: Array, first: Array
) -> tuple[Array, Array]:
    clean = denoise(x, sigma)
    # Time is -ln sigma. In the first step there is no earlier estimate, in the step to zero none would help.
    stride = jnp.log(sigma / jnp.where(after > 0.0, after, sigma / 2.0))
    ratio = jnp.log(jnp.where(first, 2.0, before / sigma)) / stride
    estimate = jnp.where(first | (after <= 0.0), clean, clean + (clean - last) / (2.0 * ratio))
    return after / sigma * x + (1.0 - after / sigma) * estimate, clean


def guided(with_class: Denoise, without: Denoise, weight: float) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598): away from the estimate without the class. A weight of 1 is the plain
    conditional estimate and costs one evaluation, any other two."""
    if weight == 1.0:
        return with_class

    def denoise(x: Array, sigma: Array) -> Array:
        free = without(x, sigma)
        return free + weight * (with_class(x, sigma) - free)

    return denoise


def holding(denoise: Denoise, known: Float[Array, "*shape"], mask: Float[Array, "*shape"]) -> Denoise:
    """Inpainting: where `mask` is 0 the clean sample is known.

    A known pixel that starts as known + sigma n has exactly known + sigma n at every later level, with the same n: it
    is re-noised in each step, and at level 0 it is what it was.
    """
    return lambda x, sigma: mask * denoise(x, sigma) + (1.0 - mask) * known
