"""What an item hears beside its caption: the melody of its crop and its named attributes, read from the shards.

Both are dropped on their own, addressed by (seed, step, item), and together with the caption where the whole condition
is dropped; validation hears all of them. Attributes whose labels were not named take those of the training tracks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from musicgen import attributes as named
from musicgen.chroma import HOP, NONE
from musicgen.config import ConditionConfig, LMConfig
from pipelines.shard import ShardSet
from training import plan
from training.sources import Sources

LABEL_TRACKS = 20_000  # tracks whose records are read for labels


def with_labels(lm: LMConfig, shards: ShardSet | Sources, rows: np.ndarray) -> LMConfig:
    """The model's settings with the labels that the tracks `rows` have, where its attributes name none."""
    if all(a.size for a in lm.condition.attributes):
        return lm
    if len(rows) > LABEL_TRACKS:
        rows = rows[np.linspace(0, len(rows) - 1, LABEL_TRACKS).astype(int)]
    found = named.learned(lm.condition.attributes, [shards.meta(int(row)) for row in rows])
    return dataclasses.replace(lm, condition=dataclasses.replace(lm.condition, attributes=found))


def melodies(shards: ShardSet | Sources, items: Sequence[plan.Item], dropout: float) -> Tensor:
    """Pitch classes uint8 `[B, C]` of each crop, 255 beyond its end and for an item that lost its melody."""
    codec = shards.info["codec"]
    per_frame = codec["sample_rate_hz"] / codec["frame_rate"] / HOP  # chroma frames per codec frame, 5 of 32
    longest = 1 + int(max(item.frames for item in items) * per_frame)
    out = np.full((len(items), longest), NONE, dtype=np.uint8)
    for row, item in enumerate(items):
        dropped = item.words and np.random.default_rng((*item.words[:-1], 3)).random() < dropout
        if item.keep_condition and not dropped and item.frames:
            start = round(item.start * per_frame)
            crop = shards.chroma(item.row)[start : start + 1 + int(item.frames * per_frame)]
            out[row, : len(crop)] = crop
    return torch.from_numpy(out)


def attributes(shards: ShardSet | Sources, items: Sequence[plan.Item], condition: ConditionConfig) -> Tensor:
    """Shares of the attributes' rows `[B, N]` float32 of each item, without those it lost."""
    rows = []
    for item in items:
        keep = [item.keep_condition] * len(condition.attributes)
        if item.words and item.keep_condition:
            keep = named.kept(condition.attributes, (*item.words[:-1], 2))
        rows.append(named.of_record(condition.attributes, shards.meta(item.row), keep))
    return torch.from_numpy(np.stack(rows))
