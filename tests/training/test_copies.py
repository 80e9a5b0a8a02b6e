"""Weights in bf16 that the parts of a step share: the numbers of a cast in every part, to the bit."""

import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.training.synthetic import write_dataset
from tests.training.tiny_run import curves
from training import state, train
from training.copies import WorkingCopies
from training.module import MusicLMModule

RUN = shlex.split(
    "--size demo --codebook_init false --lm.dim 32 --lm.num_layers 2 --lm.num_heads 2 --lm.codebook_size 64 "
    "--batch.crop_seconds 0.64 --batch.size 6 --batch.accumulate 3 --batch.valid_batch 2 --batch.workers 0 "
    "--optim.lr 1e-2 --optim.warmup_steps 2 --hardware.precision bf16 --hardware.accelerator cpu "
    "--lm.condition.style.dim 8 --lm.condition.style.width 16 --log.clips 0 --log.every 1 --log.valid_every 2 "
    "--log.state_every 2 --steps 4"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.training.synthetic import small_codec

    folder = tmp_path_factory.mktemp("copies")
    codec = small_codec(folder / "codec")
    made_by = {"name": codec.name, "identity": codec.identity}
    return str(write_dataset(folder / "data", size=64, valid=2, codec=made_by))


def trained(data: str, run: Path, *more: str) -> dict[str, torch.Tensor]:
    train.main([*RUN, "--data", data, "--run", str(run), *more])
    return state.tensors(run / "state" / "step-4")


def types_heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, torch.dtype]]:
    """By call of a feed-forward: whether it trains, and the type of its weight."""
    heard, plain = [], torch.nn.Linear.forward

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        if layer.out_features == 128:
            heard.append((torch.is_grad_enabled(), layer.weight.dtype))
        return plain(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return heard


@pytest.mark.parametrize("more", [[], ["--hardware.checkpointing", "full"], ["--hardware.compile", "on"]])
def test_the_numbers_are_those_of_a_cast_in_every_part(data: str, tmp_path: Path, more: list[str]) -> None:
    with mock.patch.object(WorkingCopies, "put_in", lambda copies: None):
        each = trained(data, tmp_path / "each", *more)
    once = trained(data, tmp_path / "once", *more)
    assert once.keys() == each.keys() and all(torch.equal(once[name], each[name]) for name in each)
    assert curves(tmp_path / "once") == curves(tmp_path / "each")


def test_an_adapter_too(data: str, tmp_path: Path) -> None:
    trained(data, tmp_path / "base")
    adapter = ["--init", str(tmp_path / "base" / "release"), "--lora.rank", "4", "--lora.dropout", "0.2"]
    with mock.patch.object(WorkingCopies, "put_in", lambda copies: None):
        each = trained(data, tmp_path / "each", *adapter)
    once = trained(data, tmp_path / "once", *adapter)
    assert all(torch.equal(once[name], each[name]) for name in each) and all(".lora_" in name for name in once)


def test_parts_compute_with_the_copies_and_all_else_with_the_weights(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshed: list[int] = []
    refresh = WorkingCopies.refresh
    monkeypatch.setattr(WorkingCopies, "refresh", lambda copies: (refreshed.append(1), refresh(copies))[1])
    heard = types_heard(monkeypatch)
    tensors = trained(data, tmp_path / "run")
    assert len(refreshed) == 4  # steps, of three parts and two layers each
    assert [kind for learns, kind in heard if learns] == [torch.bfloat16] * (4 * 3 * 2)
    assert {kind for learns, kind in heard if not learns} == {torch.float32}  # validation, with the average
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("more", ["--batch.accumulate 1", "--hardware.precision float32"])
def test_one_part_or_float32_takes_no_copies(
    data: str, tmp_path: Path, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[MusicLMModule] = []
    start = MusicLMModule.on_train_start
    monkeypatch.setattr(MusicLMModule, "on_train_start", lambda module: (made.append(module), start(module))[1])
    heard = types_heard(monkeypatch)
    trained(data, tmp_path / "run", *shlex.split(more))
    assert made[0].copies is None and {kind for _, kind in heard} == {torch.float32}


def test_freed_copies_take_no_memory_until_they_are_made_again() -> None:
    """As in the last part of a step under DDP, which then sums the weights' own gradients."""
    layer = torch.nn.Linear(8, 8, bias=False)
    copies = WorkingCopies([layer], torch.bfloat16)
    copies.refresh()
    copies.put_in()
    held = layer.weight
    assert held.dtype == torch.bfloat16 and held.untyped_storage().nbytes() == 128
    copies.put_back()
    copies.free()
    assert held.untyped_storage().nbytes() == 0 and layer.weight.dtype == torch.float32
    with torch.no_grad():
        layer.weight += 1
    copies.refresh()
    assert torch.equal(held, layer.weight.bfloat16()) and held.untyped_storage().nbytes() == 128
