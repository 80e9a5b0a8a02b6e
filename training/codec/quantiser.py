"""Training of the residual vector quantiser inside `transformers.EncodecModel`, which itself can only use one.

Codebooks are not learned by gradient: each entry follows the running mean of the latents that chose it (EMA, decay
0.99, Laplace-smoothed counts). The first entries come from k-means on latents of the real encoder. An entry that
almost nothing chooses is moved onto a latent of the current batch *together with its running sums*; the reference
implementation forgets the sums, so that the next EMA step undoes the move in the same training step.

Gradients pass the quantiser straight through, once, on the sum of all levels; a commitment loss per level pulls the
encoder towards its codes. Van den Oord et al. 2017; Zeghidour et al. 2021, section III-C; Défossez et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class QuantiserConfig:
    """How codebooks are trained.

    Args:
        decay: EMA decay of counts and sums per step.
        epsilon: Laplace smoothing of the counts.
        dead_share: an entry is dead when its running count falls below this share of the mean count.
        kmeans_iterations: Lloyd iterations at the start.
        kmeans_latents: latents gathered for k-means.
    """

    decay: float = 0.99
    epsilon: float = 1e-5
    dead_share: float = 0.1
    kmeans_iterations: int = 12
    kmeans_latents: int = 16_384


@dataclass
class Quantised:
    """Result of one pass: `latents [B, H, T]` with straight-through gradient, scalar `commitment`, `codes [B, K, T]`,
    `revived [K]` entries moved in this step."""

    latents: Tensor
    commitment: Tensor
    codes: Tensor
    revived: list[int]


def _sum_over_ranks(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def _same_on_all_ranks(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Index of the Euclidean-nearest entry `[V, H]` for each vector `[N, H]`: int64 `[N]`."""
    return (vectors @ entries.t()).mul_(2).sub_(entries.square().sum(1)).argmax(1)


def kmeans(vectors: Tensor, num_entries: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on `[N, H]`: centres `[V, H]` and their counts `[V]`; empty centres are redrawn."""
    pick = torch.randperm(len(vectors), generator=generator)[:num_entries].to(vectors.device)
    if len(pick) < num_entries:
        raise ValueError(f"k-means needs at least {num_entries} latents; got {len(vectors)}")
    centres = vectors[pick].clone()
    counts = torch.zeros(num_entries, device=vectors.device)
    for _ in range(iterations):
        chosen = nearest(vectors, centres)
        counts = torch.bincount(chosen, minlength=num_entries).float()
        sums = torch.zeros_like(centres).index_add_(0, chosen, vectors)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            redraw = torch.randint(len(vectors), (len(empty),), generator=generator).to(vectors.device)
            centres[empty] = vectors[redraw]
    return centres, counts


def initialise(quantizer: Any, latents: Tensor, config: QuantiserConfig, seed: int) -> None:
    """Set every codebook by k-means on the residuals of `latents [N, H]`, level by level."""
    generator = torch.Generator().manual_seed(seed)
    residual = latents.detach().float()
    for layer in quantizer.layers:
        book = layer.codebook
        centres, counts = kmeans(residual, book.codebook_size, config.kmeans_iterations, generator)
        mean_count = max(1.0, len(residual) / book.codebook_size)
        book.embed.copy_(centres)
        book.cluster_size.copy_(counts / mean_count)
        book.embed_avg.copy_(centres * book.cluster_size[:, None])
        _same_on_all_ranks(book.embed, book.cluster_size, book.embed_avg)
        residual = residual - book.embed[nearest(residual, book.embed)]


@torch.no_grad()
def _update(book: Any, vectors: Tensor, chosen: Tensor, config: QuantiserConfig, seed: int) -> int:
    """One EMA step of a codebook on `vectors [N, H]` and revival of its dead entries; returns how many were revived."""
    size = book.codebook_size
    counts = torch.bincount(chosen, minlength=size).float()
    sums = torch.zeros_like(book.embed).index_add_(0, chosen, vectors)
    _sum_over_ranks(counts, sums)
    # sums and counts stay on the scale "mean count 1", whatever the batch
    scale = size / counts.sum().clamp(min=1)
    book.cluster_size.lerp_(counts * scale, 1 - config.decay)
    book.embed_avg.lerp_(sums * scale, 1 - config.decay)
    dead = (book.cluster_size < config.dead_share).nonzero()[:, 0]
    if len(dead):
        generator = torch.Generator().manual_seed(seed)
        pool = vectors
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, vectors.contiguous())
            pool = torch.cat(gathered)
        take = torch.randperm(len(pool), generator=generator)[: len(dead)].to(pool.device)
        dead = dead[: len(take)]
        book.cluster_size[dead] = 1.0
        book.embed_avg[dead] = pool[take]
    total = book.cluster_size.sum()
    smoothed = (book.cluster_size + config.epsilon) / (total + size * config.epsilon) * total
    book.embed.copy_(book.embed_avg / smoothed.clamp(min=1e-8)[:, None])
    return len(dead)


def quantise(quantizer: Any, latents: Tensor, config: QuantiserConfig, *, train: bool, seed: int = 0) -> Quantised:
    """Quantise `latents [B, H, T]`; with `train`, also move the codebooks. float32 whatever the autocast."""
    batch, width, frames = latents.shape
    with torch.autocast(latents.device.type, enabled=False):
        flat = latents.float().permute(0, 2, 1).reshape(-1, width)
        residual = flat.detach()
        remaining = flat
        total = torch.zeros_like(flat)
        commitment = flat.new_zeros(())
        codes, revived = [], []
        for level, layer in enumerate(quantizer.layers):
            book = layer.codebook
            chosen = nearest(residual, book.embed)
            vectors = F.embedding(chosen, book.embed)
            commitment = commitment + F.mse_loss(remaining, vectors)
            codes.append(chosen.view(batch, frames))
            if train:
                revived.append(_update(book, residual, chosen, config, seed + level))
            total = total + vectors
            residual = residual - vectors
            remaining = remaining - vectors
        commitment = commitment / len(codes)
        through = flat + (total - flat).detach()
    out = through.view(batch, frames, width).permute(0, 2, 1)
    return Quantised(out, commitment, torch.stack(codes, dim=1), revived)
