"""What a denoiser is and how it learns: Karras et al. 2022 (arXiv 2206.00364), table 1 and section 5.

Data y of standard deviation sigma_data, noise n of standard deviation sigma: the denoiser D(y + n; sigma) estimates y.
It is c_skip x + c_out F(c_in x; ln(sigma) / 4), with F the network, so that inputs and targets of F have unit variance
at every noise level.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gmel.synthesis.diffusion.unet import UNet

__all__ = ["Denoiser", "DenoisingLoss", "Given", "NoiseLevels", "Scalings", "Windows", "averaged", "scalings"]


class Given(NamedTuple):
    """What is known of windows that are drawn.

    Attributes:
        known: the clean pixels; read only where the mask is 0.
        mask: 1 where pixels are to be drawn, 0 where they are known; 1 everywhere for whole windows.
        guide: how local mean and contrast go over the window (`windows.guide`); 0 where nothing says.
        label: class, from 1; 0 for any.
    """

    known: Float[Array, "n h w 1"]
    mask: Float[Array, "n h w 1"]
    guide: Float[Array, "n h w 2"]
    label: Int[Array, "n"]


class Windows(NamedTuple):
    """A batch of clean, normalised windows for training."""

    pixels: Float[Array, "n h w 1"]
    given: Given


class Scalings(NamedTuple):
    """Preconditioning at a noise level."""

    skip: Float[Array, "*n"]
    out: Float[Array, "*n"]
    into: Float[Array, "*n"]
    noise: Float[Array, "*n"]


def scalings(sigma: Float[Array, "*n"], sigma_data: float) -> Scalings:
    """c_skip, c_out, c_in and c_noise of EDM, table 1."""
    total = sigma**2 + sigma_data**2
    return Scalings(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data * jax.lax.rsqrt(total),
        into=jax.lax.rsqrt(total),
        noise=jnp.log(jnp.maximum(sigma, 1e-12)) / 4.0,
    )


@dataclass(frozen=True)
class NoiseLevels:
    """Law of the noise levels in training: ln sigma is normal. EDM has mean -1.2 and deviation 1.2 at sigma_data 0.5;
    the mean moves with ln sigma_data, which is what a change of units of the pixels does."""

    mean: float = -1.2 + math.log(2.0)
    deviation: float = 1.2

    def draw(self, key: PRNGKeyArray, count: int) -> Float[Array, "count"]:
        """Noise levels."""
        return jnp.exp(self.mean + self.deviation * jax.random.normal(key, (count,)))


class Denoiser(eqx.Module):
    """D(x; sigma) for windows, for a class, given what is known of the window.

    Attributes:
        net: the network F. Its input is the scaled noisy window, the mask, the known pixels and the guide.
        sigma_data: standard deviation of the windows that it was trained on; 1 for normalised ones.
    """

    net: UNet
    sigma_data: float = eqx.field(static=True, default=1.0)

    def __call__(self, x: Float[Array, "n h w 1"], sigma: Float[Array, "n"], given: Given) -> Float[Array, "n h w 1"]:
        """The denoised windows, from noisy ones and their noise levels."""
        c = scalings(sigma, self.sigma_data)
        return _wide(c.skip) * x + _wide(c.out) * self.predict(x, c, given)

    def predict(self, x: Float[Array, "n h w 1"], c: Scalings, given: Given) -> Float[Array, "n h w 1"]:
        """F: what the network itself gives."""
        held = (1.0 - given.mask) * given.known / self.sigma_data
        return self.net(jnp.concatenate([_wide(c.into) * x, given.mask, held, given.guide], -1), c.noise, given.label)


@dataclass(frozen=True)
class DenoisingLoss:
    """Mean over the batch of the EDM loss lambda(sigma) ||D(y + n; sigma) - y||^2 with lambda = 1 / c_out^2, which is
    the plain squared error of F against its target.

    Attributes:
        levels: law of the noise levels.
        unlabelled: share of windows whose class is hidden (classifier-free guidance, arXiv 2207.12598).
        known: weight of pixels that are known: they teach little (they are an input) and are replaced in sampling.
    """

    levels: NoiseLevels = NoiseLevels()
    unlabelled: float = 0.1
    known: float = 0.1

    def __call__(self, denoiser: Denoiser, batch: Windows, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a batch of clean windows; `key` draws noise, levels and hidden classes."""
        noise_key, level_key, label_key = jax.random.split(key, 3)
        count = batch.pixels.shape[0]
        sigma = self.levels.draw(level_key, count)
        c = scalings(sigma, denoiser.sigma_data)
        x = batch.pixels + _wide(sigma) * jax.random.normal(noise_key, batch.pixels.shape)
        hidden = jax.random.uniform(label_key, (count,)) < self.unlabelled
        given = batch.given._replace(label=jnp.where(hidden, 0, batch.given.label))
        target = (batch.pixels - _wide(c.skip) * x) / _wide(c.out)
        error = (denoiser.predict(x, c, given) - target) ** 2
        weight = self.known + (1.0 - self.known) * given.mask
        return (weight * error).sum() / weight.sum()


def averaged(
    mean: Float[Array, "..."], new: Float[Array, "..."], decay: float, step: Int[Array, ""]
) -> Float[Array, "..."]:
    """Exponential moving average of weights. The decay begins low, min(decay, (1 + step) / (10 + step)), so that the
    initial weights are forgotten even in short trainings."""
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return now * mean + (1.0 - now) * new


def _wide(per_window: Float[Array, "n"]) -> Float[Array, "n 1 1 1"]:
    return per_window[:, None, None, None]
