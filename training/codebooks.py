"""Embeddings and heads that start from the codec's codebooks: codes that sound alike start alike.

The reference draws every row of the K embeddings and heads by itself, so that a model has to meet each of K × 2048
codes many times before it knows what they have to do with each other. The codec knows already: its codebook vectors
lie near each other where the codes decode to similar sound. Turned at random into the model's width and scaled to the
reference's deviation, they are the rows to start from. That is worth a lot on minutes of music and little on the
thousands of hours of the real sizes, which keep the reference's start.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from musicgen.codec import Codec
from musicgen.lm import MusicLM


@torch.no_grad()
def start_from_codebooks(lm: MusicLM, codec: Codec) -> None:
    """Replace the rows of embeddings and heads in place; the special token's row stays. Draws from torch's generator.

    Args:
        lm: a fresh model with K tables of `[V + 1, D]` and K heads `[V, D]`, on the CPU.
        codec: the codec of its tokens: K codebooks `[V, H]`.
    """
    layers: Any = codec.model.quantizer.layers
    dim, size = lm.config.dim, lm.config.codebook_size
    share = lm.config.num_codebooks // len(layers)  # stereo: left and right of a level stand side by side
    for k, (table, head) in enumerate(zip(lm.emb, lm.linears, strict=True)):
        rows = turned(layers[k // share].codebook.embed.cpu(), dim)
        cast(nn.Embedding, table).weight[:size] = rows
        cast(nn.Linear, head).weight.copy_(rows)


def turned(vectors: Tensor, dim: int) -> Tensor:
    """Codebook `[V, H]` as `[V, D]`: centred, turned at random into D dimensions, of deviation 1/sqrt(D)."""
    turn = nn.init.orthogonal_(torch.empty(dim, vectors.shape[1]))
    rows = (vectors - vectors.mean(0)) @ turn.t()
    return rows / rows.std() / math.sqrt(dim)
