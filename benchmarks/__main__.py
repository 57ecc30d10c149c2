"""Measures the simulator and the learner; prints one table with ratios side by side and writes them as JSON.

    python -m benchmarks [--quick] [--only NAME,...] [--out FILE]

Every section runs in a process of its own, so that its memory is its own and its compilation is cold. Wall time is the
median of several repeats; decisions per second of processor time stand beside it, because on a shared machine the clock
measures the neighbours too.
"""

import argparse
import json
import os
import platform
import sys
import time
from datetime import datetime
from pathlib import Path

from rich.console import Console

from benchmarks.sections import SCENARIO, SECTIONS, Row, child, run_section
from benchmarks.tables import aims, aims_table, cores, large_table, other_table, speed_table


def write(results: dict[str, list[Row]], found: list[Row], quick: bool, load: tuple[float, float], out: Path) -> None:
    """Writes the results with what is needed to read them; a reader never sees half a file."""
    # Not at the top: a section in a process of its own must not find them in its memory.
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    content = {
        "schema": 2,
        "scenario": SCENARIO,
        "quick": quick,
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cores": cores(),
        "load_average": {"before": load[0], "after": load[1]},
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "aims": found,
        "sections": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(out)


def main() -> int:
    """Runs the chosen sections."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats, no `compile`: about a minute")
    parser.add_argument("--only", metavar="NAME,...", help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file (default: runs/benchmarks/<time>.json)")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        print(json.dumps(run_section(options.section, options.quick)))
        return 0
    # Compiling twice is most of the time; the training section tells the cold seconds anyway.
    names = (
        options.only.split(",")
        if options.only
        else [name for name in SECTIONS if not options.quick or name != "compile"]
    )
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    progress = Console(stderr=True)
    before = os.getloadavg()[0]
    results: dict[str, list[Row]] = {}
    for name in names:
        began = time.monotonic()
        try:
            results[name] = child(name, options.quick)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        progress.print(f"{name}: {time.monotonic() - began:.0f} s", style="dim")
    after = os.getloadavg()[0]
    # Outside a terminal nothing may be cut off: the table is as wide as it is.
    console = Console() if sys.stdout.isatty() else Console(width=130)
    found = aims(results)
    for table in (speed_table(results), large_table(results), other_table(results), aims_table(found)):
        if table is not None:
            console.print(table)
    console.print(
        f"load average {before:.1f} before, {after:.1f} after; above the number of cores, wall times are late"
    )
    out: Path = options.out or Path("runs") / "benchmarks" / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
    write(results, found, options.quick, (before, after), out)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
