"""The label-free prior: a denoiser of windows of good parts, trained once, adapted everywhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.edm import Denoiser, DenoisingLoss
from gmel.synthesis.diffusion.examples import Examples
from gmel.synthesis.diffusion.lowrank import LowRank, Merged, trained_in_low_rank
from gmel.synthesis.diffusion.training import Trained, Training, train
from gmel.synthesis.diffusion.unet import CHANNELS_OF_GROUP, UNet, UNetSize
from gmel.synthesis.diffusion.weights import named_weights, with_weights
from gmel.synthesis.diffusion.windows import SIDE
from gmel.synthesis.generator import NO_MEANS, Arrays, Means, load_generator, save_generator
from gmel.synthesis.photo import Photo

__all__ = ["Prior", "adapted", "digest_of", "network_facts", "network_size", "prior_for"]

_SEED = 0
"""The same good parts give the same prior, whatever the shots that it is adapted to."""
_REMEMBERED = 4


@dataclass(frozen=True, eq=False)
class Prior:
    """A denoiser that knows how surfaces look, and no class.

    Attributes:
        denoiser: of windows without a class.
        scale: resolution that it was trained at: 1 native, 2 half.
    """

    mode: ClassVar[str] = "prior"

    denoiser: Denoiser
    scale: int

    @classmethod
    def fit(
        cls,
        good: Sequence[Photo],
        reporter: Reporter,
        training: Training,
        size: UNetSize,
        scale: int = 1,
        means: Means = NO_MEANS,
    ) -> Self:
        """Trains on photos of good parts, of one product or of many.

        Raises:
            InputError: there are none, or a checkpoint does not fit.
            KeyboardInterrupt: after the checkpoint is written, where there is one.
        """
        if not good:
            raise InputError("good: there are no photos of good parts; a prior needs some")
        training = replace(training, checkpoint=means.checkpoint_of("prior"), facts={"photos": digest_of(good)})
        denoiser = Denoiser(UNet(size, 0, jax.random.key(_SEED)))
        reporter.stage(f"prior on {len(good)} good parts")
        found = train(
            denoiser,
            DenoisingLoss(unlabelled=1.0),
            Examples.of_good(good, scale),
            training,
            _SEED,
            reporter,
            text="prior",
            resume=means.resume,
        )
        if not found.finished:
            # Half a prior would be adapted, and kept, without anyone knowing.
            raise KeyboardInterrupt
        return cls(found.model, scale)

    def save(self, path: Path) -> None:
        """Writes the prior as one safetensors file."""
        save_generator(path, self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: Path) -> Self:
        """The prior of a file.

        Raises:
            InputError: unreadable, corrupt, not a prior, or with wrong arrays.
        """
        return load_generator(path, {cls.mode: cls})  # pyright: ignore

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """Arrays and facts of a file."""
        facts = {"scale": str(self.scale), **network_facts(self.denoiser.net.size)}
        return named_weights(self.denoiser, "denoiser"), facts

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The prior of a state.

        Raises:
            InputError: an array is missing or has another shape.
        """
        if facts.get("scale") not in ("1", "2"):
            raise InputError(f"scale is {facts.get('scale')!r}, must be '1' or '2'; train the prior anew")
        template = Denoiser(UNet(network_size(facts), 0, jax.random.key(0)))
        return cls(with_weights(template, arrays, "denoiser"), int(facts["scale"]))


def prior_for(
    good: Sequence[Photo],
    reporter: Reporter,
    training: Training,
    size: UNetSize,
    scale: int,
    means: Means,
) -> Prior:
    """The prior of a file, or of good parts; trained once for the same good parts within a process.

    Raises:
        InputError: no good parts, or a file that cannot be read, is corrupt, or of another resolution.
    """
    if means.prior is not None and means.prior.exists():
        found = Prior.load(means.prior)
        if found.scale != scale:
            raise InputError(f"{means.prior}: trained at scale {found.scale}, this fit has {scale}; train one for it")
        return found
    wanted = f"{digest_of(good)} {training} {size} {scale}"
    if wanted not in _known:
        while len(_known) >= _REMEMBERED:
            _known.pop(next(iter(_known)))
        _known[wanted] = Prior.fit(good, reporter, training, size, scale, means)
    if means.prior is not None:
        _known[wanted].save(means.prior)
    return _known[wanted]


_known: dict[str, Prior] = {}


def digest_of(photos: Sequence[Photo]) -> str:
    """What tells these photos and classes from others."""
    seen = hashlib.sha256()
    for photo in photos:
        seen.update(f"{photo.label} {photo.image.shape} {photo.image.dtype}".encode())
        seen.update(photo.image.tobytes())
        seen.update(b"" if photo.mask is None else photo.mask.tobytes())
    return seen.hexdigest()


def adapted(
    prior: Denoiser,
    examples: Examples,
    classes: int,
    training: Training,
    seed: int,
    reporter: Reporter,
    rank: int = 0,
    resume: bool = False,
) -> Trained[Denoiser]:
    """The few-shot adaptation of a prior (or of fresh weights) to the classes of a site.

    Args:
        prior: where it starts; its table of classes is replaced.
        examples: windows of the site.
        classes: how many.
        training: how long.
        seed: of batches and noise.
        reporter: who is told.
        rank: of the change of each weight; 0 for all weights.
        resume: go on from the checkpoint where there is one.
    """
    table = jnp.zeros((classes + 1, prior.net.size.embedding)).at[0].set(prior.net.labels[0])
    start = eqx.tree_at(lambda each: each.net.labels, prior, table)
    loss, text = DenoisingLoss(), "adaptation"
    if not rank:
        return train(start, loss, examples, training, seed, reporter, text=text, resume=resume)
    low = LowRank(start, rank, jax.random.key(seed))
    marks = trained_in_low_rank
    found = train(low, Merged(loss), examples, training, seed, reporter, text=text, trained=marks, resume=resume)
    return Trained(found.model.merged(), found.losses, found.finished, found.wall_s)


def network_facts(size: UNetSize) -> dict[str, str]:
    """A network's size in words."""
    return {
        "channels": " ".join(str(width) for width in size.channels),
        "patch": str(size.patch),
        "inputs": str(size.inputs),
        "outputs": str(size.outputs),
        "embedding": str(size.embedding),
    }


def network_size(facts: dict[str, str]) -> UNetSize:
    """The reverse of :func:`network_facts`.

    Raises:
        InputError: a fact is missing or no number.
    """
    try:
        channels = tuple(int(width) for width in facts["channels"].split())
        patch, inputs, outputs, embedding = (int(facts[name]) for name in ("patch", "inputs", "outputs", "embedding"))
    except (KeyError, ValueError) as error:
        raise InputError(f"the size of the network is missing or wrong ({error}); fit the generator anew") from error
    numbers = (*channels, patch, inputs, outputs, embedding)
    sane = 1 <= len(channels) <= 4 and min(numbers) >= 1 and max(numbers) <= 4096
    size = UNetSize(channels, patch, inputs, outputs, embedding)
    usual = UNetSize()
    fits = sane and (inputs, outputs) == (usual.inputs, usual.outputs) and not SIDE % size.multiple
    if not fits or any(width % CHANNELS_OF_GROUP for width in channels):
        raise InputError(f"the size of the network is {numbers}, which no gmel writes; fit the generator anew")
    return size
