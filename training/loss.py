"""Cross-entropy per codebook, and the unigram baseline it is read against.

The loss is the mean over codebooks of each codebook's mean cross-entropy (reference: equal weight although the counts
differ). Sums and counts are kept apart, so that several ranks or accumulated parts give exactly the mean of the whole
batch and not a mean of means.

Source: Copet et al. 2023, section 3; audiocraft `solvers/musicgen.py::_compute_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CHUNK_ROWS = 1024  # logits of this many positions exist at a time: 8 MB in float32 for 2048 codes


class _HeadCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, without ever holding all logits.

    Four heads of 2048 codes cost a small model as much as its layers, mostly in memory traffic. So logits are made a
    chunk of positions at a time and turned at once into the gradients of `hidden` and `weight`, which the backward
    pass only scales. Matrix products are in the autocast type, the softmax in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        low_weight = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden, dtype=dtype)
        # A frozen head (an adapter's base) needs no gradient of its own, a validation none at all.
        head_learns = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if head_learns else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            low_hidden = hidden[rows].to(dtype)
            p = torch.softmax(low_hidden @ low_weight.t(), dim=-1, dtype=torch.float32)
            at = targets[rows, None]
            # A probability that underflows counts as 1e-38 in the sum; its gradient stays exact.
            of_target = p.gather(1, at)
            logs = of_target.clamp(min=1e-38).log()
            if scored is not None:
                logs = logs.where(scored[rows, None], 0.0)
            total -= logs.sum()
            if not any(ctx.needs_input_grad):
                continue
            p.scatter_(1, at, of_target - 1)
            if scored is not None:
                p = p.where(scored[rows, None], 0.0)
            low = p.to(dtype)
            grad_hidden[rows] = low @ low_weight
            if grad_weight is not None:
                grad_weight += low.t() @ low_hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.types = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        types = ctx.types
        of_weight = None if grad_weight is None else (grad_weight * grads[0]).to(types[1])
        return (grad_hidden * grads[0]).to(types[0]), of_weight, None, None, None


def cross_entropy_sums(
    hidden: Tensor, heads: Sequence[nn.Linear], targets: Tensor, mask: Tensor, *, select: bool | None = None
) -> Tensor:
    """Sum of the cross-entropy over each codebook's targets.

    Args:
        hidden: `[B, S, D]`, what the heads read.
        heads: K linear maps from D to V logits, without bias.
        targets: `[B, K, S]` long.
        mask: `[B, K, S]` bool, true where a target counts; other cells give neither loss nor gradient.
        select: take those cells out first, which is less work, or compute all and erase the others, because choosing
            makes a GPU's host wait for it. By default the first on a CPU, the second on a GPU.

    Returns:
        float32 `[K]`, differentiable.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    select = kind == "cpu" if select is None else select
    sums = []
    with torch.autocast(kind, enabled=False):
        for k, head in enumerate(heads):
            chosen = mask[:, k]
            weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
            cells: tuple[Any, ...]
            if select:
                cells = hidden[chosen], weight, targets[:, k][chosen], None
            else:
                ids = targets[:, k].where(chosen, 0).flatten()
                cells = hidden.flatten(0, 1), weight, ids, chosen.flatten()
            sums.append(_HeadCrossEntropy.apply(*cells, dtype))
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


def unigram_loss(known: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Loss in nats `[K]` of a model that knows how common each code is and nothing else.

    Args:
        known: counts `[K, V]` of the codes it has seen; one is added to each (smoothing).
        scored: counts `[K, V]` of the codes it is scored on. With `known` itself this is the unigram entropy.
    """
    p = (known + 1) / (known + 1).sum(axis=1, keepdims=True)
    q = scored / scored.sum(axis=1, keepdims=True).clip(min=1)
    return -(q * np.log(p)).sum(axis=1)
