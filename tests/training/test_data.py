"""From real shards to batches: padding, captions, drop-outs, workers, and data sets that do not fit."""

import dataclasses
import gc
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from musicgen.conditioning import TextEncoder
from musicgen.errors import UserError
from pipelines.shard import ShardSet
from tests.training.synthetic import STYLES, write_dataset
from training import data, loss, plan
from training.data import BatchConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(str(write_dataset(tmp_path_factory.mktemp("data") / "set", size=64)))


CONFIG = BatchConfig(crop_seconds=4.0, size=8, workers=0)


def stream(shards: ShardSet, config: BatchConfig = CONFIG, **more: Any) -> data.Stream:
    return data.Stream(shards, config, seed=5, **more)


def test_crops_are_cut_out_of_their_tracks(shards: ShardSet) -> None:
    made = stream(shards)
    batch = made.batch(3, 0)
    items, frames = plan.batch(3, 5, made.tracks, made.rule, size=8)
    assert batch.codes.dtype == torch.int16 and batch.codes.shape == (8, 4, 200)
    for row, item in enumerate(items):
        crop = shards.codes(item.row)[:, item.start : item.start + item.frames]
        assert np.array_equal(batch.codes[row, :, : item.frames], crop)
        assert batch.valid[row].tolist() == [True] * item.frames + [False] * (200 - item.frames)
    assert np.array_equal(batch.valid_frames, frames) and min(frames) < 200  # some crops are short here


def test_stream_starts_anywhere_and_splits_in_any_way(shards: ShardSet) -> None:
    def first(n: int, **more: int) -> list[data.Batch]:
        batches = iter(stream(shards, **more))
        return [next(batches) for _ in range(n)]

    whole = first(4)
    late = first(2, start=2)
    assert [b.step for b in late] == [2, 3]
    for a, b in zip(whole[2:], late):
        assert torch.equal(a.codes, b.codes) and a.texts == b.texts
    halves = [first(2, rank=r, world=2)[1] for r in range(2)]
    assert torch.equal(torch.cat([h.codes for h in halves]), whole[1].codes)
    assert [t for h in halves for t in h.texts] == whole[1].texts
    quarters = iter(stream(shards, BatchConfig(crop_seconds=4.0, size=8, accumulate=4, workers=0)))
    parts = [next(quarters) for _ in range(8)][4:]
    assert torch.equal(torch.cat([p.codes for p in parts]), whole[1].codes) and parts[0].step == 1
    assert np.array_equal(parts[0].valid_frames, whole[1].valid_frames)


@pytest.mark.parametrize(("workers", "parts"), [(2, 1), (1, 2), (3, 2), (5, 4)])
def test_workers_read_the_same_in_the_same_order(shards: ShardSet, workers: int, parts: int) -> None:
    alone = iter(data.training_loader(stream(shards)))
    config = BatchConfig(crop_seconds=4.0, size=8, workers=workers, accumulate=parts)
    helped = iter(data.training_loader(stream(shards, config, start=1)))
    next(alone)
    for _ in range(4):
        a, found = next(alone), [next(helped) for _ in range(parts)]
        assert torch.equal(a.codes, torch.cat([b.codes for b in found])) and {b.step for b in found} == {a.step}
        assert a.texts == [text for b in found for text in b.texts]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_workers_of_forgotten_batches_leave_without_a_word(shards: ShardSet, in_a_cycle: bool) -> None:
    """Killed while torch watches them, they raise an error in whatever the main thread does then."""
    batches: Any = iter(data.training_loader(stream(shards, BatchConfig(crop_seconds=1.0, size=8, workers=2))))
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    box: list[Any] = [batches]
    if in_a_cycle:
        box.append(box)
    del batches, box
    gc.collect()
    time.sleep(0.2)  # the signal of their end has come
    assert not multiprocessing.active_children()


def test_workers_make_the_tokens_that_the_encoder_would(shards: ShardSet) -> None:
    encoder = TextEncoder.load("minilm")
    config = BatchConfig(crop_seconds=4.0, size=32, workers=1)
    batch = next(iter(data.training_loader(stream(shards, config, tokenize=encoder.tokenize))))
    assert batch.tokens is not None and None in batch.texts, "captions, and some that were dropped"
    for made, wanted in zip(encoder.encode(batch.tokens), encoder.encode(batch.texts)):
        assert torch.equal(made, wanted)
    assert next(iter(stream(shards, config))).tokens is None


def test_captions_variants_and_dropouts(shards: ShardSet) -> None:
    config = BatchConfig(crop_seconds=4.0, size=64, workers=0, word_dropout=0.0)
    texts = [t for step in range(20) for t in stream(shards, config).batch(step, 0).texts]
    assert sum(t is None for t in texts) / len(texts) == pytest.approx(0.2, abs=0.03)
    heard = [t for t in texts if t is not None]
    assert {t.rstrip(".").removesuffix(". bpm: 120.0") for t in heard} == set(STYLES)
    assert sum("bpm" in t for t in heard) / len(heard) == pytest.approx(0.5, abs=0.05)
    dropped = [
        t for step in range(20) for t in stream(shards, BatchConfig(crop_seconds=4.0, size=64)).batch(step, 0).texts
    ]
    words = sum(len(t.split()) for t in heard), sum(len(t.split()) for t in dropped if t)
    assert words[1] / words[0] == pytest.approx(0.7, abs=0.03)


def test_validation_hears_the_raw_description(shards: ShardSet) -> None:
    batches = data.validation_batches(shards, CONFIG)
    assert {t for b in batches for t in b.texts} <= set(STYLES)
    again = data.validation_batches(shards, CONFIG)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(batches, again))
    shared = [b for r in range(2) for b in data.validation_batches(shards, CONFIG, rank=r, world=2)]
    assert sum(int((b.valid_frames > 0).sum()) for b in shared) == sum(len(b.keys) for b in batches)
    by_rank = [
        data.validation_batches(shards, dataclasses.replace(CONFIG, valid_batch=1), rank=r, world=3) for r in range(3)
    ]
    assert len({len(batches) for batches in by_rank}) == 1  # sharded ranks compute in step


def test_the_unigram_is_scored_on_the_crops_of_the_validation(shards: ShardSet) -> None:
    known = loss.token_counts((shards.codes(int(row)) for row in shards.rows("train")), 4, 64)
    crops = [c[:, v].numpy() for b in data.validation_batches(shards, CONFIG) for c, v in zip(b.codes, b.valid)]
    expected = loss.unigram_loss(known, loss.token_counts(crops, 4, 64))
    assert data.unigram_loss(shards, CONFIG) == pytest.approx(expected)
    assert expected != pytest.approx(loss.unigram_loss(known, known), abs=1e-3)


def test_tracks_without_a_frame_or_of_weight_0_are_left_out(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_dataset(tmp_path / "set", tracks=6, valid=0, size=64)))
    for column, kind in (("frames", pa.int64()), ("weight", pa.float64())):
        place, values = shards.index.column_names.index(column), shards.index.column(column).to_pylist()
        values[shards.rows("train")[0 if column == "frames" else 1]] = 0
        shards.index = shards.index.set_column(place, column, pa.array(values, kind))
    assert data.tracks_of(shards, "train").rows.tolist() == shards.rows("train")[2:].tolist()


def test_raw_text_and_training_text_without_captions() -> None:
    item = plan.Item(0, 0, 0, 0, 10, caption=0.99, keep_condition=True, words=(1, 2))
    assert data.training_text({}, item, 0.3) is None and data.raw_text({}) is None
    meta = {"descriptions": [{"text": "a piano"}], "captions": []}
    assert data.training_text(meta, item, 0.0) == "a piano"
    assert data.training_text(meta, item, 1.0) is None


def test_data_sets_that_do_not_fit(shards: ShardSet, tmp_path: Path) -> None:
    def check(**changes: int) -> None:
        wanted = {"world": 1, "num_codebooks": 4, "codebook_size": 64} | changes
        data.check(shards, CONFIG, **wanted)

    check()
    with pytest.raises(UserError, match=r"expects 8 of 64.*make ingest ARGS='--channels 2'"):
        check(num_codebooks=8)
    with pytest.raises(UserError, match=r"codec 'tiny' with 4 codebooks of 64 codes; the model expects 4 of 2048"):
        check(codebook_size=2048)
    with pytest.raises(UserError, match=r"batch\.size 8 must be a multiple of 3 processes"):
        check(world=3)
    with pytest.raises(UserError, match=r"batch\.size 8 must be a multiple of 2 processes x batch\.accumulate 3"):
        data.check(shards, dataclasses.replace(CONFIG, accumulate=3), world=2, num_codebooks=4, codebook_size=64)
    empty = ShardSet.open(str(write_dataset(tmp_path / "set", tracks=2, valid=2, size=64)))
    with pytest.raises(UserError, match="no training tracks"):
        data.check(empty, CONFIG, world=1, num_codebooks=4, codebook_size=64)


@pytest.mark.parametrize("bad", [{"size": 0}, {"crop_seconds": 0.1}, {"word_dropout": 1.5}, {"min_segment_ratio": 0.0}])
def test_nonsense_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"batch.{next(iter(bad))}"):
        BatchConfig(**bad)


def test_no_batch_is_fetched_that_the_run_will_not_take(shards: ShardSet) -> None:
    """What cannot be read after the last step stops nobody before it."""

    class Ending(data.Stream):
        def batch(self, step: int, part: int) -> data.Batch:
            if step >= 3:
                raise UserError("withdrawn")
            return super().batch(step, part)

    loader = data.training_loader(Ending(shards, CONFIG, seed=5))
    loader.ahead, loader.needed = 2, 3
    batches = iter(loader)
    assert [next(batches).step for _ in range(3)] == [0, 1, 2] and loader.failed is None


def test_a_process_that_forgets_its_loader_ends(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "set", tracks=6, valid=1)
    code = f"""
from pipelines.shard import ShardSet
from training.data import BatchConfig, Stream, training_loader
batches = iter(training_loader(Stream(ShardSet.open({str(data)!r}), BatchConfig(crop_seconds=1.0, workers=2), seed=0)))
print(next(batches).step, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0\n"
