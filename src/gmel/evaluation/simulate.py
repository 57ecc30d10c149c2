"""One policy on one plant: figures with intervals, one record per task, and the episode that a picture shows.

The traffic is that of `gmel run`, so that figures can be laid side by side.
"""

# Arrow ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from gmel.evaluation.episodes import DRAIN_SLOTS, AnyPolicy, Episodes, Measured, run_episodes
from gmel.evaluation.evaluate import PARTS, decomposition_of, metrics_of
from gmel.evaluation.job import EVALUATION_SEED, VALIDATION_SEED, evaluation_episodes
from gmel.evaluation.ladder import RULES, TUNED_RULES, information_of
from gmel.evaluation.progress import Reporter
from gmel.evaluation.schema import interval_of, metric_of
from gmel.evaluation.statistics import Interval, t_interval
from gmel.evaluation.table import format_interval, overload_words
from gmel.evaluation.tuning import UNTUNED, shipped, tune
from gmel.learning.algorithm import LearnedPolicy
from gmel.learning.export import load_actor
from gmel.policies.exported import DESCRIPTION_FILE, Description, read_description
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.load import digest
from gmel.scenario.schema import Scenario
from gmel.simulator.build import Environments, build_environments
from gmel.simulator.scale import scale_of

__all__ = [
    "MAX_ROWS",
    "RECORD_SUFFIXES",
    "SIMULATION_SCHEMA",
    "Chosen",
    "Simulation",
    "as_json",
    "check_records_path",
    "choose_policy",
    "records_table",
    "simulate",
    "summary",
    "write_records",
]

SIMULATION_SCHEMA = 1
"""Version of what `--json` prints."""

MAX_ROWS = 2**25
"""Most rows (episodes x slots x tasks that a slot can hold) of a simulation: about 4 GB of memory."""

RECORD_SUFFIXES = (".parquet", ".csv")

_FIGURES = {
    "mean_latency_s": ("mean latency s", None, 1.0),
    "p95_latency_s": ("P95 latency s", None, 1.0),
    "p99_latency_s": ("P99 latency s", None, 1.0),
    "completion_rate": ("completion %", 2, 100.0),
    "energy_j": ("energy J/task", None, 1.0),
    "switches_per_offloaded_task": ("model switches/offloaded task", 3, 1.0),
    "quality": ("quality of what is in time", 3, 1.0),
}
_OF_HORIZON = ("mean_latency_s", "p95_latency_s", "p99_latency_s", "completion_rate", "energy_j")
"""Figures that depend on the length of the run alone where the backlog grows."""


@dataclass(frozen=True)
class Chosen:
    """A policy with its name, its label in tables, and where it comes from: `rule`, or the folder it was read from."""

    name: str
    label: str
    policy: AnyPolicy
    source: str = "rule"


@dataclass(frozen=True)
class Simulation:
    """What was run, and what was measured. `load` is the offered load of the traffic, `overloaded` means no mean."""

    scenario: Scenario
    trace: str | None
    chosen: Chosen
    environments: Environments
    episodes: Episodes
    seed: int
    measured: Measured
    overloaded: bool
    notes: tuple[str, ...]

    @property
    def load(self) -> float:
        """Offered work over the capacity of all servers."""
        return self.environments.load

    @property
    def key(self) -> jax.Array:
        """Random key of the policy."""
        return jax.random.key(self.seed)


def choose_policy(name: str, scenario: Scenario, environments: Environments, own: bool, report: Reporter) -> Chosen:
    """A rule by its name, or a trained policy by its folder.

    Args:
        name: one of `RULES`, or the path of a policy folder (`gmel export`) or of a run folder (`gmel run`).
        scenario: the plant, for the tuned rules.
        environments: its traffic, to tune on where the package has no parameters for the plant.
        own: the traffic is the scenario's own, so that shipped parameters fit it.
        report: who is told that it takes a while.

    Raises:
        InputError: neither a rule nor a folder with a policy, or a policy that cannot be read.
    """
    if name in RULES:
        label, make = RULES[name]
        parameters = shipped(digest(scenario)) if own else None
        if parameters is None and name in TUNED_RULES:
            text = "tuning the softmax rules for this plant"
            report.stage(text)
            parameters = tune(environments.train, progress=lambda done, total: report.advance(done, total, text))
        return Chosen(name, label, make(parameters or UNTUNED))
    folder = _policy_folder(name)
    description = read_description(folder)
    _check_columns(name, description, scenario)
    policy = LearnedPolicy(load_actor(folder), mode=description.mode)
    algorithm = description.training.get("algorithm")
    label = f"{algorithm if isinstance(algorithm, str) else 'trained policy'} ({description.scenario_name})"
    return Chosen(name, "".join(c if c.isprintable() else "?" for c in label)[:80], policy, str(folder))


def _check_columns(name: str, description: Description, scenario: Scenario) -> None:
    """A trained policy needs the columns that it reads."""
    if description.other_costs and not scenario.counts_more_than_latency:
        raise InputError(
            f"policy {name}: reads what options cost beside their latency, which scenario {scenario.name!r} does not "
            "observe; choose a plant with reward.quality, reward.price, reward.energy, or levels"
        )
    scale = scale_of(scenario)
    if description.share_weights and description.share_weights != scale.share_weights:
        raise InputError(
            f"policy {name}: chooses {' and '.join(description.share_weights)}, scenario {scenario.name!r} lets "
            f"devices choose {' and '.join(scale.share_weights) or 'neither'}; choose a plant with "
            "devices.band_weights and tasks.cpu_weights as in training"
        )
    if description.identities is not None and scale.identities is not None:
        learned, offered = description.identities[1], scale.identities.services
        if learned != offered:
            raise InputError(
                f"policy {name}: tells {learned} service(s) of a server apart, scenario {scenario.name!r} has "
                f"{offered}; choose a plant with as many servers.services as in training"
            )
    if description.identities is not None and scenario.slot.quality_known:
        raise InputError(
            f"policy {name}: tells servers and services apart by number, which scenario {scenario.name!r} does not "
            "observe; choose a plant with slot.quality_known = false"
        )


def simulate(
    scenario: Scenario,
    policy: str,
    episodes: int,
    report: Reporter,
    *,
    seed: int = 0,
    slots: int | None = None,
    trace: str | None = None,
) -> Simulation:
    """Runs a policy on a plant.

    Args:
        scenario: the plant.
        policy: see `choose_policy`.
        episodes: how many, at least 1; intervals need 2.
        report: who is told the progress.
        seed: 0 is the traffic that `gmel run` evaluates on; other seeds have other links and noise, and other requests
            where these are drawn.
        slots: of an episode; by default the scenario's.
        trace: a shipped trace or a file, in place of the scenario's arrivals.

    Raises:
        InputError: a number out of range, a policy or a trace that cannot be used, or an episode without any task.
    """
    most = (VALIDATION_SEED - EVALUATION_SEED) // max(episodes, 1)
    if not 1 <= episodes <= 10_000:
        raise InputError(f"--episodes {episodes}: must be between 1 and 10,000")
    if not 0 <= seed < most:
        raise InputError(f"--seed {seed}: must be between 0 and {most - 1} with {episodes} episodes")
    if slots is not None and not 2 <= slots <= 1_000_000:
        raise InputError(f"--slots {slots}: must be between 2 and 1,000,000")
    environments = build_environments(scenario, trace)
    notes = list(environments.notes)
    traffic = evaluation_episodes(scenario, environments, episodes, slots)
    traffic = Episodes(
        traffic.count, traffic.slots, traffic.warmup_slots, EVALUATION_SEED + seed * episodes, traffic.trace_slots
    )
    wanted = slots or scenario.episode.slots
    if traffic.slots < wanted:
        notes.append(f"episodes of {traffic.slots} slots instead of {wanted}: the trace has no more for {episodes}")
    environments = environments._replace(load=_load_in(scenario, environments.load, traffic.slots))
    sizes = environments.test.plant.switches
    rows = episodes * (traffic.slots + DRAIN_SLOTS) * (sizes.requests + sizes.uploads)
    if rows > MAX_ROWS:
        raise InputError(
            f"--episodes {episodes} of {traffic.slots} slots with {sizes.requests + sizes.uploads} rows each: "
            f"{rows:,} rows, at most {MAX_ROWS:,}; lower --episodes or --slots"
        )
    chosen = choose_policy(policy, scenario, environments, trace is None, report)
    report.stage(f"simulating {chosen.label}: {episodes} x {traffic.slots} slots")
    measured = run_episodes(environments.test, chosen.policy, traffic, jax.random.key(seed))
    for number, records in enumerate(measured.records):
        if len(records) == 0:
            raise InputError(
                f"--slots {traffic.slots}: no task was decided and uploaded in episode {number} after the warm-up of "
                f"{traffic.warmup_slots} slots; raise --slots, or the load"
            )
    overloaded = measured.overloaded(environments.load)
    return Simulation(scenario, trace, chosen, environments, traffic, seed, measured, overloaded, tuple(notes))


def _load_in(scenario: Scenario, load: float, slots: int) -> float:
    """The offered load of an episode of so many slots, in which servers are there for another share of the time."""
    if slots == scenario.episode.slots:
        return load
    capacity = scenario.capacity_in(slots)
    if capacity <= 0:
        raise InputError(
            f"--slots {slots}: no server is there in {slots * scenario.slot.length_s:g} s (servers.present); raise it"
        )
    return load * (scenario.capacity / capacity)


def as_json(simulation: Simulation) -> dict[str, Any]:
    """What `--json` prints: strict JSON, null for what does not exist (an interval over one episode).

    Each figure: mean over the episodes, limits of the 95 % interval, the value of each episode.
    """
    measured, traffic, chosen = simulation.measured, simulation.episodes, simulation.chosen
    overloaded = simulation.overloaded
    figures: dict[str, Any] = {}
    for name, values in metrics_of(measured).items():
        hidden = (overloaded and name in _OF_HORIZON) or bool(np.isnan(values).any())
        figures[name] = None if hidden else metric_of(t_interval(values), list(values))
    return {
        "schema": SIMULATION_SCHEMA,
        "scenario": simulation.scenario.name,
        "digest": digest(simulation.scenario),
        "trace": simulation.trace or simulation.scenario.arrivals.trace,
        "policy": {
            "name": chosen.name,
            "label": chosen.label,
            "source": chosen.source,
            "information": information_of(chosen.policy),
            "mode": chosen.policy.mode,
        },
        "load": round(simulation.load, 4),
        "unstable": overloaded,
        "verdict": overload_words(simulation.load) if overloaded else None,
        "seed": simulation.seed,
        "episodes": traffic.count,
        "slots": traffic.slots,
        "warmup_slots": traffic.warmup_slots,
        "slot_s": simulation.scenario.slot.length_s,
        "tasks": sum(len(records) for records in measured.records),
        "unfinished": int(measured.unfinished.sum()),
        "metrics": figures,
        "decomposition_s": decomposition_of(measured, overloaded),
        "notes": list(simulation.notes),
    }


def summary(simulation: Simulation) -> list[str]:
    """The figures as lines of text."""
    facts = as_json(simulation)
    chosen, traffic = simulation.chosen, simulation.episodes
    noun = "episode" if traffic.count == 1 else "episodes"
    lines = [
        f"{simulation.scenario.name} at load {simulation.load:.3g}, {chosen.label} ({information_of(chosen.policy)})",
        f"{traffic.count} {noun} of {traffic.slots} slots of {simulation.scenario.slot.length_s:g} s, "
        f"the first {traffic.warmup_slots} left out; {facts['tasks']:,} tasks"
        + (f" and {facts['unfinished']:,} unfinished" if facts["unfinished"] else "")
        + ("; ± and brackets: 95 % interval over the episodes" if traffic.count > 1 else ""),
    ]
    if simulation.overloaded:
        lines += [
            overload_words(simulation.load),
            "The backlog grows with every slot: a mean would depend on the length of the run alone, so none is given.",
        ]
    for name, (label, digits, scale) in _FIGURES.items():
        if facts["metrics"][name] is not None:
            lines.append(f"  {label:30} {format_interval(_interval(facts['metrics'][name]), digits, scale)}")
    if not simulation.overloaded:
        parts = cast("dict[str, float]", facts["decomposition_s"])
        shown = [f"{part.replace('_', ' ')} {parts[part]:.3g}" for part in PARTS if parts[part] > 0]
        lines.append(f"  {'of the mean latency, s':30} {', '.join(shown)}")
    return lines


def check_records_path(path: Path) -> None:
    """Refuses a path for records before anything is run.

    Raises:
        InputError: another suffix, a folder, or no folder to write into.
    """
    if not path.name.lower().endswith(RECORD_SUFFIXES):
        raise InputError(f"--records {path}: the suffix must be {' or '.join(RECORD_SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--records {path}: give a file in a folder that exists")


def records_table(simulation: Simulation) -> Any:
    """One row per counted task: its record, with `episode` and the name of the `target` in front."""
    names = np.array(["device", *[server.name for server in simulation.scenario.servers]])
    tables = [
        records.table({"episode": np.full(len(records), number, np.int64), "target": names[records.option]})
        for number, records in enumerate(simulation.measured.records)
    ]
    table = pa.concat_tables(tables)
    first = ["episode", "target"]
    return table.select(first + [name for name in table.column_names if name not in first])


def write_records(simulation: Simulation, path: Path) -> int:
    """Writes the records as CSV or Parquet, by suffix; the file appears complete or not at all. Returns the rows.

    Raises:
        InputError: see `check_records_path`; or the file cannot be written.
    """
    check_records_path(path)
    table, sink = records_table(simulation), pa.BufferOutputStream()
    if path.name.lower().endswith(".csv"):
        pa_csv.write_csv(table, sink)
    else:
        pa_parquet.write_table(table, sink)
    try:
        replace_file(path, sink.getvalue().to_pybytes())
    except OSError as error:
        raise InputError(f"--records {path}: cannot be written ({error.strerror}); choose another place") from error
    return int(table.num_rows)


def _policy_folder(name: str) -> Path:
    """The folder with `policy.json`: as given, or `policy/` in a run folder."""
    folder = Path(name)
    try:
        if (folder / DESCRIPTION_FILE).is_file():
            return folder
        if (folder / "policy" / DESCRIPTION_FILE).is_file():
            return folder / "policy"
        there = folder.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if there:
        raise InputError(
            f"--policy {name}: no {DESCRIPTION_FILE} in it nor in its policy/; give a run folder that has finished "
            "training, or a folder made by `gmel export`"
        )
    near = difflib.get_close_matches(name, RULES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    shown = "".join(c if c.isprintable() else "?" for c in name)[:80]
    raise InputError(
        f"--policy {shown}: no rule of that name{hint} and no such folder; rules are {', '.join(RULES)}; "
        "or give a policy folder or a run folder"
    )


def _interval(metric: Any) -> Interval:
    interval = interval_of(metric)
    return interval if math.isfinite(interval.mean) else Interval(math.nan, math.nan, math.nan)
