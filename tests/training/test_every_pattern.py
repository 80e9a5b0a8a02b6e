"""Every codebook pattern trains through the trainer's own module and generates through the loop of `make generate`."""

from pathlib import Path

import pytest
import torch

from musicgen import patterns
from musicgen.conditioning import TextEncoder
from musicgen.conditions import Conditions
from musicgen.config import ConditionConfig, LMConfig
from musicgen.engine import Engine
from musicgen.lm import MusicLM
from musicgen.sampling import SamplingConfig
from musicgen.windows import Windows, stream_codes
from pipelines.shard import ShardSet
from tests.training.synthetic import write_dataset
from training import budget, devices, launch, strategy
from training import data as reading
from training.config import TrainConfig, layout_settings, task_of
from training.module import MusicLMModule
from training.optim import OptimConfig

BATCH = reading.BatchConfig(crop_seconds=0.64, size=8, workers=0, condition_dropout=0.2)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load("minilm")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ShardSet]:
    """Data sets of four and of eight codebooks."""
    made = {}
    for books in (4, 8):
        folder = tmp_path_factory.mktemp("data") / str(books)
        made[books] = ShardSet.open(str(write_dataset(folder, size=64, books=books, tracks=8, valid=0)))
    return made


def generated(
    lm: MusicLM, text: torch.Tensor, mask: torch.Tensor, seeds: list[int], config: SamplingConfig
) -> torch.Tensor:
    """Nine frames of each clip, guided where the settings say so."""
    prompted = Conditions(text, mask)
    branches = [prompted, prompted.without_text(lm)] if config.guides() else [prompted]
    scales = torch.full((1, 9), config.guidance) if config.guides() else None
    return torch.cat(
        list(stream_codes(Engine(lm), branches, seeds, config, Windows(9, 9, 8, 50, 32_000), scales=scales)), 2
    )


@pytest.mark.parametrize("pattern", list(patterns.PATTERNS))
def test_it_learns_and_generates(pattern: str, encoder: TextEncoder, sets: dict[int, ShardSet], tmp_path: Path) -> None:
    books = 8 if pattern.startswith("stereo") else 4
    config = LMConfig(
        dim=32,
        num_layers=2,
        num_heads=2,
        num_codebooks=books,
        codebook_size=64,
        pattern=pattern,
        condition=ConditionConfig("minilm", 384),
    )
    torch.manual_seed(0)
    lm = MusicLM(config)
    stream = reading.Stream(sets[books], BATCH, seed=1)
    steps = 12
    module = MusicLMModule(
        lm, encoder, OptimConfig(lr=1e-2, warmup_steps=2), total_steps=steps, crop_frames=stream.rule.frames
    )
    probe = stream.batch(1000, 0)

    def score() -> torch.Tensor:
        with torch.no_grad():
            sums, counts = module.score(probe)
        assert (
            counts.tolist() == [float(probe.valid_frames.sum())] * books
        )  # every code is a target, whatever the pattern
        return sums / counts

    before = score()
    hardware = strategy.HardwareConfig(accelerator="cpu", precision="float32")
    run = TrainConfig(lm=config, batch=BATCH, hardware=hardware, steps=steps)
    device = devices.device_here(1, False)
    plan = budget.choose(task_of(run, 50.0), device, 1, nodes=1, **layout_settings(run))
    trainer = strategy.build_trainer(hardware, plan, steps=steps, callbacks=[], launched=launch.here())
    trainer.fit(module, train_dataloaders=reading.training_loader(stream))
    after = score()
    assert (after < before).all(), "every codebook has learned something"

    lm.eval()
    hidden, mask = encoder.encode(["slow waltz for strings", None])
    sampling = SamplingConfig(top_k=64)
    codes = generated(lm, hidden, mask, [1, 2], sampling)
    assert codes.shape == (2, books, 9) and codes.min() >= 0 and codes.max() < 64
    assert torch.equal(codes, generated(lm, hidden, mask, [1, 2], sampling))
    assert not torch.equal(codes[0], generated(lm, hidden, mask, [3, 2], sampling)[0])

    # The loop is exact: greedy codes are what a whole forward pass over the finished layout says is likeliest.
    greedy = SamplingConfig(temperature=0.0, guidance=1.0)
    codes = generated(lm, hidden, mask, [1, 2], greedy)
    inputs, targets, scored = patterns.training_columns(codes, config.special_id, pattern=pattern)
    with torch.no_grad():
        likeliest = lm(inputs, hidden, mask).argmax(dim=-1)
    assert scored.sum() == 2 * books * 9 and torch.equal(likeliest[scored], targets[scored])
