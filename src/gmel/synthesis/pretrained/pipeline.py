"""A pretrained pipeline with low-rank changes (LoRA, arXiv 2106.09685) in its network.

Two kinds. On pixels (DDPM, DDIM): a UNet2DModel; classes are a table of embeddings beside that of time, as in networks
that were trained with classes. In latents (Stable Diffusion): a UNet2DConditionModel between the coder and decoder of
an autoencoder; classes are texts. The network's own weights never change; what is trained is `weights`, which several
generators of a process wear one after the other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from gmel.scenario.errors import InputError
from gmel.synthesis.generator import Arrays
from gmel.synthesis.photo import GOOD, Floats
from gmel.synthesis.pretrained.extra import Tensor, module_of_extra
from gmel.synthesis.pretrained.folder import PipelineFolder

__all__ = ["Pipeline", "Weights", "forget_pipelines", "load_pipeline", "prompt_of"]

Weights = dict[str, Tensor]
"""What is trained, by name."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCKS = (*_ATTENTION, "conv1", "conv2", "time_emb_proj")
"""Parts of a network on pixels: some have attention in one block only, or in none."""
_TABLE = "class_embedding.weight"
_LUMA = (0.299, 0.587, 0.114)
"""Grey of a colour (ITU-R 601), as photos are read."""
_MOST_SIDE = 4096


def load_pipeline(folder: PipelineFolder, rank: int) -> "Pipeline":
    """The pipeline of a folder with low-rank changes that change nothing yet. The last one is kept for the next call.

    Raises:
        InputError: the extra is not installed, or weights cannot be read or do not fit their description.
    """
    return _loaded(folder.path.resolve(), folder.digest, rank)


def forget_pipelines() -> None:
    """The next call of :func:`load_pipeline` reads the folder."""
    _loaded.cache_clear()


@lru_cache(maxsize=1)
def _loaded(path: Path, digest: str, rank: int) -> "Pipeline":
    # The digest is there to tell a folder from another that took its place.
    folder = PipelineFolder.read(path)
    found = (_Latents if folder.latent else _Pixels)(folder, rank)
    if folder.digest != digest:
        raise InputError(f"pipeline {path}: changed while it was read; try again")
    return found


def prompt_of(label: str) -> str:
    """The text that stands for a class."""
    if label == GOOD:
        return "a photo of a surface without defects"
    return f"a photo of a surface with {label.replace('_', ' ').replace('-', ' ')}"


class Pipeline(ABC):
    """A pretrained pipeline (see the module).

    Attributes:
        folder: where it comes from.
        rank: of the change of each layer.
        side: pixels of the square pictures that it draws.
        shape: channels, height and width of what the network sees.
        usual_guidance: weight of the class in sampling that this kind of network is made for.
    """

    usual_guidance: float
    changed: tuple[str, ...]

    def __init__(self, folder: PipelineFolder, rank: int) -> None:
        self.torch = module_of_extra("torch")
        diffusers, peft = module_of_extra("diffusers"), module_of_extra("peft")
        diffusers.utils.logging.disable_progress_bar()
        self.folder, self.rank = folder, rank
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        self.unet: Any = self._part("unet", getattr(diffusers, folder.components["unet"]))
        self.side, self.shape = self._measures()
        self.trained_noise: Any = diffusers.DDPMScheduler(**folder.noise.keywords())
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(self.changed))
        try:
            peft.inject_adapter_in_model(config, self.unet)
        except ValueError as error:
            raise InputError(
                f"pipeline {folder.path}: unet has no layers {', '.join(self.changed)} to adapt"
            ) from error
        self._low = {name: part for name, part in self.unet.named_parameters() if ".lora_" in name}
        self.unet.requires_grad_(False)

    @abstractmethod
    def _measures(self) -> tuple[int, tuple[int, int, int]]:
        """Side of pictures, and shape of what the network sees.

        Raises:
            InputError: a network of another build.
        """

    @abstractmethod
    def encode(self, pictures: Floats) -> Tensor:
        """[n, channels, h, w]: what the network sees of pictures [n, side, side], 0 to 1."""

    @abstractmethod
    def decode(self, seen: Tensor) -> Floats:
        """The reverse: pictures [n, side, side], 0 to 1."""

    @abstractmethod
    def conditions(self, classes: Sequence[str]) -> Tensor:
        """What the network is told of each class, in order; first of none."""

    @abstractmethod
    def predict(self, noisy: Tensor, times: Tensor, numbers: Tensor, conditions: Tensor) -> Tensor:
        """What the network gives for noisy pictures of classes.

        Args:
            noisy: [n, channels, h, w].
            times: [n], noise levels.
            numbers: [n], classes from 1; 0 for none.
            conditions: of :meth:`conditions`.
        """

    @abstractmethod
    def solver_keywords(self) -> dict[str, Any]:
        """Arguments of the solver that depend on the kind."""

    def fresh(self, classes: int, seed: int) -> Weights:
        """Weights that change nothing yet: of each pair of factors one is random, the other 0.

        Args:
            classes: how many.
            seed: of the random factors.
        """
        del classes
        random = self.torch.Generator().manual_seed(seed)
        made: Weights = {}
        for name in sorted(self._low):
            part = self._low[name]
            made[name] = self.torch.zeros(part.shape)
            if ".lora_A." in name:
                bound = 1.0 / math.sqrt(math.prod(part.shape[1:]))
                made[name].uniform_(-bound, bound, generator=random)
            made[name] = made[name].to(self.device)
        return made

    def wear(self, weights: Weights) -> Weights:
        """Puts weights into the network; gives its parameters for them, by the same names."""
        with self.torch.no_grad():
            for name, part in self._low.items():
                part.copy_(weights[name])
        return {name: part.requires_grad_(True) for name, part in self._low.items()}

    def from_arrays(self, arrays: Arrays, classes: int) -> Weights:
        """Weights of a file.

        Raises:
            InputError: an array is missing, has another shape or type, or holds something that is no number.
        """
        made: Weights = {}
        for name, part in self.fresh(classes, 0).items():
            array = arrays.get(f"weight.{name}")
            if array is None or array.shape != tuple(part.shape) or array.dtype != np.float32:
                has = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise InputError(
                    f"array weight.{name} is {has}, must be float32{list(part.shape)}; fit the generator anew"
                )
            if not np.isfinite(array).all():
                raise InputError(f"array weight.{name} holds values that are no numbers; fit the generator anew")
            made[name] = self.torch.from_numpy(array.copy()).to(self.device)
        return made

    def gflop(self, conditions: Tensor) -> float:
        """GFLOP of one evaluation for one picture, a multiplication and an addition counted as two (by PyTorch)."""
        counter = module_of_extra("torch.utils.flop_counter").FlopCounterMode(display=False)
        seen = self.torch.zeros((1, *self.shape), device=self.device)
        ones = self.torch.ones(1, dtype=self.torch.long, device=self.device)
        with self.torch.no_grad(), counter:
            self.predict(seen, ones, ones, conditions)
        return float(counter.get_total_flops()) / 1e9

    def refused(self, what: str) -> InputError:
        """The error of a network of another build."""
        return InputError(f"pipeline {self.folder.path}: {what}")

    def _part(self, name: str, kind: Any) -> Any:
        """A component, all of whose weights come from its safetensors file."""
        path = self.folder.path / name
        load: Callable[..., Any] = kind.from_pretrained
        try:
            part, told = load(
                str(path),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                torch_dtype=self.torch.float32,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"pipeline {path}: cannot be loaded ({why}); save the pipeline anew") from error
        lacking = sorted(told.get("missing_keys") or []) + sorted(map(str, told.get("mismatched_keys") or []))
        if lacking:
            raise InputError(
                f"pipeline {path}: {len(lacking)} weights are missing or of another shape, {lacking[0]} among them; "
                "save the pipeline anew"
            )
        part.to(self.device)
        part.requires_grad_(False)
        # Dropout would make the training depend on what else draws random numbers.
        part.eval()
        return part

    def _square(self, sample_size: Any) -> int:
        """Side of what the network sees."""
        sides = [sample_size] * 2 if isinstance(sample_size, int) else list(sample_size or [])
        if len(sides) != 2 or sides[0] != sides[1] or not 1 <= sides[0] <= _MOST_SIDE:
            raise self.refused(f"sample_size of unet is {sample_size}, must be one side of a square")
        return int(sides[0])

    def _scaled(self, pictures: Floats) -> Tensor:
        """[n, 1, side, side], -1 to 1."""
        return self.torch.from_numpy(np.ascontiguousarray(pictures[:, None] * 2.0 - 1.0, np.float32)).to(self.device)

    def _grey(self, seen: Tensor) -> Floats:
        """[n, side, side], 0 to 1, of [n, channels, side, side], -1 to 1."""
        colours: NDArray[np.float32] = seen.detach().cpu().numpy()
        grey = colours[:, 0] if colours.shape[1] == 1 else np.tensordot(np.asarray(_LUMA), colours, (0, 1))
        return np.asarray((grey + 1.0) / 2.0, np.float32).clip(0.0, 1.0)


class _Pixels(Pipeline):
    """A UNet2DModel on pixels."""

    usual_guidance = 1.0
    changed = _BLOCKS

    def _measures(self) -> tuple[int, tuple[int, int, int]]:
        config = self.unet.config
        channels = config.in_channels
        if channels not in (1, 3) or config.out_channels != channels:
            raise self.refused(
                f"unet takes {channels} channels and gives {config.out_channels}, must be 1 (grey) or 3 (colour) both"
            )
        if config.class_embed_type is not None:
            raise self.refused(f"class_embed_type of unet is {config.class_embed_type!r}, must be a table (null)")
        embedding: Any = self.unet.time_embedding.linear_2.out_features
        known = self.unet.class_embedding
        # A class that is new begins as the mean of those that the network knows, or as nothing where it knows none.
        self._start = self.torch.zeros(embedding) if known is None else known.weight.detach().mean(0).cpu()
        side = self._square(config.sample_size)
        return side, (channels, side, side)

    def encode(self, pictures: Floats) -> Tensor:
        return self._scaled(pictures).repeat(1, self.shape[0], 1, 1)

    def decode(self, seen: Tensor) -> Floats:
        return self._grey(seen)

    def conditions(self, classes: Sequence[str]) -> Tensor:
        del classes

    def predict(self, noisy: Tensor, times: Tensor, numbers: Tensor, conditions: Tensor) -> Tensor:
        del conditions
        return self.unet(noisy, times, class_labels=numbers).sample

    def solver_keywords(self) -> dict[str, Any]:
        # Estimates of pixels beyond black and white are errors; at high noise they are large ones.
        return {"thresholding": True, "sample_max_value": 1.0}

    def fresh(self, classes: int, seed: int) -> Weights:
        table = self._start.repeat(classes + 1, 1).to(self.device)
        return {**super().fresh(classes, seed), _TABLE: table}

    def wear(self, weights: Weights) -> Weights:
        parts = super().wear(weights)
        table = weights[_TABLE].detach().clone()
        self.unet.class_embedding = self.torch.nn.Embedding.from_pretrained(table, freeze=False)
        return {**parts, _TABLE: self.unet.class_embedding.weight}


class _Latents(Pipeline):
    """A UNet2DConditionModel in the latents of an autoencoder, told what to draw by a text."""

    usual_guidance = 3.0
    changed = _ATTENTION

    def __init__(self, folder: PipelineFolder, rank: int) -> None:
        diffusers, transformers = module_of_extra("diffusers"), module_of_extra("transformers")
        self.torch = module_of_extra("torch")
        transformers.utils.logging.disable_progress_bar()
        self.folder, self.device = folder, "cuda" if self.torch.cuda.is_available() else "cpu"
        self.vae: Any = self._part("vae", diffusers.AutoencoderKL)
        self.text: Any = self._part("text_encoder", transformers.CLIPTextModel)
        try:
            self.words: Any = transformers.CLIPTokenizer.from_pretrained(
                str(folder.path / "tokenizer"), local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise self.refused(f"tokenizer cannot be loaded ({why}); save the pipeline anew") from error
        super().__init__(folder, rank)

    def _measures(self) -> tuple[int, tuple[int, int, int]]:
        config, coder = self.unet.config, self.vae.config
        channels = coder.latent_channels
        if config.in_channels != channels or config.out_channels != channels:
            raise self.refused(
                f"unet takes {config.in_channels} channels, must be the {channels} of vae (masks as channels are not "
                "supported: parts of a photo are drawn by a plain pipeline)"
            )
        if config.addition_embed_type or config.class_embed_type or config.num_class_embeds:
            raise self.refused("unet wants more than a text, which is not supported")
        if config.cross_attention_dim != self.text.config.hidden_size:
            raise self.refused(
                f"unet reads texts of {config.cross_attention_dim} numbers, text_encoder gives "
                f"{self.text.config.hidden_size}"
            )
        side, factor = self._square(config.sample_size), 2 ** (len(coder.block_out_channels) - 1)
        return side * factor, (channels, side, side)

    def encode(self, pictures: Floats) -> Tensor:
        with self.torch.no_grad():
            coded = self.vae.encode(self._scaled(pictures).repeat(1, self.vae.config.in_channels, 1, 1))
        return coded.latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, seen: Tensor) -> Floats:
        with self.torch.no_grad():
            return self._grey(self.vae.decode(seen / self.vae.config.scaling_factor).sample)

    def conditions(self, classes: Sequence[str]) -> Tensor:
        texts = ["", *(prompt_of(label) for label in classes)]
        longest = int(self.text.config.max_position_embeddings)
        tokens = self.words(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        with self.torch.no_grad():
            return self.text(tokens.input_ids.to(self.device))[0]

    def predict(self, noisy: Tensor, times: Tensor, numbers: Tensor, conditions: Tensor) -> Tensor:
        return self.unet(noisy, times, encoder_hidden_states=conditions[numbers]).sample

    def solver_keywords(self) -> dict[str, Any]:
        return {}
