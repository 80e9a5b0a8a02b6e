"""What an item hears beside its caption: its crop's melody, its named attributes, an excerpt of its track as style.

All are read from the shards, dropped on their own, addressed by (seed, step, item), and together with the caption where
the whole condition is dropped; validation hears all of them. Attributes whose labels were not named take those of the
training tracks. The excerpt is another stretch of the track, drawn among those that do not touch the crop, so that it
cannot tell the very codes that are asked for; a track too short for that trains without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen import attributes as named
from musicgen.chroma import HOP, NONE
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.errors import UserError
from musicgen.style import NONE as NO_CODE
from musicgen.style import Latents
from pipelines.shard import ShardSet
from training import augment, plan
from training.augment import AugmentConfig
from training.sources import Sources

LABEL_TRACKS = 20_000  # tracks whose records are read for labels


def with_labels(lm: LMConfig, shards: ShardSet | Sources, rows: np.ndarray) -> LMConfig:
    """The model's settings with the labels that the tracks `rows` have, where its attributes name none."""
    if all(a.size for a in lm.condition.attributes):
        return lm
    found = named.learned(lm.condition.attributes, _records(shards, rows))
    return dataclasses.replace(lm, condition=dataclasses.replace(lm.condition, attributes=found))


def untrained(condition: ConditionConfig, shards: ShardSet | Sources, rows: np.ndarray) -> list[str]:
    """A warning for each attribute of which no track of `rows` has a value that it knows."""
    return [
        f"warning   attribute {a.name!r} stays untrained: no training track has a value of it in column {a.field!r} "
        f"({'known: ' + ', '.join(a.values[:8]) if a.values else f'from {a.low:g} to {a.high:g}'}"
        f"{' …' if len(a.values) > 8 else ''}); name its field or values in --lm.condition.attributes, or leave it out"
        for a in named.unheard(condition.attributes, _records(shards, rows))
    ]


def _records(shards: ShardSet | Sources, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    if len(rows) > LABEL_TRACKS:
        rows = rows[np.linspace(0, len(rows) - 1, LABEL_TRACKS).astype(int)]
    return (shards.meta(int(row)) for row in rows)


def with_latents(lm: LMConfig, latents: Latents | None) -> LMConfig:
    """The model's settings with the width of the codec's latents, where it has a style.

    Raises:
        UserError: the settings say another width.
    """
    style = lm.condition.style
    if latents is None:
        return lm
    if style.latent_dim not in (0, latents.dim):
        raise UserError(
            f"lm.condition.style.latent_dim is {style.latent_dim}, the latents of DATA's codec have width "
            f"{latents.dim}; leave the setting out"
        )
    style = dataclasses.replace(style, latent_dim=latents.dim)
    return dataclasses.replace(lm, condition=dataclasses.replace(lm.condition, style=style))


def described(condition: ConditionConfig, encoder: TextEncoder) -> str:
    """One line about what a model hears, and that the encoder of its text stays as it is."""
    frozen = sum(p.numel() for p in encoder.model.parameters())
    heard = [f"text by {encoder.name} (frozen, {frozen / 1e6:.1f} M parameters beside the model)"]
    heard += [f"melody of {condition.chroma_frames} chroma frames"] if condition.melody else []
    heard += [f"attributes {', '.join(a.name for a in condition.attributes)}"] if condition.attributes else []
    style = condition.style
    heard += [f"style of excerpts of {style.min_seconds:g} to {style.max_seconds:g} s"] if style.dim else []
    return "; ".join(heard)


def _address(item: plan.Item, what: int) -> tuple[int, ...]:
    """Seed of one of an item's draws beside the words; that of a validation crop comes from its place."""
    return (*item.words[:-1], what) if item.words else (item.row, item.start, what)


def excerpts(
    shards: ShardSet | Sources,
    items: Sequence[plan.Item],
    condition: ConditionConfig,
    dropout: float,
    worse: AugmentConfig | None = None,
) -> Tensor:
    """Codes of each item's excerpt, int16 `[B, K, F]`, -1 beyond its end and for an item without a style."""
    style, rate = condition.style, shards.info["codec"]["frame_rate"]
    shortest, longest = round(style.min_seconds * rate), round(style.max_seconds * rate)
    out = np.full((len(items), int(shards.info["codec"]["num_codebooks"]), longest), NO_CODE, dtype=np.int16)
    for row, item in enumerate(items):
        drop, length, where = np.random.default_rng(_address(item, 4)).random(3)
        if not item.keep_condition or not item.frames or (item.words and drop < dropout):
            continue
        frames = shortest + int(length * (longest - shortest + 1)) if item.words else (shortest + longest) // 2
        codes = shards.codes(item.row)
        start = start_beside(codes.shape[1], item.start, item.start + item.frames, frames, float(where))
        if start is not None:
            excerpt = codes[:, start : start + frames]
            if worse is not None and item.words:
                source, lost = augment.frames(frames, worse, _address(item, 6))
                excerpt = np.where(lost, np.int16(NO_CODE), excerpt[:, source])
            out[row, :, :frames] = excerpt
    return torch.from_numpy(out)


def start_beside(total: int, first: int, stop: int, frames: int, where: float) -> int | None:
    """Start of an excerpt of `frames` frames before `first` or from `stop` on; `where` in [0, 1) chooses among all."""
    before, after = max(0, first - frames + 1), max(0, total - stop - frames + 1)
    place = int(where * (before + after))
    if before + after == 0:
        return None
    return place if place < before else stop + place - before


def melodies(
    shards: ShardSet | Sources, items: Sequence[plan.Item], dropout: float, worse: AugmentConfig | None = None
) -> Tensor:
    """Pitch classes uint8 `[B, C]` of each crop, 255 beyond its end and for an item that lost its melody."""
    codec = shards.info["codec"]
    per_frame = codec["sample_rate_hz"] / codec["frame_rate"] / HOP  # chroma frames per codec frame, 5 of 32
    longest = 1 + int(max(item.frames for item in items) * per_frame)
    out = np.full((len(items), longest), NONE, dtype=np.uint8)
    for row, item in enumerate(items):
        dropped = item.words and np.random.default_rng(_address(item, 3)).random() < dropout
        if item.keep_condition and not dropped and item.frames:
            start = round(item.start * per_frame)
            versions, which = shards.chromas(item.row), 0
            if worse is not None and item.words:
                which = augment.version(len(versions), worse, _address(item, 8))
            crop = versions[which, start : start + 1 + int(item.frames * per_frame)]
            if worse is not None and item.words:
                source, lost = augment.frames(len(crop), worse, _address(item, 5))
                crop = np.where(lost, np.uint8(NONE), crop[source])
            out[row, : len(crop)] = crop
    return torch.from_numpy(out)


def attributes(shards: ShardSet | Sources, items: Sequence[plan.Item], condition: ConditionConfig) -> Tensor:
    """Shares of the attributes' rows `[B, N]` float32 of each item, without those it lost."""
    rows = []
    for item in items:
        keep = [item.keep_condition] * len(condition.attributes)
        if item.words and item.keep_condition:
            keep = named.kept(condition.attributes, _address(item, 2))
        rows.append(named.of_record(condition.attributes, shards.meta(item.row), keep))
    return torch.from_numpy(np.stack(rows))
