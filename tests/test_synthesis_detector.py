"""The detector as a file: what it says, what it refuses; the memory of good parts; encoders that users bring."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from gmel.cli.main import app
from gmel.scenario.errors import InputError
from gmel.synthesis.detector.encoder import EncoderExtractor
from gmel.synthesis.detector.memory import PatchMemory, patch_features
from gmel.synthesis.detector_file import Detector, load_detector, save_detector, train_detector
from gmel.synthesis.photo import GOOD, Photo
from reporters import Silent


def surface(seed: int, label: str = GOOD, shape: tuple[int, int] = (64, 72)) -> Photo:
    """Fine grain; `pit` adds a dark disc, `scratch` a bright line, both with their masks."""
    random = np.random.default_rng((seed, len(label)))
    pixels = 0.5 + 0.06 * random.standard_normal(shape)
    mask = np.zeros(shape, np.bool_)
    row, column = random.integers(12, 50, 2)
    if label == "pit":
        down, right = np.mgrid[: shape[0], : shape[1]]
        mask = (down - row) ** 2 + (right - column) ** 2 < 30
        pixels[mask] -= 0.25
    if label == "scratch":
        mask[row : row + 2, 8:60] = True
        pixels[mask] += 0.25
    image = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return Photo(image, label, mask if label != GOOD else None, group=f"{label}{seed}", name=f"{label}/{seed}.png")


SHOTS = [surface(seed, label) for label in ("pit", "scratch") for seed in range(5)]
PARTS = [surface(seed) for seed in range(60)]
NEW = [surface(1000 + seed, label) for label in (GOOD, "pit", "scratch") for seed in range(20)]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return train_detector(SHOTS, PARTS, ["compose"], None, 0.05, 0, Silent())[0]


def test_it_finds_and_names_defects_that_it_has_not_seen(detector: Detector) -> None:
    findings = detector.find(NEW)
    truth = [photo.label for photo in NEW]
    defects = [found.defect for found in findings]
    assert all(chance is not None and 0.0 <= chance <= 1.0 for chance in defects)
    assert roc_auc_score([label != GOOD for label in truth], defects) > 0.95
    named = [max(found.types, key=lambda kind: found.types[kind]) for found in findings[20:]]
    assert np.mean([name == label for name, label in zip(named, truth[20:], strict=True)]) > 0.9
    assert all(sum(found.types.values()) == pytest.approx(1.0) for found in findings)
    for found in findings:
        assert (found.label == GOOD) == (found.defect is not None and found.defect <= detector.heads.threshold)


def test_file_says_the_same_and_holds_no_photo(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    save_detector(path, detector)
    again = load_detector(path)
    assert again.find(NEW[::7]) == detector.find(NEW[::7])
    assert not list(tmp_path.glob(".*"))
    sizes = {array.shape for array in parse_arrays(path.read_bytes()).values()}
    assert SHOTS[0].image.shape not in sizes


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda data: data[:200], "corrupt"),
        (lambda data: b"", "corrupt"),
        (lambda data: altered(data, "format", 9), "format"),
        (lambda data: altered(data, "features", ["one"]), "features"),
        (lambda data: altered(data, "threshold", "high"), "corrupt"),
        (lambda data: cut(data, "detection.weights"), "shape"),
        (lambda data: cut(data, "memory.mean"), "memory"),
        (lambda data: without(data, "typing.bias"), "typing.bias"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(detector: Detector, tmp_path: Path, change: Any, word: str) -> None:
    path = tmp_path / "detector.safetensors"
    save_detector(path, detector)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=word) as caught:
        load_detector(path)
    assert "\n" not in str(caught.value)


def facts_of(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["detector"])


def altered(data: bytes, key: str, value: Any) -> bytes:
    return write_arrays(parse_arrays(data), {"detector": json.dumps({**facts_of(data), key: value})})


def cut(data: bytes, name: str) -> bytes:
    arrays = parse_arrays(data)
    arrays[name] = np.ascontiguousarray(arrays[name][:-1])
    return write_arrays(arrays, {"detector": json.dumps(facts_of(data))})


def without(data: bytes, name: str) -> bytes:
    arrays = {key: array for key, array in parse_arrays(data).items() if key != name}
    return write_arrays(arrays, {"detector": json.dumps(facts_of(data))})


def test_without_good_parts_it_names_types_alone() -> None:
    detector, _, facts = train_detector(SHOTS, [], ["compose"], None, 0.05, 0, Silent())
    found = detector.find(NEW[20:22])
    assert [one.defect for one in found] == [None, None]
    assert found[0].anomaly is None
    assert "good parts" in facts["refused"]["compose"]


def test_patches_look_the_same_in_another_light() -> None:
    photo = surface(3, "pit")
    pixels = photo.pixels()
    np.testing.assert_allclose(patch_features(0.6 * pixels + 0.2), patch_features(pixels), atol=0.5)
    assert patch_features(pixels).shape[:2] == (16, 18)


def test_memory_is_nearer_to_good_parts_than_to_defects() -> None:
    memory = PatchMemory.fit(PARTS[:30])
    good = [memory.score(photo) for photo in PARTS[30:]]
    odd = [memory.score(photo) for photo in NEW[20:]]
    assert roc_auc_score([0] * len(good) + [1] * len(odd), [*good, *odd]) > 0.9
    distance = memory.distances(NEW[20])
    worst = np.unravel_index(int(np.argmax(distance)), distance.shape)
    assert NEW[20].mask is not None
    near = NEW[20].mask[max(0, 4 * worst[0] - 6) : 4 * worst[0] + 10, max(0, 4 * worst[1] - 6) : 4 * worst[1] + 10]
    assert near.any(), "the strangest patch lies at the defect"
    with pytest.raises(InputError, match="good parts"):
        PatchMemory.fit([])


def encoder(path: Path, channels: int = 3, batch: int | str = "n", kind: int = TensorProto.FLOAT) -> Path:
    """Means of a grid of cells: [n, channels x 16], on inputs of 32 x 32."""
    given = helper.make_tensor_value_info("photo", kind, [batch, channels, 32, 32])
    said = helper.make_tensor_value_info("embedding", kind, [batch, channels, 4, 4])
    node = helper.make_node("AveragePool", ["photo"], ["embedding"], kernel_shape=[8, 8], strides=[8, 8])
    graph = helper.make_graph([node], "cells", [given], [said])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(("channels", "batch"), [(1, "n"), (3, "n"), (3, 4)])
def test_an_encoder_of_the_user_gives_the_features(tmp_path: Path, channels: int, batch: int | str) -> None:
    extractor = EncoderExtractor(encoder(tmp_path / "cells.onnx", channels, batch))
    features = extractor(NEW[:6])
    grey = Image.fromarray(NEW[5].pixels()).resize((32, 32), Image.Resampling.BICUBIC)
    cells = ((np.asarray(grey) - 0.449) / 0.226).reshape(4, 8, 4, 8).mean(axis=(1, 3)).ravel()
    np.testing.assert_allclose(features[5], np.tile(cells, channels), rtol=1e-4, atol=1e-5)
    assert features.shape == (6, len(extractor.names))


def test_encoders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(InputError, match="not an ONNX graph"):
        EncoderExtractor(tmp_path / "text.onnx")
    with pytest.raises(InputError, match="cannot be read"):
        EncoderExtractor(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="inputs are"):
        EncoderExtractor(encoder(tmp_path / "two.onnx", channels=2))
    with pytest.raises(InputError, match="inputs are"):
        EncoderExtractor(encoder(tmp_path / "half.onnx", kind=TensorProto.FLOAT16))


def test_a_detector_on_an_encoder_asks_for_the_same_encoder(tmp_path: Path) -> None:
    path = encoder(tmp_path / "cells.onnx")
    detector, _, _ = train_detector(SHOTS, PARTS, [], path, 0.05, 0, Silent())
    save_detector(tmp_path / "d.safetensors", detector)
    assert load_detector(tmp_path / "d.safetensors", path).find(NEW[:2]) == detector.find(NEW[:2])
    with pytest.raises(InputError, match="--encoder"):
        load_detector(tmp_path / "d.safetensors")
    with pytest.raises(InputError, match="SHA-256"):
        load_detector(tmp_path / "d.safetensors", encoder(tmp_path / "other.onnx", channels=1))


def test_train_and_detect_as_a_user_types_them(tmp_path: Path) -> None:
    for photo in [*SHOTS, *PARTS[:24]]:
        place = tmp_path / "photos" / photo.name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo.image).save(place)
        if photo.mask is not None:
            mask = tmp_path / "photos" / "masks" / photo.name
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo.mask).save(mask)
    run = CliRunner()
    out = tmp_path / "d.safetensors"
    trained = run.invoke(app, ["synthesize", "train", str(tmp_path / "photos"), "-o", str(out), "--json"])
    assert trained.exit_code == 0, trained.output
    facts = json.loads(trained.stdout)
    assert facts["classes"] == [GOOD, "pit", "scratch"]
    assert {found["candidate"] for found in facts["gate"]["evidence"]["detection"]} >= {"none", "compose 0.15"}
    (tmp_path / "photos" / "broken.png").write_bytes(b"no photo")
    said = run.invoke(app, ["synthesize", "detect", str(out), str(tmp_path / "photos" / "pit"), "--json"])
    assert [json.loads(line)["label"] for line in said.stdout.splitlines()].count("pit") >= 4
    words = run.invoke(app, ["synthesize", "detect", str(out), str(tmp_path / "photos" / "pit" / "0.png")])
    assert "0.png: pit; defect" in words.stdout
    for place, word in (("absent", "no such photo"), ("photos/broken.png", "no photo that can be read")):
        with pytest.raises(InputError, match=word):
            run.invoke(app, ["synthesize", "detect", str(out), str(tmp_path / place)], catch_exceptions=False)


def test_rate_of_false_alarms_out_of_range() -> None:
    with pytest.raises(InputError, match="false alarms"):
        train_detector(SHOTS, PARTS, [], None, 1.5, 0, Silent())
