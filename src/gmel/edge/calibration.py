"""A scenario from what was measured live, and how well the simulator then tells what was measured.

Fitted: the work of models and the speeds of servers (together, from service times), load times, the noise of work and
what a task takes on the way. The requests themselves become a trace. Checked in two ways, on the part of the run that
nothing was fitted to: the *replay* sends every task where it went and gives it the work that it had, so it tells
whether queues are right; the *prediction* lets the simulator's own rule decide and the fitted laws say the work.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray
from numpy.typing import NDArray
from scipy.optimize import nnls

from gmel.edge.records import read_records
from gmel.evaluation.episodes import DRAIN_SLOTS, AnyPolicy, Episodes, run_episodes
from gmel.policies.central import EarliestFinish
from gmel.policies.policy import StatelessPolicy
from gmel.scenario.demand import LoadTime
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.scenario.laws import Range, Spread
from gmel.scenario.load import load_scenario, to_toml, validate_scenario
from gmel.scenario.schema import Scenario
from gmel.scenario.trace import Trace, write_trace
from gmel.simulator.build import replay_environment
from gmel.simulator.environment import Environment
from gmel.simulator.state import Observation

__all__ = ["Agreement", "Calibration", "calibrate", "calibrate_file", "calibration_lines"]

Floats = NDArray[np.float64]

_RATE_BPS = 1e9
"""Of the link that stands for everything on the way: its bits are what the way takes."""
_SLOT_S = 0.01
"""Decisions fall at once live: slots short against everything else stand for that."""
_FEWEST = 30
_FIT_SHARE = 0.5
_ROUNDS = 50
_LOADED_S = 1e-3
"""A longer time until the model was there is a load."""


@dataclass(frozen=True)
class Agreement:
    """Measured live and simulated, in seconds, over the same tasks."""

    tasks: int
    live_mean_s: float
    mean_s: float
    live_p95_s: float
    p95_s: float

    @property
    def mean_error(self) -> float:
        """Relative error of the mean."""
        return self.mean_s / self.live_mean_s - 1.0

    @property
    def p95_error(self) -> float:
        """Relative error of the 95th percentile."""
        return self.p95_s / self.live_p95_s - 1.0


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
        scenario: the plant with fitted numbers.
        speeds: by server, in work units per second; the first server that did tasks keeps its speed.
        fixed_work, step_work: by model, work units of a photo.
        noise_sigma: deviation of the logarithm of the work around these laws.
        load_s: by model; none where no load was seen.
        on_the_way_s: gateway and network together, of a task that nothing holds up.
        replay, prediction: see the module.
        retried: tasks that were left out, as they ran more than once.
    """

    scenario: Scenario
    speeds: dict[str, float]
    fixed_work: dict[str, float]
    step_work: dict[str, float]
    noise_sigma: float
    load_s: dict[str, float | None]
    on_the_way_s: float
    replay: Agreement
    prediction: Agreement
    retried: int

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("scenario", "replay", "prediction")
        }
        for name in ("replay", "prediction"):
            found: Agreement = getattr(self, name)
            plain[name] = dataclasses.asdict(found) | {"mean_error": found.mean_error, "p95_error": found.p95_error}
        return plain


class _Recorded(StatelessPolicy):
    """Every task goes where it went: in a replay a request's device is the number of the server that did it."""

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """The option of that server."""
        del key
        return observation.device + 1


def calibrate_file(records: Path, scenario: str, out: Path) -> Calibration:
    """Fits a scenario to a file of records, and writes it with its requests beside it.

    Args:
        records: of `gmel live`.
        scenario: the plant that was run: names of servers and models, and everything that is not fitted.
        out: the file of the fitted scenario, .toml; the trace lies beside it.

    Raises:
        InputError: records or a scenario that cannot be used, or no place to write.
    """
    if out.suffix != ".toml":
        raise InputError(f"--out {out}: must end in .toml")
    if not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: there is no such folder; make it or choose another place")
    trace = out.with_suffix(".requests.csv")
    found = calibrate(read_records(records), load_scenario(scenario), trace)
    replace_file(out, to_toml(found.scenario).encode())
    return found


def calibrate(records: dict[str, Any], base: Scenario, trace_path: Path | None = None) -> Calibration:
    """Fits a scenario to records (see the module).

    Args:
        records: columns of `gmel.edge.records`.
        base: the plant that was run.
        trace_path: where the requests are written; none: the scenario keeps its own arrivals.

    Raises:
        InputError: too few records, or a server or model that the plant does not have.
    """
    columns, retried = _usable(records)
    servers, models = [server.name for server in base.servers], [model.name for model in base.models]
    server = _numbers(columns["server"], servers, "server")
    model = _numbers(columns["model"], models, "model")
    count = len(server)
    fitted = np.arange(count) < _FIT_SHARE * count
    speed, fixed, step, sigma = _service_laws(columns, server, model, base, fitted)
    loads = _load_times(columns, model, fitted, models)
    way_s = _on_the_way(columns, server, fitted)
    plant = _fitted_scenario(base, speed, fixed, step, sigma, loads, way_s)
    work = columns["own_s"] * speed[server]
    later = ~fitted
    exact = _trace_of(columns, model, server, work, way_s, plant)
    devices = np.unique(columns["device"], return_inverse=True)[1] % plant.devices.count
    steps = np.where(np.isnan(columns["steps"]), 1.0, columns["steps"])
    law = columns["images"] * (fixed[model] + steps * step[model])
    asked = _trace_of(columns, model, devices, law, way_s, plant)
    by_record = _quiet(plant).model_copy(update={"devices": plant.devices.model_copy(update={"count": len(servers)})})
    replay = _simulated(by_record, exact, _Recorded(), columns, later)
    prediction = _simulated(plant, asked, EarliestFinish(), columns, later)
    if trace_path is not None:
        write_trace(asked, trace_path)
        arrivals = {"kind": "trace", "trace": str(trace_path), "train_share": 0.5}
        plant = _changed(plant, {"arrivals": arrivals})
    return Calibration(
        scenario=plant,
        speeds=dict(zip(servers, map(float, speed), strict=True)),
        fixed_work=dict(zip(models, map(float, fixed), strict=True)),
        step_work=dict(zip(models, map(float, step), strict=True)),
        noise_sigma=sigma,
        load_s=loads,
        on_the_way_s=way_s,
        replay=replay,
        prediction=prediction,
        retried=retried,
    )


def calibration_lines(found: Calibration) -> list[str]:
    """For a person."""

    def said(name: str, each: Agreement) -> str:
        return (
            f"{name}: mean {each.mean_s:.3f} s, live {each.live_mean_s:.3f} s ({100 * each.mean_error:+.1f} %); "
            f"P95 {each.p95_s:.3f} s, live {each.live_p95_s:.3f} s ({100 * each.p95_error:+.1f} %); {each.tasks} tasks"
        )

    lines = [f"server {name}: speed {speed:.4g}" for name, speed in found.speeds.items()]
    for name, fixed in found.fixed_work.items():
        load_s = found.load_s[name]
        loaded = "no load seen" if load_s is None else f"loaded in {load_s:.3g} s"
        lines.append(f"model {name}: work {fixed:.4g} + {found.step_work[name]:.4g} a step for each photo; {loaded}")
    lines.append(f"noise of the work {found.noise_sigma:.3g}; on the way {1000 * found.on_the_way_s:.1f} ms")
    if found.retried:
        lines.append(f"{found.retried} tasks that ran more than once were left out")
    return [*lines, said("replay of the second half", found.replay), said("prediction of it", found.prediction)]


def _usable(records: dict[str, Any]) -> tuple[dict[str, Any], int]:
    order = np.argsort(records["generated_s"], kind="stable")
    columns = {name: values[order] for name, values in records.items()}
    columns["steps"] = np.array([np.nan if value is None else float(value) for value in columns["steps"]], float)
    once = columns["attempt"] == 1
    columns = {name: values[once] for name, values in columns.items()}
    # Tasks that were drawn together have the service of all of them: each took its share of it.
    columns["own_s"] = (
        columns["service_s"] * columns["images"] / np.fmax(columns["together"].astype(float), columns["images"])
    )
    if len(columns["id"]) < _FEWEST:
        raise InputError(
            f"records: {len(columns['id'])} tasks that ran once, at least {_FEWEST} are needed; run longer"
        )
    return columns, int((~once).sum())


def _numbers(values: Sequence[Any], names: list[str], what: str) -> NDArray[np.int64]:
    unknown = sorted({str(value) for value in values} - set(names))
    if unknown:
        raise InputError(f"records: the {what} {unknown[0]!r} is not in the scenario; it has {', '.join(names)}")
    return np.array([names.index(str(value)) for value in values], np.int64)


def _service_laws(
    columns: dict[str, Any],
    server: NDArray[np.int64],
    model: NDArray[np.int64],
    base: Scenario,
    fitted: NDArray[np.bool_],
) -> tuple[Floats, Floats, Floats, float]:
    """Speeds and work by turns: each given the other, in logarithms for speeds, relative errors least for work.

    Only ratios of work and speed can be seen; the first server that did tasks keeps the speed of the scenario.
    """
    steps, images, service = columns["steps"], columns["images"].astype(float), columns["own_s"]
    speed = np.array([each.speed for each in base.servers])
    fixed = np.array([each.fixed_work for each in base.models])
    step = np.array([each.step_work.mean if each.step_work else 0.0 for each in base.models])
    use = fitted & (service > 0)
    anchor = int(server[use][0]) if use.any() else 0
    seen = sorted(set(server[use].tolist()))
    count = np.where(np.isnan(steps), 1.0, steps)
    for _ in range(_ROUNDS):
        for kind in set(model[use].tolist()):
            rows = use & (model == kind)
            work = service[rows] * speed[server[rows]] / images[rows]
            if np.isnan(steps[rows]).any() or np.unique(steps[rows]).size < 2:
                # The geometric mean: the noise is a factor.
                fixed[kind], step[kind] = float(np.exp(np.log(work).mean())), 0.0
                continue
            design = np.stack([np.ones(work.size), steps[rows]], axis=1) / work[:, None]
            fixed[kind], step[kind] = nnls(design, np.ones(work.size))[0]
        law = images * (fixed[model] + count * step[model])
        for place in seen:
            rows = use & (server == place)
            speed[place] = float(np.exp(np.log(law[rows] / service[rows]).mean()))
        ratio = base.servers[anchor].speed / speed[anchor]
        speed[seen] *= ratio
        fixed, step = fixed * ratio, step * ratio
    law = images * (fixed[model] + count * step[model])
    residual = np.log(service[use] * speed[server[use]] / law[use])
    return speed, fixed, step, float(residual.std())


def _load_times(
    columns: dict[str, Any], model: NDArray[np.int64], fitted: NDArray[np.bool_], names: list[str]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for place, name in enumerate(names):
        loads = columns["switch_s"][(model == place) & (columns["switch_s"] > _LOADED_S) & fitted]
        found[name] = float(np.median(loads)) if loads.size else None
    return found


def _on_the_way(columns: dict[str, Any], server: NDArray[np.int64], fitted: NDArray[np.bool_]) -> float:
    """Median of what tasks took beside load and service, of those that came when their server had nothing to do."""
    began, ended = columns["generated_s"], columns["end_s"]
    alone = [
        index
        for index in np.flatnonzero(fitted)
        if not np.any((server == server[index]) & (began < began[index]) & (ended > began[index]))
    ]
    beside = columns["latency_s"] - columns["switch_s"] - columns["service_s"]
    return float(np.median(beside[alone])) if alone else float(np.min(beside[fitted]))


def _fitted_scenario(
    base: Scenario,
    speed: Floats,
    fixed: Floats,
    step: Floats,
    sigma: float,
    loads: dict[str, float | None],
    way_s: float,
) -> Scenario:
    bits = max(way_s - _SLOT_S / 2, 0.0) * _RATE_BPS
    models = [
        model.model_copy(
            update={
                "fixed_work": float(fixed[place]),
                "step_work": Spread.constant(float(step[place])) if step[place] > 0 else None,
                "bits_in": Range(low=bits, high=bits),
                "load": model.load
                if (load_s := loads[model.name]) is None
                else LoadTime(warm_share=1.0, warm_median_s=load_s, cold_median_s=load_s, sigma=0.0),
                "load_scale": model.load_scale if loads[model.name] is None else 1.0,
            }
        )
        for place, model in enumerate(base.models)
    ]
    servers = [server.model_copy(update={"speed": float(speed[place])}) for place, server in enumerate(base.servers)]
    radio = {
        "model": "fixed",
        "rate_bps": _RATE_BPS,
        "sharing": "none",
        "fading": "none",
        "floor": "clip",
        "download": False,
        "hall_m": base.radio.hall_m,
    }
    slot = {"length_s": _SLOT_S, "broadcast_age_slots": 1, "latency_from": "generated"}
    return _changed(
        base,
        {
            "slot": slot,
            "radio": radio,
            "models": [model.model_dump() for model in models],
            "servers": [server.model_dump() for server in servers],
            "tasks": base.tasks.model_dump() | {"noise_sigma": min(sigma, 3.0)},
        },
    )


def _changed(scenario: Scenario, sections: dict[str, Any]) -> Scenario:
    return validate_scenario(scenario.model_dump(mode="json") | sections, "the fitted scenario")


def _quiet(scenario: Scenario) -> Scenario:
    """Without noise of the work: the work is that which was measured."""
    return scenario.model_copy(update={"tasks": scenario.tasks.model_copy(update={"noise_sigma": 0.0})})


def _trace_of(
    columns: dict[str, Any],
    model: NDArray[np.int64],
    device: NDArray[np.int64],
    work: Floats,
    way_s: float,
    plant: Scenario,
) -> Trace:
    bits = np.full(len(model), max(way_s - _SLOT_S / 2, 0.0) * _RATE_BPS)
    steps = np.where(np.isnan(columns["steps"]), 1.0, columns["steps"])
    return Trace(
        time_s=columns["generated_s"] - columns["generated_s"][0],
        device=device.astype(np.int32),
        model=model.astype(np.int32),
        images=columns["images"].astype(np.int32),
        steps=np.maximum(steps, 1.0).astype(np.int32),
        bits_in=bits,
        bits_out=np.zeros(len(model)),
        deadline_s=columns["deadline_s"].astype(float),
        work=np.asarray(work, float),
        filled=("work",) if plant.tasks.kind == "uniform" else (),
    )


def _simulated(
    plant: Scenario, trace: Trace, policy: AnyPolicy, columns: dict[str, Any], counted: NDArray[np.bool_]
) -> Agreement:
    """Latencies of the counted tasks, simulated with all tasks."""
    environment: Environment = replay_environment(plant, trace, "of the records")
    rest = float(np.max(columns["latency_s"])) + 10.0
    slots = int(np.ceil((trace.time_s[-1] + rest) / plant.slot.length_s)) + 1
    # Records come in order of decision, which is that of generation; the trace starts again behind its last slot.
    measured = run_episodes(environment, policy, Episodes(1, slots, 0, 0), jax.random.key(0))
    simulated = measured.records[0].latency_s[: len(trace)]
    if len(simulated) < len(trace):
        raise InputError(
            f"records: {len(trace) - len(simulated)} tasks have no end in {slots + DRAIN_SLOTS} simulated slots: the "
            "fitted plant is overloaded; run it with less load"
        )
    live = columns["latency_s"][counted]
    ours = simulated[counted]
    return Agreement(
        tasks=int(counted.sum()),
        live_mean_s=float(live.mean()),
        mean_s=float(ours.mean()),
        live_p95_s=float(np.quantile(live, 0.95)),
        p95_s=float(np.quantile(ours, 0.95)),
    )
