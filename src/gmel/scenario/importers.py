"""Requests as files hold them: GMEL's own columns, and the files of others that are recognised by their header.

Files of others that are known: the GenTD26 request trace of a production Stable Diffusion service
(:func:`import_genai`), the Azure LLM inference traces (:func:`import_azure_llm`), and the request files of the
simulators Vidur (:func:`import_vidur`) and LLMServingSim (:func:`import_llmservingsim`); beside requests, the places of
the EUA data set (:func:`import_places`). Cells are read as text or numbers and checked; nothing in a file is ever
executed or unpickled.
"""

# pyarrow ships incomplete types; the checks that fail on what is unknown of it are off in this file.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from gmel.scenario.columns import (
    Column,
    Rows,
    Rule,
    check_filled,
    check_length,
    check_range,
    file_columns,
    floats,
    labels,
    listing,
    printable,
    read_columns,
    seconds,
    texts,
)
from gmel.scenario.errors import InputError

__all__ = [
    "ATTRIBUTION_AZURE",
    "ATTRIBUTION_GENAI",
    "COLUMNS",
    "MAX_PLACES",
    "MAX_SPAN_S",
    "RawTrace",
    "detect",
    "import_azure_llm",
    "import_genai",
    "import_llmservingsim",
    "import_places",
    "import_table",
    "import_vidur",
]

MAX_PLACES = 100_000
"""Most places of a file of positions: as many as a scenario may have devices."""
MAX_SPAN_S = 10 * 365.25 * 86400.0
"""Longest trace, ten years in seconds: beyond it the times are in another unit."""

ATTRIBUTION_AZURE = (
    "Azure LLM inference trace 2023 (github.com/Azure/AzurePublicDataset), CC-BY 4.0; "
    "Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, ISCA 2024"
)
ATTRIBUTION_GENAI = (
    "GenTD26 (github.com/alibaba/clusterdata, cluster-trace-v2026-GenAI), not to be redistributed; "
    "cite Lin et al., SoCC '25"
)


_NUMBERS = {
    "time_s": Rule(0, 1e12),
    "images": Rule(1, 1e6, whole=True),
    "steps": Rule(1, 1e6, whole=True),
    "bits_in": Rule(0, 1e12),
    "bits_out": Rule(0, 1e12),
    "deadline_s": Rule(0, 1e12, open=True),
    "group": Rule(0, 1e6, whole=True),
    "work": Rule(0, 1e12, open=True),
}
_LABELS = ("device", "model")
_INDEX = Rule(0, float(2**53), whole=True)

COLUMNS = ("time_s", "device", "model", "images", "steps", "bits_in", "bits_out", "deadline_s", "group", "work")
"""Columns that a trace may have; `time_s` is required. See :mod:`gmel.scenario.trace`."""

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_GENAI = (
    "gmt_create",
    "predict_status",
    "groupId",
    "num_images_per_prompt",
    "num_inference_steps",
    "checkpoint_model_version_id",
)

_VIDUR = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
_LLMSERVINGSIM = ("arrival_time_ns", "input_toks", "output_toks")
_PLACES = ("latitude", "longitude")
_TOKENS = Rule(0, float(2**31 - 1), whole=True)


@dataclass(frozen=True, eq=False)
class RawTrace:
    """The requests of a file, checked, before a scenario fills what is missing.

    Attributes:
        columns: arrays of one length, in order of time. `time_s`, `bits_in`, `bits_out`, `deadline_s`, `work`:
            float64; `images`, `steps`, `group`: int64; `device`, `model`: int64, or str objects (labels). Columns
            of other names are carried along and have no effect on a simulation.
        source: name of the trace, or the file as the user gave it.
        attribution: whom to cite, and under which licence the data came; empty if unknown.
        notes: what reading did that a user should know.

    Raises:
        InputError: no `time_s`, no or too many requests, a value out of range, or times that fall.
    """

    columns: dict[str, npt.NDArray[Any]]
    source: str
    attribution: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if "time_s" not in self.columns:
            raise InputError(_no_time(list(self.columns), self.source))
        times = np.asarray(self.columns["time_s"])
        if len(times) == 0:
            raise InputError(f"{self.source}: column 'time_s' has no rows; a trace needs at least one request")
        check_length(len(times), self.source)
        checked: dict[str, npt.NDArray[Any]] = {}
        for name, given in self.columns.items():
            values = np.asarray(given)
            if values.shape != times.shape or values.ndim != 1:
                raise InputError(
                    f"{self.source}: column {name!r} has shape {values.shape}, time_s has {times.shape}; "
                    "give one value for each request"
                )
            checked[name] = _checked(values, name, self.source)
        _check_times(checked["time_s"], self.source)
        object.__setattr__(self, "columns", checked)

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.columns["time_s"])


def detect(columns: Sequence[str]) -> Callable[[Path, str], RawTrace] | None:
    """The importer of a file with these columns, or None if it is no file of others that is known."""
    if set(_AZURE) <= set(columns):
        return import_azure_llm
    if set(_GENAI) <= set(columns):
        return import_genai
    if set(_VIDUR) <= set(columns):
        return import_vidur
    if set(_LLMSERVINGSIM) <= set(columns):
        return import_llmservingsim
    return None


def import_table(path: Path, source: str) -> RawTrace:
    """A file in GMEL's own columns (:data:`COLUMNS`).

    Columns of other names are left out and listed in the notes, unless they look like a misspelt one.

    Raises:
        InputError: not readable, `time_s` missing, a misspelt column, or a value that is not allowed.
    """
    found = file_columns(path, source)
    known = [name for name in found if name in COLUMNS]
    others = [name for name in found if name not in COLUMNS]
    if "time_s" not in known:
        raise InputError(_no_time(found, source))
    absent = [name for name in COLUMNS if name not in known]
    for name in others:
        near = difflib.get_close_matches(name.lower(), absent, n=1, cutoff=0.8)
        if near:
            raise InputError(
                f"{source}: column {printable(name)!r} is not known; did you mean {near[0]!r}? Rename it, or remove it "
                "if it is something else"
            )
    table = read_columns(path, known, source)
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in known:
        columns[name] = (
            labels(table[name], name, source) if name in _LABELS else floats(table[name], name, source, _NUMBERS[name])
        )
    notes = (f"columns not used: {listing(others)}",) if others else ()
    return RawTrace(columns, source, _attribution(path), notes)


def import_genai(path: Path | str, source: str | None = None) -> RawTrace:
    """The GenTD26 request trace of a production Stable Diffusion service (`lora_request_trace.csv`).

    Time from `gmt_create` (resolution 1 s; requests of the same second keep their order), device from `groupId`,
    model from `checkpoint_model_version_id`, images and steps. Requests that did not succeed and rows with an empty
    cell are left out and counted in the notes.

    The data set states no licence: **it must not be shipped with anything**; keep to your own copy and cite
    Lin et al., SoCC '25 (GitHub alibaba/clusterdata, folder cluster-trace-v2026-GenAI).

    Args:
        path: the file.
        source: what to call it in errors and notes; the path by default.

    Raises:
        InputError: not readable, a missing column, a value that is not allowed, or no request left.
    """
    path, source = _named(path, source, _GENAI)
    table = {name: texts(column, name, source) for name, column in read_columns(path, _GENAI, source).items()}
    status = table["predict_status"]
    failed, succeeded = status == "FAILED", status == "SUCCEED"
    empty = np.zeros(len(status), dtype=bool)
    for name in _GENAI:
        empty |= table[name] == ""
    rows = np.flatnonzero(succeeded & ~empty)
    if len(rows) == 0:
        raise InputError(
            f"{source}: column 'predict_status' has no row SUCCEED with all cells filled; "
            "give the complete lora_request_trace.csv"
        )
    time_s = seconds(_picked(table["gmt_create"], rows), "gmt_create", source, rows)
    images = floats(
        _picked(table["num_images_per_prompt"], rows), "num_images_per_prompt", source, _NUMBERS["images"], rows
    )
    steps = floats(_picked(table["num_inference_steps"], rows), "num_inference_steps", source, _NUMBERS["steps"], rows)
    order = np.argsort(time_s, kind="stable")
    unfinished = ~failed & ~succeeded & ~empty
    notes = (
        f"GenTD26 request trace: {len(rows):,} of {len(status):,} rows kept; left out: "
        f"{np.count_nonzero(failed):,} failed ({np.mean(failed):.2%}), {np.count_nonzero(unfinished):,} unfinished, "
        f"{np.count_nonzero(empty & ~failed):,} with an empty cell",
    )
    columns: dict[str, npt.NDArray[Any]] = {
        "time_s": time_s[order],
        "device": table["groupId"][rows][order],
        "model": table["checkpoint_model_version_id"][rows][order],
        "images": images[order],
        "steps": steps[order],
    }
    return RawTrace(columns, source, ATTRIBUTION_GENAI, notes)


def import_azure_llm(path: Path | str, source: str | None = None) -> RawTrace:
    """An Azure LLM inference trace (`AzureLLMInferenceTrace_{code,conv}.csv`): when requests came.

    The token counts are kept as `context_tokens` and `generated_tokens`; they have no part in image generation and
    no effect on a simulation. Licence CC-BY 4.0; cite Patel et al., Splitwise, ISCA 2024.

    Args:
        path: the file.
        source: what to call it in errors and notes; the path by default.

    Raises:
        InputError: not readable, a missing column, or a value that is not allowed.
    """
    path, source = _named(path, source, _AZURE)
    table = read_columns(path, _AZURE, source)
    time_s = seconds(table["TIMESTAMP"], "TIMESTAMP", source)
    columns = _with_tokens(time_s, table, "ContextTokens", "GeneratedTokens", source)
    return RawTrace(columns, source, ATTRIBUTION_AZURE, (f"Azure LLM inference trace: {len(time_s):,} rows",))


def import_vidur(path: Path | str, source: str | None = None) -> RawTrace:
    """A request trace of the simulator Vidur (GitHub microsoft/vidur, `data/processed_traces`): when requests came.

    Time from `arrived_at` in seconds. The token counts `num_prefill_tokens` and `num_decode_tokens` are kept as
    `context_tokens` and `generated_tokens` and have no effect. Whom to cite is not in the file.

    Args:
        path: the file.
        source: what to call it in errors and notes; the path by default.

    Raises:
        InputError: not readable, a missing column, or a value that is not allowed.
    """
    path, source = _named(path, source, _VIDUR)
    table = read_columns(path, _VIDUR, source)
    time_s = floats(table["arrived_at"], "arrived_at", source, _NUMBERS["time_s"])
    columns = _with_tokens(time_s, table, "num_prefill_tokens", "num_decode_tokens", source)
    return RawTrace(columns, source, "", (f"Vidur request trace: {len(time_s):,} rows",))


def import_llmservingsim(path: Path | str, source: str | None = None) -> RawTrace:
    """A request file of the simulator LLMServingSim (GitHub casys-kaist/LLMServingSim): when requests came.

    Time from `arrival_time_ns` in nanoseconds. `input_toks` and `output_toks` are kept as `context_tokens` and
    `generated_tokens` and have no effect. Files of sessions with sub-requests are not read.

    Args:
        path: `.tsv`, `.csv`, `.jsonl` or `.parquet`.
        source: what to call it in errors and notes; the path by default.

    Raises:
        InputError: not readable, a missing column, or a value that is not allowed.
    """
    path, source = _named(path, source, _LLMSERVINGSIM)
    table = read_columns(path, _LLMSERVINGSIM, source)
    nanoseconds = floats(table["arrival_time_ns"], "arrival_time_ns", source, Rule(0, 4e18))
    columns = _with_tokens(nanoseconds / 1e9, table, "input_toks", "output_toks", source)
    return RawTrace(columns, source, "", (f"LLMServingSim requests: {len(nanoseconds):,} rows",))


def import_places(path: Path | str, source: str | None = None) -> npt.NDArray[np.float64]:
    """Latitude and longitude of the sites or users of a file in the style of the EUA data set, degrees, [places, 2].

    Columns `LATITUDE` and `LONGITUDE` in any case; others are left out. Source of the data set: GitHub
    swinedge/eua-dataset; cite Lai et al., ICSOC 2018.

    Args:
        path: the file.
        source: what to call it in errors; the path by default.

    Raises:
        InputError: not readable, a missing column, no or too many rows, or a value that is no latitude or longitude.
    """
    source, path = str(path) if source is None else source, Path(path)
    found = {name.lower(): name for name in file_columns(path, source)}
    for name in _PLACES:
        if name not in found:
            raise InputError(
                f"{source}: no column {name!r} (found: {listing(list(found))}); places need {' and '.join(_PLACES)}, "
                "in degrees"
            )
    names = [found[name] for name in _PLACES]
    table = read_columns(path, names, source)
    rows = len(table[names[0]])
    if not 1 <= rows <= MAX_PLACES:
        raise InputError(f"{source}: {rows:,} rows; it must have between 1 and {MAX_PLACES:,} places")
    bounds = (Rule(-90, 90), Rule(-180, 180))
    degrees = [floats(table[name], name, source, rule) for name, rule in zip(names, bounds, strict=True)]
    return np.stack(degrees, axis=1)


def _with_tokens(
    time_s: npt.NDArray[np.float64], table: dict[str, Column], context: str, generated: str, source: str
) -> dict[str, npt.NDArray[Any]]:
    """Times in order with the token counts of requests to language models, which come along without effect."""
    order = np.argsort(time_s, kind="stable")
    return {
        "time_s": time_s[order],
        "context_tokens": floats(table[context], context, source, _TOKENS)[order].astype(np.int64),
        "generated_tokens": floats(table[generated], generated, source, _TOKENS)[order].astype(np.int64),
    }


def _named(path: Path | str, source: str | None, needed: Sequence[str]) -> tuple[Path, str]:
    source = str(path) if source is None else source
    path = Path(path)
    found = file_columns(path, source)
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(
            f"{source}: no column {missing[0]!r} (found: {listing(found)}); this importer needs {', '.join(needed)}"
        )
    return path, source


def _attribution(path: Path) -> str:
    """What :func:`gmel.scenario.trace.write_trace` stored beside the columns of a Parquet file."""
    if not path.name.lower().endswith(".parquet"):
        return ""
    with pa_parquet.ParquetFile(path) as file:
        stored = (file.schema_arrow.metadata or {}).get(b"attribution", b"")
    return printable(stored.decode("utf-8", errors="replace"), 500)


def _check_times(times: npt.NDArray[np.float64], source: str) -> None:
    falls = np.flatnonzero(np.diff(times) < 0)
    if len(falls):
        row = int(falls[0]) + 1
        raise InputError(
            f"{source}: column 'time_s', data row {row + 1}: {times[row]:.12g} comes after {times[row - 1]:.12g}; "
            "times must not fall, sort the file by time_s"
        )
    span = float(times[-1] - times[0])
    if span > MAX_SPAN_S:
        raise InputError(
            f"{source}: column 'time_s' spans {span:.6g} s, at most {MAX_SPAN_S:.6g} s (ten years) are allowed; "
            "give time_s in seconds, or a part of the trace"
        )


def _checked(values: npt.NDArray[Any], name: str, source: str) -> npt.NDArray[Any]:
    """A column of a :class:`RawTrace` in the type that its name asks for."""
    if name in _NUMBERS:
        rule = _NUMBERS[name]
        if values.dtype.kind not in "iuf":
            raise InputError(f"{source}: column {name!r} holds {values.dtype}; it must be {rule}")
        checked = values.astype(np.float64)
        check_range(checked, name, source, rule, None)
        return checked.astype(np.int64) if rule.whole else checked
    if name in _LABELS:
        if values.dtype.kind in "iu":
            check_range(values.astype(np.float64), name, source, _INDEX, None)
            return values.astype(np.int64)
        filled = np.asarray([str(value) for value in values.tolist()], dtype=object)
        check_filled(filled, name, source)
        return filled
    return values


def _picked(cells: npt.NDArray[Any], rows: Rows) -> Column:
    return pa.chunked_array([pa.array(cells[rows].tolist(), type=pa.string())])


def _no_time(found: Sequence[str], source: str) -> str:
    near = difflib.get_close_matches("time_s", found, n=1, cutoff=0.4)
    hint = f"did you mean {printable(near[0])!r}? Rename it" if near else "add it"
    return f"{source}: no column 'time_s' (found: {listing(found)}); {hint}: seconds, in rising order"
