"""Marks on a surface: scratches, pits, inclusions, stains, cracks, each with the pixels that it changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit

from gmel.synthesis.data.surfaces import Field, noise

__all__ = ["DEFECTS", "Mark"]

Shape = tuple[int, int]
Random = np.random.Generator


@dataclass(frozen=True)
class Mark:
    """A defect, which may miss the photo (its mask is empty then).

    Attributes:
        change: [height, width], added to the reflectance, in units of the contrast that the caller chooses.
        keeps: [height, width], 0 to 1: how much of the texture is left below it.
        mask: [height, width], true on the defect.
    """

    change: Field
    keeps: Field
    mask: NDArray[np.bool_]


def _scratch(shape: Shape, rng: Random) -> Mark:
    """One to three curved lines that come and go, with a bright burr along one side."""
    change, mask = np.zeros(shape), np.zeros(shape, np.bool_)
    heading = rng.uniform(0, np.pi)
    for _ in range(rng.choice([1, 1, 2, 3])):
        length = rng.uniform(0.25, 0.9) * min(shape)
        path = _curve(shape, rng, heading + rng.normal(0, 0.15), length)
        distance, along = _distance(shape, path)
        width = rng.uniform(0.7, 1.5)
        pressure = np.clip(0.75 + 0.5 * noise((1, len(path)), rng, 0.1, len(path) / 9)[0], 0, 1.2)
        pressure *= np.minimum(1, np.minimum(np.arange(len(path)), np.arange(len(path))[::-1]) / (0.15 * len(path)))
        strength = pressure[along]
        groove = strength * np.exp(-0.5 * (distance / width) ** 2)
        burr = ndimage.shift(groove, rng.uniform(-1, 1, 2) * 1.8, order=1)
        change += (1.0 if rng.random() < 0.45 else -1.0) * (groove - 0.5 * burr)
        mask |= (groove > 0.3) & (distance < 2 * width)
    return Mark(change, np.ones(shape), mask)


def _pit(shape: Shape, rng: Random) -> Mark:
    """A few round hollows: dark inside, lit on the side away from the lamp."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    change, mask, keeps = np.zeros(shape), np.zeros(shape, np.bool_), np.ones(shape)
    centre, lamp = _place(shape, rng, 0.15), rng.uniform(0, 2 * np.pi)
    wobble = 0.18 * noise(shape, rng, 2.5, 2.5)
    for _ in range(1 + rng.poisson(2.2)):
        radius = np.exp(rng.uniform(np.log(1.6), np.log(5.0)))
        y, x = centre + rng.normal(0, 0.09 * min(shape), 2)
        squeeze = rng.uniform(0.75, 1.3)
        from_middle = np.hypot((rows - y) * squeeze, (columns - x) / squeeze) / radius + wobble
        hollow = expit(9 * (1 - from_middle))
        side = (np.cos(lamp) * (columns - x) + np.sin(lamp) * (rows - y)) / radius
        rim = np.exp(-0.5 * ((from_middle - 1.05) / 0.25) ** 2)
        change += -1.1 * hollow * np.clip(1 - 0.5 * side, 0.3, 1.6) + 0.55 * rim * np.clip(side, -0.4, 1)
        keeps *= 1 - 0.6 * hollow
        mask |= from_middle < 1.15
    return Mark(change, keeps, mask)


def _inclusion(shape: Shape, rng: Random) -> Mark:
    """Foreign matter pressed in: ragged dark streaks along one direction, flat inside."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    change, mask, keeps = np.zeros(shape), np.zeros(shape, np.bool_), np.ones(shape)
    angle = rng.normal(np.pi / 2, 0.25) if rng.random() < 0.7 else rng.uniform(0, np.pi)
    for _ in range(rng.choice([1, 1, 2, 3])):
        y, x = _place(shape, rng, 0.12)
        long, short = rng.uniform(7, 24), rng.uniform(2.2, 5.5)
        u = (np.cos(angle) * (columns - x) + np.sin(angle) * (rows - y)) / long
        v = (-np.sin(angle) * (columns - x) + np.cos(angle) * (rows - y)) / short
        ragged = np.hypot(u, v) + 0.28 * noise(shape, rng, 2, 2) + 0.15 * noise(shape, rng, 0.8, 0.8)
        body = expit(8 * (0.9 - ragged))
        change -= body * (0.8 + 0.25 * noise(shape, rng, 1.5, 1.5))
        keeps *= 1 - 0.7 * body
        mask |= body > 0.4
    return Mark(change, keeps, mask)


def _stain(shape: Shape, rng: Random) -> Mark:
    """A dried drop or a film: a wide faint region with a darker edge."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    y, x = _place(shape, rng, 0.2)
    size = rng.uniform(0.09, 0.25) * min(shape)
    outline = np.hypot(rows - y, columns - x) / size + 0.3 * noise(shape, rng, 9, 9) + 0.07 * noise(shape, rng, 2, 2)
    film = expit(10 * (1 - outline))
    edge = np.exp(-0.5 * ((outline - 0.93) / 0.09) ** 2)
    sign = -1.0 if rng.random() < 0.75 else 1.0
    cloud = 1 + 0.4 * noise(shape, rng, 8, 8)
    return Mark(sign * (0.42 * film * cloud + rng.uniform(0.1, 0.5) * edge), 1 - 0.25 * film, film > 0.4)


def _crack(shape: Shape, rng: Random) -> Mark:
    """A thin dark line that wanders in small steps and forks."""
    change, mask = np.zeros(shape), np.zeros(shape, np.bool_)
    start, heading = _place(shape, rng, 0.15), rng.uniform(0, 2 * np.pi)
    arms = [(start, heading, rng.uniform(0.3, 0.8) * min(shape), 1.0)]
    while arms:
        (y, x), direction, length, depth = arms.pop()
        points: list[tuple[float, float]] = []
        turn = direction
        for step in range(int(length)):
            turn += rng.normal(0, 0.35) + 0.12 * (direction - turn)
            y, x = y + np.sin(turn), x + np.cos(turn)
            points.append((y, x))
            if len(arms) < 2 and depth > 0.6 and length - step > 16 and rng.random() < 0.012:
                fork = direction + rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
                arms.append((np.array([y, x]), fork, 0.5 * (length - step), 0.6 * depth))
        distance, along = _distance(shape, np.array(points))
        taper = depth * (1 - 0.7 * along / max(len(points), 1))
        line = taper * np.exp(-0.5 * (distance / (0.45 + 0.45 * taper)) ** 2)
        change = np.minimum(change, -1.3 * line)
        mask |= (distance <= 1.0) & (line > 0.08)
    return Mark(change, np.ones(shape), mask)


def _place(shape: Shape, rng: Random, edge: float) -> Field:
    """[2]: row and column of a place that is not at the very edge."""
    return np.array([rng.uniform(edge, 1 - edge) * side for side in shape])


def _curve(shape: Shape, rng: Random, heading: float, length: float) -> Field:
    """[points, 2]: rows and columns of a slightly bent line, half a pixel apart."""
    middle = _place(shape, rng, 0.25)
    ahead = np.array([np.sin(heading), np.cos(heading)])
    aside = np.array([ahead[1], -ahead[0]])
    t = np.linspace(-0.5, 0.5, max(int(2 * length), 8))[:, None]
    return middle + length * (t * ahead + rng.normal(0, 0.12) * (t**2 - 0.1) * aside)


def _distance(shape: Shape, path: Field) -> tuple[Field, NDArray[np.int64]]:
    """[height, width] each: pixels to the nearest point of a path, and the number of that point."""
    number = np.full(shape, -1)
    cells = np.rint(path).astype(int)
    within = ((cells >= 0) & (cells < np.array(shape))).all(axis=1)
    if not within.any():
        return np.full(shape, np.inf), np.zeros(shape, np.int64)
    number[tuple(cells[within].T)] = np.flatnonzero(within)
    nearest: Any = ndimage.distance_transform_edt(number < 0, return_distances=False, return_indices=True)
    along = number[tuple(nearest)]
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(rows - path[along, 0], columns - path[along, 1]), along


DEFECTS: dict[str, Callable[[Shape, Random], Mark]] = {
    "crack": _crack,
    "inclusion": _inclusion,
    "pit": _pit,
    "scratch": _scratch,
    "stain": _stain,
}
"""What draws a defect of a class: `draw(shape, rng)`."""
