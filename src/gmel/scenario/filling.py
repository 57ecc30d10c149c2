"""A trace completed from the laws of a scenario: what its file does not say is drawn."""

# pyarrow ships incomplete types; the checks that fail on what is unknown of it are off in this file.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gmel.scenario.columns import printable
from gmel.scenario.errors import InputError
from gmel.scenario.importers import COLUMNS, RawTrace
from gmel.scenario.schema import Choice, Range, Scenario
from gmel.scenario.trace import Floats, Indices, Ints, Trace

__all__ = ["catalogue_work", "fill_trace"]


def fill_trace(raw: RawTrace, scenario: Scenario, seed: int = 0) -> Trace:
    """Completes a trace from the laws of a scenario and stretches it in time to the asked rate.

    Each missing column has its own random stream, so that giving one column leaves the others as they were:

    - `device`: weight rank^-`arrivals.device_skew`; with `group`, within the devices of the group, and groups have
      devices in proportion to their requests;
    - `model`: by popularity; with probability `tasks.repeat_model` that of the request before (of the same device
      where the trace names devices);
    - `images`, `steps`, `bits_in`, `bits_out`: as the model says, or `tasks` where there is no catalogue;
    - `deadline_s`: from `tasks.deadline_s`.

    Labels of devices are numbered in order of first appearance, modulo the number of devices. Labels of models that
    are not in the catalogue are matched by popularity: the most frequent one is the most popular entry.

    With `arrivals.rate_per_s`, (n - 1) / (last - first time) becomes that rate; with `arrivals.load`, the rate at which
    the work of this very trace, with the mean of its noise, is the asked share of the servers' capacity.

    Args:
        raw: the trace as read.
        scenario: the plant.
        seed: of the random streams, >= 0.

    Raises:
        InputError: the seed is negative, or a trace without duration is to be stretched.
    """
    if seed < 0:
        raise InputError(f"seed = {seed}: must be a whole number >= 0")
    notes = [f"{raw.source}: {len(raw):,} requests" + (f"; {raw.attribution}" if raw.attribution else ""), *raw.notes]
    given = {name: values for name, values in raw.columns.items() if name in COLUMNS}
    unused = [printable(name) for name in raw.columns if name not in COLUMNS]
    if "device" in given and given.pop("group", None) is not None:
        unused.append("group")
    if scenario.tasks.kind == "uniform" and given.pop("model", None) is not None:
        unused.append("model")
    if unused:
        notes.append(f"columns without effect: {', '.join(unused)}")

    draws = _Draws(len(raw), seed)
    device = _devices(given, scenario, draws, notes)
    model = _models(given, scenario, draws, notes)
    columns = _asked(given, scenario, model, draws)
    filled = [name for name in (*COLUMNS[:8], "work") if name not in given]
    if scenario.tasks.kind == "catalogue" and "work" in filled:
        filled.remove("work")  # it follows from the model, nothing is drawn
    if filled:
        notes.append(f"filled from scenario {scenario.name!r}: {', '.join(filled)}")
    time_s = raw.columns["time_s"] - raw.columns["time_s"][0]
    time_s = _stretched(time_s, columns["work"], scenario, raw.source, notes)
    return Trace(
        time_s=time_s,
        device=device.astype(np.int32),
        model=model.astype(np.int32),
        images=columns["images"].astype(np.int32),
        steps=columns["steps"].astype(np.int32),
        bits_in=columns["bits_in"],
        bits_out=columns["bits_out"],
        deadline_s=columns["deadline_s"],
        work=columns["work"],
        filled=tuple(filled),
        notes=tuple(notes),
    )


class _Draws:
    """Uniform numbers on [0, 1), one stream for each column and use, so that columns do not disturb one another."""

    _STREAMS = ("device", "model", "repeat", "images", "steps", "bits_in", "deadline_s", "work")

    def __init__(self, count: int, seed: int) -> None:
        self.count, self._seed = count, seed

    def __call__(self, what: str) -> Floats:
        stream = np.random.default_rng([self._seed, self._STREAMS.index(what)])
        return stream.random(self.count)


def _devices(given: Mapping[str, npt.NDArray[Any]], scenario: Scenario, draws: _Draws, notes: list[str]) -> Ints:
    count = scenario.devices.count
    if "device" in given:
        named = given["device"]
        if named.dtype.kind == "i" and int(named.max()) < count:
            return named
        number, labels = _numbered(named)
        if len(labels) > count:
            notes.append(f"{len(labels):,} devices of the trace folded onto {count:,} of the scenario")
        elif named.dtype.kind == "i":
            notes.append(f"device numbers up to {int(named.max())} numbered anew from 0, in order of appearance")
        return number % count
    uniform = draws("device")
    if "group" not in given:
        return _by_rank(uniform, count, scenario.arrivals.device_skew)
    values, group, requests = np.unique(given["group"], return_inverse=True, return_counts=True)
    if len(values) > count:
        notes.append(f"{len(values)} groups of the trace folded onto {count:,} devices")
        return group % count
    sizes = _proportional(requests, count)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    device = np.zeros(len(group), dtype=np.int64)
    for index, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        of_group = group == index
        device[of_group] = start + _by_rank(uniform[of_group], size, scenario.arrivals.device_skew)
    shares = ", ".join(f"group {value}: {size:,}" for value, size in zip(values.tolist(), sizes.tolist(), strict=True))
    notes.append(f"devices by group, in proportion to requests: {shares}")
    return device


def _models(given: Mapping[str, npt.NDArray[Any]], scenario: Scenario, draws: _Draws, notes: list[str]) -> Ints:
    count = draws.count
    if scenario.tasks.kind == "uniform":
        return np.zeros(count, dtype=np.int64)
    popularity = np.asarray([model.popularity for model in scenario.models])
    if "model" in given:
        return _matched(given["model"], scenario, popularity, notes)
    fresh = np.searchsorted(_cumulative(popularity), draws("model"), side="right")
    repeats = draws("repeat") < scenario.tasks.repeat_model
    # Requests of a device side by side, in order of time; where the trace names no device, the plant is one chain.
    chain = _numbered(given["device"])[0] if "device" in given else np.zeros(count, dtype=np.int64)
    order = np.argsort(chain, kind="stable")
    starts = np.diff(chain[order], prepend=-1) != 0
    last_fresh = np.maximum.accumulate(np.where(starts | ~repeats[order], np.arange(count), 0))
    model = np.empty(count, dtype=np.int64)
    model[order] = fresh[order][last_fresh]
    return model


def _matched(named: npt.NDArray[Any], scenario: Scenario, popularity: Floats, notes: list[str]) -> Ints:
    """Catalogue numbers of the models that a trace names."""
    entries = len(popularity)
    if named.dtype.kind == "i" and int(named.max()) < entries:
        return named
    number, labels = _numbered(named)
    catalogue = {model.name: index for index, model in enumerate(scenario.models)}
    target = np.asarray([catalogue.get(str(label), -1) for label in labels], dtype=np.int64)
    unknown = np.flatnonzero(target < 0)
    if len(unknown):
        # Entries that the trace names itself are left to it, as long as others remain.
        by_popularity = np.argsort(-popularity, kind="stable")
        free = by_popularity[~np.isin(by_popularity, target)]
        free = free if len(free) else by_popularity
        by_frequency = unknown[np.argsort(-np.bincount(number, minlength=len(labels))[unknown], kind="stable")]
        target[by_frequency] = free[np.arange(len(by_frequency)) % len(free)]
        shown = ", ".join(
            f"{printable(str(labels[i]))} -> {scenario.models[target[i]].name}" for i in by_frequency[:3].tolist()
        )
        notes.append(
            f"{len(unknown):,} model labels not in the catalogue, matched by popularity onto {len(free)} entries: "
            + shown
            + (", ..." if len(unknown) > 3 else "")
        )
    return target[number]


def _asked(
    given: Mapping[str, npt.NDArray[Any]], scenario: Scenario, model: Ints, draws: _Draws
) -> dict[str, npt.NDArray[Any]]:
    """What each request asks for: images, steps, bits_in, bits_out, deadline_s, work."""
    tasks, models = scenario.tasks, scenario.models
    columns: dict[str, npt.NDArray[Any]] = {name: values for name, values in given.items() if name in COLUMNS[3:]}
    if "deadline_s" not in given:
        columns["deadline_s"] = _between(draws("deadline_s"), tasks.deadline_s)
    if tasks.kind == "uniform":
        assert tasks.work is not None  # guaranteed by Tasks
        assert tasks.bits_in is not None
        one = np.ones(len(model), dtype=np.int64)
        columns.setdefault("images", one)
        columns.setdefault("steps", one)
        if "bits_in" not in given:
            columns["bits_in"] = _between(draws("bits_in"), tasks.bits_in)
        if "bits_out" not in given:
            columns["bits_out"] = np.full(len(model), tasks.bits_out)
        if "work" not in given:
            columns["work"] = _between(draws("work"), tasks.work)
        return columns
    if "images" not in given:
        columns["images"] = _chosen(draws("images"), model, [entry.images for entry in models])
    if "steps" not in given:
        columns["steps"] = _chosen(draws("steps"), model, [entry.steps for entry in models])
    if "bits_in" not in given:
        low = np.asarray([entry.bits_in.low for entry in models])[model]
        high = np.asarray([entry.bits_in.high for entry in models])[model]
        columns["bits_in"] = low + draws("bits_in") * (high - low)
    images = columns["images"].astype(np.float64)
    if "bits_out" not in given:
        columns["bits_out"] = images * np.asarray([entry.bits_out_per_image for entry in models])[model]
    if "work" not in given:
        steps = columns["steps"].astype(np.float64)
        columns["work"] = catalogue_work(scenario, model, images, steps, columns["bits_in"])
    return columns


def catalogue_work(
    scenario: Scenario, model: Indices | Ints, images: Indices | Floats, steps: Floats, bits_in: Floats
) -> Floats:
    """Nominal work of requests by their models (equation (1)); of a range of work per step or bit its mean."""
    models = scenario.models
    fixed_work = np.asarray([entry.fixed_work for entry in models])[model]
    step_work = np.asarray([entry.step_work.mean if entry.step_work else 0.0 for entry in models])[model]
    square_work = np.asarray([entry.square_work for entry in models])[model]
    bit_work = np.asarray([entry.work_per_bit.mean if entry.work_per_bit else 0.0 for entry in models])[model]
    return images * (fixed_work + steps * (step_work + steps * square_work)) + bits_in * bit_work


def _stretched(time_s: Floats, work: Floats, scenario: Scenario, source: str, notes: list[str]) -> Floats:
    """Times at the rate that the scenario asks for; as they are where it asks for none."""
    arrivals, span, gaps = scenario.arrivals, float(time_s[-1]), len(time_s) - 1
    if arrivals.load is not None:
        noise = math.exp(0.5 * scenario.tasks.noise_sigma**2)
        rate, wanted = arrivals.load * scenario.capacity / (float(work.mean()) * noise), f"load {arrivals.load:g}"
    elif arrivals.rate_per_s is not None:
        rate, wanted = arrivals.rate_per_s, f"rate_per_s {arrivals.rate_per_s:g}"
    else:
        if span > 0:
            notes.append(f"the trace keeps its own time: {gaps / span:.4g} requests/s")
        return time_s
    if span <= 0:
        raise InputError(
            f"{source}: column 'time_s' has no duration ({gaps + 1} request(s), all at one time) and cannot be "
            f"stretched to {wanted}; give a longer trace, or remove arrivals.load and arrivals.rate_per_s"
        )
    factor = gaps / rate / span
    notes.append(f"time stretched by {factor:.4g} to {rate:.4g} requests/s ({wanted})")
    return time_s * factor


def _numbered(labels: npt.NDArray[Any]) -> tuple[Ints, list[Any]]:
    """Numbers of labels in order of first appearance, and the labels in that order."""
    encoded = pa.array(labels).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _cumulative(weights: Floats) -> Floats:
    total = np.cumsum(weights)
    return total / total[-1]


def _by_rank(uniform: Floats, count: int, skew: float) -> Ints:
    """0 .. count - 1, drawn with weights (1 + index)^-skew."""
    shares = _cumulative(np.arange(1, count + 1, dtype=np.float64) ** -skew)
    return np.searchsorted(shares, uniform, side="right")


def _proportional(requests: Ints, count: int) -> Ints:
    """`count` devices in proportion to requests, by largest remainders; none of the groups goes without."""
    exact = count * requests / requests.sum()
    sizes = np.floor(exact).astype(np.int64)
    most_owed = np.argsort(-(exact - sizes), kind="stable")[: count - int(sizes.sum())]
    sizes[most_owed] += 1
    for without in np.flatnonzero(sizes == 0).tolist():
        sizes[int(sizes.argmax())] -= 1
        sizes[without] = 1
    return sizes


def _between(uniform: Floats, law: Range) -> Floats:
    return law.low + uniform * (law.high - law.low)


def _chosen(uniform: Floats, model: Ints, laws: list[Choice]) -> Ints:
    """Whole numbers >= 1 by the law of each request's model."""
    drawn = np.empty(len(model), dtype=np.int64)
    for index, law in enumerate(laws):
        of_model = model == index
        at = np.searchsorted(_cumulative(np.asarray(law.weights)), uniform[of_model], side="right")
        drawn[of_model] = np.maximum(np.rint(np.asarray(law.values)), 1).astype(np.int64)[at]
    return drawn
