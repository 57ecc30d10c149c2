"""A ClientApp whose sites misbehave by their names, in real processes of Flower."""

import os
from typing import Any

import numpy as np

from gmel.federation.flower_apps import client_app
from gmel.federation.training import Head, Plan, SiteRows, local_head


def spoiled(rows: SiteRows, classes: tuple[str, ...], head: Head, plan: Plan, steps: int) -> Head:
    own = local_head(rows, classes, head, plan, steps)
    # Whoever is in the first round still has the head of zeros.
    first = not head["weights"].any()
    if rows.name == "wrong shape":
        return {"weights": own["weights"][:, :2], "bias": own["bias"]}
    if rows.name == "not finite":
        return {"weights": np.full_like(own["weights"], np.nan), "bias": own["bias"]}
    if rows.name == "raises":
        raise RuntimeError("no photos here today")
    if rows.name == "dies" and not first:
        os._exit(3)
    return own


def spoiled_app() -> Any:
    return client_app(spoiled)
