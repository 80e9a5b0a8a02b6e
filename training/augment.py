"""Conditions that come from audio, made worse in training: a melody or an excerpt with holes and out of step.

What acts on stored numbers happens here: frames are lost, frames change places with a neighbour, and instead of the
track's own chroma an item hears that of an equalised, noisy or differently mixed version, where ingest stored any
(`--chroma_variants`, `musicgen.degrade`). All of it is drawn by the item's address and off by default, as in the
reference, whose authors name its lack as a limit; validation hears everything as it is.

Source: Copet et al. 2023, section 6 (limitations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AugmentConfig:
    """How melodies and excerpts are made worse in training.

    Args:
        frame_dropout: probability per frame of being lost.
        frame_jitter: probability per frame of being replaced by the one before or after it.
        variants: probability per item of hearing a stored variant of its melody, where the data has any.
    """

    frame_dropout: float = 0.0
    frame_jitter: float = 0.0
    variants: float = 0.0

    def __post_init__(self) -> None:
        for name in ("frame_dropout", "frame_jitter", "variants"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"batch.augment.{name} is {getattr(self, name)}; it must be in [0, 1]")


def frames(count: int, config: AugmentConfig, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of so many frames: from which frame each takes its value, int64 `[count]`, and which are lost, bool `[count]`."""
    draws = np.random.default_rng(tuple(seed)).random((3, count))
    step = np.where(draws[1] < 0.5, -1, 1)
    source = np.arange(count) + np.where(draws[0] < config.frame_jitter, step, 0)
    return source.clip(0, max(count - 1, 0)), draws[2] < config.frame_dropout


def version(count: int, config: AugmentConfig, seed: Sequence[int]) -> int:
    """Which of `count` versions of a melody an item hears: 0 is the track's own."""
    drawn, which = np.random.default_rng(tuple(seed)).random(2)
    return 1 + int(which * (count - 1)) if count > 1 and drawn < config.variants else 0
