"""Measures the simulator and the learner; prints one table with ratios side by side and writes them as JSON.

    python -m benchmarks [--quick] [--only NAME,...] [--out FILE]

Every section runs in a process of its own, so that its memory is its own and its compilation is cold. Wall time is the
median of several repeats; decisions per second of processor time stand beside it, because on a shared machine the clock
measures the neighbours too.
"""

# ruff: noqa: PLC0415 -- each section imports what it measures, so that NumPy is measured without JAX in its memory.

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

SCENARIO = "hall-20x5"
LARGE = "factory-xl"
CAPTION = (
    "An agent decision is one device in one slot, with a request or without: 20 a slot. A request decided is a row "
    "that is present: {requests:.2f} a slot (load 0.7). Actions are random, hashed inside the compiled loop (PCG4D, "
    "the simulator's own generator); NumPy and SimPy draw theirs with NumPy. No observation is made unless the row "
    "says so. us/slot is that of one environment. x NumPy, x SimPy: decisions per processor second over those of one "
    "environment in NumPy and in SimPy; processor time, because the clock of a shared machine measures the neighbours "
    "too."
)
LARGE_CAPTION = (
    "Both plants in turn in one process; actions are random over the device itself and the servers it may choose. "
    "us/slot is that of one environment, by the clock. us/request and ns/decision: processor time of a step over the "
    "requests decided in it, and over its agent decisions (device x slot); ratio: over the least of hall-20x5. State: "
    "bytes of all arrays of one environment."
)
# Slots of one timed call, by number of environments: about the same work in each.
SLOTS = {1: 4000, 64: 256, 1024: 32, 8192: 4}
# The same for the two plants side by side: (environments, slots).
LARGE_CASES = {SCENARIO: ((64, 512), (1024, 64)), LARGE: ((1, 200), (16, 50), (64, 32))}
# No table of the simulator has this number (see physics/random.py).
RNG_ACTION = 200


def timed(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median wall and least processor seconds of `call`; the first, cold one does not count."""
    call()
    wall_s: list[float] = []
    cpu_s: list[float] = []
    for _ in range(repeats):
        began, used = time.perf_counter(), time.process_time()
        call()
        wall_s.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - used)
    return statistics.median(wall_s), min(cpu_s)


def speed(what: str, slots: int, requests: float, devices: int, wall_s: float, cpu_s: float) -> Row:
    """A row of the table: `slots` environment slots with `requests` requests in `wall_s` seconds."""
    return {
        "what": what,
        "slots": slots,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "decisions_per_s": devices * slots / wall_s,
        "decisions_per_cpu_s": devices * slots / cpu_s,
        "requests_per_s": requests / wall_s,
        "requests_per_cpu_s": requests / cpu_s,
        "requests_per_slot": requests / slots,
    }


def simulator_scan(slots: int, observe: bool, name: str = SCENARIO) -> tuple[Any, Any]:
    """The environment, and a function of a batch of states: `slots` slots with random actions.

    A second argument of it, where it is given, are the options of each device (`options_of_devices`).
    """
    import jax
    import jax.numpy as jnp

    from gmel.physics.random import hash_bits
    from gmel.scenario.load import load_scenario
    from gmel.simulator.environment import Environment
    from gmel.simulator.state import State

    environment = Environment.from_scenario(load_scenario(name))

    def one(state: State, of_device: jax.Array | None) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
        word = hash_bits(state.seed, state.slot, RNG_ACTION, jnp.arange(environment.requests)).x
        options = environment.servers + 1 if of_device is None else of_device.shape[1]
        action = ((word >> 16) * options >> 16).astype(jnp.int32)
        if of_device is not None:
            action = of_device[state.requests.device, action]
        seen = jnp.zeros(())
        if observe:
            observation = environment.observe(state)
            # Somebody must read all of it, or XLA leaves it out.
            seen = jnp.sum(jnp.where(observation.mask[..., None], observation.options, 0.0)) + jnp.sum(observation.task)
        after, reward, _ = environment.step(state, action)
        return after, (jnp.sum(state.requests.present), reward.team, seen)

    def scan(states: State, of_device: jax.Array | None = None) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
        def slot(states: State, _: None) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
            after, (present, reward, seen) = jax.vmap(one)(states, of_device)
            return after, (jnp.sum(present), jnp.sum(reward), jnp.sum(seen))

        return jax.lax.scan(slot, states, length=slots)

    return environment, scan


def options_of_devices(environment: Any, states: Any) -> Any:
    """Options of each device of a batch of states: itself and the servers it may choose, as many as the scenario says.

    None where every device may choose every server.
    """
    import jax
    import jax.numpy as jnp

    from gmel.simulator.links import visible

    most = environment.plant.switches.radio.visible_servers
    if most is None or most >= environment.servers:
        return None
    devices = jnp.arange(environment.plant.switches.devices)

    def of_state(state: Any) -> Any:
        can = visible(environment.plant, state.links, devices)
        # The servers that can be chosen first; a device with fewer has others behind them.
        server = jnp.argsort(~can, axis=1, stable=True)[:, :most]
        option = jnp.where(jnp.take_along_axis(can, server, axis=1), server + 1, 0)
        return jnp.concatenate([jnp.zeros((devices.shape[0], 1), jnp.int32), option.astype(jnp.int32)], axis=1)

    return jax.jit(lambda states: jax.lax.map(of_state, states))(states)


def measure_simulator(quick: bool) -> list[Row]:
    """The compiled environment with random actions, by number of parallel environments."""
    import jax

    from gmel.simulator.environment import seeds

    rows: list[Row] = []
    cases = [(count, False) for count in SLOTS] + [(1024, True)]
    for count, observe in [(1, False), (1024, False)] if quick else cases:
        slots = SLOTS[count]
        environment, scan = simulator_scan(slots, observe)
        states = jax.jit(jax.vmap(environment.reset))(seeds(0, count))
        # Warm queues: an empty plant has less in flight, though the compiled work is the same.
        run = jax.jit(scan)
        states, _ = jax.block_until_ready(run(states))
        wall_s, cpu_s = timed(lambda run=run, states=states: jax.block_until_ready(run(states)), 3 if quick else 7)
        requests = float(run(states)[1][0].sum())
        name = f"JAX, {count:,} environment{'s' * (count > 1)}" + ", observed" * observe
        devices = environment.plant.switches.devices
        rows.append({**speed(name, slots * count, requests, devices, wall_s, cpu_s), "environments": count})
    return rows


def measure_numpy(quick: bool) -> list[Row]:
    """The same model in plain NumPy: one environment, and vectorised over environments."""
    from benchmarks.numpy_environment import BatchedNumpyEnvironment, NumpyEnvironment
    from gmel.scenario.load import load_scenario

    scenario = load_scenario(SCENARIO)
    devices = scenario.devices.count
    repeats = 2 if quick else 5
    single = NumpyEnvironment(scenario, seed=0)
    slots = 500 if quick else 2000
    decided = 0

    def run_single() -> None:
        nonlocal decided
        decided = 0
        for _ in range(slots):
            requests = single.draw()
            decided += len(requests.device)
            single.step(requests, single.random_actions(requests))

    wall_s, cpu_s = timed(run_single, repeats)
    rows = [{**speed("NumPy, 1 environment", slots, decided, devices, wall_s, cpu_s), "environments": 1}]
    for count in (1024,) if quick else (64, 1024, 8192):
        batched = BatchedNumpyEnvironment(scenario, count, seed=0)
        steps = max(4, (8192 if quick else 32768) // count)

        def run_batched(batched: BatchedNumpyEnvironment = batched, steps: int = steps) -> None:
            nonlocal decided
            decided = 0
            for _ in range(steps):
                requests = batched.draw()
                decided += int(requests.present.sum())
                batched.advance(requests, batched.random_actions(requests))

        wall_s, cpu_s = timed(run_batched, repeats)
        name = f"NumPy, {count:,} environments, vectorised"
        rows.append({**speed(name, steps * count, decided, devices, wall_s, cpu_s), "environments": count})
    return rows


def measure_simpy(quick: bool) -> list[Row]:
    """The same model in SimPy, one environment, event by event."""
    from gmel.scenario.load import load_scenario

    what = "SimPy, 1 environment"
    try:
        from benchmarks.simpy_environment import SimpyEnvironment
    except ModuleNotFoundError as error:
        if error.name != "simpy":
            raise
        return [{"what": what, "missing": "SimPy is not installed: make env"}]
    scenario = load_scenario(SCENARIO)
    slots = 500 if quick else 2000
    decided = 0

    def run() -> None:
        nonlocal decided
        environment = SimpyEnvironment(scenario, seed=0)
        environment.run(environment.random_slots(slots))
        decided = len(environment.finished)

    wall_s, cpu_s = timed(run, 2 if quick else 5)
    return [{**speed(what, slots, decided, scenario.devices.count, wall_s, cpu_s), "environments": 1}]


def measure_large(quick: bool) -> list[Row]:
    """A large plant beside the small one, in turn: work of a decision, memory of an environment."""
    import jax

    from gmel.simulator.environment import seeds

    cases: list[tuple[Row, Callable[[], Any]]] = []
    for name, sizes in LARGE_CASES.items():
        for count, slots in sizes[-1:] if quick else sizes:
            environment, scan = simulator_scan(slots, observe=False, name=name)
            states = jax.jit(jax.vmap(environment.reset))(seeds(0, count))
            options = options_of_devices(environment, states)
            run = jax.jit(scan)
            states, _ = jax.block_until_ready(run(states, options))
            plant = environment.plant.switches
            row: Row = {
                "what": f"{name} x {count:,}",
                "scenario": name,
                "environments": count,
                "devices": plant.devices,
                "servers": plant.servers,
                "table_rows": {"requests": plant.requests, "uploads": plant.uploads},
                "slots": slots * count,
                "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(states)) // count,
            }
            cases.append((row, lambda run=run, states=states, options=options: run(states, options)))
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    for _ in range(2 if quick else 5):
        for (_, call), seen in zip(cases, times, strict=True):
            began, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            seen.append((time.perf_counter() - began, time.process_time() - used))
    rows: list[Row] = []
    for (row, call), seen in zip(cases, times, strict=True):
        after, (present, _, _) = call()
        wall_s, cpu_s = statistics.median(wall for wall, _ in seen), min(cpu for _, cpu in seen)
        measured = speed(row["what"], row["slots"], float(present.sum()), row["devices"], wall_s, cpu_s)
        rows.append({**row, **measured, "lost": int(after.lost.sum())})
    return rows


def training_update() -> tuple[Any, Any, Any, Any]:
    """Task, algorithm, training state as arrays, and a function of them: one update."""
    import equinox as eqx
    import jax

    from gmel.learning.algorithm import make_task
    from gmel.learning.amarl import Amarl
    from gmel.scenario.load import load_scenario
    from gmel.simulator.environment import Environment

    scenario = load_scenario(SCENARIO)
    task = make_task(Environment.from_scenario(scenario), scenario)
    algorithm = Amarl()
    arrays, rest = eqx.partition(algorithm.init(task, jax.random.key(0)), eqx.is_array)

    def update(arrays: Any) -> tuple[Any, Any]:
        state, metrics = algorithm.update(task, eqx.combine(arrays, rest))
        return eqx.filter(state, eqx.is_array), metrics

    return task, algorithm, arrays, update


def measure_training(quick: bool) -> list[Row]:
    """One update of the default learner, experience collected and learned from."""
    import jax

    task, algorithm, arrays, update = training_update()
    began = time.perf_counter()
    run = jax.jit(update).lower(arrays).compile()
    compile_s = time.perf_counter() - began
    wall_s, cpu_s = timed(lambda: jax.block_until_ready(run(arrays)), 2 if quick else 5)
    slots = algorithm.slots * algorithm.environments
    devices = task.environment.plant.switches.devices
    row = speed("AMARL, one update", slots, task.requests_per_slot * slots, devices, wall_s, cpu_s)
    return [{**row, "compile_s": compile_s}]


def measure_compile(quick: bool) -> list[Row]:
    """Seconds until the first result, from nothing and from JAX's persistent cache on disk."""
    rows: list[Row] = []
    for what, name in (("simulator", "simulator, scan of slots"), ("training", "AMARL, one update")):
        if quick and what == "training":
            continue
        with tempfile.TemporaryDirectory() as folder:
            cold = child(f"compile-{what}", quick, {"GMEL_BENCHMARK_CACHE": folder})[0]
            warm = child(f"compile-{what}", quick, {"GMEL_BENCHMARK_CACHE": folder})[0]
            files = [file for file in Path(folder).iterdir() if file.is_file()]
            size = sum(file.stat().st_size for file in files)
        rows.append(
            {
                "what": name,
                "cold_trace_s": cold["trace_s"],
                "cold_compile_s": cold["compile_s"],
                "cached_trace_s": warm["trace_s"],
                "cached_compile_s": warm["compile_s"],
                "cache_files": len(files),
                "cache_bytes": size,
                "warnings": sorted({*cold["warnings"], *warm["warnings"]}),
            }
        )
    return rows


def measure_one_compilation(what: str) -> list[Row]:
    """Tracing and compiling of one program in this process; the cache is where the environment says."""
    import logging

    import jax

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage().splitlines()[0][:200])

    lines: list[str] = []
    logging.getLogger("jax").addHandler(Collect(logging.WARNING))
    jax.config.update("jax_compilation_cache_dir", os.environ["GMEL_BENCHMARK_CACHE"])
    # By default JAX keeps only what took a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if what == "simulator":
        from gmel.simulator.environment import seeds

        environment, function = simulator_scan(SLOTS[1024], observe=False)
        argument = jax.vmap(environment.reset)(seeds(0, 1024))
    else:
        _, _, argument, function = training_update()
    began = time.perf_counter()
    lowered = jax.jit(function).lower(argument)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    jax.block_until_ready(compiled(argument))
    return [{"what": what, "trace_s": traced - began, "compile_s": done - traced, "warnings": lines}]


def measure_memory(quick: bool) -> list[Row]:
    """Bytes of the state of one environment, by part. (Peaks are taken of every section.)"""
    del quick
    import jax

    from gmel.scenario.load import load_scenario
    from gmel.simulator.environment import Environment, seeds

    rows: list[Row] = []
    for name in (SCENARIO, LARGE):
        environment = Environment.from_scenario(load_scenario(name))
        state = jax.tree.map(lambda leaf: leaf[0], jax.jit(jax.vmap(environment.reset))(seeds(0, 1)))
        parts = {part: sum(leaf.nbytes for leaf in jax.tree.leaves(of)) for part, of in state._asdict().items()}
        rows.append({"what": f"state of {name}", "bytes": sum(parts.values()), "parts": parts})
    return rows


SECTIONS: dict[str, Callable[[bool], list[Row]]] = {
    "numpy": measure_numpy,
    "simpy": measure_simpy,
    "simulator": measure_simulator,
    "large": measure_large,
    "training": measure_training,
    "compile": measure_compile,
    "memory": measure_memory,
}


def child(name: str, quick: bool, more: dict[str, str] | None = None) -> list[Row]:
    """Runs a section in a fresh process; its last line of output is the result.

    Raises:
        RuntimeError: the section failed; its output has been shown.
    """
    command = [sys.executable, "-m", "benchmarks", "--section", name, *(["--quick"] * quick)]
    done = subprocess.run(command, env={**os.environ, **(more or {})}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"section {name} failed with {done.returncode}: {done.stdout[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_section(name: str, quick: bool) -> list[Row]:
    """What a child does."""
    prefix, _, what = name.partition("-")
    rows = measure_one_compilation(what) if prefix == "compile" and what else SECTIONS[name](quick)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return [{**row, "peak_bytes": max(peak, children)} for row in rows]


def speed_table(results: dict[str, list[Row]]) -> Table | None:
    """Rates of the simulators and of training, side by side."""
    sections = ("numpy", "simpy", "simulator", "training")
    rows = [(section, row) for section in sections for row in results.get(section, [])]
    timed_rows = [(section, row) for section, row in rows if "missing" not in row]
    if not timed_rows:
        return None
    # Drawn requests differ a little by section; the compiled environments have the most slots.
    counts = {section: row["requests_per_slot"] for section, row in timed_rows}
    requests = counts.get("simulator", next(iter(counts.values())))
    table = Table(title=f"Speed on {SCENARIO}", caption=CAPTION.format(requests=requests), caption_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("decisions/s", "per CPU s", "requests/s", "us/slot", "x NumPy", "x SimPy", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for section, row in rows:
        if "missing" in row:
            table.add_row(f"{row['what']}: {row['missing']}")
            continue
        # What simulates and learns is no environment: its ratio would compare unlike things.
        bases = [None if section == "training" else base_row(results, base) for base in ("numpy", "simpy")]
        ratios = [row["decisions_per_cpu_s"] / base["decisions_per_cpu_s"] if base else None for base in bases]
        table.add_row(
            row["what"],
            f"{row['decisions_per_s']:,.0f}",
            f"{row['decisions_per_cpu_s']:,.0f}",
            f"{row['requests_per_s']:,.0f}",
            f"{1e6 * row['wall_s'] / row['slots']:.2f}",
            *("" if ratio is None else f"{ratio:.1f}" for ratio in ratios),
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
    return table


def base_row(results: dict[str, list[Row]], section: str) -> Row | None:
    """The single environment of a section that others are compared with."""
    return next((row for row in results.get(section, []) if "missing" not in row), None)


def large_table(results: dict[str, list[Row]]) -> Table | None:
    """The large plant beside the small one."""
    rows = results.get("large")
    if not rows:
        return None
    table = Table(title=f"{LARGE} beside {SCENARIO}", caption=LARGE_CAPTION, caption_justify="left")
    table.add_column("", no_wrap=True)
    columns = ("decisions/s", "requests/s", "us/slot", "us/request", "ratio", "ns/decision", "ratio", "state")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ratios = {
            rate: best(rows, rate, SCENARIO) / row[rate] for rate in ("requests_per_cpu_s", "decisions_per_cpu_s")
        }
        table.add_row(
            row["what"],
            f"{row['decisions_per_s']:,.0f}",
            f"{row['requests_per_s']:,.0f}",
            f"{1e6 * row['wall_s'] / row['slots']:.2f}",
            f"{1e6 / row['requests_per_cpu_s']:.2f}",
            f"{ratios['requests_per_cpu_s']:.2f}",
            f"{1e9 / row['decisions_per_cpu_s']:.0f}",
            f"{ratios['decisions_per_cpu_s']:.2f}",
            f"{row['state_bytes']:,}",
        )
    return table


def best(rows: list[Row], rate: str, scenario: str | None = None) -> float:
    """The highest rate of the rows (of a scenario)."""
    return max(row[rate] for row in rows if scenario is None or row["scenario"] == scenario)


def aims(results: dict[str, list[Row]]) -> list[Row]:
    """What is aimed at and what was measured. Rates are those of the number of environments with the highest.

    `clock` and `processor` hold figures by time on the clock, on all cores of the machine, and by processor time. A
    rate that is to be reached on all cores is judged by the clock alone.
    """
    found: list[Row] = []

    def add(
        what: str, aim: float, clock: float, processor: float, *, at_most: bool = False, rate: bool = False
    ) -> None:
        measured = {"clock": clock, "processor": processor}
        met: dict[str, bool | None] = {
            name: value <= aim if at_most else value >= aim for name, value in measured.items()
        }
        if rate:
            met["processor"] = None
        found.append({"what": what, "aim": aim, "at_most": at_most, **measured, "met": met})

    # What is observed is more than the others do.
    plain = [row for row in results.get("simulator", []) if "observed" not in row["what"]]
    rates = ("decisions_per_s", "decisions_per_cpu_s")
    if plain:
        add(f"decisions/s, {SCENARIO}", 5e6, *(best(plain, rate) for rate in rates), rate=True)
        for section, name, aim in (("simpy", "SimPy", 100.0), ("numpy", "NumPy, one environment", 30.0)):
            base = base_row(results, section)
            if base is not None:
                add(f"decisions/s over those of {name}", aim, *(best(plain, rate) / base[rate] for rate in rates))
    rows = results.get("large", [])
    for what, unit in (("requests", "request decided"), ("decisions", "agent decision")) if rows else ():
        ratios = [
            best(rows, rate, SCENARIO) / best(rows, rate, LARGE) for rate in (f"{what}_per_s", f"{what}_per_cpu_s")
        ]
        add(f"time per {unit}, {LARGE} over {SCENARIO}", 2.0, *ratios, at_most=True)
    for row in results.get("training", []):
        add("decisions/s in training", 80e3, row["decisions_per_s"], row["decisions_per_cpu_s"], rate=True)
    return found


def aims_table(found: list[Row]) -> Table | None:
    """Aims, with met or not met."""
    if not found:
        return None
    table = Table(title=f"Aims, on {cores()} cores")
    table.add_column("", no_wrap=True)
    for name in ("aim", "by the clock", "", "by processor time", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for entry in found:
        cells: list[str] = []
        for name in ("clock", "processor"):
            cells += [figure(entry[name]), {True: "met", False: "not met", None: ""}[entry["met"][name]]]
        table.add_row(entry["what"], f"{'<=' if entry['at_most'] else '>='} {figure(entry['aim'])}", *cells)
    return table


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def figure(value: float) -> str:
    """A rate without decimals, a ratio with two."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}".rstrip("0").rstrip(".")


def other_table(results: dict[str, list[Row]]) -> Table | None:
    """Compilation and memory."""
    rows = [(f"compile {row['what']}, no cache", f"{row['compile_s']:.1f} s") for row in results.get("training", [])]
    for row in results.get("compile", []):
        # How much a second process saves.
        saved = row["cold_compile_s"] / max(row["cached_compile_s"], 1e-9)
        text = f"{row['cold_compile_s']:.1f} s cold, {row['cached_compile_s']:.1f} s cached ({saved:.1f} times as fast)"
        text += (
            f", tracing {row['cached_trace_s']:.1f} s, {row['cache_files']} files, {row['cache_bytes'] / 1e6:.1f} MB"
        )
        rows.append((f"compile {row['what']}", text))
        rows += [("", f"warning: {line}") for line in row["warnings"]]
    for row in results.get("memory", []):
        parts = ", ".join(f"{name} {size:,}" for name, size in row["parts"].items() if size)
        rows.append((row["what"], f"{row['bytes']:,} bytes ({parts})"))
    rows += [
        (f"peak of section {name}", f"{max(row['peak_bytes'] for row in section) / 1e6:,.0f} MB")
        for name, section in results.items()
    ]
    if not rows:
        return None
    table = Table(title="Compilation and memory", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def write(results: dict[str, list[Row]], found: list[Row], quick: bool, load: tuple[float, float], out: Path) -> None:
    """Writes the results with what is needed to read them; a reader never sees half a file."""
    import jax
    import numpy as np

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
