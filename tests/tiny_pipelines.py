"""Tiny pipelines of diffusers with random weights, made on the spot: quick, and nothing is fetched."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

# Threads of workers that share the cores wait for each other.
torch.set_num_threads(1)


def tiny_ddpm(folder: Path, seed: int = 0, **more: Any) -> Path:
    """A DDPM on grey pictures of 16 x 16, with attention."""
    torch.manual_seed(seed)
    shape = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    unet = diffusers.UNet2DModel(**{**shape, **more})
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def tiny_stable_diffusion(folder: Path, seed: int = 0, **noise: Any) -> Path:
    """Stable Diffusion on pictures of 16 x 16, latents of 8 x 8, with a vocabulary of single letters."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    words = tokenizer(folder)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    scheduler = diffusers.DDIMScheduler(
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, **noise},
        steps_offset=1,
    )
    diffusers.StableDiffusionPipeline(
        vae, text, words, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer without merges: letters, and letters that end a word."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    files = folder.with_name(f"{folder.name}-words")
    files.mkdir(parents=True, exist_ok=True)
    (files / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(str(files), local_files_only=True)
