"""Melodies and excerpts made worse in training: addressed, as often as asked, never in validation, off by default."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from musicgen.chroma import NONE
from musicgen.config import ConditionConfig, StyleConfig
from musicgen.style import NONE as NO_CODE
from pipelines.shard import ShardSet
from tests.training.synthetic import write_dataset
from training import augment, controls, plan
from training import data as reading
from training.augment import AugmentConfig


def versions(number: int, frames: int) -> np.ndarray:
    """A track's chroma, rising by a semitone per frame, and two variants, all C and all D."""
    count = 1 + frames * 640 // 4096
    return np.stack([np.arange(count) % 12, np.zeros(count, int), np.full(count, 2)])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("data") / "set"
    return ShardSet.open(str(write_dataset(folder, tracks=12, size=64, valid=2, melody=versions)))


def items(count: int, valid: bool = False) -> list[plan.Item]:
    return [
        plan.Item(3, i, 2, 0, 64, caption=0.0, keep_condition=True, words=() if valid else (7, 3, i, 1))
        for i in range(count)
    ]


def test_the_set_keeps_variants_and_its_own_chroma_first(shards: ShardSet) -> None:
    own, count = shards.chroma(0), len(shards.chroma(0))
    assert np.array_equal(own, np.arange(count) % 12) and shards.chromas(0).shape == (3, count)


def test_off_by_default(shards: ShardSet) -> None:
    assert torch.equal(
        controls.melodies(shards, items(50), 0.3, AugmentConfig()), controls.melodies(shards, items(50), 0.3)
    )


def test_frames_are_lost_and_change_places(shards: ShardSet) -> None:
    many = items(400)
    clean = controls.melodies(shards, many, 0.0)
    holes = controls.melodies(shards, many, 0.0, AugmentConfig(frame_dropout=0.25))
    lost = holes == NONE
    assert 0.2 < float(lost.float().mean()) < 0.3 and torch.equal(holes[~lost], clean[~lost])
    moved = controls.melodies(shards, many, 0.0, AugmentConfig(frame_jitter=0.4)).int() - clean.int()
    assert 0.3 < float((moved != 0).float().mean()) < 0.45 and set(moved.unique().tolist()) == {-1, 0, 1}
    worse = AugmentConfig(frame_dropout=0.25, frame_jitter=0.4, variants=0.5)
    some = controls.melodies(shards, many[5:9], 0.0, worse)
    assert torch.equal(some, controls.melodies(shards, many, 0.0, worse)[5:9]), "by the item's address alone"
    assert torch.equal(controls.melodies(shards, items(4, valid=True), 0.0, worse), clean[:4]), "not in validation"


def test_what_is_kept_is_made_worse_apart_from_what_is_dropped(shards: ShardSet) -> None:
    worse = controls.melodies(shards, items(1000), 0.5, AugmentConfig(frame_jitter=0.5))
    kept = worse[(worse != NONE).any(dim=1)]
    assert 400 < len(kept) < 600
    assert float((kept[:, 0] != 0).float().mean()) == pytest.approx(0.25, abs=0.06)  # the second frame in its place


def test_variants_are_heard_as_often_as_asked(shards: ShardSet) -> None:
    first = controls.melodies(shards, items(1000), 0.0, AugmentConfig(variants=0.6))[:, 5]
    shares = [float((first == value).float().mean()) for value in (5, 0, 2)]
    assert shares == pytest.approx([0.4, 0.3, 0.3], abs=0.06)
    assert augment.version(1, AugmentConfig(variants=1.0), (1,)) == 0, "a set without variants"


def test_an_excerpt_has_holes_too(shards: ShardSet) -> None:
    condition = ConditionConfig(style=StyleConfig(dim=8, latent_dim=16, min_seconds=0.4, max_seconds=0.4))
    clean = controls.excerpts(shards, items(40), condition, 0.0)
    worse = controls.excerpts(shards, items(40), condition, 0.0, AugmentConfig(frame_dropout=0.3, frame_jitter=0.3))
    heard = clean[:, 0] != NO_CODE
    lost = ((worse == NO_CODE).all(dim=1) & heard)[heard]
    assert 0.2 < float(lost.float().mean()) < 0.4
    kept = (worse[:, 0] != NO_CODE) & heard
    assert 0.05 < float((worse[:, 0][kept] != clean[:, 0][kept]).float().mean()) < 0.35


def test_it_reaches_the_batches(shards: ShardSet) -> None:
    condition = ConditionConfig(melody=True)
    made = [
        reading.Stream(
            shards,
            reading.BatchConfig(crop_seconds=1.28, size=8, melody_dropout=0.0, condition_dropout=0.0, augment=worse),
            seed=1,
            condition=condition,
        ).batch(0, 0)
        for worse in (AugmentConfig(), AugmentConfig(frame_dropout=0.5))
    ]
    assert made[0].chroma is not None and made[1].chroma is not None
    assert (made[1].chroma == NONE).sum() > (made[0].chroma == NONE).sum() + 10
    with pytest.raises(ValueError, match=r"augment.frame_dropout is 2"):
        AugmentConfig(frame_dropout=2)
