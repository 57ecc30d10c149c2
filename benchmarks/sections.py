"""What is measured: one function a section, each gives a list of rows. See `benchmarks.__main__`."""

# ruff: noqa: PLC0415 -- each section imports what it measures, so that NumPy is measured without JAX in its memory.

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SCENARIO = "hall-20x5"
LARGE = "factory-xl"
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
