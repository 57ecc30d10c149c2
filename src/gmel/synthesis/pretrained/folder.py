"""A pipeline's folder, read without running or unpickling anything that is in it.

The folder names classes and files; both could be used to run code. So only components of a few known classes are
taken, only weights in safetensors files, and nothing is fetched.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

from gmel.scenario.errors import InputError

__all__ = ["Noise", "PipelineFolder"]

_CLASSES = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ),
}
"""Classes that are known of each component; of a scheduler only the noise levels of the training are used."""
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are not needed, whatever they are."""
_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_SEEN = (".json", ".txt", ".safetensors")
"""Files that decide what a pipeline draws."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Noise:
    """The noise that a network was trained on.

    Attributes:
        steps: noise levels.
        schedule: name of the law of beta in diffusers.
        low, high: first and last beta.
        predicts: what the network gives: `epsilon`, `v_prediction` or `sample`.
        to_zero: beta is rescaled so that the last level is noise alone (arXiv 2305.08891).
    """

    steps: int = 1000
    schedule: str = "linear"
    low: float = 0.0001
    high: float = 0.02
    predicts: str = "epsilon"
    to_zero: bool = False

    def keywords(self) -> dict[str, Any]:
        """Arguments of the schedulers of diffusers."""
        return {
            "num_train_timesteps": self.steps,
            "beta_schedule": self.schedule,
            "beta_start": self.low,
            "beta_end": self.high,
            "prediction_type": self.predicts,
            "rescale_betas_zero_snr": self.to_zero,
        }


@dataclass(frozen=True)
class PipelineFolder:
    """A folder as `save_pretrained` of diffusers writes it, with components that are known.

    Attributes:
        path: the folder.
        components: class of each component that is used, by name.
        noise: that the network was trained on.
    """

    path: Path
    components: dict[str, str]
    noise: Noise

    @classmethod
    def read(cls, path: Path) -> Self:
        """The folder, checked; no weights are read.

        Raises:
            InputError: no such folder, no pipeline, components of unknown classes, weights that are pickled.
        """
        if not path.is_dir():
            raise InputError(f"pipeline {path}: no such folder; give one that `save_pretrained` of diffusers wrote")
        index = _json(path / "model_index.json")
        found: dict[str, str] = {}
        for name, kind in index.items():
            if name.startswith("_") or name in _IGNORED or not isinstance(kind, list):
                continue
            library, class_name = [*cast("list[Any]", kind), None, None][:2]
            if class_name is None:
                continue
            if name not in _CLASSES or class_name not in _CLASSES[name] or library not in ("diffusers", "transformers"):
                known = f"; of {name} are known {', '.join(_CLASSES[name])}" if name in _CLASSES else ""
                raise InputError(f"pipeline {path}: component {name} ({library}.{class_name}) is not supported{known}")
            found[name] = class_name
        latent = found.get("unet") == "UNet2DConditionModel"
        needed = ("unet", "scheduler", *(("vae", "text_encoder", "tokenizer") if latent else ()))
        missing = [name for name in needed if name not in found or not (path / name).is_dir()]
        if missing:
            raise InputError(f"pipeline {path}: component {', '.join(missing)} is missing; save the pipeline whole")
        if not latent and "vae" in found:
            raise InputError(f"pipeline {path}: a UNet2DModel with a vae is not supported; one on pixels is")
        for name in needed:
            if name in _WEIGHTS:
                _check_weights(path / name, _WEIGHTS[name])
        return cls(path, {name: found[name] for name in needed}, _noise(path / "scheduler" / "scheduler_config.json"))

    @property
    def latent(self) -> bool:
        """Whether it draws in the space of an autoencoder, given a text; else it draws pixels."""
        return "vae" in self.components

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and contents of all files of the components, in hexadecimal."""
        seen = hashlib.sha256()
        for file in self._files():
            seen.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK):
                    seen.update(chunk)
        return seen.hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of the components."""
        return sum(file.stat().st_size for file in self._files())

    def _files(self) -> list[Path]:
        return [
            file
            for name in sorted(self.components)
            for file in sorted((self.path / name).iterdir())
            if file.suffix in _SEEN and not _variant(file) and file.is_file()
        ]


def _variant(file: Path) -> bool:
    """Whether a file is a variant such as `model.fp16.safetensors`, which is not read."""
    return file.suffix == ".safetensors" and "." in file.stem


def _check_weights(folder: Path, name: str) -> None:
    if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
        return
    files = sorted(file.name for file in folder.iterdir())
    pickled = [file for file in files if file.endswith(_PICKLES)]
    if pickled:
        why = f"{pickled[0]} is pickled, which can execute what it reads, and is refused"
    else:
        why = f"there is {', '.join(files) or 'nothing'}"
    raise InputError(
        f"pipeline {folder}: {name} is missing ({why}); save it with `save_pretrained(..., safe_serialization=True)`"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"pipeline {path}: cannot be read ({why}); give a folder of `save_pretrained`") from error
    if not isinstance(found, dict):
        raise InputError(f"pipeline {path}: must be a table; give a folder of `save_pretrained`")
    return cast("dict[str, Any]", found)


def _noise(path: Path) -> Noise:
    facts, usual = _json(path), Noise()
    try:
        noise = Noise(
            int(facts.get("num_train_timesteps", usual.steps)),
            str(facts.get("beta_schedule", usual.schedule)),
            float(facts.get("beta_start", usual.low)),
            float(facts.get("beta_end", usual.high)),
            str(facts.get("prediction_type", usual.predicts)),
            bool(facts.get("rescale_betas_zero_snr", usual.to_zero)),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"pipeline {path}: {error}; save the pipeline anew") from error
    for field, value, allowed in (
        ("beta_schedule", noise.schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
        ("prediction_type", noise.predicts, ("epsilon", "v_prediction", "sample")),
        ("trained_betas", facts.get("trained_betas"), (None,)),
    ):
        if value not in allowed:
            raise InputError(f"pipeline {path}: {field} is {value!r}, must be one of {', '.join(map(str, allowed))}")
    if not (2 <= noise.steps <= 100_000 and 0.0 < noise.low <= noise.high < 1.0):
        raise InputError(f"pipeline {path}: {noise.steps} steps from {noise.low} to {noise.high} are no noise levels")
    return noise
