"""Clips of any length: codes frame by frame, through windows as long as the crops the model was trained on.

A model that learned from 30 seconds at a time knows nothing beyond them. A longer clip is made in windows: each starts
`stride` frames after the one before, is given the codes that both share, and adds the rest. The caches are those of one
window, whatever the clip's length, and random numbers are addressed by the clip's frames, so that a longer clip begins
like a shorter one.

Source: audiocraft `models/musicgen.py` (extend_stride); Copet et al. 2023 generate 30 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen import patterns
from musicgen.conditions import Conditions
from musicgen.config import LMConfig
from musicgen.engine import Engine
from musicgen.sampler import UNKNOWN, Sampler
from musicgen.sampling import SamplingConfig


@dataclass(frozen=True)
class Windows:
    """How a clip is cut.

    Attributes:
        total: frames of the clip.
        window: frames of a window.
        stride: frames by which a window starts after the one before, below `window`.
        frame_rate, sample_rate_hz: of the codec.
        margin: frames that a window has beyond those it gives; see `margin_of`.
        fixed: every window is laid out in full length, for patterns in which a code's place depends on it.
    """

    total: int
    window: int
    stride: int
    frame_rate: float
    sample_rate_hz: int
    margin: int = 0
    fixed: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.stride < self.window:
            raise ValueError(f"a stride of {self.stride} frames must be above 0 and below the window, {self.window}")

    def start_after(self, done: int) -> int:
        """First frame of the window that goes on after `done` frames."""
        return 0 if done < self.window else done - (self.window - self.stride)


LENGTH_BOUND = ("coarse_first", "musiclm")  # patterns whose later codebooks stand behind all of the first one's frames


def margin_of(lm: LMConfig) -> int:
    """Frames by which the window of a model must be longer than what it gives.

    With the reference's tail the columns that only delays need are never trained, yet hold codes of the last frames,
    which then are noise: a window stays clear of them.
    """
    lengths = [patterns.num_columns(8, lm.num_codebooks, pattern=lm.pattern, tail=t) for t in ("full", lm.tail)]
    return lengths[0] - lengths[1]


def stream_codes(
    engine: Engine,
    branches: Sequence[Conditions],
    seeds: Sequence[int],
    config: SamplingConfig,
    windows: Windows,
    given: Tensor | None = None,
    scales: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Codes `[B, K, n]` of a batch of clips as their frames become complete; the given ones first.

    Args:
        engine, branches, seeds, config, scales: see `sampler.Sampler`.
        windows: how the clips are cut.
        given: `[B, K, P]` codes that the clips begin with, P below the total.
        progress: called with (frames done, frames in all) after each column.
    """
    lm, total = engine.config, windows.total
    books = lm.num_codebooks
    tail = given.to(engine.device) if given is not None else torch.zeros(len(seeds), books, 0, dtype=torch.long)
    tail = tail.to(engine.device)
    done = tail.shape[2]
    if done:
        yield tail
    longest = windows.window if windows.fixed else min(windows.window, total)
    sampler = Sampler(
        engine, branches, seeds, config, longest + windows.margin,
        frame_rate=windows.frame_rate, sample_rate_hz=windows.sample_rate_hz, scales=scales,
    )  # fmt: skip
    while done < total:
        start = windows.start_after(done)
        known = done - start
        last = min(windows.window, total - start)
        shape = (len(seeds), books, (windows.window if windows.fixed else last) + windows.margin)
        codes = torch.full(shape, UNKNOWN, dtype=torch.long, device=engine.device)
        codes[..., :known] = tail[..., tail.shape[2] - known :]
        sampler.begin(codes, offset=start)
        emitted = known
        while True:
            complete = min(sampler.frames, last)
            if complete > emitted:
                yield sampler.codes(emitted, complete)
                emitted = complete
            if progress is not None:
                progress(start + complete, total)
            if complete == last:
                break
            sampler.advance()
        tail, done = sampler.codes(0, last), start + last
