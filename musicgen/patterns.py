"""Codebook interleaving: where each code of a clip stands in the language model's columns, as pure functions.

A codec frame has K codes. A pattern assigns every code (t, q) of a clip of T frames to one column of the language
model; a column holds at most one code of each codebook, column 0 holds none, and a cell without a code holds the
special token. The delay pattern writes codebook q shifted by q columns:

    T=3, K=3, S the special token        S 1 2 3 S S
                                         S S 1 2 3 S
                                         S S S 1 2 3

`PATTERNS` names them all; one setting (`LMConfig.pattern`) chooses. Training feeds the columns and scores column s
against column s + 1. Two tails exist: `full` trains every code; `reference` cuts the layout before the columns that
only delays need, as audiocraft does, which leaves T - q targets for codebook q of the delay pattern (the tail is then
never trained, yet fed when generating).

Source: Copet et al. 2023, section 2.2, figure 1 and table 4; audiocraft's `modules/codebooks_patterns.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Tail = Literal["full", "reference"]
Steps = list[list[tuple[int, int]]]  # per column the codes (t, q) it holds; t may run past the clip's end


@dataclass(frozen=True)
class Layout:
    """A pattern spread over a clip of T frames.

    Attributes:
        frames: `[K, L]` int64, the frame whose code of codebook q stands in column s; -1 where none does.
        num_frames: T.
        valid: columns of the reference's training layout, at most L.
    """

    frames: Tensor
    num_frames: int
    valid: int

    @property
    def length(self) -> int:
        """L, columns of the whole layout, the start column included."""
        return self.frames.shape[1]

    @property
    def mask(self) -> Tensor:
        """`[K, L]` bool: where a code stands."""
        return self.frames >= 0

    def first_column(self, frame: int) -> int:
        """The first column that holds a code of this frame: where generation goes on after `frame` given frames."""
        return int((self.frames == frame).any(dim=0).nonzero()[0])

    def complete(self) -> Tensor:
        """`[L]` int64: how many leading frames have all their codes in columns 0..s, for every s."""
        last = torch.zeros(self.num_frames, dtype=torch.long)  # last column of each frame
        for row in self.frames:
            held = row >= 0
            last[row[held]] = torch.maximum(last[row[held]], held.nonzero()[:, 0])
        return torch.searchsorted(last.cummax(0).values, torch.arange(self.length), right=True)


def delay_steps(num_frames: int, delays: Sequence[int]) -> Steps:
    """Codebook q shifted by `delays[q]` columns; a delay for each codebook, ascending from 0."""
    given = list(delays)
    if not given or given[0] != 0 or given != sorted(given):
        raise ValueError(f"delays {tuple(given)} must be ascending numbers that start at 0, one per codebook")
    steps = range(num_frames + given[-1])
    return [[], *([(s - d, q) for q, d in enumerate(given) if s >= d] for s in steps)]


def unroll_steps(num_frames: int, flattening: Sequence[int], delays: Sequence[int] | None = None) -> Steps:
    """Codebook q in inner step `flattening[q]` of its frame, so that a frame takes several columns.

    Args:
        flattening: inner step of each codebook; codebooks of one inner step must share a delay.
        delays: frames by which a codebook stays behind. At equal time the delayed group comes first, as in the
            reference, where entries are sorted as tuples.
    """
    given = list(delays) if delays is not None else [0] * len(flattening)
    groups: dict[int, list[int]] = {}
    for q, inner in enumerate(flattening):
        groups.setdefault(inner, []).append(q)
    if any(len({given[q] for q in books}) > 1 for books in groups.values()):
        raise ValueError(f"codebooks of one inner step must share a delay; got {flattening} with delays {given}")
    last = num_frames + max(given)
    entries: list[tuple[int, list[tuple[int, int]]]] = [(-1, [])]
    for t in range(last):
        for inner in range(max(groups) + 1):
            books = groups.get(inner, [])
            time = t + (given[books[0]] if books else 0)
            if time < last:
                entries.append((time, [(t, q) for q in books]))
    return [codes for _, codes in sorted(entries)]


def coarse_first_steps(num_frames: int, delays: Sequence[int]) -> Steps:
    """All of codebook 0, then the K - 1 others side by side with these delays.

    The fine codes stand at positions that depend on T: generate clips as long as the training crops.
    """
    coarse: Steps = [[], *([(t, 0)] for t in range(num_frames))]
    if not delays:
        return coarse
    steps = range(num_frames + max(delays))
    return coarse + [[(s - d, q) for q, d in enumerate(delays, start=1) if s >= d] for s in steps]


def grouped_steps(num_frames: int, num_codebooks: int, group_by: int) -> Steps:
    """MusicLM's order: groups of codebooks one after the other, each flattened frame by frame."""
    steps: Steps = [[]]
    for first in range(0, num_codebooks, group_by):
        books = range(first, min(first + group_by, num_codebooks))
        steps += [[(t, q)] for t in range(num_frames) for q in books]
    return steps


def _coarse_then_rest(num_codebooks: int) -> list[int]:
    return [0] + [1] * (num_codebooks - 1)


# By name: from T and K to the columns. The stereo orders expect left and right in turn: 1L 1R 2L 2R ...
PATTERNS: dict[str, Callable[[int, int], Steps]] = {
    "parallel": lambda t, k: delay_steps(t, [0] * k),
    "delay": lambda t, k: delay_steps(t, range(k)),
    "partial_delay": lambda t, k: delay_steps(t, _coarse_then_rest(k)),
    "flattening": lambda t, k: unroll_steps(t, range(k)),
    "partial_flattening": lambda t, k: unroll_steps(t, _coarse_then_rest(k)),
    "coarse_first": lambda t, k: coarse_first_steps(t, [0] * (k - 1)),
    "musiclm": lambda t, k: grouped_steps(t, k, 2),
    "stereo_delay": lambda t, k: delay_steps(t, range(k)),
    "stereo_partial_delay": lambda t, k: delay_steps(t, [q // 2 for q in range(k)]),
}


def check(pattern: str, num_codebooks: int) -> None:
    """Raises `ValueError`, naming what exists, for an unknown pattern or one that does not suit K codebooks."""
    if pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r}; allowed: {', '.join(PATTERNS)}")
    if pattern.startswith("stereo") and num_codebooks % 2:
        raise ValueError(f"pattern {pattern!r} needs an even number of codebooks (left and right), not {num_codebooks}")


def spread(steps: Iterable[list[tuple[int, int]]], num_codebooks: int, num_frames: int) -> Layout:
    """The layout of columns given as lists of codes; what lies past the clip's end counts for `valid` alone."""
    columns = list(steps)
    frames = [[-1] * len(columns) for _ in range(num_codebooks)]
    latest = 0
    for s, codes in enumerate(columns):
        for t, q in codes:
            latest = max(latest, t)
            if t < num_frames:
                frames[q][s] = t
    return Layout(torch.tensor(frames), num_frames, len(columns) - max(latest + 1 - num_frames, 0))


@lru_cache(maxsize=128)
def layout(pattern: str, num_codebooks: int, num_frames: int) -> Layout:
    """The layout of a named pattern over T frames of K codebooks. It is shared: do not write into its tensors.

    Raises:
        ValueError: unknown pattern, or no frame.
    """
    check(pattern, num_codebooks)
    if num_frames < 1:
        raise ValueError(f"a clip has at least one frame, not {num_frames}")
    return spread(PATTERNS[pattern](num_frames, num_codebooks), num_codebooks, num_frames)


@lru_cache(maxsize=128)
def _frames_on(pattern: str, num_codebooks: int, num_frames: int, device: torch.device) -> Tensor:
    return layout(pattern, num_codebooks, num_frames).frames.to(device)


def num_columns(num_frames: int, num_codebooks: int, *, pattern: str = "delay", tail: Tail = "full") -> int:
    """Columns of a layout for T frames, start column included: T + K (delay, `full`) or T + 1 (`reference`)."""
    made = layout(pattern, num_codebooks, num_frames)
    return made.length if tail == "full" else made.valid


def num_frames_of(num_columns: int, num_codebooks: int, *, pattern: str = "delay") -> int:
    """T of a full layout of L columns; raises `ValueError` when no clip has that many."""
    one, two = (layout(pattern, num_codebooks, t).length for t in (1, 2))  # L is linear in T
    if num_columns < one or (num_columns - one) % (two - one):
        raise ValueError(
            f"{num_columns} columns hold no frame, or no whole number of frames: pattern {pattern!r} of "
            f"{num_codebooks} codebooks takes {one} columns for one frame and {two - one} for each further one"
        )
    return (num_columns - one) // (two - one) + 1


def scored_frames(num_frames: int, num_codebooks: int, *, pattern: str = "delay", tail: Tail = "full") -> list[int]:
    """How many leading frames of each codebook are training targets, `[K]`: T, or T - q (delay, `reference`)."""
    made = layout(pattern, num_codebooks, num_frames)
    return made.mask[:, : made.length if tail == "full" else made.valid].sum(dim=1).tolist()


def interleave(codes: Tensor, special: int, *, pattern: str = "delay", tail: Tail = "full") -> tuple[Tensor, Tensor]:
    """Lay out codes in columns.

    Args:
        codes: `[B, K, T]`, any integer type; unknown codes may be marked with any value (for instance -1).
        special: id written where the pattern holds no code.
        pattern: a name of `PATTERNS`.
        tail: `full` keeps every code, `reference` the columns that the reference trains on.

    Returns:
        columns `[B, K, L]` of the type of `codes`, and a mask `[K, L]`, true where a code of the clip sits.
    """
    batch, books, frames = codes.shape
    length = num_columns(frames, books, pattern=pattern, tail=tail)
    where = _frames_on(pattern, books, frames, codes.device)[:, :length]
    mask = where >= 0
    columns = codes.gather(2, where.clamp(min=0).expand(batch, -1, -1))
    return columns.masked_fill(~mask, special), mask


def deinterleave(columns: Tensor, *, pattern: str = "delay") -> Tensor:
    """Codes `[B, K, T]` from a full layout `[B, K, L]`; the inverse of `interleave` with `tail="full"`.

    Raises:
        ValueError: no clip has this number of columns.
    """
    batch, books, length = columns.shape
    frames = num_frames_of(length, books, pattern=pattern)
    where = _frames_on(pattern, books, frames, columns.device)
    # Along a codebook the frames ascend, so that its T held columns, in order, are its codes.
    return columns[:, where >= 0].reshape(batch, books, frames)


def training_columns(
    codes: Tensor,
    special: int,
    *,
    valid: Tensor | None = None,
    pattern: str = "delay",
    tail: Tail = "full",
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model reads and what it must say.

    Args:
        codes: `[B, K, T]` long.
        special: start and filler id.
        valid: `[B, T]` bool, false for padded frames; their codes become `special` in the input and are no targets.
        pattern, tail: as in `interleave`.

    Returns:
        inputs `[B, K, S]`, targets `[B, K, S]` (`special` where there is none) and target mask `[B, K, S]`.
        `full`: S = L - 1 (delay: T + K - 1) and T targets per codebook. `reference`: S columns of the reference
        (delay: T + 1, T - q targets for codebook q), whose last one is fed but not scored, as in audiocraft.
    """
    if valid is not None:
        codes = torch.where(valid[:, None, :], codes, codes.new_full((), special))
    columns, cells = interleave(codes, special, pattern=pattern, tail=tail)
    filler = columns.new_full((*columns.shape[:2], 1), special)
    targets = torch.cat([columns[..., 1:], filler], dim=-1)
    mask = torch.cat([cells[:, 1:], cells.new_zeros((cells.shape[0], 1))], dim=-1) & (targets != special)
    if tail == "full":  # the last column of the layout is a target only
        return columns[..., :-1], targets[..., :-1], mask[..., :-1]
    return columns, targets, mask
