"""Tuning of the ladder's two tuned rungs, on traffic that evaluation never sees.

The softmax has one temperature: a grid. The 7-parameter softmax: a random search that narrows around the best
(the cross-entropy method), a few hundred evaluations, as the reference ladder did in under a minute.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gmel.evaluation.progress import Reporter
from gmel.policies.policy import StatelessPolicy
from gmel.policies.rules import Softmax, Softmax7
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.load import digest
from gmel.scenario.schema import Scenario
from gmel.simulator.build import build_environments
from gmel.simulator.environment import Environment, seeds

__all__ = ["TUNING_SEED", "UNTUNED", "Tuned", "shipped", "tune", "tune_scenario"]

TUNING_SEED = 7_000_000
"""First seed of the tuning traffic; evaluation and training use others."""

_FILE = resources.files("gmel.evaluation") / "tuned.json"


@dataclass(frozen=True)
class Tuned:
    """Parameters of L2 and L3 for one scenario, with the cost they reached on the tuning traffic."""

    temperature_s: float
    theta: tuple[float, ...]
    softmax_latency_s: float = float("nan")
    softmax7_latency_s: float = float("nan")
    evaluations: int = 0


UNTUNED = Tuned(math.nan, (math.nan,) * 7)
"""For rules that do not look at it."""


def shipped(scenario_digest: str) -> Tuned | None:
    """Parameters that come with the package for a scenario of this digest, or None."""
    entries: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8")) if _FILE.is_file() else {}
    entry = entries.get(scenario_digest)
    if entry is None:
        return None
    return Tuned(
        temperature_s=float(entry["temperature_s"]),
        theta=tuple(float(v) for v in entry["theta"]),
        softmax_latency_s=float(entry["softmax_latency_s"]),
        softmax7_latency_s=float(entry["softmax7_latency_s"]),
        evaluations=int(entry["evaluations"]),
    )


def as_entry(tuned: Tuned, scenario: str) -> dict[str, object]:
    """A tuned rung as it stands in the package's table."""
    return {"scenario": scenario, **asdict(tuned), "theta": list(tuned.theta)}


def tune(
    environment: Environment,
    episodes: int = 24,
    slots: int = 300,
    generations: int = 16,
    population: int = 24,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Tunes both rungs for least mean latency.

    Every candidate meets the same traffic: `episodes` of `slots` from seed `TUNING_SEED` on, a tenth left out as
    warm-up.
    """
    words = seeds(TUNING_SEED, episodes)
    length = 1 if environment.trace is None else environment.trace.present.shape[0]
    starts = jnp.arange(episodes) * max(1, length // episodes)
    key = jax.random.key(seed)
    unit_s = float(environment.plant.mean_service_s)

    @eqx.filter_jit
    def latency_s(policy: StatelessPolicy) -> Float[Array, ""]:
        return _mean_latency_s(environment, policy, words, starts, key, slots)

    done, total = 0, 14 + generations * population
    temperatures = unit_s * np.geomspace(0.1, 20.0, 14)
    values = np.zeros(14)
    for index, temperature in enumerate(temperatures):
        values[index] = float(latency_s(Softmax(jnp.asarray(temperature, jnp.float32))))
        done += 1
        if progress:
            progress(done, total)
    best_t = float(temperatures[int(np.argmin(values))])
    rng = np.random.default_rng(seed)
    # Start from the tuned softmax, written in the seven parameters.
    center = np.array([0.5, 1 / best_t, 0.5 * unit_s, 1 / best_t, 1 / best_t, -1.0, 1 / best_t])
    spread = np.array([1.0, 0.7 / best_t, unit_s, 0.7 / best_t, 0.7 / best_t, 2.0, 0.7 / best_t])
    best_theta, best_value = center, float(latency_s(Softmax7(jnp.asarray(center, jnp.float32))))
    elite_count = max(3, population // 5)
    for _ in range(generations):
        candidates = center + spread * rng.standard_normal((population, 7))
        candidates[0] = best_theta
        costs = np.zeros(population)
        for index, theta in enumerate(candidates):
            costs[index] = float(latency_s(Softmax7(jnp.asarray(theta, jnp.float32))))
            done += 1
            if progress:
                progress(done, total)
        order = np.argsort(costs)[:elite_count]
        if costs[order[0]] < best_value:
            best_theta, best_value = candidates[order[0]], float(costs[order[0]])
        center = candidates[order].mean(axis=0)
        # A floor under the spread keeps the search from closing in on a lucky draw.
        spread = np.maximum(0.6 * spread + 0.4 * candidates[order].std(axis=0), 0.02 * np.abs(center) + 1e-3)
        spread = np.minimum(spread, 1.5 * np.abs(center) + unit_s)
    return Tuned(best_t, tuple(float(v) for v in best_theta), float(values.min()), best_value, total)


def tune_scenario(scenario: Scenario, generations: int, out: Path | None, report: Reporter) -> dict[str, object]:
    """Tunes a scenario and adds the result to a table of tuned parameters (a JSON file); returns the entry.

    Raises:
        InputError: the table cannot be read or written.
    """
    environments = build_environments(scenario)
    report.stage("tuning L2 and L3")
    tuned = tune(
        environments.train,
        generations=generations,
        progress=lambda done, total: report.advance(done, total, "tuning L2 and L3"),
    )
    entry = as_entry(tuned, f"{scenario.name}, load {environments.load:.3g}")
    if out is not None:
        try:
            table = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
            table[digest(scenario)] = entry
            replace_file(out, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())
        except (OSError, ValueError) as error:
            raise InputError(f"--out {out}: {error}; give a JSON file that can be written") from error
    return {"digest": digest(scenario), **entry}


def _mean_latency_s(
    environment: Environment,
    policy: StatelessPolicy,
    words: jax.Array,
    starts: jax.Array,
    key: jax.Array,
    slots: int,
) -> Float[Array, ""]:
    """Mean latency over the counted slots, without per-task records."""

    def episode(seed: jax.Array, start: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def slot(state: object, slot_key: jax.Array) -> tuple[object, tuple[jax.Array, jax.Array]]:
            action = policy.choose(environment.observe(state, fresh=policy.fresh), slot_key)  # type: ignore[arg-type]
            state, _, outcome = environment.step(state, action)  # type: ignore[arg-type]
            latency_s = outcome.account.latency_s
            return state, (jnp.sum(jnp.where(outcome.final, latency_s, 0.0)), jnp.sum(outcome.final))

        _, (latency, count) = jax.lax.scan(slot, environment.reset(seed, start), jax.random.split(key, slots))
        warm = slots // 10
        return jnp.sum(latency[warm:]), jnp.sum(count[warm:])

    latency, count = jax.vmap(episode)(words, starts, jax.random.split(key, words.shape[0]))
    return jnp.sum(latency) / jnp.maximum(jnp.sum(count), 1)
