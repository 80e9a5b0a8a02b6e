"""The transformer under the language model: attention, cross-attention, blocks.

Pre-norm blocks: norm1 -> causal self-attention -> residual; norm_cross -> cross-attention to the text -> residual;
norm2 -> feed-forward -> residual. No biases but in the LayerNorms. Parameter names are audiocraft's, so that key
maps stay short. A prefix of condition vectors may stand before the columns; it takes the first positions. Two
deviations from the reference: padded text is masked, in the prefix too, where it takes no position either, and an item
without any text gets exactly zero from cross-attention (the reference reaches the same zero through zero values).

Source: Copet et al. 2023, section 3.1; audiocraft `modules/transformer.py`; initialisation `LMModel._init_weights`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen.config import LMConfig


def sinusoid(positions: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding `[..., S, dim]` in float32 of positions `[..., S]`: cosines, then sines.

    The exponent's denominator is half - 1, as in the reference. Float32 whatever the model runs in: bfloat16 would
    leave 573 of 1504 positions distinct.
    """
    half = dim // 2
    index = torch.arange(half, device=positions.device, dtype=torch.float32)
    angle = positions.to(torch.float32)[..., None] / max_period ** (index / max(half - 1, 1))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of `[B, H, S, D/H]`: causal without a mask, else to where `mask` `[B, 1, 1 or S, L]` is true, or with a
    mask of numbers added to the scores.

    Training on a CPU in bfloat16 writes it out: the fused kernel's backward pass takes two to three times as long
    there. Everywhere else torch's fused attention.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        hidden = torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    else:
        hidden = additive(mask, q.dtype) if mask.dtype == torch.bool else mask
    bias = hidden.expand(*q.shape[:2], q.shape[2], k.shape[2]).flatten(0, 1) if mask is not None else hidden
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=1 / math.sqrt(q.shape[3]))
    return (scores.softmax(dim=-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


class Attention(nn.Module):
    """Multi-head attention with packed q/k/v rows, as the reference stores them."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # The reference takes this from a plain Linear and never re-initialises it: uniform within 1/sqrt(dim).
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        nn.init.uniform_(self.in_proj_weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, ...]:
        """Queries of `x`, keys and values of `text` or of itself (`musicgen.adapters` has them in layers of their own).

        The packed weight is split once: the gradient of a split is one copy, that of two slices two zeroed weights.
        """
        if text is None:
            return F.linear(x, self.in_proj_weight).chunk(3, dim=-1)
        dim = self.in_proj_weight.shape[1]
        of_queries, of_text = self.in_proj_weight.split((dim, 2 * dim))
        return F.linear(x, of_queries), *F.linear(text, of_text).chunk(2, dim=-1)

    def causal(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention over a whole sequence, `[B, S, D]` to `[B, S, D]`; `mask` `[B, 1, S, S]` replaces causal."""
        q, k, v = (self._heads(p) for p in self._project(x))
        return self._merge(attend(q, k, v, mask))

    def cross(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Attention of `[B, S, D]` to the projected text `[B, L, D]`; rows of `text_mask` `[B, L]` without a token give
        exactly zero."""
        q, k, v = (self._heads(p) for p in self._project(x, text))
        has_text = text_mask.any(dim=-1)
        # A fully masked row would be a softmax over nothing (NaN); let it see its padding and erase the result.
        seen = text_mask | ~has_text[:, None]
        heard = self._merge(attend(q, k, v, seen[:, None, None, :]))
        return heard.masked_fill(~has_text[:, None, None], 0.0)  # last, so that a compiler joins it to the residual


Modulation = tuple[Tensor, Tensor, Tensor]  # scale, shift, gate, each [B, 1, D]


class StyleModulation(nn.Module):
    """Scale, shift and gate of a block's norms, linear in the style vector; zero, so without effect, at the start."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.norms = config.modulated
        self.weight = nn.Parameter(torch.zeros(self.norms * 3 * config.dim, config.condition.style.dim))

    def forward(self, style: Tensor) -> list[Modulation]:
        """Of style vectors `[B, dim]`, one for each norm in order."""
        return modulations(style, self.weight, self.norms)


def modulations(style: Tensor, weight: Tensor, norms: int) -> list[Modulation]:
    """Scale, shift and gate `[B, 1, D]` of each norm, from style vectors `[B, dim]` and a block's weight."""
    rows = F.linear(style, weight).unflatten(1, (norms, 3, -1))[:, :, :, None]
    return [(rows[:, n, 0], rows[:, n, 1], rows[:, n, 2]) for n in range(norms)]


def shaped(x: Tensor, by: Modulation | None) -> Tensor:
    """A norm's output, scaled and shifted by a style."""
    return x if by is None else x * (1 + by[0]) + by[1]


def gated(x: Tensor, by: Modulation | None) -> Tensor:
    """What goes into the residual stream, gated by a style."""
    return x if by is None else x * (1 + by[2])


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        dim = config.dim
        self.dropout = config.dropout
        self.activation = config.activation
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, config.num_heads)
        if config.cross_attention:
            self.norm_cross = nn.LayerNorm(dim)
            self.cross_attention = Attention(dim, config.num_heads)
        self.has_cross = config.cross_attention
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, config.ffn_mult * dim, bias=False)
        self.linear2 = nn.Linear(config.ffn_mult * dim, dim, bias=False)
        if config.condition.style.dim:
            self.style = StyleModulation(config)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _feed_forward(self, x: Tensor, by: Modulation | None) -> Tensor:
        hidden = self.linear1(shaped(self.norm2(x), by))
        hidden = F.gelu(hidden) if self.activation == "gelu" else F.relu(hidden)  # gelu by erf, as the weights need
        return x + gated(self._drop(self.linear2(self._drop(hidden))), by)

    def forward(
        self, x: Tensor, text: Tensor, text_mask: Tensor, mask: Tensor | None = None, style: Tensor | None = None
    ) -> Tensor:
        """`x` `[B, S, D]`, projected text `[B, L, D]`, its mask `[B, L]`, self-attention mask -> `[B, S, D]`.

        `style` `[B, dim]` are style vectors, for a model that takes them.
        """
        given = None if style is None else self.style(style)
        first, last = (None, None) if given is None else (given[0], given[-1])
        x = x + gated(self._drop(self.self_attn.causal(shaped(self.norm1(x), first), mask)), first)
        if self.has_cross:
            by = None if given is None else given[1]
            heard = self.cross_attention.cross(shaped(self.norm_cross(x), by), text, text_mask)
            x = x + gated(self._drop(heard), by)
        return self._feed_forward(x, last)


class Transformer(nn.Module):
    """Positions, then the blocks. The final norm belongs to the language model, where the reference keeps it."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        for index, block in enumerate(self.layers):
            init_block(block, index)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor,
        prefix: Tensor | None = None,
        visible: Tensor | None = None,
        style: Tensor | None = None,
    ) -> Tensor:
        """`x` `[B, S, D]` -> `[B, S, D]`.

        Args:
            text, text_mask: for cross-attention, projected.
            prefix: `[B, P, D]`, condition vectors before the columns.
            visible: `[B, P]` bool, which of them an item has; the others are masked and take no position.
            style: `[B, dim]`, style vectors that modulate the blocks; zeros, or None, for none.
        """
        columns = x.shape[1]
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        mask = None
        if prefix is None or visible is None:
            positions = torch.arange(x.shape[1], device=x.device)
        else:
            whole = torch.cat([visible, visible.new_ones(x.shape[0], columns)], dim=1)
            positions = positions_of(whole)
            # As numbers once for all blocks: of a truth value each would make and keep a mask of its own.
            kind = x.device.type
            low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            mask = additive(causal_mask(whole, 0, x.shape[1]), low)
        x = x + sinusoid(positions, x.shape[2]).to(x.dtype)
        for block in self.layers:
            x = block(x, text, text_mask, mask, style)
        return x[:, -columns:]


def positions_of(visible: Tensor) -> Tensor:
    """Positions `[B, N]` of entries of which an item has only some: the others are skipped in counting."""
    return (visible.long().cumsum(dim=1) - 1).clamp(min=0)


def causal_mask(visible: Tensor, entry: int, columns: int) -> Tensor:
    """`[B, 1, columns, entry + columns]` bool: what each column sees, itself and every visible entry before it.

    Args:
        visible: `[B, entry + columns]` bool. An entry that is not visible sees itself, so that no row is empty.
    """
    rows = torch.arange(entry, entry + columns, device=visible.device)[:, None]
    places = torch.arange(entry + columns, device=visible.device)[None]
    return ((places < rows) & visible[:, None] | (places == rows))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to scores: 0 where it is true, minus infinity elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def gaussian_(weight: Tensor, fan_in: int, depth: int | None = None) -> None:
    """Reference `gaussian` init: normal of std 1/sqrt(fan_in) cut at three sigma, smaller by depth (`current`)."""
    std = 1 / math.sqrt(fan_in)
    if depth is not None:
        std /= math.sqrt(2 * depth)
    nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-3 * std, b=3 * std)


def init_block(block: nn.Module, index: int) -> None:
    """Every Linear of the block; the packed in_proj keep their default (a raw parameter in the reference)."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            gaussian_(module.weight, module.in_features, depth=index + 1)
