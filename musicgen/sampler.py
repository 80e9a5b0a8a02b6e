"""The loop around the step: columns in, columns out, until a window of a clip is full.

A `Sampler` owns every buffer of a batch of clips: columns, noise, guidance scales, caches. `begin` lays out a window
of codes, of which some are given (an audio prompt, or the end of the window before) and the others marked unknown,
and feeds the given ones at once; `advance` predicts one column: every branch of the guidance in one batch, guidance,
draw, pattern. Nothing in it waits for the device, so that on a GPU it is captured as a CUDA graph and replayed: one for
every length where the kernels of `musicgen.fused` are taken, else one per span of cache slots. The first step runs as
it is, which warms the kernels up.

Random numbers are addressed by (seed, column of the clip, codebook): noise is made for some columns ahead, because
its many small operations cost the same for one column as for thirty-two.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen import patterns, sampling
from musicgen.conditions import Conditions, stack
from musicgen.engine import SPAN, Engine
from musicgen.sampling import SamplingConfig

UNKNOWN = -1
NOISE_COLUMNS = 32  # columns of the clip whose noise is made at once


def bucket(size: int) -> int:
    """The padded batch size: a power of two, beyond 32 a multiple of 32. Within one an item's tokens are the same."""
    return 1 << (size - 1).bit_length() if size <= 32 else -(-size // 32) * 32


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs of a device are captured; torch's own is of the device on which the process captured first."""
    return torch.cuda.Stream(device)


class Sampler:
    """One batch of clips on one engine.

    Args:
        engine: the model.
        branches: the conditions of each branch of the guidance, each with B rows: (prompted,) without guidance,
            (prompted, null) with one scale, and with scales of their own (prompted, melody alone, null) and the like.
        seeds: B seeds, any integers.
        config: how to draw.
        max_frames: longest window.
        frame_rate, sample_rate_hz: of the codec; they place a window in the melody.
        graphs: capture the step as CUDA graphs; off runs it as it is, for comparison.
        scales: guidance scales of every frame of the clip `[branches - 1, frames]` float32; see `sampling.guide`.
    """

    def __init__(
        self,
        engine: Engine,
        branches: Sequence[Conditions],
        seeds: Sequence[int],
        config: SamplingConfig,
        max_frames: int,
        *,
        frame_rate: float,
        sample_rate_hz: int,
        graphs: bool = True,
        scales: Tensor | None = None,
    ) -> None:
        self.engine, self.config, self.branches = engine, config, len(branches)
        lm, device = engine.config, engine.device
        self.batch, self.padded = len(seeds), bucket(len(seeds))
        rows = torch.arange(self.padded, device=device) % self.batch
        # Python's integers are unbounded; the address takes their lowest 64 bits.
        unsigned = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], np.uint64)
        self.seeds = torch.from_numpy(unsigned.view(np.int64)).to(device)[rows]
        self.conditions = stack([b.rows(rows) for b in branches])
        books, size = lm.num_codebooks, lm.codebook_size
        length = patterns.num_columns(max_frames, books, pattern=lm.pattern)
        self.cache = engine.start(self.conditions, length)
        self.columns = torch.zeros((self.padded, books, length), dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # the last one known, on the device
        self.scales = torch.ones((max(self.branches - 1, 1), length), device=device)
        self.all_scales, self.frame_rate, self.sample_rate_hz = scales, frame_rate, sample_rate_hz
        self.draws = config.temperature > 0
        noise_shape = (self.padded, NOISE_COLUMNS if self.draws else 1, books, size)
        self.noise = torch.zeros(noise_shape, device=device)
        self.capture = graphs and device.type == "cuda"
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.warm: set[int] = set()
        self.pool: Any = None

    @torch.no_grad()
    def begin(self, codes: Tensor, offset: int = 0) -> int:
        """Lay out a window and feed what is given of it.

        Args:
            codes: `[B, K, T]` long, the given frames first, `UNKNOWN` after them, alike for every item.
            offset: frame of the clip at which the window begins; the address of its random numbers.

        Returns:
            columns known: those of the given codes and, if any is left to say, the first predicted one.
        """
        lm = self.engine.config
        columns, holds = patterns.interleave(codes, lm.special_id, pattern=lm.pattern)
        self.length = columns.shape[-1]
        two, one = (patterns.num_columns(frames, lm.num_codebooks, pattern=lm.pattern) for frames in (2, 1))
        self.offset = offset * (two - one)  # in columns
        rows = torch.arange(self.padded, device=columns.device) % self.batch
        self.columns[..., : self.length] = columns[rows]
        self.frame_columns = torch.stack([book.nonzero()[:, 0] for book in holds.cpu()])  # [K, T]
        self.complete = holds.cpu().cumsum(1).min(dim=0).values.tolist()
        if self.all_scales is not None:  # column c predicts the newest frame of column c + 1
            newest = offset + holds[:, 1:].cumsum(dim=1).max(dim=0).values - 1
            self.scales[:, : self.length - 1] = self.all_scales[:, newest.clamp(0, self.all_scales.shape[1] - 1)]
        unknown = (columns == UNKNOWN).any(dim=0).any(dim=0)
        first = int(unknown.float().argmax()) if bool(unknown.any()) else self.length
        self.known = self.first_drawn = first
        if first < self.length:
            chroma = self.conditions.chroma_from(offset / self.frame_rate, self.sample_rate_hz)
            self.engine.listen(self.cache, self.conditions, chroma)
            self.column.fill_(first - 1)
            logits = self.engine.feed(self.columns[..., :first].repeat(self.branches, 1, 1), self.cache)
            self._noise(first)
            self._say(logits)
            self.known = first + 1
        return self.known

    @property
    def done(self) -> bool:
        """Whether every column of the window is known."""
        return self.known >= self.length

    @property
    def frames(self) -> int:
        """Leading frames of the window whose codes are all known."""
        return self.complete[self.known - 1]

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes `[B, K, stop - start]` of complete frames."""
        where = self.frame_columns[:, start:stop].to(self.columns.device)
        return self.columns[: self.batch].gather(2, where.expand(self.batch, -1, -1))

    @torch.no_grad()
    def advance(self) -> None:
        """Predict the next column."""
        self._noise(self.known)
        if self.columns.is_cuda:
            self.advance_in_spans()
        else:
            self._step(None)
        self.known += 1

    def _noise(self, column: int) -> None:
        """Have the noise of the draw into `column` ready."""
        step = column - 1
        if self.draws and (step % NOISE_COLUMNS == 0 or column == self.first_drawn):
            base = step - step % NOISE_COLUMNS + self.offset
            steps = torch.arange(base, base + NOISE_COLUMNS, device=self.seeds.device)
            self.noise.copy_(sampling.gumbel_noise(self.seeds, steps, self.noise.shape[2], self.noise.shape[3]))

    def _step(self, span: int | None) -> None:
        """One column, without a word from the host: what a graph captures."""
        column = self.columns.index_select(2, self.column)
        self._say(self.engine.feed(column.repeat(self.branches, 1, 1), self.cache, span))

    def _say(self, logits: Tensor) -> None:
        """Draw the column after `self.column` from logits `[branches x B, K, V]` and write it where it is unknown."""
        if self.cache.room is not None and not (self.config.top_p and self.draws):
            from musicgen import kernels

            noise = self.noise if self.draws else None
            with torch.cuda.device_of(logits):
                kernels.say(
                    logits, self.scales, noise, self.columns, self.column, UNKNOWN,
                    top_k=self.config.top_k, temperature=self.config.temperature,
                )  # fmt: skip
            self.column += 1
            return
        if self.branches > 1:
            scales = self.scales.index_select(1, self.column)
            logits = sampling.guide(logits.chunk(self.branches), scales)
        noise = self.noise.index_select(1, self.column % NOISE_COLUMNS)[:, 0] if self.draws else None
        drawn = sampling.draw(logits, noise, self.config)[..., None]
        self.column += 1
        given = self.columns.index_select(2, self.column)
        self.columns.index_copy_(2, self.column, torch.where(given == UNKNOWN, drawn, given))

    def advance_in_spans(self) -> None:
        """The step as a GPU takes it: at a position that stands on the device, over a whole span of entries."""
        span = min(-(-(self.cache.position + 1) // SPAN) * SPAN, self.cache.capacity)
        if self.cache.room is not None:
            span = self.cache.capacity  # its kernels read no further than the position: one graph for all
        if span in self.graphs:
            self.graphs[span].replay()
        elif self.capture and span in self.warm:
            graph = torch.cuda.CUDAGraph()
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # the graphs run one at a time: one memory pool
            stream = _capture_stream(self.columns.device)
            # Other threads (a loader, a logger) may talk to the device meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                self._step(span)
            self.graphs[span] = graph
            graph.replay()
        else:
            self.warm.add(span)
            self._step(span)
        self.cache.position += 1
