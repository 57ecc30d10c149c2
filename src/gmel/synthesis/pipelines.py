"""Mode `diffusers`: a pretrained pipeline that the user brings, adapted to the shots by low-rank changes (LoRA).

It needs the extra `diffusers` and a folder with the pipeline (`Means.pipeline`), which stays where it is: a generator
holds the changes and the digest of the folder alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.drawer import checked_steps
from gmel.synthesis.diffusion.prior import digest_of
from gmel.synthesis.generator import NO_MEANS, Arrays, Means
from gmel.synthesis.photo import Floats, Photo
from gmel.synthesis.pretrained.adaptation import Adaptation, adapt
from gmel.synthesis.pretrained.extra import Tensor
from gmel.synthesis.pretrained.folder import PipelineFolder
from gmel.synthesis.pretrained.pipeline import Pipeline, Weights, forget_pipelines, load_pipeline
from gmel.synthesis.pretrained.sampling import draw_canvases
from gmel.synthesis.pretrained.scenes import Canvas, Crops, Scenes

__all__ = ["Diffusers", "LoraPlan"]

_MOST_RANK = 1024


@dataclass(frozen=True)
class LoraPlan:
    """How a pipeline is adapted and drawn with.

    Attributes:
        adaptation: training of the changes.
        rank: of the change of each layer.
        guidance: weight of the class in sampling; what is usual for the kind of pipeline where it is none.
    """

    adaptation: Adaptation = field(default_factory=Adaptation)
    rank: int = 4
    guidance: float | None = None


@dataclass(frozen=True, eq=False)
class Diffusers:
    """Draws defects by a pretrained pipeline.

    Attributes:
        scenes: what is learned of the site beside the weights.
        pipeline: the pipeline, as it came.
        weights: the changes.
        guidance: weight of the class.
        losses: of each update of the fit; empty where it comes from a file.
    """

    mode: ClassVar[str] = "diffusers"
    default_steps: ClassVar[int] = 20
    most_steps: ClassVar[int] = 100
    shares_photos: ClassVar[bool] = False

    scenes: Scenes
    pipeline: Pipeline
    weights: Weights
    guidance: float
    losses: tuple[float, ...] = ()

    @classmethod
    def fit(
        cls,
        shots: Sequence[Photo],
        good: Sequence[Photo],
        seed: int,
        reporter: Reporter,
        means: Means = NO_MEANS,
        plan: LoraPlan | None = None,
    ) -> Self:
        """Adapts the pipeline of `means.pipeline` to the classes of the shots and, where there are some, good parts.

        Args:
            shots: photos of defects.
            good: photos of good parts, or none.
            seed: of all that is random.
            reporter: who is told.
            means: the pipeline's folder, and files of what an interrupt leaves.
            plan: how.

        Raises:
            InputError: no pipeline or one that cannot be used, the extra is not installed, no shots, or files that do
                not fit.
        """
        plan = plan or LoraPlan()
        if means.pipeline is None:
            raise InputError("diffusers: pipeline is missing; give the folder of a pretrained one (--pipeline DIR)")
        if not shots:
            raise InputError("shots: there are none; give at least one photo of a defect")
        reporter.stage(f"loading the pipeline of {means.pipeline}")
        pipeline = load_pipeline(PipelineFolder.read(means.pipeline), plan.rank)
        scenes = Scenes.fit(shots, good, pipeline.side)
        how = replace(
            plan.adaptation,
            checkpoint=means.checkpoint_of("adaptation"),
            facts={
                "photos": digest_of([*shots, *good]),
                "pipeline": pipeline.folder.digest,
                "seed": str(seed),
                "rank": str(plan.rank),
            },
        )
        reporter.stage(f"adaptation to {len(shots)} shots of {len(scenes.labels)} classes")
        found = adapt(pipeline, Crops.of(shots, good, scenes), scenes.classes, how, seed, reporter, means.resume)
        if found.finished:
            means.forget()
        guidance = pipeline.usual_guidance if plan.guidance is None else plan.guidance
        return cls(scenes, pipeline, found.weights, guidance, tuple(found.losses))

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that it can draw."""
        return self.scenes.labels

    def on(self, good: Sequence[Photo]) -> Self:
        """The generator with good parts to draw on: another site's, or those that a saved generator does not hold."""
        return replace(self, scenes=replace(self.scenes, good=tuple(good)))

    def draws_on_good(self, label: str) -> bool:
        """Whether defects of a class are drawn on good parts: where it was learned with masks, beside good parts."""
        return label in self.labels and self.scenes.inpaints(label)

    def sample(self, label: str, count: int, seed: int, steps: int | None = None) -> list[Photo]:
        """`count` photos of a class. The same seed gives the same photos on the same machine; in other company (another
        `count`) a photo may differ by rounding.

        Raises:
            InputError: a class that it has not learned, or steps that are not from 1 to `most_steps`.
        """
        steps = checked_steps(self.default_steps if steps is None else steps, self.most_steps)
        return self.scenes.photos(self.mode, label, count, seed, partial(self._draw, steps))

    def sham(self, count: int, seed: int) -> list[Photo]:
        """`count` good parts, drawn as those with defects are; none where no good parts were learned."""
        return self.scenes.sham(self.mode, count, seed, partial(self._draw, self.default_steps))

    def image_gflop(self) -> float:
        """GFLOP of one step for one photo, counted by PyTorch; the autoencoder, which works once, is not in it."""
        each = self.pipeline.gflop(self._worn())
        return each * (1.0 if self.guidance == 1.0 else 2.0)

    def base_bytes(self) -> int:
        """Bytes of the pipeline, which a file of the generator does not hold."""
        return self.pipeline.folder.size_bytes

    def forget_base(self) -> None:
        """The next generator of a file reads its pipeline anew."""
        forget_pipelines()

    def _worn(self) -> Tensor:
        """Puts the changes into the network, and gives what it is told of the classes."""
        self.pipeline.wear(self.weights)
        return self.pipeline.conditions(self.scenes.classes)

    def _draw(self, steps: int, canvases: list[Canvas]) -> list[Floats]:
        return draw_canvases(self.pipeline, canvases, self._worn(), steps, self.guidance) if canvases else []

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """The changes, outlines, sizes, sensor; digest and place of the pipeline. No photo is in it."""
        arrays, facts = self.scenes.state()
        arrays |= {f"weight.{name}": weight.detach().cpu().numpy() for name, weight in self.weights.items()}
        facts |= {
            "pipeline": str(self.pipeline.folder.path),
            "digest": self.pipeline.folder.digest,
            "rank": str(self.pipeline.rank),
            "guidance": repr(self.guidance),
        }
        return arrays, facts

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The generator of a state, on the pipeline in the folder that the fact `pipeline` names.

        Raises:
            InputError: an array or a fact is missing or wrong, or the pipeline is not there or another.
        """
        if not facts.get("pipeline"):
            raise InputError("pipeline is missing; give the folder of the pretrained pipeline (--pipeline DIR)")
        try:
            rank, guidance = int(facts["rank"]), float(facts["guidance"])
        except (KeyError, ValueError) as error:
            raise InputError(f"rank or guidance is missing or wrong ({error}); fit the generator anew") from error
        if not 1 <= rank <= _MOST_RANK or not math.isfinite(guidance):
            raise InputError(
                f"rank is {rank} and guidance {guidance}, must be from 1 to {_MOST_RANK} and a number; "
                "fit the generator anew"
            )
        scenes = Scenes.from_state(arrays, facts)
        folder = PipelineFolder.read(Path(facts["pipeline"]))
        if folder.digest != facts.get("digest"):
            raise InputError(
                f"pipeline {folder.path}: digest is {folder.digest[:12]}, the generator was fitted on "
                f"{facts.get('digest', '')[:12]}; give the folder of that pipeline (--pipeline DIR)"
            )
        pipeline = load_pipeline(folder, rank)
        if scenes.side != pipeline.side:
            raise InputError(f"side is {scenes.side}, must be the pipeline's {pipeline.side}; fit the generator anew")
        return cls(scenes, pipeline, pipeline.from_arrays(arrays, len(scenes.classes)), guidance)
