"""A run whose steps take about a tenth of a second on a core: slow enough to be interrupted, fast enough for tests."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.synthetic import write_dataset
from training import record, train

ARGS = shlex.split(
    "--size demo --codebook_init false --lm.dim 128 --lm.num_layers 2 --lm.num_heads 2 --lm.codebook_size 64 "
    "--batch.crop_seconds 1.28 --batch.size 8 --batch.valid_batch 2 --optim.lr 1e-3 --optim.warmup_steps 5 "
    "--hardware.precision float32 --hardware.accelerator cpu --hardware.threads 1 "
    "--log.every 1 --log.valid_every 12 --log.state_every 5 --log.clips 0"
)
STEPS = 24
ARGS += ["--steps", str(STEPS)]
ENV = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
TIMING = ("train/audio_seconds_per_second", "train/outside_model_share", "train/memory_gib", "train/mfu")


def dataset(folder: Path) -> Path:
    """The data of such a run."""
    return write_dataset(folder, size=64, valid=5)


def undisturbed(data: Path, run: Path) -> list[dict[str, Any]]:
    """The curves of the run on one rank, made here."""
    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = "disabled"
    try:
        train.main([*ARGS, "--data", str(data), "--run", str(run)])
    finally:
        os.environ.pop("WANDB_MODE") if before is None else os.environ.update(WANDB_MODE=before)
    return curves(run)


def curves(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured by the clock."""
    rows = record.read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING and not k.startswith("seconds/")} for row in rows]


def same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Whole curves: each step once, and the losses of the other run within rounding."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected):
        assert row == pytest.approx(other, rel=5e-3)


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 before the first."""
    return max((row["step"] for row in record.read_metrics(run / "metrics.jsonl")), default=0)


def killed(words: list[str], run: Path, targets: list[int]) -> int:
    """Start a training once per target and SIGKILL it once it has made so many steps; how often it came to that."""
    kills = 0
    for target in targets:
        child = subprocess.Popen(
            words, env={**ENV, "OMP_NUM_THREADS": str(torch.get_num_threads())}, stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 150
            while last_step(run) < target and time.monotonic() < deadline and child.poll() is None:
                time.sleep(0.005)
        finally:
            child.kill()
            kills += child.wait() == -signal.SIGKILL
    return kills


def wait_for(
    what: Callable[[], bool], seconds: float, words: Callable[[], str], child: subprocess.Popen[Any] | None = None
) -> None:
    """Return once `what` is true; fail with `words` when it takes too long or the child that should bring it ends."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"nothing within {seconds} s\n{words()}"
        assert child is None or child.poll() is None, f"ended with {child.returncode}\n{words()}"
        time.sleep(0.02)
