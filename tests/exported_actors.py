"""Actors that are exported and read again."""

from pathlib import Path

import numpy as np

from gmel.learning.export import export_policy, load_actor
from gmel.learning.networks import Actor
from gmel.policies.exported import ExportedPolicy
from gmel.simulator.state import Observation

__all__ = ["survives_export"]


def survives_export(actor: Actor, seen: Observation, folder: Path) -> ExportedPolicy:
    """Exports an actor; what is read again must score the options of `seen` as it does, with JAX to the bit."""
    logits, mask = np.asarray(actor(seen)), np.asarray(seen.mask)
    written = export_policy(actor, folder, scenario_digest="x", scenario_name="test", training={"algorithm": "test"})
    again = load_actor(written)
    assert again.scale == actor.scale
    np.testing.assert_array_equal(np.asarray(again(seen)), logits)
    exported = ExportedPolicy.load(written)
    found = exported.logits(*(np.asarray(part) for part in (seen.task, seen.options, seen.mask, seen.present)))
    np.testing.assert_allclose(found[mask], logits[mask], atol=1e-4)
    return exported
