"""Measures on collections: is a clip in the style that was asked for, and was anything copied from training.

Style: a clip's embedding is the mean and spread over time of the codec's quantised latents, standardised over the
training tracks; a style is the centroid of its tracks; a clip belongs to the nearest one.
Memorisation: a 5-second window counts as copied when at least 80 % of its first-codebook codes equal those of a
training track at the same alignment (Copet et al. 2023, appendix, use first-codebook matches in the same way).
The search is exact: every lag between the clip and every track is considered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

WINDOW_FRAMES = 250  # 5 s at 50 frames/s
COPIED_SHARE = 0.8


def embedding(latents: Tensor) -> np.ndarray:
    """Clip embedding [2 H], float64: mean and standard deviation over time of latents [H, T] (`Codec.embed`)."""
    x = latents.detach().cpu().double().numpy()
    if x.ndim != 2:
        raise ValueError(f"expected latents of one clip, [H, T], got shape {x.shape}")
    return np.concatenate([x.mean(axis=1), x.std(axis=1)])


@dataclass(frozen=True)
class Styles:
    """Centroids [S, D] of `names`, in coordinates standardised by `mean` and `scale` [D]."""

    names: tuple[str, ...]
    centroids: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    def distances(self, embeddings: np.ndarray) -> np.ndarray:
        """Euclidean distance of embeddings [n, D] to every centroid, [n, S]."""
        z = (np.atleast_2d(embeddings) - self.mean) / self.scale
        return np.linalg.norm(z[:, None, :] - self.centroids[None], axis=2)

    def nearest(self, embeddings: np.ndarray) -> list[str]:
        """Name of the nearest centroid for each of the embeddings [n, D]."""
        return [self.names[i] for i in self.distances(embeddings).argmin(axis=1)]


def style_centroids(embeddings: np.ndarray, labels: Sequence[str]) -> Styles:
    """`Styles` from embeddings [n, D] of training tracks and their style names (length n)."""
    x = np.asarray(embeddings, np.float64)
    if x.ndim != 2 or len(x) != len(labels) or len(x) == 0:
        raise ValueError(f"expected one label for each embedding, got {x.shape} and {len(labels)} labels")
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    names = tuple(sorted(set(labels)))
    z = (x - mean) / scale
    rows = np.asarray(labels)
    return Styles(names, np.stack([z[rows == name].mean(axis=0) for name in names]), mean, scale)


def binomial_p(hits: int, trials: int, chance: float) -> float:
    """Probability of at least `hits` out of `trials` by luck, each with probability `chance`."""
    return math.fsum(math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(hits, trials + 1))


@dataclass(frozen=True)
class Match:
    """The training window most like any window of a clip.

    share: equal codes in it, 0..1 (0 when the clip or every track is shorter than a window); track: its key;
    clip_frame, track_frame: where the windows start.
    """

    share: float
    track: str = ""
    clip_frame: int = 0
    track_frame: int = 0

    @property
    def copied(self) -> bool:
        """Whether this counts as memorised."""
        return self.share >= COPIED_SHARE


class CodeIndex:
    """First-codebook codes of all training tracks, indexed for the exact search of equal windows.

    Args:
        tracks: (key, codes [T] or [K, T]); of [K, T] the first row is taken.
        window: frames of a window.
    """

    def __init__(self, tracks: Iterable[tuple[str, np.ndarray]], window: int = WINDOW_FRAMES) -> None:
        kept = [(key, np.atleast_2d(codes)[0].astype(np.int32)) for key, codes in tracks]
        self.window = window
        self.keys = [key for key, _ in kept]
        lengths = np.array([len(codes) for _, codes in kept], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.codes = np.concatenate([codes for _, codes in kept]) if kept else np.zeros(0, np.int32)
        self._order = np.argsort(self.codes, kind="stable").astype(np.int64)
        size = int(self.codes.max()) + 1 if len(self.codes) else 0
        self._bounds = np.searchsorted(self.codes[self._order], np.arange(size + 1))

    def _positions(self, code: int) -> np.ndarray:
        if not 0 <= code < len(self._bounds) - 1:
            return np.zeros(0, np.int64)
        return self._order[self._bounds[code] : self._bounds[code + 1]]

    def best_match(self, clip: np.ndarray) -> Match:
        """The most equal pair of windows between `clip` ([T] or [K, T]) and any training track."""
        codes = np.atleast_2d(clip)[0].astype(np.int64)
        best = Match(0.0)
        if len(codes) < self.window or len(self.codes) == 0:
            return best
        # equal[lag] counts every equal pair (t, p) with p - t + T = lag: an upper bound for any window on that lag,
        # so lags are looked at from the fullest down until none can beat the best window found.
        equal = np.zeros(len(self.codes) + len(codes) + 1, np.int32)
        for t, code in enumerate(codes):
            equal[self._positions(int(code)) - t + len(codes)] += 1
        best_count = 0
        for lag in np.argsort(-equal, kind="stable"):
            if equal[lag] <= best_count:
                break
            shift = int(lag) - len(codes)  # clip frame t stands beside concatenated frame t + shift
            first, last = max(0, -shift), min(len(codes), len(self.codes) - shift)
            low = int(np.searchsorted(self.starts, first + shift, side="right")) - 1
            high = int(np.searchsorted(self.starts, last - 1 + shift, side="right")) - 1
            for track in range(low, high + 1):
                begin = max(first, int(self.starts[track]) - shift)
                end = min(last, int(self.starts[track + 1]) - shift)
                if end - begin < self.window:
                    continue
                same = codes[begin:end] == self.codes[begin + shift : end + shift]
                sums = np.concatenate([[0], np.cumsum(same)])
                counts = sums[self.window :] - sums[: -self.window]
                where = int(counts.argmax())
                if counts[where] > best_count:
                    best_count = int(counts[where])
                    t = begin + where
                    best = Match(best_count / self.window, self.keys[track], t, t + shift - int(self.starts[track]))
        return best
