"""A style by example: a few seconds of music, through a narrow bottleneck, modulate every block of the model.

    codes of an excerpt -> the codec's frozen codebooks -> a small transformer -> means over fifths of a second
    -> a few values of a few levels each -> mean over the excerpt -> one vector -> scale, shift and gate of each norm

The bottleneck and the mean leave what a stretch of music sounds like and not which notes it plays. A row without an
excerpt has the vector zero, and the modulation is linear in it without a bias, so that the model without a style is the
same model to the bit. Where the release that a run starts from has no style, the modulation starts at zero and changes
nothing until it is trained.

Sources: Rouard et al. 2024 (MusicGen-Style: excerpts of 1.5 to 4.5 s, frozen features, transformer, quantised
bottleneck at 5 Hz). Two deviations: the values are quantised by rounding (Mentzer et al. 2023, FSQ), because residual
codebooks learn by running averages that every resume and every rank would have to keep; and the vector modulates the
norms (Peebles and Xie 2023, adaLN-Zero) where MusicGen-Style prepends its frames.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen.codec import Codec
from musicgen.config import LMConfig, StyleConfig
from musicgen.stereo import StereoCodec
from musicgen.transformer import Block, init_block, sinusoid

NONE = -1  # in place of a code where there is no excerpt


class Latents:
    """Codes of excerpts to the latents that the codec decodes, of mean 0 and deviation 1 by its own codebooks.

    Attributes:
        dim: H, width of the latents; for stereo tokens left and right side by side.
    """

    def __init__(self, codec: Codec) -> None:
        self.sides = 2 if isinstance(codec, StereoCodec) else 1
        levels: Any = codec.model.quantizer.layers[: codec.num_codebooks // self.sides]
        tables = torch.stack([level.codebook.embed.detach().float() for level in levels])
        scale = tables.var(dim=1).sum(dim=0).sqrt().clamp(min=1e-6)
        self.tables = (tables - tables.mean(dim=1, keepdim=True)) / scale  # [K, V, H]
        self.dim = self.sides * int(tables.shape[2])

    def to(self, device: torch.device | str) -> Latents:
        """Move the tables; returns self."""
        self.tables = self.tables.to(device)
        return self

    def __call__(self, codes: Tensor) -> Tensor:
        """`[B, K, F]` integers, `NONE` for a frame that is not there, to `[B, F, H]`, which is zero there."""
        codes = codes.to(self.tables.device).long()
        given = (codes >= 0).all(dim=1)
        parts = []
        for side in range(self.sides):
            books = codes[:, side :: self.sides].clamp(min=0)
            parts.append(torch.stack([F.embedding(books[:, k], t) for k, t in enumerate(self.tables)]).sum(dim=0))
        return torch.cat(parts, dim=2).masked_fill(~given[..., None], 0.0)


class StyleEncoder(nn.Module):
    """Latents of an excerpt to its style vector; see the file's story."""

    def __init__(self, config: StyleConfig) -> None:
        super().__init__()
        self.config = config
        shape = LMConfig(dim=config.width, num_heads=config.heads, cross_attention=False)
        self.input = nn.Linear(config.latent_dim, config.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(config.layers))
        for index, block in enumerate(self.layers):
            init_block(block, index)
        self.norm = nn.LayerNorm(config.width)
        self.values = nn.Linear(config.width, config.values)
        self.output = nn.Linear(config.values, config.dim)

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, F, H]` from `Latents`, zero where there is no frame, to `[B, dim]`, zero for a row without any."""
        has = (latents != 0).any(dim=2)
        given = has.any(dim=1, keepdim=True)
        seen = (has | ~given)[:, None, None, :]  # attention to nothing would not be a number
        latents = latents.to(self.input.weight.dtype)  # a model may be kept in 16 bits
        x = self.input(latents)
        x = x + sinusoid(torch.arange(x.shape[1], device=x.device), x.shape[2]).to(x.dtype)
        for block in self.layers:
            x = block(x, x, has, seen)
        short, every = -x.shape[1] % self.config.keep_every, self.config.keep_every
        counts = F.pad(has, (0, short)).unflatten(1, (-1, every)).sum(dim=2)[..., None].to(x.dtype)
        sums = F.pad(x * has[..., None], (0, 0, 0, short)).unflatten(1, (-1, every)).sum(dim=2)
        kept = counts.clamp(max=1)
        values = self.quantise(torch.tanh(self.values(self.norm(sums / counts.clamp(min=1)))))
        mean = (values * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        # Of unit scale: what differs between two excerpts is small at first, and the modulation starts at zero.
        return F.layer_norm(self.output(mean), (self.config.dim,)).masked_fill(~given, 0.0)

    def quantise(self, values: Tensor) -> Tensor:
        """Values in (-1, 1) to the nearest of `levels` steps; the gradient passes straight through."""
        half = (self.config.levels - 1) / 2
        return values + ((values * half).round() / half - values).detach()
