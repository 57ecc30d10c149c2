"""Records of live tasks as a table, with the columns of `gmel.simulator.records` where they mean the same."""

# Arrow ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file

__all__ = ["COLUMNS", "read_records", "write_records"]

COLUMNS: dict[str, Any] = {
    "id": pa.string(),
    "device": pa.string(),
    "server": pa.string(),
    "model": pa.string(),
    "images": pa.int64(),
    "steps": pa.int64(),
    "size_bit": pa.float64(),
    "generated_s": pa.float64(),
    "decided_s": pa.float64(),
    "upload_start_s": pa.float64(),
    "upload_end_s": pa.float64(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "wait_to_slot_s": pa.float64(),
    "upload_s": pa.float64(),
    "queue_s": pa.float64(),
    "switch_s": pa.float64(),
    "service_s": pa.float64(),
    "download_s": pa.float64(),
    "latency_s": pa.float64(),
    "deadline_s": pa.float64(),
    "attempt": pa.int64(),
    "policy": pa.string(),
    "version": pa.int64(),
    "expected_s": pa.float64(),
    "status": pa.string(),
    "together": pa.int64(),
}
"""Name and type of each column. The parts from `wait_to_slot_s` to `download_s` add up to `latency_s`: in the gateway
until it is sent, on the way, in the queue of the server, loading its model, in service, on the way back. `together` are
the photos that `service_s` has made: more than `images` where tasks were drawn together, each with the service of all.
"""

_MOST_ROWS = 10_000_000


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes records as Parquet, under a temporary name first."""
    columns = {name: pa.array([record.get(name) for record in records], kind) for name, kind in COLUMNS.items()}
    stream = io.BytesIO()
    pa_parquet.write_table(pa.table(columns), stream)
    replace_file(path, stream.getvalue())


def read_records(path: Path) -> dict[str, Any]:
    """Columns of a file of records as NumPy arrays.

    Raises:
        InputError: not readable, or without a column.
    """
    try:
        with pa_parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise InputError(f"{path}: more than {_MOST_ROWS:,} rows; give a part of it")
            missing = sorted(set(COLUMNS) - {"together"} - set(file.schema_arrow.names))
            if missing:
                raise InputError(f"{path}: has no column {missing[0]!r}; give a file that `gmel live` has written")
            there = [name for name in COLUMNS if name in file.schema_arrow.names]
            table = file.read(columns=there)
            if "together" not in there:  # records of before anything was drawn together
                table = table.append_column("together", table.column("images"))
            table = table.select(list(COLUMNS)).cast(pa.schema(list(COLUMNS.items())))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as records ({error}); give a file of `gmel live`") from error
    return {name: table.column(name).to_numpy() for name in COLUMNS}
