"""A release of a small random model whose conditions matter, with a random codec beside it, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch

from musicgen import codec as codecs
from musicgen import weights
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig, StyleConfig
from musicgen.lm import MusicLM

TEXT = LMConfig(dim=64, num_layers=2, num_heads=2, condition=ConditionConfig("minilm", 384))
MELODY = LMConfig(
    dim=64,
    num_layers=2,
    num_heads=2,
    cross_attention=False,
    condition=ConditionConfig("minilm", 384, melody=True, chroma_frames=8),
)
STYLED = LMConfig(
    dim=64,
    num_layers=2,
    num_heads=2,
    condition=ConditionConfig("minilm", 384, style=StyleConfig(dim=8, latent_dim=16, width=16)),
)


def write_release(folder: Path, config: LMConfig = TEXT, crop_seconds: float = 1.0) -> Path:
    """The release folder; its model learned from `crop_seconds` at a time, so it says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = codecs.build(codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1))
        for layer in small.quantizer.layers:
            layer.codebook.embed.normal_(std=0.1)
        codecs.save(small, folder / "codec")
        lm = MusicLM(config)
        for name, parameter in lm.named_parameters():
            if "conditioners" in name and name.endswith("weight"):
                parameter.data.mul_(20)
            if "style.weight" in name:
                parameter.data.normal_(std=0.5)
    codec = codecs.load(folder / "codec")
    encoder = TextEncoder.load("minilm")
    info = {
        "codec": {"name": codec.name, "identity": codec.identity},
        "text_encoder": {"name": "minilm", "identity": encoder.identity},
        "training": {"step": 0, "data_version": "d1", "crop_seconds": crop_seconds},
        "licence": "Apache-2.0",
    }
    return weights.save_release(folder / "release", lm, info)
