"""The label-free prior: a denoiser of windows of good parts, trained once, adapted everywhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.edm import Denoiser, DenoisingLoss
from gmel.synthesis.diffusion.looks import Examples, textures
from gmel.synthesis.diffusion.lowrank import LowRank, Merged, trained_in_low_rank
from gmel.synthesis.diffusion.training import Training, train
from gmel.synthesis.diffusion.unet import UNet, UNetSize
from gmel.synthesis.diffusion.weights import named_weights, with_weights
from gmel.synthesis.diffusion.windows import appearances_of, reduced
from gmel.synthesis.generator import Arrays, load_generator, save_generator
from gmel.synthesis.photo import Photo

__all__ = ["Prior", "adapted", "network_facts", "network_size"]

Preview = Callable[[int, Denoiser], None]


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
        seed: int,
        reporter: Reporter,
        *,
        scale: int = 1,
        training: Training | None = None,
        size: UNetSize | None = None,
        preview: Preview | None = None,
        resume: bool = False,
    ) -> Self:
        """Trains on photos of good parts, of one product or of many.

        Raises:
            InputError: there are none, or a checkpoint does not fit.
        """
        if not good:
            raise InputError("good: there are no photos of good parts; a prior needs some")
        key = jax.random.key(seed)
        denoiser = Denoiser(UNet(size or UNetSize(), 0, key))
        training = training or Training(steps=1000, decay=0.998, probe_every=100)
        loss = DenoisingLoss(unlabelled=1.0)
        reporter.stage(f"prior on {len(good)} good parts")
        examples = _good_windows(good, scale)
        found = train(denoiser, loss, examples, training, seed, reporter, text="prior", preview=preview, resume=resume)
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


def adapted(
    prior: Denoiser,
    examples: Examples,
    classes: int,
    training: Training,
    seed: int,
    reporter: Reporter,
    *,
    rank: int = 0,
    preview: Preview | None = None,
    resume: bool = False,
) -> Denoiser:
    """The few-shot adaptation of a prior (or of fresh weights) to the classes of a site.

    Args:
        prior: where it starts; its table of classes is replaced.
        examples: windows of the site.
        classes: how many.
        training: how long.
        seed: of batches and noise.
        reporter: who is told.
        rank: of the change of each weight; 0 for all weights.
        preview: called with the number of updates and the denoiser.
        resume: go on from the checkpoint where there is one.
    """
    table = jnp.zeros((classes + 1, prior.net.size.embedding)).at[0].set(prior.net.labels[0])
    start = eqx.tree_at(lambda each: each.net.labels, prior, table)
    loss = DenoisingLoss()
    text = "adaptation"
    if not rank:
        return train(start, loss, examples, training, seed, reporter, text=text, preview=preview, resume=resume).model
    low = LowRank(start, rank, jax.random.key(seed))

    def show(step: int, model: LowRank[Denoiser]) -> None:
        if preview is not None:
            preview(step, model.merged())

    found = train(
        low,
        Merged(loss),
        examples,
        training,
        seed,
        reporter,
        text=text,
        trained=trained_in_low_rank,
        preview=show if preview is not None else None,
        resume=resume,
    )
    return found.model.merged()


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
    if not channels or min(numbers) < 1 or max(numbers) > 4096 or len(channels) > 4:
        raise InputError(f"the size of the network is {numbers}, which no gmel writes; fit the generator anew")
    return UNetSize(channels, patch, inputs, outputs, embedding)


def _good_windows(good: Sequence[Photo], scale: int) -> Examples:
    pixels = [reduced(photo.pixels(), scale) for photo in good]
    sizes = [(photo.image.shape[0], photo.image.shape[1]) for photo in good]
    return Examples({1: textures(good, appearances_of(pixels, sizes), scale)}, {}, good=1)
