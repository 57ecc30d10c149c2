"""Which models each server holds, where that is a decision of its own: chosen every so many slots, kept until the next.

The slow of the two time scales of T2DRL (2411.01458): models on the long slots, tasks on the short ones. A choice is a
table [servers, models]; what does not fit the memory of a server is left out, so it is never exceeded.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from gmel.physics.queueing import Servers, load_models
from gmel.physics.random import hash_bits
from gmel.scenario.errors import InputError
from gmel.simulator.links import home_cell
from gmel.simulator.plant import Plant, Switches
from gmel.simulator.state import CacheLoads, CacheStatistics, Links, Requests
from gmel.simulator.traffic import load_time_s

__all__ = [
    "CACHE_POLICIES",
    "CachePolicy",
    "Popular",
    "Random",
    "Recent",
    "Spread",
    "count_asked",
    "first_cache",
    "first_residents",
    "next_cache",
    "refuse_useless",
    "statistics_of",
    "within_memory",
]

RNG_CACHE = 0


class CachePolicy(eqx.Module):
    """Chooses the models that each server holds until the next choice, beside a `Policy`, which places the tasks.

    One of your own is asked outside and handed to `Environment.step` as `cache`; those of `CACHE_POLICIES` are asked by
    the environment itself, by `cache.policy` of the scenario.
    """

    @abstractmethod
    def choose(self, plant: Plant, statistics: CacheStatistics, key: PRNGKeyArray) -> Bool[Array, "servers models"]:
        """The models to hold. What does not fit is left out (`within_memory`)."""


class Popular(CachePolicy):
    """On every server the most popular models that fit."""

    def choose(self, plant: Plant, statistics: CacheStatistics, key: PRNGKeyArray) -> Bool[Array, "servers models"]:
        """The same on servers of the same memory."""
        del statistics, key
        return within_memory(plant, jnp.ones((plant.switches.servers, plant.switches.models), bool))


class Spread(CachePolicy):
    """Every model on one server, then on a second, and so on while there is room, the popular ones first.

    Each copy goes to the server with the most room left that has none (ties: the first), so the most popular models
    have the most copies.
    """

    def choose(self, plant: Plant, statistics: CacheStatistics, key: PRNGKeyArray) -> Bool[Array, "servers models"]:
        """Greedy, copy by copy."""
        del statistics, key
        sizes = plant.switches
        memory_gb, order = plant.catalogue.memory_gb, jnp.argsort(_rank(plant))

        def place(
            step: Int[Array, ""], placed: tuple[Bool[Array, "servers models"], Float[Array, "servers"]]
        ) -> tuple[Bool[Array, "servers models"], Float[Array, "servers"]]:
            held, room_gb = placed
            model = order[step % sizes.models]
            fits = ~held[:, model] & (memory_gb[model] <= room_gb)
            server = jnp.argmax(jnp.where(fits, room_gb, -1.0))
            taken = (jnp.arange(sizes.servers) == server) & fits
            return held.at[:, model].set(held[:, model] | taken), jnp.where(taken, room_gb - memory_gb[model], room_gb)

        nothing = jnp.zeros((sizes.servers, sizes.models), bool)
        first = (nothing, plant.server_memory_gb)
        return jax.lax.fori_loop(0, sizes.servers * sizes.models, place, first)[0]


class Recent(CachePolicy):
    """On each server the models most asked for in its cell since the last choice (ties: the more popular)."""

    def choose(self, plant: Plant, statistics: CacheStatistics, key: PRNGKeyArray) -> Bool[Array, "servers models"]:
        """Counted by the home cell of the devices, wherever their tasks went: what is not held is asked for too."""
        del key
        everything = jnp.ones_like(statistics.resident)
        return within_memory(plant, everything, statistics.asked.astype(plant.slot_s.dtype))


class Random(CachePolicy):
    """On each server models in random order, those that fit."""

    def choose(self, plant: Plant, statistics: CacheStatistics, key: PRNGKeyArray) -> Bool[Array, "servers models"]:
        """Drawn anew at each choice and for each server."""
        everything = jnp.ones_like(statistics.resident)
        return within_memory(plant, everything, jax.random.uniform(key, everything.shape))


CACHE_POLICIES: dict[str, CachePolicy] = {
    "popular": Popular(),
    "spread": Spread(),
    "recent": Recent(),
    "random": Random(),
}


def within_memory(
    plant: Plant, wanted: Bool[Array, "servers models"], score: Float[Array, "servers models"] | None = None
) -> Bool[Array, "servers models"]:
    """The wanted models that each server has memory for, taken in order of `score` (highest first) while they fit.

    A model that does not fit beside those before it is passed over. Ties, and all without a score, go by popularity.
    """
    rank = jnp.broadcast_to(_rank(plant), wanted.shape)
    order = jnp.argsort(rank, axis=1) if score is None else jnp.lexsort((rank, -score), axis=1)
    memory_gb = plant.catalogue.memory_gb

    def take(
        room_gb: Float[Array, "servers"], model: Int[Array, "servers"]
    ) -> tuple[Float[Array, "servers"], Bool[Array, "servers"]]:
        asked = jnp.take_along_axis(wanted, model[:, None], axis=1)[:, 0]
        fits = asked & (memory_gb[model] <= room_gb)
        return jnp.where(fits, room_gb - memory_gb[model], room_gb), fits

    _, fits = jax.lax.scan(take, plant.server_memory_gb, order.T)
    rows = jnp.arange(wanted.shape[0])[:, None]
    return jnp.zeros_like(wanted).at[rows, order].set(fits.T)


def _rank(plant: Plant) -> Int[Array, "models"]:
    """Place of each model in order of popularity, from 0; ties by the order of the catalogue."""
    return jnp.argsort(jnp.argsort(-plant.catalogue.popularity, stable=True))


def first_residents(plant: Plant) -> Bool[Array, "servers models"]:
    """Models that servers hold at the start where they are loaded on demand: the most popular ones that fit the memory
    together."""
    models = plant.switches.models
    order = jnp.argsort(-plant.catalogue.popularity, stable=True)[:models]
    filled = jnp.cumsum(plant.catalogue.memory_gb[order])
    fits = filled[None, :] <= plant.server_memory_gb[:, None]
    return jnp.zeros((plant.switches.servers, models), bool).at[:, order].set(fits)


def count_asked(
    plant: Plant, asked: Int[Array, "servers models"], requests: Requests, links: Links
) -> Int[Array, "servers models"]:
    """The requests of one more slot, counted by the home cell of their device."""
    home = home_cell(plant, links, requests.device)
    return asked.at[home, requests.model].add(requests.present.astype(asked.dtype))


def statistics_of(
    plant: Plant, asked: Int[Array, "servers models"], resident: Bool[Array, "servers models"]
) -> CacheStatistics:
    """What a policy is shown; a server without a cell may be asked by anybody."""
    everywhere = jnp.sum(asked, axis=0, keepdims=True)
    return CacheStatistics(jnp.where(plant.server_has_cell[:, None] > 0, asked, everywhere), resident)


def refuse_useless(cache: Bool[Array, "servers models"] | None, sizes: Switches) -> None:
    """Raises an InputError where a choice is given and the plant loads on demand."""
    if cache is not None and sizes.cache is None:
        raise InputError(
            "cache: the scenario loads models on demand; give it a section [cache] (cache.decision_slots), or leave "
            "the argument out"
        )


def first_cache(
    plant: Plant, seed: UInt32[Array, "2"], cache: Bool[Array, "servers models"] | None
) -> Bool[Array, "servers models"]:
    """What the servers hold when an episode begins; it costs nothing."""
    sizes = plant.switches
    none = jnp.zeros((sizes.servers, sizes.models), bool)
    nobody = jnp.zeros(none.shape, jnp.int32)
    return _chosen(plant, seed, jnp.zeros((), jnp.int32), statistics_of(plant, nobody, none), cache)


def next_cache(
    plant: Plant,
    seed: UInt32[Array, "2"],
    slot: Int[Array, ""],
    servers: Servers,
    asked: Int[Array, "servers models"],
    cache: Bool[Array, "servers models"] | None,
) -> tuple[Servers, Int[Array, "servers models"], CacheLoads]:
    """The servers at the start of `slot`, which hold other models if it is time to choose; and what was loaded.

    Models that come are loaded on the GPUs (`gmel.physics.queueing.load_models`), for a time drawn for slot, server and
    model; those that go leave at once.
    """
    sizes = plant.switches
    assert sizes.cache is not None  # with a cache
    due = slot % sizes.cache.decision_slots == 0

    def choose() -> tuple[Servers, Bool[Array, "servers models"], Float[Array, "servers models"]]:
        chosen = _chosen(plant, seed, slot, statistics_of(plant, asked, servers.resident), cache)
        new = chosen & ~servers.resident
        model = jnp.broadcast_to(jnp.arange(sizes.models), new.shape)
        number = jnp.arange(sizes.servers)[:, None] * sizes.models + model
        load_s = load_time_s(plant, hash_bits(seed, slot, RNG_CACHE, number), model)
        loaded = load_models(servers, new, load_s)
        return loaded._replace(resident=chosen), new, jnp.where(new, load_s, 0.0)

    def keep() -> tuple[Servers, Bool[Array, "servers models"], Float[Array, "servers models"]]:
        nothing = jnp.zeros_like(servers.resident)
        return servers, nothing, jnp.zeros(nothing.shape, servers.free_s.dtype)

    servers, new, load_s = jax.lax.cond(due, choose, keep)
    spent_s = jnp.sum(load_s, axis=1)
    loads = CacheLoads(jnp.sum(new, axis=1, dtype=jnp.int32), spent_s, spent_s * plant.server_switch_power_w)
    return servers, jnp.where(due, 0, asked), loads


def _chosen(
    plant: Plant,
    seed: UInt32[Array, "2"],
    slot: Int[Array, ""],
    statistics: CacheStatistics,
    cache: Bool[Array, "servers models"] | None,
) -> Bool[Array, "servers models"]:
    if cache is not None:
        return within_memory(plant, cache)
    assert plant.switches.cache is not None  # with a cache
    # One word more than all numbers of models, so that no load time shares it.
    bits = hash_bits(seed, slot, RNG_CACHE, jnp.asarray(2**24 - 1, jnp.int32))
    key = jax.random.wrap_key_data(jnp.stack([bits.x, bits.y]), impl="threefry2x32")
    return CACHE_POLICIES[plant.switches.cache.policy].choose(plant, statistics, key)
