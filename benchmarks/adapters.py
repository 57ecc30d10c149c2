"""How fast the adapters are beside the functional environment: one table with ratios, and JSON.

    python -m benchmarks.adapters [--quick] [--out FILE]

All on hall-20x5 with random actions. A slot is one slot of one environment. Ratios compare slots per processor second:
on a shared machine the clock measures the neighbours too.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from gmel.simulator.adapters.gymnasium import GmelCentralEnv, GmelVectorEnv
from gmel.simulator.adapters.jaxmarl import GmelMultiAgentEnv
from gmel.simulator.adapters.pettingzoo import parallel_env
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.state import State

SCENARIO, MANY = "hall-20x5", 64


class Measured(NamedTuple):
    """One row of the table."""

    what: str
    slots: int
    wall_s: float
    cpu_s: float


def measure(what: str, run: Callable[[int], int], calls: int) -> Measured:
    """`run(calls)` gives the slots that it did; the first, cold call is not counted. The best of three."""
    run(2)
    tries: list[Measured] = []
    for _ in range(3):
        began, used = time.perf_counter(), time.process_time()
        slots = run(calls)
        tries.append(Measured(what, slots, time.perf_counter() - began, time.process_time() - used))
    return min(tries, key=lambda row: row.cpu_s / row.slots)


def functional(calls: int) -> list[Measured]:
    """The environment itself: one compiled step a call, and a compiled scan of many environments."""
    environment = parallel_env(SCENARIO).site.environment
    shape = (environment.requests,)
    step = jax.jit(Environment.step)

    def one_by_one(count: int) -> int:
        state = start
        for number in range(count):
            state, _, _ = step(environment, state, actions[number % 64])
        jax.block_until_ready(state)
        return count

    @jax.jit
    def scan(states: State, key: jax.Array) -> State:
        def slot(states: State, key: jax.Array) -> tuple[State, jax.Array]:
            seen = jax.vmap(environment.observe)(states)
            action = jax.random.randint(key, (MANY, *shape), 0, 1 + environment.servers)
            after, reward, _ = jax.vmap(environment.step)(states, action)
            return after, reward.team.sum() + seen.options.sum()

        return jax.lax.scan(slot, states, jax.random.split(key, 100))[0]

    def at_once(count: int) -> int:
        jax.block_until_ready([scan(many, jax.random.key(number)) for number in range(max(1, count // 1000))])
        return max(1, count // 1000) * 100 * MANY

    start = jax.jit(Environment.reset)(environment, seeds(0, 1)[0])
    many = jax.jit(jax.vmap(environment.reset))(seeds(0, MANY))
    actions = np.random.default_rng(0).integers(0, 6, (64, *shape), dtype=np.int32)
    return [
        measure("functional step, called from Python", one_by_one, calls),
        measure(f"functional, {MANY} in a scan, observed", at_once, calls),
    ]


def pettingzoo(calls: int) -> list[Measured]:
    """One plant, 20 agents."""
    warnings.filterwarnings("ignore", message=".*beyond requests_per_device")
    parallel = parallel_env(SCENARIO)
    parallel.reset(seed=0)
    drawn = np.random.default_rng(0).integers(0, 6, (64, len(parallel.agents))).tolist()

    def run(count: int) -> int:
        parallel.reset(seed=0)
        for number in range(count):
            parallel.step(dict(zip(parallel.agents, drawn[number % 64], strict=True)))
        return count

    return [measure("PettingZoo, 20 agents", run, calls)]


def gymnasium(calls: int) -> list[Measured]:
    """One scheduler alone, and many in a compiled program."""
    rows: list[Measured] = []
    for decide in ("slot", "request"):
        single, many = GmelCentralEnv(SCENARIO, decide=decide), GmelVectorEnv(MANY, SCENARIO, decide=decide)
        for what, made, share in ((f"Gymnasium, {decide} a step", single, 1), (f"the same, {MANY} at once", many, 8)):
            made.action_space.seed(0)
            actions = [made.action_space.sample() for _ in range(64)]

            def run(count: int, made: Any = made, actions: list[Any] = actions, share: int = share) -> int:
                made.reset(seed=0)
                info: dict[str, Any] = {}
                for number in range(max(1, count // share)):
                    *_, info = made.step(actions[number % 64])
                return int(np.sum(info["slot"]))

            rows.append(measure(what, run, calls))
    return rows


def jaxmarl(calls: int) -> list[Measured]:
    """Dictionaries of arrays by agent, in a compiled scan."""
    marl = GmelMultiAgentEnv(SCENARIO)

    @jax.jit
    def scan(key: jax.Array) -> Any:
        _, states = jax.vmap(marl.reset)(jax.random.split(key, MANY))

        def slot(states: State, key: jax.Array) -> Any:
            drawn = jax.random.randint(key, (len(marl.agents), MANY), 0, 6)
            actions = {agent: drawn[row] for row, agent in enumerate(marl.agents)}
            obs, states, rewards, _, _ = jax.vmap(marl.step)(jax.random.split(key, MANY), states, actions)
            return states, (sum(rewards.values()), sum(jnp.sum(seen) for seen in obs.values()))

        return jax.lax.scan(slot, states, jax.random.split(key, 100))

    def run(count: int) -> int:
        jax.block_until_ready([scan(jax.random.key(number)) for number in range(max(1, count // 1000))])
        return max(1, count // 1000) * 100 * MANY

    return [measure(f"JaxMARL style, {MANY} in a scan", run, calls)]


def table_of(rows: list[Measured]) -> Table:
    """Rates side by side; ratio 1 is the functional step called from Python."""
    table = Table(title=f"Adapters on {SCENARIO}")
    table.add_column("", no_wrap=True)
    for name in ("slots/s", "slots per CPU s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    base = rows[0].slots / rows[0].cpu_s
    for row in rows:
        per_cpu_s = row.slots / row.cpu_s
        table.add_row(row.what, f"{row.slots / row.wall_s:,.0f}", f"{per_cpu_s:,.0f}", f"{per_cpu_s / base:.2f}")
    return table


def main() -> int:
    """Measures and prints."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file")
    options = parser.parse_args()
    calls = 400 if options.quick else 2000
    before = os.getloadavg()[0]
    rows = [row for section in (functional, pettingzoo, gymnasium, jaxmarl) for row in section(calls)]
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(table_of(rows))
    console.print(
        f"{os.cpu_count()} cores, load average {before:.1f} before, {os.getloadavg()[0]:.1f} after; above the number "
        "of cores, slots/s are late"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
