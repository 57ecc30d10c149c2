"""`gmel simulate` and the scenario commands beside it, as a user types them."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest

from gmel.cli.progress import ConsoleReporter
from gmel.evaluation import simulate as simulation
from gmel.evaluation.episodes import Measured, run_episodes
from gmel.evaluation.job import evaluation_episodes
from gmel.evaluation.ladder import ladder
from gmel.evaluation.tuning import Tuned
from gmel.learning.algorithm import make_task
from gmel.learning.export import export_policy
from gmel.learning.networks import Actor
from gmel.physics.random import mix_seed
from gmel.policies.rules import LeastExpectedDelay
from gmel.scenario.load import digest, load_scenario, to_toml
from gmel.simulator.build import build_environments
from gmel.simulator.environment import seeds
from gmel.simulator.links import draw_links, draw_positions_m
from small_plants import small_plant
from test_cli import gmel

SIZE = ["--episodes", "2", "--slots", "40"]


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plants") / "plant.toml"
    path.write_text(to_toml(small_plant()))
    return path


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy folder with an untrained actor."""
    scenario = small_plant()
    scale = make_task(build_environments(scenario).train, scenario).scale
    folder = tmp_path_factory.mktemp("run") / "policy"
    training = {"algorithm": "amarl", "seed": 0}
    actor = Actor(scale, jax.random.key(0), 16)
    return export_policy(actor, folder, scenario_digest=digest(scenario), scenario_name="small", training=training)


def figures(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    code, out, err = gmel(capsys, "simulate", *words, "--json")
    assert code == 0, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_ladder_has_its_rungs_in_order() -> None:
    tuned = Tuned(2.0, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))
    entries = ladder(tuned)
    assert [entry.rung for entry in entries] == ["L0", None, "L1", "L2", "L3", "L4", "L4", "L4", "L5"]
    kinds = [type(entry.policy).__name__ for entry in entries]
    assert kinds[:5] == ["Proportional", "Greedy", "LeastExpectedDelay", "Softmax", "Softmax7"]
    assert kinds[5:] == ["EarliestFinish", "Coordinated", "BestResponse", "SlotOptimum"]
    assert [entry.policy.mode for entry in entries[5:]] == ["central", "communicating", "central", "central"]
    assert float(entries[3].policy.temperature_s) == 2.0
    assert entries[4].policy.theta.tolist() == list(tuned.theta)


@pytest.mark.parametrize("name", ["all-local", "uniform", "coordinated", "eft"])
def test_rules_run_by_name(plant: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    shown = figures(capsys, plant, "--policy", name, *SIZE)
    metrics, parts = shown["metrics"], shown["decomposition_s"]
    assert isinstance(metrics, dict) and isinstance(parts, dict)
    assert shown["policy"]["name"] == name  # type: ignore[index]
    assert shown["load"] == 0.7
    if not shown["unstable"]:
        latency = metrics["mean_latency_s"]
        assert len(latency["values"]) == 2
        assert latency["low"] < latency["mean"] < latency["high"]
        assert sum(parts.values()) == pytest.approx(latency["mean"], rel=1e-5)


def test_figures_are_those_of_the_evaluation(plant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same traffic and the same random choices as `gmel run` gives its ladder."""
    shown = figures(capsys, plant, "--policy", "led2", *SIZE)
    scenario = small_plant()
    environments = build_environments(scenario)
    traffic = evaluation_episodes(scenario, environments, 2, 40)
    measured = run_episodes(environments.test, LeastExpectedDelay(), traffic, jax.random.key(0))
    expected = [float(records.latency_s.mean()) for records in measured.records]
    assert shown["metrics"]["mean_latency_s"]["values"] == pytest.approx(expected)  # type: ignore[index]


def test_another_seed_is_other_traffic(plant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, again, other = (
        figures(capsys, plant, "--policy", "greedy", *SIZE, "--seed", seed)["metrics"] for seed in (0, 0, 1)
    )
    assert one == again
    assert one != other


def test_records_are_the_tasks_that_were_counted(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = figures(capsys, plant, "--policy", "led2", *SIZE, "--records", tmp_path / "tasks.parquet")
    table = pa_parquet.read_table(tmp_path / "tasks.parquet")
    assert table.num_rows == shown["tasks"]
    assert table.column_names[:2] == ["episode", "target"]
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
    names = np.array(["device", "S0", "S1", "S2"])
    np.testing.assert_array_equal(columns["target"], names[columns["option"]])
    of_episode = [columns["latency_s"][columns["episode"] == number].mean() for number in (0, 1)]
    assert shown["metrics"]["mean_latency_s"]["values"] == pytest.approx(of_episode)  # type: ignore[index]
    figures(capsys, plant, "--policy", "led2", *SIZE, "--records", tmp_path / "tasks.csv")
    written = pa_csv.read_csv(tmp_path / "tasks.csv")
    assert written.column_names == table.column_names
    np.testing.assert_allclose(written.column("latency_s").to_numpy(), columns["latency_s"])
    assert not list(tmp_path.glob(".*"))


def test_an_overloaded_plant_says_its_load_and_no_mean(plant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--policy", "nearest", "--load", "1.24", "--slots", "60"]
    for episodes in (1, 3):  # one episode has no significance test; the load alone decides then
        code, out, _ = gmel(capsys, "simulate", plant, *options, "--episodes", episodes)
        assert code == 0
        assert "overloaded: load 1.24" in out
        assert "latency" not in out.replace("of the mean latency", "")
    shown = figures(capsys, plant, *options)
    assert shown["unstable"] is True
    assert shown["verdict"] == "overloaded: load 1.24"
    assert shown["metrics"]["mean_latency_s"] is None  # type: ignore[index]
    assert set(shown["decomposition_s"].values()) == {None}  # type: ignore[union-attr]


def measured(backlog_s: np.ndarray) -> Measured:
    return Measured([], backlog_s[:, :, None], backlog_s, np.zeros(len(backlog_s), np.int64))


def test_overload_needs_growth_and_below_load_one_significance() -> None:
    growing = np.linspace(0.0, 10.0, 30)[None, :]
    assert measured(growing).overloaded(1.24)
    assert not measured(growing).overloaded(0.7)
    assert measured(np.repeat(growing, 4, axis=0) + np.arange(4)[:, None] * 1e-3).overloaded(0.7)
    # Devices that take what the servers cannot keep a plant in balance at any load.
    assert not measured(np.full((2, 30), 5.0)).overloaded(1.24)
    assert measured(np.array([[1.0, 2.0]])).overloaded(1.24)


def test_a_policy_folder_and_a_run_folder(plant: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = figures(capsys, plant, "--policy", policy, *SIZE)
    other = figures(capsys, plant, "--policy", policy.parent, *SIZE)
    assert one["metrics"] == other["metrics"]
    assert one["policy"]["label"] == "amarl (small)"  # type: ignore[index]
    assert one["policy"]["mode"] == "decentralised"  # type: ignore[index]
    assert one["metrics"] != figures(capsys, plant, "--policy", "led2", *SIZE)["metrics"]


def test_a_trace_replaces_the_arrivals(plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s\n" + "\n".join(f"{t:.3f}" for t in np.sort(rng.uniform(0, 300, 400))) + "\n")
    code, out, err = gmel(capsys, "simulate", plant, "--trace", trace, "--policy", "led2", *SIZE, "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["trace"] == str(trace)
    assert shown["load"] != 0.7
    assert "load of the held-out part" in " ".join(shown["notes"])


def test_tuned_rules_are_tuned_on_a_plant_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def quick(environment: object, **_: object) -> Tuned:
        asked.append(environment)
        return Tuned(0.5, (0.5, 1.0, 0.5, 1.0, 1.0, -1.0, 1.0))

    monkeypatch.setattr(simulation, "tune", quick)
    for scenario, own, tunings in ((small_plant(), True, 1), (load_scenario("hall-20x5"), True, 1)):
        chosen = simulation.choose_policy("softmax", scenario, build_environments(scenario), own, ConsoleReporter())
        assert chosen.label == "softmax, tuned"
        assert len(asked) == tunings, "the package has parameters for its own plants, and for no others"
    # On another trace the parameters of the package do not fit either.
    hall = load_scenario("hall-20x5")
    simulation.choose_policy("softmax7", hall, build_environments(hall), False, ConsoleReporter())
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--policy", "gredy"], ["--policy gredy", "'greedy'"]),
        (["--policy", "."], ["policy.json"]),
        (["--policy", "a\0b"], ["no rule of that name"]),
        (["--episodes", "0"], ["--episodes 0"]),
        (["--slots", "1"], ["--slots 1"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--seed", "10000000"], ["--seed 10000000"]),
        (["--episodes", "9000", "--slots", "100000"], ["rows", "--episodes"]),
        (["--load", "nan"], ["arrivals.load"]),
        (["--trace", "nothing.csv"], ["nothing.csv"]),
        (["--records", "tasks.txt"], ["--records tasks.txt", ".parquet"]),
        (["--records", "nowhere/tasks.csv"], ["folder that exists"]),
        (["--render", "film.mp4"], ["--render film.mp4", ".html"]),
        (["--render", "nowhere/film.gif"], ["folder that exists"]),
    ],
)
def test_bad_input_is_one_line(
    plant: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: list[str]
) -> None:
    code, out, err = gmel(capsys, "simulate", plant, *words)
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("gmel: error:")]
    for word in named:
        assert word in line


def test_a_policy_that_was_tampered_with_is_refused(
    plant: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    for part in policy.iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    (folder / "actor.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    code, _, err = gmel(capsys, "simulate", plant, "--policy", folder)
    assert code == 2
    assert "actor.safetensors" in err


def test_a_table_of_uploads_that_is_too_small_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plant.toml"
    path.write_text(to_toml(small_plant(max_uploads=1, bandwidth_hz=1e5)))
    code, _, err = gmel(capsys, "simulate", path, "--policy", "nearest", *SIZE)
    assert code == 2
    assert "max_uploads = 1" in err


def test_scenario_check_warns_of_overload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plant.toml"
    for load, warned in ((0.7, False), (1.24, True)):
        path.write_text(to_toml(small_plant(arrivals=f"load = {load}")))
        code, out, err = gmel(capsys, "scenario", "check", path)
        assert code == 0
        assert out.startswith("valid: ")
        assert ("offered load 1.24" in err) is warned
        shown = json.loads(gmel(capsys, "scenario", "check", path, "--json")[1])
        assert bool(shown["warnings"]) is warned


def test_scenario_diff(plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.toml"
    other.write_text(to_toml(small_plant(speeds=(2.0, 3.0, 1.5))))
    code, out, _ = gmel(capsys, "scenario", "diff", plant, other)
    assert code == 0
    assert out.split() == ["servers[S2].speed", "1.0", "->", "1.5"]
    shown = json.loads(gmel(capsys, "scenario", "diff", plant, other, "--json")[1])
    assert shown["differences"] == [{"field": "servers[S2].speed", "a": 1.0, "b": 1.5}]
    assert gmel(capsys, "scenario", "diff", plant, plant)[1] == "no difference\n"


def test_import_positions_writes_those_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites, users = tmp_path / "sites.csv", tmp_path / "users.csv"
    sites.write_text("LATITUDE,LONGITUDE\n-37.8100,144.9700\n-37.8103,144.9704\n-37.8101,144.9702\n")
    users.write_text("Latitude,Longitude\n" + "".join(f"-37.810{k},144.970{k}\n" for k in range(6)))
    plain = tmp_path / "plain.toml"
    plain.write_text(to_toml(small_plant(radio='model = "inf"')))
    out = tmp_path / "placed.toml"
    code, _, err = gmel(
        capsys, "scenario", "import-positions", plain, "--servers", sites, "--devices", users, "--out", out
    )
    assert code == 0, err
    plant = build_environments(load_scenario(str(out))).test.plant
    places = draw_positions_m(plant, mix_seed(seeds(0, 1)[0]))
    assert places.shape == (6, 2)
    assert np.all(np.diff(np.asarray(places)[:, 0]) > 0)
    links = draw_links(plant, mix_seed(seeds(0, 1)[0]))
    assert np.all(np.asarray(links.uplink_snr) > 0)
