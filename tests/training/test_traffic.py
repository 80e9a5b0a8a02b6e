"""Seconds of communication: collectives as far as computing waits for them, of every block that is gathered."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from musicgen.config import ConditionConfig, LMConfig
from musicgen.lm import MusicLM
from training import strategy, traffic
from training.traffic import Traffic

SLOW = 0.03  # seconds, many times what a step of the model below takes
LAYERS = 3
GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"  # before torch 2.13


def test_what_two_lists_of_stretches_share() -> None:
    assert traffic.covered([(3, 4), (0, 1), (0.5, 2), (2, 2.5)]) == [(0, 2.5), (3, 4)]
    assert traffic.shared([(0, 2), (1, 3)], [(2.5, 5)]) == pytest.approx(0.5), "twice sent is once waited"
    assert traffic.shared([(0, 1), (2, 3), (4, 6)], [(0.5, 2.5), (5, 9)]) == pytest.approx(0.5 + 0.5 + 1)
    assert traffic.shared([(0, 1)], [(1, 2)]) == traffic.shared([], [(0, 1)]) == 0


def test_copies_are_counted_by_their_reducer() -> None:
    assert traffic.of_copies(torch.nn.Linear(1, 1)) == {}
    figures = {"avg_backward_comm_time": 5_000_000, "avg_backward_compute_comm_overlap_time": 4_000_000}
    for account, found in ((figures, [0.001, 0.005]), ({"world_size": 2}, [])):
        model = SimpleNamespace(_get_ddp_logging_data=lambda account=account: account)
        assert [*traffic.of_copies(model).values()] == found


@pytest.fixture
def two() -> Iterator[None]:
    """One of two ranks, the other of which is never there: collectives take no time and bring nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


class Slowly(torch.autograd.Function):
    """The same, at leisure on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(SLOW)
        return gradient


def sharded(account: Traffic) -> MusicLM:
    """A small model whose blocks compute for long in the backward pass, the last one fetched when its turn comes."""
    torch.manual_seed(0)
    condition = ConditionConfig("minilm", 16)
    lm = MusicLM(LMConfig(dim=32, num_layers=LAYERS, num_heads=2, codebook_size=16, condition=condition))
    blocks: list[Any] = list(lm.transformer.layers)
    for block in blocks:
        block.forward = lambda *inputs, forward=block.forward: Slowly.apply(forward(*inputs))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    strategy.shard_blocks(lm, blocks, mesh, torch.float32)
    lm.set_modules_to_backward_prefetch([blocks[0]])  # type: ignore[operator]
    account.watch(lm, blocks, copies=False)
    return lm


def slowly(collective: Any, name: str, calls: list[str], *args: Any, **more: Any) -> Any:
    calls.append(name)
    time.sleep(SLOW)
    return collective(*args, **more)


def step(lm: MusicLM, account: Traffic) -> float:
    """One pass as the module makes it; the seconds that it took."""
    account.begin(torch.device("cpu"))
    began = time.perf_counter()
    codes, text = torch.randint(0, 16, (2, 4, 8)), torch.randn(2, 3, 16)
    account.stand()
    lm.hidden(codes, text, torch.ones(2, 3, dtype=torch.bool)).square().mean().backward()
    account.go()
    return time.perf_counter() - began


def test_every_block_that_is_waited_for_counts(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    newer = hasattr(dist, "all_gather_single")
    gather, scatter = ("all_gather_single", "reduce_scatter_single") if newer else (GATHER, SCATTER)
    for name in (gather, scatter):
        monkeypatch.setattr(dist, name, functools.partial(slowly, getattr(dist, name), name, calls))
    account = Traffic()
    lm = sharded(account)
    step(lm, account)
    assert account.read() == {}, "not wanted, not counted"
    account.wanted, calls[:] = True, []
    seconds = step(lm, account)
    assert calls.count(gather) == 1 + 2 * LAYERS, "the root once, each block in both directions"
    assert calls.count(scatter) == 1 + LAYERS
    # The first block is fetched while the loss goes back: where collectives have a queue of their own, that hides.
    waited = SLOW * (len(calls) - 1)
    assert traffic.shared(account._talks, account._stands) == pytest.approx(waited, rel=0.2)
    stood = sum(end - begin for begin, end in account._stands)
    assert stood < waited + SLOW < seconds - SLOW * (LAYERS - 1), "computing is no waiting"
    found = account.read()
    assert SLOW * len(calls) <= found["communication"] == found["communication_total"] < seconds
    assert account.read() == {}, "read once"
