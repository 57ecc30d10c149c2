"""The radio: what the simulator draws and computes beside closed forms in SciPy, and the tables of the standards."""

# SciPy ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import special

from gmel.evaluation.validation.check import Exact, Run, Sample, check
from gmel.physics import channel, radio
from gmel.physics.random import mix_seed
from gmel.scenario.schema import Arrivals, Devices, Radio, Range, Scenario, Server, Slot, Spread, Tasks
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.links import draw_fading, draw_links, least_snr, transfer_s
from gmel.simulator.plant import Plant, build_plant
from gmel.simulator.state import State

__all__ = ["ergodic_shannon_bps_hz", "inf_path_loss_db"]

Floats = NDArray[np.float64]

MEAN_SNR = 10.0
DEVICES, SERVERS = 16, 4
SLOTS = 200
"""Slots of a replication: with 16 devices and 4 servers 12,800 fades."""
FADING_SPEED_M_S, FADING_SLOT_S, FADING_SLOTS = 0.17, 0.05, 600
"""Where fading lasts: rho = 0.9 from slot to slot."""
LIGHT_M_S = 299_792_458.0


def ergodic_shannon_bps_hz(mean_snr: float, low: float = 0.0, top: float = math.inf) -> float:
    """E[log2(1 + min(Y, top)); Y >= low], Y exponential with mean `mean_snr`, by SciPy's exponential integral."""
    start, rest = (1.0 + low) / mean_snr, math.exp(1.0 / mean_snr)
    mean = math.exp(-low / mean_snr) * math.log1p(low) + rest * float(special.exp1(start))
    if math.isfinite(top):
        mean -= rest * float(special.exp1((1.0 + top) / mean_snr))
    return mean / math.log(2.0)


def inf_path_loss_db(distance_m: Floats, carrier_ghz: float, subscenario: str, line_of_sight: bool) -> Floats:
    """Path loss of TR 38.901 Table 7.4.1-1, Indoor Factory, row by row in NumPy."""
    rows = {
        "LOS": (31.84, 21.50, 19.0),
        "SL": (33.0, 25.5, 20.0),
        "DL": (18.6, 35.7, 20.0),
        "SH": (32.4, 23.0, 20.0),
        "DH": (33.63, 21.9, 20.0),
    }
    names = ["LOS"]
    if not line_of_sight and subscenario != "HH":
        names += {"DL": ["DL", "SL"]}.get(subscenario, [subscenario])
    losses = [a + b * np.log10(distance_m) + c * math.log10(carrier_ghz) for a, b, c in (rows[n] for n in names)]
    return np.max(losses, axis=0)


@check("ergodic-rate", "radio")
def ergodic_rate(run: Run) -> Sample:
    """Rayleigh fades of the simulator: mean Shannon rate = exp(1 / g) E1(1 / g) / ln 2 bit/s/Hz.

    Source: Alouini and Goldsmith 1999; E1 by SciPy
    """
    return Sample(ergodic_shannon_bps_hz(MEAN_SNR), _mean_rate(run, "shannon"))


@check("capped-ergodic-rate", "radio")
def capped_ergodic_rate(run: Run) -> Sample:
    """Rayleigh fades raised to the floor, truncated Shannon rate: its mean in closed form, with floor and cap.

    Source: TR 36.942 annex A.1; integration by parts, E1 by SciPy
    """
    low, top = 10.0 ** (0.1 * radio.UPLINK_TRUNCATION.snr_min_db), 10.0 ** (0.1 * radio.UPLINK_TRUNCATION.snr_max_db)
    raised = -math.expm1(-low / MEAN_SNR) * math.log2(1.0 + low)
    expected = radio.UPLINK_TRUNCATION.attenuation * (raised + ergodic_shannon_bps_hz(MEAN_SNR, low, top))
    return Sample(expected, _mean_rate(run, "truncated-shannon"))


@check("ergodic-closed-forms", "radio")
def ergodic_closed_forms(run: Run) -> Exact:
    """The simulator's own ergodic rates, with floor and with cap, at 0.01 < g < 10^5: largest relative error.

    Source: exponential integral of SciPy
    """
    del run
    mean_snr = np.geomspace(1e-2, 1e5, 141)
    error = 0.0
    # A cap of 4 bit/s/Hz is an SNR of 15. The expected value of the two-sided case cancels below a mean SNR of 0.1.
    cases = [(0.0, None), (0.0, 4.0), (0.5, None), (0.5, 4.0)]
    with jax.enable_x64(True):
        for floor, cap in cases:
            measured = np.asarray(radio.ergodic_shannon(jnp.asarray(mean_snr), floor=floor, cap=cap))
            top = math.inf if cap is None else 2.0**cap - 1.0
            expected = np.array([ergodic_shannon_bps_hz(g, floor, top) for g in mean_snr.tolist()])
            error = max(error, float(np.max(np.abs(measured / expected - 1.0))))
    return Exact(error, 1e-9, len(cases) * mean_snr.size)


@check("outage-share", "radio")
def outage_share(run: Run) -> Sample:
    """Rayleigh fades below the floor: share of uploads that must wait = 1 - exp(-floor / g).

    Source: distribution function of the exponential law
    """
    plant = _fading_plant("shannon", "outage")
    expected = -math.expm1(-least_snr(plant.switches.radio) / MEAN_SNR)
    return Sample(expected, _fades(run, plant)[0])


@check("outage-wait", "radio")
def outage_wait(run: Run) -> Sample:
    """Slots that an upload waits for the link: geometric, mean exp(floor / g) - 1.

    Source: mean of the geometric law
    """
    plant = _fading_plant("shannon", "outage")
    expected = math.expm1(least_snr(plant.switches.radio) / MEAN_SNR)
    return Sample(expected, _fades(run, plant)[1])


@check("outage-fade", "radio")
def outage_fade(run: Run) -> Sample:
    """SNR that an upload meets after the wait: floor + g on average.

    Source: memorylessness of the exponential law
    """
    plant = _fading_plant("shannon", "outage")
    return Sample(least_snr(plant.switches.radio) + MEAN_SNR, _fades(run, plant)[2])


@check("ar1-correlation", "radio")
def ar1_correlation(run: Run) -> Sample:
    """Correlated fading of the simulator: correlation of the complex gains at lag 5 = rho^5, rho = J0(2 pi f_d T).

    Source: Jakes 1974; J0 by SciPy; AR(1) process
    """
    return Sample(_jakes() ** 5, _correlated_fading(run)[0])


@check("ar1-fades", "radio")
def ar1_fades(run: Run) -> Sample:
    """Fades that uploads of one slot and the next meet: covariance of the power gains = rho^2.

    Source: Jakes 1974; the powers of complex Gaussian gains have the square of their correlation
    """
    return Sample(_jakes() ** 2, _correlated_fading(run)[1])


@check("inf-path-loss", "radio")
def inf_path_loss(run: Run) -> Exact:
    """Path loss of all five sub-scenarios, 1 to 600 m, with and without line of sight, at 3.5 and 28 GHz, in dB.

    Source: TR 38.901 Table 7.4.1-1, Indoor Factory, in NumPy
    """
    del run
    distance_m = np.geomspace(1.0, 600.0, 200)
    error, compared = 0.0, 0
    with jax.enable_x64(True):
        for subscenario in get_args(channel.SubScenario):
            for carrier_ghz in (3.5, 28.0):
                for line_of_sight in (True, False):
                    got = channel.path_loss_db(jnp.asarray(distance_m), carrier_ghz, subscenario, line_of_sight)
                    expected = inf_path_loss_db(distance_m, carrier_ghz, subscenario, line_of_sight)
                    error = max(error, float(np.max(np.abs(np.asarray(got) - expected))))
                    compared += distance_m.size
    return Exact(error, 1e-9, compared)


@check("inf-mean-snr", "radio")
def inf_mean_snr(run: Run) -> Sample:
    """Mean SNR in dB over the hall, from drawn positions, line of sight and shadowing = integral over the floor.

    Source: TR 38.901 Tables 7.4.1-1 and 7.4.2-1, midpoint rule on 600 x 300 places
    """
    plant = _hall_plant()
    return Sample(_hall_moments(plant)[0], _hall_snr_db(run, plant).mean(axis=1))


@check("inf-snr-spread", "radio")
def inf_snr_spread(run: Run) -> Sample:
    """Mean square of the SNR in dB about its mean: path loss, line of sight and shadowing together.

    Source: the same integral, with the variance of shadowing
    """
    plant = _hall_plant()
    mean, variance = _hall_moments(plant)
    return Sample(variance, ((_hall_snr_db(run, plant) - mean) ** 2).mean(axis=1))


@check("poisson-count", "radio")
def poisson_count(run: Run) -> Sample:
    """Requests that the simulator draws in a slot: variance = mean = rate x slot.

    Source: Poisson law
    """
    rate = 3.0
    scenario = _scenario(Radio(fading="none", sharing="none", download=False), Arrivals(rate_per_s=rate))
    environment = Environment.from_scenario(scenario)

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        words = seeds(int(random.integers(2**40)), run.replications)
        counts = np.asarray(_counts(environment, words, 2000), float)
        return (((counts - rate) ** 2).mean(axis=1),)

    return Sample(rate, *run.repeat(batch))


def _jakes() -> float:
    """Correlation of the gains from slot to slot of `_correlated_fading`."""
    doppler_hz = FADING_SPEED_M_S * 1e9 * Radio().carrier_ghz / LIGHT_M_S
    return float(special.j0(2.0 * math.pi * doppler_hz * FADING_SLOT_S))


def _correlated_fading(run: Run) -> tuple[Floats, Floats]:
    """Mean product of the gains five slots apart, covariance of the fades one slot apart, per replication.

    Every device asks once a slot, so that every link is met in every slot.
    """
    spec = Radio(model="uniform-snr", fading="ar1", fading_speed_m_s=FADING_SPEED_M_S, floor="clip", floor_snr_db=-50.0)
    scenario = _scenario(spec, Arrivals(kind="uniform", count=(1, 1)), FADING_SLOT_S)
    environment = Environment.from_scenario(scenario)
    shared = replace(run, name="correlated fading")

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        words = seeds(int(random.integers(2**40)), run.replications)
        gains, powers = (np.asarray(field, float) for field in _fading(environment, words, FADING_SLOTS))
        return gains, powers - 1.0

    def make() -> tuple[Floats, Floats]:
        gains, powers = shared.repeat(batch)
        return gains, powers

    return run.once("correlated fading", make)


def _scenario(spec: Radio, arrivals: Arrivals | None = None, slot_s: float = 1.0) -> Scenario:
    return Scenario(
        name="radio",
        slot=Slot(length_s=slot_s),
        devices=Devices(count=DEVICES, speed=Spread.constant(1.0)),
        servers=[Server(name=f"S{number}", speed=1.0) for number in range(SERVERS)],
        radio=spec,
        tasks=Tasks(
            kind="uniform",
            work=Range(low=1.0, high=1.0),
            bits_in=Range(low=1e6, high=1e6),
            deadline_s=Range(low=1.0, high=1.0),
        ),
        arrivals=arrivals or Arrivals(rate_per_s=1.0),
        max_uploads=1,
    )


def _fading_plant(
    rate: Literal["shannon", "truncated-shannon"], floor: Literal["clip", "outage"], floor_snr_db: float = 8.0
) -> Plant:
    snr_db = 10.0 * math.log10(MEAN_SNR)
    spec = Radio(
        model="uniform-snr",
        snr_db=(snr_db, snr_db),
        bandwidth_hz=1e6,
        rate=rate,
        fading="block",
        floor=floor,
        floor_snr_db=floor_snr_db,
        sharing="none",
    )
    return build_plant(_scenario(spec))


def _mean_rate(run: Run, rate: Literal["shannon", "truncated-shannon"]) -> Floats:
    """Mean rate over the band, in bit/s/Hz, that uploads of all devices to all servers meet, per replication."""
    # A floor that one fade in a million falls below; truncated Shannon has a higher one of its own.
    plant = _fading_plant(rate, "clip", floor_snr_db=-50.0)
    spec = plant.switches.radio

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        words = seeds(int(random.integers(2**40)), run.replications)
        fade, _ = _draw(plant, words, SLOTS)
        bits = 1e6
        time_s = transfer_s(plant, jnp.asarray(bits), jnp.asarray(MEAN_SNR), fade, jnp.asarray(1.0), "uplink")
        return ((bits / np.asarray(time_s, float) / spec.bandwidth_hz).mean(axis=(1, 2, 3)),)

    return run.repeat(batch)[0]


def _fades(run: Run, plant: Plant) -> tuple[Floats, Floats, Floats]:
    """Share of uploads that wait, mean slots of the wait, mean SNR met, per replication."""

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        words = seeds(int(random.integers(2**40)), run.replications)
        fade, wait_s = (np.asarray(field, float) for field in _draw(plant, words, SLOTS))
        slots = wait_s / float(plant.slot_s)
        axes = (1, 2, 3)
        return (slots > 0).mean(axis=axes), slots.mean(axis=axes), MEAN_SNR * fade.mean(axis=axes)

    share, slots, snr = run.repeat(batch)
    return share, slots, snr


def _hall_plant() -> Plant:
    return build_plant(_scenario(Radio(model="inf")))


def _hall_snr_db(run: Run, plant: Plant) -> Floats:
    """SNR in dB of all links of many episodes [replications, links]."""
    episodes = 100

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        words = seeds(int(random.integers(2**40)), run.replications * episodes)
        snr = np.asarray(_links(plant, words), float)
        return (10.0 * np.log10(snr).reshape(run.replications, -1),)

    return run.repeat(batch)[0]


def _hall_moments(plant: Plant) -> tuple[float, float]:
    """Mean and variance of the SNR in dB of a link from a uniform place in the hall to a server, over the servers."""
    spec = plant.switches.radio
    across, along = 600, 300
    x = (np.arange(across) + 0.5) * spec.hall_m[0] / across
    y = (np.arange(along) + 0.5) * spec.hall_m[1] / along
    power_dbm = float(plant.device_tx_power_dbm)
    noise_dbm = -174.0 + 10.0 * math.log10(spec.bandwidth_hz) + spec.noise_figure_db
    height_m = spec.server_height_m - spec.device_height_m
    clutter = (spec.server_height_m - spec.device_height_m) / (spec.clutter_height_m - spec.device_height_m)
    decay_m = -spec.clutter_size_m / math.log(1.0 - spec.clutter_density) * clutter
    first = second = 0.0
    places = np.asarray(plant.server_position_m, float)
    for place in places:
        flat_m = np.hypot(x[:, None] - place[0], y[None, :] - place[1])
        length_m = np.hypot(flat_m, height_m)
        sight = np.exp(-flat_m / decay_m)
        for weight, line_of_sight, sigma_db in ((sight, True, 4.3), (1.0 - sight, False, 4.0)):
            loss_db = inf_path_loss_db(length_m, spec.carrier_ghz, spec.subscenario, line_of_sight)
            snr_db = power_dbm - noise_dbm - loss_db
            first += float(np.mean(weight * snr_db)) / len(places)
            second += float(np.mean(weight * (snr_db**2 + sigma_db**2))) / len(places)
    return first, second - first**2


@eqx.filter_jit
def _draw(plant: Plant, words: Any, slots: int) -> Any:
    snr = jnp.full((DEVICES, SERVERS), MEAN_SNR)
    devices = jnp.arange(DEVICES, dtype=jnp.int32)

    def one(seed: Any) -> Any:
        mixed = mix_seed(seed)
        return jax.vmap(lambda slot: draw_fading(plant, mixed, slot, devices, snr))(jnp.arange(slots))

    return jax.vmap(one)(words)


@eqx.filter_jit
def _links(plant: Plant, words: Any) -> Any:
    return jax.vmap(lambda seed: draw_links(plant, mix_seed(seed)).uplink_snr)(words)


@eqx.filter_jit
def _counts(environment: Environment, words: Any, slots: int) -> Any:
    """Requests of each slot, all sent to the first server."""
    action = jnp.ones(environment.requests, jnp.int32)

    def one(seed: Any) -> Any:
        def slot(state: Any, _: None) -> Any:
            return environment.step(state, action)[0], jnp.sum(state.requests.present)

        return jax.lax.scan(slot, environment.reset(seed), None, slots)[1]

    return jax.vmap(one)(words)


@eqx.filter_jit
def _fading(environment: Environment, words: Any, slots: int) -> Any:
    """Per episode: mean product of the gains five slots apart, of the fades of requests one slot apart."""
    nowhere = jnp.zeros(environment.requests, jnp.int32)

    def slot(state: State, _: None) -> Any:
        requests = state.requests
        met = jnp.zeros((DEVICES, SERVERS)).at[requests.device].set(requests.fade)
        return environment.step(state, nowhere)[0], (jnp.stack(state.links.fading or ()), met)

    def one(seed: Any) -> Any:
        gains, fades = jax.lax.scan(slot, environment.reset(seed), None, slots)[1]
        return jnp.mean(gains[5:] * gains[:-5]), jnp.mean(fades[1:] * fades[:-1])

    return jax.lax.map(one, words, batch_size=8)
