"""Seconds of communication: collectives as far as computing waits for them, of every block that is gathered."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from musicgen.config import ConditionConfig, LMConfig
from musicgen.lm import MusicLM
from training import budget, devices, strategy, traffic
from training.traffic import Traffic

LAYERS = 3
NEWER = hasattr(dist, "all_gather_single")  # from torch 2.13 on
GATHER, SCATTER = (
    ("all_gather_single", "reduce_scatter_single") if NEWER else ("all_gather_into_tensor", "reduce_scatter_tensor")
)


def test_what_two_lists_of_stretches_share() -> None:
    assert traffic.covered([(3, 4), (0, 1), (0.5, 2), (2, 2.5)]) == [(0, 2.5), (3, 4)]
    assert traffic.shared([(0, 2), (1, 3)], [(2.5, 5)]) == pytest.approx(0.5), "twice sent is once waited"
    assert traffic.shared([(0, 1), (2, 3), (4, 6)], [(0.5, 2.5), (5, 9)]) == pytest.approx(0.5 + 0.5 + 1)
    assert traffic.shared([(0, 1)], [(1, 2)]) == traffic.shared([], [(0, 1)]) == 0


def test_copies_are_counted_by_their_reducer() -> None:
    assert traffic.of_copies(torch.nn.Linear(1, 1)) == {}
    # As torch names them: the last step that it measured, and the mean since the first, when NCCL started.
    last = {"backward_comm_time": 5_000_000, "backward_compute_comm_overlap_time": 4_000_000}
    mean = {"avg_backward_comm_time": 900_000_000, "avg_backward_compute_comm_overlap_time": 1_000_000}
    for account, found in ((mean | last, [0.001, 0.005]), ({"world_size": 2}, [])):
        model = SimpleNamespace(_get_ddp_logging_data=lambda account=account: account)
        assert [*traffic.of_copies(model).values()] == found


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of some ranks, the others of which are never there: collectives take no time and bring nothing."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


class Clock:
    """Time that passes where the test says so: one second for a collective, seven where mirrors add up, a hundred for a
    block's way back."""

    now = 0.0


class Slowly(torch.autograd.Function):
    """The same, which takes long on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        Clock.now += 100
        return gradient


def sharded(account: Traffic, ranks: int, **layout: Any) -> MusicLM:
    """A small model whose blocks compute for long in the backward pass, the last one fetched when its turn comes."""
    torch.manual_seed(0)
    condition = ConditionConfig("minilm", 16)
    shape = LMConfig(dim=32, num_layers=LAYERS, num_heads=2, codebook_size=16, condition=condition)
    lm = MusicLM(shape)
    blocks: list[Any] = list(lm.transformer.layers)
    for block in blocks:
        block.forward = lambda *inputs, forward=block.forward: Slowly.apply(forward(*inputs))
    task = budget.Task(shape, ranks, 8, 1, bf16=False)
    plan = budget.choose(task, devices.device_here(ranks, False), ranks, checkpointing="none", **layout)
    hardware = strategy.HardwareConfig(accelerator="cpu", devices=ranks, precision="float32")
    strategy.prepare(lm, hardware, plan, torch.device("cpu"), account)
    lm.set_modules_to_backward_prefetch([blocks[0]])  # type: ignore[operator]
    return lm


def collective(real: Any, name: str, seconds: float, calls: list[str], *args: Any, **more: Any) -> Any:
    calls.append(name)
    Clock.now += seconds
    return real(*args, **more)


def step(lm: MusicLM, account: Traffic) -> None:
    """One pass as the module makes it."""
    account.begin(torch.device("cpu"))
    codes, text = torch.randint(0, 16, (2, 4, 8)), torch.randn(2, 3, 16)
    account.stand()
    lm.hidden(codes, text, torch.ones(2, 3, dtype=torch.bool)).square().mean().backward()
    account.go()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collectives by name as they are made, each of which takes time."""
    made: list[str] = []
    for name, seconds in ((GATHER, 1), (SCATTER, 1), ("all_reduce", 7)):
        monkeypatch.setattr(dist, name, functools.partial(collective, getattr(dist, name), name, seconds, made))
    monkeypatch.setattr(traffic, "mark", lambda on_gpu: Clock.now)
    return made


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_every_block_that_is_waited_for_counts(ranks: int, calls: list[str]) -> None:
    account = Traffic()
    lm = sharded(account, ranks, strategy="fsdp")
    step(lm, account)
    assert account.read() == {}, "not wanted, not counted"
    account.wanted, calls[:] = True, []
    step(lm, account)
    assert calls.count(GATHER) == 1 + 2 * LAYERS, "the root once, each block in both directions"
    assert calls.count(SCATTER) == 1 + LAYERS
    assert len(account._talks) == len(calls) == 2 + 3 * LAYERS, "without mirrors nothing waits for them"
    # The first block is fetched while the loss goes back: where collectives have a queue of their own, that hides.
    assert traffic.shared(account._talks, account._stands) == len(calls) - 1
    assert sum(end - begin for begin, end in account._stands) == len(calls) - 1, "computing is no waiting"
    assert account.read() == {"communication": len(calls), "communication_total": len(calls)}, "nothing hides on a CPU"
    assert account.read() == {}, "read once"


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_mirrors_count_too(ranks: int, calls: list[str]) -> None:
    account = Traffic()
    lm = sharded(account, ranks, strategy="hybrid", shard_group=2)
    account.wanted, calls[:] = True, []
    step(lm, account)
    assert calls.count("all_reduce") == calls.count(SCATTER) == 1 + LAYERS, "each scattered gradient has a mirror"
    seconds = calls.count(GATHER) + calls.count(SCATTER) + 7 * calls.count("all_reduce")
    assert account.read()["communication_total"] == seconds
    calls[:] = []
    for now in (False, False, True):
        assert "all_reduce" not in calls, "the mirrors wait for the last part of a step"
        strategy.sum_mirrors(lm, now=now)
        step(lm, account)
    assert calls.count("all_reduce") == 1 + LAYERS and calls.count(SCATTER) == 3 * (1 + LAYERS)
