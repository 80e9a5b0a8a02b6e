"""What a step leaves behind, and that a GPU's ways of scoring a batch give what the plain way gives."""

import pytest
import torch

from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.lm import MusicLM
from pipelines.shard import ShardSet
from tests.training.synthetic import write_dataset
from training import budget, data, devices, launch, strategy, train
from training.module import MusicLMModule
from training.optim import OptimConfig

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
    run = train.TrainConfig(lm=SHAPE, batch=BATCH, hardware=HARDWARE, steps=3)
    plan = budget.choose(train.task_of(run), devices.device_here(1, False), 1, **train.layout_settings(run))
    trainer = strategy.build_trainer(HARDWARE, plan, steps=3, callbacks=[], launched=launch.here())
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, train_dataloaders=data.training_loader(data.Stream(shards, BATCH, seed=1)))
    assert found == [False, True] * 3
    assert not any(torch.equal(p, old) for p, old in zip(module.parameters(), before) if p.ndim > 1)
