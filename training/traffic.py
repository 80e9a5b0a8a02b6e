"""How long the ranks of a run talk to each other, and for how much of it computing stands still.

Most traffic hides behind computing; what doesn't is what more GPUs fail to buy. Both figures are of one step:
`communication` is the part that shows, `communication_total` all of it.

- Copies of the model (DDP): torch's own reducer keeps the account; it talks in the backward pass alone. It measures the
  first ten steps, then every hundredth, so the figures are those of the last step that it measured. Its means over all
  of them are not taken: NCCL's start and compilation would weigh in them for hundreds of steps.
- Sharded layers (FSDP2, hybrid) keep none, so `Traffic` does on the steps whose figures are recorded. FSDP takes
  collectives of ours, which call torch's and mark when they begin and end. Hooks around each block mark the stretches
  in which the queue of computing has nothing to do until weights have arrived: before a block in the forward pass,
  between two blocks in the backward pass, at its end. What lies in both shows.

On a GPU the marks are events in the queues in which collectives and blocks run; nothing waits before they are read.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

NANOSECONDS = 1e-9
Interval = tuple[float, float]


def mark(on_gpu: bool) -> Any:
    """A moment: seconds on a CPU, on a GPU an event in the queue of this moment."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def passed(before: Any, after: Any) -> float:
    """Seconds between two marks."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


def covered(intervals: Iterable[Interval]) -> list[Interval]:
    """The same stretches of time, in order and without overlap."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def shared(some: Sequence[Interval], others: Sequence[Interval]) -> float:
    """Seconds that lie in `some` and in `others`."""
    a, b = covered(some), covered(others)
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def of_copies(model: Any) -> dict[str, float]:
    """Seconds in which copies of a model (DDP) talk, in the last step that their reducer measured; nothing for any
    other model."""
    account: dict[str, Any] = getattr(model, "_get_ddp_logging_data", dict)()
    if "backward_comm_time" not in account:  # one process, or before the first measured step
        return {}
    total = account["backward_comm_time"]
    exposed = max(0, total - account["backward_compute_comm_overlap_time"])
    return {"communication": exposed * NANOSECONDS, "communication_total": total * NANOSECONDS}


class Traffic:
    """The account of a sharded model, of the step that was begun last.

    Attributes:
        wanted: whether the next step that begins is to be counted.
    """

    def __init__(self) -> None:
        self.wanted = self.counting = self._watching = self._on_gpu = False
        self._talks: list[tuple[Any, Any]] = []
        self._stands: list[tuple[Any, Any]] = []
        self._since: Any = None
        self._begin: Any = None

    def watch(self, lm: nn.Module, blocks: Sequence[nn.Module], *, copies: bool) -> None:
        """Count what the sharded `lm` says, whose layers are `blocks`; `copies`: the shards have mirrors (hybrid)."""
        from torch.distributed.fsdp import FSDPModule

        self._watching = True
        gather, scatter = _Gather(self), _Scatter(self)
        for module in lm.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(gather)  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
                if copies:
                    module.set_all_reduce_hook(self._mirrored)
        # FSDP's own hooks lie between the two of each pair.
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: self.stand(), prepend=True)
            block.register_forward_pre_hook(self._gathered)
            block.register_forward_hook(self._before_backward, prepend=True)
            block.register_forward_hook(self._in_backward)

    def begin(self, device: torch.device) -> None:
        """A step begins."""
        self.counting, self._on_gpu = self.wanted and self._watching, device.type == "cuda"
        self._talks, self._stands, self._since = [], [], None
        self._begin = self._now() if self.counting else None

    def stand(self) -> None:
        """From here on there is nothing to compute before something has arrived."""
        if self.counting and self._since is None:
            self._since = self._now()

    def go(self) -> None:
        """Computing goes on."""
        if self.counting and self._since is not None:
            self._stands.append((self._since, self._now()))
            self._since = None

    @contextmanager
    def talk(self) -> Iterator[None]:
        """A collective, in the queue that it runs in."""
        if not self.counting:
            yield
            return
        began = self._now()
        yield
        self._talks.append((began, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of the step that was counted last, and its end; nothing where none was."""
        if not self.counting:
            return {}
        self.go()
        if self._on_gpu:
            torch.cuda.synchronize()
        talks, stands = (
            [(passed(self._begin, a), passed(self._begin, b)) for a, b in found]
            for found in (self._talks, self._stands)
        )
        self.counting = False
        total = sum(end - begin for begin, end in covered(talks))
        shown = shared(talks, stands) if self._on_gpu else total  # on a CPU a collective holds the thread that computes
        return {"communication": shown, "communication_total": total}

    def _now(self) -> Any:
        return mark(self._on_gpu)

    def _mirrored(self, _: Tensor) -> None:
        """The mirrors' sum has come after the last scattering."""
        if self.counting and self._talks:
            self._talks.append((self._talks[-1][1], self._now()))

    def _gathered(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.go()
        if self.counting and inputs and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: self.stand())  # the block's gradients are made and go out

    def _before_backward(self, _: nn.Module, __: Any, output: Any) -> None:
        if self.counting and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: self.stand())

    def _in_backward(self, _: nn.Module, __: Any, output: Any) -> None:
        if self.counting and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: self.go())


class _Collective:
    """One of FSDP's collectives: its memory is plain, its call is timed."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Collective):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        call: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # by its newer name
        with self.traffic.talk():
            return call(output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Collective):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        call: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self.traffic.talk():
            return call(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
