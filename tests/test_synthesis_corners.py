"""Corners of synthesis: few photos, photos of unlike sizes, files that are whole but wrong, runs that changed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from gmel.cli.main import app
from gmel.scenario.errors import InputError
from gmel.synthesis.compose import Compose
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.procedural import draw_photo
from gmel.synthesis.detector.features import FeatureBook, extractor_for
from gmel.synthesis.detector.scores import score
from gmel.synthesis.evaluate import FORMAT, Settings, evaluate, read_experiment
from gmel.synthesis.fidelity import fidelity, kernel_distance
from gmel.synthesis.gate import decide
from gmel.synthesis.generator import load_generator, save_generator
from gmel.synthesis.lesson import notices, prepare, set_aside
from gmel.synthesis.photo import GOOD, Photo
from gmel.synthesis.rows import CLASSIC, Choice, Rows, joined
from reporters import Silent


def grain(seed: int, shape: tuple[int, int] = (48, 56), kind: Any = np.uint8, mean: float = 0.6) -> Any:
    full = np.iinfo(kind).max
    return (np.random.default_rng(seed).normal(mean, 0.02, shape).clip(0, 1) * full).astype(kind)


def pit(seed: int, mask: Any = None, kind: Any = np.uint8, label: str = "pit") -> Photo:
    image = grain(100 + seed, kind=kind)
    if mask is None:
        mask = np.zeros(image.shape, np.bool_)
        mask[20:27, 30:38] = True
    image = np.where(mask, image // 4, image)
    return Photo(image, label, mask, group=f"{label}/{seed}", name=f"{label}/{seed}")


def part(seed: int, kind: Any = np.uint8, shape: tuple[int, int] = (48, 56), mean: float = 0.6) -> Photo:
    return Photo(grain(seed, shape, kind, mean), GOOD, group=f"good/{seed}", name=f"good/{seed}")


def fitted(shots: list[Photo], good: list[Photo]) -> Compose:
    return Compose.fit(shots, good, 0, Silent())


# compose


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_beyond_the_blend_the_good_part_is_the_same_to_the_bit(kind: Any) -> None:
    ground = part(1, kind)
    for photo in fitted([pit(0, kind=kind)], [ground]).sample("pit", 30, seed=2):
        assert photo.mask is not None
        assert photo.mask.any()
        far = np.asarray(ndimage.distance_transform_edt(~photo.mask)) > 10.0
        np.testing.assert_array_equal(photo.image[far], ground.image[far])


def test_a_photo_of_a_defect_shows_some_of_it_however_small_the_good_part() -> None:
    """Two spots at opposite corners: between them, where a crop around the middle lies, there is no defect."""
    mask = np.zeros((48, 56), np.bool_)
    mask[2:6, 2:6] = mask[42:46, 50:54] = True
    made = fitted([pit(0, mask)], [part(1, shape=(16, 16))]).sample("pit", 20, seed=0)
    assert all(photo.mask is not None and photo.mask.any() for photo in made)
    assert all(photo.pixels()[photo.mask].mean() < 0.4 for photo in made)


def test_a_file_keeps_the_templates(tmp_path: Path) -> None:
    good = [replace(part(n), template=grain(50 + n)) for n in range(3)]
    generator = fitted([replace(pit(0), template=grain(60))], good)
    save_generator(tmp_path / "g.safetensors", generator)
    again = load_generator(tmp_path / "g.safetensors", {"compose": Compose})
    for here, there in zip(generator.sample("pit", 6, 3), again.sample("pit", 6, 3), strict=True):
        np.testing.assert_array_equal(here.image, there.image)
        np.testing.assert_array_equal(here.template, there.template)


@pytest.mark.parametrize(
    ("name", "array", "word"),
    [
        ("shot.0.image", np.zeros((48, 56), np.float32), "image is float32"),
        ("good.0.image", np.zeros((48, 56, 3), np.uint8), "image is uint8"),
        ("good.0.image", np.zeros((0, 5), np.uint8), "image is uint8"),
        ("shot.0.mask", np.ones((5, 5), np.bool_), "mask is bool"),
        ("shot.0.mask", np.ones((48, 56), np.uint8), "mask is uint8"),
        ("good.0.template", np.ones((5, 5), np.uint8), "template is uint8"),
        ("shot.0.mask", np.zeros((48, 56), np.bool_), "no mask"),
        ("good", 0, "no good parts"),
    ],
)
def test_a_file_with_wrong_arrays_is_refused_by_name(tmp_path: Path, name: str, array: Any, word: str) -> None:
    path = tmp_path / "g.safetensors"
    save_generator(path, fitted([pit(0)], [part(1)]))
    data = path.read_bytes()
    facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    arrays = dict(load(data))
    if isinstance(array, int):
        facts[name] = str(array)
    else:
        arrays[name] = array
    path.write_bytes(save(arrays, metadata=facts))
    with pytest.raises(InputError, match=word) as caught:
        load_generator(path, {"compose": Compose})
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# What judges


def test_judges_are_no_grounds_of_synthetic_photos_and_no_good_parts_to_learn_from() -> None:
    """Each good part has a brightness of its own, by which a photo made of it is told."""
    good = [part(n, mean=0.3 + 0.03 * n) for n in range(12)]
    shots = [pit(n) for n in range(3)]
    _, judges = set_aside(good, 0.25)
    lesson = prepare(shots, good, ["compose"], FeatureBook(extractor_for(good)), 0, Silent(), copies=1, per_shot=20)
    made = lesson.samples["compose"].photos
    grounds = {round((float(np.median(photo.pixels())) - 0.3) / 0.03) for photo in made}
    names = {f"good/{n}" for n in grounds}
    assert len(judges) == 3
    assert names == {photo.name for photo in good} - {photo.name for photo in judges}
    learned = {row.tobytes() for row in lesson.real.features}
    assert not learned & {row.tobytes() for row in lesson.judges.features}
    assert len(lesson.judges) == 3


def test_samples_without_a_shot_hold_nothing_made_from_it() -> None:
    shots, good = [pit(n) for n in range(3)], [part(n) for n in range(8)]
    lesson = prepare(shots, good, ["compose"], FeatureBook(extractor_for(good)), 0, Silent(), copies=2, per_shot=4)
    rest = lesson.made(frozenset({"pit/1"}))["compose"]
    assert set(rest.sources[rest.labels == "pit"]) == {"pit/0", "pit/2"}
    assert set(lesson.classic.without({"pit/1"}).sources) == {"", "pit/0", "pit/2"}


def test_a_mode_that_cannot_be_used_is_named_with_the_reason() -> None:
    bare = [replace(pit(n), mask=None) for n in range(3)]
    good = [part(n) for n in range(8)]
    lesson = prepare(bare, good, ["compose"], FeatureBook(extractor_for(good)), 0, Silent(), copies=1)
    assert not lesson.samples
    assert "mask" in lesson.refused["compose"]
    assert notices(lesson.refused, lesson.left_out) == [f"compose was not tried: {lesson.refused['compose']}"]


def test_a_class_that_a_mode_cannot_draw_is_named() -> None:
    bare = [replace(pit(n), mask=None, label="stain") for n in range(3, 5)]
    good = [part(n) for n in range(8)]
    shots = [*(pit(n) for n in range(3)), *bare]
    lesson = prepare(shots, good, ["compose"], FeatureBook(extractor_for(good)), 0, Silent(), copies=1)
    assert lesson.left_out == {"compose": ["stain"]}
    said = notices(lesson.refused, lesson.left_out)
    assert said == ["compose draws nothing of stain: it can use none of their shots (no mask, no box)"]


# The gate with few photos


def drawn(label: str, count: int, seed: int, source: str = "") -> Rows:
    place = {GOOD: 0.0, "a": 1.5, "b": -1.5}[label]
    rows = np.random.default_rng(seed).standard_normal((count, 4)) + place
    return Rows.of(rows.astype(np.float32), [label] * count, [f"{source}{n}" if source else "" for n in range(count)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("shots", "held"), [((1, 1), 0), ((1, 5), 5), ((2, 2), 4)])
def test_the_only_shot_of_a_class_is_not_held_out(shots: tuple[int, int], held: int) -> None:
    real = joined(drawn("a", shots[0], 1, "a"), drawn("b", shots[1], 2, "b"), drawn(GOOD, 30, 3))
    asked: list[frozenset[str]] = []

    def made(names: frozenset[str]) -> dict[str, Rows]:
        asked.append(names)
        return {"draw": joined(drawn("a", 20, 4), drawn("b", 20, 5))}

    decision = decide(real, real, made, drawn(GOOD, 40, 6))
    assert sum(len(names) for names in asked) == held
    chance = decision.heads.probabilities(drawn("b", 50, 7).features)
    assert chance.shape == (50, 3)
    assert np.isfinite(chance).all()
    assert all(np.isfinite([found.gain, found.error]).all() for part in decision.evidence.values() for found in part)
    if not held:
        assert set(decision.detection.values()) | set(decision.typing.values()) == {Choice(CLASSIC)}


@pytest.mark.filterwarnings("error")
def test_without_judges_detection_is_classic_and_claims_no_calibration() -> None:
    """Defects alone would make any detector as sure as the temperature allows."""
    real = joined(drawn("a", 5, 1, "a"), drawn("b", 5, 2, "b"), drawn(GOOD, 3, 3))
    nobody = drawn(GOOD, 0, 0)
    decision = decide(real, real, lambda held: {}, nobody)
    assert decision.heads.detection is not None
    assert decision.heads.detection.temperature == 1.0
    assert decision.heads.threshold == 0.5
    assert set(decision.detection.values()) == {Choice(CLASSIC)}


# Figures


def test_the_floor_of_kid_is_not_the_distance_of_two_sites() -> None:
    """The photos of a test come by name, one site after the other."""
    random = np.random.default_rng(0)
    real = random.standard_normal((80, 6)).astype(np.float32)
    real[40:] += 4.0
    samples = random.standard_normal((80, 6)).astype(np.float32)
    samples[40:] += 4.0
    standard = (real - real.mean(0)) / real.std(0)
    apart = kernel_distance(standard[:40], standard[40:])
    found = fidelity(samples, real, real[:5])
    assert apart > 2.0
    assert abs(found.floor) < 0.1 * apart
    assert abs(found.kid) < 0.1 * apart


def test_order_of_photos_that_are_surely_good_is_kept() -> None:
    defect = 10.0 ** -np.arange(10.0, 30.0)
    labels = ["pit" if n % 3 == 0 else GOOD for n in range(20)]
    found = score(np.stack([1.0 - defect, defect], axis=1), (GOOD, "pit"), labels)
    assert found.auroc == pytest.approx(roc_auc_score([label != GOOD for label in labels], np.log(defect)))
    assert found.recall == {GOOD: 1.0, "pit": 0.0}


def test_photos_that_look_alike_are_a_coin_and_no_find() -> None:
    found = score(np.full((40, 2), 0.5), (GOOD, "pit"), [GOOD, "pit"] * 20)
    assert found.auroc == 0.5
    assert found.tpr == 0.0
    assert np.isnan(found.type_accuracy), "there is one type"


# The experiment and its commands


def plant(good: int, defects: dict[str, int]) -> Dataset:
    """Photos of 48 x 48 of the built-in set."""
    wanted = [(GOOD, n) for n in range(good)] + [(label, n) for label, count in defects.items() for n in range(count)]
    return Dataset("plant", tuple(draw_photo("brushed", label, n, shape=(48, 48)) for label, n in wanted))


def test_one_class_alone_is_no_experiment() -> None:
    for dataset in (plant(0, {"pit": 6}), plant(6, {})):
        with pytest.raises(InputError, match="alone; add"):
            evaluate(dataset, Settings(shots=2, draws=1), Silent())


def test_one_shot_a_class_is_measured_with_classic_augmentation() -> None:
    found, _ = evaluate(plant(24, {"pit": 6, "scratch": 6}), Settings(shots=1, draws=1), Silent())
    draw = found["draws"][0]
    assert {choice["mode"] for part in ("detection", "typing") for choice in draw["gate"][part].values()} == {CLASSIC}
    json.dumps(found, allow_nan=False)


def test_an_experiment_goes_on_with_its_own_photos_only() -> None:
    settings = Settings(shots=2, draws=1, modes=(), copies=1)
    found, _ = evaluate(plant(16, {"pit": 6}), settings, Silent())
    with pytest.raises(InputError, match="other photos"):
        evaluate(plant(20, {"pit": 6}), replace(settings, draws=2), Silent(), kept=found)


@pytest.mark.parametrize(
    "text", ["[]", "{", json.dumps({"format": FORMAT}), json.dumps({"format": FORMAT, "draws": []})]
)
def test_what_is_no_whole_experiment_is_not_resumed(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(InputError, match="anew") as caught:
        read_experiment(tmp_path / "experiment.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", ["data", "fit", "sample", "evaluate", "train", "profile"])
def test_negative_seeds_are_refused_before_any_work(verb: str, tmp_path: Path) -> None:
    words = [] if verb in ("data", "evaluate") else ["-o", str(tmp_path / "out")]
    said = CliRunner().invoke(app, ["synthesize", verb, str(tmp_path / "absent"), *words, "--seed", "-1"])
    assert said.exit_code == 2
    assert "'--seed'" in said.output
    assert "equal to 0" in said.output
    assert not list(tmp_path.iterdir())


def test_sample_checks_before_it_draws_and_draws_each_class_once(tmp_path: Path) -> None:
    file, out = tmp_path / "g.safetensors", tmp_path / "drawn"
    save_generator(file, fitted([pit(0)], [part(1)]))
    asked = ["synthesize", "sample", str(file), "-o", str(out), "--count", "3"]
    for more, word in (
        (["--sheet", str(tmp_path / "no" / "sheet.png")], "no such folder"),
        (["--sheet", str(tmp_path / "sheet.gif")], "must end with"),
        (["--class", "crack"], "known are pit"),
        (["--steps", "4"], "steps is 4"),
    ):
        with pytest.raises(InputError, match=word):
            CliRunner().invoke(app, [*asked, *more], catch_exceptions=False)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert CliRunner().invoke(app, [*asked, "--class", "pit, pit"]).exit_code == 0
    assert len(list((out / "pit").glob("*.png"))) == 3
