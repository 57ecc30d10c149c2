"""The ladder on `hall-20x5` beside the reference figures, at loads 0.5, 0.7 and 0.9.

    python -m benchmarks.ladder [--loads 0.5,0.7,0.9] [--episodes 8] [--slots 5000] [--out FOLDER]

Prints a Markdown table. A policy agrees where its 95 % interval and that of the reference overlap. The reference comes
from an independent throw-away simulator on other random topologies, 8 seeds x 5,000 slots.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import jax

from gmel.evaluation.episodes import Episodes, run_episodes
from gmel.evaluation.job import EVALUATION_SEED
from gmel.evaluation.ladder import ladder
from gmel.evaluation.statistics import Interval, t_interval
from gmel.evaluation.tuning import shipped, tune
from gmel.scenario.files import replace_file
from gmel.scenario.load import digest, load_scenario
from gmel.simulator.environment import Environment


class Reference(NamedTuple):
    """Mean latency in seconds, half width of its interval (0: none was published), missed deadlines in %."""

    mean_s: float
    half_s: float
    missed: float


REFERENCE: dict[float, dict[str, Reference]] = {
    0.5: {
        "proportional": Reference(1.344, 0.015, 2.05),
        "greedy": Reference(1.531, 0.032, 2.52),
        "led2": Reference(1.168, 0.007, 0.35),
        "softmax": Reference(1.160, 0.008, 0.15),
        "softmax7": Reference(1.106, 0.008, 0.11),
        "coordinated": Reference(0.846, 0.0, 0.0),
        "eft": Reference(0.921, 0.004, 0.0),
        "nash": Reference(0.806, 0.005, 0.0),
        "optimum": Reference(0.782, 0.004, 0.0),
    },
    0.7: {
        "proportional": Reference(1.823, 0.031, 7.00),
        "greedy": Reference(2.395, 0.047, 15.1),
        "led2": Reference(1.522, 0.017, 2.25),
        "softmax": Reference(1.502, 0.011, 1.34),
        "softmax7": Reference(1.442, 0.010, 1.35),
        "coordinated": Reference(1.035, 0.0, 0.0),
        "eft": Reference(1.132, 0.005, 0.05),
        "nash": Reference(0.956, 0.005, 0.0),
        "optimum": Reference(0.916, 0.005, 0.0),
    },
    0.9: {
        "proportional": Reference(4.128, 0.163, 36.6),
        "greedy": Reference(4.067, 0.079, 41.0),
        "led2": Reference(2.408, 0.048, 13.6),
        "softmax": Reference(2.375, 0.042, 11.3),
        "softmax7": Reference(2.053, 0.017, 8.32),
        "coordinated": Reference(1.629, 0.0, 0.99),
        "eft": Reference(1.700, 0.034, 1.81),
        "nash": Reference(1.434, 0.029, 0.28),
        "optimum": Reference(1.371, 0.027, 0.23),
    },
}


class Row(NamedTuple):
    """One policy at one load, measured and published."""

    load: float
    label: str
    latency_s: Interval
    missed: float
    reference: Reference

    @property
    def agrees(self) -> bool:
        """Whether the intervals overlap."""
        low = self.reference.mean_s - self.reference.half_s
        high = self.reference.mean_s + self.reference.half_s
        return self.latency_s.low <= high and low <= self.latency_s.high


def measure(load: float, episodes: int, slots: int) -> list[Row]:
    """All rungs at one load."""
    scenario = load_scenario("hall-20x5", load)
    environment = Environment.from_scenario(scenario)
    tuned = shipped(digest(scenario)) or tune(environment)
    traffic = Episodes(episodes, slots, min(200, slots // 4), EVALUATION_SEED)
    rows: list[Row] = []
    for entry in ladder(tuned):
        measured = run_episodes(environment, entry.policy, traffic, jax.random.key(0))
        latency = t_interval(measured.per_episode(lambda records: float(records.latency_s.mean())))
        missed = 100 * (1 - measured.per_episode(lambda records: float(records.in_time.mean())).mean())
        rows.append(Row(load, entry.label, latency, float(missed), REFERENCE[load][entry.name]))
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    half = (row.latency_s.high - row.latency_s.low) / 2
    published = f"{row.reference.mean_s:.3f}" + (f" ± {row.reference.half_s:.3f}" if row.reference.half_s else "")
    verdict = "yes" if row.agrees else "no"
    return (
        f"| {row.load} | {row.label} | {row.latency_s.mean:.3f} ± {half:.3f} | {row.missed:.2f} | {published} "
        f"| {row.reference.missed:g} | {verdict} |"
    )


def main() -> None:
    """Prints the table and, with --out, writes it as Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loads", default="0.5,0.7,0.9")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--slots", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    head = "| load | policy | mean latency s | missed % | reference s | reference missed % | intervals overlap |"
    print(head + "\n|---|---|---|---|---|---|---|", flush=True)
    rows = [row for load in options.loads.split(",") for row in measure(float(load), options.episodes, options.slots)]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        table = "\n".join([head, "|---|---|---|---|---|---|---|", *map(_line, rows)]) + "\n"
        replace_file(options.out / "ladder-hall.md", table.encode())
        content = [{"load": r.load, "policy": r.label, "latency_s": r.latency_s.mean, "agrees": r.agrees} for r in rows]
        replace_file(options.out / "ladder-hall.json", (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
