"""The CNN: what it reads, what it learns, its file, and the commands that reach it."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from gmel.cli.main import app
from gmel.scenario.errors import InputError
from gmel.synthesis import learners
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.procedural import draw_photo
from gmel.synthesis.data.write import write_dataset
from gmel.synthesis.detector.cnn import Cnn, CnnDetector, CnnSize
from gmel.synthesis.detector.linear import softmax
from gmel.synthesis.detector.pictures import SIDE, PictureExtractor
from gmel.synthesis.detector_file import Detector, load_detector, save_detector
from gmel.synthesis.evaluate import BASE, OF_CNN
from gmel.synthesis.photo import GOOD, Floats, Photo
from gmel.synthesis.report import headline
from gmel.synthesis.rows import Heads
from reporters import Silent

STEPS = 80
FEW = 8
"""Updates at the usual size, where it matters only that the parts fit together."""
EXTRACTOR = PictureExtractor(False, side=48)
"""Small, so that a training takes a second."""


def drawn(first: int, last: int) -> list[Photo]:
    """Photos of the built-in set: good parts, inclusions and stains on woven cloth."""
    return [
        draw_photo("woven", label, number, shape=(64, 64))
        for label in (GOOD, "inclusion", "stain")
        for number in range(first, last)
    ]


SEEN, NEW = drawn(0, 30), drawn(100, 130)
ROWS = EXTRACTOR([*SEEN, *NEW])
LABELS = [photo.label for photo in SEEN]
TRUTH = np.asarray([photo.label for photo in NEW])


def fit(labels: list[str], seed: int = 0, rows: Floats | None = None, steps: int = STEPS) -> CnnDetector:
    features = ROWS[: len(SEEN)] if rows is None else rows
    return CnnDetector.fit(features, labels, None, EXTRACTOR.channels, seed, Silent(), steps)


def typed(detector: CnnDetector) -> float:
    """Share of the new defects whose type is named."""
    logits = detector.logits(ROWS[len(SEEN) :])[TRUTH != GOOD][:, 1:]
    return float(np.mean(np.asarray(detector.classes[1:])[np.argmax(logits, axis=1)] == TRUTH[TRUTH != GOOD]))


def found(detector: CnnDetector) -> float:
    """AUROC of the new defects."""
    return float(roc_auc_score(TRUTH != GOOD, detector.defect_probability(ROWS[len(SEEN) :])))


@pytest.fixture(scope="module")
def detector() -> CnnDetector:
    return fit(LABELS)


def test_it_learns_the_built_in_set_and_nothing_from_shuffled_labels(detector: CnnDetector) -> None:
    assert found(detector) > 0.78
    assert typed(detector) > 0.6
    shuffled = fit(np.random.default_rng(0).permutation(LABELS).tolist())
    assert found(shuffled) < 0.7
    assert typed(shuffled) < 0.6, "what is learned is the labels, not the order of the rows"


def test_same_seed_same_network_and_other_seeds_others(detector: CnnDetector) -> None:
    rows = ROWS[len(SEEN) :]
    assert np.array_equal(fit(LABELS).logits(rows), detector.logits(rows))
    assert not np.allclose(fit(LABELS, seed=1).logits(rows), detector.logits(rows), atol=1e-2)


def test_names_of_the_types_do_not_matter() -> None:
    # A few updates: sums in another order round differently, and every update makes that larger.
    other = {GOOD: GOOD, "inclusion": "stain", "stain": "inclusion"}
    rows = ROWS[len(SEEN) :]
    plain = fit(LABELS, steps=FEW).logits(rows)
    swapped = fit([other[label] for label in LABELS], steps=FEW).logits(rows)
    spread = np.ptp(plain[:, 1] - plain[:, 2])
    np.testing.assert_allclose(swapped[:, [0, 2, 1]], plain, atol=0.01 * spread)
    assert np.abs(swapped - plain).max() > 0.5 * spread


def test_classes_weigh_the_same_and_rows_as_they_are_told() -> None:
    # One picture that all classes share, so that only weights can tell: 0.1 of the good parts, all of the others.
    other, shared = ROWS[0], ROWS[40]
    rows = np.stack([other, *[shared] * 9, shared, *[shared] * 20])
    labels = [GOOD] * 10 + ["inclusion"] + ["stain"] * 20
    weights = np.asarray([0.9, *[0.1 / 9] * 9, 1.0, *[0.05] * 20])
    told = CnnDetector.fit(rows, labels, weights, EXTRACTOR.channels, 0, Silent(), STEPS)
    np.testing.assert_allclose(softmax(told.logits(rows[-1:]))[0], np.array([0.1, 1.0, 1.0]) / 2.1, atol=0.12)
    assert softmax(told.logits(rows[:1]))[0, 0] > 0.8


def test_what_is_said_of_a_photo_does_not_depend_on_the_others(detector: CnnDetector) -> None:
    rows = ROWS[len(SEEN) :]
    np.testing.assert_allclose(detector.logits(rows[40:43]), detector.logits(rows)[40:43], atol=1e-4)
    assert detector.logits(rows[:0]).shape == (0, 3)


def test_one_class_is_no_detector(detector: CnnDetector) -> None:
    with pytest.raises(InputError, match="two classes"):
        fit(["pit"] * 30, rows=ROWS[:30])
    types_only = CnnDetector(("inclusion", "stain", "pit"), detector.network)
    with pytest.raises(InputError, match="no good parts"):
        types_only.defect_probability(ROWS[:1])


def test_pictures_of_any_size_and_depth_in_any_light() -> None:
    side = EXTRACTOR.side
    image = np.rint(128 + 60 * np.sin(np.arange(2 * side) / 9)[:, None] * np.ones(3 * side)).astype(np.uint8)
    plain, deep = Photo(image, GOOD), Photo(image.astype(np.uint16) * 257, GOOD)
    dim = Photo((image // 4 + 20).astype(np.uint8), GOOD)
    rows = EXTRACTOR([plain, deep, dim, draw_photo("cast", GOOD, 0, shape=(48, 60))])
    assert rows.shape == (4, len(EXTRACTOR.names))
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-4)
    grey = rows[:, :-2].reshape(4, side, side, 2)[..., 0]
    np.testing.assert_allclose(grey[2], grey[0], atol=0.2)
    assert rows[2, -1] < rows[0, -1] - 1.0, "the contrast that is taken out stands behind the pixels"
    # Area-averaged: each pixel is the mean of its 2 x 3 pixels of the photo, to one scale and shift.
    blocks = plain.pixels().reshape(side, 2, side, 3).mean(axis=(1, 3))
    expected = (blocks - blocks.mean()) / (blocks.std() + 0.005)
    np.testing.assert_allclose(grey[0], expected, atol=1e-3)


def test_roughness_tells_grain_that_averaging_removes() -> None:
    down, right = np.mgrid[: 4 * SIDE, : 4 * SIDE]
    image = np.where((down + right) % 2 == 0, 128, np.where(right < 2 * SIDE, 128, 140)).astype(np.uint8)
    planes = PictureExtractor(False)([Photo(image, GOOD)])[0, :-2].reshape(SIDE, SIDE, 2)
    assert planes[:, : SIDE // 2 - 1, 1].max() < planes[:, SIDE // 2 + 1 :, 1].min() - 1.0


def test_a_template_is_a_channel_of_its_own() -> None:
    photo = draw_photo("cast", "pit", 0, shape=(96, 96))
    same = Photo(photo.image, "pit", template=photo.image)
    row = PictureExtractor(with_template=True)([same])[0]
    planes = row[:-2].reshape(SIDE, SIDE, 3)
    np.testing.assert_allclose(planes[..., 2], 0.0, atol=1e-5)
    np.testing.assert_array_equal(planes[..., :2].ravel(), PictureExtractor(False)([photo])[0, :-2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes of the photos are mixed."""
    place = tmp_path_factory.mktemp("plant") / "photos"
    photos = [
        draw_photo("cast", label, number, shape=(60 + number, 64))
        for label, count in ((GOOD, 20), ("pit", 6), ("scratch", 6))
        for number in range(count)
    ]
    write_dataset(Dataset("plant", tuple(photos)), place, Silent())
    return place


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file that a user gets who types the command, and what was printed."""
    out = tmp_path_factory.mktemp("trained") / "d.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "STEPS", FEW)
        asked = ["synthesize", "train", str(folder), "-o", str(out), "--detector", "cnn", "--json"]
        said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    return out, json.loads(said.stdout)


def test_file_says_the_same_and_is_calibrated(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    detector = load_detector(trained[0])
    assert isinstance(detector.heads.detection, CnnDetector)
    assert isinstance(detector.heads.typing, CnnDetector)
    assert detector.heads.detection.temperature != 1.0, "from shots that were held out"
    assert detector.heads.typing.temperature != 1.0
    assert trained[1]["threshold"] == detector.heads.threshold
    path = tmp_path / "again.safetensors"
    save_detector(path, detector)
    assert load_detector(path).find(NEW[::5]) == detector.find(NEW[::5])
    assert path.stat().st_size < 3_000_000, "no photos, no names of pixels"


def test_a_round_trip_keeps_every_prediction(detector: CnnDetector, tmp_path: Path) -> None:
    extractor = PictureExtractor(with_template=False)
    network = Cnn(CnnSize(SIDE, 2, 3), jax.random.key(3))
    network = eqx.tree_at(lambda each: each.leave.weight, network, jax.random.normal(jax.random.key(4), (194, 3)))
    head = CnnDetector(detector.classes, network, 1.7)
    whole = Detector(Heads(head.classes, head, head, 0.25), extractor, None, 1.0)
    save_detector(tmp_path / "d.safetensors", whole)
    again = load_detector(tmp_path / "d.safetensors")
    assert again.find(NEW[::5]) == whole.find(NEW[::5])
    assert len({photo.defect for photo in again.find(NEW[::5])}) > 10


def altered(data: bytes, **values: Any) -> bytes:
    return write_arrays(parse_arrays(data), {"detector": json.dumps({**facts_of(data), **values})})


def facts_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["detector"])


def changed(data: bytes, change: Any) -> bytes:
    arrays = parse_arrays(data)
    name = next(name for name in arrays if name.startswith("detection.") and "leave" in name and "weight" in name)
    arrays[name] = np.ascontiguousarray(change(arrays[name]))
    return write_arrays(arrays, {"detector": json.dumps(facts_of(data))})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda data: data[: len(data) // 2], "corrupt"),
        (lambda data: changed(data, lambda array: array[:-1]), "leave"),
        (lambda data: changed(data, lambda array: array.astype(np.float64)), "float64"),
        (lambda data: changed(data, lambda array: array * np.nan), "no numbers"),
        (lambda data: altered(data, extractor=f"pictures of {SIDE} pixels and template"), "shrink"),
        (lambda data: altered(data, extractor="pictures of 7 pixels"), "features"),
        (lambda data: altered(data, extractor="texture"), "features|texture"),
        (lambda data: altered(data, detector="linear"), "does not read"),
        (lambda data: altered(data, classes=[GOOD, "pit"]), "classes"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, change: Any, word: str
) -> None:
    path = tmp_path / "detector.safetensors"
    path.write_bytes(change(trained[0].read_bytes()))
    with pytest.raises(InputError, match=word) as caught:
        load_detector(path)
    assert "\n" not in str(caught.value)
    assert "generator" not in str(caught.value)
    assert str(caught.value).count("train the detector anew") == 1


def test_train_and_detect_as_a_user_types_them(folder: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    out, facts = trained
    assert facts["detector"] == "cnn"
    assert facts["gate"]["evidence"]["detection"]
    found = CliRunner().invoke(app, ["synthesize", "detect", str(out), str(folder / "cast" / "pit"), "--json"])
    assert found.exit_code == 0, found.output
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == 12, "photos and masks"
    assert all(0.0 <= line["defect"] <= 1.0 and set(line["types"]) == {"pit", "scratch"} for line in lines)


def test_evaluate_shows_both_detectors_on_the_same_photos(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learners, "STEPS", FEW)
    out = tmp_path / "one"
    asked = ["synthesize", "evaluate", str(folder), "--shots", "3", "--draws", "1", "--out", str(out)]
    said = CliRunner().invoke(app, [*asked, "--detector", "cnn"])
    assert said.exit_code == 0, said.output
    found = json.loads((out / "experiment.json").read_text("utf-8"))
    scores = found["draws"][0]["scores"]
    assert set(scores) == {
        "real", BASE, f"{BASE} + compose", "gate", f"{BASE}{OF_CNN}", f"{BASE} + compose{OF_CNN}",
    }  # fmt: skip
    assert scores[f"{BASE}{OF_CNN}"] != scores[f"{BASE} + compose{OF_CNN}"] != scores[f"{BASE} + compose"]
    page = (out / "report.html").read_text("utf-8")
    assert f"{BASE} + compose{OF_CNN}" in page
    assert "trained from scratch" in page
    assert f"{BASE} + compose{OF_CNN}" in said.stdout
    with pytest.raises(InputError, match="other settings"):
        CliRunner().invoke(app, [*asked, "--resume"], catch_exceptions=False)


def test_headline_says_what_the_cnn_loses() -> None:
    def draw(number: int) -> dict[str, Any]:
        plain = {"auroc": 0.8 + 0.01 * (number % 3), "tpr": 0.4, "type_accuracy": 0.5, "balanced_accuracy": 0.4}
        worse = {**plain, "auroc": plain["auroc"] - 0.1 - 0.01 * (number % 2)}
        return {"scores": {"real": plain, BASE: plain, "gate": plain, f"{BASE}{OF_CNN}": worse}}

    found = {"draws": [draw(number) for number in range(10)], "settings": {"shots": 5}}
    assert "A CNN in place of the texture features: 10.5 points less AUROC." in headline(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "FOLDER", "--detector", "vit"], "must be one of texture, cnn"),
        (["train", "FOLDER", "-o", "d.safetensors", "--detector", "vit"], "must be one of texture, cnn"),
        (["train", "FOLDER", "-o", "d.safetensors", "--detector", "cnn", "--encoder", "e.onnx"], "one of the two"),
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
    assert not list(tmp_path.iterdir())
