"""The policy artefact: a trained actor as a folder that runs without JAX, and the way back to an actor.

The ONNX graph is written by hand, line for line what `networks.encode` and `networks.Actor` compute, so that an export
needs no converter. `tests/test_export.py` holds the two together.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays

import gmel
from gmel.learning.networks import Actor, Linear, Message, direct_inputs, option_inputs, task_inputs
from gmel.policies.exported import (
    DESCRIPTION_FILE,
    FORMAT,
    GRAPH_FILE,
    IDENTITY_UNITS,
    INPUTS,
    OPTION_UNITS,
    OTHER_UNITS,
    OUTPUT,
    SHARE_UNITS,
    TASK_IDENTITY_UNITS,
    TASK_UNITS,
    WEIGHTS_FILE,
    observation_schema,
    read_description,
    read_part,
    schema_digest,
)
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.simulator.scale import Identities, Scale
from gmel.simulator.state import (
    OPTION_FEATURES,
    OPTION_IDENTITY,
    OTHER_COST,
    SHARE_WEIGHTS,
    TASK_FEATURES,
    TASK_IDENTITY,
)

__all__ = ["export_policy", "load_actor", "write_onnx"]

OPSET = 13
"""Oldest that has all operators used, so that old and small runtimes can run the file (onnxruntime 1.7 and later)."""
IR_VERSION = 7
"""The format of the file that came with that operator set."""

# The runtime side cannot import the simulator (JAX), so it names the columns itself.
assert tuple(TASK_UNITS) == TASK_FEATURES and tuple(OPTION_UNITS) == OPTION_FEATURES
assert tuple(OTHER_UNITS) == (OTHER_COST,) and tuple(SHARE_UNITS) == SHARE_WEIGHTS
assert tuple(IDENTITY_UNITS) == OPTION_IDENTITY and tuple(TASK_IDENTITY_UNITS) == TASK_IDENTITY

_UNITS = ("time_s", "size_bit", "work")


def export_policy(
    actor: Actor, folder: Path, *, scenario_digest: str, scenario_name: str, training: dict[str, Any]
) -> Path:
    """Writes the policy folder: `actor.onnx`, `actor.safetensors` and `policy.json`. Returns `folder`.

    All is written beside `folder` and moved there when complete. A policy that is there already is replaced; what is no
    policy is left alone. `training` is any JSON; numbers that are not finite become null.

    Raises:
        InputError: weights that are not finite, `folder` holds something else, or it cannot be written.
    """
    weights = _weights(actor)
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"policy: {name} has values that are not finite, the training diverged; "
                "train with another seed or a smaller learning rate"
            )
    graph = _model(actor).SerializeToString(deterministic=True)
    arrays = write_arrays(weights, metadata={"format": str(FORMAT)})
    schema = _schema(actor.scale)
    description = {
        "format": FORMAT,
        "gmel": gmel.__version__,
        "scenario": {"name": scenario_name, "digest": scenario_digest},
        "observation": {**schema, "digest": schema_digest(schema)},
        "actor": {
            "mode": "communicating" if actor.communicating else "decentralised",
            "communicating": actor.communicating,
            "width": actor.width,
            "scale": {name: float(getattr(actor.scale, name)) for name in _UNITS},
            "levels": actor.scale.levels,
            **({} if actor.scale.identities is None else {"identities": actor.scale.identities._asdict()}),
            "weights": {name: list(array.shape) for name, array in weights.items()},
        },
        "training": _json(training),
        "files": {
            GRAPH_FILE: hashlib.sha256(graph).hexdigest(),
            WEIGHTS_FILE: hashlib.sha256(arrays).hexdigest(),
        },
    }
    text = json.dumps(description, indent=1, allow_nan=False) + "\n"
    _replace_folder(folder, {GRAPH_FILE: graph, WEIGHTS_FILE: arrays, DESCRIPTION_FILE: text.encode()})
    return folder


def load_actor(folder: Path) -> Actor:
    """The actor of a policy folder, with bitwise the weights that were exported.

    Raises:
        InputError: no policy there, another format or observation schema, corrupt, arrays missing or of other shapes,
            or weights that are not finite.
    """
    description = read_description(folder)
    if set(description.scale) != set(_UNITS):
        raise InputError(
            f"{folder / DESCRIPTION_FILE}: actor.scale has {', '.join(description.scale) or 'nothing'}, "
            f"must have {', '.join(_UNITS)}; export the policy again"
        )
    path, data = folder / WEIGHTS_FILE, read_part(folder, WEIGHTS_FILE, description)
    try:
        arrays = parse_arrays(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: corrupt ({error}); export the policy again") from error
    scale = Scale(
        **description.scale,
        levels=description.levels,
        other_costs=description.other_costs,
        identities=None if description.identities is None else Identities(*description.identities),
        share_weights=description.share_weights,
    )
    communicating = description.mode == "communicating"
    template = eqx.filter_eval_shape(
        lambda: Actor(scale, jax.random.key(0), width=description.width, communicating=communicating)
    )
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_name(where): tuple(leaf.shape) for where, leaf in leaves}
    if description.weights != expected:
        wrong = _first_difference(description.weights, expected)
        raise InputError(f"{folder / DESCRIPTION_FILE}: actor.weights.{wrong}; export the policy again")
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    if found != expected:
        raise InputError(f"{path}: {_first_difference(found, expected)}; export the policy again")
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise InputError(f"{path}: {name} holds {array.dtype}, must be float32; export the policy again")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} has values that are not finite; train the policy again")
    return jax.tree_util.tree_unflatten(structure, [jnp.asarray(arrays[_name(where)]) for where, _ in leaves])


def write_onnx(actor: Actor, path: Path) -> None:
    """Writes the actor as an ONNX file, under a temporary name first.

    Inputs, raw and in SI units: `task` float32 `[requests, 6]` (7 where quality is hidden), `options` float32
    `[requests, options, 11]` (12 with other costs, and then 2 more where quality is hidden and one for each weight to
    choose), `mask` bool `[requests, options]`,
    `present` bool `[requests]` (read in communicating mode only). Output: `logits` float32 `[requests, options]`, minus
    infinity where masked, as in JAX. Requests and options may be any number.

    Raises:
        InputError: the file cannot be written.
    """
    data = _model(actor).SerializeToString(deterministic=True)
    try:
        replace_file(path, data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


class _Tensor:
    """A tensor of a graph under construction. Arithmetic adds nodes, so formulas read as they do in `networks`."""

    def __init__(self, graph: "_Graph", name: str) -> None:
        self.graph, self.name = graph, name

    def __add__(self, other: "_Tensor | float") -> "_Tensor":
        return self.graph.node("Add", self, other)

    def __sub__(self, other: "_Tensor | float") -> "_Tensor":
        return self.graph.node("Sub", self, other)

    def __mul__(self, other: "_Tensor | float") -> "_Tensor":
        return self.graph.node("Mul", self, other)

    def __truediv__(self, other: "_Tensor | float") -> "_Tensor":
        return self.graph.node("Div", self, other)

    def __matmul__(self, other: "_Tensor | NDArray[Any]") -> "_Tensor":
        return self.graph.node("MatMul", self, other)


_Operand = _Tensor | float | NDArray[Any]


class _Graph:
    """Nodes and constants of an ONNX graph, in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def node(self, kind: str, *inputs: _Operand, **attributes: Any) -> _Tensor:
        """A node with one output."""
        return self.nodes_out(kind, inputs, 1, **attributes)[0]

    def nodes_out(self, kind: str, inputs: Iterable[_Operand], outputs: int, **attributes: Any) -> list[_Tensor]:
        """A node with several outputs."""
        stem = f"{kind.lower()}_{len(self.nodes)}"
        names = [stem if outputs == 1 else f"{stem}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, [self._name(each) for each in inputs], names, stem, **attributes))
        return [_Tensor(self, name) for name in names]

    def _name(self, value: _Operand) -> str:
        if isinstance(value, _Tensor):
            return value.name
        # JAX takes a Python number as a constant of the other operand's type, which is float32 throughout.
        array = value if isinstance(value, np.ndarray) else np.asarray(value, np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"constant_{len(self.constants)}")
        return self.constants[key].name

    def columns(self, x: _Tensor, names: tuple[str, ...]) -> dict[str, _Tensor]:
        """The last axis in its columns, each with a last axis of one."""
        parts = self.nodes_out("Split", [x, _axes(*[1] * len(names))], len(names), axis=-1)
        return dict(zip(names, parts, strict=True))

    def concat(self, columns: list[_Tensor]) -> _Tensor:
        """Columns side by side on the last axis."""
        return self.node("Concat", *columns, axis=-1)

    def log1p(self, x: _Tensor) -> _Tensor:
        """ONNX has no log1p; where x is small enough to matter, the difference is below float32's resolution of 1."""
        return self.node("Log", x + 1.0)

    def unsqueeze(self, x: _Tensor, axis: int) -> _Tensor:
        return self.node("Unsqueeze", x, _axes(axis))

    def one_hot(self, number: _Tensor, count: int) -> _Tensor:
        """A column of whole numbers as `count` columns; zeros for numbers that are not among them."""
        same = self.node("Equal", number, np.arange(count, dtype=np.float32))
        return self.node("Cast", same, to=TensorProto.FLOAT)

    def linear(self, layer: Linear, x: _Tensor) -> _Tensor:
        return self.node("Add", x @ np.asarray(layer.weight), np.asarray(layer.bias))


def _axes(*values: int) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)


def _encode(graph: _Graph, task: _Tensor, options: _Tensor, scale: Scale) -> tuple[_Tensor, _Tensor, _Tensor]:
    """As `networks.encode` and `networks.direct`: inputs of the options `[requests, options, inputs]` and of the task
    `[requests, inputs]`, and the direct inputs `[requests, options, direct inputs]`."""
    schema = _schema(scale)
    of_task, of_option = (
        graph.columns(x, tuple(column["name"] for column in schema[part]))
        for x, part in ((task, "task"), (options, "options"))
    )
    log, log1p = (lambda x: graph.node("Log", x)), graph.log1p

    def minimum(x: _Tensor, high: float) -> _Tensor:
        return graph.node("Min", x, high)

    def maximum(x: _Tensor, low: _Tensor | float) -> _Tensor:
        return graph.node("Max", x, low)

    def seconds(name: str) -> _Tensor:
        return of_option[name] / scale.time_s

    upload, backlog, service = seconds("upload_s"), seconds("backlog_s"), seconds("service_s")
    switch, download, previous = seconds("switch_s"), seconds("download_s"), seconds("previous_s")
    deadline = graph.unsqueeze(of_task["deadline_s"] / scale.time_s, 1)
    finish = maximum(upload, backlog) + switch + service + download
    encoded_options = [
        of_option["local"],
        log(of_option["speed"] * scale.time_s / scale.work),
        log(of_option["gpus"]),
        log1p(upload),
        minimum(upload, 4.0),
        log1p(backlog),
        minimum(backlog, 8.0),
        log1p(seconds("age_s")),
        log1p(previous),
        minimum(previous, 8.0),
        minimum(maximum(backlog - previous, -4.0), 4.0),
        log1p(seconds("own_unseen_s")),
        log1p(switch),
        log1p(service),
        log1p(download),
        log1p(finish),
        graph.node("Tanh", finish - deadline),
        minimum(maximum(upload - backlog, -1.0), 1.0),
    ]
    if scale.other_costs:
        encoded_options.append(minimum(maximum(seconds(OTHER_COST), -8.0), 8.0))
    encoded_options += [log(of_option[name]) for name in scale.share_weights]
    work = of_task["work"] / scale.work
    encoded_task = [
        log1p(work),
        work,
        log1p(of_task["size_bit"] / scale.size_bit),
        log1p(maximum(of_task["deadline_s"], 0.0) / scale.time_s),
        log1p(of_task["waited_s"] / scale.time_s),
        of_task["own_requests"] - 1.0,
        log1p(of_task["own_backlog_s"] / scale.time_s),
    ]
    who = scale.identities
    more_options, more_task = (0, 0) if who is None else (who.servers * who.services, who.models)
    counts = len(encoded_options) + more_options, len(encoded_task) + more_task
    if counts != (option_inputs(scale), task_inputs(scale)):
        raise AssertionError("networks.encode has other inputs than the exported graph: bring _encode in line")
    upload, backlog, service, switch, download = (
        minimum(x, 50.0) for x in (upload, backlog, service, switch, download)
    )
    finish = maximum(upload, backlog) + switch + service + download
    capacity = log(of_option["speed"] * of_option["gpus"] * scale.time_s / scale.work)
    direct = [finish, backlog, upload, switch, service, download, of_option["local"] * finish, capacity]
    if scale.other_costs:
        direct.append(minimum(maximum(seconds(OTHER_COST), -50.0), 50.0))
    if len(direct) != direct_inputs(scale):
        raise AssertionError("networks.direct has other inputs than the exported graph: bring _encode in line")
    if who is not None:
        number = (of_option["server"] - 1.0) * float(who.services) + of_option["service"]
        encoded_options.append(graph.one_hot(number, more_options))
        encoded_task.append(graph.one_hot(of_task["model"], more_task))
    return graph.concat(encoded_options), graph.concat(encoded_task), graph.concat(direct)


def _received(graph: _Graph, message: Message, hidden: _Tensor, present: _Tensor, width: int) -> _Tensor:
    """As `networks.Message`: what each request hears about each option, `[requests, options, width]`."""
    by_option = graph.node("Transpose", hidden, perm=[1, 0, 2])
    query, key, value = (graph.linear(layer, by_option) for layer in (message.query, message.key, message.value))
    scores = query @ graph.node("Transpose", key, perm=[0, 2, 1])
    weight = graph.node("Sigmoid", scores / width**0.5)
    count = graph.node("Squeeze", graph.node("Shape", present), _axes(0))
    numbers = graph.node("Range", np.asarray(0, np.int64), count, np.asarray(1, np.int64))
    itself = graph.node("Equal", graph.unsqueeze(numbers, 0), graph.unsqueeze(numbers, 1))
    others = graph.node("And", graph.unsqueeze(present, 0), graph.node("Not", itself))
    heard = graph.node("Where", others, weight, 0.0) @ value
    return graph.node("Transpose", heard, perm=[1, 0, 2])


def _logits(graph: _Graph, actor: Actor, task: _Tensor, options: _Tensor, mask: _Tensor, present: _Tensor) -> None:
    """As `networks.Actor.__call__`; the last node's output is `logits`."""
    encoded_options, encoded_task, direct = _encode(graph, task, options, actor.scale)
    from_task = graph.unsqueeze(graph.linear(actor.task_in, encoded_task), 1)
    hidden = graph.node("Relu", graph.linear(actor.option_in, encoded_options) + from_task)
    allowed = graph.unsqueeze(mask, 2)
    total = graph.node("ReduceSum", graph.node("Where", allowed, hidden, 0.0), _axes(1), keepdims=1)
    count = graph.node("ReduceSum", graph.node("Cast", allowed, to=TensorProto.FLOAT), _axes(1), keepdims=1)
    mean = total / graph.node("Max", count, 1.0)
    mix = np.asarray(actor.mix.weight)
    first, second, third = (mix[start : start + actor.width] for start in range(0, 3 * actor.width, actor.width))
    mixed = graph.node("Add", hidden @ first + mean @ second, np.asarray(actor.mix.bias))
    if actor.message is not None:
        mixed = mixed + _received(graph, actor.message, hidden, present, actor.width) @ third
    learned = graph.linear(actor.out, graph.node("Relu", mixed))
    cost = direct @ np.asarray(actor.direct_weights(), np.float32)[:, None]
    scores = graph.node("Squeeze", learned - cost, _axes(2))
    # Minus infinity, as in JAX: a softmax gives exactly zero, and no finite number is low enough for every temperature.
    graph.node("Where", mask, scores, -math.inf)
    graph.nodes[-1].output[0] = OUTPUT


def _model(actor: Actor) -> onnx.ModelProto:
    graph = _Graph()
    _logits(graph, actor, *(_Tensor(graph, name) for name in INPUTS))
    schema = _schema(actor.scale)
    specs: dict[str, tuple[int, list[int | str]]] = {
        "task": (TensorProto.FLOAT, ["requests", len(schema["task"])]),
        "options": (TensorProto.FLOAT, ["requests", "options", len(schema["options"])]),
        "mask": (TensorProto.BOOL, ["requests", "options"]),
        "present": (TensorProto.BOOL, ["requests"]),
    }
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "actor",
            [helper.make_tensor_value_info(name, *specs[name]) for name in INPUTS],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["requests", "options"])],
            list(graph.constants.values()),
            doc_string="Scores of the places where a request may run. Option 0 is the device itself. "
            f"Columns of task: {_columns(schema['task'])}. Columns of options: {_columns(schema['options'])}.",
        ),
        producer_name="gmel",
        producer_version=gmel.__version__,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    facts = {
        "gmel": gmel.__version__,
        "mode": "communicating" if actor.communicating else "decentralised",
        "observation_digest": schema_digest(schema),
    }
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


def _schema(scale: Scale) -> dict[str, Any]:
    """The columns that an actor of this scale reads."""
    return observation_schema(scale.other_costs, scale.identities is not None, scale.share_weights)


def _columns(columns: list[dict[str, str]]) -> str:
    return ", ".join(f"{column['name']} [{column['unit']}]" for column in columns)


def _weights(actor: Actor) -> dict[str, NDArray[np.float32]]:
    """All arrays of the actor by name, such as `mix.weight`."""
    leaves = jax.tree_util.tree_flatten_with_path(actor)[0]
    return {_name(where): np.asarray(leaf, np.float32, order="C") for where, leaf in leaves}


def _name(where: Any) -> str:
    return jax.tree_util.keystr(where, simple=True, separator=".")


def _first_difference(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    for name, shape in expected.items():
        if found.get(name) != shape:
            has = f"is {list(found[name])}" if name in found else "is missing"
            return f"{name} {has}, must be {list(shape)}"
    return f"{next(name for name in found if name not in expected)} is not part of the actor"


def _json(value: Any) -> Any:
    """Strict JSON: numbers that are not finite become null, numpy's become Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes the files beside `folder` and renames. Should that fail or be interrupted, the old folder is back."""
    target = folder.resolve()  # what a link points to is replaced, not the link
    part, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("part", "old"))
    try:
        if target.exists():
            strange = [each.name for each in target.iterdir() if each.name not in files]
            if strange:
                raise InputError(f"{folder}: holds {min(strange)}, is no policy folder; choose another folder")
        for left in (part, old):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        for name, data in files.items():
            (part / name).write_bytes(data)
        _swap(part, target, old)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _swap(part: Path, target: Path, old: Path) -> None:
    """Puts `part` in the place of `target`. A folder cannot be renamed over a full one, so the old one steps aside."""
    if not target.exists():
        part.rename(target)
        return
    try:
        target.rename(old)
        part.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
