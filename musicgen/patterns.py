"""Codebook interleaving: the delay pattern as pure functions on code tensors.

A codec frame has K codes. The delay pattern writes codebook q shifted by q columns, so that one column of the
language model holds frame t of the first codebook, t-1 of the second, and so on; a whole clip of T frames takes
T + K columns: one start column of special tokens, then T + K - 1 columns that hold codes.

    T=3, K=3, S the special token        S 1 2 3 S S
                                         S S 1 2 3 S
                                         S S S 1 2 3

Training feeds all columns but the last and scores column s against column s + 1. Two tails exist: `full` trains
all T codes of every codebook; `reference` cuts the layout after T + 1 columns as audiocraft does, which leaves
T - q targets for codebook q (the tail is then never trained, yet fed when generating).

Source: Copet et al. 2023, section 2.2 and figure 1; audiocraft's `DelayedPatternProvider`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Tail = Literal["full", "reference"]


def delays_of(num_codebooks: int, delays: Sequence[int] | None = None) -> tuple[int, ...]:
    """Delay in columns of each codebook: 0, 1, .. K-1 unless given (stereo uses 0,0,1,1,2,2,3,3).

    Raises:
        ValueError: wrong number, negative or not ascending.
    """
    if delays is None:
        return tuple(range(num_codebooks))
    given = tuple(int(d) for d in delays)
    if len(given) != num_codebooks or given[0] != 0 or list(given) != sorted(given):
        raise ValueError(f"delays {given} must be {num_codebooks} ascending numbers starting at 0")
    return given


def num_columns(
    num_frames: int, num_codebooks: int, *, tail: Tail = "full", delays: Sequence[int] | None = None
) -> int:
    """Columns of a layout for T frames, start column included: T + K (`full`, plain delays) or T + 1 (`reference`)."""
    return num_frames + 1 + (max(delays_of(num_codebooks, delays)) if tail == "full" else 0)


def interleave(
    codes: Tensor, special: int, *, tail: Tail = "full", delays: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Lay out codes in columns.

    Args:
        codes: `[B, K, T]`, any integer type; unknown codes may be marked with any value (for instance -1).
        special: id written where the pattern holds no code.
        tail: `full` keeps every code, `reference` keeps the first T + 1 columns.
        delays: see `delays_of`.

    Returns:
        columns `[B, K, L]` of the type of `codes`, and a mask `[K, L]`, true where a code of the clip sits.
    """
    batch, books, frames = codes.shape
    given = delays_of(books, delays)
    length = num_columns(frames, books, tail=tail, delays=given)
    columns = codes.new_full((batch, books, length), special)
    mask = torch.zeros((books, length), dtype=torch.bool, device=codes.device)
    for q, delay in enumerate(given):
        end = min(1 + delay + frames, length)
        kept = max(end - 1 - delay, 0)
        columns[:, q, 1 + delay : 1 + delay + kept] = codes[:, q, :kept]
        mask[q, 1 + delay : 1 + delay + kept] = True
    return columns, mask


def deinterleave(columns: Tensor, *, delays: Sequence[int] | None = None) -> Tensor:
    """Codes `[B, K, T]` from a full layout `[B, K, L]`; the inverse of `interleave` with `tail="full"`.

    Raises:
        ValueError: the layout is too short to hold a frame.
    """
    books, length = columns.shape[1], columns.shape[2]
    given = delays_of(books, delays)
    frames = length - 1 - max(given)
    if frames < 1:
        raise ValueError(f"{length} columns hold no frame: {books} codebooks need at least {2 + max(given)} columns")
    return torch.stack([columns[:, q, 1 + d : 1 + d + frames] for q, d in enumerate(given)], dim=1)


def training_columns(
    codes: Tensor,
    special: int,
    *,
    valid: Tensor | None = None,
    tail: Tail = "full",
    delays: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model reads and what it must say.

    Args:
        codes: `[B, K, T]` long.
        special: start and filler id.
        valid: `[B, T]` bool, false for padded frames; their codes become `special` in the input and are no targets.
        tail: as in `interleave`.

    Returns:
        inputs `[B, K, S]`, targets `[B, K, S]` (`special` where there is none) and target mask `[B, K, S]`.
        `full`: S = T + K - 1 and T targets per codebook. `reference`: S = T + 1, T - q targets for codebook q, and
        the last column is fed but not scored, as in audiocraft.
    """
    if valid is not None:
        codes = torch.where(valid[:, None, :], codes, codes.new_full((), special))
    columns, cells = interleave(codes, special, tail=tail, delays=delays)
    filler = columns.new_full((*columns.shape[:2], 1), special)
    targets = torch.cat([columns[..., 1:], filler], dim=-1)
    mask = torch.cat([cells[:, 1:], cells.new_zeros((cells.shape[0], 1))], dim=-1) & (targets != special)
    if tail == "full":  # the last column of the layout is a target only
        return columns[..., :-1], targets[..., :-1], mask[..., :-1]
    return columns, targets, mask
