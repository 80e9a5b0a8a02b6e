"""A small run whose steps take some hundredths of a second, and a disk that fills: what tests of training share."""

import resource
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from training import state, train

SMALL = shlex.split(
    "--lm.dim 32 --lm.num_layers 2 --lm.num_heads 2 --lm.codebook_size 64 --batch.crop_seconds 2.56 --batch.size 8 "
    "--optim.lr 1e-2 --optim.warmup_steps 5 --hardware.precision float32 --hardware.accelerator cpu "
    "--codebook_init false --log.every 5 --log.valid_every 20 --log.state_every 20 --log.clips 0 --steps 40"
)


def go(data: Path, run: Path, *more: str) -> Path:
    assert train.main(["--size", "demo", "--data", str(data), "--run", str(run), *SMALL, *more]) == 0
    return run


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    return state.tensors(run / "state" / f"step-{step}")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], kind: str = "model") -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if name.startswith(kind):
            torch.testing.assert_close(b[name], tensor, atol=2e-4, rtol=1e-3)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing


def fill_disk(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, full: list[bool]) -> None:
    """Let a function that writes meet a disk without room at the calls that `full` says, and with room after them."""
    real = getattr(module, name)

    def write(*given: Any, **more: Any) -> Any:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if full and full.pop(0):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return real(*given, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(module, name, write)
