"""A frozen encoder that the user brings, as an ONNX file: its embeddings as features."""

# ONNX Runtime's types are partial; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from gmel.scenario.errors import InputError
from gmel.synthesis.photo import Floats, Photo

__all__ = ["EncoderExtractor"]

_SIDE = 224
"""Side of the input where the file leaves it open."""
_MEAN, _DEVIATION = 0.449, 0.226
"""Of the grey values of natural photos (mean of ImageNet's three channels), as public encoders were trained."""
_BATCH = 16
_MOST_FEATURES = 8192


class EncoderExtractor:
    """Embeddings of photos by an ONNX file: one input [photos, 1 or 3, height, width], the first output is read.

    Photos are resized to the input, grey values repeated over channels and standardised as public encoders expect. The
    graph is run, nothing in the file is executed otherwise; files with external data are refused.

    Attributes:
        digest: SHA-256 of the file: a detector trained on one encoder works with that one alone.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file.

        Raises:
            InputError: unreadable, no ONNX graph, or another kind of input.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"encoder {path}: cannot be read ({error.strerror})") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            # From memory: a graph that refers to other files cannot be opened so.
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # ONNX Runtime raises its own classes, which share no base with a name.
            raise InputError(f"encoder {path}: not an ONNX graph that can be run ({_first(error)})") from error
        inputs = self._session.get_inputs()
        shape: list[Any] = list(inputs[0].shape) if len(inputs) == 1 else []
        channels = shape[1] if len(shape) == 4 else None
        if channels not in (1, 3) or inputs[0].type != "tensor(float)":
            raise InputError(
                f"encoder {path}: inputs are {[(one.type, one.shape) for one in inputs]}; "
                "must be one of floats, [photos, 1 or 3, height, width]"
            )
        self._name, self._channels = inputs[0].name, channels
        self._fixed = shape[0] if isinstance(shape[0], int) else None
        self._height, self._width = (side if isinstance(side, int) else _SIDE for side in shape[2:])
        self._path = path
        self.digest = hashlib.sha256(data).hexdigest()
        self.name = f"encoder {self.digest[:12]}"
        size = self._run(np.zeros((self._fixed or 1, self._channels, self._height, self._width), np.float32)).shape[1]
        if size > _MOST_FEATURES:
            raise InputError(
                f"encoder {path}: {size} numbers a photo; at most {_MOST_FEATURES}, put a pooling at its end"
            )
        self.names = tuple(f"embedding_{n}" for n in range(size))

    def __call__(self, photos: Sequence[Photo]) -> Floats:
        rows: list[Floats] = []
        step = self._fixed or _BATCH
        for start in range(0, len(photos), step):
            batch = np.stack([self._prepared(photo) for photo in photos[start : start + step]])
            missing = (self._fixed or len(batch)) - len(batch)
            filled = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.float32)]) if missing else batch
            rows.append(self._run(filled)[: len(batch)])
        return np.concatenate(rows) if rows else np.zeros((0, len(self.names)), np.float32)

    def _prepared(self, photo: Photo) -> Floats:
        grey = Image.fromarray(photo.pixels()).resize((self._width, self._height), Image.Resampling.BICUBIC)
        standard = (np.asarray(grey, np.float32) - _MEAN) / _DEVIATION
        return np.repeat(standard[None], self._channels, axis=0)

    def _run(self, batch: Floats) -> Floats:
        try:
            output = np.asarray(self._session.run(None, {self._name: batch})[0], np.float32)
        except Exception as error:
            raise InputError(f"encoder {self._path}: fails on {batch.shape} ({_first(error)})") from error
        if output.ndim < 2 or output.shape[0] != batch.shape[0] or not np.isfinite(output).all():
            raise InputError(
                f"encoder {self._path}: gives {output.shape} for {batch.shape}; must be finite, a row a photo"
            )
        return output.reshape(output.shape[0], -1)


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
