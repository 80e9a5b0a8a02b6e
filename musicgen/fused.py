"""The step of `musicgen.engine` out of `musicgen.kernels`: eight launches per layer, no masks, one graph.

Used where a GPU and Triton are there and no style modulates the blocks; everything else takes torch's operations.
Weights are the engine's own tensors, caches are `engine.Cache`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from musicgen.packing import OnGpu, Precision, stored

if TYPE_CHECKING:
    from musicgen.engine import Cache, Engine
    from musicgen.transformer import Block


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


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
        heads = engine.heads
        own = (heads.weight, heads.scale) if isinstance(heads, OnGpu) else (engine.head_weight.to(engine.dtype), None)
        self.heads = Linear(*own, norm=engine.out_norm)
        self.tables = engine.tables

    def __call__(self, tokens: Tensor, cache: Cache, room: Room) -> Tensor:
        """Logits `[R, K V]` float32 of the column after `tokens` `[R, K]`; the cache's position is the caller's."""
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
