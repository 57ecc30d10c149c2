"""A trained policy outside of JAX: what a device loads, with numpy and onnxruntime alone.

A policy folder holds `actor.onnx` (what runs), `actor.safetensors` (the weights, to train on) and `policy.json` (what
the numbers going in and out mean). `gmel.learning.export` writes it. Nothing here imports JAX.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from gmel.scenario.errors import InputError

__all__ = [
    "DESCRIPTION_FILE",
    "FORMAT",
    "GRAPH_FILE",
    "INPUTS",
    "OPTION_UNITS",
    "OUTPUT",
    "SCHEMA_VERSION",
    "TASK_UNITS",
    "WEIGHTS_FILE",
    "Description",
    "ExportedPolicy",
    "observation_schema",
    "read_description",
    "read_part",
    "schema_digest",
]

FORMAT = 1
"""Version of the folder: its files and the fields of `policy.json`."""

SCHEMA_VERSION = 1
"""Version of the observation. Raise it when a column changes its meaning while it keeps its name and unit."""

GRAPH_FILE, WEIGHTS_FILE, DESCRIPTION_FILE = "actor.onnx", "actor.safetensors", "policy.json"
INPUTS = ("task", "options", "mask", "present")
OUTPUT = "logits"

TASK_UNITS = {
    "work": "work unit",
    "size_bit": "bit",
    "deadline_s": "s",
    "waited_s": "s",
    "own_requests": "1",
    "own_backlog_s": "s",
}
"""Columns of `task` with their units, in order: those of `gmel.simulator.state.TASK_FEATURES`."""

OPTION_UNITS = {
    "local": "1",
    "speed": "work unit/s",
    "gpus": "1",
    "upload_s": "s",
    "backlog_s": "s",
    "age_s": "s",
    "switch_s": "s",
    "service_s": "s",
    "download_s": "s",
    "previous_s": "s",
    "own_unseen_s": "s",
}
"""Columns of `options` with their units, in order: those of `gmel.simulator.state.OPTION_FEATURES`."""

OTHER_UNITS = {"other_cost_s": "s"}
"""One more column of `options`, of plants that count more than latency: `gmel.simulator.state.OTHER_COST`."""

IDENTITY_UNITS = {"server": "1", "service": "1"}
"""Two more columns of `options` behind them, of plants that hide quality: `gmel.simulator.state.OPTION_IDENTITY`."""

TASK_IDENTITY_UNITS = {"model": "1"}
"""One more column of `task`, likewise: `gmel.simulator.state.TASK_IDENTITY`."""
SHARE_UNITS = {"band_weight": "1", "cpu_weight": "1"}
"""The last columns of `options`, each only of plants where devices choose it: `gmel.simulator.state.SHARE_WEIGHTS`."""

_MOST_WIDTH = 65536
_AGAIN = "export the policy again"


def observation_schema(
    other_costs: bool = False, identities: bool = False, share_weights: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What the actor looks at, as `policy.json` says it: version, and name and unit of every column. Identities and
    weights come with other costs only."""
    options = {**OPTION_UNITS, **OTHER_UNITS} if other_costs else OPTION_UNITS
    tasks = TASK_UNITS
    if identities:
        options, tasks = {**options, **IDENTITY_UNITS}, {**tasks, **TASK_IDENTITY_UNITS}
    options = {**options, **{name: SHARE_UNITS[name] for name in share_weights}}
    return {
        "version": SCHEMA_VERSION,
        "task": [{"name": name, "unit": unit} for name, unit in tasks.items()],
        "options": [{"name": name, "unit": unit} for name, unit in options.items()],
    }


def schema_digest(schema: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a schema (its `digest` field left out)."""
    plain = {key: value for key, value in schema.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Description:
    """What `policy.json` says, checked.

    `scale` holds the constants of the actor by name, `levels` the ways to do a task at one place, `other_costs` says
    whether it reads the column of that name, `identities` how many servers, services and models it tells apart by
    number (None: none, and there are no such columns), `share_weights` which of those columns it reads, `weights` the
    shape of each array, `files` the SHA-256 of the other two files, `training` whatever the training had to say (any
    JSON).
    """

    gmel: str
    mode: Literal["decentralised", "communicating"]
    width: int
    scale: dict[str, float]
    levels: int
    other_costs: bool
    identities: tuple[int, int, int] | None
    share_weights: tuple[str, ...]
    weights: dict[str, tuple[int, ...]]
    scenario_name: str
    scenario_digest: str
    training: dict[str, Any]
    files: dict[str, str]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The columns that the actor reads (`observation_schema`)."""
        return observation_schema(self.other_costs, self.identities is not None, self.share_weights)


def read_description(folder: Path) -> Description:
    """What the policy in a folder says of itself.

    Raises:
        InputError: no policy there, not readable, of another format or observation schema, or with broken fields.
    """
    path = folder / DESCRIPTION_FILE
    try:
        content: Any = json.loads(_read(path))
    except ValueError as error:  # not UTF-8 or not JSON
        raise InputError(f"{path}: not JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, must be a JSON object; {_AGAIN}")
    fields = _Fields(path, cast("dict[str, Any]", content))
    version = fields.get("format", int)
    if version != FORMAT:
        raise InputError(f"{path}: format is {version}, this gmel reads {FORMAT}; {_AGAIN} with this gmel")
    other_costs, identified, share_weights = _check_schema(path, fields)
    mode = fields.get("actor.mode", str)
    if mode not in ("decentralised", "communicating"):
        raise InputError(f"{path}: actor.mode is {mode!r}, must be decentralised or communicating; {_AGAIN}")
    if fields.get("actor.communicating", bool) != (mode == "communicating"):
        raise InputError(f"{path}: actor.communicating does not fit actor.mode {mode!r}; {_AGAIN}")
    width = fields.get("actor.width", int)
    if not 1 <= width <= _MOST_WIDTH:
        raise InputError(f"{path}: actor.width is {width}, must be between 1 and {_MOST_WIDTH}; {_AGAIN}")
    return Description(
        gmel=fields.get("gmel", str),
        mode=mode,
        width=width,
        scale={name: fields.positive(f"actor.scale.{name}") for name in fields.get("actor.scale", dict)},
        levels=fields.checked("actor.levels", fields.get("actor", dict).get("levels", 1), int),
        other_costs=other_costs,
        identities=_identities(fields) if identified else None,
        share_weights=share_weights,
        weights={name: fields.shape("actor.weights", name) for name in fields.get("actor.weights", dict)},
        scenario_name=fields.get("scenario.name", str),
        scenario_digest=fields.get("scenario.digest", str),
        training=fields.get("training", dict),
        files={name: _digest_of(fields, name) for name in (GRAPH_FILE, WEIGHTS_FILE)},
    )


def read_part(folder: Path, name: str, description: Description) -> bytes:
    """A file of the policy, the one that its description was written with.

    Raises:
        InputError: missing, not readable, or not the file that was written (changed, cut short, or of another export).
    """
    data = _read(folder / name)
    if hashlib.sha256(data).hexdigest() != description.files[name]:
        raise InputError(
            f"{folder / name}: corrupt, or not of the same export as {DESCRIPTION_FILE}; copy the folder or {_AGAIN}"
        )
    return data


class ExportedPolicy:
    """The actor of a policy folder, run by onnxruntime.

    It reads raw observations in SI units (`TASK_UNITS`, `OPTION_UNITS`) of any number of requests and options; option 0
    is the device itself. In communicating mode all requests of the slot must be asked together.
    """

    def __init__(self, session: onnxruntime.InferenceSession, description: Description) -> None:
        self._session = session
        self.description = description

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> "ExportedPolicy":
        """The policy in a folder. One thread by default: the network is too small to share out.

        Raises:
            InputError: no policy there, another format or observation schema, or corrupt.
        """
        description = read_description(folder)
        data = read_part(folder, GRAPH_FILE, description)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors come as exceptions; warnings would go to the standard error
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no base class
            raise InputError(
                f"{folder / GRAPH_FILE}: onnxruntime {onnxruntime.__version__} cannot open it ({error}); "
                f"update onnxruntime or {_AGAIN}"
            ) from error
        _check_graph(folder / GRAPH_FILE, session, description.schema)
        return cls(session, description)

    @property
    def mode(self) -> Literal["decentralised", "communicating"]:
        """Whether the requests of a slot exchange messages."""
        return self.description.mode

    def logits(
        self,
        task: NDArray[Any],
        options: NDArray[Any],
        mask: NDArray[Any],
        present: NDArray[Any] | None = None,
    ) -> NDArray[np.float32]:
        """Scores of the options, `[requests, options]`; minus infinity where `mask` is false.

        Args:
            task: numbers `[requests, 6]` (7 where quality is hidden), SI units.
            options: numbers `[requests, options, 11]` (12 with other costs, and then 2 more where quality is hidden and
                one for each weight to choose), SI units, finite also where masked.
            mask: bool `[requests, options]`, true where the option may be taken, at least one in each row.
            present: bool `[requests]`, false for padding rows, which send no messages; all true if left out.

        Raises:
            InputError: wrong shapes or types, numbers that are not finite or out of range, or a row without an option.
        """
        task, options = _floats("task", task), _floats("options", options)
        mask = _booleans("mask", mask)
        present = np.ones(task.shape[:1], np.bool_) if present is None else _booleans("present", present)
        schema = self.description.schema
        _check_shapes(task, options, mask, present, len(schema["task"]), len(schema["options"]))
        feeds = dict(zip(INPUTS, (task, options, mask, present), strict=True))
        logits = cast("NDArray[np.float32]", self._session.run([OUTPUT], feeds)[0])
        if not np.array_equal(np.isfinite(logits), mask):
            row = int(np.argmax(np.any(np.isfinite(logits) != mask, axis=1)))
            raise InputError(
                f"options: row {row} has no finite scores, the values are out of range; "
                "speed and gpus must be positive, times not negative"
            )
        return logits

    def act(
        self,
        task: NDArray[Any],
        options: NDArray[Any],
        mask: NDArray[Any],
        rng: np.random.Generator,
        greedy: bool = False,
        present: NDArray[Any] | None = None,
    ) -> NDArray[np.int64]:
        """Option of each request, `[requests]`: a draw by the softmax of the logits, or the best with `greedy`.

        Simultaneous decisions need the draw; the best option of everybody is often the same. Arguments and errors as
        for :meth:`logits`.
        """
        logits = self.logits(task, options, mask, present).astype(np.float64)
        if not greedy:
            # The largest of logits plus Gumbel noise is a draw by their softmax, and never a masked option.
            logits += rng.gumbel(size=logits.shape)
        return np.argmax(logits, axis=1)


class _Fields:
    """Checked access to the fields of a JSON file by dotted path."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    def get(self, where: str, kind: type[Any]) -> Any:
        value: Any = self.content
        for key in where.split("."):
            if not isinstance(value, dict) or key not in value:
                raise InputError(f"{self.path}: {where} is missing; {_AGAIN}")
            value = cast("dict[str, Any]", value)[key]
        return self.checked(where, value, kind)

    def checked(self, where: str, value: Any, kind: type[Any]) -> Any:
        # In Python, true is an integer; in a file it is a mistake.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.path}: {where} is {str(value)[:60]!r}, must be {_KINDS[kind]}; {_AGAIN}")
        return value

    def positive(self, where: str) -> float:
        value = self.get(where, float)
        if not (value > 0.0 and math.isfinite(value)):
            raise InputError(f"{self.path}: {where} is {value}, must be positive and finite; {_AGAIN}")
        return value

    def shape(self, where: str, name: str) -> tuple[int, ...]:
        # Names of weights have dots of their own.
        shape = self.checked(f"{where}.{name}", self.get(where, dict)[name], list)
        return tuple(self.checked(f"{where}.{name}", size, int) for size in shape)


_KINDS: dict[type[Any], str] = {
    str: "text",
    int: "a whole number",
    float: "a number with a decimal point",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _digest_of(fields: _Fields, name: str) -> str:
    files = fields.get("files", dict)
    if name not in files:
        raise InputError(f"{fields.path}: files.{name} is missing; {_AGAIN}")
    return fields.checked(f"files.{name}", files[name], str)


def _identities(fields: _Fields) -> tuple[int, int, int]:
    servers, services, models = (
        fields.get(f"actor.identities.{name}", int) for name in ("servers", "services", "models")
    )
    return servers, services, models


def _check_schema(path: Path, fields: _Fields) -> tuple[bool, bool, tuple[str, ...]]:
    """Whether the schema, which is one that this gmel observes, has the column of other costs, and those of
    identities, and which weights."""
    schema = fields.get("observation", dict)
    columns = fields.get("observation.options", list)
    other_costs = len(columns) > len(OPTION_UNITS)
    last = columns[len(OPTION_UNITS) + len(OTHER_UNITS) :]

    def among_the_last(units: dict[str, str]) -> tuple[str, ...]:
        return tuple(name for name, unit in units.items() if {"name": name, "unit": unit} in last)

    identities, share_weights = len(among_the_last(IDENTITY_UNITS)) > 0, among_the_last(SHARE_UNITS)
    ours = observation_schema(other_costs, identities, share_weights)
    version = fields.get("observation.version", int)
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: observation.version is {version}, this gmel observes version {SCHEMA_VERSION}; "
            "use the gmel that exported it, or train and export again"
        )
    for part in ("task", "options"):
        found, wanted = fields.get(f"observation.{part}", list), ours[part]
        if found != wanted:
            differing = next((a for a, b in zip(found, wanted, strict=False) if a != b), f"{len(found)} columns")
            raise InputError(
                f"{path}: observation.{part} has {differing}, must be the columns of this gmel "
                f"({', '.join(column['name'] for column in wanted)}); train and export again"
            )
    if fields.get("observation.digest", str) != schema_digest(schema):
        raise InputError(f"{path}: observation.digest does not fit the columns, it was edited; {_AGAIN}")
    return other_costs, identities, share_weights


def _check_graph(path: Path, session: onnxruntime.InferenceSession, schema: dict[str, Any]) -> None:
    shapes = {each.name: (each.type, len(each.shape), each.shape[-1]) for each in session.get_inputs()}
    wanted = {
        "task": ("tensor(float)", 2, len(schema["task"])),
        "options": ("tensor(float)", 3, len(schema["options"])),
        "mask": ("tensor(bool)", 2, "options"),
        "present": ("tensor(bool)", 1, "requests"),
    }
    if shapes != wanted or [each.name for each in session.get_outputs()] != [OUTPUT]:
        raise InputError(f"{path}: inputs are {shapes}, must be {wanted}; {_AGAIN}")
    digest = session.get_modelmeta().custom_metadata_map.get("observation_digest")
    if digest != schema_digest(schema):
        raise InputError(f"{path}: observation_digest is {digest!r}, not that of {DESCRIPTION_FILE}; {_AGAIN}")


def _check_shapes(
    task: NDArray[Any],
    options: NDArray[Any],
    mask: NDArray[np.bool_],
    present: NDArray[np.bool_],
    task_columns: int,
    columns: int,
) -> None:
    if task.ndim != 2 or task.shape[1] != task_columns:
        raise InputError(f"task: shape is {list(task.shape)}, must be [requests, {task_columns}]")
    requests = task.shape[0]
    if options.ndim != 3 or options.shape[0] != requests or options.shape[2] != columns:
        raise InputError(f"options: shape is {list(options.shape)}, must be [{requests}, options, {columns}]")
    if mask.shape != options.shape[:2]:
        raise InputError(f"mask: shape is {list(mask.shape)}, must be {list(options.shape[:2])} as in options")
    if present.shape != (requests,):
        raise InputError(f"present: shape is {list(present.shape)}, must be [{requests}] as in task")
    if not mask.any(axis=1).all():
        row = int(np.argmin(mask.any(axis=1)))
        raise InputError(f"mask: row {row} allows no option; allow option 0, the device itself, if nothing else")


def _floats(name: str, value: NDArray[Any]) -> NDArray[np.float32]:
    if not np.issubdtype(np.asarray(value).dtype, np.number):
        raise InputError(f"{name}: holds {np.asarray(value).dtype}, must be numbers")
    with np.errstate(over="ignore"):  # too large becomes infinite, and that is said below
        array = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(array).all():
        where = [int(index) for index in np.argwhere(~np.isfinite(array))[0]]
        raise InputError(f"{name}: {array[tuple(where)]} at {where}, must be finite (also where masked)")
    return array


def _booleans(name: str, value: NDArray[Any]) -> NDArray[np.bool_]:
    array = np.ascontiguousarray(value)
    if array.dtype != np.bool_:
        raise InputError(f"{name}: holds {array.dtype}, must be true or false")
    return array


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a folder made by `gmel export`") from error
