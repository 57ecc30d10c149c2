"""The way of the tasks of a slot to their servers: own queue, radio, backhaul."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.physics.queueing import local_queue
from gmel.simulator.levels import Manner
from gmel.simulator.links import backhaul_s, cells, download_time_s, interference, reach_over, transfer_s
from gmel.simulator.plant import Plant
from gmel.simulator.state import State
from gmel.simulator.uploads import in_cells, under_way, uploading

__all__ = ["Sending", "send"]


class Sending(NamedTuple):
    """When what happens to the upload of each request if it is sent; times from the slot start."""

    start_s: Float[Array, "requests"]
    """When the link carries its first bit."""
    sent_s: Float[Array, "requests"]
    """When it leaves the cell."""
    ready_s: Float[Array, "requests"]
    """When it is at its server."""
    download_s: Float[Array, "requests"]
    cell: Int[Array, "requests"] | None
    """The cell it uses, where it is not always that of its server."""


def send(
    plant: Plant, state: State, remote: Bool[Array, "requests"], server: Int[Array, "requests"], how: Manner
) -> Sending:
    """Uploads of the requests that are `remote`, all of a slot together (equations (2)-(4))."""
    sizes, requests = plant.switches, state.requests
    cells_of = cells(plant, state.links, requests.device)
    cell = server if cells_of is None else jnp.take_along_axis(cells_of, server[:, None], axis=1)[:, 0]
    way = reach_over(requests, state.links, cell)
    users = jnp.ones(())
    if sizes.radio.sharing == "equal":
        in_cell = in_cells(state.uploads, sizes.servers)
        if how.band_weight is None:
            in_cell = in_cell.at[cell].add(remote.astype(jnp.int32))
            users = jnp.maximum(in_cell[cell].astype(way.snr.dtype), 1.0)
        else:
            in_cell = in_cell.at[cell].add(jnp.where(remote, how.band_weight, 0.0))
            users = jnp.maximum(in_cell[cell] / how.band_weight, 1.0)
    snr = way.snr
    if how.power_ratio is not None:
        snr = snr * how.power_ratio
    if sizes.radio.interference:
        heard = interference(state.links, requests.device, cell, remote, how.power_ratio)
        heard = heard + interference_in_flight(plant, state)
        snr = snr / (1.0 + heard[cell])
    active_s = transfer_s(plant, requests.size_bit, snr, way.fade, users, "uplink", way.rate_bps)
    start_s, sent_s = way.outage_s, active_s + way.outage_s
    if state.radio_backlog_s is not None:
        backlog_s = state.radio_backlog_s[requests.device]
        turn = local_queue(remote, requests.device, backlog_s, sent_s, None)
        start_s, sent_s = turn.start_s + way.outage_s, turn.end_s
    ready_s = sent_s if cells_of is None else sent_s + backhaul_s(plant, cell, server, requests.size_bit)
    download_s = jnp.zeros_like(ready_s)
    if sizes.radio.download:
        back = reach_over(requests, state.links, cell, uplink=False)
        download_s = download_time_s(plant, requests.bits_out, back, None if cells_of is None else cell, server)
    return Sending(start_s, sent_s, ready_s, download_s, None if cells_of is None else cell)


def interference_in_flight(plant: Plant, state: State) -> Float[Array, "servers"]:
    """What each cell hears of the uploads in flight to others, over its noise."""
    tasks = under_way(state.uploads)
    cell = tasks.server if tasks.cell is None else tasks.cell
    ratio = None if tasks.tx_power_w is None else tasks.tx_power_w / plant.device_tx_power_w
    return interference(state.links, tasks.device, cell, uploading(tasks), ratio)
