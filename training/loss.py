"""Cross-entropy per codebook, and the unigram baseline it is read against.

The loss is the mean over codebooks of each codebook's mean cross-entropy (reference: equal weight although the counts
differ). Sums and counts are kept apart, so that several ranks or accumulated parts give exactly the mean of the whole
batch and not a mean of means.

Source: Copet et al. 2023, section 3; audiocraft `solvers/musicgen.py::_compute_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy_sums(hidden: Tensor, heads: Sequence[nn.Module], targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of the cross-entropy over each codebook's targets.

    Args:
        hidden: `[B, S, D]`, what the heads read.
        heads: K maps from D to V logits.
        targets: `[B, K, S]` long.
        mask: `[B, K, S]` bool, true where a target counts. Other cells never enter a softmax.

    Returns:
        float32 `[K]`, differentiable.
    """
    sums = []
    for k, head in enumerate(heads):
        chosen = mask[:, k]
        logits = head(hidden[chosen])
        sums.append(F.cross_entropy(logits.float(), targets[:, k][chosen], reduction="sum"))
    return torch.stack(sums)


def mean_over_codebooks(sums: Tensor, counts: Tensor) -> Tensor:
    """The loss: mean over the K codebooks of sum / count; a codebook without a target counts as 0."""
    return (sums / counts.clamp(min=1)).mean()


def metrics(sums: Sequence[float], counts: Sequence[float], prefix: str) -> dict[str, float]:
    """`{prefix}/loss`, `{prefix}/loss_q1..K` in nats and `{prefix}/ppl_q1..K` from sums and counts."""
    per_codebook = [s / max(c, 1) for s, c in zip(sums, counts)]
    out = {f"{prefix}/loss": sum(per_codebook) / len(per_codebook)}
    out |= {f"{prefix}/loss_q{k}": value for k, value in enumerate(per_codebook, start=1)}
    out |= {f"{prefix}/ppl_q{k}": float(np.exp(min(value, 700.0))) for k, value in enumerate(per_codebook, start=1)}
    return out


def token_counts(codes: Iterable[np.ndarray], num_codebooks: int, codebook_size: int) -> np.ndarray:
    """How often each code occurs: int64 `[K, V]` over arrays `[K, T]`."""
    counts = np.zeros((num_codebooks, codebook_size), dtype=np.int64)
    for track in codes:
        for k in range(num_codebooks):
            counts[k] += np.bincount(track[k], minlength=codebook_size)
    return counts


def unigram_entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in nats `[K]` of each codebook's code frequencies with add-one smoothing, from counts `[K, V]`.

    This is the loss of a model that knows how common each code is and nothing else.
    """
    p = (counts + 1) / (counts + 1).sum(axis=1, keepdims=True)
    return -(p * np.log(p)).sum(axis=1)
