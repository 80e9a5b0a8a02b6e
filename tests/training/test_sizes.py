"""The sizes of the paper are really trained: the smallest whole, the others as slices of their true width."""

import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from musicgen.config import SIZES
from tests.training.ranks import together
from tests.training.synthetic import write_dataset
from training import record, state
from training.config import read_config

TINY = shlex.split(
    "--lm.condition.text_encoder minilm --lm.condition.text_dim 384 --hardware.accelerator cpu --batch.workers 0 "
    "--batch.crop_seconds 0.64 --batch.valid_crops 2 --log.every 1 --log.clips 0 --log.valid_every 3 --steps 3"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", tracks=8, valid=1)


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in record.read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def test_300m_trains_and_resumes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it, in processes of its own: what it needs is given back before the next test."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = tmp_path / "run"
    argv = ["--size", "300m", "--data", str(data), "--run", str(run), *TINY, "--batch.size", "1"]
    argv += ["--log.state_keep", "1", "--log.state_background", "off", "--hardware.precision", "auto"]
    subprocess.run([sys.executable, "-m", "training.train", *argv, "--stop_at", "2"], check=True)
    assert state.steps_in(run / "state") == [2]
    subprocess.run([sys.executable, "-m", "training.train", *argv], check=True)
    assert len(losses(run)) == 3 and all(0 < loss < 20 for loss in losses(run))
    weights = 0
    for file in (run / "state" / "step-3").glob("shard-*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith("model/")]  # noqa: SIM118
            weights += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    assert weights == read_config(argv).lm.num_parameters() > 4e8


@pytest.mark.parametrize("size", ["1.5b", "3.3b"])
def test_slices_of_true_width_train_and_resume_under_both_strategies(data: Path, tmp_path: Path, size: str) -> None:
    def argv(strategy: str, *more: str) -> list[str]:
        given = ["--size", size, "--lm.num_layers", "2", "--data", str(data), "--run", str(tmp_path / strategy), *TINY]
        return [*given, "--batch.size", "2", "--hardware.devices", "2", "--hardware.strategy", strategy, *more]

    for strategy in ("ddp", "fsdp"):
        for more in (["--stop_at", "2"], []):  # in processes of its own: what a run needs is given back before the next
            job = {"argv": argv(strategy, *more)}
            assert together([job], tmp_path / "work" / f"{strategy}-{len(more)}", timeout=400) == [["ok", "ok"]]
    copies, shards = (losses(tmp_path / strategy) for strategy in ("ddp", "fsdp"))
    assert len(copies) == 3 and copies == pytest.approx(shards, rel=5e-3)
    one, two = (state.tensors(tmp_path / strategy / "state" / "step-3") for strategy in ("ddp", "fsdp"))
    assert one.keys() == two.keys()
    assert one["model/transformer.layers.1.linear1.weight"].shape[1] == SIZES[size].dim
    moved = [(one[name] - two[name]).abs().max() for name in one if name.startswith("model/")]
    assert float(torch.stack(moved).max()) < 1e-3
