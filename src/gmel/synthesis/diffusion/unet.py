"""A lean U-Net for windows of 32 x 32 pixels: 0.4 million parameters, made for processors without a GPU.

Space-to-depth comes first: XLA's convolutions run at 4 GFLOP/s on one channel at full resolution and at a hundred on 32
channels at half of it. Skips are added, not concatenated: the wide convolutions after a concatenation were a third of
the work. A group norm and its FiLM are one scale and one shift per channel, so that a feature map is read twice, not
five times.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

__all__ = ["CHANNELS_OF_GROUP", "UNet", "UNetSize", "depth_to_space", "flops", "space_to_depth"]

CHANNELS_OF_GROUP = 8
"""Channels of a group of the group norm."""
_HEAD = 32
"""Channels of an attention head."""
_FREQUENCIES = 16


@dataclass(frozen=True)
class UNetSize:
    """What a U-Net is made of.

    Attributes:
        channels: feature channels of each level, the finest first; multiples of 32 at the lowest (heads), of 8 above.
        patch: pixels of a side that space-to-depth makes one position.
        inputs: channels of the window (noisy pixels first, then conditioning, such as mask, known pixels, guide).
        outputs: channels of what it predicts.
        embedding: width of the embedding of noise level and class.
    """

    channels: tuple[int, ...] = (32, 64)
    patch: int = 2
    inputs: int = 5
    outputs: int = 1
    embedding: int = 96

    @property
    def multiple(self) -> int:
        """A window's sides must be multiples of it."""
        return self.patch * 2 ** (len(self.channels) - 1)


def space_to_depth(x: Float[Array, "n h w c"], patch: int) -> Float[Array, "n h2 w2 c2"]:
    """Blocks of `patch` x `patch` pixels as channels."""
    n, h, w, c = x.shape
    blocks = x.reshape(n, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Float[Array, "n h w c"], patch: int) -> Float[Array, "n h2 w2 c2"]:
    """The reverse of :func:`space_to_depth`."""
    n, h, w, c = x.shape
    blocks = x.reshape(n, h, w, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, h * patch, w * patch, c // patch**2)


class Linear(eqx.Module):
    """A linear layer over the last axis."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, "outputs"]

    def __init__(self, inputs: int, outputs: int, key: PRNGKeyArray, gain: float = 1.0) -> None:
        self.weight = gain / math.sqrt(inputs) * jax.random.normal(key, (inputs, outputs))
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return x @ self.weight + self.bias


class Conv(eqx.Module):
    """A 3 x 3 convolution over [n, h, w, channels], which XLA's processor back end does fastest."""

    weight: Float[Array, "3 3 inputs outputs"]
    bias: Float[Array, "outputs"]

    def __init__(self, inputs: int, outputs: int, key: PRNGKeyArray, gain: float = 1.0) -> None:
        self.weight = gain / math.sqrt(9 * inputs) * jax.random.normal(key, (3, 3, inputs, outputs))
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n h w outputs"]:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, self.weight, (1, 1), "SAME", dimension_numbers=layout) + self.bias


class Norm(eqx.Module):
    """Group norm (Wu & He 2018, arXiv 1803.08494), modulated by an embedding (FiLM, arXiv 1709.07871)."""

    film: Linear | None
    gain: Float[Array, "channels"]
    bias: Float[Array, "channels"]

    def __init__(self, channels: int, embedding: int, key: PRNGKeyArray) -> None:
        self.film = Linear(embedding, 2 * channels, key, gain=0.0) if embedding else None
        self.gain = jnp.ones(channels)
        self.bias = jnp.zeros(channels)

    def __call__(
        self, x: Float[Array, "n h w channels"], embedding: Float[Array, "n embedding"]
    ) -> Float[Array, "n h w channels"]:
        n, _, _, channels = x.shape
        grouped = (n, channels // CHANNELS_OF_GROUP, CHANNELS_OF_GROUP)
        mean = x.mean((1, 2)).reshape(grouped).mean(-1, keepdims=True)
        square = (x * x).mean((1, 2)).reshape(grouped).mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + 1e-5)
        scale = jnp.broadcast_to(inverse, grouped).reshape(n, channels) * self.gain
        shift = self.bias - jnp.broadcast_to(mean, grouped).reshape(n, channels) * scale
        if self.film is not None:
            factor, term = jnp.split(self.film(embedding), 2, axis=-1)
            scale, shift = scale * (1.0 + factor), shift * (1.0 + factor) + term
        return x * scale[:, None, None] + shift[:, None, None]


class Block(eqx.Module):
    """A residual block; its last convolution starts at zero, so that the block starts as the identity."""

    before: Norm
    first: Conv
    between: Norm
    second: Conv

    def __init__(self, channels: int, embedding: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 4)
        self.before = Norm(channels, 0, keys[0])
        self.first = Conv(channels, channels, keys[1])
        self.between = Norm(channels, embedding, keys[2])
        self.second = Conv(channels, channels, keys[3], gain=0.0)

    def __call__(
        self, x: Float[Array, "n h w channels"], embedding: Float[Array, "n embedding"]
    ) -> Float[Array, "n h w channels"]:
        y = self.first(jax.nn.silu(self.before(x, embedding)))
        return x + self.second(jax.nn.silu(self.between(y, embedding)))


class Attention(eqx.Module):
    """Self-attention over all positions of a level, queries, keys and values from one product."""

    norm: Norm
    project: Linear
    out: Linear

    def __init__(self, channels: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 3)
        self.norm = Norm(channels, 0, keys[0])
        self.project = Linear(channels, 3 * channels, keys[1])
        self.out = Linear(channels, channels, keys[2], gain=0.0)

    def __call__(
        self, x: Float[Array, "n h w channels"], embedding: Float[Array, "n embedding"]
    ) -> Float[Array, "n h w channels"]:
        n, h, w, channels = x.shape
        heads = max(channels // _HEAD, 1)
        projected = self.project(self.norm(x, embedding)).reshape(n, h * w, 3, heads, channels // heads)
        query, key, value = (projected[:, :, part] for part in range(3))
        scores = jnp.einsum("nqhc,nkhc->nhqk", query, key) / math.sqrt(channels // heads)
        mixed = jnp.einsum("nhqk,nkhc->nqhc", jax.nn.softmax(scores, axis=-1), value)
        return x + self.out(mixed.reshape(n, h, w, channels))


class UNet(eqx.Module):
    """Predicts, for noisy windows, what EDM's preconditioning asks for (`F` of `edm.py`).

    Down: a residual block on each level, then half the resolution. Lowest level: attention and a further block. Up: the
    skip of the level is added, then a residual block. The last convolution starts at zero.
    """

    size: UNetSize = eqx.field(static=True)
    labels: Float[Array, "classes embedding"]
    noise: Linear
    mix: Linear
    enter: Conv
    down: tuple[Block, ...]
    shrink: tuple[Linear, ...]
    attention: Attention
    middle: Block
    up: tuple[Block, ...]
    grow: tuple[Linear, ...]
    last: Norm
    leave: Conv

    def __init__(self, size: UNetSize, classes: int, key: PRNGKeyArray) -> None:
        """Args:
        size: widths and channels.
        classes: number of classes; one more is added in front, which means "any".
        key: of the initial weights.
        """
        keys = iter(jax.random.split(key, 8 + 4 * len(size.channels)))
        widths, embedding = size.channels, size.embedding
        self.size = size
        self.labels = jnp.zeros((classes + 1, embedding))
        self.noise = Linear(2 * _FREQUENCIES, embedding, next(keys))
        self.mix = Linear(embedding, embedding, next(keys))
        self.enter = Conv(size.inputs * size.patch**2, widths[0], next(keys))
        self.down = tuple(Block(width, embedding, next(keys)) for width in widths)
        self.shrink = tuple(Linear(4 * a, b, next(keys)) for a, b in pairwise(widths))
        self.attention = Attention(widths[-1], next(keys))
        self.middle = Block(widths[-1], embedding, next(keys))
        self.up = tuple(Block(width, embedding, next(keys)) for width in widths)
        self.grow = tuple(Linear(b, 4 * a, next(keys)) for a, b in pairwise(widths))
        self.last = Norm(widths[0], 0, next(keys))
        self.leave = Conv(widths[0], size.outputs * size.patch**2, next(keys), gain=0.0)

    def __call__(
        self, x: Float[Array, "n h w inputs"], noise: Float[Array, "n"], label: Int[Array, "n"]
    ) -> Float[Array, "n h w outputs"]:
        """Args:
        x: windows; their sides are multiples of `size.multiple`.
        noise: noise level as EDM gives it (ln sigma / 4).
        label: 0 for any class, 1 for the first.
        """
        angle = noise[:, None] * jnp.exp(jnp.linspace(math.log(1.0), math.log(64.0), _FREQUENCIES))
        wave = math.sqrt(2.0) * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        embedding = jax.nn.silu(self.mix(jax.nn.silu(self.noise(wave))) + self.labels[label])
        h = self.enter(space_to_depth(x, self.size.patch))
        skips: list[Array] = []
        for level, block in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](space_to_depth(h, 2))
            h = block(h, embedding)
            skips.append(h)
        h = self.middle(self.attention(h, embedding), embedding)
        for level in reversed(range(len(self.up))):
            h = self.up[level](h + skips[level], embedding)
            if level:
                h = depth_to_space(self.grow[level - 1](h), 2)
        return depth_to_space(self.leave(jax.nn.silu(self.last(h, embedding))), self.size.patch)


def flops(size: UNetSize, side: int) -> float:
    """Floating-point operations of one evaluation for one square window: 2 for each multiplication with a weight or
    between queries, keys and values, those with the zeros around a map left out. Norms and activations are not
    counted."""
    taps = [float((3 * (side // size.patch // 2**level) - 2) ** 2) for level in range(len(size.channels))]
    positions = [(side // size.patch // 2**level) ** 2 for level in range(len(size.channels))]
    total = (size.inputs + size.outputs) * size.patch**2 * size.channels[0] * taps[0]
    for level, width in enumerate(size.channels):
        blocks = 3 if level == len(size.channels) - 1 else 2
        total += blocks * 2 * width * width * taps[level]
        if level:
            total += 2 * 4 * size.channels[level - 1] * width * positions[level]
    width, lowest = size.channels[-1], positions[-1]
    total += 4 * width * width * lowest + 2 * lowest * lowest * width
    return 2.0 * total
