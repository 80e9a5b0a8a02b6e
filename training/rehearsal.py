"""A training step rehearsed on tensors without storage: the plan's bytes beside torch's own count, without a GPU.

    make plan SIZE=3.3b GPUS=8 ARGS='--rehearse true'

`training.budget` reckons memory by closed formulas. Here the model of that plan is built with fake tensors (shapes and
types, no bytes), recomputed and sharded by the same functions as in training, over a process group that sends nothing,
and makes two steps: forward under bf16 autocast, loss, backward, clipping, fused AdamW, averaged weights. torch's
memory tracker, which is not ours, sees every tensor come and go in the second one's passes and keeps the peak.

What it cannot see: the CUDA context, workspaces of libraries, fragments and streams that overlap, for which the plan
leaves 8 % of the memory free, and what compiling saves. The tensors say that they are on a CPU, where torch's build
needs no CUDA; attention is torch's fused one, which keeps the same tensors as on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from musicgen import patterns, transformer
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from training import budget, loss, optim, strategy
from training.budget import Plan
from training.copies import WorkingCopies

DEVICE = "cpu"


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


@contextmanager
def _alone_of(ranks: int) -> Iterator[None]:
    """This process as rank 0 of so many, the others of which do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a plan is rehearsed in a process of its own, not in one rank of a training")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def peak_bytes(plan: Plan) -> float:
    """Most bytes of one rank in a training step of this plan, the frozen text encoder left out.

    Raises:
        UserError: a plan for CPUs, of an adapter, or with an optimiser of more than AdamW's two moments.
    """
    if plan.device.is_cpu or plan.task.adapter or plan.task.moments != optim.MOMENTS["adamw"]:
        raise UserError("only plans of whole models on GPUs with --optim.name adamw are rehearsed")
    from torch._subclasses import FakeTensorMode

    # Random draws are what a tensor without values cannot make; bf16 on a CPU would write attention out.
    drawn = mock.patch.object(torch.nn.init, "trunc_normal_", lambda weight, **_: weight)
    fused = mock.patch.object(transformer, "attend", _fused)
    shape = plan.task.lm
    codes = torch.zeros(plan.micro, shape.num_codebooks, plan.task.frames, dtype=torch.long)
    columns = patterns.training_columns(codes, shape.special_id, pattern=shape.pattern, tail=shape.tail)
    with _alone_of(plan.ranks), drawn, fused:
        mesh = strategy.mesh_of(plan, DEVICE) if plan.shards > 1 else None
        with FakeTensorMode() as mode:
            return _Rehearsal(plan, mesh, [mode.from_tensor(column) for column in columns]).peak()


class _Rehearsal:
    """Model, optimiser and average of a plan, inside a FakeTensorMode."""

    def __init__(self, plan: Plan, mesh: Any, columns: list[Tensor]) -> None:
        self.plan, self.columns = plan, columns
        self.lm = lm = MusicLM(plan.task.lm)
        blocks = list(lm.transformer.layers)
        for block in blocks:
            strategy.recompute(block, plan)
        if mesh is not None:
            strategy.shard_blocks(lm, blocks, mesh, torch.bfloat16 if plan.task.bf16 else torch.float32)
        self.copies = WorkingCopies(blocks, torch.bfloat16) if plan.shares_casts else None
        self.optimizer = optim.build_optimizer(optim.trained(lm).values(), optim.OptimConfig())
        self.ema = optim.EMA(lm, 0.99)
        # What training calls, made the call that FSDP and the tracker watch.
        lm.forward = MusicLM.hidden.__get__(lm)  # type: ignore[method-assign]
        # The tracker holds a block's gradients until those of all its inputs are there; the text's come last of all.
        lm.project_text = lambda *text: MusicLM.project_text(lm, *text).detach()  # type: ignore[method-assign]

    def _part(self) -> None:
        plan = self.plan
        inputs, targets, scored = self.columns
        text = torch.zeros(plan.micro, budget.TEXT_TOKENS, plan.task.lm.condition.text_dim)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=plan.task.bf16):
            heard = self.lm(inputs, text, torch.ones(text.shape[:2], dtype=torch.bool))
            heads: list[Any] = list(self.lm.linears)
            rows = loss.chunk_rows("cuda", plan.task.lm.codebook_size)
            sums = loss.cross_entropy_sums(heard, heads, targets, scored, select=False, rows=rows)
            value = loss.mean_over_codebooks(sums, torch.full_like(sums, float(plan.micro * plan.task.frames)))
        value.backward()

    def step(self, watched: Any = None, after_part: Callable[[], None] = lambda: None) -> None:
        """One step of training, as `training.module` makes it.

        Args:
            watched: a context for the passes. The update adds nothing to what is there once the gradients are, and
                trackers before torch 2.13 count every sharded tensor of it whole.
            after_part: called after each of them.
        """
        with watched or nullcontext():
            for part in range(min(self.plan.accumulate, 2)):  # from the second part on memory is the same
                if self.copies is not None:
                    self.copies.refresh()
                    if part == 0 or self.plan.ranks == 1:
                        self.copies.put_in()
                    else:
                        self.copies.free()
                self._part()
                if self.copies is not None:
                    self.copies.put_back()
                after_part()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.lm)
        # DDP's gradients are views of buckets, which stay.
        self.optimizer.zero_grad(set_to_none=self.plan.strategy != "ddp")

    def peak(self) -> float:
        """Most bytes during the second step; the first one makes the optimiser's state."""
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
        from torch.distributed._tools.mem_tracker import MemTracker

        self.step()
        averages = [strategy.local(t) for t in self.ema.shadow.values()]
        tracker: MemTracker
        if self.plan.shards > 1:
            tracker = FSDPMemTracker(self.lm, self.optimizer)
            tracker.track_inputs(tuple(averages))
        else:
            tracker = MemTracker()
            tracker.track_external(self.lm, self.optimizer, *averages)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Expected a tensor or a traceable")  # the gradient of a copy, dropped
            self.step(tracker, tracker.reset_mod_stats)
        return float(max(by_kind["Total"] for by_kind in tracker.get_tracker_snapshot("peak").values()))
