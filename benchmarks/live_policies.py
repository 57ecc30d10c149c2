"""Policies that decide live, on the same real requests at the same time: a trained one beside those of load balancers.

    gmel run live --trace azure-conversation-2023 --load 0.7 --seed 0 --out runs/live-0
    gmel export runs/live-0 --out policies/amarl-0
    ... as many training seeds as you like
    python -m benchmarks.live_policies --policies policies --trained amarl-0 amarl-1 amarl-2

Windows of the held-out part of a trace (what `gmel run` does not train on) are replayed in real time. In each window
every policy has a plant of its own: a gateway and three unlike servers as processes on this machine, which take the
time of a task and make nothing. The plants of a window run at once, so that what disturbs the machine disturbs them
all alike; differences are paired by window, to the mean of the trained policies there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gmel.evaluation.statistics import Interval, paired_t_interval, t_interval
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.filling import fill_trace
from gmel.scenario.load import load_scenario, to_toml, with_load
from gmel.scenario.schema import Scenario
from gmel.scenario.trace import Trace, read_trace, split_trace, write_trace

RULES = ("earliest-finish", "least-connections", "power-of-two", "round-robin")
FIGURES = {"mean_s": "mean latency, s", "p95_s": "P95, s", "missed": "deadlines missed, %"}


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        scenario: the plant, with the load that the whole trace is stretched to.
        policies: folder of exported policies.
        trained: names of the policies in that folder, of several training seeds.
        windows: how many.
        seconds: of each.
    """

    scenario: Scenario
    policies: Path
    trained: tuple[str, ...]
    windows: int
    seconds: float

    @property
    def names(self) -> tuple[str, ...]:
        """All that are compared."""
        return (*self.trained, *RULES)


def windows_of(trace: Trace, count: int, seconds: float) -> list[Trace]:
    """`count` parts of `seconds` each, evenly spread over a trace, none over another.

    Raises:
        InputError: the trace is shorter.
    """
    length = float(trace.time_s[-1])
    if count * seconds > length:
        raise InputError(f"{count} windows of {seconds:g} s: the held-out part of the trace lasts {length:.0f} s")
    found: list[Trace] = []
    for start in np.linspace(0.0, length - seconds, count):
        rows = (trace.time_s >= start) & (trace.time_s < start + seconds)
        columns = ("device", "model", "images", "steps", "bits_in", "bits_out", "deadline_s", "work")
        found.append(
            replace(trace, time_s=trace.time_s[rows] - start, **{name: getattr(trace, name)[rows] for name in columns})
        )
    return found


def run_one(plant: Path, trace: Path, policy: str, plan: Plan, seed: int, out: Path) -> dict[str, float]:
    """A window under a policy: figures of its tasks."""
    words = ["live", str(plant), "--trace", str(trace), "--seconds", str(plan.seconds), "--sleep", "--port", "0"]
    words += ["--policy", policy, "--policies", str(plan.policies), "--seed", str(seed), "--out", str(out), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "gmel.cli.main", *words], capture_output=True, text=True, check=False, timeout=3600
    )
    if done.returncode:
        raise RuntimeError(f"{policy}: {done.stderr.strip().splitlines()[-1]}")
    summary: dict[str, Any] = json.loads(done.stdout)
    if summary["lost"] or summary["policy"] != policy:
        raise RuntimeError(f"{policy}: {summary['lost']} tasks lost, decided by {summary['policy']}")
    return {
        "tasks": summary["tasks"],
        "mean_s": summary["mean_s"],
        "p95_s": summary["p95_s"],
        "missed": 100 * (1 - summary["in_time"]),
    }


def compare(plan: Plan, trace: str, note: Any) -> dict[str, list[dict[str, float]]]:
    """Figures of each policy, one entry a window."""
    whole = fill_trace(read_trace(trace), plan.scenario)
    _, held_out = split_trace(whole, plan.scenario.arrivals.train_share)
    # Each window keeps its own time, bursts and all: without a load nothing is stretched again.
    arrivals = plan.scenario.arrivals.model_copy(update={"kind": "trace", "trace": trace, "load": None})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in plan.names}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(plan.names)) as pool:
        plant = Path(folder) / "plant.toml"
        plant.write_text(to_toml(plan.scenario.model_copy(update={"arrivals": arrivals})), encoding="utf-8")
        for number, window in enumerate(windows_of(held_out, plan.windows, plan.seconds)):
            file = Path(folder) / f"window-{number}.parquet"
            write_trace(window, file)
            runs = {
                name: pool.submit(run_one, plant, file, name, plan, number, Path(folder) / f"{number}-{name}")
                for name in plan.names
            }
            for name, run in runs.items():
                found[name].append(run.result())
            means = ", ".join(f"{name} {found[name][-1]['mean_s']:.3f}" for name in plan.names)
            note(f"window {number + 1} of {plan.windows}, {len(window)} requests, mean latency s: {means}")
    return found


def table_of(found: dict[str, list[dict[str, float]]], trained: tuple[str, ...]) -> Table:
    """Means over windows with 95 % intervals; and differences to the trained policies, paired by window."""
    several = f"mean of {len(trained)} trained" if len(trained) > 1 else trained[0]
    mean = [
        {figure: float(np.mean([row[figure] for row in rows])) for figure in FIGURES}
        for rows in zip(*(found[name] for name in trained), strict=True)
    ]
    table = Table("policy", *FIGURES.values(), f"mean latency - {several}, s", f"missed - {several}, points")
    for name, rows in {several: mean, **found}.items():
        cells: list[str] = []
        for figure in FIGURES:
            interval = t_interval([row[figure] for row in rows])
            cells.append(f"{interval.mean:.3f} +- {_half(interval):.3f}")
        for figure in ("mean_s", "missed"):
            if name == several:
                cells.append("")
                continue
            pair = paired_t_interval([row[figure] for row in rows], [row[figure] for row in mean])
            cells.append(f"{pair.mean:+.3f} +- {_half(pair):.3f}")
        table.add_row(name, *cells)
    return table


def _half(interval: Interval) -> float:
    return 0.5 * (interval.high - interval.low)


def main() -> int:
    """Runs the comparison, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.live_policies", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--policies", type=Path, required=True, help="folder of exported policies")
    parser.add_argument("--trained", nargs="+", default=["amarl"], help="those of it that are compared")
    parser.add_argument("--scenario", default="live")
    parser.add_argument("--trace", default="azure-conversation-2023")
    parser.add_argument("--load", type=float, default=0.7, help="of the whole trace")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/live_policies.json"))
    options = parser.parse_args()
    scenario = with_load(load_scenario(options.scenario), options.load)
    plan = Plan(scenario, options.policies, tuple(options.trained), options.windows, options.seconds)
    console = Console(width=140)
    found = compare(plan, options.trace, lambda text: console.print(text, style="dim"))
    console.print(table_of(found, plan.trained))
    said = {"windows": found, "trace": options.trace, "load": options.load, "seconds": options.seconds}
    said |= {"when": datetime.now().astimezone().isoformat(timespec="seconds"), "cores": os.cpu_count()}
    said |= {"load_average": os.getloadavg()[0]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(options.out, (json.dumps(said, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
