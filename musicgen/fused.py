"""The step of `musicgen.engine` out of `musicgen.kernels`: eight launches per layer, no masks, one graph.

Used where an NVIDIA GPU and Triton are there and no style modulates the blocks; everything else takes torch's
operations, and so does a GPU on which a kernel turns out not to run. Weights are the engine's own tensors, caches are
`engine.Cache`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from musicgen.packing import OnGpu, Precision, stored

if TYPE_CHECKING:
    from musicgen.engine import Cache, Engine
    from musicgen.transformer import Block

T = TypeVar("T")


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels should run there; AMD's GPUs are called `cuda` too and know no such launches."""
    return device.type == "cuda" and torch.version.hip is None and importlib.util.find_spec("triton") is not None


def step_of(engine: Engine, blocks: list[Block]) -> FusedStep | None:
    """The layers of an engine as kernels, where they run."""
    return _tried(lambda: FusedStep(engine, blocks)) if runs_kernels(engine.device) else None


def room_for(engine: Engine, cache: Cache) -> Room | None:
    """Room for the steps of a cache that nothing was fed to, once a first one has run in it; None where none runs.

    It may fail by what no one asked before: a GPU with less shared memory, no C compiler for Triton, another Triton.
    That step writes entry 0, which the first one fed replaces.
    """

    def run() -> Room:
        assert engine.fused is not None
        room = Room(engine, cache)
        tokens = torch.zeros((len(room.x), engine.config.num_codebooks), dtype=torch.long, device=engine.device)
        engine.fused(tokens, cache, room)
        return room

    return _tried(run)


def _tried(make: Callable[[], T]) -> T | None:
    """What `make` gives; None, and a word to the user, where it fails for another reason than memory."""
    try:
        return make()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compilers and the driver, each with kinds of its own
        first = (str(error).strip().splitlines() or [""])[0][:200]
        told = f"{type(error).__name__}: {first}"
        print(f"warning: Triton's kernels don't run here ({told}); torch's take longer", file=sys.stderr)
        return None


class _Layer:
    """A block's products with their norms, activation and weights."""

    def __init__(self, block: Block, packed: Any, precision: Precision) -> None:
        from musicgen.kernels import Linear

        def linear(name: str, weight: Tensor, **around: Any) -> Linear:
            product = getattr(packed, name)
            own = (product.weight, product.scale) if isinstance(product, OnGpu) else stored(weight, precision)
            return Linear(*own, **around)

        dim = block.norm1.weight.shape[0]
        self.qkv = linear("qkv", block.self_attn.in_proj_weight, norm=packed.norm1)
        self.out = linear("out", block.self_attn.out_proj.weight)
        self.up = linear("up", block.linear1.weight, norm=packed.norm2, activation=block.activation)
        self.down = linear("down", block.linear2.weight)
        self.has_cross = block.has_cross
        if block.has_cross:
            cross = block.cross_attention
            self.cross_q = linear("cross_q", cross.in_proj_weight[:dim], norm=packed.norm_cross)
            self.cross_out = linear("cross_out", cross.out_proj.weight)


class Room:
    """What a step of so many rows writes between the kernels."""

    def __init__(self, engine: Engine, cache: Cache) -> None:
        from musicgen.kernels import Scratch

        rows, heads, capacity, width = cache.keys[0].shape
        dim = engine.config.dim

        def room(columns: int, dtype: torch.dtype = engine.dtype) -> Tensor:
            return torch.empty((rows, columns), dtype=dtype, device=engine.device)

        self.x, self.heard, self.q = room(dim), room(dim), room(dim)
        self.qkv, self.wide = room(3 * dim), room(engine.config.ffn_mult * dim)
        self.logits = room(engine.config.num_codebooks * engine.config.codebook_size, torch.float32)
        self.scratch = Scratch(engine.device, rows, heads, capacity, width)


class FusedStep:
    """The layers of an engine as kernels."""

    def __init__(self, engine: Engine, blocks: list[Block]) -> None:
        from musicgen.kernels import Linear

        self.layers = [_Layer(block, packed, engine.precision) for block, packed in zip(blocks, engine.layers)]
        packed = engine.heads
        weight = (
            packed.weight
            if isinstance(packed, OnGpu)
            else torch.cat([p.detach() for p in engine.lm.linears.parameters()])
        )
        self.heads = Linear(weight.to(engine.dtype), norm=engine.out_norm)  # 16 bits at least, whatever the layers have
        self.tables = engine.tables

    def __call__(self, tokens: Tensor, cache: Cache, room: Room) -> Tensor:
        """Logits `[R, K V]` float32 of the column after `tokens` `[R, K]`; the cache's position is the caller's."""
        with torch.cuda.device_of(tokens):  # Triton launches on the current one
            return self._run(tokens, cache, room)

    def _run(self, tokens: Tensor, cache: Cache, room: Room) -> Tensor:
        from musicgen import kernels

        x = kernels.embed(tokens, self.tables, cache.table, cache.at, cache.shift, room.x)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(x, room.qkv)
            keys, values = cache.keys[index], cache.values[index]
            layer.out(kernels.attend(qkv, keys, values, cache.visible, cache.at, room.scratch, room.heard), x, add=True)
            if layer.has_cross:
                assert cache.seen is not None and cache.has_text is not None
                q = layer.cross_q(x, room.q)
                text = cache.cross_keys[index], cache.cross_values[index]
                layer.cross_out(kernels.hear(q, *text, cache.seen, cache.has_text, room.heard), x, add=True)
            layer.down(layer.up(x, room.wide), x, add=True)
        return self.heads(x, room.logits)
