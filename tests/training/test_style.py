"""Excerpts in training: beside the crop, addressed, dropped on their own, and what they alone can tell is learned."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen import codec as codecs
from musicgen import weights
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig, StyleConfig
from musicgen.lm import MusicLM
from musicgen.style import NONE, Latents
from pipelines.shard import ShardSet
from tests.training.synthetic import small_codec, write_dataset
from training import controls, plan, state, train
from training import data as reading
from training.module import MusicLMModule
from training.optim import OptimConfig

STYLE = StyleConfig(dim=8, latent_dim=16, width=16, min_seconds=0.4, max_seconds=0.8)
CONDITION = ConditionConfig("minilm", 384, style=STYLE)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> codecs.Codec:
    return small_codec(tmp_path_factory.mktemp("codec") / "codec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, codec: codecs.Codec) -> Path:
    made_by = {"name": codec.name, "identity": codec.identity}
    silent = {"captions": [], "descriptions": []}
    return write_dataset(
        tmp_path_factory.mktemp("data") / "set", tracks=128, size=64, valid=32, codec=made_by, more=silent
    )


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    return ShardSet.open(str(folder))


def item(row: int, start: int = 32, index: int = 0, keep: bool = True, valid: bool = False) -> plan.Item:
    words = () if valid else (7, 3, index, 1)
    return plan.Item(3, index, row, start, 32, caption=0.0, keep_condition=keep, words=words)


def test_an_excerpt_is_another_stretch_of_the_track(shards: ShardSet) -> None:
    items = [item(row, index=i) for i in range(20) for row in (2, 5)]
    got = controls.excerpts(shards, items, CONDITION, dropout=0.0).numpy()
    assert got.dtype == np.int16 and got.shape == (40, 4, 40)
    assert np.array_equal(got[:3], controls.excerpts(shards, items[:3], CONDITION, dropout=0.0).numpy())
    places, lengths = set(), set()
    for one, excerpt in zip(items, got):
        frames = int((excerpt[0] != NONE).sum())
        codes, found = shards.codes(one.row), []
        for start in range(codes.shape[1] - frames + 1):
            if np.array_equal(codes[:, start : start + frames], excerpt[:, :frames]):
                found.append(start)
        assert any(start + frames <= 32 or start >= 64 for start in found), "in the track, beside the crop"
        assert 20 <= frames <= 40 and (excerpt[:, frames:] == NONE).all()
        places.update(found)
        lengths.add(frames)
    assert len(lengths) > 8 and len(places) > 20


def test_every_start_beside_the_crop_can_be_drawn() -> None:
    starts = {controls.start_beside(100, 30, 60, 20, where) for where in np.linspace(0, 0.9999, 500)}
    assert starts == {*range(11), *range(60, 81)}
    assert controls.start_beside(100, 10, 90, 20, 0.5) is None


def test_it_is_dropped_on_its_own_and_validation_hears_it(shards: ShardSet) -> None:
    many = [item(2, index=i) for i in range(1000)]
    lost = (controls.excerpts(shards, many, CONDITION, dropout=0.3) == NONE).all(dim=2).all(dim=1)
    melody = [np.random.default_rng((7, 3, i, 3)).random() < 0.3 for i in range(1000)]
    assert 0.25 < float(lost.float().mean()) < 0.35
    assert abs(np.corrcoef(lost.numpy(), melody)[0, 1]) < 0.1, "apart from the melody"
    assert (controls.excerpts(shards, [item(2, keep=False)], CONDITION, 0.0) == NONE).all()
    heard = controls.excerpts(shards, [item(2, valid=True)], CONDITION, 1.0)
    assert int((heard[0, 0] != NONE).sum()) == 30, "of the mean length"
    captions = {"captions": [{"text": "a waltz"}]}
    texts = [reading.training_text(captions, item(2, index=i), 0.0, 0.3) for i in range(1000)]
    assert 0.25 < texts.count(None) / 1000 < 0.35 and set(texts) == {None, "a waltz"}
    assert reading.training_text(captions, item(2), 0.0) == "a waltz"


def test_what_only_the_excerpt_tells_is_learned(shards: ShardSet, codec: codecs.Codec) -> None:
    """Without captions: after some steps another track's excerpt, or none, loses."""
    torch.manual_seed(0)
    condition = ConditionConfig("minilm", 384, style=dataclasses.replace(STYLE, dim=16, width=32))
    lm = MusicLM(LMConfig(dim=32, num_layers=2, num_heads=2, codebook_size=64, condition=condition))
    batch = reading.BatchConfig(
        crop_seconds=0.64, size=32, accumulate=1, workers=0, style_dropout=0.05, condition_dropout=0.0
    )
    stream = reading.Stream(shards, batch, seed=1, condition=condition)
    encoder = TextEncoder.load("minilm")
    options = {"total_steps": 100, "crop_frames": stream.rule.frames, "latents": Latents(codec)}
    module = MusicLMModule(lm, encoder, OptimConfig(), **options)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    rows = shards.rows("valid")
    probe = stream.batch(10_000, 0)
    probe.style = controls.excerpts(shards, [item(int(row), valid=True) for row in rows], CONDITION, 0.0)
    probe.codes = torch.from_numpy(np.stack([shards.codes(int(row))[:, 32:64] for row in rows]))
    probe.valid = torch.arange(32).expand(32, 32) < 1  # the first code of a crop, which nothing before it tells
    probe.valid_frames = np.full(32, 1)

    def score() -> float:
        with torch.no_grad():
            sums, counts = module.score(probe)
        return float((sums / counts).mean())

    before = score()
    for step in range(100):
        made = stream.batch(step, 0)
        made.valid &= torch.arange(32) < 1
        made.valid_frames[:] = 1
        sums, counts = module.score(made)
        (sums / counts).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    right, own = score(), probe.style
    other = torch.tensor([(row + 1) % 32 for row in range(32)])
    probe.style = own[other]
    wrong = score()
    probe.style = torch.full_like(own, NONE)
    without = score()
    assert right < before - 0.5 and wrong > right + 0.3 and without > right + 0.1, (before, right, wrong, without)


def test_a_run_adds_a_style_to_a_release_and_goes_on_to_the_bit(
    folder: Path,
    codec: codecs.Codec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    common = shlex.split(
        "--size demo --codebook_init false --lm.dim 32 --lm.num_layers 2 --lm.num_heads 2 --lm.codebook_size 64 "
        "--batch.crop_seconds 0.64 --batch.size 4 --batch.workers 0 --log.clips 0 --hardware.accelerator cpu "
        "--hardware.precision float32 --log.valid_every 1 --log.state_every 1 --optim.lr 1e-2 --optim.warmup_steps 0"
    )
    common += ["--data", str(folder)]
    style = shlex.split("--lm.condition.style.dim 8 --lm.condition.style.width 16 --lm.condition.style.min_seconds 0.4 "
                        "--lm.condition.style.max_seconds 0.8")  # fmt: skip
    assert train.main([*common, "--run", str(tmp_path / "base"), "--steps", "1"]) == 0
    assert "hears     text by minilm (frozen, " in capsys.readouterr().out
    assert not any("style" in name for name in state.tensors(tmp_path / "base" / "state" / "step-1"))
    init = [*common, *style, "--init", str(tmp_path / "base" / "release"), "--steps", "4"]
    assert train.main([*init, "--run", str(tmp_path / "whole")]) == 0
    assert train.main([*init, "--run", str(tmp_path / "cut"), "--stop_at", "2"]) == 0
    assert train.main([*init, "--run", str(tmp_path / "cut")]) == 0
    whole, cut = (state.tensors(tmp_path / run / "state" / "step-4") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    lm, _ = weights.load_release(tmp_path / "whole" / "release")
    assert lm.config.condition.style.latent_dim == Latents(codec).dim
    assert "transformer.layers.1.style.weight" in lm.state_dict(), "named, and in the release"
    assert whole["model/transformer.layers.1.style.weight"].any(), "and trained"
