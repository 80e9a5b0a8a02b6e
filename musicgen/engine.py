"""One fast step of the language model: from the columns so far to the next one.

`Engine` holds a model's weights packed for reading (`musicgen.packing`), the text's keys and values computed once,
and self-attention caches that are allocated once. `feed` takes one column, or at the start several (an audio prompt),
and returns the logits of the next.

Two ways lead through the same code. On a CPU a position is a number and the cache is sliced. On a GPU it is a tensor
on the device, the cache is read up to a fixed `span` under a mask, and nothing waits for the host, so that the step
can be captured as a graph (`musicgen.sampler`). A third, where Triton is, takes kernels of its own
(`musicgen.fused`).

Source: Copet et al. 2023, section 3.1, as `musicgen.transformer`, whose results these are up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen import fused
from musicgen.conditions import Conditions
from musicgen.lm import MusicLM
from musicgen.packing import Precision, pack, stream_dtype
from musicgen.transformer import (
    Block,
    Modulation,
    causal_mask,
    gated,
    modulations,
    positions_of,
    shaped,
    sinusoid,
)

SPAN = 256  # cache entries that one graph reads: few graphs, and little read in vain


@dataclass
class Cache:
    """State of one batch of rows; buffers are allocated once and written in place.

    Attributes:
        capacity: entries that fit: the prefix of conditions, then the columns.
        table: `[capacity, D]`, what is added to an entry at each position.
        at: `position` on the device, int64 `[1]`.
        keys, values: per layer `[R, H, capacity, D/H]`, self-attention.
        cross_keys, cross_values: per layer `[R, H, L, D/H]`, computed once from the text.
        seen: `[R, 1, 1, L]` bool, text that a row attends to; everything for a row without any text.
        has_text: `[R, 1, 1]`; the others, 0 here, get exactly zero from cross-attention.
        style: per layer scale, shift and gate of each norm, computed once from the style; empty without one.
        prefix: entries of the prefix.
        visible: `[R, capacity]` bool, which entries a row has; None where every row has all.
        shift: `[R, 1]` int64, by how much a row's positions stay behind its entries; with `visible`.
        position: entries written.
        room: what the step of `musicgen.fused` writes between its kernels, where that way is taken.
    """

    capacity: int
    table: Tensor
    at: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cross_keys: list[Tensor] = field(default_factory=list)
    cross_values: list[Tensor] = field(default_factory=list)
    seen: Tensor | None = None
    has_text: Tensor | None = None
    style: list[list[Modulation]] = field(default_factory=list)
    prefix: int = 0
    visible: Tensor | None = None
    shift: Tensor | None = None
    position: int = 0
    room: fused.Room | None = None

    def rewind(self) -> None:
        """Forget the columns; text and prefix stay."""
        self.position = self.prefix
        self.at.fill_(self.prefix)


class _Layer:
    """A block with its matrices packed."""

    def __init__(self, block: Block, precision: Precision, dtype: torch.dtype) -> None:
        def norm(module: torch.nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
            return module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps

        dim = block.norm1.weight.shape[0]
        self.heads = block.self_attn.num_heads
        self.activation = F.gelu if block.activation == "gelu" else F.relu
        self.norm1, self.norm2 = norm(block.norm1), norm(block.norm2)
        self.qkv = pack(block.self_attn.in_proj_weight, precision)
        self.out = pack(block.self_attn.out_proj.weight, precision)
        self.up, self.down = pack(block.linear1.weight, precision), pack(block.linear2.weight, precision)
        self.has_cross = block.has_cross
        self.style = block.style.weight.detach() if hasattr(block, "style") else None
        if block.has_cross:
            packed = block.cross_attention.in_proj_weight
            self.norm_cross = norm(block.norm_cross)
            self.cross_q = pack(packed[:dim], precision)
            self.cross_kv = packed[dim:].detach()
            self.cross_out = pack(block.cross_attention.out_proj.weight, precision)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def cross_cache(self, projected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `[R, H, L, D/H]` of the projected text `[R, L, D]`; once per clip, hence not packed."""
        keys, values = F.linear(projected, self.cross_kv).to(dtype).chunk(2, dim=-1)
        return self._split(keys).contiguous(), self._split(values).contiguous()

    def modulations(self, style: Tensor, dtype: torch.dtype) -> list[Modulation]:
        """Scale, shift and gate of each norm from style vectors `[R, dim]`; once per clip, hence not packed."""
        assert self.style is not None
        made = modulations(style.to(self.style.dtype), self.style, 3 if self.has_cross else 2)
        return [(a.to(dtype), b.to(dtype), c.to(dtype)) for a, b, c in made]

    def __call__(self, x: Tensor, cache: Cache, index: int, mask: Tensor | None, span: int | None) -> Tensor:
        """`x` `[R, S, D]` through the block; the S entries are written to the cache. `mask` None sees all of it."""
        style: list[Modulation | None] = [*cache.style[index]] if cache.style else [None] * 3
        q, k, v = (self._split(p) for p in self.qkv(shaped(_norm(x, self.norm1), style[0])).chunk(3, dim=-1))
        keys, values = cache.keys[index], cache.values[index]
        if span is not None:
            keys.index_copy_(2, cache.at, k)
            values.index_copy_(2, cache.at, v)
            end = span
        else:
            end = cache.position + x.shape[1]
            keys[:, :, cache.position : end] = k
            values[:, :, cache.position : end] = v
        heard = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        x = x + gated(self.out(heard.transpose(1, 2).flatten(2)), style[0])
        if self.has_cross:
            q = self._split(self.cross_q(shaped(_norm(x, self.norm_cross), style[1])))
            heard = F.scaled_dot_product_attention(
                q, cache.cross_keys[index], cache.cross_values[index], attn_mask=cache.seen
            )
            x = x + gated(self.cross_out(heard.transpose(1, 2).flatten(2)), style[1]) * cache.has_text  # type: ignore[operator]
        return x + gated(self.down(self.activation(self.up(shaped(_norm(x, self.norm2), style[-1])))), style[-1])


def _norm(x: Tensor, parameters: tuple[Tensor, Tensor, float]) -> Tensor:
    weight, bias, eps = parameters
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class Engine:
    """A language model ready to be stepped.

    Args:
        lm: the model; its projections and tables are shared, its matrices are packed anew unless torch reads them
            fastest as they are.
        precision: see `musicgen.packing`.
    """

    @torch.no_grad()
    def __init__(self, lm: MusicLM, precision: Precision = "float32") -> None:
        self.lm, self.config, self.precision = lm, lm.config, precision
        self.device = lm.out_norm.weight.device
        self.dtype = stream_dtype(precision, self.device)
        blocks: Sequence[Block] = list(lm.transformer.layers)  # type: ignore[arg-type]
        self.layers = [_Layer(block, precision, self.dtype) for block in blocks]
        tables = [table.weight.detach() for table in lm.emb if isinstance(table, torch.nn.Embedding)]
        self.tables = torch.cat(tables).to(self.dtype)
        books = torch.arange(self.config.num_codebooks, device=self.device)
        self.first_row = (books * (self.config.codebook_size + 1))[:, None]
        norm, linears = lm.out_norm, [head for head in lm.linears if isinstance(head, torch.nn.Linear)]
        self.out_norm = (norm.weight.detach().to(self.dtype), norm.bias.detach().to(self.dtype), norm.eps)
        heads = torch.cat([head.weight.detach() for head in linears])
        # The heads decide between codes and are 2 % of the bytes: they stay at 16 bits where the rest has 8.
        sixteen: Precision = "float16" if self.device.type == "cpu" else "bf16"
        self.heads = pack(heads, sixteen if precision == "int8" else precision)
        self.fused = fused.step_of(self, list(blocks))

    @torch.no_grad()
    def start(self, conditions: Conditions, columns: int) -> Cache:
        """A cache for rows with these conditions and so many columns at most; `listen` makes it ready."""
        rows, dim = conditions.text_mask.shape[0], self.config.dim
        capacity = self.capacity(columns + self._prefix_length(conditions))
        shape = (rows, self.config.num_heads, capacity, dim // self.config.num_heads)

        def buffers() -> list[Tensor]:
            return [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers]

        table = sinusoid(torch.arange(capacity, device=self.device), dim).to(self.dtype)
        at = torch.zeros(1, dtype=torch.long, device=self.device)
        cache = Cache(capacity, table, at, buffers(), buffers())
        if self.config.cross_attention:
            states, mask, _ = self._heard(conditions)
            for layer in self.layers:
                keys, values = layer.cross_cache(states, self.dtype)
                cache.cross_keys.append(keys)
                cache.cross_values.append(values)
            has_text = mask.any(dim=-1)
            # A fully masked row would be a softmax over nothing (NaN); let it see its padding and erase the result.
            cache.seen = (mask | ~has_text[:, None])[:, None, None, :]
            cache.has_text = has_text[:, None, None].to(self.dtype)
        if conditions.style is not None:
            cache.style = [layer.modulations(conditions.style, self.dtype) for layer in self.layers]
        if self.fused is not None and conditions.style is None:
            cache.room = fused.room_for(self, cache)
            if cache.room is None:  # said once, not again for every clip
                self.fused = None
        return cache

    def capacity(self, entries: int) -> int:
        """Entries of a cache that has room for so many: on a GPU whole spans."""
        return entries if self.device.type == "cpu" else -(-entries // SPAN) * SPAN

    def _prefix_length(self, conditions: Conditions) -> int:
        melody = self.config.condition.chroma_frames if self.config.condition.melody else 0
        beside = conditions.text.shape[1] + len(self.config.condition.attributes)
        return melody + (0 if self.config.cross_attention else beside)

    def _heard(self, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor]:
        text = conditions.text.to(self.lm.text_projection.weight.dtype)  # a model may be kept in 16 bits
        return self.lm.heard(text, conditions.text_mask, conditions.places, conditions.attributes)

    @torch.no_grad()
    def listen(self, cache: Cache, conditions: Conditions, chroma: Tensor | None) -> None:
        """Put what stands before the columns, melody and text, into the cache, and forget columns written there.

        Args:
            conditions: those of `start`.
            chroma: `[R, C]` the melody from the first column's time on, or None.
        """
        states, _, places = self._heard(conditions)
        prefix, visible = self.lm.prefix(states, places, chroma)
        cache.position = cache.prefix = 0
        cache.at.zero_()
        if prefix is not None and visible is not None:
            kept = visible.any(dim=0)  # what no row has is left out
            prefix, visible = prefix[:, kept].to(self.dtype), visible[:, kept]
            length = prefix.shape[1]
            if cache.visible is not None or not bool(visible.all()):
                later = visible.new_ones(visible.shape[0], cache.capacity - length)
                whole, shift = torch.cat([visible, later], dim=1), visible.sum(dim=1, keepdim=True) - length
                if cache.visible is None or cache.shift is None:
                    cache.visible, cache.shift = whole, shift
                else:  # in place: the graphs of the window before read these addresses
                    cache.visible.copy_(whole)
                    cache.shift.copy_(shift)
            self._through(prefix + cache.table[positions_of(visible)], cache, causal_mask(visible, 0, length), None)
            cache.prefix = length
            cache.rewind()

    def _embed(self, tokens: Tensor) -> Tensor:
        """Sum of the K embeddings: `[R, K, S]` ids to `[R, S, D]`."""
        return F.embedding(tokens + self.first_row, self.tables).sum(dim=1)

    @torch.no_grad()
    def feed(self, tokens: Tensor, cache: Cache, span: int | None = None) -> Tensor:
        """Feed columns and get the logits of the one that follows; advances the cache.

        Args:
            tokens: `[R, K, S]` long; S is 1 with a span.
            cache: from `start` and `listen`.
            span: None slices the cache by `position`. A number reads so many entries at the position that `cache.at`
                holds, under a mask, and leaves `position` to the caller: the form that a graph can capture.

        Returns:
            logits `[R, K, V]` float32.

        Raises:
            ValueError: the cache is full.
        """
        columns, entry = tokens.shape[2], cache.position
        if entry + columns > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} entries, of which {entry} are used")
        if span is not None and cache.room is not None and self.fused is not None:
            logits = self.fused(tokens[..., 0], cache, cache.room)
            cache.at += 1
            return logits.unflatten(-1, (self.config.num_codebooks, self.config.codebook_size))
        if span is None:
            where = torch.arange(entry, entry + columns, device=self.device)
            mask = self._mask(cache, entry, columns)
        else:
            where = cache.at
            later = torch.arange(span, device=self.device) > cache.at
            hidden = later if cache.visible is None else later | ~cache.visible[:, :span]
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill(hidden, float("-inf")).view(-1, 1, 1, span)
        x = self._embed(tokens) + cache.table[where if cache.shift is None else where + cache.shift]
        x = self._through(x, cache, mask, span)
        if span is None:
            cache.position += columns
        cache.at += columns
        logits = self.heads(_norm(x[:, -1], self.out_norm))
        return logits.float().unflatten(-1, (self.config.num_codebooks, self.config.codebook_size))

    @staticmethod
    def _mask(cache: Cache, entry: int, columns: int) -> Tensor | None:
        """What `columns` entries from `entry` on see; None for everything before, as one column mostly does."""
        if cache.visible is not None:
            return causal_mask(cache.visible[:, : entry + columns], entry, columns)
        if columns == 1:
            return None
        return causal_mask(torch.ones(1, entry + columns, dtype=torch.bool, device=cache.at.device), entry, columns)

    def _through(self, x: Tensor, cache: Cache, mask: Tensor | None, span: int | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, cache, index, mask, span)
        return x

    def step_bytes(self, rows: int, position: int, text: int = 32) -> int:
        """Bytes that a step at `position` must read: weights, caches of `rows`, cross-attention of `text` tokens."""
        c = self.config
        width = {"float32": 4, "bf16": 2, "float16": 2, "int8": 1}[self.precision]
        matrices = c.num_layers * c.dim**2 * (4 + 2 * c.ffn_mult + (2 if c.cross_attention else 0))
        heads = c.num_codebooks * c.codebook_size * c.dim * max(width, 2)
        cached = 2 * rows * c.num_layers * c.dim * (position + (text if c.cross_attention else 0))
        return matrices * width + heads + cached * torch.finfo(self.dtype).bits // 8
