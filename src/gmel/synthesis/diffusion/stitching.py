"""Fields of any size from windows of one size, without seams.

In every step of the sampler the estimates of overlapping windows are averaged (MultiDiffusion, arXiv 2302.08113), each
weighted by how far from its border a pixel lies: there is one noisy field, not many windows that are glued afterwards,
so that no seam can arise. Fields of many sizes are drawn together: all their pixels are one long list, into which
windows point. So there is one program for each number of windows (a power of two) and steps, whatever the photos.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from gmel.synthesis.diffusion.edm import Denoiser, Given
from gmel.synthesis.diffusion.samplers import (
    Denoise,
    Levels,
    Solver,
    advanced,
    guided,
    holding,
    levels_of_steps,
    solve,
)
from gmel.synthesis.diffusion.watching import part, watched
from gmel.synthesis.diffusion.windows import SIDE, starts
from gmel.synthesis.photo import Floats

__all__ = [
    "Field",
    "Group",
    "Layout",
    "compiled_gflop",
    "draw_fields",
    "draw_together",
    "layout",
    "stitched",
    "window_gflop",
    "windows_over",
]

STRIDE = 24
"""Pixels from one window to the next, at most: a quarter of a window overlaps."""
TOGETHER = 128
"""Windows of one call, unless a single field has more. Larger batches are no faster on a processor."""
_FEWEST = 8


@dataclass(frozen=True, eq=False)
class Field:
    """A field of normalised pixels to draw.

    Attributes:
        start: [height, width], what noise is added to: 0 for a sample from nothing, a photo for one to be mended.
        known: [height, width], the clean pixels where `mask` is 0.
        mask: [height, width], 1 where pixels are drawn.
        noise: [height, width], standard normal.
        guide: [height, width, 2], see `Given`.
        label: class number; 0 for any.
        seed: of noise that a sampler draws on its way, if it does.
    """

    start: Floats
    known: Floats
    mask: Floats
    noise: Floats
    guide: Floats
    label: int
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Where windows lie in a list of pixels.

    Attributes:
        index: [windows, side, side], the pixel in the list.
        weight: [windows, side, side], share of the window in the average at that pixel: over all windows they add to 1.
        owner: [windows], number of the field; -1 for windows that only fill up.
        pixels: length of the list; its last pixel belongs to no field.
    """

    index: NDArray[np.int32]
    weight: Floats
    owner: NDArray[np.int64]
    pixels: int


def layout(sizes: Sequence[tuple[int, int]], side: int = SIDE, stride: int = STRIDE) -> Layout:
    """Windows over fields of the given sizes, filled up to a power of two."""
    ramp = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    taper = np.outer(ramp, ramp).astype(np.float32)
    index: list[NDArray[np.int64]] = []
    owner: list[int] = []
    offset = 0
    square = np.arange(side)[:, None], np.arange(side)[None, :]
    for number, (height, width) in enumerate(sizes):
        for top in starts(height, side, stride):
            for left in starts(width, side, stride):
                index.append(offset + (top + square[0]) * width + left + square[1])
                owner.append(number)
        offset += height * width
    windows = max(_FEWEST, 1 << (len(index) - 1).bit_length())
    # Windows cover every pixel, so that a list of this length holds the fields, and one pixel for the windows left
    # over.
    pixels = windows * side * side + 1
    every = np.full((windows, side, side), pixels - 1, np.int32)
    every[: len(index)] = np.stack(index)
    weight = np.zeros((windows, side, side), np.float32)
    weight[: len(index)] = taper
    total = np.zeros(pixels, np.float64)
    np.add.at(total, every, weight)
    share = weight / np.maximum(total, 1e-12)[every]
    owners = np.full(windows, -1)
    owners[: len(owner)] = owner
    return Layout(every, share.astype(np.float32), owners, pixels)


def stitched(
    denoise: Denoise, index: Int[Array, "windows side side"], weight: Float[Array, "windows side side"]
) -> Denoise:
    """The estimate of a whole list of pixels from an estimate of windows [windows, side, side, 1]."""

    def whole(x: Array, sigma: Array) -> Array:
        estimate = denoise(x[index][..., None], sigma)[..., 0]
        return jnp.zeros_like(x).at[index].add(weight * estimate)

    return whole


@dataclass(frozen=True, eq=False)
class Group:
    """Fields that are drawn by one call: their pixels as lists, and the windows over them.

    Attributes:
        start, known, mask, noise, guide: by pixel, see `Field`; 0 where no field is.
        index, weight: see `Layout`.
        labels: [windows], class numbers.
        fields: the fields, one after the other in the lists.
    """

    start: Float[Array, "pixels"]
    known: Float[Array, "pixels"]
    mask: Float[Array, "pixels"]
    noise: Float[Array, "pixels"]
    guide: Float[Array, "2 pixels"]
    index: Int[Array, "windows side side"]
    weight: Float[Array, "windows side side"]
    labels: Int[Array, "windows"]
    fields: list[Field]

    def flat(self, parts: Sequence[Floats]) -> Array:
        """[..., pixels]: arrays [..., height, width] of the fields as one list."""
        return _flat(parts, self.start.shape[0])


def draw_together(fields: Sequence[Field], draw: Callable[[Group], Float[Array, "pixels"]]) -> list[Floats]:
    """Draws fields of any sizes in groups of about as many windows as a processor does best.

    Args:
        fields: what to draw.
        draw: draws the pixels of a group.
    """
    groups: list[list[Field]] = [[]]
    windows = 0
    for field in fields:
        more = windows_over((field.start.shape[0], field.start.shape[1]))
        if groups[-1] and windows + more > TOGETHER:
            groups.append([])
            windows = 0
        groups[-1].append(field)
        windows += more
    drawn: list[Floats] = []
    for number, group in enumerate(groups if fields else []):
        sizes = [(field.start.shape[0], field.start.shape[1]) for field in group]
        with part(number, len(groups)):
            pixels = np.asarray(draw(_group(group, layout(sizes))))
        ends = np.cumsum([height * width for height, width in sizes])
        drawn += [pixels[end - h * w : end].reshape(h, w) for (h, w), end in zip(sizes, ends, strict=True)]
    return drawn


def draw_fields(
    denoiser: Denoiser,
    fields: Sequence[Field],
    sigmas: Float[Array, "levels"],
    solver: Solver = "dpm++",
    guidance: float = 1.0,
) -> list[Floats]:
    """Draws fields by diffusion; each depends on its own noise only, not on what is drawn with it.

    Where somebody watches (`watching.py`), step by step: the same mathematics, up to rounding, and one program for any
    number of steps.

    Args:
        denoiser: of windows.
        fields: what to draw.
        sigmas: noise levels, falling, 0 at the end.
        solver: see :func:`~gmel.synthesis.diffusion.samplers.solve`.
        guidance: weight of the class; 1 is the plain conditional estimate.
    """

    def draw(group: Group) -> Array:
        given = (group.known, group.mask, group.guide, group.index, group.weight, group.labels)
        watch = watched()
        if watch is None:
            return _solve_windows(denoiser, group.start, group.noise, given, sigmas, solver=solver, guidance=guidance)
        carry = (group.start + sigmas[0] * group.noise, jnp.zeros_like(group.start))
        steps = len(sigmas) - 1
        for number, levels in enumerate(zip(*levels_of_steps(sigmas), strict=True)):
            carry = _step_windows(denoiser, carry, given, levels, solver=solver, guidance=guidance)
            jax.block_until_ready(carry)  # JAX runs ahead: a step counts when it is done, and can be stopped then
            watch(number + 1, steps)
        return carry[0]

    return draw_together(fields, draw)


def windows_over(size: tuple[int, int]) -> int:
    """Windows over a field of the given height and width."""
    height, width = size
    return starts(height, stride=STRIDE).size * starts(width, stride=STRIDE).size


def window_gflop(denoiser: Denoiser, guidance: float = 1.0) -> float:
    """GFLOP of an evaluation for one window, counted by the compiler; twice that with guidance."""
    pixels = jnp.zeros((1, SIDE, SIDE, 1))
    given = Given(pixels, pixels, jnp.zeros((1, SIDE, SIDE, 2)), jnp.zeros(1, jnp.int32))
    program = jax.jit(denoiser.__call__).lower(pixels, jnp.ones(1), given).compile()
    return compiled_gflop(program.cost_analysis()) * (1.0 if guidance == 1.0 else 2.0)


def compiled_gflop(analysis: Any) -> float:
    """GFLOP of a compiled program.

    Raises:
        RuntimeError: the compiler does not count here.
    """
    if not analysis or "flops" not in analysis:
        raise RuntimeError("this back end of JAX does not count the operations of its programs")
    return float(analysis["flops"]) / 1e9


def _group(fields: list[Field], place: Layout) -> Group:
    labels = np.asarray([*(field.label for field in fields), 0])[place.owner]
    return Group(
        _flat([field.start for field in fields], place.pixels),
        _flat([field.known for field in fields], place.pixels),
        _flat([field.mask for field in fields], place.pixels),
        _flat([field.noise for field in fields], place.pixels),
        _flat([np.moveaxis(field.guide, -1, 0) for field in fields], place.pixels),
        jnp.asarray(place.index),
        jnp.asarray(place.weight),
        jnp.asarray(labels, jnp.int32),
        fields,
    )


def _flat(parts: Sequence[Floats], pixels: int) -> Array:
    joined = np.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)
    every = np.zeros((*joined.shape[:-1], pixels), np.float32)
    every[..., : joined.shape[-1]] = joined
    return jnp.asarray(every)


_Given = tuple[Array, Array, Array, Array, Array, Array]
"""Of a group: known, mask, guide, index, weight, labels."""


@eqx.filter_jit
def _solve_windows(
    denoiser: Denoiser,
    start: Float[Array, "pixels"],
    noise: Float[Array, "pixels"],
    given: _Given,
    sigmas: Float[Array, "levels"],
    *,
    solver: Solver,
    guidance: float,
) -> Float[Array, "pixels"]:
    return solve(_whole(denoiser, given, guidance), start + sigmas[0] * noise, sigmas, solver)


@eqx.filter_jit
def _step_windows(
    denoiser: Denoiser, carry: tuple[Array, Array], given: _Given, levels: Levels, *, solver: Solver, guidance: float
) -> tuple[Array, Array]:
    return advanced(_whole(denoiser, given, guidance), carry, levels, solver)


def _whole(denoiser: Denoiser, given: _Given, guidance: float) -> Denoise:
    """The estimate of a list of pixels, what is known of them held."""
    known, mask, guide, index, weight, labels = given
    told = Given(known[index][..., None], mask[index][..., None], jnp.moveaxis(guide[:, index], 0, -1), labels)

    def estimate(x: Array, sigma: Array, given: Given) -> Array:
        return denoiser(x, jnp.broadcast_to(sigma, x.shape[:1]), given)

    unlabelled = told._replace(label=jnp.zeros_like(labels))
    windows = guided(partial(estimate, given=told), partial(estimate, given=unlabelled), guidance)
    return holding(stitched(windows, index, weight), known, mask)
