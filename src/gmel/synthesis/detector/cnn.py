"""A small convolutional network, trained from scratch on a site's own photos: the second detector.

It reads photos at a fixed working resolution (`pictures.py`). It is here so that nobody has to take the word of the
simple features: `gmel synthesize evaluate --detector cnn` shows both on the same photos.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpy.typing import NDArray

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.detector.linear import Doubles, balanced, softmax, two_ways
from gmel.synthesis.detector.pictures import SCALARS
from gmel.synthesis.diffusion.training import Training, train
from gmel.synthesis.diffusion.unet import Conv, Linear, Norm, space_to_depth
from gmel.synthesis.photo import GOOD, Floats

__all__ = ["STEPS", "Cnn", "CnnDetector", "CnnSize"]

STEPS = 600
"""Updates of a training."""
_BATCH = 32
_RATE = 3e-3
_WEIGHT_DECAY = 1e-2
_SHOWN = 64
"""Photos that are judged at once; the last batch is filled up, so that one program does for all."""


@dataclass(frozen=True)
class CnnSize:
    """What a network is made of.

    Attributes:
        side: pixels of a side of what it reads; a multiple of `patch * 2 ** (len(widths) - 1)`.
        channels: of the pixels.
        classes: that it tells apart.
        widths: feature channels of each level, the finest first; multiples of 8 (a group of the norm).
        patch: pixels of a side that one position of the first level stands for: convolutions at full resolution on
            few channels would be most of the time and little of the network.
    """

    side: int
    channels: int
    classes: int
    widths: tuple[int, ...] = (32, 64, 96)
    patch: int = 4

    @property
    def features(self) -> int:
        """Numbers of a row."""
        return self.side * self.side * self.channels + SCALARS


class Cnn(eqx.Module):
    """Logits of photos. On each level a coarser resolution, a convolution, a group norm; then mean and greatest value
    of every channel (a small defect vanishes in means), and one linear layer, which starts at zero.

    Group norm, not batch norm: batches of few photos from few parts have no statistics worth the name, and what is said
    of a photo must not depend on the photos beside it.
    """

    size: CnnSize = eqx.field(static=True)
    shrink: tuple[Linear, ...]
    look: tuple[Conv, ...]
    norm: tuple[Norm, ...]
    leave: Linear

    def __init__(self, size: CnnSize, key: PRNGKeyArray) -> None:
        keys = iter(jax.random.split(key, 3 * len(size.widths) + 1))
        before = (size.channels * size.patch**2, *(4 * width for width in size.widths[:-1]))
        self.size = size
        self.shrink = tuple(Linear(a, b, next(keys)) for a, b in zip(before, size.widths, strict=True))
        self.look = tuple(Conv(width, width, next(keys), gain=math.sqrt(2.0)) for width in size.widths)
        self.norm = tuple(Norm(width, 0, next(keys)) for width in size.widths)
        self.leave = Linear(2 * size.widths[-1] + SCALARS, size.classes, next(keys), gain=0.0)

    def __call__(
        self, pixels: Float[Array, "n side side channels"], scalars: Float[Array, "n scalars"]
    ) -> Float[Array, "n classes"]:
        nothing = jnp.zeros((pixels.shape[0], 0))
        h = pixels
        for level, (shrink, look, norm) in enumerate(zip(self.shrink, self.look, self.norm, strict=True)):
            h = shrink(space_to_depth(h, 2 if level else self.size.patch))
            h = jax.nn.silu(norm(look(h), nothing))
        return self.leave(jnp.concatenate([h.mean((1, 2)), h.max((1, 2)), scalars], axis=-1))


@dataclass(frozen=True, eq=False)
class CnnDetector:
    """What a photo shows, from its pixels.

    Attributes:
        classes: names of the columns, `GOOD` first where it is one.
        network: gives the logits.
        temperature: logits are divided by it; 1 before calibration.
    """

    classes: tuple[str, ...]
    network: Cnn
    temperature: float = 1.0

    @classmethod
    def fit(
        cls,
        features: Floats,
        labels: Sequence[str],
        weights: Doubles | None,
        channels: int,
        seed: int,
        reporter: Reporter,
        steps: int = STEPS,
    ) -> Self:
        """The detector of training rows. Each class weighs the same: batches are drawn so.

        Every photo of a batch is turned or flipped at random.

        Args:
            features: rows of a `PictureExtractor`, [photos, features].
            labels: [photos]; at least two classes.
            weights: of the rows within their class, [photos]; the same for all where they are left out.
            channels: of the pixels.
            seed: of the first weights and of the batches.
            reporter: told how it goes on.
            steps: updates.

        Raises:
            InputError: a single class.
        """
        names = np.asarray(labels)
        found = sorted(set(names.tolist()))
        if len(found) < 2:
            raise InputError(f"photos of {' and '.join(found) or 'nothing'} alone; a detector needs two classes")
        classes = (*((GOOD,) if GOOD in found else ()), *(name for name in found if name != GOOD))
        truth = np.asarray([classes.index(name) for name in names.tolist()], np.int32)
        chance = np.cumsum(balanced(names, weights))
        side = math.isqrt((features.shape[1] - SCALARS) // channels)
        network = Cnn(CnnSize(side, channels, len(classes)), jax.random.key(seed))

        def draw(random: np.random.Generator, count: int) -> "_Batch":
            # One row from each of as many equal parts of the weight: every class in every batch, as its weight says.
            places = (random.uniform(size=count) + np.arange(count)) / count * chance[-1]
            rows = np.minimum(np.searchsorted(chance, places), names.size - 1)
            return _Batch(features[rows], truth[rows], random.integers(0, 8, count))

        training = Training(steps, _BATCH, _RATE, probe_every=0, weight_decay=_WEIGHT_DECAY)
        trained = train(network, _loss, draw, training, seed, reporter, text="CNN")
        return cls(classes, trained.model)

    def logits(self, features: Floats) -> Doubles:
        """[photos, classes], before the temperature."""
        size = self.network.size
        out = np.zeros((features.shape[0], size.classes))
        for start in range(0, features.shape[0], _SHOWN):
            rows = features[start : start + _SHOWN]
            filled = np.zeros((_SHOWN, size.features), np.float32)
            filled[: len(rows)] = rows
            out[start : start + len(rows)] = np.asarray(_judge(self.network, filled))[: len(rows)]
        return out

    def defect_probability(self, features: Floats) -> Doubles:
        """[photos]: the probability that it is no good part. The temperature does not change the order of photos.

        Raises:
            InputError: it was trained without good parts.
        """
        if GOOD not in self.classes:
            raise InputError("the detector has seen no good parts: it names types, it finds no defects")
        return softmax(two_ways(self.logits(features)) / self.temperature)[:, 1]

    def tempered(self, temperature: float) -> Self:
        """With another temperature."""
        return replace(self, temperature=temperature)


class _Batch(eqx.Module):
    """Rows with their classes, and how each is turned: 0 (as it is) to 7."""

    rows: Float[Array, "n features"] | Floats
    truth: Int[Array, "n"] | NDArray[np.int32]
    turns: Int[Array, "n"] | NDArray[np.int64]


def _opened(
    size: CnnSize, rows: Float[Array, "n features"]
) -> tuple[Float[Array, "n side side channels"], Float[Array, "n scalars"]]:
    """Pixels and scalars of rows."""
    return rows[:, :-SCALARS].reshape(-1, size.side, size.side, size.channels), rows[:, -SCALARS:]


def _turned(picture: Float[Array, "side side channels"], which: Int[Array, ""]) -> Float[Array, "side side channels"]:
    picture = jnp.where(which % 2 == 1, picture[::-1], picture)
    picture = jnp.where(which // 2 % 2 == 1, picture[:, ::-1], picture)
    return jnp.where(which // 4 == 1, picture.swapaxes(0, 1), picture)


def _loss(network: Cnn, batch: _Batch, _key: PRNGKeyArray) -> Float[Array, ""]:
    """Cross entropy."""
    pixels, scalars = _opened(network.size, jnp.asarray(batch.rows))
    logits = network(jax.vmap(_turned)(pixels, jnp.asarray(batch.turns)), scalars)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.truth)[:, None], axis=1).mean()


@eqx.filter_jit
def _judge(network: Cnn, rows: Float[Array, "n features"] | Floats) -> Float[Array, "n classes"]:
    return network(*_opened(network.size, jnp.asarray(rows)))
