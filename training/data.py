"""From shards to batches: random access through the index, crops by the plan, collation.

A batch is addressed by its step. The stream below yields this rank's parts of step s, s+1, ... from wherever the run
stands; it has no state of its own, and no shuffle buffer. Caption variants, word dropout and condition dropout are
applied here and never at ingest, and captions are tokenised here, in the workers; validation hears the raw description.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import util
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling

from musicgen.conditioning import CaptionTokenizer, Tokens, drop_words
from musicgen.config import ConditionConfig
from musicgen.errors import UserError
from pipelines.shard import ShardSet
from training import controls, loss, plan
from training.augment import AugmentConfig
from training.launch import SIGNALS
from training.sources import Sources


@dataclass(frozen=True)
class BatchConfig:
    """What a step reads.

    Args:
        crop_seconds: length of a crop.
        size: items of the global batch, over all ranks and accumulated parts.
        accumulate: parts into which a rank's share of the batch is split to save memory; 0 takes as few as fit.
        min_segment_ratio: least share of a crop inside its track.
        tail_seconds: last seconds of a track that crops leave out (see `plan.CropRule`).
        sample_by: `tracks` draws each track alike (the reference), `seconds` each second of audio alike.
        condition_dropout: probability per item of training without its condition (needed for guidance).
        word_dropout: probability per word of a training caption of being dropped.
        text_dropout: probability per item of training without its caption alone, which a scale of its own for a melody
            or a style needs; the reference has 0 for text and melody, 0.4 for text and style.
        melody_dropout: probability per item of training without its melody, where the model listens to one.
        style_dropout: the same for the excerpt, where the model has a style.
        augment: how melodies and excerpts are made worse.
        workers: processes that read ahead; 0 reads in the training process.
        valid_crops: most crops that a validation scores.
        valid_batch: crops per forward pass of validation, on each rank.
    """

    crop_seconds: float = 30.0
    size: int = 192
    accumulate: int = 0
    min_segment_ratio: float = 0.8
    tail_seconds: float = 0.0
    sample_by: Literal["tracks", "seconds"] = "tracks"
    condition_dropout: float = 0.2
    word_dropout: float = 0.3
    text_dropout: float = 0.0
    melody_dropout: float = 0.5
    style_dropout: float = 0.4
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    workers: int = 4
    valid_crops: int = 1000
    valid_batch: int = 16

    def __post_init__(self) -> None:
        if not 0.64 <= self.crop_seconds <= 300:
            raise ValueError(f"batch.crop_seconds is {self.crop_seconds}; it must be 0.64 to 300 seconds")
        for name, least in (("size", 1), ("accumulate", 0), ("workers", 0), ("valid_crops", 1), ("valid_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"batch.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("condition_dropout", "word_dropout", "text_dropout", "melody_dropout", "style_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"batch.{name} is {getattr(self, name)}; it must be in [0, 1]")
        if not 0 <= self.tail_seconds <= 60:
            raise ValueError(f"batch.tail_seconds is {self.tail_seconds}; it must be 0 to 60 seconds")
        if not 0 < self.min_segment_ratio <= 1:
            raise ValueError(f"batch.min_segment_ratio is {self.min_segment_ratio}; it must be above 0 and at most 1")


@dataclass
class Batch:
    """This rank's part of a step.

    Attributes:
        codes: int16 `[B, K, T]`; padded frames hold 0 and are marked in `valid`.
        valid: bool `[B, T]`.
        texts: B captions; None is the null condition.
        valid_frames: valid frames of every item of the *global* batch.
        step: 0-based step, -1 in validation.
        keys: the tracks' keys, for messages.
        tokens: the captions as the text encoder's ids; None where they were not asked for.
        chroma: uint8 `[B, C]`, the crops' melodies; None for a model without melody input.
        attributes: float32 `[B, N]`, shares of the attributes' rows; None for a model without attributes.
        style: int16 `[B, K, F]`, codes of excerpts, -1 for none; None for a model without a style.
    """

    codes: Tensor
    valid: Tensor
    texts: list[str | None]
    valid_frames: np.ndarray
    step: int
    keys: list[str]
    tokens: Tokens | None = None
    chroma: Tensor | None = None
    attributes: Tensor | None = None
    style: Tensor | None = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tokens = None if self.tokens is None else self.tokens.apply(change)
        chroma = None if self.chroma is None else change(self.chroma)
        attributes = None if self.attributes is None else change(self.attributes)
        style = None if self.style is None else change(self.style)
        codes, valid = change(self.codes), change(self.valid)
        return replace(self, codes=codes, valid=valid, tokens=tokens, chroma=chroma, attributes=attributes, style=style)

    def to(self, device: torch.device | str, **options: Any) -> Batch:
        """The batch with its tensors on a device (Lightning calls this); nobody waits for a GPU's copy."""
        options.setdefault("non_blocking", torch.device(device).type == "cuda")
        return self._each(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (the loader calls this where there is a GPU)."""
        return self._each(lambda tensor: tensor.pin_memory())


def tracks_of(shards: ShardSet | Sources, split: str) -> plan.Tracks:
    """The tracks of a split with at least one frame and a positive weight."""
    rows = shards.rows(split)
    frames = shards.index.column("frames").to_numpy()[rows].astype(np.int64)
    weights = shards.index.column("weight").to_numpy()[rows].astype(np.float64)
    usable = (frames > 0) & (weights > 0)
    source, shares = (shards.source[rows][usable], shards.shares) if isinstance(shards, Sources) else (None, None)
    return plan.Tracks(rows[usable], frames[usable], weights[usable], source, shares)


def crop_rule(config: BatchConfig, frame_rate: float) -> plan.CropRule:
    """The plan's rule for these settings at the codec's frame rate."""
    return plan.CropRule(
        frames=round(config.crop_seconds * frame_rate),
        min_segment_ratio=config.min_segment_ratio,
        tail_frames=round(config.tail_seconds * frame_rate),
        sample_by=config.sample_by,
        condition_dropout=config.condition_dropout,
    )


def training_text(meta: dict[str, Any], item: plan.Item, word_dropout: float, text_dropout: float = 0.0) -> str | None:
    """The caption a training item hears: one of the variants, words dropped; None when it is dropped itself."""
    variants = meta.get("captions") or meta.get("descriptions") or []
    if not item.keep_condition or not variants:
        return None
    if text_dropout and np.random.default_rng((*item.words[:-1], 7)).random() < text_dropout:
        return None
    text = variants[int(item.caption * len(variants))]["text"]
    return drop_words(text, word_dropout, np.random.default_rng(item.words)) or None


def raw_text(meta: dict[str, Any]) -> str | None:
    """The description as the catalogue gives it (the first one), or None."""
    descriptions = meta.get("descriptions") or []
    return (descriptions[0]["text"] or None) if descriptions else None


def collate(
    shards: ShardSet | Sources,
    items: Sequence[plan.Item],
    texts: list[str | None],
    crop_frames: int,
    condition: ConditionConfig | None = None,
    melody_dropout: float = 0.0,
    style_dropout: float = 0.0,
    worse: AugmentConfig | None = None,
) -> Batch:
    """Read the crops of `items`, with what `condition` hears beside text, into one batch.

    Its `valid_frames` are those of these items.
    """
    books = int(shards.info["codec"]["num_codebooks"])
    codes = np.zeros((len(items), books, crop_frames), dtype=np.int16)
    for row, item in enumerate(items):
        codes[row, :, : item.frames] = shards.codes(item.row)[:, item.start : item.start + item.frames]
    frames = np.array([item.frames for item in items], dtype=np.int64)
    valid = np.arange(crop_frames)[None, :] < frames[:, None]
    keys = shards.index.column("key")
    return Batch(
        codes=torch.from_numpy(codes),
        valid=torch.from_numpy(valid),
        texts=texts,
        valid_frames=frames,
        step=items[0].step,
        keys=[keys[item.row].as_py() for item in items],
        chroma=controls.melodies(shards, items, melody_dropout, worse) if condition and condition.melody else None,
        attributes=controls.attributes(shards, items, condition) if condition and condition.attributes else None,
        style=controls.excerpts(shards, items, condition, style_dropout, worse)
        if condition and condition.style.dim
        else None,
    )


class Stream(IterableDataset):
    """This rank's batches from step `start` on, `accumulate` parts per step, without end.

    Args:
        start: first step.
        rank, world: this process among all.
        tokenize: turns captions into ids; without it a batch carries its texts alone.
        condition: what the model hears, for melodies, attributes and excerpts.
    """

    def __init__(
        self,
        shards: ShardSet | Sources,
        config: BatchConfig,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        tokenize: CaptionTokenizer | None = None,
        condition: ConditionConfig | None = None,
    ) -> None:
        self.shards, self.config, self.tokenize, self.condition = shards, config, tokenize, condition
        self.parts = max(config.accumulate, 1)
        self.seed, self.start, self.rank, self.world = seed, start, rank, world
        self.rule = crop_rule(config, shards.info["codec"]["frame_rate"])
        self.tracks = tracks_of(shards, "train")
        self.line = plan.cumulative(self.tracks, self.rule)

    def batch(self, step: int, part: int) -> Batch:
        """Part `part` of this rank's share of step `step`."""
        items, frames = plan.batch(
            step,
            self.seed,
            self.tracks,
            self.rule,
            size=self.config.size,
            rank=self.rank,
            world=self.world,
            line=self.line,
        )
        share = len(items) // self.parts
        items = items[part * share : (part + 1) * share]
        config, metas = self.config, [self.shards.meta(i.row) for i in items]
        texts = [training_text(m, i, config.word_dropout, config.text_dropout) for m, i in zip(metas, items)]
        beside = config.melody_dropout, config.style_dropout, config.augment
        made = collate(self.shards, items, texts, self.rule.frames, self.condition, *beside)
        made.valid_frames = frames
        made.tokens = self.tokenize(texts) if self.tokenize else None
        return made

    def __iter__(self) -> Iterator[Batch | UserError]:
        # Worker w of n makes every n-th part; the loader takes them in turn, so the order is that of one process.
        info = get_worker_info()
        position, stride = (info.id, info.num_workers) if info else (0, 1)
        while True:
            try:
                yield self.batch(self.start + position // self.parts, position % self.parts)
            except UserError as error:  # handed over as it is: a worker's own errors arrive as a traceback
                yield error
                return
            position += stride


class Loader(DataLoader):
    """A loader of whole batches that looks `ahead`, so that what cannot be read is known while there is time to save.

    Attributes:
        ahead: batches that are fetched before they are needed.
        needed: batches that the run will take; no further ahead than that.
        waited: seconds that the batches took.
        failed: why there are no more batches than those fetched; raised once they are used up.
        agree: makes one answer of what the first batches of each rank failed with, since a rank without a step would
            be waited for in it.
    """

    ahead = 0
    needed = 0
    waited = 0.0
    failed: UserError | None = None
    agree: Callable[[UserError | None], UserError | None] | None = None

    def __iter__(self) -> Any:
        batches: Any = super().__iter__()
        workers = getattr(batches, "_workers", [])
        # At exit Python asks forgotten workers to leave by SIGTERM, which these ignore, and waits without end.
        at_exit = util.Finalize(None, _kill, (workers,), exitpriority=0)
        try:
            yield from self._held(batches)
        finally:
            at_exit.cancel()
            if workers and batches._worker_pids_set:
                # While torch watches a worker, its end is an error in whatever the main thread does then.
                signal_handling._remove_worker_pids(id(batches))
                batches._worker_pids_set = False
            _kill(workers)  # asked to leave, each takes seconds

    def _held(self, batches: Any) -> Iterator[Batch]:
        """The batches, of which some are held until they are needed."""
        held: deque[Batch] = deque()
        taken = 0
        while True:
            began = time.perf_counter()
            while self.failed is None and (not held or len(held) <= min(self.ahead, self.needed - taken - 1)):
                made = next(batches, None)
                if made is None:
                    break
                if isinstance(made, UserError):
                    self.failed = made
                else:
                    held.append(made)
            self.waited += time.perf_counter() - began
            if not taken and self.agree is not None:
                self.failed = self.agree(self.failed)
            if self.failed is not None and not (taken and held):
                raise self.failed
            if not held:
                return
            taken += 1
            yield held.popleft()


def training_loader(stream: Stream, *, pin_memory: bool = False) -> Loader:
    """A loader over the stream; batches come whole from the stream, so nothing is collated here."""
    workers = stream.config.workers
    return Loader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals,
    )


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _leave_signals(worker: int) -> None:
    """Slurm and a terminal signal every process; only the training acts on it, and still needs its workers then."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def validation_batches(
    shards: ShardSet | Sources,
    config: BatchConfig,
    *,
    rank: int = 0,
    world: int = 1,
    condition: ConditionConfig | None = None,
) -> list[Batch]:
    """This rank's part of the fixed validation crops; empty when the data set has no validation tracks.

    Every rank has as many batches, because sharded ranks compute in step; what is missing is filled with empty crops.
    """
    rule = crop_rule(config, shards.info["codec"]["frame_rate"])
    every = plan.validation(tracks_of(shards, "valid"), rule, config.valid_crops)
    items = every[rank::world]
    if every:
        items += [replace(every[0], frames=0)] * (-(-len(every) // world) - len(items))
    parts = [items[i : i + config.valid_batch] for i in range(0, len(items), config.valid_batch)]
    texts = [[raw_text(shards.meta(i.row)) for i in part] for part in parts]
    return [collate(shards, part, words, rule.frames, condition) for part, words in zip(parts, texts)]


def unigram_loss(shards: ShardSet | Sources, config: BatchConfig, at_most: int = 3000) -> np.ndarray:
    """The line that a validation loss is read against, nats `[K]`: a unigram model on the same validation crops.

    It has counted the codes of (an even selection of `at_most`) training tracks. Without validation tracks it is
    scored on what it has counted: the unigram entropy of the training tokens.
    """
    codec = shards.info["codec"]
    rows = tracks_of(shards, "train").rows
    if len(rows) > at_most:
        rows = rows[np.linspace(0, len(rows) - 1, at_most).astype(int)]
    shape = codec["num_codebooks"], codec["codebook_size"]
    known = loss.token_counts((shards.codes(int(row)) for row in rows), *shape)
    crops = (
        codes[:, : int(valid.sum())].numpy()
        for batch in validation_batches(shards, config)
        for codes, valid in zip(batch.codes, batch.valid)
    )
    scored = loss.token_counts(crops, *shape)
    return loss.unigram_loss(known, scored if scored.any() else known)


def check(
    shards: ShardSet | Sources, config: BatchConfig, *, world: int, num_codebooks: int, codebook_size: int
) -> None:
    """Refuse a data set that this model or these settings cannot train on.

    Raises:
        UserError: other codebooks than the model's, no training tracks (in one of the sets of a mixture), a batch that
            does not divide.
    """
    codec = shards.info["codec"]
    if (codec["num_codebooks"], codec["codebook_size"]) != (num_codebooks, codebook_size):
        raise UserError(
            f"DATA holds tokens of codec {codec['name']!r} with {codec['num_codebooks']} codebooks of "
            f"{codec['codebook_size']} codes; the model expects {num_codebooks} of {codebook_size}. "
            + (
                "Tokens of left and right are those of a mono codec in twice the codebooks: `make ingest "
                "ARGS='--channels 2'`"
                if num_codebooks == 2 * codec["num_codebooks"]
                else "Ingest with the codec that belongs to the model, or set --lm.num_codebooks and --lm.codebook_size"
            )
        )
    tracks = tracks_of(shards, "train")
    if len(tracks) == 0:
        raise UserError(
            f"DATA={str(shards.root)!r} holds no training tracks ({len(shards)} tracks in all); "
            "ingest more tracks: splits are decided by hash of artist and work"
        )
    if isinstance(shards, Sources) and tracks.source is not None:
        counts = np.bincount(tracks.source, minlength=len(shards.sets))
        empty = [str(one.root) for one, count in zip(shards.sets, counts) if not count]
        if empty:
            raise UserError(
                f"DATA mixes sets, of which {', '.join(map(repr, empty))} has no training tracks (or --select leaves "
                "none of it), so that it cannot have its share; leave it out of DATA, or ingest more tracks"
            )
    parts = world * max(config.accumulate, 1)
    if config.size % parts:
        near = sorted({max(config.size // parts, 1) * parts, (config.size // parts + 1) * parts})
        raise UserError(
            f"batch.size {config.size} must be a multiple of {world} processes"
            + (f" x batch.accumulate {config.accumulate}" if config.accumulate > 1 else "")
            + f"; for instance {' or '.join(map(str, near))}"
        )
