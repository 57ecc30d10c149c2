"""Mode `langevin`: an energy-based model of windows, drawn by short-run Langevin dynamics.

The sibling of `generate` that ABEL's line of work uses. An energy E(x; class) is low where real windows are; a sample
starts as noise and goes downhill with noise added (Nijkamp et al. 2019, arXiv 1904.09770: a short run, always from the
same noise, is a generator in its own right, whether or not it reaches the model's stationary law):

    x <- x - (step^2 / 2) grad E(x) + temperature step n,    n ~ N(0, 1).

Training is contrastive: the energy of real windows falls, that of the windows that such a run has just made rises, and
the squares of both are held small (Du & Mordatch 2019, arXiv 1903.08689), so that the energy stays near 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.drawer import Drawer
from gmel.synthesis.diffusion.edm import Windows
from gmel.synthesis.diffusion.examples import Examples
from gmel.synthesis.diffusion.looks import Looks
from gmel.synthesis.diffusion.prior import digest_of
from gmel.synthesis.diffusion.stitching import Field, Group, compiled_gflop, draw_together, stitched
from gmel.synthesis.diffusion.training import Training, train
from gmel.synthesis.diffusion.unet import Conv, Linear, space_to_depth
from gmel.synthesis.diffusion.watching import watched
from gmel.synthesis.diffusion.weights import named_weights, with_weights
from gmel.synthesis.diffusion.windows import SIDE
from gmel.synthesis.generator import NO_MEANS, Arrays, Means
from gmel.synthesis.photo import Floats, Photo

__all__ = ["Chain", "ContrastiveLoss", "EnergyNet", "Langevin", "LangevinPlan", "walk"]

Slope = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]
_START = 1.0
_TOLD_EVERY = 5
"""Steps of a chain after which a watcher is told: a step is short against the call of a program."""


@dataclass(frozen=True)
class Chain:
    """A run of Langevin dynamics.

    Attributes:
        step: its step; the drift is half its square times the gradient.
        temperature: of the noise: 1 for the dynamics whose stationary law is exp(-E), less for sharper samples.
        bound: pixels are held within so many contrasts, so that an energy that is still wrong cannot lead far away.
    """

    step: float = 1.0
    temperature: float = 0.02
    bound: float = 6.0


def walk(
    slope: Slope, x: Float[Array, "*shape"], noise: Float[Array, "steps *shape"], chain: Chain
) -> Float[Array, "*shape"]:
    """Langevin dynamics without the correction of Metropolis: on the energy x^2 / (2 v) its stationary variance is
    temperature^2 v / (1 - step^2 / (4 v)), wider than temperature^2 v by the length of the step.

    Args:
        slope: gradient of the energy.
        x: where it starts.
        noise: standard normal, for each step.
        chain: step and temperature.
    """

    return jax.lax.scan(lambda x, n: (_moved(slope, x, n, chain), None), x, noise)[0]


def _moved(slope: Slope, x: Array, n: Array, chain: Chain) -> Array:
    """One step of `walk`."""
    moved = x - 0.5 * chain.step**2 * slope(x) + chain.temperature * chain.step * n
    return jnp.clip(moved, -chain.bound, chain.bound)


class EnergyNet(eqx.Module):
    """Energy of windows: convolutions on blocks of 4 x 4 pixels, then on 4 x 4 positions, each class with its own
    gains.

    Smooth activations, as samples follow its gradient; no normalisation, which would hide the energy's scale. To it is
    added the energy of the noise that chains start from, which holds pixels where the network has learned nothing.
    """

    enter: Conv
    shrink: Linear
    middle: Conv
    gather: Linear
    gain: Float[Array, "classes features"]
    leave: Linear

    def __init__(self, classes: int, key: PRNGKeyArray, widths: tuple[int, int] = (48, 96)) -> None:
        keys = jax.random.split(key, 5)
        fine, coarse = widths
        self.enter = Conv(16, fine, keys[0], gain=1.5)
        self.shrink = Linear(4 * fine, coarse, keys[1], gain=1.5)
        self.middle = Conv(coarse, coarse, keys[2], gain=1.5)
        self.gather = Linear(4 * coarse, coarse, keys[3], gain=1.5)
        self.gain = jnp.ones((classes + 1, coarse))
        self.leave = Linear(coarse, 1, keys[4])

    def __call__(self, x: Float[Array, "n h w 1"], label: Int[Array, "n"]) -> Float[Array, "n"]:
        """Energies of windows whose sides are multiples of 16; label 0 stands for any class."""
        gain = self.gain[label][:, None, None]
        h = jax.nn.silu(self.enter(space_to_depth(x, 4)))
        h = jax.nn.silu(self.shrink(space_to_depth(h, 2)))
        h = jax.nn.silu(self.middle(h) * gain)
        h = jax.nn.silu(self.gather(space_to_depth(h, 2)) * gain)
        return self.leave(h).sum((1, 2, 3)) + 0.5 * _QUADRATIC * (x * x).sum((1, 2, 3))

    def slope(self, x: Float[Array, "n h w 1"], label: Int[Array, "n"]) -> Float[Array, "n h w 1"]:
        """Gradient of each window's energy by its pixels."""
        return jax.grad(lambda each: self(each, label).sum())(x)


_QUADRATIC = 0.02


@dataclass(frozen=True)
class ContrastiveLoss:
    """Real windows against those of short runs of the present energy.

    Attributes:
        chain: of the runs.
        steps: of a run.
        smoothing: standard deviation of the noise that real windows get, so that their law has a density.
        regularisation: weight of the mean square of the energies.
    """

    chain: Chain = Chain()
    steps: int = 40
    smoothing: float = 0.05
    regularisation: float = 1e-3

    def __call__(self, net: EnergyNet, batch: Windows, key: PRNGKeyArray) -> Float[Array, ""]:
        """The loss of a batch; `key` draws the runs."""
        start_key, walk_key, smooth_key = jax.random.split(key, 3)
        shape, given = batch.pixels.shape, batch.given
        real = batch.pixels + self.smoothing * jax.random.normal(smooth_key, shape)
        start = _START * jax.random.normal(start_key, shape)
        noise = jax.random.normal(walk_key, (self.steps, *shape))

        def slope(x: Array) -> Array:
            return given.mask * net.slope(given.mask * x + (1.0 - given.mask) * real, given.label)

        made = walk(slope, given.mask * start, noise, self.chain)
        made = jax.lax.stop_gradient(given.mask * made + (1.0 - given.mask) * real)
        low, high = net(real, given.label), net(made, given.label)
        return (low - high).mean() + self.regularisation * (low**2 + high**2).mean()


@dataclass(frozen=True)
class LangevinPlan:
    """How `langevin` is trained.

    Attributes:
        training: updates; the last average of the weights is kept, as the loss says nothing of the samples.
        loss: of the training, with the chain that sampling uses too.
        scale: windows at native (1) or half (2) resolution.
        factorised: whether brightness and contrast are taken out of a class, for all or by label.
        widths: of the network.
    """

    training: Training = field(
        default_factory=lambda: Training(steps=300, rate=1e-3, decay=0.98, probe_every=0, clip=1.0)
    )
    loss: ContrastiveLoss = field(default_factory=ContrastiveLoss)
    scale: int = 1
    factorised: Mapping[str, bool] | bool = True
    widths: tuple[int, int] = (48, 96)


@dataclass(frozen=True, eq=False)
class Langevin(Drawer):
    """Draws defects by walking down an energy.

    Attributes:
        net: the energy.
        chain: of sampling.
    """

    mode: ClassVar[str] = "langevin"
    default_steps: ClassVar[int] = 40
    most_steps: ClassVar[int] = 1000

    net: EnergyNet
    chain: Chain = Chain()

    @classmethod
    def fit(
        cls,
        shots: Sequence[Photo],
        good: Sequence[Photo],
        seed: int,
        reporter: Reporter,
        means: Means = NO_MEANS,
        plan: LangevinPlan | None = None,
    ) -> Self:
        """Learns the classes of the shots.

        Args:
            shots: photos of defects.
            good: photos of good parts, or none.
            seed: of all that is random.
            reporter: who is told.
            means: files of what an interrupt leaves; there is no prior.
            plan: how.

        Raises:
            InputError: no shots, or a checkpoint that does not fit.
        """
        plan = plan or LangevinPlan()
        looks = Looks.fit(shots, good, plan.scale, plan.factorised)
        reporter.stage(f"energy of {len(shots)} shots of {len(looks.labels)} classes")
        net = EnergyNet(len(looks.classes), jax.random.key(seed), plan.widths)
        facts = {"photos": digest_of([*shots, *good])}
        training = replace(plan.training, checkpoint=means.checkpoint_of("energy"), facts=facts)
        examples = Examples.of(shots, good, looks)
        found = train(net, plan.loss, examples, training, seed, reporter, text="energy", resume=means.resume)
        if found.finished:
            means.forget()
        return cls(looks, found.model, plan.loss.chain)

    def _draw(self, steps: int, fields: list[Field]) -> list[Floats]:
        def walked(group: Group) -> Array:
            noise = group.flat([_walk_noise(field, steps) for field in group.fields])
            given = (group.known, group.mask, group.index, group.weight, group.labels)
            watch = watched()
            if watch is None:
                return _walk_windows(self.net, group.start, group.noise, noise, given, self.chain)
            x = group.start + _START * group.noise
            for first in range(0, steps, _TOLD_EVERY):
                block = noise[first : first + _TOLD_EVERY]
                count = len(block)
                # Blocks of one length, so that there is one program for any number of steps.
                block = jnp.zeros((_TOLD_EVERY, *x.shape)).at[:count].set(block)
                x = _walk_block(self.net, x, block, jnp.asarray(count), given, self.chain)
                jax.block_until_ready(x)
                watch(first + count, steps)
            return _held(x, given)

        return draw_together(fields, walked)

    def window_gflop(self) -> float:
        """GFLOP of one step for one window, from the compiled program."""
        program = jax.jit(self.net.slope).lower(jnp.zeros((1, SIDE, SIDE, 1)), jnp.zeros(1, jnp.int32)).compile()
        return compiled_gflop(program.cost_analysis())

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """Weights, appearance table, outlines, sensor, chain. No photo is in it."""
        arrays, facts = self.looks.state()
        arrays |= named_weights(self.net, "energy")
        numbers = (self.chain.step, self.chain.temperature, self.chain.bound)
        return arrays, {**facts, "chain": " ".join(repr(number) for number in numbers)}

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The generator of a state.

        Raises:
            InputError: an array or a fact is missing or wrong.
        """
        looks = Looks.from_state(arrays, facts)
        fine, coarse = arrays.get("energy.enter.bias"), arrays.get("energy.middle.bias")
        if fine is None or coarse is None or fine.ndim != 1 or coarse.ndim != 1:
            raise InputError("array energy.enter.bias or energy.middle.bias is missing or wrong; fit anew")
        template = EnergyNet(len(looks.classes), jax.random.key(0), (fine.shape[0], coarse.shape[0]))
        try:
            step, temperature, bound = (float(number) for number in facts["chain"].split())
        except (KeyError, ValueError) as error:
            raise InputError(f"chain is {facts.get('chain')!r}, must be three numbers; fit anew") from error
        return cls(looks, with_weights(template, arrays, "energy"), Chain(step, temperature, bound))


def _walk_noise(field: Field, steps: int) -> Floats:
    return np.random.default_rng(field.seed).standard_normal((steps, *field.start.shape), np.float32)


_Given = tuple[Array, Array, Array, Array, Array]
"""Of a group: known, mask, index, weight, labels."""


@eqx.filter_jit
def _walk_windows(
    net: EnergyNet,
    start: Float[Array, "pixels"],
    noise: Float[Array, "pixels"],
    walked: Float[Array, "steps pixels"],
    given: _Given,
    chain: Chain,
) -> Float[Array, "pixels"]:
    return _held(walk(_mean_slope(net, given), start + _START * noise, walked, chain), given)


@eqx.filter_jit
def _walk_block(
    net: EnergyNet,
    x: Float[Array, "pixels"],
    walked: Float[Array, "steps pixels"],
    count: Int[Array, ""],
    given: _Given,
    chain: Chain,
) -> Float[Array, "pixels"]:
    """The first `count` steps of a block."""
    slope = _mean_slope(net, given)
    return jax.lax.fori_loop(0, count, lambda step, x: _moved(slope, x, walked[step], chain), x)


def _mean_slope(net: EnergyNet, given: _Given) -> Slope:
    """Every pixel follows the mean slope of the windows over it, as in the stitched samplers of diffusion."""
    known, mask, index, weight, labels = given
    whole = stitched(lambda x, _: net.slope(x, labels), index, weight)
    held = (1.0 - mask) * known
    return lambda x: mask * whole(mask * x + held, jnp.zeros(()))


def _held(x: Float[Array, "pixels"], given: _Given) -> Float[Array, "pixels"]:
    known, mask = given[:2]
    return mask * x + (1.0 - mask) * known
