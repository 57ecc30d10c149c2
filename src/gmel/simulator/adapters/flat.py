"""The flat view: an observation of the simulator as vectors of fixed length, of order one, for ordinary networks.

The simulator itself speaks SI units and tables of requests; learners with a multilayer perceptron want a vector. Times
are in units of `Scale.time_s` and compressed by sign(x) log(1 + |x|), so that a backlog of minutes does not drown
milliseconds.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmel.simulator.environment import Environment
from gmel.simulator.scale import Scale
from gmel.simulator.state import OTHER_COST, Observation, identity, option, other_cost_s, task

__all__ = ["BOUND", "FLAT_OPTION", "FLAT_TASK", "compressed", "flat_columns", "flat_rows", "flat_width"]

BOUND = 20.0
"""All entries lie within [-BOUND, BOUND]: half a billion times the scale is cut off."""

FLAT_TASK = ("has_task", "work", "size_bit", "deadline_s", "waited_s", "own_requests", "own_backlog_s")
"""First columns of a flat row. `has_task` is 1 or 0; `own_requests` counts the other requests of the device. Where
devices do not know the quality of their options, one column for each model comes behind, 1 for that of the request."""

FLAT_OPTION = (
    "allowed",
    "upload_s",
    "backlog_s",
    "switch_s",
    "service_s",
    "download_s",
    "previous_s",
    "own_unseen_s",
    "expected_s",
)
"""Columns of each option, option 0 first. `allowed` is the mask; `expected_s` = max(upload, backlog) + switch + service
+ download. What is constant on one plant (`local`, `speed`, `gpus`, `age_s`, weights, which server and service an
option is) is left out. Where the scenario counts more than latency, `other_cost_s` comes behind."""


def flat_columns(environment: Environment, requests: int = 1) -> tuple[str, ...]:
    """Names of the entries of a flat vector of `requests` rows of this environment, in order.

    Example:
        >>> from gmel.scenario.load import load_scenario
        >>> flat_columns(Environment.from_scenario(load_scenario("hall-20x5")))[7:9]
        ('option 0 allowed', 'option 0 upload_s')
    """
    sizes = environment.plant.switches
    names = (*FLAT_OPTION, OTHER_COST) if sizes.other_costs else FLAT_OPTION
    models = sizes.identities.models if sizes.identities else 0
    task_names = (*FLAT_TASK, *(f"model {number}" for number in range(models)))
    row = (*task_names, *(f"option {choice} {name}" for choice in range(environment.options) for name in names))
    return row if requests == 1 else tuple(f"request {k} {name}" for k in range(requests) for name in row)


def flat_width(environment: Environment) -> int:
    """Length of the flat row of one request of this environment."""
    return len(flat_columns(environment))


def compressed(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """sign(x) log(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def flat_rows(observation: Observation, scale: Scale) -> Float[Array, "requests width"]:
    """Each row of the table of requests as a vector, float32; rows without a request are zero."""

    def times(name: str) -> Float[Array, "requests options"]:
        return option(observation, name) / scale.time_s

    start = jnp.maximum(times("upload_s"), times("backlog_s"))
    expected = start + times("switch_s") + times("service_s") + times("download_s")
    columns = [observation.mask.astype(expected.dtype)]
    columns += [compressed(times(name)) for name in FLAT_OPTION[1:-1]]
    columns.append(compressed(expected))
    if scale.other_costs:
        columns.append(compressed(jnp.asarray(other_cost_s(observation)) / scale.time_s))
    options = jnp.stack(columns, axis=-1)
    tasks = jnp.stack(
        [
            jnp.ones_like(expected[:, 0]),
            compressed(task(observation, "work") / scale.work),
            compressed(task(observation, "size_bit") / scale.size_bit),
            *(compressed(task(observation, name) / scale.time_s) for name in ("deadline_s", "waited_s")),
            task(observation, "own_requests") - 1.0,
            compressed(task(observation, "own_backlog_s") / scale.time_s),
        ],
        axis=-1,
    )
    if scale.identities is not None:
        model = jax.nn.one_hot(identity(observation, "model"), scale.identities.models, dtype=tasks.dtype)
        tasks = jnp.concatenate([tasks, model], axis=-1)
    rows = jnp.concatenate([tasks, options.reshape(options.shape[0], -1)], axis=1)
    rows = jnp.where(observation.present[:, None], jnp.clip(rows, -BOUND, BOUND), 0.0)
    return jax.lax.convert_element_type(rows, jnp.float32)
