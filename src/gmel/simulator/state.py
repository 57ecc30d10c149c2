"""What the environment holds, shows and reports. Axes: see `docs/architecture.md`."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.physics.mobility import Walk
from gmel.physics.queueing import Servers

__all__ = [
    "OPTION_FEATURES",
    "OPTION_IDENTITY",
    "OTHER_COST",
    "SHARE_WEIGHTS",
    "TASK_FEATURES",
    "TASK_IDENTITY",
    "Account",
    "Broadcasts",
    "CacheLoads",
    "CacheStatistics",
    "GangNews",
    "Gangs",
    "Links",
    "Motion",
    "Observation",
    "Outcome",
    "Parts",
    "Requests",
    "Reward",
    "Sent",
    "SharedTask",
    "State",
    "Uploads",
    "chosen_weights",
    "identity",
    "option",
    "other_cost_s",
    "share_weights",
    "task",
]

TASK_FEATURES = ("work", "size_bit", "deadline_s", "waited_s", "own_requests", "own_backlog_s")
"""Columns of `Observation.task`, SI units: work [work units], size to upload [bit], time from the decision to the
deadline [s], time waited since generation [s], requests of the device in this slot, backlog of the device itself
[s]."""

OPTION_FEATURES = (
    "local",
    "speed",
    "gpus",
    "upload_s",
    "backlog_s",
    "age_s",
    "switch_s",
    "service_s",
    "download_s",
    "previous_s",
    "own_unseen_s",
)
"""Columns of `Observation.options`, SI units: 1 for the device itself, work units per second, number of GPUs, estimated
upload time, last known time until a GPU is free, age of that knowledge, expected model load time (0 if resident),
service time, download time; and what a device remembers: the backlog of the broadcast before the last (what the others
saw when they placed the work that is not in the last one yet), and its own work sent to the server since."""


OTHER_COST = "other_cost_s"
"""One more column of `Observation.options`, only where the scenario counts more than latency and deadline: what the
option costs beside them (energy, price, minus quality), in seconds of latency at the weights of the reward. It may be
negative."""

OPTION_IDENTITY = ("server", "service")
"""Two more columns of `Observation.options` behind `OTHER_COST`, only where devices do not know the quality of their
options (`slot.quality_known = false`) and have to learn it: number of the server, 0 for the device itself, and of the
service there, from 0."""

TASK_IDENTITY = ("model",)
"""One more column of `Observation.task` likewise: number of the model that the request asks for, from 0."""


SHARE_WEIGHTS = ("band_weight", "cpu_weight")
"""The last columns of `Observation.options`, each only where devices choose among several: the weight of the upload in
its cell and of the task at its server (1 at the device itself, where nothing is shared)."""


def chosen_weights(band: Sequence[float] | None, cpu: Sequence[float] | None) -> tuple[str, ...]:
    """Which of `SHARE_WEIGHTS` options differ in, from the weights that there are to choose from."""
    return tuple(name for name, values in zip(SHARE_WEIGHTS, (band, cpu), strict=True) if len(values or ()) > 1)


def task(observation: "Observation", name: str) -> Float[Array, "*batch requests"]:
    """Column `name` of the task features."""
    return observation.task[..., TASK_FEATURES.index(name)]


def option(observation: "Observation", name: str) -> Float[Array, "*batch requests options"]:
    """Column `name` of the option features."""
    return observation.options[..., OPTION_FEATURES.index(name)]


def other_cost_s(observation: "Observation") -> Float[Array, "*batch requests options"] | float:
    """What each option costs beside its latency (`OTHER_COST`); 0 where nothing else counts."""
    if observation.options.shape[-1] == len(OPTION_FEATURES):
        return 0.0
    return observation.options[..., len(OPTION_FEATURES)]


def identity(
    observation: "Observation", name: Literal["server", "service", "model"]
) -> Int[Array, "*batch requests"] | Int[Array, "*batch requests options"]:
    """Number of the server or service of each option, or of the model of each request; only where quality is hidden."""
    if name == "model":
        return observation.task[..., len(TASK_FEATURES)].astype(jnp.int32)
    return observation.options[..., len(OPTION_FEATURES) + 1 + OPTION_IDENTITY.index(name)].astype(jnp.int32)


def share_weights(observation: "Observation", count: int) -> Float[Array, "*batch requests options weights"]:
    """The columns of `SHARE_WEIGHTS`, of which the scenario has `count`."""
    columns = observation.options.shape[-1]
    return observation.options[..., columns - count :]


class Observation(NamedTuple):
    """What the devices with a request know when they decide: one row per request, one option per place to run.

    Option 0 is the device itself, option j the server j - 1. Where steps, power, shares, a service or a number of parts
    can be chosen too, the places are repeated, one level after the other (`gmel.simulator.levels`). Rows that are not
    `present` are padding; their mask allows option 0 alone.
    """

    present: Bool[Array, "*batch requests"]
    device: Int[Array, "*batch requests"]
    task: Float[Array, "*batch requests task_features"]
    options: Float[Array, "*batch requests options option_features"]
    mask: Bool[Array, "*batch requests options"]
    parts_s: Float[Array, "*batch requests options servers"] | None = None
    """Service time that each option puts on each server; only where tasks can be split."""


class Requests(NamedTuple):
    """The requests that are decided at one slot start. With explicit arrays of these nothing is drawn at random.

    `generated_s` is relative to the decision and not positive; `deadline_s` counts from generation; `work` is what
    the device knows, `noise` multiplies it into what the server finds; `fade` is the power gain of small-scale fading
    of each link, `outage_s` the time until that link can carry anything.
    """

    present: Bool[Array, "*slots requests"]
    device: Int[Array, "*slots requests"]
    generated_s: Float[Array, "*slots requests"]
    size_bit: Float[Array, "*slots requests"]
    bits_out: Float[Array, "*slots requests"]
    work: Float[Array, "*slots requests"]
    noise: Float[Array, "*slots requests"]
    model: Int[Array, "*slots requests"]
    load_s: Float[Array, "*slots requests"]
    deadline_s: Float[Array, "*slots requests"]
    fade: Float[Array, "*slots requests servers"]
    outage_s: Float[Array, "*slots requests servers"]
    steps: Float[Array, "*slots requests"] | None = None
    """Denoising steps asked for; only where there is a quality or steps can be chosen."""
    work_per_step: Float[Array, "*slots requests"] | None = None
    """Part of the work that one step costs; only where steps can be chosen."""
    gang: Int[Array, "*slots requests"] | None = None
    """Which of the gangs of its model it asks for; only with gangs."""


class Links(NamedTuple):
    """State of the links: mean SNR (linear) at full bandwidth and full power. Fixed for an episode unless devices
    move."""

    uplink_snr: Float[Array, "devices servers"]
    downlink_snr: Float[Array, "devices servers"]
    rate_bps: Float[Array, "devices servers"] | None = None
    """Only where the rates are fixed."""
    fading: tuple[Float[Array, "devices servers"], Float[Array, "devices servers"]] | None = None
    """Real and imaginary part of the small-scale gains of this slot; only where they are correlated in time."""


class SharedTask(NamedTuple):
    """What else is known of a task where servers share their time (see `physics/sharing.py`)."""

    left_s: Float[Array, "uploads"]
    serving: Bool[Array, "uploads"]
    start_s: Float[Array, "uploads"]
    switch_s: Float[Array, "uploads"]


class Parts(NamedTuple):
    """The parts of tasks that are split over servers; times as in :class:`Uploads`.

    What a server began on is told by `start_s`, `switch_s` and `end_s`; of a part still on its way they are projected.
    """

    present: Bool[Array, "uploads parts"]
    server: Int[Array, "uploads parts"]
    upload_start_s: Float[Array, "uploads parts"]
    ready_s: Float[Array, "uploads parts"]
    service_s: Float[Array, "uploads parts"]
    download_s: Float[Array, "uploads parts"]
    start_s: Float[Array, "uploads parts"]
    switch_s: Float[Array, "uploads parts"]
    end_s: Float[Array, "uploads parts"]
    cell: Int[Array, "uploads parts"] | None = None
    sent_s: Float[Array, "uploads parts"] | None = None


class Uploads(NamedTuple):
    """Tasks on their way to a server; where servers share their time, until they end.

    Times are relative to the start of the current slot.
    """

    present: Bool[Array, "uploads"]
    device: Int[Array, "uploads"]
    server: Int[Array, "uploads"]
    decided_slot: Int[Array, "uploads"]
    row: Int[Array, "uploads"]
    decided_s: Float[Array, "uploads"]
    generated_s: Float[Array, "uploads"]
    upload_start_s: Float[Array, "uploads"]
    ready_s: Float[Array, "uploads"]
    service_s: Float[Array, "uploads"]
    model: Int[Array, "uploads"]
    load_s: Float[Array, "uploads"]
    download_s: Float[Array, "uploads"]
    deadline_s: Float[Array, "uploads"]
    latency_s: Float[Array, "uploads"]
    cost: Float[Array, "uploads"]
    """What the task was last projected to take and to cost (see Reward)."""
    shared: SharedTask | None
    """Only where servers share their time."""
    cell: Int[Array, "uploads"] | None = None
    """The cell that the upload uses, where it is not always that of its server."""
    sent_s: Float[Array, "uploads"] | None = None
    """When it leaves the cell for the server, likewise."""
    quality: Float[Array, "uploads"] | None = None
    """Quality of the result, where it is modelled."""
    tx_power_w: Float[Array, "uploads"] | None = None
    """Transmit power, where it can be chosen."""
    units: Float[Array, "uploads"] | None = None
    """Part of the capacity of its server that it takes, where servers have one."""
    gpus: Int[Array, "uploads"] | None = None
    """GPUs that it needs at once, with gangs."""
    band_weight: Float[Array, "uploads"] | None = None
    """Weight of the upload in its cell, where it can be chosen."""
    cpu_weight: Float[Array, "uploads"] | None = None
    """Weight of the task at its server, likewise."""
    parts: Parts | None = None
    """Where tasks can be split. Its own `server` is then the one that was chosen, its times are those of the part that
    ends last."""


class Broadcasts(NamedTuple):
    """What the servers announced at the last slot starts, newest first; one more than the oldest in use."""

    wait_s: Float[Array, "ages servers"]
    uploads: Float[Array, "ages servers"]
    """How many use its cell; where they have weights, the sum of these."""
    resident: Bool[Array, "ages servers models"]
    up: Bool[Array, "ages servers"] | None = None
    """Whether the server was up and there; only with failures, or where servers come and go."""
    gangs: "GangNews | None" = None
    """What is known of the GPUs one by one; only with gangs."""
    weight: Float[Array, "ages servers"] | None = None
    """Sum of the weights of the tasks that have arrived; only where they have weights."""
    interference: Float[Array, "ages servers"] | None = None
    """What its cell hears of the others, over its noise; only with interference."""


class GangNews(NamedTuple):
    """What a server says of its GPUs."""

    free_s: Float[Array, "ages servers gpus"]
    """Time until 1, 2, ... GPUs are free for the next task (absent: infinite)."""
    size: Int[Array, "ages servers gpus"]
    """Size of the loaded group of each GPU, 0 for none."""
    model: Int[Array, "ages servers gpus"]
    """Model that it holds."""


class Gangs(NamedTuple):
    """The loaded groups of GPUs (see `gmel.physics.gang`)."""

    head_s: Float[Array, "servers"]
    group: Int[Array, "servers gpus"]
    group_model: Int[Array, "servers gpus"]


class Sent(NamedTuple):
    """What the devices remember of their requests of the last slots, newest first: who sent how much work where.

    `server` is the number of servers where nothing was sent.
    """

    device: Int[Array, "ages requests"]
    server: Int[Array, "ages requests"]
    nominal_s: Float[Array, "ages requests"]


class CacheStatistics(NamedTuple):
    """What a choice of the models to hold may look at (see `gmel.simulator.caching`), beside the plant."""

    asked: Int[Array, "servers models"]
    """Requests since the last choice, by the cell of the device; at a server without a cell, of all devices."""
    resident: Bool[Array, "servers models"]
    """Models held now."""


class CacheLoads(NamedTuple):
    """The models that were chosen at the end of a slot and not held before."""

    models: Int[Array, "servers"]
    """How many."""
    load_s: Float[Array, "servers"]
    energy_j: Float[Array, "servers"]


class Motion(NamedTuple):
    """Where the devices are, what their links follow from there, and where they go (see `gmel.physics.mobility`)."""

    position_m: Float[Array, "devices 2"]
    sight: Float[Array, "devices servers"]
    """Standard normal that decides on the line of sight."""
    shadow: Float[Array, "devices servers"]
    """Shadowing in standard deviations."""
    walk: Walk | None
    travelled_m: Float[Array, "devices"] | None
    speed_m_s: Float[Array, "devices"] | None
    """Way along its route and speed of each device; only on routes."""


class State(NamedTuple):
    """One environment at a slot start, after the requests came and before they are decided."""

    seed: UInt32[Array, "2"]
    slot: Int[Array, ""]
    trace_slot: Int[Array, ""]
    links: Links
    requests: Requests
    device_backlog_s: Float[Array, "devices"]
    servers: Servers
    uploads: Uploads
    broadcasts: Broadcasts
    sent: "Sent"
    lost: Int[Array, ""]
    """Uploads that did not fit the table of uploads in flight since the reset; must stay 0."""
    speed: Float[Array, "servers"] | None = None
    """Relative speed of each server in this slot (0: down); only with failures or stragglers."""
    arrivals: Float[Array, ""] | None = None
    """What the law of the arrivals remembers (`gmel.simulator.arrivals`)."""
    gangs: Gangs | None = None
    radio_backlog_s: Float[Array, "devices"] | None = None
    """Until when each device still sends; only where it sends one task at a time."""
    motion: Motion | None = None
    battery_j: Float[Array, "devices"] | None = None
    """Energy left; only with batteries."""
    asked: Int[Array, "servers models"] | None = None
    """Requests since the models to hold were last chosen, by cell; only where they are chosen."""


class Reward(NamedTuple):
    """Reward of one slot (negative cost, equation (15)).

    `own`: of each request, with its projected latency. `team`: of all requests together plus the changes of earlier
    projections; summed over an episode it is exactly minus the cost of all tasks. `mixed`: (1 - mu) own + mu team.
    """

    own: Float[Array, "requests"]
    team: Float[Array, ""]
    mixed: Float[Array, "requests"]


class Account(NamedTuple):
    """Latency parts and energy of a task. The parts add up to the latency from generation."""

    wait_to_slot_s: Float[Array, "rows"]
    upload_s: Float[Array, "rows"]
    queue_s: Float[Array, "rows"]
    switch_s: Float[Array, "rows"]
    service_s: Float[Array, "rows"]
    download_s: Float[Array, "rows"]
    energy_j: Float[Array, "rows"]

    @property
    def latency_s(self) -> Float[Array, "*batch rows"]:
        """Latency from generation: the sum of the parts."""
        before_s = self.wait_to_slot_s + self.upload_s + self.queue_s
        return before_s + self.switch_s + self.service_s + self.download_s


class Outcome(NamedTuple):
    """Records of the tasks whose fate became final in a slot (`final` marks them), and the backlog of the servers.

    Times are relative to the start of the slot in which the task became final; `decided_slot` and `row` identify it.
    """

    final: Bool[Array, "rows"]
    decided_slot: Int[Array, "rows"]
    row: Int[Array, "rows"]
    device: Int[Array, "rows"]
    option: Int[Array, "rows"]
    model: Int[Array, "rows"]
    generated_s: Float[Array, "rows"]
    decided_s: Float[Array, "rows"]
    upload_start_s: Float[Array, "rows"]
    upload_end_s: Float[Array, "rows"]
    start_s: Float[Array, "rows"]
    end_s: Float[Array, "rows"]
    deadline_s: Float[Array, "rows"]
    dropped: Bool[Array, "rows"]
    account: Account
    server_wait_s: Float[Array, "servers"]
    """Time until a GPU of each server is free and the server there, at the slot start."""
    backlog_s: Float[Array, ""]
    """Work left in all queues at the slot start: GPUs and devices together, in seconds of their own."""
    quality: Float[Array, "rows"] | None = None
    cache: CacheLoads | None = None
    """Only where it is chosen which models servers hold."""
    parts: Int[Array, "rows"] | None = None
    """Over how many servers the task is split; only where it can be."""
