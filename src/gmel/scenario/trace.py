"""Request traces: files of requests, completed by a scenario, cut into parts and laid out in slots.

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

What is missing is filled from the laws of the scenario (:func:`fill_trace`); files of others that are known by
their header are imported (:mod:`gmel.scenario.importers`). The way is
`read_trace -> fill_trace -> split_trace -> slot_table`.
"""

# pyarrow ships incomplete types; the checks that fail on what is unknown of it are off in this file.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

import contextlib
import difflib
import math
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

from gmel.scenario.columns import file_columns, is_file, printable
from gmel.scenario.errors import InputError
from gmel.scenario.importers import (
    ATTRIBUTION_AZURE,
    COLUMNS,
    RawTrace,
    detect,
    import_table,
)
from gmel.scenario.schema import Choice, Range, Scenario

__all__ = [
    "MAX_CELLS",
    "RawTrace",
    "SlotTable",
    "Trace",
    "fill_trace",
    "read_trace",
    "shipped_traces",
    "slot_table",
    "split_trace",
    "write_trace",
]

MAX_CELLS = 2**24
"""Most cells (slots x rows) of a slot table: about 1 GB."""

# How far after a slot start, in slots, a request still counts as at it: times carry rounding of the decimal
# fraction and of the stretching.
_AT_START = 1e-9

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


@dataclass(frozen=True, eq=False)
class SlotTable:
    """Requests by the slot in which they are decided: arrays [T slots, R rows], zero where `present` is false.

    The rows of a slot are filled from 0 on, in order of generation; several rows of a slot may be of one device.

    Attributes:
        present: whether the row holds a request.
        request: number of the request in the trace; -1 where absent.
        device, model, images, steps: as in :class:`Trace`.
        generated_s: when the request was generated, relative to the slot start at which it is decided; <= 0.
        size_bit: upload in bits.
        bits_out: result in bits.
        work: nominal work in work units.
        deadline_s: seconds allowed.
        slot_s: slot length in seconds.
        delayed: requests decided in a later slot than the first at or after their generation, for want of rows.
    """

    present: npt.NDArray[np.bool_]
    request: Indices
    device: Indices
    model: Indices
    images: Indices
    steps: Indices
    generated_s: Floats
    size_bit: Floats
    bits_out: Floats
    work: Floats
    deadline_s: Floats
    slot_s: float
    delayed: int


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


def fill_trace(raw: RawTrace, scenario: Scenario, seed: int = 0) -> Trace:
    """Completes a trace from the laws of a scenario and stretches it in time to the asked rate.

    Each missing column has its own random stream, so that giving one column leaves the others as they were:

    - `device`: weight rank^-`arrivals.device_skew`; with `group`, within the devices of the group, and groups have
      devices in proportion to their requests;
    - `model`: by popularity; with probability `tasks.repeat_model` that of the request before (of the same device
      where the trace names devices);
    - `images`, `steps`, `bits_in`, `bits_out`: as the model says, or `tasks` where there is no catalogue;
    - `deadline_s`: from `tasks.deadline_s`.

    Labels of devices are numbered in order of first appearance, modulo the number of devices. Labels of models that
    are not in the catalogue are matched by popularity: the most frequent one is the most popular entry.

    With `arrivals.rate_per_s`, (n - 1) / (last - first time) becomes that rate; with `arrivals.load`, the rate at which
    the work of this very trace, with the mean of its noise, is the asked share of the servers' capacity.

    Args:
        raw: the trace as read.
        scenario: the plant.
        seed: of the random streams, >= 0.

    Raises:
        InputError: the seed is negative, or a trace without duration is to be stretched.
    """
    if seed < 0:
        raise InputError(f"seed = {seed}: must be a whole number >= 0")
    notes = [f"{raw.source}: {len(raw):,} requests" + (f"; {raw.attribution}" if raw.attribution else ""), *raw.notes]
    given = {name: values for name, values in raw.columns.items() if name in COLUMNS}
    unused = [printable(name) for name in raw.columns if name not in COLUMNS]
    if "device" in given and given.pop("group", None) is not None:
        unused.append("group")
    if scenario.tasks.kind == "uniform" and given.pop("model", None) is not None:
        unused.append("model")
    if unused:
        notes.append(f"columns without effect: {', '.join(unused)}")

    draws = _Draws(len(raw), seed)
    device = _devices(given, scenario, draws, notes)
    model = _models(given, scenario, draws, notes)
    columns = _asked(given, scenario, model, draws)
    filled = [name for name in (*COLUMNS[:8], "work") if name not in given]
    if scenario.tasks.kind == "catalogue" and "work" in filled:
        filled.remove("work")  # it follows from the model, nothing is drawn
    if filled:
        notes.append(f"filled from scenario {scenario.name!r}: {', '.join(filled)}")
    time_s = raw.columns["time_s"] - raw.columns["time_s"][0]
    time_s = _stretched(time_s, columns["work"], scenario, raw.source, notes)
    return Trace(
        time_s=time_s,
        device=device.astype(np.int32),
        model=model.astype(np.int32),
        images=columns["images"].astype(np.int32),
        steps=columns["steps"].astype(np.int32),
        bits_in=columns["bits_in"],
        bits_out=columns["bits_out"],
        deadline_s=columns["deadline_s"],
        work=columns["work"],
        filled=tuple(filled),
        notes=tuple(notes),
    )


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


def slot_table(trace: Trace, slot_s: float, capacity: int | None = None) -> SlotTable:
    """Lays requests out in slots: each is decided at the first slot start at or after its generation.

    Slot k starts at k x `slot_s`. With fewer rows than requests, the surplus waits for the next slots, first in, first
    out: with C rows, request i is decided in slot s_i = max(k_i, s_{i-C} + 1), which is Lindley's recursion
    on each of the C interleaved chains.

    Args:
        trace: the trace.
        slot_s: slot length in seconds, > 0.
        capacity: rows of a slot; by default as many as the fullest slot needs.

    Raises:
        InputError: `slot_s` or `capacity` out of range, or more than :data:`MAX_CELLS` cells.
    """
    if not (math.isfinite(slot_s) and slot_s > 0):
        raise InputError(f"slot.length_s = {slot_s:g}: must be a number of seconds > 0")
    if capacity is not None and capacity < 1:
        raise InputError(f"arrivals.max_per_slot = {capacity}: must be a whole number >= 1")
    exact = np.ceil(trace.time_s / slot_s - _AT_START)
    if exact[-1] >= MAX_CELLS:
        raise InputError(_too_large(f"{exact[-1] + 1:.3g} slots", slot_s))
    due = np.maximum(exact, 0).astype(np.int64)
    slot = due if capacity is None else _first_in_first_out(due, capacity)
    place = np.arange(len(slot)) - np.searchsorted(slot, slot, side="left")
    slots, rows = int(slot[-1]) + 1, int(place.max()) + 1 if capacity is None else capacity
    if slots * rows > MAX_CELLS:
        raise InputError(_too_large(f"{slots} slots x {rows} rows", slot_s))
    cell = slot * rows + place

    def laid(values: npt.NDArray[Any], absent: int = 0) -> npt.NDArray[Any]:
        table = np.full(slots * rows, absent, dtype=values.dtype)
        table[cell] = values
        return table.reshape(slots, rows)

    return SlotTable(
        present=laid(np.ones(len(trace), dtype=np.bool_)),
        request=laid(np.arange(len(trace), dtype=np.int32), absent=-1),
        device=laid(trace.device),
        model=laid(trace.model),
        images=laid(trace.images),
        steps=laid(trace.steps),
        generated_s=laid(np.minimum(trace.time_s - slot * slot_s, 0.0)),
        size_bit=laid(trace.bits_in),
        bits_out=laid(trace.bits_out),
        work=laid(trace.work),
        deadline_s=laid(trace.deadline_s),
        slot_s=float(slot_s),
        delayed=int(np.count_nonzero(slot > due)),
    )


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


class _Draws:
    """Uniform numbers on [0, 1), one stream for each column and use, so that columns do not disturb one another."""

    _STREAMS = ("device", "model", "repeat", "images", "steps", "bits_in", "deadline_s", "work")

    def __init__(self, count: int, seed: int) -> None:
        self.count, self._seed = count, seed

    def __call__(self, what: str) -> Floats:
        stream = np.random.default_rng([self._seed, self._STREAMS.index(what)])
        return stream.random(self.count)


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


def _devices(given: Mapping[str, npt.NDArray[Any]], scenario: Scenario, draws: _Draws, notes: list[str]) -> Ints:
    count = scenario.devices.count
    if "device" in given:
        named = given["device"]
        if named.dtype.kind == "i" and int(named.max()) < count:
            return named
        number, labels = _numbered(named)
        if len(labels) > count:
            notes.append(f"{len(labels):,} devices of the trace folded onto {count:,} of the scenario")
        elif named.dtype.kind == "i":
            notes.append(f"device numbers up to {int(named.max())} numbered anew from 0, in order of appearance")
        return number % count
    uniform = draws("device")
    if "group" not in given:
        return _by_rank(uniform, count, scenario.arrivals.device_skew)
    values, group, requests = np.unique(given["group"], return_inverse=True, return_counts=True)
    if len(values) > count:
        notes.append(f"{len(values)} groups of the trace folded onto {count:,} devices")
        return group % count
    sizes = _proportional(requests, count)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    device = np.zeros(len(group), dtype=np.int64)
    for index, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        of_group = group == index
        device[of_group] = start + _by_rank(uniform[of_group], size, scenario.arrivals.device_skew)
    shares = ", ".join(f"group {value}: {size:,}" for value, size in zip(values.tolist(), sizes.tolist(), strict=True))
    notes.append(f"devices by group, in proportion to requests: {shares}")
    return device


def _models(given: Mapping[str, npt.NDArray[Any]], scenario: Scenario, draws: _Draws, notes: list[str]) -> Ints:
    count = draws.count
    if scenario.tasks.kind == "uniform":
        return np.zeros(count, dtype=np.int64)
    popularity = np.asarray([model.popularity for model in scenario.models])
    if "model" in given:
        return _matched(given["model"], scenario, popularity, notes)
    fresh = np.searchsorted(_cumulative(popularity), draws("model"), side="right")
    repeats = draws("repeat") < scenario.tasks.repeat_model
    # Requests of a device side by side, in order of time; where the trace names no device, the plant is one chain.
    chain = _numbered(given["device"])[0] if "device" in given else np.zeros(count, dtype=np.int64)
    order = np.argsort(chain, kind="stable")
    starts = np.diff(chain[order], prepend=-1) != 0
    last_fresh = np.maximum.accumulate(np.where(starts | ~repeats[order], np.arange(count), 0))
    model = np.empty(count, dtype=np.int64)
    model[order] = fresh[order][last_fresh]
    return model


def _matched(named: npt.NDArray[Any], scenario: Scenario, popularity: Floats, notes: list[str]) -> Ints:
    """Catalogue numbers of the models that a trace names."""
    entries = len(popularity)
    if named.dtype.kind == "i" and int(named.max()) < entries:
        return named
    number, labels = _numbered(named)
    catalogue = {model.name: index for index, model in enumerate(scenario.models)}
    target = np.asarray([catalogue.get(str(label), -1) for label in labels], dtype=np.int64)
    unknown = np.flatnonzero(target < 0)
    if len(unknown):
        # Entries that the trace names itself are left to it, as long as others remain.
        by_popularity = np.argsort(-popularity, kind="stable")
        free = by_popularity[~np.isin(by_popularity, target)]
        free = free if len(free) else by_popularity
        by_frequency = unknown[np.argsort(-np.bincount(number, minlength=len(labels))[unknown], kind="stable")]
        target[by_frequency] = free[np.arange(len(by_frequency)) % len(free)]
        shown = ", ".join(
            f"{printable(str(labels[i]))} -> {scenario.models[target[i]].name}" for i in by_frequency[:3].tolist()
        )
        notes.append(
            f"{len(unknown):,} model labels not in the catalogue, matched by popularity onto {len(free)} entries: "
            + shown
            + (", ..." if len(unknown) > 3 else "")
        )
    return target[number]


def _asked(
    given: Mapping[str, npt.NDArray[Any]], scenario: Scenario, model: Ints, draws: _Draws
) -> dict[str, npt.NDArray[Any]]:
    """What each request asks for: images, steps, bits_in, bits_out, deadline_s, work."""
    tasks, models = scenario.tasks, scenario.models
    columns: dict[str, npt.NDArray[Any]] = {name: values for name, values in given.items() if name in COLUMNS[3:]}
    if "deadline_s" not in given:
        columns["deadline_s"] = _between(draws("deadline_s"), tasks.deadline_s)
    if tasks.kind == "uniform":
        assert tasks.work is not None  # guaranteed by Tasks
        assert tasks.bits_in is not None
        one = np.ones(len(model), dtype=np.int64)
        columns.setdefault("images", one)
        columns.setdefault("steps", one)
        if "bits_in" not in given:
            columns["bits_in"] = _between(draws("bits_in"), tasks.bits_in)
        if "bits_out" not in given:
            columns["bits_out"] = np.full(len(model), tasks.bits_out)
        if "work" not in given:
            columns["work"] = _between(draws("work"), tasks.work)
        return columns
    if "images" not in given:
        columns["images"] = _chosen(draws("images"), model, [entry.images for entry in models])
    if "steps" not in given:
        columns["steps"] = _chosen(draws("steps"), model, [entry.steps for entry in models])
    if "bits_in" not in given:
        low = np.asarray([entry.bits_in.low for entry in models])[model]
        high = np.asarray([entry.bits_in.high for entry in models])[model]
        columns["bits_in"] = low + draws("bits_in") * (high - low)
    images = columns["images"].astype(np.float64)
    if "bits_out" not in given:
        columns["bits_out"] = images * np.asarray([entry.bits_out_per_image for entry in models])[model]
    if "work" not in given:
        fixed_work = np.asarray([entry.fixed_work for entry in models])[model]
        step_work = np.asarray([entry.step_work.mean if entry.step_work else 0.0 for entry in models])[model]
        bit_work = np.asarray([entry.work_per_bit.mean if entry.work_per_bit else 0.0 for entry in models])[model]
        square_work = np.asarray([entry.square_work for entry in models])[model]
        steps = columns["steps"].astype(np.float64)
        columns["work"] = (
            images * (fixed_work + steps * (step_work + steps * square_work)) + columns["bits_in"] * bit_work
        )
    return columns


def _stretched(time_s: Floats, work: Floats, scenario: Scenario, source: str, notes: list[str]) -> Floats:
    """Times at the rate that the scenario asks for; as they are where it asks for none."""
    arrivals, span, gaps = scenario.arrivals, float(time_s[-1]), len(time_s) - 1
    if arrivals.load is not None:
        noise = math.exp(0.5 * scenario.tasks.noise_sigma**2)
        rate, wanted = arrivals.load * scenario.capacity / (float(work.mean()) * noise), f"load {arrivals.load:g}"
    elif arrivals.rate_per_s is not None:
        rate, wanted = arrivals.rate_per_s, f"rate_per_s {arrivals.rate_per_s:g}"
    else:
        if span > 0:
            notes.append(f"the trace keeps its own time: {gaps / span:.4g} requests/s")
        return time_s
    if span <= 0:
        raise InputError(
            f"{source}: column 'time_s' has no duration ({gaps + 1} request(s), all at one time) and cannot be "
            f"stretched to {wanted}; give a longer trace, or remove arrivals.load and arrivals.rate_per_s"
        )
    factor = gaps / rate / span
    notes.append(f"time stretched by {factor:.4g} to {rate:.4g} requests/s ({wanted})")
    return time_s * factor


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


def _first_in_first_out(due: Ints, capacity: int) -> Ints:
    """Slots of requests due in slots `due` (rising), at most `capacity` in each."""
    rounds = -(-len(due) // capacity)
    chains = np.pad(due, (0, rounds * capacity - len(due)), mode="edge").reshape(rounds, capacity)
    step = np.arange(rounds)[:, None]
    return (np.maximum.accumulate(chains - step, axis=0) + step).reshape(-1)[: len(due)]


def _too_large(size: str, slot_s: float) -> str:
    return (
        f"trace in slots of slot.length_s = {slot_s:g} s needs {size}, more than {MAX_CELLS:,} cells in all; "
        "use longer slots, a smaller arrivals.max_per_slot, or a shorter trace"
    )


def _numbered(labels: npt.NDArray[Any]) -> tuple[Ints, list[Any]]:
    """Numbers of labels in order of first appearance, and the labels in that order."""
    encoded = pa.array(labels).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _cumulative(weights: Floats) -> Floats:
    total = np.cumsum(weights)
    return total / total[-1]


def _by_rank(uniform: Floats, count: int, skew: float) -> Ints:
    """0 .. count - 1, drawn with weights (1 + index)^-skew."""
    shares = _cumulative(np.arange(1, count + 1, dtype=np.float64) ** -skew)
    return np.searchsorted(shares, uniform, side="right")


def _proportional(requests: Ints, count: int) -> Ints:
    """`count` devices in proportion to requests, by largest remainders; none of the groups goes without."""
    exact = count * requests / requests.sum()
    sizes = np.floor(exact).astype(np.int64)
    most_owed = np.argsort(-(exact - sizes), kind="stable")[: count - int(sizes.sum())]
    sizes[most_owed] += 1
    for without in np.flatnonzero(sizes == 0).tolist():
        sizes[int(sizes.argmax())] -= 1
        sizes[without] = 1
    return sizes


def _between(uniform: Floats, law: Range) -> Floats:
    return law.low + uniform * (law.high - law.low)


def _chosen(uniform: Floats, model: Ints, laws: list[Choice]) -> Ints:
    """Whole numbers >= 1 by the law of each request's model."""
    drawn = np.empty(len(model), dtype=np.int64)
    for index, law in enumerate(laws):
        of_model = model == index
        at = np.searchsorted(_cumulative(np.asarray(law.weights)), uniform[of_model], side="right")
        drawn[of_model] = np.maximum(np.rint(np.asarray(law.values)), 1).astype(np.int64)[at]
    return drawn
