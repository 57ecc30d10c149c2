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
CAPTION = (
    "An agent decision is one device in one slot, with a request or without: 20 a slot. A request decided is a row "
    "that is present: {requests:.2f} a slot (load 0.7). Actions are random, hashed inside the compiled loop (PCG4D, "
    "the simulator's own generator); NumPy draws its own. No observation is made unless the row says so. us/slot is "
    "that of one environment. Ratio: decisions per processor second over those of one NumPy environment; processor "
    "time, because the clock of a shared machine measures the neighbours too."
)
# Slots of one timed call, by number of environments: about the same work in each.
SLOTS = {1: 4000, 64: 256, 1024: 32, 8192: 4}
TARGETS = {"simulator": 2e6, "training": 80e3}
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
        "requests_per_slot": requests / slots,
    }


def simulator_scan(slots: int, observe: bool) -> tuple[Any, Any]:
    """The environment, and a function of a batch of states: `slots` slots with random actions."""
    import jax
    import jax.numpy as jnp

    from gmel.physics.random import hash_bits
    from gmel.scenario.load import load_scenario
    from gmel.simulator.environment import Environment
    from gmel.simulator.state import State

    environment = Environment.from_scenario(load_scenario(SCENARIO))
    options = environment.servers + 1

    def one(state: State) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
        word = hash_bits(state.seed, state.slot, RNG_ACTION, jnp.arange(environment.requests)).x
        action = ((word >> 16) * options >> 16).astype(jnp.int32)
        seen = jnp.zeros(())
        if observe:
            observation = environment.observe(state)
            # Somebody must read all of it, or XLA leaves it out.
            seen = jnp.sum(jnp.where(observation.mask[..., None], observation.options, 0.0)) + jnp.sum(observation.task)
        after, reward, _ = environment.step(state, action)
        return after, (jnp.sum(state.requests.present), reward.team, seen)

    def scan(states: State) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
        def slot(states: State, _: None) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
            after, (present, reward, seen) = jax.vmap(one)(states)
            return after, (jnp.sum(present), jnp.sum(reward), jnp.sum(seen))

        return jax.lax.scan(slot, states, length=slots)

    return environment, scan


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

    environment = Environment.from_scenario(load_scenario(SCENARIO))
    state = jax.tree.map(lambda leaf: leaf[0], jax.jit(jax.vmap(environment.reset))(seeds(0, 1)))
    parts = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for name, part in state._asdict().items()}
    return [{"what": "state of one environment", "bytes": sum(parts.values()), "parts": parts}]


SECTIONS: dict[str, Callable[[bool], list[Row]]] = {
    "numpy": measure_numpy,
    "simulator": measure_simulator,
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
    rows = [(section, row) for section in ("numpy", "simulator", "training") for row in results.get(section, [])]
    if not rows:
        return None
    base = results["numpy"][0]["decisions_per_cpu_s"] if "numpy" in results else None
    requests = next((row["requests_per_slot"] for section, row in reversed(rows) if section != "numpy"), None)
    requests = rows[0][1]["requests_per_slot"] if requests is None else requests
    table = Table(title=f"Speed on {SCENARIO}", caption=CAPTION.format(requests=requests), caption_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("decisions/s", "per CPU s", "requests/s", "us/slot", "ratio", "peak MB", "aim/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for section, row in rows:
        # What simulates and learns is no environment: its ratio would compare unlike things.
        ratio = "" if base is None or section == "training" else f"{row['decisions_per_cpu_s'] / base:.1f}"
        aim = TARGETS.get(section)
        table.add_row(
            row["what"],
            f"{row['decisions_per_s']:,.0f}",
            f"{row['decisions_per_cpu_s']:,.0f}",
            f"{row['requests_per_s']:,.0f}",
            f"{1e6 * row['wall_s'] / row['slots']:.2f}",
            ratio,
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{aim:,.0f}" if aim and row.get("environments", 1024) == 1024 and "observed" not in row["what"] else "",
        )
    return table


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


def write(results: dict[str, list[Row]], quick: bool, load: tuple[float, float], out: Path) -> None:
    """Writes the results with what is needed to read them; a reader never sees half a file."""
    import jax
    import numpy as np

    content = {
        "schema": 1,
        "scenario": SCENARIO,
        "quick": quick,
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": {"before": load[0], "after": load[1]},
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
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
    for table in (speed_table(results), other_table(results)):
        if table is not None:
            console.print(table)
    console.print(
        f"load average {before:.1f} before, {after:.1f} after; above the number of cores, wall times are late"
    )
    out: Path = options.out or Path("runs") / "benchmarks" / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
    write(results, options.quick, (before, after), out)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
