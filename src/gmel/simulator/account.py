"""What a task takes and costs: latency parts, energy, and the weighted cost behind the reward."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.physics import energy
from gmel.physics.capacity import progress
from gmel.physics.queueing import Served
from gmel.simulator.plant import Plant
from gmel.simulator.state import Account, Uploads

__all__ = ["accounts", "costs", "device_energy_j", "other_costs_s", "parts_energy_j"]


def accounts(plant: Plant, rows: Uploads, local: Bool[Array, "rows"], served: Served) -> Account:
    """Latency parts and energy (equations (4)-(12)); a discarded task counts its deadline as latency."""
    wait_s = rows.decided_s - rows.generated_s
    # A task can be past its deadline when it is decided; discarded, it still counts its deadline and no more.
    wait_s = jnp.where(served.dropped, jnp.minimum(wait_s, rows.deadline_s), wait_s)
    # Of a task that is discarded nothing is served; its time until the deadline was upload and queue.
    left_s = jnp.maximum(rows.deadline_s - wait_s, 0.0)
    upload_s = rows.ready_s - rows.decided_s
    upload_s = jnp.where(served.dropped, jnp.minimum(upload_s, left_s), upload_s)
    queue_s = jnp.where(served.dropped, left_s - upload_s, served.start_s - rows.ready_s)
    switch_s = jnp.where(served.dropped, 0.0, served.switch_s)
    run_s = jnp.where(served.dropped, 0.0, rows.service_s)
    service_s = run_s
    if rows.shared is not None:
        # With others in service it takes longer than it has a GPU to itself.
        took_s = jnp.where(served.dropped, 0.0, served.end_s - served.start_s - switch_s)
        service_s = jnp.where(local, service_s, jnp.maximum(took_s, 0.0))
    download_s = jnp.where(served.dropped, 0.0, rows.download_s)
    account = Account(wait_s, upload_s, queue_s, switch_s, service_s, download_s, jnp.zeros_like(run_s))
    at_server = _energy_at_server_j(plant, rows, run_s, account)
    return account._replace(energy_j=jnp.where(local, energy.power_energy_j(plant.device_power_w, run_s), at_server))


def _energy_at_server_j(
    plant: Plant, rows: Uploads, run_s: Float[Array, "rows"], account: Account
) -> Float[Array, "rows"]:
    """Equation (12) of tasks at servers, whole or in parts; `run_s` is their time on a GPU of their own."""
    latency_s = account.latency_s - account.wait_to_slot_s
    each = rows.parts
    if each is not None:
        return parts_energy_j(
            plant,
            present=each.present,
            server=each.server,
            start_s=each.upload_start_s,
            sent_s=each.ready_s if each.sent_s is None else each.sent_s,
            run_s=each.service_s,
            switch_s=each.switch_s,
            latency_s=latency_s,
            tx_power_w=None if rows.tx_power_w is None else rows.tx_power_w[:, None],
        )
    sending_s = _sending_s(rows, account.upload_s)
    return energy.offload_energy_j(
        tx_power_w=_tx_power_w(plant, rows),
        idle_power_w=plant.device_idle_power_w,
        server_power_w=plant.server_power_w[rows.server],
        switch_power_w=plant.server_switch_power_w[rows.server],
        upload_s=sending_s,
        latency_s=jnp.maximum(latency_s, sending_s),
        run_s=run_s,
        switch_s=account.switch_s,
    )


def parts_energy_j(
    plant: Plant,
    *,
    present: Bool[Array, "*rows parts"],
    server: Int[Array, "*rows parts"],
    start_s: Float[Array, "*rows parts"],
    sent_s: Float[Array, "*rows parts"],
    run_s: Float[Array, "*rows parts"],
    switch_s: Float[Array, "*rows parts"],
    latency_s: Float[Array, "*rows"],
    tx_power_w: Float[Array, "..."] | None,
) -> Float[Array, "*rows"]:
    """Equation (12) of a task in parts: each is sent and served at the full power; the device idles when it is not
    sending any, from the first to the last bit of them all."""
    power_w = plant.device_tx_power_w if tx_power_w is None else tx_power_w
    each = (
        energy.power_energy_j(power_w, jnp.maximum(sent_s - start_s, 0.0))
        + energy.power_energy_j(plant.server_power_w[server], run_s)
        + energy.switch_energy_j(plant.server_switch_power_w[server], switch_s)
    )
    first_s = jnp.min(jnp.where(present, start_s, jnp.inf), axis=-1)
    last_s = jnp.max(jnp.where(present, sent_s, -jnp.inf), axis=-1)
    sending_s = jnp.where(jnp.any(present, axis=-1), last_s - first_s, 0.0)
    idle = energy.idle_energy_j(plant.device_idle_power_w, latency_s, jnp.maximum(sending_s, 0.0))
    return jnp.sum(jnp.where(present, each, 0.0), axis=-1) + idle


def device_energy_j(plant: Plant, rows: Uploads, local: Bool[Array, "rows"], account: Account) -> Float[Array, "rows"]:
    """The part of a task's energy that its device spends: computing, or sending and then waiting for the result."""
    sending_s = _sending_s(rows, account.upload_s)
    idle_s = account.latency_s - account.wait_to_slot_s
    sent_j = energy.power_energy_j(_tx_power_w(plant, rows), sending_s)
    away_j = sent_j + energy.idle_energy_j(plant.device_idle_power_w, idle_s, sending_s)
    return jnp.where(local, energy.power_energy_j(plant.device_power_w, account.service_s), away_j)


def costs(
    plant: Plant, rows: Uploads, local: Bool[Array, "rows"], served: Served, account: Account
) -> Float[Array, "rows"]:
    """Weighted cost of each task (equation (15), negated). A task that is discarded has no quality and costs
    nothing."""
    weights, latency_s = plant.switches.reward, account.latency_s
    total = weights.latency * jnp.minimum(latency_s / _latency_scale_s(plant, rows.deadline_s), weights.clip)
    if weights.miss:
        missed = (latency_s > rows.deadline_s) | served.dropped
        if rows.quality is not None and plant.switches.least_quality:
            missed = missed | (rows.quality < plant.switches.least_quality)
        total = total + weights.miss * missed
    if weights.energy:
        total = total + weights.energy * account.energy_j / weights.energy_scale_j
    if weights.quality and rows.quality is not None:
        total = total - weights.quality * jnp.where(served.dropped, 0.0, rows.quality)
    if weights.loss:
        left = jnp.ones_like(latency_s)
        if plant.switches.discipline == "capacity":
            # Only a server that crashes loses what it has begun; elsewhere a task that is discarded never started.
            left = 1.0 - progress(served.start_s, served.end_s, rows.service_s)
        total = total + weights.loss * jnp.where(served.dropped, left, 0.0)
    if weights.price:
        # What a server asks for a second of its work.
        tasks = rows if rows.parts is None else rows.parts
        paid = plant.server_price[tasks.server] * plant.server_speed[tasks.server] * tasks.service_s
        if rows.parts is not None:
            paid = jnp.sum(jnp.where(rows.parts.present, paid, 0.0), axis=-1)
        total = total + weights.price * jnp.where(local | served.dropped, 0.0, paid)
    return total


def other_costs_s(
    plant: Plant,
    deadline_s: Float[Array, "requests"],
    quality: Float[Array, "requests qualities"] | None,
    paid: Float[Array, "requests places"],
    energy_j: Float[Array, "requests places"],
) -> Float[Array, "requests places"]:
    """What each option costs beside its latency and the deadline, in seconds of latency at the weights of the
    reward."""
    weights = plant.switches.reward
    cost = weights.price * paid + weights.energy * energy_j / weights.energy_scale_j
    if quality is not None:
        missed = quality < plant.switches.least_quality
        cost = cost + weights.miss * missed - weights.quality * quality
    return cost * _latency_scale_s(plant, deadline_s)[:, None] / (weights.latency or 1.0)


def _latency_scale_s(plant: Plant, deadline_s: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """What latencies are measured in: the scale of the scenario, or the deadline of the task."""
    scale_s = plant.switches.reward.latency_scale_s
    if scale_s is not None:
        return jnp.full_like(deadline_s, scale_s)
    return jnp.where(deadline_s > 0, deadline_s, 1.0)  # absent rows have no deadline


def _sending_s(rows: Uploads, upload_s: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """How long the device sends, of the time `upload_s` until the task is at its server or given up."""
    sent_s = rows.ready_s if rows.sent_s is None else rows.sent_s
    return jnp.minimum(jnp.maximum(sent_s - rows.upload_start_s, 0.0), upload_s)


def _tx_power_w(plant: Plant, rows: Uploads) -> Float[Array, "*rows"]:
    return plant.device_tx_power_w if rows.tx_power_w is None else rows.tx_power_w
