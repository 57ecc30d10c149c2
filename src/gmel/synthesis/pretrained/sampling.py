"""From noise to pictures by a pipeline: DPM-Solver++(2M) of diffusers, known parts of a picture held in every step.

The solver takes the place of the pipeline's own: at ten to fifty steps it is the better one, and it draws nothing on
its way, so that a picture depends on its own noise only.
"""

from collections.abc import Sequence

import numpy as np

from gmel.synthesis.diffusion.watching import part, watched
from gmel.synthesis.photo import Floats
from gmel.synthesis.pretrained.extra import Tensor, module_of_extra
from gmel.synthesis.pretrained.pipeline import Pipeline
from gmel.synthesis.pretrained.scenes import Canvas

__all__ = ["draw_canvases"]

_TOGETHER = 8
"""Pictures of one call of the network."""
_LEAST_LOG_SNR = -5.1
"""Where sampling begins; below, a schedule that ends in noise alone would divide by nothing (as diffusers advises)."""


def draw_canvases(
    pipeline: Pipeline, canvases: Sequence[Canvas], conditions: Tensor, steps: int, guidance: float
) -> list[Floats]:
    """Draws canvases; each depends on its own noise only, up to rounding.

    Args:
        pipeline: with the weights that it wears.
        canvases: what to draw.
        conditions: see `Pipeline.conditions`.
        steps: evaluations of the network, twice that with guidance.
        guidance: weight of the class; 1 for the plain conditional estimate (arXiv 2207.12598).

    Returns:
        [side, side] each, 0 to 1; known pixels are about what they were.
    """
    made: list[Floats] = []
    starts = range(0, len(canvases), _TOGETHER)
    for number, start in enumerate(starts):
        with part(number, len(starts)):
            made += _draw(pipeline, canvases[start : start + _TOGETHER], conditions, steps, guidance)
    return made


def _draw(
    pipeline: Pipeline, canvases: Sequence[Canvas], conditions: Tensor, steps: int, guidance: float
) -> list[Floats]:
    torch, device = pipeline.torch, pipeline.device
    noise = torch.stack(
        [torch.randn(pipeline.shape, generator=torch.Generator().manual_seed(canvas.seed)) for canvas in canvases]
    ).to(device)
    numbers = torch.tensor([canvas.number for canvas in canvases], device=device)
    masks = _masks(pipeline, canvases)
    partly = bool((masks < 1).any())
    known = pipeline.encode(np.stack([canvas.known for canvas in canvases])) if partly else None
    solver = module_of_extra("diffusers").DPMSolverMultistepScheduler(
        **pipeline.folder.noise.keywords(),
        **pipeline.solver_keywords(),
        timestep_spacing="trailing",
        lambda_min_clipped=_LEAST_LOG_SNR,
    )
    solver.set_timesteps(steps, device=device)
    # A schedule may have fewer levels than steps were asked.
    times = list(solver.timesteps)
    watch = watched()
    x = noise
    with torch.no_grad():
        for place, time in enumerate(times):
            if known is not None and place == 0:
                x = masks * x + (1 - masks) * pipeline.trained_noise.add_noise(known, noise, time[None])
            predicted = pipeline.predict(x, time.expand(len(canvases)), numbers, conditions)
            if guidance != 1.0:
                plain = pipeline.predict(x, time.expand(len(canvases)), torch.zeros_like(numbers), conditions)
                predicted = plain + guidance * (predicted - plain)
            x = solver.step(predicted, time, x).prev_sample
            if known is not None:
                following = times[place + 1 :][:1]
                held = pipeline.trained_noise.add_noise(known, noise, following[0][None]) if following else known
                x = masks * x + (1 - masks) * held
            if watch is not None:
                if device == "cuda":  # a GPU is given steps ahead: one counts when it is done
                    torch.cuda.synchronize()
                watch(place + 1, len(times))
        return list(pipeline.decode(x))


def _masks(pipeline: Pipeline, canvases: Sequence[Canvas]) -> Tensor:
    """[n, 1, h, w] in what the network sees: 1 where any pixel of a place is drawn."""
    torch = pipeline.torch
    masks = torch.from_numpy(np.stack([canvas.mask for canvas in canvases])[:, None].astype(np.float32))
    factor = pipeline.side // pipeline.shape[1]
    return torch.nn.functional.max_pool2d(masks, factor).to(pipeline.device)
