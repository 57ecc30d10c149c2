"""The experiment and its commands, as a user runs them, on a small procedural plant."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from gmel.cli.main import app
from gmel.scenario.errors import InputError
from gmel.synthesis.compose import Compose
from gmel.synthesis.curves import COUNTS, by_samples_and_steps, curve
from gmel.synthesis.data.dataset import Dataset, read_dataset
from gmel.synthesis.data.procedural import draw_photo
from gmel.synthesis.data.write import write_dataset
from gmel.synthesis.detector.features import FeatureBook, extractor_for
from gmel.synthesis.detector.scores import METRICS
from gmel.synthesis.evaluate import BASE, Experiment, Settings, evaluate, table, write_experiment
from gmel.synthesis.fidelity import fidelity, kernel_distance, neighbourhood, novelty
from gmel.synthesis.generator import Means, steps_around
from gmel.synthesis.lesson import Samples, prepare
from gmel.synthesis.photo import GOOD, Photo
from gmel.synthesis.recipes import Referee
from gmel.synthesis.report import headline, lines, photos_jpeg, write_report
from reporters import Silent

QUICK = Settings(shots=3, draws=2, copies=2, per_shot=2)


@pytest.fixture(scope="module")
def plant() -> Dataset:
    """64 photos of 64 x 64: good parts, pits, scratches."""
    photos = [
        draw_photo("cast", label, number, shape=(64, 64))
        for label, count in ((GOOD, 32), ("pit", 16), ("scratch", 16))
        for number in range(count)
    ]
    return Dataset("plant", tuple(photos))


@pytest.fixture(scope="module")
def folder(plant: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plant") / "photos"
    write_dataset(plant, place, Silent())
    return place


@pytest.fixture(scope="module")
def found(plant: Dataset) -> Experiment:
    return evaluate(plant, QUICK, Silent())[0]


def test_every_recipe_is_scored_in_every_draw(found: Experiment) -> None:
    recipes = {"real", BASE, f"{BASE} + compose", "gate"}
    assert [set(draw["scores"]) for draw in found["draws"]] == [recipes] * 2
    for draw in found["draws"]:
        for scores in draw["scores"].values():
            assert all(0.0 <= scores[metric] <= 1.0 for metric in METRICS)
    assert found["draws"][0]["scores"] != found["draws"][1]["scores"]


def test_table_is_paired_by_draw(found: Experiment) -> None:
    rows = table(found)
    for recipe, row in rows.items():
        for metric, cell in row.items():
            own = np.array([draw["scores"][recipe][metric] for draw in found["draws"]])
            base = np.array([draw["scores"][BASE][metric] for draw in found["draws"]])
            assert cell["value"].mean == pytest.approx(own.mean())  # type: ignore[union-attr]
            assert cell["gain"].mean == pytest.approx((own - base).mean())  # type: ignore[union-attr]
            assert cell["ahead"] == np.mean(own > base)


def test_resumed_experiment_is_the_uninterrupted_one(plant: Dataset, found: Experiment, tmp_path: Path) -> None:
    first = evaluate(plant, Settings(shots=3, draws=1, copies=2, per_shot=2), Silent())[0]
    kept = json.loads(json.dumps(first))
    resumed = evaluate(plant, QUICK, Silent(), kept)[0]
    assert resumed["draws"] == json.loads(json.dumps(found["draws"]))
    with pytest.raises(InputError, match="other settings"):
        evaluate(plant, Settings(shots=2, draws=2, copies=2, per_shot=2), Silent(), kept)
    (tmp_path / "prior").write_bytes(b"another")
    with pytest.raises(InputError, match="another prior"):
        evaluate(plant, QUICK, Silent(), kept, means=Means(prior=tmp_path / "prior"))


def test_page_stands_alone_and_shows_the_table(plant: Dataset, found: Experiment, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", found, {"shots": photos_jpeg(plant.photos[32:35])})
    page = (tmp_path / "report.html").read_text("utf-8")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert "data:image/jpeg;base64," in page
    for row in table(found).values():
        assert f"{100 * row['auroc']['value'].mean:.1f}" in page  # type: ignore[union-attr]
    assert {row["candidate"] for row in found["draws"][0]["gate"]["evidence"]["detection"]} >= {"none", "compose 0.15"}
    assert all(f"<td>detection</td><td>{words}</td>" in page for words in ("none", "compose 15 %"))
    assert "How many samples" not in page, "no curves were asked for"
    assert "too few to claim" in headline(found)
    assert lines(found)[1].startswith("real ")


def test_gains_are_claimed_only_where_the_draws_agree(found: Experiment) -> None:
    def having(gains: list[float]) -> Experiment:
        draws = []
        for gain in gains:
            scores = {name: dict(one) for name, one in found["draws"][0]["scores"].items()}
            scores["gate"]["auroc"] = scores[BASE]["auroc"] + gain
            for metric in METRICS[1:]:
                scores["gate"][metric] = scores[BASE][metric]
            draws.append({"scores": scores})
        return {**found, "draws": draws}

    assert "2.0 points more AUROC" in headline(having([0.01, 0.03] * 5))
    assert "2.0 points less AUROC" in headline(having([-0.01, -0.03] * 5))
    assert "no difference" in headline(having([0.05, -0.05] * 5))
    assert "no difference" in headline(having([-0.01] * 7 + [0.0] * 3)), "a tie is no harm"
    assert "no difference" in headline(having([0.01] * 7 + [-0.001] * 3)), "seven of ten draws are too few"
    assert "too few" in headline(having([0.02] * 9))


@pytest.mark.slow
def test_curves_by_samples_hold_the_table_and_are_on_the_page(plant: Dataset, tmp_path: Path) -> None:
    drawn = evaluate(plant, replace(QUICK, curves=True, per_shot=4), Silent())[0]
    for draw in drawn["draws"]:
        along = draw["curves"]["compose"]
        assert [int(number) for number in along["samples"]] == list(COUNTS)
        assert along["steps"] == {}, "composing has no steps"
        # The recipe of the table is one point of the curve: the same generator, seed and share.
        assert along["samples"]["4"] == draw["scores"][f"{BASE} + compose"]
        assert along["samples"]["1"] != along["samples"]["32"]
    gains = curve(drawn["draws"], "compose", "samples", "auroc", BASE)
    assert gains[4].mean == table(drawn)[f"{BASE} + compose"]["auroc"]["gain"].mean  # type: ignore[union-attr]
    write_report(tmp_path / "report.html", drawn, {})
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "How many samples, how many steps" in page
    assert "By denoising steps" not in page
    nothing = {**drawn, "draws": [{**draw, "curves": {}} for draw in drawn["draws"]]}
    write_report(tmp_path / "report.html", nothing, {})
    assert "How many samples" not in (tmp_path / "report.html").read_text("utf-8"), "no mode could be tried"


def test_curve_of_steps_draws_anew_with_those_steps() -> None:
    asked: list[int | None] = []

    class Stepped(Compose):
        default_steps: ClassVar[int] = 4

        def sample(self, label: str, count: int, seed: int, steps: int | None = None) -> list[Photo]:
            asked.append(steps)
            if steps == 12:
                raise InputError("at most 8 steps")
            return super().sample(label, count, seed + (steps or 0))

    shots = [draw_photo("cast", label, n, shape=(64, 64)) for label in ("pit", "scratch") for n in range(2)]
    good = [draw_photo("cast", GOOD, n, shape=(64, 64)) for n in range(8)]
    book = FeatureBook(extractor_for([*shots, *good]))
    lesson = prepare(shots, good, (), book, 0, Silent(), copies=1)
    lesson.samples["stepped"] = Samples(Stepped, shots, good, 1, book.extractor, 0, Silent())
    test = [draw_photo("cast", label, 9, shape=(64, 64)) for label in (GOOD, "pit", "scratch")]
    found = by_samples_and_steps(lesson, Referee(lesson, book(test), [photo.label for photo in test]))
    assert list(found["stepped"]["steps"]) == ["1", "2", "4", "8"], "steps that the mode refuses are left out"
    assert set(asked) == {None, *steps_around(4)}
    assert steps_around(0) == ()


def test_commands_from_folder_to_photos(folder: Path, tmp_path: Path) -> None:
    run, generator, drawn = CliRunner(), tmp_path / "g.safetensors", tmp_path / "drawn"
    fitted = run.invoke(app, ["synthesize", "fit", str(folder), "-o", str(generator), "--shots", "3"])
    assert fitted.exit_code == 0, fitted.output
    sheet = tmp_path / "sheet.png"
    asked = [
        "synthesize",
        "sample",
        str(generator),
        "-o",
        str(drawn),
        "--count",
        "4",
        "--class",
        "pit",
        "--sheet",
        str(sheet),
    ]
    assert run.invoke(app, asked).exit_code == 0
    made = read_dataset(drawn)
    assert [photo.label for photo in made.photos] == ["pit"] * 4
    assert all(photo.mask is not None and photo.mask.any() for photo in made.photos)
    assert sheet.exists()


def test_evaluate_as_a_user_types_it(folder: Path, tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "runs" / "one"
    asked = ["synthesize", "evaluate", str(folder), "--shots", "3", "--draws", "1", "--out", str(out)]
    said = run.invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert "gate" in said.stdout
    assert sorted(path.name for path in out.iterdir()) == ["compose.jpg", "experiment.json", "report.html", "shots.jpg"]
    with pytest.raises(InputError, match="--resume"):
        run.invoke(app, asked, catch_exceptions=False)
    more = run.invoke(app, [*asked[:-4], "--draws", "2", "--out", str(out), "--resume", "--json"])
    assert len(json.loads(more.stdout)["draws"]) == 2
    page = (out / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 2, "the first draw was not repeated, its photos are shown"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate"], "one of the two"),
        (["evaluate", "FOLDER", "--builtin"], "one of the two"),
        (["evaluate", "FOLDER", "--draws", "0"], "draws is 0"),
        (["evaluate", "FOLDER", "--shots", "100"], "class"),
        (["evaluate", "FOLDER", "--modes", "imagine"], "must be one of"),
        (["evaluate", "absent"], "absent"),
        (["fit", "FOLDER", "-o", "no/such/place.safetensors"], "folder that exists"),
        (["fit", "FOLDER", "--mode", "imagine", "-o", "g.safetensors"], "must be one of"),
        (["sample", "absent.safetensors", "-o", "drawn"], "cannot be read"),
        (["sample", "absent.safetensors", "-o", "drawn", "--count", "0"], "count is 0"),
        (["train", "FOLDER", "-o", "d.safetensors", "--false-alarms", "2"], "false alarms"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["synthesize", *(str(folder) if word == "FOLDER" else word for word in words)]
    with pytest.raises(InputError, match=message) as caught:
        CliRunner().invoke(app, asked, catch_exceptions=False)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_experiment_of_another_format_is_refused(folder: Path, tmp_path: Path, found: Experiment) -> None:
    write_experiment(tmp_path / "experiment.json", {**found, "format": 99})
    asked = ["synthesize", "evaluate", str(folder), "--out", str(tmp_path), "--resume"]
    with pytest.raises(InputError, match="format"):
        CliRunner().invoke(app, asked, catch_exceptions=False)


def test_kernel_distance_by_hand_and_without_bias() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), np.array([[1.0, 1.0], [0.0, 0.0]], np.float32)
    cross = np.array([[1.5**3, 1.0], [1.5**3, 1.0]])
    assert kernel_distance(x, y) == pytest.approx(1.0 + 1.0 - 2 * cross.mean())
    random = np.random.default_rng(0)
    same = [kernel_distance(*random.standard_normal((2, 40, 5)).astype(np.float32)) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300)
    moved = random.standard_normal((40, 5)).astype(np.float32) + 1
    assert kernel_distance(random.standard_normal((40, 5)).astype(np.float32), moved) > 5 * np.std(same)


def test_neighbours_are_those_of_plain_loops() -> None:
    random = np.random.default_rng(1)
    real, samples = (
        random.standard_normal((30, 3)).astype(np.float32),
        random.standard_normal((20, 3)).astype(np.float32),
    )

    def radius(points: np.ndarray, own: int) -> float:
        return float(sorted(np.linalg.norm(points - points[own], axis=1))[5])

    inside = [[np.linalg.norm(s - r) <= radius(real, n) for n, r in enumerate(real)] for s in samples]
    near = neighbourhood(samples, real)
    assert near.precision == pytest.approx(np.mean([any(row) for row in inside]))
    assert near.density == pytest.approx(np.sum(inside) / (5 * 20))
    assert near.coverage == pytest.approx(np.mean(np.any(inside, axis=0)))
    reached = [any(np.linalg.norm(s - r) <= radius(samples, n) for n, s in enumerate(samples)) for r in real]
    assert near.recall == pytest.approx(np.mean(reached))


def test_copies_are_called_copies() -> None:
    random = np.random.default_rng(2)
    shots = random.standard_normal((6, 8)).astype(np.float32)
    assert novelty(np.repeat(shots, 3, axis=0), shots) == (pytest.approx(0.0, abs=1e-5), 1.0)
    ratio, copies = novelty(random.standard_normal((60, 8)).astype(np.float32), shots)
    assert 0.6 < ratio < 1.6
    assert copies < 0.1
    facts = fidelity(
        random.standard_normal((40, 8)).astype(np.float32), random.standard_normal((40, 8)).astype(np.float32), shots
    )
    assert abs(facts.kid - facts.floor) < 1.0
