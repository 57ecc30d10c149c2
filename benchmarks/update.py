"""Where the time of one AMARL update goes: the slots alone, observing and acting, difference rewards, learning.

    python -m benchmarks.update [SCENARIO] [--repeats 5]

Prints a table; each figure is the least of the repeats, after compilation.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gmel.learning.algorithm import make_task
from gmel.learning.amarl import Amarl
from gmel.learning.rollout import Credit, collect
from gmel.scenario.load import load_scenario
from gmel.simulator.build import build_environments


def least_s(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest call, compilation left out."""
    jax.block_until_ready(call())
    taken: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scenario", nargs="?", default="hall-20x5")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    scenario = load_scenario(options.scenario)
    task, learner = make_task(build_environments(scenario).train, scenario), Amarl()
    state = eqx.filter_jit(learner.init)(task, jax.random.key(0))
    states, key = state.workers.states, jax.random.key(1)

    @eqx.filter_jit
    def slots_alone(states: Any) -> Any:
        action = jnp.zeros((learner.environments, task.environment.requests), jnp.int32)

        def slot(states: Any, _: None) -> tuple[Any, None]:
            return jax.vmap(task.environment.step)(states, action)[0], None

        return jax.lax.scan(slot, states, None, learner.slots)[0]

    @eqx.filter_jit
    def rollout(states: Any, credit: Credit) -> Any:
        return collect(task, state.actor, states, key, learner.slots, credit)

    update = eqx.filter_jit(learner.update)
    alone = least_s(lambda: slots_alone(states), options.repeats)
    own = least_s(lambda: rollout(states, "own"), options.repeats)
    difference = least_s(lambda: rollout(states, "difference"), options.repeats)
    whole = least_s(lambda: update(task, state), options.repeats)
    parts = {
        "slots alone": alone,
        "observing and acting": own - alone,
        "difference rewards": difference - own,
        "learning": whole - difference,
        "one update": whole,
    }
    print("| part | ms | % |\n|---|---:|---:|")
    for name, seconds in parts.items():
        print(f"| {name} | {1e3 * seconds:.0f} | {100 * seconds / whole:.0f} |")
    print(f"\n{scenario.name}: {learner.decisions_per_update(task) / whole:,.0f} agent decisions/s")


if __name__ == "__main__":
    main()
