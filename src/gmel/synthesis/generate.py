"""Mode `generate`: class-conditional diffusion, of whole photos or of defects on good parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import jax

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.drawer import Drawer
from gmel.synthesis.diffusion.edm import Denoiser
from gmel.synthesis.diffusion.examples import Examples
from gmel.synthesis.diffusion.looks import Looks
from gmel.synthesis.diffusion.prior import adapted, digest_of, network_facts, network_size, prior_for
from gmel.synthesis.diffusion.samplers import SOLVERS, Solver, evaluations, karras_sigmas
from gmel.synthesis.diffusion.stitching import Field, draw_fields, window_gflop
from gmel.synthesis.diffusion.training import Training
from gmel.synthesis.diffusion.unet import UNet, UNetSize
from gmel.synthesis.diffusion.weights import named_weights, with_weights
from gmel.synthesis.generator import NO_MEANS, Arrays, Means
from gmel.synthesis.photo import Floats, Photo

__all__ = ["Generate", "Plan"]

SIGMA_LOW, SIGMA_HIGH = 0.02, 30.0
"""Noise levels of sampling, in contrasts: below, the sensor's noise; above, the structure of a window is drowned."""


@dataclass(frozen=True)
class Plan:
    """How `generate` is trained and drawn.

    Attributes:
        prior: training on good parts, where there are at least `prior_from` and no file has a prior.
        prior_from: good parts from which on a prior is trained.
        adaptation: training on the shots, from a prior.
        scratch: training on the shots where there is no prior.
        rank: of a low-rank adaptation; 0 for all weights.
        scale: windows at native (1) or half (2) resolution.
        factorised: whether brightness and contrast are taken out of a class, for all or by label.
        solver: of sampling.
        guidance: weight of the class in sampling; 1 for the plain conditional estimate.
        size: of the network.
    """

    prior: Training = field(default_factory=lambda: Training(steps=600, decay=0.995, probe_every=100))
    prior_from: int = 8
    adaptation: Training = field(default_factory=lambda: Training(steps=250, rate=1e-3))
    scratch: Training = field(default_factory=lambda: Training(steps=700, decay=0.995, probe_every=100))
    rank: int = 0
    scale: int = 1
    factorised: Mapping[str, bool] | bool = True
    solver: Solver = "dpm++"
    guidance: float = 1.0
    size: UNetSize = field(default_factory=UNetSize)


@dataclass(frozen=True, eq=False)
class Generate(Drawer):
    """Draws defects by diffusion.

    Attributes:
        denoiser: of windows.
        solver: of sampling.
        guidance: weight of the class.
    """

    mode: ClassVar[str] = "generate"
    default_steps: ClassVar[int] = 12

    denoiser: Denoiser
    solver: Solver = "dpm++"
    guidance: float = 1.0

    @classmethod
    def fit(
        cls,
        shots: Sequence[Photo],
        good: Sequence[Photo],
        seed: int,
        reporter: Reporter,
        means: Means = NO_MEANS,
        plan: Plan | None = None,
    ) -> Self:
        """Learns the classes of the shots, from a prior where a file has one or the good parts are enough for one.

        Args:
            shots: photos of defects.
            good: photos of good parts, or none.
            seed: of all that is random but the prior.
            reporter: who is told.
            means: files of the prior and of what an interrupt leaves.
            plan: how.

        Raises:
            InputError: no shots, or files that do not fit.
        """
        plan = plan or Plan()
        looks = Looks.fit(shots, good, plan.scale, plan.factorised)
        given = means.prior is not None and means.prior.exists()
        prior = None
        if given or len(good) >= plan.prior_from:
            prior = prior_for(good, reporter, plan.prior, plan.size, plan.scale, means)
        start = Denoiser(UNet(plan.size, 0, jax.random.key(seed))) if prior is None else prior.denoiser
        training = replace(
            plan.scratch if prior is None else plan.adaptation,
            checkpoint=means.checkpoint_of("adaptation"),
            facts={"photos": digest_of([*shots, *good])},
        )
        reporter.stage(f"adaptation to {len(shots)} shots of {len(looks.labels)} classes")
        examples = Examples.of(shots, good, looks)
        rank = 0 if prior is None else plan.rank
        found = adapted(start, examples, len(looks.classes), training, seed, reporter, rank, means.resume)
        if found.finished:
            means.forget()
        return cls(looks, found.model, plan.solver, plan.guidance)

    def _draw(self, steps: int, fields: list[Field]) -> list[Floats]:
        return draw_fields(
            self.denoiser, fields, karras_sigmas(steps, SIGMA_LOW, SIGMA_HIGH), self.solver, self.guidance
        )

    def window_gflop(self) -> float:
        """GFLOP of one step for one window, from the compiled program."""
        each = evaluations(self.solver, self.default_steps) / self.default_steps
        return each * window_gflop(self.denoiser, self.guidance)

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """Weights, appearance table, outlines, sensor. No photo is in it."""
        arrays, facts = self.looks.state()
        arrays |= named_weights(self.denoiser, "denoiser")
        facts |= network_facts(self.denoiser.net.size)
        return arrays, {**facts, "solver": self.solver, "guidance": repr(self.guidance)}

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The generator of a state.

        Raises:
            InputError: an array or a fact is missing or wrong.
        """
        looks = Looks.from_state(arrays, facts)
        solver, guidance = drawing_facts(facts)
        template = Denoiser(UNet(network_size(facts), len(looks.classes), jax.random.key(0)))
        return cls(looks, with_weights(template, arrays, "denoiser"), solver, guidance)


def drawing_facts(facts: dict[str, str]) -> tuple[Solver, float]:
    """Solver and guidance of a file.

    Raises:
        InputError: one of them is missing or wrong.
    """
    for solver in SOLVERS:
        if facts.get("solver") == solver:
            try:
                return solver, float(facts.get("guidance", ""))
            except ValueError as error:
                raise InputError(f"guidance is {facts.get('guidance')!r}, no number; fit the generator anew") from error
    raise InputError(f"solver is {facts.get('solver')!r}, must be one of {', '.join(SOLVERS)}; fit the generator anew")
