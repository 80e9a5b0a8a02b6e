"""Melodies and attributes reach the model in training: the right ones, dropped on their own, and they are learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen import attributes as named
from musicgen import generate, weights
from musicgen.attributes import AttributeConfig
from musicgen.chroma import NONE
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.lm import MusicLM
from pipelines.shard import ShardSet
from tests.training.synthetic import write_dataset
from training import controls, plan, train
from training import data as reading
from training.module import MusicLMModule
from training.optim import OptimConfig

GENRES = ("waltz", "jazz", "march", "folk")


def record(number: int) -> dict[str, object]:
    """A track that says what it is by attributes alone."""
    key = ("Am", "C major", "B♭ minor", "F#")[number % 4]
    tempo = 60.0 + 40 * (number % 4)
    return {"genre": GENRES[number % 4], "bpm": tempo, "key_signature": key, "captions": [], "descriptions": []}


def melody(number: int, frames: int) -> np.ndarray:
    """One pitch class after the other, from the track's own on."""
    return (np.arange(1 + frames * 640 // 4096) + number) % 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("data") / "set", tracks=24, size=64, valid=4, more=record, melody=melody
    )


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    return ShardSet.open(str(folder))


def item(
    row: int, start: int = 0, frames: int = 64, index: int = 0, keep: bool = True, valid: bool = False
) -> plan.Item:
    words = () if valid else (7, 3, index, 1)
    return plan.Item(3, index, row, start, frames, caption=0.0, keep_condition=keep, words=words)


def number_of(shards: ShardSet, row: int) -> int:
    return int(shards.meta(row)["track_id"].split("-")[1])


def test_labels_are_those_of_the_tracks(shards: ShardSet) -> None:
    lm = LMConfig(condition=ConditionConfig(attributes=(AttributeConfig("genre"), AttributeConfig("tempo"))))
    found = controls.with_labels(lm, shards, np.arange(len(shards))).condition.attributes
    assert found[0].values == tuple(sorted(GENRES)) and found[1] == AttributeConfig("tempo")


def test_the_key_is_heard_and_what_no_track_has_is_said(shards: ShardSet) -> None:
    key, other = AttributeConfig("key"), AttributeConfig("genre", values=("polka",))
    condition = ConditionConfig(attributes=(key,))
    for row in range(4):
        (heard,) = controls.attributes(shards, [item(row, valid=True)], condition).numpy()
        assert np.array_equal(heard, key.weights(str(record(number_of(shards, row))["key_signature"])))
    rows = np.arange(len(shards))
    assert controls.untrained(condition, shards, rows) == []
    (warning,) = controls.untrained(ConditionConfig(attributes=(key, other)), shards, rows)
    assert "attribute 'genre' stays untrained" in warning and "column 'genre' (known: polka)" in warning


def test_a_crop_hears_its_own_stretch_of_the_melody(shards: ShardSet) -> None:
    rows = controls.melodies(shards, [item(2), item(2, start=32), item(5, frames=32)], dropout=0.0)
    assert rows.dtype == torch.uint8 and rows.shape == (3, 11)
    first = number_of(shards, 2)
    assert rows[0].tolist() == [(first + i) % 12 for i in range(11)]
    assert rows[1].tolist() == [(first + 5 + i) % 12 for i in range(11)]
    assert rows[2, 6:].tolist() == [NONE] * 5
    many = [item(2, index=i) for i in range(1000)]
    lost = (controls.melodies(shards, many, dropout=0.3) == NONE).all(dim=1)
    assert 0.25 < float(lost.float().mean()) < 0.35
    assert (controls.melodies(shards, [item(2, keep=False)], 0.0) == NONE).all()
    assert not (controls.melodies(shards, [item(2, valid=True)], 1.0) == NONE).any(), "validation hears all"


def test_attributes_are_dropped_on_their_own(shards: ShardSet) -> None:
    condition = ConditionConfig(
        attributes=(AttributeConfig("genre", values=GENRES, dropout=0.2), AttributeConfig("tempo", dropout=0.7))
    )
    rows = controls.attributes(shards, [item(2, index=i) for i in range(1000)], condition)
    genre, tempo = rows[:, :4].any(dim=1).float(), rows[:, 4:].any(dim=1).float()
    assert abs(float(genre.mean()) - 0.8) < 0.05 and abs(float(tempo.mean()) - 0.3) < 0.05
    assert abs(float(torch.corrcoef(torch.stack([genre, tempo]))[0, 1])) < 0.1
    whole = named.weights(condition.attributes, {k: record(number_of(shards, 2))[f] for k, f in
                          (("genre", "genre"), ("tempo", "bpm"))})  # fmt: skip
    assert np.array_equal(controls.attributes(shards, [item(2, valid=True)], condition)[0].numpy(), whole)
    assert not controls.attributes(shards, [item(2, keep=False)], condition).any()


def test_what_only_attributes_and_melody_tell_is_learned(shards: ShardSet) -> None:
    """Without captions: after some steps both have lowered the loss of a batch, and the model misses either."""
    torch.manual_seed(0)
    condition = ConditionConfig(
        "minilm", 384, melody=True, chroma_frames=6, attributes=(AttributeConfig("genre", values=GENRES, dropout=0.1),)
    )
    lm = MusicLM(LMConfig(dim=32, num_layers=2, num_heads=2, codebook_size=64, condition=condition))
    batch = reading.BatchConfig(crop_seconds=0.64, size=16, accumulate=1, workers=0, melody_dropout=0.1)
    stream = reading.Stream(shards, batch, seed=1, condition=condition)
    module = MusicLMModule(
        lm, TextEncoder.load("minilm"), OptimConfig(), total_steps=60, crop_frames=stream.rule.frames
    )
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    [probe, *_] = reading.validation_batches(shards, batch, condition=condition)

    def score() -> float:
        with torch.no_grad():
            sums, counts = module.score(probe)
        return float((sums / counts).mean())

    before = score()
    for step in range(60):
        sums, counts = module.score(stream.batch(step, 0))
        (sums / counts).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = score()
    assert after < before - 0.5
    probe.attributes = None
    assert score() > after + 0.05, "the genre tells which codes"


def test_a_run_learns_its_attributes_and_its_release_takes_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--size", "demo", "--data", str(folder), "--run", str(tmp_path / "run"), "--steps", "2"]
    argv += ["--codebook_init", "false"]
    argv += ["--batch.size", "4", "--batch.crop_seconds", "0.64", "--batch.workers", "0", "--log.clips", "0"]
    argv += ["--lm.codebook_size", "64", "--hardware.accelerator", "cpu", "--hardware.precision", "float32"]
    argv += ["--lm.condition.attributes", '[{"name": "genre"}, {"name": "tempo"}, {"name": "key", "field": "key"}]']
    assert train.main(argv) == 0
    assert "warning   attribute 'key' stays untrained" in capsys.readouterr().out
    lm, info = weights.load_release(tmp_path / "run" / "release")
    genre, tempo, _ = lm.config.condition.attributes
    assert genre.values == tuple(sorted(GENRES)) and tempo.bins == 51
    assert train.main(argv) == 0, "the same command goes on with the same run"
    assert generate.Request([None], 1.0, [0], attributes=[{"genre": "jazz"}]).attributes == [{"genre": "jazz"}]
    assert info["lm"]["condition"]["attributes"][0]["field"] == "genre"
    heard = (genre, replace(tempo, dropout=0.1), AttributeConfig("key"))
    again = replace(lm.config, condition=replace(lm.config.condition, attributes=heard))
    release = tmp_path / "run" / "release"
    assert weights.initial_state(release, again, info["codec"], info["text_encoder"]), "another column, the same model"
