"""An LSTM over few rows on a CPU, for codecs whose memory is wide.

A step multiplies each row's state by a matrix (16 MiB in the paper's codec), so with one to a dozen rows its time is
that of reading the matrix. torch's own step hands it to BLAS, which copies it first where there is more than one row.
Here it is laid out once for reading (`musicgen.packing`): in 16 bits where that loses nothing, as in every codec saved
by this project, else in 32. The part that does not wait for the state is one product for all steps. Equations:
`torch.nn.LSTM`; the gates are reordered so that the three sigmoids are one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen.packing import Precision, Product, has_fbgemm, pack

# Below this width a step's time is that of its calls, and torch's own loop has fewer.
WIDE = 512


@dataclass(frozen=True)
class _Layer:
    """`inputs [4H, H_in]` and `bias [4H]` for all steps at once, `state` for each; gates in the order i, f, o, g."""

    inputs: Tensor
    bias: Tensor
    state: Product


class Lstm:
    """The weights of `lstm`, one direction, time first; lives where they are."""

    def __init__(self, lstm: torch.nn.LSTM) -> None:
        self.plain = lstm
        wide = lstm.weight_hh_l0.device.type == "cpu" and lstm.hidden_size >= WIDE
        self.layers = [self._layer(level) for level in range(lstm.num_layers)] if wide else []

    def _layer(self, level: int) -> _Layer:
        def ordered(name: str) -> Tensor:
            i, f, g, o = getattr(self.plain, f"{name}_l{level}").detach().chunk(4)
            return torch.cat([i, f, o, g])

        bias, state = ordered("bias_ih") + ordered("bias_hh"), ordered("weight_hh")
        exact = has_fbgemm() and torch.equal(state.half().float(), state)
        precision: Precision = "float16" if exact else "float32"
        return _Layer(ordered("weight_ih"), bias, pack(state, precision))

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, B, H_in]` to `[T, B, H]`, from an empty memory."""
        if not self.layers:
            return self.plain(x)[0]
        for layer in self.layers:
            x = _run(layer, x)
        return x


def _run(layer: _Layer, x: Tensor) -> Tensor:
    """One layer over `[T, B, H_in]`."""
    gates = F.linear(x, layer.inputs, layer.bias)
    width = gates.shape[-1] // 4
    out = gates.new_empty(*x.shape[:2], width)
    memory, shown = gates.new_zeros(x.shape[1], width), gates.new_empty(x.shape[1], width)
    states, before = out.unbind(), memory
    views = (part.unbind() for part in (gates, gates[..., : 3 * width], *gates.split(width, dim=-1)))
    for now, opened, i, f, o, g, state in zip(*views, states, strict=True):
        if before is not memory:
            now.add_(layer.state(before))
        opened.sigmoid_()
        memory.mul_(f).addcmul_(i, g.tanh_())
        torch.mul(o, torch.tanh(memory, out=shown), out=state)
        before = state
    return out
