"""Request traces: files of requests, read, written and cut into parts.

A trace is a CSV (`.csv`, `.csv.gz`) or Parquet (`.parquet`) file with one row per request, in order of time:

=============  ===================================================================================================
`time_s`       seconds from any origin, must not fall; the only column that is required
`device`       number of the device from 0, or any label
`model`        name or number (from 0) of the catalogue, or any label
`images`       images of the request, a whole number >= 1
`steps`        denoising steps per image, a whole number >= 1
`bits_in`      size of the upload, >= 0
`bits_out`     size of the result, >= 0
`deadline_s`   seconds allowed, > 0
`group`        class of the device, a whole number >= 0: each class has its own share of the devices
`work`         nominal work, > 0, in the scenario's work units; without it, work follows from model, images, steps
=============  ===================================================================================================

What is missing is filled from the laws of the scenario (:mod:`gmel.scenario.filling`); files of others that are known
by their header are imported (:mod:`gmel.scenario.importers`). The way is
`read_trace -> fill_trace -> split_trace -> slot_table` (:mod:`gmel.scenario.slots`).
"""

# pyarrow ships incomplete types; the checks that fail on what is unknown of it are off in this file.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

import contextlib
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from gmel.scenario.columns import file_columns, printable
from gmel.scenario.errors import InputError
from gmel.scenario.files import is_file
from gmel.scenario.importers import (
    ATTRIBUTION_AZURE,
    COLUMNS,
    RawTrace,
    detect,
    import_table,
)

__all__ = [
    "RawTrace",
    "Trace",
    "read_trace",
    "shipped_traces",
    "split_trace",
    "write_trace",
]

_TRACES = resources.files("gmel.scenario") / "traces"
_CONVERSATION, _CODE, _MIX = "azure-conversation-2023", "azure-code-2023", "azure-mix-2023"
_FILES = {_CODE: "azure-llm-2023-code.parquet", _CONVERSATION: "azure-llm-2023-conversation.parquet"}

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests with nothing missing, in order of time; all arrays have one length n.

    Attributes:
        time_s: when the request is generated, from 0 on.
        device: 0 .. devices - 1.
        model: 0 .. models - 1; 0 where the scenario has no catalogue.
        images: images of the request, >= 1.
        steps: denoising steps per image, >= 1.
        bits_in: upload in bits.
        bits_out: result in bits.
        deadline_s: seconds allowed, > 0.
        work: nominal work in work units, images x (fixed_work + steps x step_work) (equation (1)), without the noise
            of `tasks.noise_sigma`; drawn from `tasks.work` for tasks of the kind "uniform".
        filled: columns that come from the scenario, not from the file.
        notes: what a user should know about how the trace was read and completed.
    """

    time_s: Floats
    device: Indices
    model: Indices
    images: Indices
    steps: Indices
    bits_in: Floats
    bits_out: Floats
    deadline_s: Floats
    work: Floats
    filled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.time_s)


def shipped_traces() -> list[str]:
    """Names of the traces that come with the package; see `traces/README.md` there for source and licence."""
    return sorted((*_FILES, _MIX))


def read_trace(path_or_name: str | Path) -> RawTrace:
    """A trace from a file, or a shipped one by its name.

    Args:
        path_or_name: one of :func:`shipped_traces`, or a `.csv`, `.csv.gz`, `.tsv`, `.jsonl` or `.parquet` file
            in the columns of this module or of a known data set (see :mod:`gmel.scenario.importers`).

    Raises:
        InputError: neither a shipped trace nor a readable file; `time_s` missing, a column misspelt, no or too many
            requests, a value that is not allowed, or times that fall.
    """
    name = str(path_or_name)
    if name in shipped_traces():
        return _mixed() if name == _MIX else _shipped(name)
    path = Path(path_or_name)
    if not is_file(path):
        near = difflib.get_close_matches(name, shipped_traces(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(
            f"trace {name!r}: no such file, and no shipped trace of that name{hint}; give a .csv, .csv.gz or .parquet "
            f"file, or one of {', '.join(shipped_traces())}"
        )
    source = f"trace {name!r}"
    importer = detect(file_columns(path, source))
    return import_table(path, source) if importer is None else importer(path, source)


def split_trace(trace: Trace, share: float) -> tuple[Trace, Trace]:
    """A trace in two by time: the first `share` of its duration (for training) and the rest (held out).

    Both start at 0. The rate of a part is its own: a trace with bursts is not equally busy in both.

    Args:
        trace: the trace.
        share: of the duration, in (0, 1).

    Raises:
        InputError: `share` out of range, or a part would be empty.
    """
    if not 0 < share < 1:
        raise InputError(f"train_share = {share:g}: must be greater than 0 and less than 1")
    cut = share * float(trace.time_s[-1])
    first = int(np.searchsorted(trace.time_s, cut, side="left"))
    if first == 0:
        raise InputError(
            f"trace of {len(trace)} request(s) at one time cannot be split by time; give a trace that lasts longer"
        )
    return _part(trace, slice(0, first), "first", share), _part(trace, slice(first, None), "last", 1 - share)


def write_trace(trace: Trace | RawTrace | Mapping[str, npt.ArrayLike], path: str | Path) -> None:
    """Writes a trace in the columns of this module; :func:`read_trace` reads it back to equal values.

    The file appears complete or not at all. `work` of a :class:`Trace` is written only where it was drawn; elsewhere it
    follows from model, images and steps. Parquet keeps the attribution beside the columns.

    Args:
        trace: a completed trace, a trace as read, or arrays by column name.
        path: `.csv`, `.csv.gz` or `.parquet`.

    Raises:
        InputError: another suffix, the folder cannot be written, or columns that make no valid trace.
    """
    path = Path(path)
    writer = _writer(path)
    attribution = ""
    if isinstance(trace, Trace):
        names = [name for name in COLUMNS if name != "group" and (name != "work" or "work" in trace.filled)]
        columns: dict[str, npt.NDArray[Any]] = {name: getattr(trace, name) for name in names}
    else:
        arrays = {name: np.asarray(values) for name, values in _columns_of(trace).items()}
        raw = RawTrace(arrays, f"trace for {path.name!r}")
        columns = raw.columns
        attribution = trace.attribution if isinstance(trace, RawTrace) else ""
    arrow = pa.table({name: pa.array(values) for name, values in columns.items()})
    if attribution:
        arrow = arrow.replace_schema_metadata({"attribution": attribution})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        writer(arrow, part)
        part.replace(path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else printable(str(error), 160)
        raise InputError(f"trace {path.name!r} cannot be written ({reason}); give a folder that can") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _columns_of(trace: RawTrace | Mapping[str, npt.ArrayLike]) -> Mapping[str, npt.ArrayLike]:
    return trace.columns if isinstance(trace, RawTrace) else trace


def _writer(path: Path) -> Callable[[Any, Path], None]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _write_parquet
    if name.endswith(".csv"):
        return _write_csv
    if name.endswith(".csv.gz"):
        return _write_gzip
    raise InputError(f"trace {path.name!r}: suffix {path.suffix!r} is not known; use .csv, .csv.gz or .parquet")


def _write_parquet(table: Any, path: Path) -> None:
    pa_parquet.write_table(table, path, compression="zstd")


def _write_csv(table: Any, path: Path) -> None:
    pa_csv.write_csv(table, path)


def _write_gzip(table: Any, path: Path) -> None:
    with pa.output_stream(str(path), compression="gzip") as stream:
        pa_csv.write_csv(table, stream)


def _shipped(name: str) -> RawTrace:
    table = pa_parquet.read_table(pa.BufferReader((_TRACES / _FILES[name]).read_bytes()))
    # Kept as whole milliseconds, which pack into a third of the bytes of floats.
    columns: dict[str, npt.NDArray[Any]] = {"time_s": table.column("time_ms").to_numpy() / 1e3}
    for tokens in ("context_tokens", "generated_tokens"):
        columns[tokens] = table.column(tokens).to_numpy().astype(np.int64)
    return RawTrace(columns, f"trace {name!r}", ATTRIBUTION_AZURE)


def _mixed() -> RawTrace:
    """Both Azure traces at once, each from its own start, as two classes of devices over their common duration."""
    parts = [_shipped(_CONVERSATION), _shipped(_CODE)]
    end = min(float(part.columns["time_s"][-1]) for part in parts)
    kept = [part.columns["time_s"] <= end for part in parts]
    columns = {
        name: np.concatenate([part.columns[name][keep] for part, keep in zip(parts, kept, strict=True)])
        for name in parts[0].columns
    }
    columns["group"] = np.repeat(np.arange(2), [np.count_nonzero(keep) for keep in kept])
    order = np.argsort(columns["time_s"], kind="stable")
    note = f"group 0 is the conversation trace, group 1 the code trace, over their common {end:,.0f} s"
    return RawTrace(
        {name: values[order] for name, values in columns.items()}, f"trace {_MIX!r}", ATTRIBUTION_AZURE, (note,)
    )


def _part(trace: Trace, rows: slice, which: str, share: float) -> Trace:
    time_s = trace.time_s[rows]
    note = f"{which} {share:.0%} of the duration: {len(time_s):,} of {len(trace):,} requests"
    return replace(
        trace,
        time_s=time_s - time_s[0],
        **{
            name: getattr(trace, name)[rows]
            for name in ("device", "model", "images", "steps", "bits_in", "bits_out", "deadline_s", "work")
        },
        notes=(*trace.notes, note),
    )
