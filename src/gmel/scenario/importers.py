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
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pa_compute
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from gmel.scenario.errors import InputError

__all__ = [
    "ATTRIBUTION_AZURE",
    "ATTRIBUTION_GENAI",
    "COLUMNS",
    "MAX_PLACES",
    "MAX_REQUESTS",
    "MAX_SPAN_S",
    "RawTrace",
    "detect",
    "file_columns",
    "import_azure_llm",
    "import_genai",
    "import_llmservingsim",
    "import_places",
    "import_table",
    "import_vidur",
    "is_file",
    "printable",
]

MAX_REQUESTS = 10_000_000
"""Most requests of a trace."""
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


class _Rule(NamedTuple):
    """What a numeric column may hold: whole numbers or not, above `low` (`open`) or from it, up to `high`."""

    low: float
    high: float
    open: bool = False
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'>' if self.open else '>='} {self.low:g} and <= {self.high:g}"


_NUMBERS = {
    "time_s": _Rule(0, 1e12),
    "images": _Rule(1, 1e6, whole=True),
    "steps": _Rule(1, 1e6, whole=True),
    "bits_in": _Rule(0, 1e12),
    "bits_out": _Rule(0, 1e12),
    "deadline_s": _Rule(0, 1e12, open=True),
    "group": _Rule(0, 1e6, whole=True),
    "work": _Rule(0, 1e12, open=True),
}
_LABELS = ("device", "model")
_INDEX = _Rule(0, float(2**53), whole=True)

COLUMNS = ("time_s", "device", "model", "images", "steps", "bits_in", "bits_out", "deadline_s", "group", "work")
"""Columns that a trace may have; `time_s` is required. See :mod:`gmel.scenario.trace`."""

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".jsonl", ".parquet")
_MAX_LINE = 16 * 2**20
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
_TOKENS = _Rule(0, float(2**31 - 1), whole=True)

_PARSE = pa_csv.ParseOptions(newlines_in_values=True)
_PARSE_TABS = pa_csv.ParseOptions(newlines_in_values=True, delimiter="\t")

_Column: TypeAlias = Any  # pyarrow.ChunkedArray
_Rows = npt.NDArray[np.int64]


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
        _check_length(len(times), self.source)
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


def is_file(path: Path) -> bool:
    """Whether there is a file; False as well for names that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def printable(text: str, length: int = 40) -> str:
    """Text from a file as it may be shown: on one line, without control characters, cut to `length`."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= length else clean[: length - 3] + "..."


def file_columns(path: Path, source: str) -> list[str]:
    """Names of the columns of a CSV or Parquet file, without spaces around them.

    Args:
        path: `.csv`, `.csv.gz` or `.parquet`.
        source: what to call the file in errors.

    Raises:
        InputError: no such file, another suffix, not readable, or a name that occurs twice.
    """
    if not is_file(path):
        raise InputError(f"{source}: no such file; give a {', '.join(_SUFFIXES)} file")
    if not path.name.lower().endswith(_SUFFIXES):
        raise InputError(f"{source}: suffix {path.suffix!r} is not known; give a {', '.join(_SUFFIXES)} file")
    names = [str(name).strip() for name in _raw_names(path, source)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{source}: column {printable(twice[0])!r} occurs twice; keep one of them")
    if len(names) == 1 and any(other in names[0] for other in ";\t|"):
        raise InputError(f"{source}: one column {printable(names[0])!r}; separate the cells by commas")
    return names


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
    table = _read(path, known, source)
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in known:
        columns[name] = _labels(table[name], name, source) if name in _LABELS else _floats(table[name], name, source)
    notes = (f"columns not used: {_listing(others)}",) if others else ()
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
    table = {name: _texts(column, name, source) for name, column in _read(path, _GENAI, source).items()}
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
    seconds = _seconds(_picked(table["gmt_create"], rows), "gmt_create", source, rows)
    images = _floats(
        _picked(table["num_images_per_prompt"], rows), "num_images_per_prompt", source, rows, _NUMBERS["images"]
    )
    steps = _floats(_picked(table["num_inference_steps"], rows), "num_inference_steps", source, rows, _NUMBERS["steps"])
    order = np.argsort(seconds, kind="stable")
    unfinished = ~failed & ~succeeded & ~empty
    notes = (
        f"GenTD26 request trace: {len(rows):,} of {len(status):,} rows kept; left out: "
        f"{np.count_nonzero(failed):,} failed ({np.mean(failed):.2%}), {np.count_nonzero(unfinished):,} unfinished, "
        f"{np.count_nonzero(empty & ~failed):,} with an empty cell",
    )
    columns: dict[str, npt.NDArray[Any]] = {
        "time_s": seconds[order],
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
    table = _read(path, _AZURE, source)
    seconds = _seconds(table["TIMESTAMP"], "TIMESTAMP", source)
    columns = _with_tokens(seconds, table, "ContextTokens", "GeneratedTokens", source)
    return RawTrace(columns, source, ATTRIBUTION_AZURE, (f"Azure LLM inference trace: {len(seconds):,} rows",))


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
    table = _read(path, _VIDUR, source)
    seconds = _floats(table["arrived_at"], "arrived_at", source, None, _NUMBERS["time_s"])
    columns = _with_tokens(seconds, table, "num_prefill_tokens", "num_decode_tokens", source)
    return RawTrace(columns, source, "", (f"Vidur request trace: {len(seconds):,} rows",))


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
    table = _read(path, _LLMSERVINGSIM, source)
    nanoseconds = _floats(table["arrival_time_ns"], "arrival_time_ns", source, None, _Rule(0, 4e18))
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
                f"{source}: no column {name!r} (found: {_listing(list(found))}); places need {' and '.join(_PLACES)}, "
                "in degrees"
            )
    names = [found[name] for name in _PLACES]
    table = _read(path, names, source)
    rows = len(table[names[0]])
    if not 1 <= rows <= MAX_PLACES:
        raise InputError(f"{source}: {rows:,} rows; it must have between 1 and {MAX_PLACES:,} places")
    bounds = (_Rule(-90, 90), _Rule(-180, 180))
    degrees = [_floats(table[name], name, source, None, rule) for name, rule in zip(names, bounds, strict=True)]
    return np.stack(degrees, axis=1)


def _with_tokens(
    seconds: npt.NDArray[np.float64], table: dict[str, _Column], context: str, generated: str, source: str
) -> dict[str, npt.NDArray[Any]]:
    """Times in order with the token counts of requests to language models, which come along without effect."""
    order = np.argsort(seconds, kind="stable")
    return {
        "time_s": seconds[order],
        "context_tokens": _floats(table[context], context, source, None, _TOKENS)[order].astype(np.int64),
        "generated_tokens": _floats(table[generated], generated, source, None, _TOKENS)[order].astype(np.int64),
    }


def _named(path: Path | str, source: str | None, needed: Sequence[str]) -> tuple[Path, str]:
    source = str(path) if source is None else source
    path = Path(path)
    found = file_columns(path, source)
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(
            f"{source}: no column {missing[0]!r} (found: {_listing(found)}); this importer needs {', '.join(needed)}"
        )
    return path, source


def _raw_names(path: Path, source: str) -> list[str]:
    try:
        if path.name.lower().endswith(".parquet"):
            with pa_parquet.ParquetFile(path) as file:
                return list(file.schema_arrow.names)
        if path.name.lower().endswith(".jsonl"):
            return list(next(_json_lines(path, source), {}))
        with _open_csv(path) as stream, pa_csv.open_csv(stream, parse_options=_parsing(path)) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(_unreadable(source, error)) from error


def _read(path: Path, names: Sequence[str], source: str) -> dict[str, _Column]:
    """The named columns: as text from CSV, so that "007" stays a label; with their own types from Parquet."""
    raw = {name.strip(): name for name in _raw_names(path, source)}
    wanted = [raw[name] for name in names]
    try:
        if path.name.lower().endswith(".parquet"):
            with pa_parquet.ParquetFile(path) as file:
                _check_length(file.metadata.num_rows, source)
                table = file.read(columns=wanted)
        elif path.name.lower().endswith(".jsonl"):
            table = _read_jsonl(path, wanted, source)
        else:
            table = _read_csv(path, wanted, source)
    except (pa.ArrowException, OSError) as error:
        raise InputError(_unreadable(source, error)) from error
    return {name: table.column(raw[name]) for name in names}


def _open_csv(path: Path) -> Any:
    return pa.input_stream(str(path), compression="gzip" if path.name.lower().endswith(".gz") else None)


def _read_csv(path: Path, names: Sequence[str], source: str) -> Any:
    options = pa_csv.ConvertOptions(
        column_types={name: pa.string() for name in names}, include_columns=list(names), strings_can_be_null=False
    )
    batches: list[Any] = []
    rows = 0
    # In blocks, so that a small compressed file that unpacks without end is stopped.
    with (
        _open_csv(path) as stream,
        pa_csv.open_csv(stream, parse_options=_parsing(path), convert_options=options) as reader,
    ):
        schema = reader.schema
        for batch in reader:
            rows += batch.num_rows
            _check_length(rows, source)
            batches.append(batch)
    return pa.Table.from_batches(batches, schema=schema)


def _parsing(path: Path) -> Any:
    return _PARSE_TABS if path.name.lower().endswith(".tsv") else _PARSE


def _json_lines(path: Path, source: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, one after the other, empty lines left out."""
    with path.open("rb") as file:
        row = 0
        while line := file.readline(_MAX_LINE + 1):
            if len(line) > _MAX_LINE:
                raise InputError(f"{source}: data row {row + 1} is longer than {_MAX_LINE:,} bytes; split it")
            if not line.strip():
                continue
            row += 1
            _check_length(row, source)
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}: data row {row}: not JSON ({error}); write one object per line") from error
            if not isinstance(content, dict):
                raise InputError(f"{source}: data row {row}: holds no JSON object; write one object per line")
            yield cast("dict[str, Any]", content)


def _read_jsonl(path: Path, names: Sequence[str], source: str) -> Any:
    """The named fields of every line as text, checked later as the cells of a CSV file are."""
    columns: dict[str, list[str]] = {name: [] for name in names}
    for row, content in enumerate(_json_lines(path, source), start=1):
        for name in names:
            value = content.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise InputError(
                    f"{source}: field {name!r}, data row {row}: {printable(repr(value))} is not allowed; "
                    "it must be a number or text in every line"
                )
            columns[name].append(str(value))
    return pa.table({name: pa.array(values, type=pa.string()) for name, values in columns.items()})


def _attribution(path: Path) -> str:
    """What :func:`gmel.scenario.trace.write_trace` stored beside the columns of a Parquet file."""
    if not path.name.lower().endswith(".parquet"):
        return ""
    with pa_parquet.ParquetFile(path) as file:
        stored = (file.schema_arrow.metadata or {}).get(b"attribution", b"")
    return printable(stored.decode("utf-8", errors="replace"), 500)


def _check_length(rows: int, source: str) -> None:
    if rows > MAX_REQUESTS:
        raise InputError(f"{source}: more than {MAX_REQUESTS:,} rows; give a part of it")


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
        _check_range(checked, name, source, rule, None)
        return checked.astype(np.int64) if rule.whole else checked
    if name in _LABELS:
        if values.dtype.kind in "iu":
            _check_range(values.astype(np.float64), name, source, _INDEX, None)
            return values.astype(np.int64)
        texts = np.asarray([str(value) for value in values.tolist()], dtype=object)
        _check_filled(texts, name, source)
        return texts
    return values


def _check_range(values: npt.NDArray[np.float64], name: str, source: str, rule: _Rule, rows: _Rows | None) -> None:
    with np.errstate(invalid="ignore"):
        good = (values > rule.low if rule.open else values >= rule.low) & (values <= rule.high)
        if rule.whole:
            good &= values == np.floor(values)
    if not good.all():
        at = int(np.flatnonzero(~good)[0])
        raise InputError(
            f"{source}: column {name!r}, data row {_row(at, rows)}: {values[at]:.12g} is not allowed; "
            f"it must be {rule}: correct it or remove the row"
        )


def _check_filled(texts: npt.NDArray[Any], name: str, source: str) -> None:
    empty = np.flatnonzero(texts == "")
    if len(empty):
        raise InputError(
            f"{source}: column {name!r}, data row {int(empty[0]) + 1}: '' is empty; "
            "a label is needed in every row: fill it, or remove the column to have it drawn"
        )


def _floats(
    column: _Column, name: str, source: str, rows: _Rows | None = None, rule: _Rule | None = None
) -> npt.NDArray[np.float64]:
    """A column as numbers within `rule` (by default the one of its name); rows in errors are those of the file."""
    rule = rule or _NUMBERS[name]
    _check_no_null(column, name, source, rows)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(f"{source}: column {name!r} holds {kind}; it must be {rule}")
    values = _cast(_trimmed(column), pa.float64(), name, source, allowed=str(rule), rows=rows)
    numbers: npt.NDArray[np.float64] = values.to_numpy()
    _check_range(numbers, name, source, rule, rows)
    return numbers


def _seconds(column: _Column, name: str, source: str, rows: _Rows | None = None) -> npt.NDArray[np.float64]:
    """Points in time as seconds after the earliest of them (exact to 0.1 us), from ISO 8601 text or timestamps."""
    _check_no_null(column, name, source, rows)
    if pa.types.is_string(column.type):
        # Later issues of the Azure trace say "+00:00"; all times of one file are in one zone.
        texts = [text.removesuffix("+00:00").removesuffix("Z") for text in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, type=pa.string())])
    elif not pa.types.is_timestamp(column.type):
        raise InputError(f"{source}: column {name!r} holds {column.type}; it must be a date and time, ISO 8601")
    stamps = _cast(column, pa.timestamp("ns"), name, source, allowed="a date and time, ISO 8601", rows=rows)
    nanoseconds: npt.NDArray[np.int64] = stamps.cast(pa.int64()).to_numpy()
    if len(nanoseconds) == 0:
        return np.zeros(0, dtype=np.float64)
    return (nanoseconds - nanoseconds.min()).astype(np.float64) / 1e9


def _labels(column: _Column, name: str, source: str) -> npt.NDArray[Any]:
    """Whole numbers if every cell is one, else text."""
    _check_no_null(column, name, source, None)
    if pa.types.is_integer(column.type):
        numbers: npt.NDArray[Any] = column.to_numpy()
        return numbers
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InputError(f"{source}: column {name!r} holds {column.type}; it must be whole numbers or text")
    try:
        parsed: npt.NDArray[Any] = _trimmed(column).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return _texts(column, name, source)
    return parsed


def _texts(column: _Column, name: str, source: str) -> npt.NDArray[Any]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        try:
            column = column.cast(pa.string())
        except pa.ArrowException as error:
            raise InputError(f"{source}: column {name!r} holds {column.type}; it must be text") from error
    return np.asarray([(text or "").strip() for text in column.to_pylist()], dtype=object)


def _trimmed(column: _Column) -> _Column:
    """Text without spaces around it, which Arrow would not read as a number; other columns as they are."""
    return pa_compute.call_function("utf8_trim_whitespace", [column]) if pa.types.is_string(column.type) else column


def _picked(texts: npt.NDArray[Any], rows: _Rows) -> _Column:
    return pa.chunked_array([pa.array(texts[rows].tolist(), type=pa.string())])


def _check_no_null(column: _Column, name: str, source: str, rows: _Rows | None) -> None:
    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise InputError(
            f"{source}: column {name!r}, data row {_row(at, rows)}: the cell is empty; fill it, remove the row, "
            "or remove the column to have it drawn"
        )


def _cast(column: _Column, kind: Any, name: str, source: str, *, allowed: str, rows: _Rows | None) -> _Column:
    """The column in another type; a cell that cannot be converted is found by bisection and named."""
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        low, high = 0, len(column)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                column.slice(low, middle - low).cast(kind)
                low = middle
            except pa.ArrowInvalid:
                high = middle
        shown = printable(repr(column[low].as_py()))
        raise InputError(
            f"{source}: column {name!r}, data row {_row(low, rows)}: {shown} is not allowed; "
            f"it must be {allowed}: correct it or remove the row"
        ) from error


def _row(at: int, rows: _Rows | None) -> int:
    """Data row as a user counts it: from 1, the header not counted."""
    return (at if rows is None else int(rows[at])) + 1


def _no_time(found: Sequence[str], source: str) -> str:
    near = difflib.get_close_matches("time_s", found, n=1, cutoff=0.4)
    hint = f"did you mean {printable(near[0])!r}? Rename it" if near else "add it"
    return f"{source}: no column 'time_s' (found: {_listing(found)}); {hint}: seconds, in rising order"


def _listing(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names[:12]) + (
        f" and {len(names) - 12} more" if len(names) > 12 else ""
    )


def _unreadable(source: str, error: Exception) -> str:
    reason = printable(" ".join(str(error).split()), 160)
    return f"{source}: cannot be read ({reason}); give a valid {', '.join(_SUFFIXES)} file"
