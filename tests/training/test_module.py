"""What a step leaves behind, and that a GPU's ways of scoring a batch give what the plain way gives."""

import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.models import write_t5
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.lm import MusicLM
from pipelines.shard import ShardSet
from tests.training.ranks import part
from tests.training.synthetic import write_dataset
from training import budget, data, devices, launch, strategy
from training.config import TrainConfig, layout_settings, task_of
from training.module import MusicLMModule
from training.optim import OptimConfig
from training.traffic import Traffic

BATCH = data.BatchConfig(crop_seconds=0.64, size=4, accumulate=2, workers=0)
HARDWARE = strategy.HardwareConfig(accelerator="cpu", precision="float32")
SHAPE = LMConfig(dim=32, num_layers=2, num_heads=2, codebook_size=64, condition=ConditionConfig("minilm", 384))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(str(write_dataset(tmp_path_factory.mktemp("data") / "set", size=64)))


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load("minilm")


def module_of(encoder: TextEncoder, config: LMConfig = SHAPE, **more: bool) -> MusicLMModule:
    torch.manual_seed(0)
    frames = round(BATCH.crop_seconds * 50)
    options = {"total_steps": 3, "crop_frames": frames, "accumulate": BATCH.accumulate, **more}
    return MusicLMModule(MusicLM(config), encoder, OptimConfig(lr=1e-2, warmup_steps=2), **options)  # type: ignore[arg-type]


def test_no_gradient_outlasts_its_step(shards: ShardSet, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's first forward pass finds none, its second part those of the first: they would fill a GPU otherwise."""
    module = module_of(encoder)
    found, score = [], module.score

    def watched(batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        found.append(any(p.grad is not None for p in module.parameters()))
        return score(batch)

    monkeypatch.setattr(module, "score", watched)
    run = TrainConfig(lm=SHAPE, batch=BATCH, hardware=HARDWARE, steps=3)
    plan = budget.choose(task_of(run), devices.device_here(1, False), 1, **layout_settings(run))
    trainer = strategy.build_trainer(HARDWARE, plan, steps=3, callbacks=[], launched=launch.here())
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, train_dataloaders=data.training_loader(data.Stream(shards, BATCH, seed=1)))
    assert found == [False, True] * 3
    assert not any(torch.equal(p, old) for p, old in zip(module.parameters(), before) if p.ndim > 1)


def test_every_part_of_every_step_draws_its_own_dropout(
    shards: ShardSet, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its address: what was drawn before, as by another process until a resume, changes nothing."""
    shape = dataclasses.replace(SHAPE, dropout=0.1)
    run = TrainConfig(lm=shape, batch=BATCH, hardware=HARDWARE, steps=3)
    plan = budget.choose(task_of(run), devices.device_here(1, False), 1, **layout_settings(run))
    drawn: list[list[float]] = []
    for before in (0, 1):
        module = module_of(encoder, shape)
        numbers, score = [], module.score

        def watched(batch: data.Batch, numbers: Any = numbers, score: Any = score) -> Any:
            numbers.append(float(torch.rand(())))
            return score(batch)

        monkeypatch.setattr(module, "score", watched)
        trainer = strategy.build_trainer(HARDWARE, plan, steps=3, callbacks=[], launched=launch.here())
        torch.manual_seed(before)
        trainer.fit(module, train_dataloaders=data.training_loader(data.Stream(shards, BATCH, seed=1)))
        drawn.append(numbers)
    assert len(set(drawn[0])) == 6 and drawn[0] == drawn[1]


def test_parts_say_where_a_step_is(shards: ShardSet, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the mirrors of shards, which sum at the last part, and to the account of what the ranks wait for."""
    said: list[Any] = []
    monkeypatch.setattr(strategy, "sum_mirrors", lambda _, now: said.append(now))
    for name in ("begin", "stand", "go"):
        monkeypatch.setattr(Traffic, name, lambda *_, name=name: said.append(name))
    run = TrainConfig(lm=SHAPE, batch=BATCH, hardware=HARDWARE, steps=3)
    plan = budget.choose(task_of(run), devices.device_here(1, False), 1, **layout_settings(run))
    trainer = strategy.build_trainer(HARDWARE, plan, steps=3, callbacks=[], launched=launch.here())
    trainer.fit(module_of(encoder), train_dataloaders=data.training_loader(data.Stream(shards, BATCH, seed=1)))
    assert said == ["begin", False, "stand", "go", True, "stand", "go"] * 3


def test_gradients_of_copies_stay_in_the_buckets_of_ddp(
    shards: ShardSet, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on, also those of the parts before the last: elsewhere they would be there twice."""
    module = module_of(encoder)
    places, score = [], module.score

    def watched(batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        places.append({p.grad.untyped_storage().data_ptr() for p in module.parameters() if p.grad is not None})
        return score(batch)

    monkeypatch.setattr(module, "score", watched)
    run = TrainConfig(lm=SHAPE, batch=BATCH, hardware=HARDWARE, steps=3)
    plan = replace(
        budget.choose(task_of(run), devices.device_here(1, False), 1, **layout_settings(run)), strategy="ddp"
    )
    trainer = strategy.build_trainer(HARDWARE, plan, steps=3, callbacks=[], launched=launch.here())
    try:
        with mock.patch.dict(os.environ):  # Lightning leaves there where its processes meet
            trainer.fit(module, train_dataloaders=data.training_loader(data.Stream(shards, BATCH, seed=1)))
    finally:
        part()
    assert not places[0] and len(places[2]) == 1 and places[2] == places[3] == places[4] == places[5]


@pytest.mark.parametrize("melody", [False, True])
def test_captions_of_one_bucket_take_one_graph(shards: ShardSet, encoder: TextEncoder, melody: bool) -> None:
    """And the loss is that of the plain way, where the text is heard by cross-attention or stands in the prefix."""
    condition = dataclasses.replace(SHAPE.condition, melody=melody, chroma_frames=6)
    shape = dataclasses.replace(SHAPE, cross_attention=not melody, condition=condition)
    plain, compiled = module_of(encoder, shape), module_of(encoder, shape, compiled=True)
    compiles = dataclasses.replace(HARDWARE, compile="on")
    run = TrainConfig(lm=shape, batch=BATCH, hardware=compiles, steps=3)
    plan = budget.choose(task_of(run), devices.device_here(1, False), 1, **layout_settings(run))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        strategy.prepare(compiled.lm, compiles, plan, torch.device("cpu"), compiled.traffic)
        assert torch._dynamo.config.recompile_limit == strategy.GRAPHS
        batch = data.Stream(shards, BATCH, seed=1).batch(0, 0)
        graphs = []
        for words in (0, 3, 9, 20, 40):
            batch.texts = [None, "drums " * words, *["a slow waltz" if words else None] * (len(batch.texts) - 2)]
            sums, counts = compiled.score(batch)
            torch.testing.assert_close((sums, counts), plain.score(batch))
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 1, 2]


def kinds() -> dict[str, Any]:
    import transformers as tf

    torch.manual_seed(0)
    shape = {"vocab_size": 31000, "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
    made = {
        "t5": tf.T5EncoderModel(tf.T5Config(**shape)),
        "mt5": tf.MT5EncoderModel(tf.MT5Config(**shape)),
        "umt5": tf.UMT5EncoderModel(tf.UMT5Config(**shape)),
    }
    for model in made.values():  # a fresh bias is next to nothing
        for block in model.encoder.block:
            torch.nn.init.normal_(block.layer[0].SelfAttention.q.weight)
    return made


@pytest.mark.parametrize("kind", ["minilm", "t5", "mt5", "umt5"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_ready_mask_gives_the_same_states(encoder: TextEncoder, kind: str, attention: str) -> None:
    """On a GPU the host would wait for its queue over a plain one."""
    other = TextEncoder(kind, encoder.model if kind == "minilm" else kinds()[kind], encoder.tokenizer)
    other.model.set_attn_implementation(attention)
    tokens = other.tokenize(["a slow waltz for strings", "drums", "one two three four five six seven eight"])
    assert not tokens.mask.all()
    ready, known = other.ready_mask(tokens.mask), tokens.mask.bool()
    assert ready.shape == (3, 1, *[tokens.mask.shape[1]] * 2)
    try:
        plain, given, unmasked = (
            other.model(input_ids=tokens.ids, attention_mask=mask).last_hidden_state[known]
            for mask in (tokens.mask, ready, torch.ones_like(tokens.mask))
        )
    finally:
        encoder.model.set_attn_implementation("sdpa")  # type: ignore[operator]
    torch.testing.assert_close(given, plain, atol=1e-6, rtol=1e-5)
    assert (unmasked - plain).abs().max() > 1e-3


def test_other_attention_keeps_its_mask(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(1, 4, dtype=torch.long)
    monkeypatch.setattr(encoder.model.config, "_attn_implementation", "flash_attention_2")
    assert encoder.ready_mask(mask) is mask
    monkeypatch.setattr(encoder.model.config, "_attn_implementation", "sdpa")
    monkeypatch.setattr(encoder.model.config, "model_type", "clap_text_model")
    assert encoder.ready_mask(mask) is mask


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_makes_a_part_without_waiting(shards: ShardSet, compiled: bool, tmp_path: Path) -> None:
    """From the batch in page-locked memory to the gradients, and what is found is what the CPU finds."""
    encoder = TextEncoder.load(write_t5(tmp_path / "t5", tiny=True))
    shape = replace(SHAPE, condition=ConditionConfig(encoder.name, encoder.dim))
    stream = data.Stream(shards, BATCH, seed=1, tokenize=encoder.tokenize)
    pinned = stream.batch(1, 0).pin_memory()
    expected = module_of(encoder, shape).score(pinned)
    module, device = module_of(encoder, shape, compiled=compiled).cuda(), torch.device("cuda")
    encoder.to(device)
    try:
        module.score(pinned.to(device))  # kernels are chosen, layouts sent
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        sums, counts = module.score(pinned.to(device))
        (sums / counts).mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        encoder.to("cpu")
    torch.testing.assert_close((sums.cpu(), counts.cpu()), expected, rtol=1e-3, atol=1e-2)


def test_a_batch_goes_to_a_gpu_unwaited(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    batch = data.Stream(shards, BATCH, seed=1).batch(0, 0)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **options: asked.append(options) or tensor)
    batch.to("cuda:0")
    assert asked and all(options["non_blocking"] for options in asked)
    asked.clear()
    batch.to(torch.device("cpu"))
    assert asked and not any(options["non_blocking"] for options in asked)
