"""Networks: the actor that scores options, the critics that judge joint situations.

The actor is one small network for all devices and all options of a request. It is permutation-equivariant over servers
(each option passes through the same weights and sees the others through their mean) and knows no count of devices or
servers, so a policy trained on one plant runs on another.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from gmel.simulator.scale import Scale
from gmel.simulator.state import (
    OPTION_FEATURES,
    TASK_FEATURES,
    Observation,
    identity,
    option,
    other_cost_s,
    share_weights,
    task,
)

__all__ = [
    "Actor",
    "AttentionCritic",
    "Packing",
    "Values",
    "attention",
    "encode",
    "mean_of_rows",
    "packing",
    "servers_seen",
]

OPTION_INPUTS = 18
"""Of an option; more where the scenario counts more than latency, lets weights be chosen, or hides quality
(`option_inputs`)."""
TASK_INPUTS = 7
"""Of a task; more where the scenario hides quality (`task_inputs`)."""
DIRECT = ("finish", "backlog", "upload", "switch", "service", "download", "local_finish", "capacity")
_LONGEST = 50.0
"""Of a time that enters a sum as it is, in units of `Scale.time_s`."""
# Adam moves every parameter by about the learning rate. The right temperature spans orders of magnitude between plants,
# so that the direct weights must move faster than those of the network.
_TEMPERATURE_PACE, _DIRECT_PACE = 4.0, 2.0


def encode(
    observation: Observation, scale: Scale
) -> tuple[Float[Array, "*batch requests options option_inputs"], Float[Array, "*batch requests task_inputs"]]:
    """Network inputs of the options and of the task: times in units of `scale`, as they are and compressed; and which
    service of which server, and which model, one-hot, where devices tell them apart."""

    def seconds(name: str) -> Float[Array, "*batch requests options"]:
        return option(observation, name) / scale.time_s

    upload, backlog, service = seconds("upload_s"), seconds("backlog_s"), seconds("service_s")
    switch, download = seconds("switch_s"), seconds("download_s")
    deadline = (task(observation, "deadline_s") / scale.time_s)[..., None]
    finish = jnp.maximum(upload, backlog) + switch + service + download
    speed = option(observation, "speed")
    other = [jnp.clip(other_cost_s(observation) / scale.time_s, -8.0, 8.0)] if scale.other_costs else []
    options = jnp.stack(
        [
            option(observation, "local"),
            jnp.log(speed * scale.time_s / scale.work),
            jnp.log(option(observation, "gpus")),
            jnp.log1p(upload),
            jnp.minimum(upload, 4.0),
            jnp.log1p(backlog),
            jnp.minimum(backlog, 8.0),
            jnp.log1p(seconds("age_s")),
            jnp.log1p(seconds("previous_s")),
            jnp.minimum(seconds("previous_s"), 8.0),
            jnp.clip(backlog - seconds("previous_s"), -4.0, 4.0),
            jnp.log1p(seconds("own_unseen_s")),
            jnp.log1p(switch),
            jnp.log1p(service),
            jnp.log1p(download),
            jnp.log1p(finish),
            jnp.tanh(finish - deadline),
            jnp.maximum(upload - backlog, -1.0).clip(max=1.0),
            *other,
        ],
        axis=-1,
    )
    if scale.share_weights:
        options = jnp.concatenate([options, jnp.log(share_weights(observation, len(scale.share_weights)))], axis=-1)
    tasks = jnp.stack(
        [
            jnp.log1p(task(observation, "work") / scale.work),
            task(observation, "work") / scale.work,
            jnp.log1p(task(observation, "size_bit") / scale.size_bit),
            jnp.log1p(jnp.maximum(task(observation, "deadline_s"), 0.0) / scale.time_s),
            jnp.log1p(task(observation, "waited_s") / scale.time_s),
            task(observation, "own_requests") - 1.0,
            jnp.log1p(task(observation, "own_backlog_s") / scale.time_s),
        ],
        axis=-1,
    )
    if scale.identities is None:
        return options, tasks
    # One input for each service of each server, as there may be no likeness between those of unlike servers. What is
    # not among them, the device itself or a server that was not there in training, has zeros.
    who = scale.identities
    number = (identity(observation, "server") - 1) * who.services + identity(observation, "service")
    offered = jax.nn.one_hot(number, who.servers * who.services, dtype=options.dtype)
    model = jax.nn.one_hot(identity(observation, "model"), who.models, dtype=tasks.dtype)
    return jnp.concatenate([options, offered], axis=-1), jnp.concatenate([tasks, model], axis=-1)


def direct(observation: Observation, scale: Scale) -> Float[Array, "*batch requests options direct_inputs"]:
    """What the logits depend on directly (`DIRECT`), times in units of `scale.time_s`, the first is the expected
    latency."""

    def seconds(name: str) -> Float[Array, "*batch requests options"]:
        return jnp.minimum(option(observation, name) / scale.time_s, _LONGEST)

    upload, backlog, service = seconds("upload_s"), seconds("backlog_s"), seconds("service_s")
    switch, download = seconds("switch_s"), seconds("download_s")
    finish = jnp.maximum(upload, backlog) + switch + service + download
    capacity = option(observation, "speed") * option(observation, "gpus") * scale.time_s / scale.work
    local = option(observation, "local")
    columns = [finish, backlog, upload, switch, service, download, local * finish, jnp.log(capacity)]
    if scale.other_costs:
        columns.append(jnp.clip(other_cost_s(observation) / scale.time_s, -50.0, 50.0))
    return jnp.stack(columns, axis=-1)


def option_inputs(scale: Scale) -> int:
    """Number of inputs of an option."""
    offered = 0 if scale.identities is None else scale.identities.servers * scale.identities.services
    return OPTION_INPUTS + scale.other_costs + len(scale.share_weights) + offered


def task_inputs(scale: Scale) -> int:
    """Number of inputs of a task."""
    return TASK_INPUTS + (0 if scale.identities is None else scale.identities.models)


def direct_inputs(scale: Scale) -> int:
    """Number of direct inputs of an option."""
    return len(DIRECT) + scale.other_costs


class Linear(eqx.Module):
    """A linear layer over the last axis, for any leading axes. Orthogonal start, as usual for policy gradients."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, "outputs"]

    def __init__(self, inputs: int, outputs: int, key: PRNGKeyArray, gain: float = 1.4142135) -> None:
        self.weight = jax.nn.initializers.orthogonal(gain)(key, (inputs, outputs), jnp.float32)
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return x @ self.weight + self.bias


class Actor(eqx.Module):
    """Scores the options of each request.

    h_j = f(option_j, task);  c = mean of h over the allowed options;  score_j = g(h_j, c) - w . x_j / T, with x_j the
    expected latency, its parts and the capacity (`direct`), learned weights w that start at the expected latency alone,
    and a learned temperature T. So the tuned softmaxes of the ladder (L2, and L3 up to its threshold) are in its reach
    without the network. In communicating mode the requests of a slot exchange one round of messages: for
    each option, attention over the other requests' h_j, so that they can stay out of each other's way.
    """

    scale: Scale = eqx.field(static=True)
    width: int = eqx.field(static=True)
    communicating: bool = eqx.field(static=True)
    option_in: Linear
    task_in: Linear
    mix: Linear
    out: Linear
    sharpness: Float[Array, ""]
    """ln(1 / T), slowed down by its pace."""
    weights: Float[Array, "direct_inputs"]
    """What is added to w, slowed down by its pace."""
    message: "Message | None"

    def __init__(
        self,
        scale: Scale,
        key: PRNGKeyArray,
        width: int = 32,
        temperature: float = 1.0,
        communicating: bool = False,
    ) -> None:
        keys = jax.random.split(key, 5)
        self.scale, self.width, self.communicating = scale, width, communicating
        self.option_in = Linear(option_inputs(scale), width, keys[0])
        self.task_in = Linear(task_inputs(scale), width, keys[1])
        inputs = 3 * width if communicating else 2 * width
        self.mix = Linear(inputs, width, keys[2])
        # A small last layer: the untrained actor is the softmax of expected latencies.
        self.out = Linear(width, 1, keys[3], gain=0.01)
        self.sharpness = jnp.asarray(-jnp.log(temperature) / _TEMPERATURE_PACE, jnp.float32)
        self.weights = jnp.zeros(direct_inputs(scale))
        self.message = Message(width, keys[4]) if communicating else None

    def __call__(self, observation: Observation) -> Float[Array, "*batch requests options"]:
        """Logits; masked options are minus infinity."""
        options, tasks = encode(observation, self.scale)
        hidden = jax.nn.relu(self.option_in(options) + self.task_in(tasks)[..., None, :])
        allowed = observation.mask[..., None]
        mean = jnp.sum(jnp.where(allowed, hidden, 0.0), axis=-2) / jnp.maximum(jnp.sum(allowed, axis=-2), 1)
        # Every option meets the same weights; the mean is where it learns of the others.
        first, second = self.mix.weight[: self.width], self.mix.weight[self.width : 2 * self.width]
        mixed = hidden @ first + (mean @ second)[..., None, :] + self.mix.bias
        if self.message is not None:
            received = self.message(hidden, observation.present)
            mixed = mixed + received @ self.mix.weight[2 * self.width :]
        learned = self.out(jax.nn.relu(mixed))[..., 0]
        cost = direct(observation, self.scale) @ self.direct_weights()
        return jnp.where(observation.mask, learned - cost, -jnp.inf)

    def direct_weights(self) -> Float[Array, "direct_inputs"]:
        """w / T."""
        first = jnp.zeros(self.weights.shape).at[0].set(1.0)
        if self.scale.other_costs:
            first = first.at[-1].set(1.0)
        return jnp.exp(_TEMPERATURE_PACE * self.sharpness) * (first + _DIRECT_PACE * self.weights)


class Message(eqx.Module):
    """One round of messages: per option, attention of each request over the other requests of the slot."""

    query: Linear
    key: Linear
    value: Linear

    def __init__(self, width: int, key: PRNGKeyArray) -> None:
        keys = jax.random.split(key, 3)
        self.query, self.key, self.value = (Linear(width, width, k, gain=1.0) for k in keys)

    def __call__(
        self, hidden: Float[Array, "*batch requests options width"], present: Bool[Array, "*batch requests"]
    ) -> Float[Array, "*batch requests options width"]:
        """What each request hears about each option. Sums, not means: how many are coming matters."""
        by_option = jnp.swapaxes(hidden, -2, -3)
        others = present[..., None, :] & ~jnp.eye(present.shape[-1], dtype=bool)
        weight = jax.nn.sigmoid(
            jnp.einsum("...ik,...jk->...ij", self.query(by_option), self.key(by_option)) / hidden.shape[-1] ** 0.5
        )
        weight = jnp.where(others[..., None, :, :], weight, 0.0)
        heard = jnp.einsum("...ij,...jk->...ik", weight, self.value(by_option))
        return jnp.swapaxes(heard, -2, -3)


def attention(
    query: Float[Array, "*batch n width"],
    key: Float[Array, "*batch m width"],
    value: Float[Array, "*batch m width"],
    allowed: Bool[Array, "*batch n m"],
    heads: int,
) -> Float[Array, "*batch n width"]:
    """Multi-head scaled dot-product attention; a row that may attend to nobody hears zero."""

    def split(x: Float[Array, "*batch k width"]) -> Float[Array, "*batch k heads part"]:
        return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

    scores = jnp.einsum("...ihd,...jhd->...hij", split(query), split(key)) / (query.shape[-1] / heads) ** 0.5
    scores = jnp.where(allowed[..., None, :, :], scores, -1e9)
    weights = jnp.where(allowed[..., None, :, :], jax.nn.softmax(scores, axis=-1), 0.0)
    heard = jnp.einsum("...hij,...jhd->...ihd", weights, split(value))
    return heard.reshape(*heard.shape[:-2], query.shape[-1])


class Packing(NamedTuple):
    """Where the rows that are present stand when the empty ones between them are left out.

    Most rows of a request table are empty; work per row is done on the packed ones.
    """

    chosen: Int[Array, "rows"]
    place: Int[Array, "all"]
    present: Bool[Array, "*batch requests"]

    def pack(self, x: Shaped[Array, "..."]) -> Shaped[Array, "rows ..."]:
        """The rows that are present, one after the other; behind them rows without meaning."""
        return x.reshape(-1, *x.shape[self.present.ndim :])[self.chosen]

    def spread(self, packed: Float[Array, "rows width"]) -> Float[Array, "*batch requests width"]:
        """Packed rows back in their table, zero where no row is present."""
        table = jnp.where(self.present.reshape(-1)[:, None], packed[self.place], 0.0)
        return table.reshape(*self.present.shape, packed.shape[-1])


def packing(present: Bool[Array, "*batch requests"], rows: int | None = None) -> Packing:
    """Packs a table into `rows` rows (static; default: enough for any table)."""
    flat = present.reshape(-1)
    rows = flat.shape[0] if rows is None else rows
    chosen = jnp.nonzero(flat, size=rows, fill_value=0)[0]
    # A row beyond the capacity takes the last place: rare by the choice of `rows`, and harmless in a critic.
    return Packing(chosen, jnp.clip(jnp.cumsum(flat) - 1, 0, rows - 1), present)


def servers_seen(
    fresh: Observation, scale: Scale, own_waits: bool
) -> Float[Array, "*batch views servers server_inputs"]:
    """Inputs of the servers for critics: their backlog, speed and GPUs, at the first level.

    They are the same in every row, present or not, and one view stands for all; but with `own_waits`
    (`gmel.simulator.plant.Switches.own_waits`) each request has a view of its own.
    """
    places = fresh.mask.shape[-1] // scale.levels
    views = slice(None) if own_waits else slice(1)

    def column(name: str) -> Float[Array, "*batch views servers"]:
        return option(fresh, name)[..., views, 1:places]

    wait, speed = column("backlog_s") / scale.time_s, column("speed") * scale.time_s / scale.work
    # A server that is away, or has too few GPUs for a gang, says a time that stands for never.
    wait = jnp.minimum(wait, _LONGEST)
    return jnp.stack([jnp.log1p(wait), wait, jnp.log(speed), jnp.log(column("gpus"))], axis=-1)


def mean_of_rows(x: Float[Array, "..."], present: Bool[Array, "*batch requests"]) -> Float[Array, "..."]:
    """Mean of `x` [*batch, views, ...] over the requests present, all rows where none is; one view is the mean."""
    axis = present.ndim - 1
    if x.shape[axis] == 1:
        return jnp.squeeze(x, axis)
    counted = present | ~jnp.any(present, axis=-1, keepdims=True)
    counted = counted.reshape(*counted.shape, *(1,) * (x.ndim - counted.ndim))
    return jnp.sum(jnp.where(counted, x, 0.0), axis=axis) / jnp.sum(counted, axis=axis)


class Values(NamedTuple):
    """What the critic expects: the reward of each request itself, and the return of the team."""

    own: Float[Array, "*batch requests"]
    team: Float[Array, "*batch"]


class AttentionCritic(eqx.Module):
    """Centralised critic: one token per request, multi-head attention over the requests of the slot.

    In the line of MAAC (Iqbal and Sha 2019): keys, queries and values are shared by all agents, so the critic takes any
    number of them. It sees the servers as they are, uploads in flight included (training only); with `own_waits` as
    each request does, and the team as all of them on average.
    """

    scale: Scale = eqx.field(static=True)
    heads: int = eqx.field(static=True)
    own_waits: bool = eqx.field(static=True)
    option_in: Linear
    token_in: Linear
    server_in: Linear
    query: Linear
    key: Linear
    value: Linear
    own_hidden: Linear
    own_out: Linear
    team_hidden: Linear
    team_out: Linear

    def __init__(
        self, scale: Scale, key: PRNGKeyArray, width: int = 32, heads: int = 4, own_waits: bool = False
    ) -> None:
        keys = jax.random.split(key, 10)
        self.scale, self.heads, self.own_waits = scale, heads, own_waits
        half = width // 2
        self.option_in = Linear(option_inputs(scale), half, keys[0])
        self.token_in = Linear(2 * half + task_inputs(scale), width, keys[1])
        self.server_in = Linear(4, half, keys[2])
        self.query, self.key, self.value = (Linear(width, width, k, gain=1.0) for k in keys[3:6])
        self.own_hidden = Linear(2 * width + half, width, keys[6])
        self.own_out = Linear(width, 1, keys[7], gain=0.1)
        self.team_hidden = Linear(width + half + 2, width, keys[8])
        self.team_out = Linear(width, 1, keys[9], gain=0.1)

    def __call__(self, fresh: Observation, rows: int | None = None) -> Values:
        """Values of a batch of slots from the fresh observation, worked out on `rows` packed rows (static)."""
        packed = packing(fresh.present, rows)
        inner = jax.tree.map(packed.pack, fresh)
        options, tasks = encode(inner, self.scale)
        hidden = jax.nn.relu(self.option_in(options))
        allowed = inner.mask[..., None]
        mean = jnp.sum(jnp.where(allowed, hidden, 0.0), axis=-2) / jnp.maximum(jnp.sum(allowed, axis=-2), 1)
        best = jnp.max(jnp.where(allowed, hidden, 0.0), axis=-2)
        token = jax.nn.relu(self.token_in(jnp.concatenate([mean, best, tasks], axis=-1)))
        present = fresh.present
        count = present.shape[-1]
        others = present[..., None, :] & ~jnp.eye(count, dtype=bool) & present[..., :, None]
        triple = jnp.concatenate([self.query(token), self.key(token), self.value(token)], axis=-1)
        query, key, value = jnp.split(packed.spread(triple), 3, axis=-1)
        heard = packed.pack(attention(query, key, value, others, self.heads))
        crowd = jnp.sum(present, axis=-1, keepdims=True) / 8.0
        load = servers_seen(fresh, self.scale, self.own_waits)
        views = jnp.mean(jax.nn.relu(self.server_in(load)), axis=-2)
        servers = mean_of_rows(views, present)
        total = jnp.sum(packed.spread(token), axis=-2) / 8.0
        backlog = mean_of_rows(jnp.mean(load[..., 1], axis=-1, keepdims=True), present)
        team = self.team_hidden(jnp.concatenate([total, servers, crowd, backlog], axis=-1))
        context = packed.pack(jnp.broadcast_to(views, (*present.shape, views.shape[-1])))
        own = self.own_hidden(jnp.concatenate([token, heard, context], axis=-1))
        return Values(packed.spread(self.own_out(jax.nn.relu(own)))[..., 0], self.team_out(jax.nn.relu(team))[..., 0])


assert len(OPTION_FEATURES) == 11 and len(TASK_FEATURES) == 6  # `encode` reads every feature
