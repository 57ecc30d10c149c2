"""The policy of a run folder as an artefact of its own, checked against the network it came from."""

import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gmel.evaluation.job import open_run
from gmel.learning.export import load_actor
from gmel.policies.exported import ExportedPolicy
from gmel.scenario.errors import InputError
from gmel.simulator.build import build_environments
from gmel.simulator.environment import seeds

__all__ = ["TOLERANCE", "export_run", "largest_difference"]

TOLERANCE = 1e-5
_SLOTS = 64


def export_run(run: Path, out: Path) -> float:
    """Copies the policy of a run to `out`; returns the largest difference of its logits from JAX on the run's plant.

    Raises:
        InputError: no run, no policy in it, or `out` exists or cannot be written.
    """
    if not (run / "policy").is_dir():
        raise InputError(f"{run}: no policy in it; train with `gmel run` first")
    if out.exists():
        raise InputError(f"--out {out}: exists; choose another folder")
    difference = largest_difference(run)
    if difference > TOLERANCE:
        raise RuntimeError(f"ONNX and JAX differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(run / "policy", part)
        part.replace(out)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    return difference


def largest_difference(run: Path) -> float:
    """Largest difference of the logits of allowed options (relative above 1), over a few slots of the run's traffic."""
    scenario, job = open_run(run)
    environment = build_environments(scenario, job.trace).test
    actor, exported = load_actor(run / "policy"), ExportedPolicy.load(run / "policy")
    state = jax.tree.map(lambda leaf: leaf[0], jax.vmap(environment.reset)(seeds(0, 1)))
    step = eqx.filter_jit(environment.step)
    worst = 0.0
    for slot in range(_SLOTS):
        observation = environment.observe(state)
        logits = np.asarray(actor(observation))
        mask = np.asarray(observation.mask)
        other = exported.logits(
            np.asarray(observation.task), np.asarray(observation.options), mask, np.asarray(observation.present)
        )
        # Relative to large logits: float32 cannot do better, and a softmax does not notice.
        ours, theirs = (np.where(mask, scores, 0.0) for scores in (logits, other))
        worst = max(worst, float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(ours)), initial=0.0)))
        action = jax.random.categorical(jax.random.key(slot), jnp.asarray(logits))
        state = step(state, action)[0]
    return worst
