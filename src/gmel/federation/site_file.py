"""Rows of a site in one file, which stays at the site: what a process there trains on."""

import json

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays

from gmel.federation.training import SiteRows
from gmel.scenario.errors import InputError

__all__ = ["rows_from_bytes", "rows_to_bytes"]


def rows_to_bytes(rows: SiteRows) -> bytes:
    """One safetensors file: features, places among the labels, weights; the labels and the name as text."""
    labels = sorted(set(rows.labels.tolist()))
    arrays = {
        "features": np.ascontiguousarray(rows.features, np.float32),
        "kinds": np.asarray([labels.index(label) for label in rows.labels.tolist()], np.int32),
        "weights": np.ascontiguousarray(rows.weights, np.float64),
    }
    return write_arrays(arrays, metadata={"name": rows.name, "labels": json.dumps(labels)})


def rows_from_bytes(data: bytes, source: str) -> SiteRows:
    """The rows of a file.

    Args:
        data: what :func:`rows_to_bytes` gave.
        source: where it comes from, for messages.

    Raises:
        InputError: corrupt, or with arrays that do not fit.
    """
    try:
        arrays = parse_arrays(data)
        facts: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        labels = np.asarray(json.loads(facts["labels"]), np.str_)[arrays["kinds"]]
        rows = SiteRows(facts["name"], arrays["features"], labels, arrays["weights"])
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{source}: corrupt rows of a site ({error}); write them again") from error
    if rows.features.ndim != 2 or not rows.features.shape[0] == rows.labels.size == rows.weights.size:
        raise InputError(f"{source}: {rows.features.shape} features do not fit {rows.labels.size} labels")
    return rows
