"""Quality of a generated image as a function of its denoising steps, equation (13)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["logarithmic_quality", "piecewise_quality", "power_law_quality"]


def piecewise_quality(
    steps: Float[Array, "..."], first_steps: float, last_steps: float, first: float, last: float
) -> Float[Array, "..."]:
    """0 below `first_steps`, from there on linear from `first` to `last` at `last_steps`, then constant.

    The quality of a service provider in AGOD (2303.13052, equation (2)); its released code has first = 0.
    """
    share = jnp.clip((steps - first_steps) / (last_steps - first_steps), 0.0, 1.0)
    return jnp.where(steps < first_steps, 0.0, first + (last - first) * share)


def logarithmic_quality(
    steps: Float[Array, "..."],
    first_steps: float,
    last_steps: float,
    scale: float,
    base: float,
    offset: float,
    last: float,
) -> Float[Array, "..."]:
    """0 below `first_steps`, scale log_base(steps) + offset up to `last_steps`, `last` above.

    EAT (2507.10026): 0.16 log_6(s) - 0.02 for 5 <= s <= 30, 0.27 above: the last step is a step down.
    """
    inside = scale * jnp.log(jnp.maximum(steps, 1.0)) / jnp.log(base) + offset
    return jnp.where(steps < first_steps, 0.0, jnp.where(steps <= last_steps, inside, last))


def power_law_quality(
    steps: Float[Array, "..."], first_steps: float, limit: float, factor: float, exponent: float
) -> Float[Array, "..."]:
    """limit - factor steps^-exponent, 0 below `first_steps`, never below 0: the error of a sampler falls like a
    power."""
    inside = limit - factor * jnp.maximum(steps, 1.0) ** -exponent
    return jnp.where(steps < first_steps, 0.0, jnp.maximum(inside, 0.0))
