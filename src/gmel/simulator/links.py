"""Links: where devices stand, what each link can carry, how long an upload takes."""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.physics import channel, radio
from gmel.physics.mobility import fading_power
from gmel.physics.random import hash_bits, normal, uniform
from gmel.scenario.schema import Radio
from gmel.simulator.plant import Plant
from gmel.simulator.state import Links, Requests

__all__ = [
    "Reach",
    "backhaul_s",
    "cells",
    "download_time_s",
    "draw_fading",
    "draw_links",
    "draw_positions_m",
    "interference",
    "least_snr",
    "links_from",
    "pair_numbers",
    "reach",
    "reach_over",
    "reachable",
    "transfer_s",
    "visible",
]

# Numbers of the random quantities (see physics/random.py); one table for the whole simulator would hide who uses them.
RNG_LINKS, RNG_POSITIONS, RNG_SHADOWING, RNG_FADING = 1, 2, 3, 4


def pair_numbers(plant: Plant) -> Int[Array, "devices servers"]:
    """Numbers of the pairs of a device and a server, for random quantities of theirs."""
    sizes = plant.switches
    return jnp.arange(sizes.devices * sizes.servers).reshape(sizes.devices, sizes.servers)


def draw_links(plant: Plant, seed: UInt32[Array, "2"]) -> Links:
    """Large-scale state of every link for an episode."""
    spec = plant.switches.radio
    pairs = pair_numbers(plant)
    origin = jnp.zeros((), jnp.int32)
    if spec.model == "uniform-snr":
        u = uniform(hash_bits(seed, origin, RNG_LINKS, pairs).x)
        snr = channel.db_to_linear(spec.snr_db[0] + (spec.snr_db[1] - spec.snr_db[0]) * u)
        return Links(snr, snr)
    if spec.model in ("fixed", "wired"):
        u = uniform(hash_bits(seed, origin, RNG_LINKS, pairs).x)
        rates = spec.rate_bps
        rate_bps = None if rates is None else rates.low + (rates.high - rates.low) * u
        # No radio: the SNR only says that the link is there.
        return Links(jnp.ones_like(u), jnp.ones_like(u), rate_bps)
    draw = hash_bits(seed, origin, RNG_SHADOWING, pairs)
    return links_from(plant, draw_positions_m(plant, seed), uniform(draw.x), normal(draw.y, draw.z))


def links_from(
    plant: Plant,
    position_m: Float[Array, "devices 2"],
    sight: Float[Array, "devices servers"],
    shadow: Float[Array, "devices servers"],
) -> Links:
    """Large-scale state of every link from where the devices are: path loss, line of sight and shadowing.

    `sight` is uniform on (0, 1), `shadow` standard normal.
    """
    spec = plant.switches.radio
    apart_m = position_m[:, None, :] - plant.server_position_m[None, :, :]
    distance_2d_m = jnp.sqrt(jnp.sum(apart_m**2, axis=-1))
    height_m = spec.server_height_m - spec.device_height_m
    # TR 38.901 states the InF formulas from 1 m on.
    distance_m = jnp.maximum(jnp.sqrt(distance_2d_m**2 + height_m**2), 1.0)
    if spec.model == "log-distance":
        loss_db = spec.loss_at_1m_db + spec.loss_slope_db * jnp.log10(distance_m) + 20.0 * math.log10(spec.carrier_ghz)
        shadow_db = spec.shadowing_db * shadow
    else:
        probability = channel.los_probability(
            distance_2d_m,
            spec.subscenario,
            clutter_density=spec.clutter_density,
            clutter_size_m=spec.clutter_size_m,
            clutter_height_m=spec.clutter_height_m,
            base_height_m=spec.server_height_m,
            device_height_m=spec.device_height_m,
        )
        in_sight = sight < probability
        loss_db = channel.path_loss_db(distance_m, spec.carrier_ghz, spec.subscenario, in_sight)
        shadow_db = channel.shadowing_sigma_db(spec.subscenario, in_sight) * shadow
    gain_db = -(loss_db + shadow_db)
    up = plant.device_tx_power_dbm - channel.noise_dbm(spec.bandwidth_hz, spec.noise_figure_db)
    down = spec.server_tx_power_dbm - channel.noise_dbm(spec.bandwidth_hz, spec.device_noise_figure_db)
    return Links(channel.db_to_linear(gain_db + up), channel.db_to_linear(gain_db + down))


def draw_positions_m(plant: Plant, seed: UInt32[Array, "2"]) -> Float[Array, "devices 2"]:
    """Where the devices stand in an episode, in metres from the corner of the hall (`State.seed` is the seed)."""
    if plant.device_position_m is not None:
        return plant.device_position_m
    hall_m = plant.switches.radio.hall_m
    spot = hash_bits(seed, jnp.zeros((), jnp.int32), RNG_POSITIONS, jnp.arange(plant.switches.devices))
    return jnp.stack([uniform(spot.x) * hall_m[0], uniform(spot.y) * hall_m[1]], axis=-1)


def least_snr(spec: Radio) -> float:
    """Linear SNR that a link must have: the scenario's floor, but at least what the rate model can decode."""
    return max(10 ** (0.1 * spec.floor_snr_db), radio.lowest_snr(spec.rate))


class Reach(NamedTuple):
    """The way of each request to each server: what the cell on the way can carry."""

    snr: Float[Array, "requests ..."]
    fade: Float[Array, "requests ..."]
    outage_s: Float[Array, "requests ..."]
    rate_bps: Float[Array, "requests ..."] | None


def cells(plant: Plant, links: Links, device: Int[Array, "requests"]) -> Int[Array, "requests servers"] | None:
    """The cell over which each device reaches each server (number of its server); None: every server its own."""
    sizes = plant.switches
    if not sizes.routed:
        return None
    has_cell = plant.server_has_cell > 0
    home = home_cell(plant, links, device)[:, None]
    if sizes.radio.access == "home":
        return jnp.broadcast_to(home, (device.shape[0], sizes.servers))
    return jnp.where(has_cell, jnp.arange(sizes.servers, dtype=jnp.int32), home)


def home_cell(plant: Plant, links: Links, device: Int[Array, "requests"]) -> Int[Array, "requests"]:
    """The cell of each device (number of its server): the best it hears, or by its number where links are given."""
    has_cell = plant.server_has_cell > 0
    if plant.switches.radio.model in ("fixed", "wired"):
        with_cell = jnp.flatnonzero(has_cell, size=plant.switches.servers)
        home = with_cell[device % jnp.sum(has_cell)]
    else:
        home = jnp.argmax(jnp.where(has_cell, links.uplink_snr[device], -1.0), axis=1)
    return home.astype(jnp.int32)


def reach(requests: Requests, links: Links, cell: Int[Array, "requests servers"] | None, uplink: bool = True) -> Reach:
    """What the cell on the way of each request to each server can carry."""

    def over(table: Float[Array, "requests servers"]) -> Float[Array, "requests servers"]:
        return table if cell is None else jnp.take_along_axis(table, cell, axis=1)

    snr = links.uplink_snr if uplink else links.downlink_snr
    rate_bps = None if links.rate_bps is None else over(links.rate_bps[requests.device])
    return Reach(over(snr[requests.device]), over(requests.fade), over(requests.outage_s), rate_bps)


def reach_over(requests: Requests, links: Links, cell: Int[Array, "requests"], uplink: bool = True) -> Reach:
    """As :func:`reach`, of one cell for each request; the others are not read."""
    snr = links.uplink_snr if uplink else links.downlink_snr
    row = jnp.arange(cell.shape[0])
    rate_bps = None if links.rate_bps is None else links.rate_bps[requests.device, cell]
    return Reach(snr[requests.device, cell], requests.fade[row, cell], requests.outage_s[row, cell], rate_bps)


def backhaul_s(
    plant: Plant, cell: Int[Array, "requests ..."], server: Int[Array, "..."], bits: Float[Array, "requests ..."]
) -> Float[Array, "requests ..."]:
    """Time of so many bits from the cell to the server, zero where they are the same place."""
    forward_s = plant.backhaul_delay_s[server] + bits * plant.backhaul_s_per_bit[server]
    return jnp.where(cell == server, 0.0, forward_s)


def interference(
    links: Links,
    device: Int[Array, "rows"],
    cell: Int[Array, "rows"],
    sending: Bool[Array, "rows"],
    power_ratio: Float[Array, "rows"] | None,
) -> Float[Array, "servers"]:
    """Mean power that each cell hears of the uploads to other cells, over its noise.

    An upload puts its power on one of the N shares of its cell's band, so it hits a given share of another cell with
    probability 1 / N at N times the density: on average its full-band SNR there. Fading of the interferers averages
    out.
    """
    heard = links.uplink_snr[device]
    if power_ratio is not None:
        heard = heard * power_ratio[:, None]
    elsewhere = sending[:, None] & (cell[:, None] != jnp.arange(heard.shape[1])[None, :])
    return jnp.sum(jnp.where(elsewhere, heard, 0.0), axis=0)


def visible(plant: Plant, links: Links, device: Int[Array, "requests"]) -> Bool[Array, "requests servers"]:
    """Whether a device can choose a server: it hears it, and it is among its best where the scenario limits them."""
    spec, snr = plant.switches.radio, links.uplink_snr[device]
    usable = reachable(spec, snr)
    if spec.visible_servers is None or spec.visible_servers >= plant.switches.servers:
        return usable
    quality = snr if links.rate_bps is None else links.rate_bps[device]
    quality = jnp.where(plant.server_has_cell > 0, quality, jnp.inf)  # what has no cell is not limited
    better = jnp.sum(quality[:, None, :] > quality[:, :, None], axis=2)
    cloud = jnp.sum(plant.server_has_cell == 0)
    return usable & (better < spec.visible_servers + cloud)


def reachable(spec: Radio, snr: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Whether a link can be used at its mean SNR; one whose fades are raised to the floor always can."""
    if spec.floor == "clip":
        return snr >= (0.0 if spec.fading in ("block", "ar1") else radio.lowest_snr(spec.rate))
    return snr >= least_snr(spec)


def draw_fading(
    plant: Plant,
    seed: UInt32[Array, "2"],
    slot: Int[Array, ""],
    device: Int[Array, "requests"],
    snr: Float[Array, "requests servers"],
    fading: tuple[Float[Array, "devices servers"], Float[Array, "devices servers"]] | None = None,
) -> tuple[Float[Array, "requests servers"], Float[Array, "requests servers"]]:
    """Small-scale power gain of the links of the requesting devices, and the time their upload waits for the link.

    Block fading: a unit-mean exponential gain (Rayleigh) per link and slot, held for the upload. Below the floor the
    gain is raised to it (`clip`), or the upload waits for the first slot above it (`outage`). Correlated fading
    (`fading`, both parts of the complex gains of this slot) is held for the upload too, and raised to the floor.
    """
    spec = plant.switches.radio
    zero = jnp.zeros_like(snr)
    if fading is not None:
        power = fading_power(*fading)[device]
        return jnp.maximum(power, least_snr(spec) / snr), zero
    if spec.fading != "block":
        return zero + 1.0, zero
    servers = plant.switches.servers
    # One hash gives four words: enough for four servers, or for two with outage. Each link computes the hash that it
    # shares and picks its word: the whole is one loop without branches, cheaper than cutting words from a table.
    per_hash = 2 if spec.floor == "outage" else 4
    groups = -(-servers // per_hash)
    server = jnp.arange(servers)
    words = hash_bits(seed, slot, RNG_FADING, device[:, None] * groups + (server // per_hash)[None, :])
    turn = server % per_hash
    floor = least_snr(spec)
    if spec.floor == "clip":
        word = jnp.where(turn < 2, jnp.where(turn == 0, words.x, words.y), jnp.where(turn == 2, words.z, words.w))
        return jnp.maximum(channel.rayleigh_power(uniform(word)), floor / snr), zero
    first = uniform(jnp.where(turn == 0, words.x, words.z))
    second = uniform(jnp.where(turn == 0, words.y, words.w))
    start = radio.block_outage_wait(first, second, snr, floor)
    return start.snr / snr, start.wait_slots * plant.slot_s


def transfer_s(
    plant: Plant,
    bits: Float[Array, "..."],
    snr: Float[Array, "..."],
    fade: Float[Array, "..."],
    users: Float[Array, "..."],
    direction: Literal["uplink", "downlink"],
    link_bps: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Seconds to carry `bits` over a link with `users` equal sharers of its cell (equation (3)).

    Full power on the narrower band raises the SNR with the number of sharers. `link_bps` is the rate of the link where
    it is fixed.
    """
    spec = plant.switches.radio
    if spec.model == "wired":
        return 0.0 * (bits + snr)
    if link_bps is not None:
        return bits * users / link_bps + 0.0 * snr
    up = direction == "uplink"
    truncation = radio.UPLINK_TRUNCATION if up else radio.DOWNLINK_TRUNCATION
    share = spec.uplink_share if up else spec.downlink_share
    cap = spec.efficiency_cap
    if spec.fading == "ergodic":
        efficiency = radio.ergodic_spectral_efficiency(spec.rate, snr * users, cap=cap, truncation=truncation)
    else:
        efficiency = radio.spectral_efficiency(spec.rate, snr * users * fade, cap=cap, truncation=truncation)
    rate_bps = share * spec.bandwidth_hz / users * efficiency
    # A link that carries nothing is masked; the bound keeps its time finite.
    return bits / jnp.maximum(rate_bps, 1.0)


def download_time_s(
    plant: Plant,
    bits: Float[Array, "requests ..."],
    back: Reach,
    cell: Int[Array, "requests ..."] | None,
    server: Int[Array, "..."],
) -> Float[Array, "requests ..."]:
    """Download time of results over the way `back`, from a server for each; downlinks do not contend (servers send one
    result at a time)."""
    one = jnp.ones_like(back.snr)
    over_radio_s = transfer_s(plant, bits, back.snr, one, one, "downlink", back.rate_bps)
    return over_radio_s if cell is None else over_radio_s + backhaul_s(plant, cell, server, bits)
