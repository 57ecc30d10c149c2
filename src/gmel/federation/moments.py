"""How sites agree on the scale of features without showing photos: exact sums of features and of their squares."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as write_arrays

from gmel.scenario.errors import InputError
from gmel.synthesis.detector.linear import Scaling
from gmel.synthesis.photo import Floats

__all__ = ["Moments", "agreed_scaling"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """What a site says about its photos.

    Attributes:
        counts: photos of each class.
        total: sum of the features, [features].
        squares: sum of their squares, [features].
    """

    counts: dict[str, int]
    total: Doubles
    squares: Doubles

    @classmethod
    def of(cls, features: Floats, labels: Sequence[str]) -> Self:
        """The sums of rows, [rows, features], in double precision."""
        rows = features.astype(np.float64)
        counts = {name: sum(label == name for label in labels) for name in sorted(set(labels))}
        return cls(counts, rows.sum(axis=0), np.square(rows).sum(axis=0))

    def to_bytes(self) -> bytes:
        """What is sent."""
        return write_arrays(
            {"total": self.total, "squares": self.squares}, metadata={"counts": json.dumps(self.counts)}
        )


def agreed_scaling(moments: Sequence[Moments]) -> Scaling:
    """The scaling of the rows of all sites together.

    Raises:
        InputError: no rows at all, or sums that are not finite.
    """
    count = sum(sum(site.counts.values()) for site in moments)
    if not count:
        raise InputError("sites: no photos at any of them; nothing to agree on")
    total = np.sum([site.total for site in moments], axis=0)
    squares = np.sum([site.squares for site in moments], axis=0)
    if not (np.isfinite(total).all() and np.isfinite(squares).all()):
        raise InputError("sites: sums of features are not finite; leave out the site that sends them")
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return Scaling(mean.astype(np.float32), (deviation + 1e-6).astype(np.float32))
