"""The policy artefact: the same logits without JAX, the same weights back, and one clear line for what is broken."""

import json
import os
import subprocess
import sys
import textwrap
from functools import cache, partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

import gmel
from gmel.learning import export
from gmel.learning.export import export_policy, load_actor, write_onnx
from gmel.learning.networks import Actor, direct, encode, option_inputs
from gmel.policies import exported
from gmel.policies.exported import OPTION_UNITS, TASK_UNITS, ExportedPolicy
from gmel.scenario.errors import InputError
from gmel.simulator.scale import Scale
from gmel.simulator.state import OPTION_FEATURES, TASK_FEATURES, Observation

SCALE = Scale(time_s=2.5, size_bit=4e6, work=1.25)
TOLERANCE = 1e-5
MODES = {"decentralised": False, "communicating": True}
PLANTS = {"20x5": (20, 6), "60x8": (60, 9), "one server": (3, 2), "one request": (1, 5), "no server": (2, 1)}
FILES = {"actor.onnx", "actor.safetensors", "policy.json"}
Arrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]


@cache
def actor_of(mode: str, width: int = 32) -> Actor:
    """An actor as training leaves it: biases and last layer of some size (the untrained ones are about zero)."""
    build = partial(Actor, SCALE, jax.random.key(7), width=width, communicating=MODES[mode])
    leaves, structure = jax.tree.flatten(eqx.filter_eval_shape(build))
    rng = np.random.default_rng(8)
    drawn = [rng.normal(0.0, 1.4 / leaf.shape[0] ** 0.5 if leaf.ndim > 1 else 0.2, leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(array, jnp.float32) for array in drawn])


def write(actor: Actor, folder: Path, **training: Any) -> Path:
    return export_policy(actor, folder, scenario_digest="0123456789ab", scenario_name="test", training=training)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedPolicy]:
    folder = tmp_path_factory.mktemp("policies")
    return {mode: ExportedPolicy.load(write(actor_of(mode), folder / mode)) for mode in MODES}


def observe(requests: int, options: int, seed: int, kind: str = "usual") -> Arrays:
    """A random observation. `kind` names what is extreme about it."""
    rng = np.random.default_rng(seed)
    task = np.stack([rng.gamma(2.0, size, requests) for size in (1.0, 2e6, 3.0, 0.5, 1.0, 2.0)], axis=-1)
    task[:, 2] -= 1.0  # deadlines that have passed occur
    task[:, 4] = rng.integers(1, 4, requests)
    sizes = (1.0, 1.0, 1.0, 1.0, 4.0, 1.0, 0.5, 1.0, 0.5, 4.0, 0.5)
    choices = np.stack([rng.gamma(1.5, size, (requests, options)) for size in sizes], axis=-1)
    choices[..., 0] = np.arange(options) == 0
    choices[..., 1] = np.broadcast_to(rng.uniform(0.3, 4.0, options), (requests, options))
    choices[..., 2] = np.broadcast_to(rng.integers(1, 5, options), (requests, options))
    mask = rng.random((requests, options)) < 0.8
    mask[:, 0] |= ~mask.any(axis=1)
    present = rng.random(requests) < 0.8
    mask[~present] = np.arange(options) == 0
    names = OPTION_FEATURES.index
    if kind == "idle":
        choices[..., [names("backlog_s"), names("previous_s"), names("own_unseen_s")]] = 0.0
        task[:, TASK_FEATURES.index("own_backlog_s")] = 0.0
    elif kind == "overloaded":
        choices[..., names("backlog_s")] = 1e6
        task[:, TASK_FEATURES.index("own_backlog_s")] = 1e6
    elif kind == "half overloaded":
        choices[..., names("backlog_s")] *= np.where(rng.random(options) < 0.5, 1e6, 1.0)
    elif kind == "nothing":
        task[:, [TASK_FEATURES.index(name) for name in ("work", "size_bit", "deadline_s", "waited_s")]] = 0.0
        choices[..., 3:] = 0.0
    elif kind == "local only":
        mask = np.broadcast_to(np.arange(options) == 0, mask.shape).copy()
    elif kind == "padding":
        present[:] = False
    return task.astype(np.float32), choices.astype(np.float32), mask, present


KINDS = ("usual", "idle", "overloaded", "half overloaded", "nothing", "local only", "padding")


@eqx.filter_jit
def _scores(actor: Actor, observation: Observation) -> jax.Array:
    return actor(observation)


def in_jax(actor: Actor, arrays: Arrays) -> NDArray[np.float32]:
    task, options, mask, present = (jnp.asarray(each) for each in arrays)
    return np.asarray(_scores(actor, Observation(present, jnp.arange(len(task)), task, options, mask)))


@eqx.filter_jit
def _loudest(actor: Actor, observation: Observation) -> jax.Array:
    assert actor.message is not None
    options, tasks = encode(observation, SCALE)
    hidden = jax.nn.relu(actor.option_in(options) + actor.task_in(tasks)[..., None, :])
    return jnp.max(jnp.abs(actor.message(hidden, observation.present)))


def tolerance(actor: Actor, arrays: Arrays) -> float:
    """1e-5; but messages are sums over requests, and of a sum of a thousand float32 keeps four decimals (JAX is then as
    far from the exact value as ONNX is)."""
    if actor.message is None:
        return TOLERANCE
    task, options, mask, present = (jnp.asarray(each) for each in arrays)
    observation = Observation(present, jnp.arange(len(task)), task, options, mask)
    # The direct part is added to it, a sum whose terms are larger than itself.
    terms = jnp.max(jnp.abs(direct(observation, SCALE)) @ jnp.abs(actor.direct_weights()))
    return max(TOLERANCE, 1e-6 * float(_loudest(actor, observation) + terms))


def difference(first: NDArray[np.float32], second: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    return float(np.max(np.abs(first[mask].astype(float) - second[mask])))


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("plant", PLANTS)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
@settings(deadline=None, max_examples=30)
def test_logits_are_those_of_jax(
    mode: str, plant: str, policies: dict[str, ExportedPolicy], seed: int, kind: str
) -> None:
    arrays = observe(*PLANTS[plant], seed, kind)
    mask = arrays[2]
    expected, found = in_jax(actor_of(mode), arrays), policies[mode].logits(*arrays)
    assert found.dtype == np.float32 and found.shape == mask.shape
    assert np.all(np.isneginf(found[~mask])) and np.all(np.isneginf(expected[~mask]))
    assert difference(found, expected, mask) <= tolerance(actor_of(mode), arrays)


def in_double(path: Path, arrays: Arrays) -> NDArray[np.float64]:
    """The graph of a file with every float32 in it made float64, run by onnx's own evaluator."""
    model = onnx.load(path)
    for constant in model.graph.initializer:
        if constant.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(constant).astype(np.float64)
            constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for node in model.graph.node:
        if node.op_type == "Cast":
            node.attribute[0].i = onnx.TensorProto.DOUBLE
    doubled = [each.astype(np.float64) if each.dtype == np.float32 else each for each in arrays]
    feeds = dict(zip(("task", "options", "mask", "present"), doubled, strict=True))
    return ReferenceEvaluator(model).run(None, feeds)[0]  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_formulas_are_those_of_jax(mode: str, kind: str, tmp_path: Path) -> None:
    """Without rounding in the way: in float64 the two agree to 1e-9, however large the numbers are."""
    # A temperature of one and a width of four squared have no rounding of their own in float32.
    actor = actor_of(mode, 16)
    # The weights of the direct inputs are worked out in float32 before the export: rounded so that this is exact.
    weights = jnp.round(actor.weights * 64) / 64
    actor = eqx.tree_at(lambda each: (each.sharpness, each.weights), actor, (jnp.asarray(0.0), weights))
    write_onnx(actor, tmp_path / "actor.onnx")
    for seed in range(4):
        arrays = observe(20, 6, seed, kind)
        task, options, mask, present = (np.asarray(each) for each in arrays)
        found = in_double(tmp_path / "actor.onnx", arrays)
        with jax.enable_x64(True):
            doubled = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), actor)
            table, choices = jnp.asarray(task, jnp.float64), jnp.asarray(options, jnp.float64)
            device = jnp.arange(len(task))
            observation = Observation(jnp.asarray(present), device, table, choices, jnp.asarray(mask))
            expected = np.asarray(_scores(doubled, observation))
        assert found.dtype == expected.dtype == np.float64
        assert np.array_equal(np.isneginf(found), ~mask)
        assert np.max(np.abs(found[mask] - expected[mask])) < 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("table", ["task", "options"])
def test_every_column_reaches_the_logits(mode: str, table: str, policies: dict[str, ExportedPolicy]) -> None:
    """Otherwise the equality above could hold for a graph that ignores what JAX ignores in these observations."""
    arrays = observe(20, 6, 3)
    before = policies[mode].logits(*arrays)
    for column in range(arrays[0 if table == "task" else 1].shape[-1]):
        moved = [each.copy() for each in arrays]
        moved[0 if table == "task" else 1][..., column] *= 1.5
        moved[0 if table == "task" else 1][..., column] += 0.25
        after = policies[mode].logits(*moved)  # type: ignore[arg-type]
        assert difference(before, after, arrays[2]) > 10 * TOLERANCE, column


@pytest.mark.parametrize("mode", MODES)
def test_a_small_change_of_any_weight_is_seen(mode: str, tmp_path: Path) -> None:
    """Each array of the actor is in the graph, at its place: moving it moves the logits by more than the tolerance."""
    actor, arrays = actor_of(mode, 8), observe(20, 6, 5)
    before = in_jax(actor, arrays)
    leaves, structure = jax.tree.flatten(actor)
    for number, leaf in enumerate(leaves):
        other = jnp.asarray(np.asarray(leaf) * np.float32(1.02) + np.float32(0.01))
        moved = jax.tree.unflatten(structure, [*leaves[:number], other, *leaves[number + 1 :]])
        write_onnx(moved, tmp_path / "actor.onnx")
        after = run_onnx(tmp_path / "actor.onnx", arrays)
        assert difference(before, after, arrays[2]) > 10 * TOLERANCE, number
        assert difference(in_jax(moved, arrays), after, arrays[2]) <= tolerance(moved, arrays), number


def run_onnx(path: Path, arrays: Arrays) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], dict(zip(("task", "options", "mask", "present"), arrays, strict=True)))[0]


@pytest.mark.parametrize("mode", MODES)
@given(order=st.permutations(range(8)), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_servers_may_come_in_any_order(
    mode: str, policies: dict[str, ExportedPolicy], order: list[int], seed: int
) -> None:
    task, options, mask, present = observe(12, 9, seed)
    places = [0, *(1 + server for server in order)]
    plain = policies[mode].logits(task, options, mask, present)
    mixed = policies[mode].logits(task, options[:, places], mask[:, places], present)
    assert difference(plain[:, places], mixed, mask[:, places]) <= tolerance(
        actor_of(mode), (task, options, mask, present)
    )


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_decentralised_rows_do_not_see_each_other(policies: dict[str, ExportedPolicy], seed: int) -> None:
    arrays = observe(6, 5, seed)
    together = policies["decentralised"].logits(*arrays)
    for row in range(6):
        alone = policies["decentralised"].logits(*(each[row : row + 1] for each in arrays))  # type: ignore[arg-type]
        assert difference(together[row : row + 1], alone, arrays[2][row : row + 1]) <= TOLERANCE


def test_communicating_rows_hear_the_present_ones(policies: dict[str, ExportedPolicy]) -> None:
    task, options, _, _ = observe(4, 5, 1)
    mask, policy = np.ones((4, 5), np.bool_), policies["communicating"]
    everyone = np.ones(4, np.bool_)
    without_last = np.array([True, True, True, False])
    assert np.array_equal(policy.logits(task, options, mask), policy.logits(task, options, mask, everyone))
    heard = policy.logits(task, options, mask, without_last)
    assert difference(policy.logits(task, options, mask)[:3], heard[:3], mask[:3]) > 1e-3
    alone = policy.logits(task[:3], options[:3], mask[:3])
    assert difference(heard[:3], alone, mask[:3]) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_no_request_is_no_decision(mode: str, policies: dict[str, ExportedPolicy]) -> None:
    task, options, mask, present = observe(3, 4, 0)
    assert policies[mode].logits(task[:0], options[:0], mask[:0], present[:0]).shape == (0, 4)
    assert policies[mode].act(task[:0], options[:0], mask[:0], np.random.default_rng(0)).shape == (0,)


# ----------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("mode", MODES)
def test_graph_says_what_it_is(mode: str, tmp_path: Path) -> None:
    write_onnx(actor_of(mode), tmp_path / "actor.onnx")
    model = onnx.load(tmp_path / "actor.onnx")
    onnx.checker.check_model(model, full_check=True)
    facts = {each.key: each.value for each in model.metadata_props}
    assert facts["gmel"] == gmel.__version__ and facts["mode"] == mode
    assert facts["observation_digest"] == exported.schema_digest(exported.observation_schema())
    assert [each.name for each in model.graph.input] == ["task", "options", "mask", "present"]
    assert all(each.domain in ("", "ai.onnx") and each.version == export.OPSET for each in model.opset_import)
    assert [each.name for each in tmp_path.iterdir()] == ["actor.onnx"]


def test_same_actor_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(actor_of("communicating"), tmp_path / name, seed=3)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_input_added_to_the_networks_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "option_inputs", lambda scale: option_inputs(scale) + 1)
    with pytest.raises(AssertionError, match="_encode"):
        write_onnx(actor_of("decentralised"), tmp_path / "actor.onnx")


# -------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [32, 12])
def test_the_actor_comes_back_bitwise(mode: str, width: int, tmp_path: Path) -> None:
    actor = actor_of(mode, width)
    assert write(actor, tmp_path / "policy") == tmp_path / "policy"
    back = load_actor(tmp_path / "policy")
    assert jax.tree.structure(back) == jax.tree.structure(actor)  # static fields included: scale, width, mode
    for one, other in zip(jax.tree.leaves(actor), jax.tree.leaves(back), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    arrays = observe(20, 6, 2)
    assert in_jax(actor, arrays).tobytes() == in_jax(back, arrays).tobytes()


def test_description_says_what_the_numbers_mean(tmp_path: Path) -> None:
    training = {"seed": 3, "latency_s": np.float32(0.5), "loss": float("nan"), "curve": [1.0, float("inf")]}
    write(actor_of("communicating"), tmp_path / "policy", **training)
    assert {each.name for each in (tmp_path / "policy").iterdir()} == FILES
    content = json.loads(
        (tmp_path / "policy/policy.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"),
    )
    assert content["scenario"] == {"name": "test", "digest": "0123456789ab"}
    assert content["training"] == {"seed": 3, "latency_s": 0.5, "loss": None, "curve": [1.0, None]}
    assert tuple(column["name"] for column in content["observation"]["task"]) == TASK_FEATURES
    assert tuple(column["name"] for column in content["observation"]["options"]) == OPTION_FEATURES
    assert content["actor"]["scale"] == {name: getattr(SCALE, name) for name in ("time_s", "size_bit", "work")}
    assert content["actor"]["levels"] == 1
    policy = ExportedPolicy.load(tmp_path / "policy")
    assert policy.mode == "communicating" and policy.description.weights["mix.weight"] == (96, 32)
    assert policy.description.gmel == gmel.__version__ and policy.description.scenario_name == "test"


def test_columns_are_those_of_the_simulator() -> None:
    assert tuple(TASK_UNITS) == TASK_FEATURES and tuple(OPTION_UNITS) == OPTION_FEATURES
    for name, unit in (TASK_UNITS | OPTION_UNITS).items():
        assert name.endswith("_s") == (unit == "s") and name.endswith("_bit") == (unit == "bit")


def test_schema_digest_sees_name_unit_order_and_version() -> None:
    plain = exported.observation_schema()
    digest = exported.schema_digest(plain)
    assert digest == exported.schema_digest({**plain, "digest": "anything"})
    columns = plain["options"]
    others: list[dict[str, Any]] = [
        {**plain, "version": 2},
        {**plain, "options": columns[::-1]},
        {**plain, "options": columns[:-1]},
        {**plain, "options": [{**columns[0], "unit": "s"}, *columns[1:]]},
        {**plain, "task": [{**plain["task"][0], "name": "other"}, *plain["task"][1:]]},
    ]
    assert len({digest, *(exported.schema_digest(other) for other in others)}) == len(others) + 1


# ------------------------------------------------------------------------------------------------------- deciding


def test_draws_follow_the_softmax(policies: dict[str, ExportedPolicy]) -> None:
    task, options, mask, _ = observe(4, 6, 11, "usual")
    options[..., 3:] *= 0.2  # so that several options of a row are likely
    mask[:], mask[1, 2], mask[3] = True, False, np.arange(6) == 0
    policy, rng, draws = policies["decentralised"], np.random.default_rng(5), 20_000
    copies = draws // 4
    logits = policy.logits(task, options, mask).astype(float)
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.sort(expected[0])[-2] > 0.1, "more than one likely option"
    counts = np.zeros((4, 6))
    for _ in range(4):
        chosen = policy.act(*(np.repeat(each, copies, axis=0) for each in (task, options, mask)), rng)
        assert chosen.shape == (4 * copies,)
        for row in range(4):
            counts[row] += np.bincount(chosen.reshape(4, copies)[row], minlength=6)
    error = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(counts / draws - expected) <= 4.5 * error + 1e-12)
    assert counts[1, 2] == 0 and counts[3, 0] == draws


def test_same_seed_same_draws_and_greedy_is_the_best(policies: dict[str, ExportedPolicy]) -> None:
    task, options, mask, present = observe(60, 9, 4)
    policy = policies["communicating"]

    def act(seed: int, greedy: bool = False) -> NDArray[np.int64]:
        return policy.act(task, options, mask, np.random.default_rng(seed), greedy, present)

    assert np.array_equal(act(1), act(1)) and not np.array_equal(act(1), act(2))
    best = np.argmax(policy.logits(task, options, mask, present), axis=1)
    assert np.array_equal(act(1, greedy=True), best) and not np.array_equal(act(1), best)
    assert np.all(mask[np.arange(60), act(3)])


def wrong(name: str, value: Any) -> dict[str, Any]:
    task, options, mask, present = observe(3, 4, 0)
    return {**{"task": task, "options": options, "mask": mask, "present": present}, name: value}


def with_value(shape: tuple[int, ...], value: float) -> NDArray[np.float32]:
    array = np.ones(shape, np.float32)
    array[(1,) * len(shape)] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (wrong("task", np.ones((3, 5))), r"task: shape is \[3, 5\], must be \[requests, 6\]"),
        (wrong("task", np.ones(6)), r"task: shape is \[6\]"),
        (wrong("task", np.full((3, 6), "a")), "task: holds <U1, must be numbers"),
        (wrong("options", np.ones((3, 4, 10))), r"options: shape is \[3, 4, 10\], must be \[3, options, 11\]"),
        (wrong("options", np.ones((2, 4, 11))), r"options: shape is \[2, 4, 11\]"),
        (wrong("mask", np.ones((3, 5), np.bool_)), r"mask: shape is \[3, 5\], must be \[3, 4\]"),
        (wrong("mask", np.ones((3, 4))), "mask: holds float64, must be true or false"),
        (wrong("mask", np.array([[True] * 4, [False] * 4, [True] * 4])), "mask: row 1 allows no option"),
        (wrong("present", np.ones(4, np.bool_)), r"present: shape is \[4\], must be \[3\]"),
        (wrong("task", with_value((3, 6), np.nan)), r"task: nan at \[1, 1\], must be finite"),
        (wrong("options", with_value((3, 4, 11), np.inf)), r"options: inf at \[1, 1, 1\], must be finite"),
        (wrong("options", np.full((3, 4, 11), 1e300)), r"options: inf at \[0, 0, 0\], must be finite"),
        (wrong("options", np.zeros((3, 4, 11))), "options: row 0 has no finite scores"),
        (wrong("options", -100.0 * np.ones((3, 4, 11))), "options: row 0 has no finite scores"),
    ],
)
def test_input_that_cannot_be_decided_on(
    arrays: dict[str, Any], message: str, policies: dict[str, ExportedPolicy]
) -> None:
    with pytest.raises(InputError, match=message):
        policies["communicating"].logits(**arrays)


def test_a_device_needs_no_jax(tmp_path: Path) -> None:
    """In a process where JAX and all that comes with it cannot be imported, the policy decides as it does here."""
    arrays = observe(8, 6, 9)
    write(actor_of("communicating"), tmp_path / "policy")
    np.savez(tmp_path / "observation.npz", *arrays)
    script = """
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"jax", "jaxlib", "equinox", "jaxtyping", "onnx", "safetensors", "pydantic"}:
                    raise ImportError(f"{name} is not on this device")

        sys.meta_path.insert(0, Absent())
        try:
            import jax
        except ImportError:
            pass
        else:
            raise SystemExit("the hook does not work")
        from pathlib import Path
        import numpy as np
        from gmel.policies.exported import ExportedPolicy

        with np.load("observation.npz") as held:
            task, options, mask, present = (held[name] for name in held.files)
        policy = ExportedPolicy.load(Path("policy"))
        np.save("logits.npy", policy.logits(task, options, mask, present))
        np.save("action.npy", policy.act(task, options, mask, np.random.default_rng(1), present=present))
    """
    source = str(Path(gmel.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    policy = ExportedPolicy.load(tmp_path / "policy")
    assert np.array_equal(np.load(tmp_path / "logits.npy"), policy.logits(*arrays))
    action = policy.act(*arrays[:3], np.random.default_rng(1), present=arrays[3])
    assert np.array_equal(np.load(tmp_path / "action.npy"), action)
