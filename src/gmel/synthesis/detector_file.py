"""A trained detector as one file, and what it says of photos: `gmel synthesize train` and `gmel synthesize detect`."""

# scikit-learn ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays
from sklearn.metrics import roc_auc_score

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.synthesis.detector.cnn import Cnn, CnnDetector, CnnSize
from gmel.synthesis.detector.encoder import EncoderExtractor
from gmel.synthesis.detector.features import Extractor, FeatureBook, TextureExtractor, extractor_for
from gmel.synthesis.detector.linear import LinearDetector, Scaling
from gmel.synthesis.detector.memory import PatchMemory
from gmel.synthesis.detector.pictures import PictureExtractor
from gmel.synthesis.diffusion.weights import named_weights, with_weights
from gmel.synthesis.gate import Decision, decide, taught
from gmel.synthesis.learners import CNN, TEXTURE, cnn_learner, detector_named
from gmel.synthesis.lesson import Lesson, prepare, seen_by, set_aside
from gmel.synthesis.photo import GOOD, Photo
from gmel.synthesis.rows import Head, Heads, Rows

__all__ = ["FORMAT", "Detector", "Finding", "load_detector", "save_detector", "train_detector"]

FORMAT = 1
_VARIANTS = 8
"""Augmented variants, and samples of each mode, of a shot where there are few."""
_ENOUGH = 40
"""Photos of a class from which on one variant of each is enough."""


@dataclass(frozen=True)
class Finding:
    """What a detector says of one photo.

    Attributes:
        name: of the photo.
        label: `GOOD`, or the likeliest type where the probability of a defect is above the threshold.
        defect: calibrated probability of a defect; none without good parts to learn from.
        types: probability of each type if it is a defect.
        anomaly: distance from good parts over that of the good part at the rate of false alarms: above 1 is strange.
    """

    name: str
    label: str
    defect: float | None
    types: dict[str, float]
    anomaly: float | None


@dataclass(frozen=True, eq=False)
class Detector:
    """Everything that is needed to judge a photo.

    Attributes:
        heads: the trained detector.
        extractor: its features.
        memory: patches of good parts; none without good parts.
        strange: anomaly score above which a good part is an exception.
    """

    heads: Heads
    extractor: Extractor
    memory: PatchMemory | None
    strange: float

    def find(self, photos: Sequence[Photo]) -> list[Finding]:
        """What it says of photos.

        Raises:
            InputError: the detector needs templates and a photo has none.
        """
        if isinstance(self.extractor, TextureExtractor | PictureExtractor) and self.extractor.with_template:
            lacking = [photo.name for photo in photos if photo.template is None]
            if lacking:
                raise InputError(f"{lacking[0]}: no template; the detector was trained on photos with templates")
        features = self.extractor(photos)
        kinds = [name for name in self.heads.classes if name != GOOD]
        findings: list[Finding] = []
        chances = None if self.heads.detection is None else self.heads.detection.defect_probability(features)
        for number, (photo, types) in enumerate(zip(photos, self.heads.types(features), strict=True)):
            defect = None if chances is None else float(chances[number])
            likely = kinds[int(np.argmax(types))]
            findings.append(
                Finding(
                    photo.name,
                    likely if defect is None or defect > self.heads.threshold else GOOD,
                    defect,
                    dict(zip(kinds, map(float, types), strict=True)),
                    None if self.memory is None else self.memory.score(photo) / self.strange,
                )
            )
        return findings


def train_detector(
    shots: Sequence[Photo],
    good: Sequence[Photo],
    modes: Sequence[str],
    encoder: Path | None,
    false_alarms: float,
    seed: int,
    reporter: Reporter,
    kind: str = TEXTURE,
) -> tuple[Detector, Decision, dict[str, Any]]:
    """A detector from all photos of a site, through the gate.

    Args:
        shots: photos of defects.
        good: photos of good parts; a quarter is kept aside for the gate and the threshold.
        modes: modes of synthesis that the gate may choose.
        encoder: an ONNX file in place of the texture features.
        false_alarms: share of good parts that may be called defect, 0 to 1.
        seed: of variants and samples, and of a CNN.
        reporter: told how it goes on.
        kind: name in `DETECTORS`. A CNN is trained on what the gate has chosen on texture features.

    Returns:
        The detector, what the gate has decided, and facts (photos used, modes refused, what the memory reaches on the
        shots).

    Raises:
        InputError: a single class, a rate out of range, an unknown kind, or a CNN on an encoder.
    """
    if not 0.0 < false_alarms < 1.0:
        raise InputError(f"false alarms are {false_alarms:g}; must be between 0 and 1, for instance 0.05")
    if detector_named(kind) == CNN and encoder is not None:
        raise InputError("a CNN reads photos, no embeddings; give --encoder or --detector cnn, one of the two")
    photos = [*shots, *good]
    extractor: Extractor = extractor_for(photos) if encoder is None else EncoderExtractor(encoder)
    book = FeatureBook(extractor)
    reporter.stage(f"features of {len(photos)} photos")
    for start in range(0, len(photos), 64):
        book(photos[start : start + 64])
        reporter.advance(min(start + 64, len(photos)), len(photos), f"features of {len(photos)} photos")
    most = max(Counter(photo.label for photo in shots).values(), default=1)
    variants = max(1, min(_VARIANTS, _ENOUGH // most))
    lesson = prepare(shots, good, modes, book, seed, reporter, variants, variants)
    reporter.stage("the gate: training without each shot")
    decision = decide(lesson.real, lesson.classic, lesson.made, lesson.judges)
    heads = decision.heads.alarming(lesson.judges.features, false_alarms)
    if kind == CNN:
        extractor = PictureExtractor(all(photo.template is not None for photo in photos))
        pictured = seen_by(lesson, shots, good, FeatureBook(extractor), seed, reporter, variants)
        heads = _cnn_heads(pictured, decision, extractor, seed, reporter)
        heads = heads.alarming(pictured.judges.features, false_alarms)
    memory, strange, found = None, 1.0, None
    learned, judges = set_aside(good, 0.25)
    if learned and judges:
        reporter.stage("memory of good parts")
        memory = PatchMemory.fit(learned, seed)
        usual = [memory.score(photo) for photo in judges]
        place = max(int(np.floor(false_alarms * (len(usual) + 1))) - 1, 0)
        strange = max(float(np.sort(usual)[::-1][place]), 1e-9)
        odd = [memory.score(photo) for photo in shots]
        found = float(roc_auc_score([0] * len(usual) + [1] * len(odd), [*usual, *odd]))
    facts = {
        "shots": len(shots),
        "good": len(good),
        "refused": lesson.refused,
        "left_out": lesson.left_out,
        "memory_auroc_on_shots": found,
    }
    return Detector(heads, extractor, memory, strange), decision, facts


def _cnn_heads(lesson: Lesson, decision: Decision, extractor: PictureExtractor, seed: int, reporter: Reporter) -> Heads:
    """CNNs trained on what the gate has chosen."""
    used = {choice.mode for mixture in (decision.detection, decision.typing) for choice in mixture.values()}

    def made(held: frozenset[str]) -> dict[str, Rows]:
        # Modes that nobody chose are not asked: some would be fitted anew without the shots held out.
        return {mode: samples.without(held) for mode, samples in lesson.samples.items() if mode in used}

    reporter.stage("training the CNN, and again without each third of the shots")
    learner = cnn_learner(extractor, seed, reporter)
    return taught(lesson.real, lesson.classic, made, lesson.judges, decision.detection, decision.typing, learner)


def save_detector(path: Path, detector: Detector) -> None:
    """Writes a detector as one safetensors file (no pickle), under a temporary name first. It holds no photos."""
    arrays: dict[str, Any] = {}
    facts: dict[str, Any] = {
        "format": FORMAT,
        "classes": detector.heads.classes,
        "threshold": detector.heads.threshold,
        "features": [] if isinstance(detector.extractor, PictureExtractor) else list(detector.extractor.names),
        "extractor": _kind(detector.extractor),
        "strange": detector.strange,
    }
    for part, head in (("detection", detector.heads.detection), ("typing", detector.heads.typing)):
        if head is None:
            continue
        facts[part] = {"classes": head.classes, "temperature": head.temperature}
        if isinstance(head, CnnDetector):
            facts["detector"] = CNN
            arrays |= named_weights(head.network, f"{part}.")
            continue
        if not isinstance(head, LinearDetector):
            raise TypeError(f"{part}: no file format for {type(head).__name__}")
        arrays |= {
            f"{part}.weights": head.weights,
            f"{part}.bias": head.bias,
            f"{part}.mean": head.scaling.mean,
            f"{part}.deviation": head.scaling.deviation,
        }
        if head.scaling.whitening is not None:
            arrays[f"{part}.whitening"] = head.scaling.whitening
    if detector.memory is not None:
        arrays |= {f"memory.{name}": getattr(detector.memory, name) for name in ("mean", "deviation", "patches")}
    plain = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    replace_file(path, write_arrays(plain, metadata={"detector": json.dumps(facts)}))


def load_detector(path: Path, encoder: Path | None = None) -> Detector:
    """The detector of a file.

    Args:
        path: written by :func:`save_detector`.
        encoder: the ONNX file that it was trained on, where it was.

    Raises:
        InputError: unreadable, corrupt, of another format, with wrong shapes, or another encoder.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a file of `gmel synthesize train`"
        ) from error
    try:
        arrays = parse_arrays(data)
        length = int.from_bytes(data[:8], "little")
        facts: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["detector"])
        if facts["format"] != FORMAT:
            raise InputError(
                f"{path}: format is {facts['format']!r}, this gmel reads {FORMAT}; train the detector anew"
            )
        extractor = _extractor(facts, encoder, path)
        if (facts.get("detector") == CNN) != isinstance(extractor, PictureExtractor):
            raise ValueError(f"{facts.get('detector', TEXTURE)} does not read {extractor.name}")
        detection, typing = (_head(part, facts, arrays, extractor) for part in ("detection", "typing"))
        heads = Heads(tuple(facts["classes"]), detection, typing, float(facts["threshold"]))
        memory = None
        if "memory.patches" in arrays:
            memory = PatchMemory(*(arrays[f"memory.{name}"] for name in ("mean", "deviation", "patches")))
            if len({memory.patches.shape[1:], memory.mean.shape, memory.deviation.shape}) > 1:
                raise ValueError("memory has wrong shapes")
        return Detector(heads, extractor, memory, float(facts["strange"]))
    except InputError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: corrupt or no detector ({error}); train the detector anew") from error


def _kind(extractor: Extractor) -> str:
    if isinstance(extractor, EncoderExtractor):
        return f"encoder {extractor.digest}"
    return extractor.name


def _extractor(facts: dict[str, Any], encoder: Path | None, path: Path) -> Extractor:
    kind = str(facts["extractor"])
    if kind.startswith("encoder "):
        if encoder is None:
            raise InputError(f"{path}: was trained on an encoder; give the same ONNX file with --encoder")
        found = EncoderExtractor(encoder)
        if f"encoder {found.digest}" != kind:
            raise InputError(f"{encoder}: is not the encoder that {path} was trained on (SHA-256 differs)")
        return found
    for pictures in (PictureExtractor(False), PictureExtractor(True)):
        if kind == pictures.name:
            return pictures
    extractor = TextureExtractor(kind == "texture and template")
    if list(extractor.names) != facts["features"]:
        raise InputError(f"{path}: reads other features than this gmel computes; train the detector anew")
    return extractor


def _head(part: str, facts: dict[str, Any], arrays: dict[str, Any], extractor: Extractor) -> Head | None:
    if part not in facts:
        return None
    said, classes, features = facts[part], tuple(facts["classes"]), len(extractor.names)
    temperature = float(said["temperature"])
    if tuple(said["classes"]) != classes or not 0.0 < temperature < float("inf"):
        raise ValueError(f"{part} has other classes, or temperature {temperature}")
    if isinstance(extractor, PictureExtractor):
        size = CnnSize(extractor.side, extractor.channels, len(classes))
        try:
            network = with_weights(Cnn(size, jax.random.key(0)), arrays, f"{part}.", remedy="")
        except InputError as error:  # which knows no file
            raise ValueError(str(error)) from error
        return CnnDetector(classes, network, temperature)
    weights, bias = arrays[f"{part}.weights"], arrays[f"{part}.bias"]
    scaling = Scaling(arrays[f"{part}.mean"], arrays[f"{part}.deviation"], arrays.get(f"{part}.whitening"))
    wanted = {
        "weights": (weights, (len(classes), features)),
        "bias": (bias, (len(classes),)),
        "mean": (scaling.mean, (features,)),
        "deviation": (scaling.deviation, (features,)),
        "whitening": (scaling.whitening, (features, features)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{part}.{name} has shape {array.shape}, must be {shape}")
    return LinearDetector(classes, scaling, weights, bias, temperature)
