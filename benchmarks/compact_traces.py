"""Packs the Azure LLM inference traces into the Parquet files that come with the package.

    python -m benchmarks.compact_traces FOLDER

FOLDER holds `AzureLLMInferenceTrace_code.csv` and `AzureLLMInferenceTrace_conv.csv` (CC-BY 4.0, see
`src/gmel/scenario/traces/README.md`). Times become whole milliseconds after the first request, token counts 16-bit
numbers; rows and order stay as they are.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmel.scenario.errors import InputError
from gmel.scenario.importers import import_azure_llm

TARGET = Path(__file__).parents[1] / "src" / "gmel" / "scenario" / "traces"
FILES = {
    "AzureLLMInferenceTrace_code.csv": "azure-llm-2023-code.parquet",
    "AzureLLMInferenceTrace_conv.csv": "azure-llm-2023-conversation.parquet",
}


def compact(source: Path, target: Path) -> int:
    """Packs one CSV into one Parquet file; returns the number of requests.

    Raises:
        InputError: the source is no Azure LLM trace, or a token count does not fit 16 bits.
    """
    raw = import_azure_llm(source, source.name)
    columns = {"time_ms": pa.array(np.rint(raw.columns["time_s"] * 1e3).astype(np.int32))}
    for name in ("context_tokens", "generated_tokens"):
        tokens = raw.columns[name]
        if tokens.max() > np.iinfo(np.uint16).max:
            raise InputError(f"{source.name}: {name} up to {tokens.max()}, at most 65535 can be kept")
        columns[name] = pa.array(tokens.astype(np.uint16))
    table = pa.table(columns).replace_schema_metadata({"attribution": raw.attribution})
    part = target.with_name(f".{target.name}.part")
    # Times rise by little: their differences pack better than they do.
    pq.write_table(
        table,
        part,
        compression="zstd",
        compression_level=19,
        use_dictionary=["context_tokens", "generated_tokens"],
        column_encoding={"time_ms": "DELTA_BINARY_PACKED"},
    )
    part.replace(target)
    return len(raw)


def main() -> int:
    """Packs both traces and prints what came of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compact_traces", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the two CSV files")
    folder: Path = parser.parse_args().folder
    try:
        for source, target in FILES.items():
            rows = compact(folder / source, TARGET / target)
            print(f"{target}: {rows:,} requests, {(TARGET / target).stat().st_size:,} bytes")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
