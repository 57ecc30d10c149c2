"""The constants of a scenario as arrays, and the switches that choose what is compiled.

Switches and sizes are static: what a scenario does not use is not in the compiled program.
"""

import math
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gmel.physics.quality import logarithmic_quality, piecewise_quality, power_law_quality
from gmel.scenario.quality import Quality
from gmel.scenario.schema import (
    Arrivals,
    Cache,
    Choice,
    Failures,
    GenerationModel,
    Mobility,
    Radio,
    Reward,
    Scenario,
    Server,
    Spread,
)
from gmel.simulator.arrivals import ArrivalLaws, arrival_laws, request_capacity
from gmel.simulator.presence import Presence, presence_of
from gmel.simulator.scale import Identities, identities_of
from gmel.simulator.state import chosen_weights

__all__ = ["Catalogue", "Plant", "Switches", "build_plant", "pick"]


@dataclass(frozen=True)
class Switches:
    """Sizes and features that are fixed when the program is compiled."""

    devices: int
    servers: int
    gpus: int
    models: int
    requests: int
    uploads: int
    age: int
    heard_ages: int
    """How many broadcasts a device may have to look back through (more than one where they get lost)."""
    broadcast_loss: float
    catalogue: bool
    discipline: str
    on_overload: Literal["crash", "reject"]
    max_wait_s: float | None
    places: bool
    shared: bool
    """Whether tasks are followed until they end (`physics/sharing.py`): servers share their time, or fail."""
    failures: Failures | None
    switching: bool
    cache: Cache | None
    drop: bool
    noise: bool
    deadline_varies: bool
    device_speed_varies: bool
    step_work_varies: bool
    bit_work: bool
    quality: bool
    asks_steps: bool
    """Whether the denoising steps of a request matter beside its work."""
    step_options: tuple[float, ...]
    power_options_dbm: tuple[float, ...]
    factors: tuple[tuple[str, int], ...]
    """How many there are of each thing that can be chosen with the place (`Scenario.factors`)."""
    services: int
    """Most services that a server offers."""
    band_weights: tuple[float, ...]
    cpu_weights: tuple[float, ...]
    share_passes: int
    """Passes of the water-filling among tasks of unlike weight (`physics/sharing.py`)."""
    split_options: tuple[int, ...]
    least_quality: float
    other_costs: bool
    """Whether options differ in what the reward counts beside latency and deadline."""
    identities: Identities | None
    """What observations tell apart by number, in place of the quality that they hide."""
    local: bool
    mobility: Mobility | None
    battery_j: Spread | None
    standby_power_w: float
    routed: bool
    """Whether some server is reached over the cell of another."""
    arrivals: Arrivals
    at_slot_start: bool
    radio: Radio
    reward: Reward

    @property
    def levels(self) -> int:
        """Ways to do a task at one place (see `gmel.simulator.levels`)."""
        return math.prod(count for _, count in self.factors)

    @property
    def share_weights(self) -> tuple[str, ...]:
        """The weights that options differ in, in the order of `gmel.simulator.state.SHARE_WEIGHTS`."""
        return chosen_weights(self.band_weights, self.cpu_weights)

    @property
    def own_waits(self) -> bool:
        """Whether the wait at a server differs by who asks: by its gang, or by the weight of its task."""
        return self.discipline == "gang" or bool(self.cpu_weights)

    @property
    def parts(self) -> int:
        """Most servers that work on one task."""
        return max(self.split_options, default=1)


class Catalogue(eqx.Module):
    """What a request may ask for. For `uniform` tasks there is one entry and the ranges are used directly."""

    model_cdf: Float[Array, "models"]
    popularity: Float[Array, "models"]
    """Share of each model among the requests."""
    step_work_low: Float[Array, "models"]
    step_work_high: Float[Array, "models"]
    bit_work_low: Float[Array, "models"]
    bit_work_high: Float[Array, "models"]
    square_work: Float[Array, "models"]
    quality: Float[Array, "places kinds steps"]
    """Quality at 0, 1, 2, ... steps; no columns where it is not modelled; one place where it is the same everywhere.
    Kind: service x count of the models + model."""
    gang_cdf: Float[Array, "models gangs"]
    gang_gpus: Int[Array, "models gangs"]
    gang_speedup: Float[Array, "models gangs"]
    gang_load_s: Float[Array, "models gangs"]
    fixed_work: Float[Array, "models"]
    steps: Float[Array, "models choices"]
    steps_cdf: Float[Array, "models choices"]
    images: Float[Array, "models counts"]
    images_cdf: Float[Array, "models counts"]
    bits_low: Float[Array, "models"]
    bits_high: Float[Array, "models"]
    bits_out: Float[Array, "models"]
    memory_gb: Float[Array, "models"]
    load_warm_share: Float[Array, "models"]
    load_warm_s: Float[Array, "models"]
    load_cold_s: Float[Array, "models"]
    load_sigma: Float[Array, "models"]
    load_mean_s: Float[Array, "models"]
    local: Float[Array, "models"]
    """1 where the model fits a device."""


class Plant(eqx.Module):
    """Arrays of a scenario. Floats have JAX's default precision."""

    switches: Switches = eqx.field(static=True)
    slot_s: Float[Array, ""]
    server_speed: Float[Array, "servers"]
    server_gpus: Float[Array, "servers"]
    server_limit: Float[Array, "servers"]
    """Most tasks in service at once (infinite: no limit); with FIFO the GPUs."""
    server_places: Float[Array, "servers"]
    """Most tasks there at once (infinite: no limit)."""
    server_capacity: Float[Array, "servers"]
    """Steps in progress that it can hold (discipline `capacity`)."""
    server_services: Int[Array, "servers"]
    """How many services it offers, at least one."""
    mean_service_s: Float[Array, ""]
    """Service time of a mean request at a mean server."""
    server_beta: Float[Array, "servers"]
    """Share of a denoising round that grows with the batch (see `physics/sharing.py`)."""
    server_best_rate: Float[Array, "servers"]
    """Seconds of service per second with as many tasks in service as may be."""
    server_memory_gb: Float[Array, "servers"]
    server_power_w: Float[Array, "servers"]
    server_switch_power_w: Float[Array, "servers"]
    server_position_m: Float[Array, "servers 2"]
    server_price: Float[Array, "servers"]
    server_has_cell: Float[Array, "servers"]
    backhaul_s_per_bit: Float[Array, "servers"]
    """Seconds a bit takes to the server from another cell."""
    backhaul_delay_s: Float[Array, "servers"]
    device_speed_low: Float[Array, ""]
    device_speed_high: Float[Array, ""]
    device_power_w: Float[Array, ""]
    device_idle_power_w: Float[Array, ""]
    device_tx_power_w: Float[Array, ""]
    device_tx_power_dbm: Float[Array, ""]
    device_cdf: Float[Array, "devices"]
    arrivals: ArrivalLaws
    work_low: Float[Array, ""]
    work_high: Float[Array, ""]
    deadline_low_s: Float[Array, ""]
    deadline_high_s: Float[Array, ""]
    noise_sigma: Float[Array, ""]
    catalogue: Catalogue
    route_m: Float[Array, "routes points 2"]
    """Corners of the closed routes; shorter ones repeat their last."""
    device_position_m: Float[Array, "devices 2"] | None = None
    """Where the devices stand; None: drawn."""
    presence: Presence | None = None
    """When the servers are there; None: always."""


# To compare with all of so few is quicker than to halve.
_SHORT = 64

# So many broadcasts are looked back through that all are lost less often than this.
_UNHEARD = 1e-6


def build_plant(scenario: Scenario, requests: int | None = None) -> Plant:
    """Arrays and switches of a scenario; `requests` overrides the rows of the request table (for traces)."""
    rows = requests if requests is not None else request_capacity(scenario)
    radio, tasks = scenario.radio, scenario.tasks
    service, cpu_weights = scenario.service, tuple(tasks.cpu_weights or ())
    shared = service.discipline not in ("fifo", "gang") or scenario.failures.any
    uploads = scenario.max_uploads
    if uploads is None:
        uploads = default_uploads(rows, radio.sharing == "equal", shared or radio.one_at_a_time)
    age, loss = scenario.slot.broadcast_age_slots, scenario.slot.broadcast_loss
    switches = Switches(
        devices=scenario.devices.count,
        servers=len(scenario.servers),
        # Where servers share their time, one column holds the work of all GPUs.
        gpus=1 if shared else max(server.gpus for server in scenario.servers),
        models=len(scenario.models) if scenario.switching else 0,
        requests=rows,
        uploads=uploads,
        age=age,
        heard_ages=1 + (math.ceil(math.log(_UNHEARD) / math.log(loss)) if loss else 0),
        broadcast_loss=loss,
        catalogue=tasks.kind == "catalogue",
        discipline=service.discipline,
        on_overload=service.on_overload,
        max_wait_s=service.max_wait_s,
        places=any(server.places for server in scenario.servers),
        shared=shared,
        failures=scenario.failures if scenario.failures.any else None,
        switching=scenario.switching,
        cache=scenario.cache,
        drop=tasks.deadline == "drop",
        noise=tasks.noise_sigma > 0,
        deadline_varies=tasks.deadline_s.low < tasks.deadline_s.high,
        device_speed_varies=scenario.devices.speed.varies,
        step_work_varies=any(model.step_work.varies for model in scenario.models if model.step_work),
        bit_work=any(model.work_per_bit for model in scenario.models),
        quality=scenario.has_quality,
        asks_steps=scenario.asks_steps,
        step_options=tuple(tasks.step_options or ()),
        power_options_dbm=tuple(scenario.devices.power_options_dbm or ()),
        factors=tuple(scenario.factors.items()),
        services=scenario.services,
        band_weights=tuple(scenario.devices.band_weights or ()),
        cpu_weights=cpu_weights,
        # A pass that is not the last gives a GPU of its own to all tasks of one more weight; less than all GPUs go.
        share_passes=max(1, min(len(set(cpu_weights)), max(server.gpus for server in scenario.servers))),
        split_options=tuple(tasks.split_options or ()),
        least_quality=tasks.least_quality,
        other_costs=scenario.counts_more_than_latency,
        identities=identities_of(scenario),
        local=scenario.devices.local,
        mobility=scenario.devices.mobility,
        battery_j=scenario.devices.battery_j,
        standby_power_w=scenario.devices.standby_power_w,
        routed=scenario.routed,
        arrivals=scenario.arrivals,
        at_slot_start=scenario.slot.latency_from == "decided",
        radio=radio,
        reward=scenario.reward,
    )
    gpus = np.array([server.gpus for server in scenario.servers], float)
    limit, beta = gpus, np.zeros_like(gpus)
    if service.discipline in ("sharing", "batching"):
        limit = np.array([server.concurrency or np.inf for server in scenario.servers], float)
        sharing = service.discipline == "sharing"
        beta = np.array([1.0 if sharing else server.round_share for server in scenario.servers])
    weights = np.arange(1, scenario.devices.count + 1, dtype=float) ** -scenario.arrivals.device_skew
    work, bits = tasks.work, tasks.bits_in

    def array(value: object) -> jax.Array:
        return jnp.asarray(np.asarray(value, dtype=float))

    return Plant(
        switches=switches,
        slot_s=array(scenario.slot.length_s),
        server_speed=array([server.speed for server in scenario.servers]),
        server_gpus=array(gpus),
        server_limit=array(limit),
        server_places=array([server.places or np.inf for server in scenario.servers]),
        server_capacity=array([server.capacity or 1.0 for server in scenario.servers]),
        server_services=jnp.asarray([len(server.laws) for server in scenario.servers], jnp.int32),
        mean_service_s=array(scenario.mean_work / np.mean([server.speed for server in scenario.servers])),
        server_beta=array(beta),
        server_best_rate=array([scenario.best_rate(server) for server in scenario.servers]),
        server_memory_gb=array([server.memory_gb for server in scenario.servers]),
        server_power_w=array([server.power_w for server in scenario.servers]),
        server_switch_power_w=array([server.switch_power_w for server in scenario.servers]),
        server_position_m=array(_positions(scenario)),
        server_price=array([server.price for server in scenario.servers]),
        server_has_cell=array([float(server.cell) for server in scenario.servers]),
        backhaul_s_per_bit=array(
            [1.0 / server.backhaul_bps if server.backhaul_bps else 0.0 for server in scenario.servers]
        ),
        backhaul_delay_s=array([server.backhaul_delay_s for server in scenario.servers]),
        device_speed_low=array(scenario.devices.speed.low),
        device_speed_high=array(scenario.devices.speed.high),
        device_power_w=array(scenario.devices.compute_power_w),
        device_idle_power_w=array(scenario.devices.idle_power_w),
        device_tx_power_w=array(10 ** (0.1 * scenario.devices.tx_power_dbm - 3)),
        device_tx_power_dbm=array(scenario.devices.tx_power_dbm),
        device_cdf=array(_cdf(weights)),
        arrivals=arrival_laws(scenario, rows),
        work_low=array(work.low if work else 0.0),
        work_high=array(work.high if work else 0.0),
        deadline_low_s=array(tasks.deadline_s.low),
        deadline_high_s=array(tasks.deadline_s.high),
        noise_sigma=array(tasks.noise_sigma),
        catalogue=_catalogue(scenario, (bits.low, bits.high) if bits else (0.0, 0.0)),
        route_m=array(_routes(scenario)),
        device_position_m=None if scenario.devices.positions_m is None else array(scenario.devices.positions_m),
        presence=presence_of(scenario),
    )


def default_uploads(requests: int, crowded: bool, followed: bool) -> int:
    """Rows of the table of uploads in flight, at least eight.

    Half a slot's largest number of requests where a link is its own; where uploads share a cell, a crowd slows itself
    down and stays: four slots' worth. Where tasks are followed until they end, or wait at their device to be sent:
    eight, at least 64.
    """
    if followed:
        return max(64, 8 * requests)
    return max(8, 4 * requests if crowded else (requests + 1) // 2)


def _catalogue(scenario: Scenario, uniform_bits: tuple[float, float]) -> Catalogue:
    models = scenario.models if scenario.tasks.kind == "catalogue" else []
    room_gb = scenario.devices.memory_gb

    def column(values: list[float], otherwise: float) -> jax.Array:
        return jnp.asarray(np.array(values or [otherwise], dtype=float))

    steps, steps_cdf = _choices([model.steps for model in models])
    images, images_cdf = _choices([model.images for model in models])
    gangs = _gangs(models)
    popularity = np.array([model.popularity for model in models] or [1.0])
    return Catalogue(
        model_cdf=jnp.asarray(_cdf(popularity)),
        popularity=jnp.asarray(popularity / popularity.sum()),
        step_work_low=column([model.step_work.low if model.step_work else 0.0 for model in models], 1.0),
        step_work_high=column([model.step_work.high if model.step_work else 0.0 for model in models], 1.0),
        bit_work_low=column([model.work_per_bit.low if model.work_per_bit else 0.0 for model in models], 0.0),
        bit_work_high=column([model.work_per_bit.high if model.work_per_bit else 0.0 for model in models], 0.0),
        square_work=column([model.square_work for model in models], 0.0),
        quality=_quality(scenario) if scenario.has_quality else jnp.zeros((1, max(1, len(models)), 0)),
        gang_cdf=gangs[0],
        gang_gpus=gangs[1].astype(jnp.int32),
        gang_speedup=gangs[2],
        gang_load_s=gangs[3],
        fixed_work=column([model.fixed_work for model in models], 0.0),
        steps=steps,
        steps_cdf=steps_cdf,
        images=images,
        images_cdf=images_cdf,
        bits_low=column([model.bits_in.low for model in models], uniform_bits[0]),
        bits_high=column([model.bits_in.high for model in models], uniform_bits[1]),
        bits_out=column([model.bits_out_per_image for model in models], scenario.tasks.bits_out),
        memory_gb=column([model.memory_gb for model in models], 0.0),
        load_warm_share=column([model.load.warm_share for model in models], 1.0),
        load_warm_s=column([model.load.warm_median_s * model.load_scale for model in models], 0.0),
        load_cold_s=column([model.load.cold_median_s * model.load_scale for model in models], 0.0),
        load_sigma=column([model.load.sigma for model in models], 0.0),
        load_mean_s=column([model.load.mean * model.load_scale for model in models], 0.0),
        local=column([float(model.memory_gb <= room_gb or room_gb == 0) for model in models], 1.0),
    )


def _quality(scenario: Scenario) -> Float[Array, "places kinds steps"]:
    """Quality of each model by each service at 0, 1, 2, ... steps, up to the most that anybody can ask for."""
    asked = [steps for model in scenario.models for steps in model.steps.values]
    most = max(asked + (scenario.tasks.step_options or []))
    steps = jnp.arange(math.ceil(most) + 2, dtype=float)
    everywhere = [model.quality for model in scenario.models]
    if not any(server.quality or server.services for server in scenario.servers):
        return jnp.stack([_quality_at(law, steps) for law in everywhere])[None]
    # The device itself has no services: what it would do at the levels of others is that of the first.
    itself = [(law, 0.0) for law in everywhere] * scenario.services
    places = [itself, *(_kinds(server, everywhere, scenario.services) for server in scenario.servers)]
    tables = {law: _quality_at(law, steps) for kinds in places for law, _ in kinds}
    return jnp.stack([jnp.stack([tables[law] + base for law, base in kinds]) for kinds in places])


def _kinds(server: Server, everywhere: list[Quality | None], services: int) -> list[tuple[Quality | None, float]]:
    """Law and base of the quality of each kind of result of a server; it has no more services than it offers, those
    beyond are masked."""
    offered = [server.laws[min(number, len(server.laws) - 1)] for number in range(services)]
    bases = [service.base for service in server.services] or [()]
    added = [bases[min(number, len(bases) - 1)] or [0.0] * len(everywhere) for number in range(services)]
    return [
        (law or of_model, base)
        for law, of_models in zip(offered, added, strict=True)
        for of_model, base in zip(everywhere, of_models, strict=True)
    ]


def _quality_at(law: Quality | None, steps: Float[Array, "steps"]) -> Float[Array, "steps"]:
    if law is None:  # of a place where nothing runs
        return jnp.zeros_like(steps)
    match law.law:
        case "piecewise":
            return piecewise_quality(steps, law.first_steps, law.last_steps, law.first, law.last)
        case "log":
            return logarithmic_quality(
                steps, law.first_steps, law.last_steps, law.scale, law.base, law.offset, law.last
            )
        case "power":
            return power_law_quality(steps, law.first_steps, law.limit, law.factor, law.exponent)


def _gangs(models: list[GenerationModel]) -> list[Float[Array, "models gangs"]]:
    """Ways to run each model as padded tables: cumulative probability, GPUs, speed-up, load time."""
    width = max((len(model.gangs) for model in models), default=0)
    tables = np.ones((4, max(1, len(models)), width))
    for row, model in enumerate(models):
        for column, gang in enumerate(model.gangs):
            tables[1:, row, column] = gang.gpus, gang.speedup, gang.load_s
        tables[0, row, : len(model.gangs)] = _cdf(np.array([gang.weight for gang in model.gangs] or [1.0]))[
            : len(model.gangs)
        ]
    return [jnp.asarray(table) for table in tables]


def _choices(laws: list[Choice]) -> tuple[Float[Array, "models choices"], Float[Array, "models choices"]]:
    """Discrete laws of unlike length as padded tables of values and cumulative probabilities."""
    width = max((len(law.values) for law in laws), default=1)
    values, cdf = np.ones((max(1, len(laws)), width)), np.ones((max(1, len(laws)), width))
    for row, law in enumerate(laws):
        values[row, : len(law.values)] = law.values
        cdf[row, : len(law.values)] = _cdf(np.array(law.weights))
    return jnp.asarray(values), jnp.asarray(cdf)


def _cdf(weights: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Cumulative probabilities; the last is above every uniform number so that rounding selects no row beyond it."""
    cdf = np.cumsum(weights / weights.sum())
    cdf[-1] = 1.0
    return cdf


def _positions(scenario: Scenario) -> list[tuple[float, float]]:
    """Where the servers stand: as given, the others on a regular grid over the hall."""
    length, width = scenario.radio.hall_m
    count = len(scenario.servers)
    columns = min(count, max(1, math.ceil(math.sqrt(count * length / width))))
    rows = math.ceil(count / columns)
    grid: list[tuple[float, float]] = []
    for row in range(rows):
        # The last row may be shorter; it is spread over the full length like the others.
        here = min(columns, count - row * columns)
        grid += [((c + 0.5) * length / here, (row + 0.5) * width / rows) for c in range(here)]
    return [server.position_m or grid[index] for index, server in enumerate(scenario.servers)]


def _routes(scenario: Scenario) -> Float[np.ndarray, "routes points 2"]:
    law = scenario.devices.mobility
    routes = (law.routes_m if law else None) or ()
    most = max((len(route) for route in routes), default=0)
    padded = [route + (route[-1],) * (most - len(route)) for route in routes]
    return np.asarray(padded, float).reshape(len(routes), most, 2)


def pick(cdf: Float[Array, "... n"], u: Float[Array, "..."]) -> Int[Array, "..."]:
    """Index drawn from cumulative probabilities by one uniform number (inverse transform)."""
    last = cdf.shape[-1] - 1
    if cdf.ndim == 1 and last > _SHORT:
        return jnp.minimum(jnp.searchsorted(cdf, u).astype(jnp.int32), last)
    return jnp.minimum(jnp.sum(u[..., None] > cdf, axis=-1, dtype=jnp.int32), last)
