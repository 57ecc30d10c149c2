"""Small photos, and a small generator that was fitted on them, for tests of inputs."""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from gmel.synthesis.compose import Compose
from gmel.synthesis.generator import save_generator
from gmel.synthesis.photo import GOOD, Photo

__all__ = ["SIDE", "compose_in", "name_of_photo", "png"]

SIDE = 48


def png(seed: int = 0, side: int = SIDE) -> bytes:
    """A grey surface, brighter with the seed: [side, side], uint8, as PNG."""
    noise = np.random.default_rng(seed).integers(0, 9, (side, side)) + 60 + 10 * (seed % 12)
    stream = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def name_of_photo(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compose_in(folder: Path, model: str = "compose") -> None:
    """A fitted `compose` that draws the class `dot`: one dark dot on dark surfaces of its own."""
    surface = np.full((SIDE, SIDE), 40, np.uint8)
    shot, mask = surface.copy(), np.zeros((SIDE, SIDE), np.bool_)
    mask[20:26, 20:26] = True
    shot[mask] = 5
    folder.mkdir(parents=True, exist_ok=True)
    generator = Compose([Photo(shot, "dot", mask, site="here")], [Photo(surface, GOOD, site="here")])
    save_generator(folder / f"{model}.safetensors", generator)
