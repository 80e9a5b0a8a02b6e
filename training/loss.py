"""Cross-entropy per codebook, and the unigram baseline it is read against.

The loss is the mean over codebooks of each codebook's mean cross-entropy (reference: equal weight although the counts
differ). Sums and counts are kept apart, so that several ranks or accumulated parts give exactly the mean of the whole
batch and not a mean of means.

Source: Copet et al. 2023, section 3; audiocraft `solvers/musicgen.py::_compute_cross_entropy`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CHUNK_ROWS = 1024  # logits of this many positions exist at a time on a CPU: 8 MB in float32 for 2048 codes
CHUNK_BYTES = 2**27  # of float32 logits on a GPU, where each chunk costs its launches: 16,384 positions for 2048 codes

Chunk = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def chunk_rows(device_type: str, codebook_size: int) -> int:
    """Positions whose logits exist at a time, on a `cpu` or a GPU."""
    return CHUNK_ROWS if device_type == "cpu" else max(CHUNK_BYTES // (4 * codebook_size), 1)


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor | None, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of some positions and, where something learns, the gradient of their logits.

    Args:
        hidden: `[R, D]`, and `weight` `[V, D]` of the head, in the type of the matrix product.
        targets: `[R]` long.
        scored: `[R]` bool, which of them count; None is all.

    Returns:
        float32 `[]`, and `[R, V]` in the type of `hidden`.
    """
    p = torch.softmax(hidden @ weight.t(), dim=-1, dtype=torch.float32)
    at = targets[:, None]
    # A probability that underflows counts as 1e-38 in the sum; its gradient stays exact.
    of_target = p.gather(1, at)
    logs = of_target.clamp(min=1e-38).log()
    if scored is not None:
        logs = logs.where(scored[:, None], 0.0)
    total = -logs.sum()
    if not learns:
        return total, None
    p.scatter_(1, at, of_target - 1)
    if scored is not None:
        p = p.where(scored[:, None], 0.0)
    return total, p.to(hidden.dtype)


def _fusible_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, scored: Tensor | None, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_chunk`, without gather and scatter: compiled, a row's logits are read once and its gradient written once."""
    logits = (hidden @ weight.t()).float()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    log_sum = logits.logsumexp(dim=1, keepdim=True)
    losses = log_sum[:, 0] - logits.where(is_target, 0.0).sum(dim=1)
    if scored is not None:
        losses = losses.where(scored, 0.0)
    if not learns:
        return losses.sum(), None
    gradient = (logits - log_sum).exp() - is_target.float()
    if scored is not None:
        gradient = gradient.where(scored[:, None], 0.0)
    return losses.sum(), gradient.to(hidden.dtype)


@functools.cache
def _compiled_chunk() -> Chunk:
    """Chunks have two sizes, full ones and the rest of a batch, so two graphs for each size of batch."""
    return torch.compile(_fusible_chunk, dynamic=False)


class _HeadCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, without ever holding all logits.

    Four heads of 2048 codes cost a small model as much as its layers, mostly in memory traffic. So logits are made a
    chunk of positions at a time and turned at once into the gradients of `hidden` and `weight`, which the backward
    pass only scales. Matrix products are in the autocast type, the softmax in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scored: Tensor | None,
        dtype: torch.dtype,
        size: int,
        chunk: Chunk,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        low_weight = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden, dtype=dtype)
        # A frozen head (an adapter's base) needs no gradient of its own, a validation none at all.
        head_learns = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if head_learns else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            low_hidden = hidden[rows].to(dtype)
            counts = None if scored is None else scored[rows]
            part, low = chunk(low_hidden, low_weight, targets[rows], counts, any(ctx.needs_input_grad))
            total += part
            if low is None:
                continue
            torch.mm(low, low_weight, out=grad_hidden[rows])
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
        return (grad_hidden * grads[0]).to(types[0]), of_weight, None, None, None, None, None


def cross_entropy_sums(
    hidden: Tensor,
    heads: Sequence[nn.Linear],
    targets: Tensor,
    mask: Tensor,
    *,
    select: bool | None = None,
    rows: int = 0,
    compiled: bool = False,
) -> Tensor:
    """Sum of the cross-entropy over each codebook's targets.

    Args:
        hidden: `[B, S, D]`, what the heads read.
        heads: K linear maps from D to V logits, without bias.
        targets: `[B, K, S]` long.
        mask: `[B, K, S]` bool, true where a target counts; other cells give neither loss nor gradient.
        select: take those cells out first, which is less work, or compute all and erase the others, because choosing
            makes a GPU's host wait for it. By default the first on a CPU, the second on a GPU.
        rows: positions whose logits exist at a time; 0 takes what suits the device (`chunk_rows`).
        compiled: one kernel for what lies between the matrix products, on a GPU; a CPU's way stays as it is.

    Returns:
        float32 `[K]`, differentiable.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    select = kind == "cpu" if select is None else select
    chunk = _compiled_chunk() if compiled and kind != "cpu" else _chunk
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
            size = rows or chunk_rows(kind, len(weight))
            sums.append(_HeadCrossEntropy.apply(*cells, dtype, size, chunk))
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
