"""Columns of files: CSV, tab-separated, JSON lines and Parquet, read as text or numbers and checked cell by cell.

Nothing in a file is ever executed or unpickled. Errors name the file, the column, the data row and the cell.
"""

# pyarrow ships incomplete types; the checks that fail on what is unknown of it are off in this file.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pa_compute
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from gmel.scenario.errors import InputError
from gmel.scenario.files import is_file

__all__ = [
    "MAX_REQUESTS",
    "Column",
    "Rows",
    "Rule",
    "check_filled",
    "check_length",
    "check_range",
    "file_columns",
    "floats",
    "labels",
    "listing",
    "printable",
    "read_columns",
    "seconds",
    "texts",
]

MAX_REQUESTS = 10_000_000
"""Most rows of a file: requests of a trace."""

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".jsonl", ".parquet")
_MAX_LINE = 16 * 2**20
_PARSE = pa_csv.ParseOptions(newlines_in_values=True)
_PARSE_TABS = pa_csv.ParseOptions(newlines_in_values=True, delimiter="\t")

Column: TypeAlias = Any  # pyarrow.ChunkedArray
Rows = npt.NDArray[np.int64]


class Rule(NamedTuple):
    """What a numeric column may hold: whole numbers or not, above `low` (`open`) or from it, up to `high`."""

    low: float
    high: float
    open: bool = False
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'>' if self.open else '>='} {self.low:g} and <= {self.high:g}"


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


def read_columns(path: Path, names: Sequence[str], source: str) -> dict[str, Column]:
    """The named columns: as text from CSV, so that "007" stays a label; with their own types from Parquet."""
    raw = {name.strip(): name for name in _raw_names(path, source)}
    wanted = [raw[name] for name in names]
    try:
        if path.name.lower().endswith(".parquet"):
            with pa_parquet.ParquetFile(path) as file:
                check_length(file.metadata.num_rows, source)
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
            check_length(rows, source)
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
            check_length(row, source)
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


def check_length(rows: int, source: str) -> None:
    if rows > MAX_REQUESTS:
        raise InputError(f"{source}: more than {MAX_REQUESTS:,} rows; give a part of it")


def check_range(values: npt.NDArray[np.float64], name: str, source: str, rule: Rule, rows: Rows | None) -> None:
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


def check_filled(texts: npt.NDArray[Any], name: str, source: str) -> None:
    empty = np.flatnonzero(texts == "")
    if len(empty):
        raise InputError(
            f"{source}: column {name!r}, data row {int(empty[0]) + 1}: '' is empty; "
            "a label is needed in every row: fill it, or remove the column to have it drawn"
        )


def floats(column: Column, name: str, source: str, rule: Rule, rows: Rows | None = None) -> npt.NDArray[np.float64]:
    """A column as numbers within `rule`; `rows`: which rows of the file these are, for errors."""
    _check_no_null(column, name, source, rows)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(f"{source}: column {name!r} holds {kind}; it must be {rule}")
    values = _cast(_trimmed(column), pa.float64(), name, source, allowed=str(rule), rows=rows)
    numbers: npt.NDArray[np.float64] = values.to_numpy()
    check_range(numbers, name, source, rule, rows)
    return numbers


def seconds(column: Column, name: str, source: str, rows: Rows | None = None) -> npt.NDArray[np.float64]:
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


def labels(column: Column, name: str, source: str) -> npt.NDArray[Any]:
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
        return texts(column, name, source)
    return parsed


def texts(column: Column, name: str, source: str) -> npt.NDArray[Any]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        try:
            column = column.cast(pa.string())
        except pa.ArrowException as error:
            raise InputError(f"{source}: column {name!r} holds {column.type}; it must be text") from error
    return np.asarray([(text or "").strip() for text in column.to_pylist()], dtype=object)


def _trimmed(column: Column) -> Column:
    """Text without spaces around it, which Arrow would not read as a number; other columns as they are."""
    return pa_compute.call_function("utf8_trim_whitespace", [column]) if pa.types.is_string(column.type) else column


def _check_no_null(column: Column, name: str, source: str, rows: Rows | None) -> None:
    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise InputError(
            f"{source}: column {name!r}, data row {_row(at, rows)}: the cell is empty; fill it, remove the row, "
            "or remove the column to have it drawn"
        )


def _cast(column: Column, kind: Any, name: str, source: str, *, allowed: str, rows: Rows | None) -> Column:
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


def _row(at: int, rows: Rows | None) -> int:
    """Data row as a user counts it: from 1, the header not counted."""
    return (at if rows is None else int(rows[at])) + 1


def listing(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names[:12]) + (
        f" and {len(names) - 12} more" if len(names) > 12 else ""
    )


def _unreadable(source: str, error: Exception) -> str:
    reason = printable(" ".join(str(error).split()), 160)
    return f"{source}: cannot be read ({reason}); give a valid {', '.join(_SUFFIXES)} file"
