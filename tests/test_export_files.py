"""The folder of an exported policy: what can be broken in it, and how it is written."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays

from gmel.learning.export import load_actor, write_onnx
from gmel.policies.exported import ExportedPolicy
from gmel.scenario.errors import InputError
from test_export import MODES, actor_of, write

# -------------------------------------------------------------------------------------------- what can be broken


def edit(*keys: str, value: Any) -> Callable[[Path], None]:
    """Sets a field of policy.json; the value `...` removes it."""

    def change(folder: Path) -> None:
        path = folder / "policy.json"
        content = json.loads(path.read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        path.write_text(json.dumps(content))

    return change


def replace(name: str, data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes a file and vouches for it in policy.json, so that the checks behind the digest are reached."""

    def change(folder: Path) -> None:
        changed = data((folder / name).read_bytes())
        (folder / name).write_bytes(changed)
        edit("files", name, value=sha256(changed).hexdigest())(folder)

    return change


def arrays_changed(**arrays: Any) -> Callable[[Path], None]:
    """Replaces arrays by dotted name (with `__` for the dot); `...` removes one."""

    def data(before: bytes) -> bytes:
        held = parse_arrays(before)
        for name, array in arrays.items():
            key = name.replace("__", ".")
            if array is ...:
                del held[key]
            else:
                held[key] = array
        return write_arrays(held)

    return replace("actor.safetensors", data)


def graph_changed(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def data(before: bytes) -> bytes:
        model = onnx.load_from_string(before)
        change(model)
        return model.SerializeToString()

    return replace("actor.onnx", data)


def forget_digest(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def newer_operators(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9999


def other_columns(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_param = "whatever"


BOTH = {
    "no description": (lambda folder: (folder / "policy.json").unlink(), "policy.json: cannot be read"),
    "not JSON": (lambda folder: (folder / "policy.json").write_text("{"), "policy.json: not JSON"),
    "not text": (lambda folder: (folder / "policy.json").write_bytes(b"\xff\xfe"), "policy.json: not JSON"),
    "not an object": (lambda folder: (folder / "policy.json").write_text("[]"), "must be a JSON object"),
    "another format": (edit("format", value=2), "format is 2, this gmel reads 1"),
    "format as text": (edit("format", value="1"), "format is '1', must be a whole number"),
    "no format": (edit("format", value=...), "format is missing"),
    "another observation": (edit("observation", "version", value=2), "observation.version is 2"),
    "fewer columns": (edit("observation", "options", value=[]), "observation.options has 0 columns"),
    "renamed column": (
        edit("observation", "task", value=[{"name": "job", "unit": "1"}]),
        "observation.task has {'name': 'job'",
    ),
    "another schema digest": (edit("observation", "digest", value="0" * 12), "observation.digest does not fit"),
    "another mode": (edit("actor", "mode", value="central"), "actor.mode is 'central'"),
    "modes disagree": (edit("actor", "communicating", value=True), "actor.communicating does not fit"),
    "no width": (edit("actor", "width", value=0), "actor.width is 0"),
    "huge width": (edit("actor", "width", value=10**30), "actor.width is 1000"),
    "width true": (edit("actor", "width", value=True), "actor.width is 'True'"),
    "negative scale": (edit("actor", "scale", "time_s", value=-1.0), "actor.scale.time_s is -1.0"),
    "infinite scale": (edit("actor", "scale", "time_s", value=float("inf")), "actor.scale.time_s is inf"),
    "shape as text": (edit("actor", "weights", "out.bias", value=["1"]), "actor.weights.out.bias"),
    "actor as text": (edit("actor", value="me"), "actor.mode is missing"),
    "no digests": (edit("files", value={}), "files.actor.onnx is missing"),
}
OF_WEIGHTS = {
    "no weights": (lambda folder: (folder / "actor.safetensors").unlink(), "actor.safetensors: cannot be read"),
    "weights cut short": (
        lambda folder: os.truncate(folder / "actor.safetensors", 100),
        "actor.safetensors: corrupt, or not of the same export",
    ),
    "no weights in it": (replace("actor.safetensors", lambda _: b"not this"), "actor.safetensors: corrupt"),
    "NaN": (arrays_changed(out__bias=np.array([np.nan], np.float32)), "out.bias has values that are not finite"),
    "infinity": (arrays_changed(out__bias=np.array([np.inf], np.float32)), "out.bias has values that are not finite"),
    "wrong shape": (arrays_changed(out__bias=np.zeros(2, np.float32)), r"out.bias is \[2\], must be \[1\]"),
    "wrong type": (arrays_changed(out__bias=np.zeros(1, np.float64)), "out.bias holds float64, must be float32"),
    "array missing": (arrays_changed(out__bias=...), r"out.bias is missing, must be \[1\]"),
    "array too many": (arrays_changed(more=np.zeros(1, np.float32)), "more is not part of the actor"),
    "width of another": (edit("actor", "width", value=16), r"actor.weights.option_in.weight is \[18, 32\]"),
    "no scale": (edit("actor", "scale", value={}), "actor.scale has nothing, must have time_s, size_bit, work"),
}
OF_GRAPH = {
    "no graph": (lambda folder: (folder / "actor.onnx").unlink(), "actor.onnx: cannot be read"),
    "graph cut short": (lambda folder: os.truncate(folder / "actor.onnx", 100), "actor.onnx: corrupt"),
    "no graph in it": (replace("actor.onnx", lambda _: b"not this"), "onnxruntime .* cannot open it"),
    "newer operators": (graph_changed(newer_operators), "onnxruntime .* cannot open it"),
    "other inputs": (graph_changed(other_columns), "actor.onnx: inputs are"),
    "graph of another schema": (graph_changed(forget_digest), "observation_digest is None"),
}


def check_broken(load: Callable[[Path], Any], breaking: Any, message: str, folder: Path) -> None:
    write(actor_of("decentralised"), folder)
    load(folder)  # whole, it loads
    breaking(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "; " in str(caught.value), "one line, with a remedy"


@pytest.mark.parametrize(("breaking", "message"), [*BOTH.values(), *OF_WEIGHTS.values()], ids=[*BOTH, *OF_WEIGHTS])
def test_broken_policy_gives_no_actor(breaking: Any, message: str, tmp_path: Path) -> None:
    check_broken(load_actor, breaking, message, tmp_path / "policy")


@pytest.mark.parametrize(("breaking", "message"), [*BOTH.values(), *OF_GRAPH.values()], ids=[*BOTH, *OF_GRAPH])
def test_broken_policy_does_not_run(breaking: Any, message: str, tmp_path: Path) -> None:
    check_broken(ExportedPolicy.load, breaking, message, tmp_path / "policy")


def test_files_of_two_exports_are_not_mixed(tmp_path: Path) -> None:
    for name in MODES:
        write(actor_of(name), tmp_path / name)
    for name in ("actor.onnx", "actor.safetensors"):
        (tmp_path / "communicating" / name).replace(tmp_path / "decentralised" / name)
    with pytest.raises(InputError, match="not of the same export"):
        ExportedPolicy.load(tmp_path / "decentralised")
    with pytest.raises(InputError, match="not of the same export"):
        load_actor(tmp_path / "decentralised")


# ------------------------------------------------------------------------------------------------------- writing


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    actor = eqx.tree_at(lambda each: each.out.bias, actor_of("decentralised"), jnp.array([jnp.nan]))
    with pytest.raises(InputError, match=r"out\.bias has values that are not finite"):
        write(actor, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def test_an_older_policy_is_replaced(tmp_path: Path) -> None:
    write(actor_of("decentralised"), tmp_path / "policy")
    write(actor_of("communicating"), tmp_path / "policy")
    assert load_actor(tmp_path / "policy").communicating
    assert ExportedPolicy.load(tmp_path / "policy").mode == "communicating"
    assert [each.name for each in tmp_path.iterdir()] == ["policy"]


def test_a_link_is_kept_and_what_it_points_to_replaced(tmp_path: Path) -> None:
    write(actor_of("decentralised"), tmp_path / "policy")
    (tmp_path / "current").symlink_to("policy")
    write(actor_of("communicating"), tmp_path / "current")
    assert (tmp_path / "current").is_symlink() and load_actor(tmp_path / "policy").communicating
    assert {each.name for each in tmp_path.iterdir()} == {"policy", "current"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("failing", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", ["write_bytes", "rename"])
def test_a_failure_leaves_what_was_there(
    earlier: bool, failing: BaseException, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "policy"
    if earlier:
        write(actor_of("decentralised"), folder)
    before = contents(folder) if earlier else {}
    plain = getattr(Path, method)

    def fail(self: Path, argument: Any) -> Any:
        # The last of the three files, or the move of the new folder to its place.
        if self.name == "policy.json" or self.name.endswith(".part"):
            raise failing
        return plain(self, argument)

    monkeypatch.setattr(Path, method, fail)
    with pytest.raises(InputError if isinstance(failing, OSError) else KeyboardInterrupt) as caught:
        write(actor_of("communicating"), folder)
    monkeypatch.undo()
    if isinstance(failing, OSError):
        assert "policy: cannot be written (No space left on device)" in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == (["policy"] if earlier else [])
    assert (contents(folder) if earlier else {}) == before


def test_what_is_no_policy_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"policy: holds thesis\.tex, is no policy folder; choose another"):
        write(actor_of("decentralised"), tmp_path / "policy")
    assert contents(tmp_path / "policy") == {"thesis.tex": b"years of work"}
    assert [each.name for each in tmp_path.iterdir()] == ["policy"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/policy"):
        with pytest.raises(InputError, match=r"cannot be written \(Not a directory\); choose another folder"):
            write(actor_of("decentralised"), folder)
    with pytest.raises(InputError, match=r"actor\.onnx: cannot be written"):
        write_onnx(actor_of("decentralised"), tmp_path / "missing/actor.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
        write(actor_of("decentralised"), tmp_path / "closed/policy")
