"""Exact checks of servers with a capacity and of gangs: every task again from the rules, in plain Python.

The runs are those of `recording.py`; the durations of EAT come from its preset.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.validation.check import Exact, Run, check, largest, worse
from gmel.evaluation.validation.recording import TOLERANCE_S, Path, crashing, gangs, rejecting
from gmel.scenario.load import load_scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.state import Outcome, State

__all__: list[str] = []

Floats = NDArray[np.float64]

EAT_STEP_S = {1: 0.315, 2: 0.15625, 4: 0.14, 8: 0.1}
"""Seconds a denoising step on so many GPUs."""
EAT_LOAD_S = {1: 24.0, 2: 24.0, 4: 32.0, 8: 30.0}
EAT_APART_SLOTS = 40
"""Slots of 1 s until the longest task, 33.45 s, has ended."""


@check("capacity-in-use", "paths")
def capacity_in_use(run: Run) -> Exact:
    """Denoising steps in progress at a server are never more than its capacity: largest excess, from starts and ends.

    Source: definition of a capacity; AGOD, arXiv 2303.13052
    """
    excess, compared = 0.0, 0
    for path in (crashing(run), rejecting(run)):
        assert path.steps is not None  # with this discipline
        for server, tasks in path.at_server():
            in_use = _in_use(path, tasks, path.steps[tasks])
            excess = max(excess, float(in_use.max()) - (path.scenario.servers[server].capacity or 0.0))
            compared += tasks.size
    return Exact(excess, TOLERANCE_S, compared)


@check("capacity-losses", "paths")
def capacity_losses(run: Run) -> Exact:
    """What does not fit is rejected, or crashes the server, which loses that and all it runs: start, end, fate.

    Source: AGOD, arXiv 2303.13052 (crash); loss system with several units a task, Kaufman 1981 (rejection)
    """
    error, compared = 0.0, 0
    for path in (crashing(run), rejecting(run)):
        assert path.steps is not None  # with this discipline
        records, crash = path.records, path.scenario.service.on_overload == "crash"
        for server, tasks in path.at_server():
            capacity = path.scenario.servers[server].capacity or 0.0
            end_s: dict[int, float] = {}
            lost: set[int] = set()
            running: list[int] = []
            for task in tasks.tolist():
                now_s = float(records.upload_end_s[task])
                running = [other for other in running if end_s[other] > now_s]
                if sum(path.steps[other] for other in running) + path.steps[task] <= capacity:
                    running.append(task)
                    end_s[task] = now_s + float(path.service_s[task])
                    continue
                gone = [*running, task] if crash else [task]
                end_s.update(dict.fromkeys(gone, now_s))
                lost.update(gone)
                running = [] if crash else running
            for task in tasks.tolist():
                error = worse(
                    error,
                    records.start_s[task] - records.upload_end_s[task],
                    records.end_s[task] - end_s[task],
                    float(records.dropped[task] != (task in lost)),
                )
            compared += tasks.size
    return Exact(error, TOLERANCE_S, compared)


@check("gangs", "paths")
def gangs_again(run: Run) -> Exact:
    """Gangs, first in, first out, warm on an idle group of their size and model: start, load, end; GPUs slot by slot.

    Source: EAT, arXiv 2507.10026; docs/model.md, gangs
    """
    path = gangs(run)
    records = path.records
    error, compared = 0.0, 0
    for server, tasks in path.at_server():
        free_s = [0.0] * path.scenario.servers[server].gpus
        head_s = 0.0
        groups: dict[tuple[int, ...], int] = {}
        stood: list[tuple[float, list[float]]] = []
        for task in tasks.tolist():
            needed, model = int(path.gpus[task]), int(records.model[task])
            start_s = max(float(records.upload_end_s[task]), head_s, sorted(free_s)[needed - 1])
            dropped = start_s > records.generated_s[task] + records.deadline_s[task]
            error = worse(error, float(dropped != records.dropped[task]))
            compared += 1
            if dropped:
                continue
            idle = [gpu for gpu in range(len(free_s)) if free_s[gpu] <= start_s]
            warm = [gpus for gpus, held in groups.items() if held == model and len(gpus) == needed]
            warm = [gpus for gpus in warm if set(gpus) <= set(idle)]
            if warm:
                taken, load_s = min(warm, key=lambda gpus: (free_s[gpus[0]], gpus)), 0.0
            else:
                loaded = {gpu for gpus in groups for gpu in gpus}
                idle.sort(key=lambda gpu: (gpu in loaded, free_s[gpu], gpu))
                taken, load_s = tuple(sorted(idle[:needed])), float(path.load_s[task])
                groups = {gpus: held for gpus, held in groups.items() if not set(gpus) & set(taken)}
                groups[taken] = model
            head_s, end_s = start_s, start_s + load_s + float(path.service_s[task])
            for gpu in taken:
                free_s[gpu] = end_s
            stood.append((float(records.upload_end_s[task]), list(free_s)))
            error = worse(
                error,
                records.start_s[task] - start_s,
                records.switch_s[task] - load_s,
                records.end_s[task] - end_s,
            )
        error = worse(error, _carried(path, server, stood))
    return Exact(error, TOLERANCE_S, compared)


@check("gang-gpus", "paths")
def gang_gpus(run: Run) -> Exact:
    """GPUs of a gang are free together, in seconds apart; tasks in service never need more GPUs than there are.

    Source: definition of a gang: k GPUs of one server from the start of a task to its end
    """
    path = gangs(run)
    assert path.group is not None  # with this discipline
    error, compared = 0.0, 0
    for server, tasks in path.at_server():
        served = tasks[~path.records.dropped[tasks]]
        gpus = path.scenario.servers[server].gpus
        error = worse(error, max(float(_in_use(path, served, path.gpus[served]).max()) - gpus, 0.0))
        for name in range(gpus):
            of_group = path.group[:, server] == name
            least_s = np.where(of_group, path.free_s[:, server], np.inf).min(axis=1)
            most_s = np.where(of_group, path.free_s[:, server], -np.inf).max(axis=1)
            there = of_group.any(axis=1)
            error = worse(error, largest((most_s - least_s)[there]) if there.any() else 0.0)
            compared += int(of_group.sum())
    return Exact(error, TOLERANCE_S, compared)


@check("eat-durations", "paths")
def eat_durations(run: Run) -> Exact:
    """EAT: 30 steps on 1, 2, 4, 8 GPUs take 9.45, 4.69, 4.2, 3 s warm, 24, 24, 32, 30 s more cold; any steps.

    Source: EAT, arXiv 2507.10026, constants of its released code: 0.315, 0.15625, 0.14, 0.1 s a step
    """
    del run
    scenario = load_scenario("eat")
    (model,), options = scenario.models, scenario.tasks.step_options or []
    with jax.enable_x64(True):
        environment = Environment.from_scenario(scenario)
        gang, level = np.meshgrid(np.arange(len(model.gangs)), np.arange(len(options)), indexing="ij")
        took_s = np.asarray(_cold_then_warm(environment, jnp.asarray(gang), jnp.asarray(level)), float)
    expected_s = np.zeros_like(took_s)
    for number, way in enumerate(model.gangs):
        expected_s[number, :, 0, 0] = EAT_LOAD_S[way.gpus]
        expected_s[number, :, :, 1] = EAT_STEP_S[way.gpus] * np.array(options)[:, None]
    return Exact(largest(took_s - expected_s), TOLERANCE_S, took_s.size)


def _in_use(path: Path, tasks: NDArray[np.int64], units: NDArray[Any]) -> Floats:
    """Units in use after each start and end of the tasks; who ends leaves before who starts at that instant."""
    times = np.concatenate([path.records.end_s[tasks], path.records.start_s[tasks]])
    change = np.concatenate([-units, units]).astype(float)
    # A task that is rejected, or crashes the server, takes nothing.
    took = np.tile(path.records.end_s[tasks] > path.records.start_s[tasks] + TOLERANCE_S, 2)
    order = np.argsort(times[took], kind="stable")
    return np.cumsum(change[took][order])


def _carried(path: Path, server: int, stood: list[tuple[float, list[float]]]) -> float:
    """Largest difference of the time until each GPU is free, from slot to slot; `stood`: by end of upload."""
    error, place = 0.0, -1
    free_s = np.zeros(path.scenario.servers[server].gpus)
    for slot in range(path.free_s.shape[0]):
        now_s = slot * path.slot_s
        while place + 1 < len(stood) and stood[place + 1][0] < now_s:
            place += 1
            free_s = np.array(stood[place][1])
        state_s = path.free_s[slot, server]
        left_s = np.maximum(state_s[np.isfinite(state_s)], 0.0)
        error = max(error, largest(left_s - np.maximum(free_s - now_s, 0.0)))
    return error


@eqx.filter_jit
def _cold_then_warm(environment: Environment, gang: Any, level: Any) -> Any:
    """Load and service of two tasks alike, the second when the first has long ended [gangs, levels, tasks, 2].

    It would not wait for a loaded group: while the first runs it starts cold on other GPUs.
    """
    new = slice(environment.plant.switches.uploads, None)

    def seen(outcome: Outcome) -> Any:
        return jnp.stack([outcome.account.switch_s[new][0], outcome.account.service_s[new][0]])

    def one(gang: Any, level: Any) -> Any:
        state = environment.reset(seeds(0, 1)[0])
        first = jnp.arange(environment.requests) == 0
        requests = state.requests._replace(present=first, gang=jnp.full(first.shape, gang, jnp.int32))
        action = jnp.full(first.shape, 1 + (1 + environment.servers) * level, jnp.int32)
        nobody = requests._replace(present=first & False)

        def quiet(state: State, _: None) -> tuple[State, None]:
            return environment.step(state, action, requests=nobody)[0], None

        state, _, cold = environment.step(state._replace(requests=requests), action, requests=nobody)
        state = jax.lax.scan(quiet, state, length=EAT_APART_SLOTS)[0]
        _, _, warm = environment.step(state._replace(requests=requests), action, requests=nobody)
        return jnp.stack([seen(cold), seen(warm)])

    return jax.vmap(jax.vmap(one))(gang, level)
