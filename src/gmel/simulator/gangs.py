"""Gangs in the simulator: what a request asks for, and servers without any group loaded."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.simulator.plant import Plant
from gmel.simulator.presence import NEVER_S
from gmel.simulator.state import GangNews, Gangs, Requests

__all__ = ["Wanted", "gang_of", "gangs_free_s", "gangs_warm", "no_gangs"]


class Wanted(NamedTuple):
    """The gang that each request asks for."""

    gpus: Int[Array, "requests"]
    speedup: Float[Array, "requests"]
    load_s: Float[Array, "requests"]


def gang_of(plant: Plant, requests: Requests) -> Wanted | None:
    """The gang of each request; None where tasks take one GPU."""
    if plant.switches.discipline != "gang":
        return None
    assert requests.gang is not None  # given with this discipline
    catalogue, at = plant.catalogue, (requests.model, requests.gang)
    return Wanted(catalogue.gang_gpus[at], catalogue.gang_speedup[at], catalogue.gang_load_s[at])


def no_gangs(plant: Plant) -> Gangs:
    """Servers that have nothing loaded."""
    sizes = plant.switches
    none = jnp.full((sizes.servers, sizes.gpus), -1, jnp.int32)
    return Gangs(jnp.zeros(sizes.servers), none, none)


def gangs_free_s(news: GangNews, wanted: Wanted) -> Float[Array, "requests servers"]:
    """Time until as many GPUs of each server are free as each request needs; `NEVER_S` where that many never are."""
    at = jnp.minimum(wanted.gpus, news.free_s.shape[-1]) - 1
    return jnp.minimum(news.free_s[:, at].T, NEVER_S)


def gangs_warm(news: GangNews, wanted: Wanted, model: Int[Array, "requests"]) -> Bool[Array, "requests servers"]:
    """Whether each server has a group loaded that fits the request, busy or not."""
    fits = (news.size[None] == wanted.gpus[:, None, None]) & (news.model[None] == model[:, None, None])
    return jnp.any(fits, axis=2)
