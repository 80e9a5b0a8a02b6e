"""Which crop of which track is item i of step s: pure numpy, no state but the step.

Everything random about an item comes from (seed, step, item): its track, where its crop starts, which caption
variant it hears, which words are dropped, whether it loses its condition. So the global batch is the same on 1, 2
or 8 ranks, and a run resumed at step s goes on as if it had never stopped.

Crops start on a grid of 32 frames (0.64 s, 5 chroma frames). As in the reference, a crop may run past the end of its
track by at most 1 - min_segment_ratio of its length; what is missing is padded and masked from the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

GRID_FRAMES = 32


@dataclass(frozen=True)
class Tracks:
    """The tracks of one split, as the plan sees them.

    Attributes:
        rows: int64 `[N]`, row numbers in the index.
        frames: int64 `[N]`, codec frames of each.
        weights: float64 `[N]`, sampling weights of the index.
        source: int64 `[N]`, the set of a mixture that each belongs to; None where there is one.
        shares: float64 `[S]`, how much of what is drawn comes from each set.
    """

    rows: np.ndarray
    frames: np.ndarray
    weights: np.ndarray
    source: np.ndarray | None = None
    shares: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class CropRule:
    """How crops are drawn.

    Args:
        frames: length of a crop, T.
        min_segment_ratio: least share of a crop that lies inside its track (where the track is long enough).
        tail_frames: last frames of a track that crops leave out, where the track is long enough: a small model that
            hears many endings learns to fall silent.
        sample_by: `tracks` draws each track alike (the reference), `seconds` each second of audio alike.
        condition_dropout: probability that an item loses its condition.
    """

    frames: int
    min_segment_ratio: float = 0.8
    tail_frames: int = 0
    sample_by: Literal["tracks", "seconds"] = "tracks"
    condition_dropout: float = 0.2


@dataclass(frozen=True)
class Item:
    """Item `index` of global step `step`.

    Attributes:
        row: row of the index.
        start: first frame of the crop.
        frames: frames of the crop inside the track, at most T.
        caption: number in [0, 1) that chooses among the caption variants.
        keep_condition: false when the condition is dropped.
        words: seed of the word dropout generator.
    """

    step: int
    index: int
    row: int
    start: int
    frames: int
    caption: float
    keep_condition: bool
    words: tuple[int, ...]


def _least(rule: CropRule) -> int:
    """Frames of a crop that lie inside its track at least."""
    return math.ceil(rule.min_segment_ratio * rule.frames)


def drawn_frames(track_frames: int, rule: CropRule) -> int:
    """Frames of a track that crops are drawn from: all but its tail, never less than a crop's least part."""
    return max(track_frames - rule.tail_frames, min(track_frames, _least(rule)))


def num_starts(track_frames: int, rule: CropRule) -> int:
    """How many places on the grid a crop of this track may start at; 1 for a track shorter than a crop's least part."""
    return max(drawn_frames(track_frames, rule) - _least(rule), 0) // GRID_FRAMES + 1


def cumulative(tracks: Tracks, rule: CropRule) -> np.ndarray:
    """Where each track ends on the line from 0 to 1 that a draw falls on: float64 `[N]`."""
    mass = tracks.weights * tracks.frames if rule.sample_by == "seconds" else tracks.weights
    if tracks.source is not None and tracks.shares is not None:
        of_source = np.bincount(tracks.source, weights=mass, minlength=len(tracks.shares))
        mass = mass * (tracks.shares / np.where(of_source > 0, of_source, 1))[tracks.source]
    return np.cumsum(mass / mass.sum())


def draw(tracks: Tracks, rule: CropRule, step: int, seed: int, index: int, line: np.ndarray) -> Item:
    """Item `index` of step `step`, from (seed, step, index) alone."""
    track_at, start_at, caption, keep = np.random.default_rng((seed, step, index)).random(4)
    track = min(int(np.searchsorted(line, track_at, side="right")), len(tracks) - 1)
    total = int(tracks.frames[track])
    start = GRID_FRAMES * int(start_at * num_starts(total, rule))
    total = drawn_frames(total, rule)
    return Item(
        step=step,
        index=index,
        row=int(tracks.rows[track]),
        start=start,
        frames=min(rule.frames, total - start),
        caption=float(caption),
        keep_condition=bool(keep >= rule.condition_dropout),
        words=(seed, step, index, 1),
    )


def batch(
    step: int,
    seed: int,
    tracks: Tracks,
    rule: CropRule,
    *,
    size: int,
    rank: int = 0,
    world: int = 1,
    line: np.ndarray | None = None,
) -> tuple[list[Item], np.ndarray]:
    """This rank's items of a step.

    Args:
        step: 0-based step.
        size: items of the global batch; a multiple of `world`.
        rank, world: this process and how many there are. A rank gets a contiguous part of the global batch.
        line: `cumulative(tracks, rule)`, for who draws many batches.

    Returns:
        this rank's items, and the valid frames int64 `[size]` of all items of the global batch: with them every rank
        knows the global number of targets without asking the others.

    Raises:
        ValueError: `size` is not a multiple of `world`.
    """
    if size % world:
        raise ValueError(f"a global batch of {size} does not divide among {world} processes")
    line = cumulative(tracks, rule) if line is None else line
    items = [draw(tracks, rule, step, seed, index, line) for index in range(size)]
    part = size // world
    return items[rank * part : (rank + 1) * part], np.array([item.frames for item in items], dtype=np.int64)


def num_targets(valid_frames: Sequence[int] | np.ndarray, scored_frames: Sequence[int]) -> np.ndarray:
    """Targets per codebook `[K]` of a batch whose items have these valid frames.

    `scored_frames` `[K]`: how many leading frames of a crop each codebook is scored on (`patterns.scored_frames`).
    """
    valid = np.asarray(valid_frames, dtype=np.int64)
    return np.array([np.minimum(valid, limit).sum() for limit in scored_frames], dtype=np.int64)


def validation(tracks: Tracks, rule: CropRule, limit: int) -> list[Item]:
    """Fixed crops of a split: end to end from each track's start, evenly thinned to `limit`; captions unaltered.

    They leave the tails out that training leaves out.

    The last crop of a track may be short by the rule's ratio; a track shorter than that gives one short crop.
    """
    least = _least(rule)
    places: list[tuple[int, int, int]] = []
    for row, frames in zip(tracks.rows.tolist(), tracks.frames.tolist()):
        total = drawn_frames(frames, rule)
        starts = [s for s in range(0, max(total, 1), rule.frames) if s == 0 or total - s >= least]
        places += [(row, s, min(rule.frames, total - s)) for s in starts]
    if len(places) > limit:
        chosen = np.linspace(0, len(places) - 1, limit).round().astype(int)
        places = [places[i] for i in chosen]
    return [
        Item(step=-1, index=i, row=row, start=start, frames=frames, caption=0.0, keep_condition=True, words=())
        for i, (row, start, frames) in enumerate(places)
    ]
