"""Kernels of one generation step on a GPU, in Triton: few launches, each weight read once, caches read to their end.

At a clip or two a step is bound by reading the weights, and then by how many kernels it is made of: every one costs a
few microseconds even inside a captured graph. torch takes about twenty for a layer; these take eight. `Linear` is a
product with what stands before it (the norm) and after it (activation, residual) inside; `attend` writes a step's keys
and values into the cache and reads the cache up to the position that stands on the device; `hear` is cross-attention;
`embed` sums the embeddings; `say` guides, keeps the likeliest codes, adds the noise, takes the maximum and writes the
column. One graph then serves every length, and nothing in it waits for the host.

The norm is folded into its product: with x the input, g and b the norm's weight and bias, m and s its mean and
deviation, W(g (x - m) / s + b) = (W(g x) - m Wg) / s + Wb, so that both are gathered while the weights stream by. On
Hopper and later a kernel is started while the one before still runs, and has its first weights on their way by then.

Products round where torch's do, up to the order of sums; everything is float32 in between. On a CPU the kernels run in
Triton's interpreter (TRITON_INTERPRET=1), which is how the tests run them. Source of the step: `musicgen.engine`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 16  # of a batch, branches of the guidance included, whose products are kernels here
LEAST_TILE = 64  # inputs that a product takes at a time, at least
STEP = 64  # cache entries that a program of attention reads at a time
ACTIVATIONS = {"": 0, "gelu": 1, "relu": 2}


@triton.jit
def _meet(OVERLAP: tl.constexpr):
    """Let the next kernel be started, and wait for the results of the one before."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _activate(y, KIND: tl.constexpr):
    if KIND == 1:
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif KIND == 2:
        y = tl.maximum(y, 0.0)
    return y


@triton.jit
def _finish(y, r, n, inside, scale, of_norm, of_bias, total, squares, eps, out, N, K,
            NORM: tl.constexpr, SCALED: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """What follows the sums of a product: the weight's scale, the norm, the activation, the residual."""
    if SCALED:
        y = y * tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = total / K
        variance = tl.maximum(squares / K - mean * mean, 0.0)  # of equal inputs rounding leaves it below zero
        y = (y - mean * tl.load(of_norm + n, mask=inside, other=0.0)) / tl.sqrt(variance + eps)
        y = y + tl.load(of_bias + n, mask=inside, other=0.0)
    y = _activate(y, KIND)
    at = out + r * N + n
    if ADD:
        y = y + tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _few_rows(x, weight, scale, gain, of_norm, of_bias, eps, out, N,
              K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
              SCALED: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One or two rows times BLOCK rows of the weight, by multiplying and adding: sums stay in registers to the end."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    lane = tl.arange(0, TILE)
    rows = weight + n[:, None] * K + lane[None, :]
    ahead = tl.load(rows, mask=inside[:, None] & (lane < K)[None, :], other=0.0)
    _meet(OVERLAP)  # weights come from nobody: the first ones are on their way while the kernel before still runs
    first = tl.zeros([BLOCK, TILE], tl.float32)
    second = tl.zeros([BLOCK, TILE], tl.float32)
    total0 = tl.zeros([TILE], tl.float32)
    total1 = tl.zeros([TILE], tl.float32)
    squares0 = tl.zeros([TILE], tl.float32)
    squares1 = tl.zeros([TILE], tl.float32)
    for start in range(0, K, TILE):
        w = ahead.to(tl.float32)
        k = start + lane
        ahead = tl.load(rows + start + TILE, mask=inside[:, None] & (k + TILE < K)[None, :], other=0.0)
        a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM:
            g = tl.load(gain + k, mask=k < K, other=0.0)
            total0 += a
            squares0 += a * a
            a = a * g
        first += w * a[None, :]
        if ROWS == 2:
            b = tl.load(x + K + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM:
                total1 += b
                squares1 += b * b
                b = b * g
            second += w * b[None, :]
    _finish(tl.sum(first, 1), 0, n, inside, scale, of_norm, of_bias, tl.sum(total0), tl.sum(squares0), eps, out, N, K,
            NORM, SCALED, KIND, ADD)  # fmt: skip
    if ROWS == 2:
        _finish(tl.sum(second, 1), 1, n, inside, scale, of_norm, of_bias, tl.sum(total1), tl.sum(squares1), eps, out,
                N, K, NORM, SCALED, KIND, ADD)  # fmt: skip


@triton.jit
def _some_rows(x, weight, scale, gain, of_norm, of_bias, eps, out, N,
               K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
               SCALED: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Up to sixteen rows times BLOCK rows of the weight, on the matrix units."""
    _meet(OVERLAP)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    r = tl.arange(0, 16)
    lane = tl.arange(0, TILE)
    sums = tl.zeros([BLOCK, 16], tl.float32)
    total = tl.zeros([TILE, 16], tl.float32)
    squares = tl.zeros([TILE, 16], tl.float32)
    for start in range(0, K, TILE):
        k = start + lane
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        a = tl.load(x + r[None, :] * K + k[:, None], mask=(r < ROWS)[None, :] & (k < K)[:, None], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            total += wide
            squares += wide * wide
            a = (wide * tl.load(gain + k, mask=k < K, other=0.0)[:, None]).to(x.dtype.element_ty)
        sums = tl.dot(w.to(x.dtype.element_ty), a, sums, input_precision="ieee")
    y = sums
    if SCALED:
        y = y * tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if NORM:
        mean = tl.sum(total, 0) / K
        deviation = tl.sqrt(tl.maximum(tl.sum(squares, 0) / K - mean * mean, 0.0) + eps)
        y = (y - mean[None, :] * tl.load(of_norm + n, mask=inside, other=0.0)[:, None]) / deviation[None, :]
        y = y + tl.load(of_bias + n, mask=inside, other=0.0)[:, None]
    y = _activate(y, KIND)
    at = out + r[None, :] * N + n[:, None]
    seen = inside[:, None] & (r < ROWS)[None, :]
    if ADD:
        y = y + tl.load(at, mask=seen, other=0.0).to(tl.float32)
    tl.store(at, y.to(out.dtype.element_ty), mask=seen)


@triton.jit
def _attend(qkv, keys, values, visible, position, sums, tops, parts, arrived, out, capacity, scale,
            HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, REACH: tl.constexpr,
            SPLITS: tl.constexpr, HIDES: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A program reads REACH entries for one row and head, STEP at a time, each of the STEP places with a softmax of its
    own until the end; where there are several programs the last one to arrive puts the parts together."""
    _meet(OVERLAP)
    rh, split = tl.program_id(0), tl.program_id(1)
    row, head = rh // HEADS, rh % HEADS
    now = tl.load(position).to(tl.int32)
    used = now // REACH + 1
    if split < used:
        d = tl.arange(0, PADDED)
        real = d < WIDTH
        base = rh.to(tl.int64) * capacity * WIDTH
        mine = qkv + row * (3 * HEADS * WIDTH) + head * WIDTH + d
        q = tl.load(mine, mask=real, other=0.0).to(tl.float32) * scale
        new_k = tl.load(mine + HEADS * WIDTH, mask=real, other=0.0)
        new_v = tl.load(mine + 2 * HEADS * WIDTH, mask=real, other=0.0)
        if split == used - 1:
            tl.store(keys + base + now * WIDTH + d, new_k, mask=real)
            tl.store(values + base + now * WIDTH + d, new_v, mask=real)
        first = split * REACH
        place_tops = tl.full([STEP], -1e30, tl.float32)
        place_sums = tl.zeros([STEP], tl.float32)
        place_parts = tl.zeros([STEP, PADDED], tl.float32)
        for start in range(0, tl.minimum(now + 1 - first, REACH), STEP):
            entry = first + start + tl.arange(0, STEP)
            at = base + entry[:, None] * WIDTH + d[None, :]
            old = (entry < now)[:, None] & real[None, :]
            k = tl.load(keys + at, mask=old, other=0.0)
            v = tl.load(values + at, mask=old, other=0.0)
            is_new = (entry == now)[:, None]
            k = tl.where(is_new, new_k[None, :], k).to(tl.float32)
            v = tl.where(is_new, new_v[None, :], v).to(tl.float32)
            seen = entry <= now
            if HIDES:
                seen = seen & (tl.load(visible + row * capacity + entry, mask=entry < capacity, other=0) != 0)
            scores = tl.where(seen, tl.sum(k * q[None, :], 1), -1e30)
            higher = tl.maximum(place_tops, scores)
            p = tl.where(seen, tl.exp(scores - higher), 0.0)
            fade = tl.exp(place_tops - higher)
            place_sums = place_sums * fade + p
            place_parts = place_parts * fade[:, None] + p[:, None] * v
            place_tops = higher
        top = tl.max(place_tops, 0)
        weights = tl.exp(place_tops - top)
        total = tl.sum(place_sums * weights, 0)
        heard = tl.sum(place_parts * weights[:, None], 0)
        to = out + row * (HEADS * WIDTH) + head * WIDTH + d
        if used == 1:
            tl.store(to, (heard / total).to(out.dtype.element_ty), mask=real)
        else:
            part = rh * SPLITS + split
            tl.store(tops + part, top)
            tl.store(sums + part, total)
            tl.store(parts + part * PADDED + d, heard)
            tl.debug_barrier()
            before = tl.atomic_add(arrived + rh, 1, sem="acq_rel")
            if before == used - 1:
                s = tl.arange(0, SPLITS)
                there = s < used
                all_tops = tl.load(tops + rh * SPLITS + s, mask=there, other=-1e30, cache_modifier=".cg")
                weight = tl.where(there, tl.exp(all_tops - tl.max(all_tops, 0)), 0.0)
                all_sums = tl.load(sums + rh * SPLITS + s, mask=there, other=0.0, cache_modifier=".cg")
                from_parts = parts + (rh * SPLITS + s)[:, None] * PADDED + d[None, :]
                all_parts = tl.load(from_parts, mask=there[:, None], other=0.0, cache_modifier=".cg")
                y = tl.sum(all_parts * weight[:, None], 0) / tl.sum(all_sums * weight, 0)
                tl.store(to, y.to(out.dtype.element_ty), mask=real)
                tl.store(arrived + rh, 0)


@triton.jit
def _hear(q, keys, values, seen, has_text, out, tokens, scale,
          HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
          STEPS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Cross-attention of one row and head to its text; exactly zero for a row without any."""
    _meet(OVERLAP)
    rh = tl.program_id(0)
    row, head = rh // HEADS, rh % HEADS
    d = tl.arange(0, PADDED)
    real = d < WIDTH
    mine = row * (HEADS * WIDTH) + head * WIDTH + d
    asked = tl.load(q + mine, mask=real, other=0.0).to(tl.float32) * scale
    top = tl.full([], -1e30, tl.float32)
    total = tl.zeros([], tl.float32)
    heard = tl.zeros([PADDED], tl.float32)
    for number in range(STEPS):  # unrolled, a text of thousands of tokens would compile for minutes
        token = number * STEP + tl.arange(0, STEP)
        place = (rh.to(tl.int64) * tokens + token)[:, None] * WIDTH + d[None, :]
        inside = (token < tokens)[:, None] & real[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        can = (token < tokens) & (tl.load(seen + row * tokens + token, mask=token < tokens, other=0) != 0)
        scores = tl.where(can, tl.sum(k * asked[None, :], 1), -1e30)
        higher = tl.maximum(top, tl.max(scores, 0))
        p = tl.where(can, tl.exp(scores - higher), 0.0)
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(p, 0)
        heard = heard * fade + tl.sum(p[:, None] * v, 0)
        top = higher
    y = heard / total * tl.load(has_text + row).to(tl.float32)
    tl.store(out + mine, y.to(out.dtype.element_ty), mask=real)


@triton.jit
def _embed(tokens, tables, positions, position, shift, out, rows_of_table,
           DIM: tl.constexpr, BOOKS: tl.constexpr, BLOCK: tl.constexpr, SHIFTS: tl.constexpr):  # fmt: skip
    """Sum of the codebooks' embeddings and of the position's."""
    row = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < DIM
    at = tl.load(position)
    if SHIFTS:
        at = at + tl.load(shift + row)
    x = tl.zeros([BLOCK], tl.float32)
    for book in tl.static_range(BOOKS):
        token = tl.load(tokens + row * BOOKS + book) + book * rows_of_table
        x += tl.load(tables + token * DIM + d, mask=inside, other=0.0).to(tl.float32)
    x = x.to(out.dtype.element_ty).to(tl.float32)
    x += tl.load(positions + at * DIM + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + d, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _say(logits, scales, noise, columns, column, unknown, temperature, batch, length, noise_columns, width_of_scales,
         BRANCHES: tl.constexpr, BOOKS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, TOP_K: tl.constexpr,
         DRAWS: tl.constexpr):  # fmt: skip
    """One codebook of one clip: guidance over the branches, the k likeliest, noise, maximum, into the next column."""
    clip, book = tl.program_id(0), tl.program_id(1)
    now = tl.load(column)
    v = tl.arange(0, PADDED)
    inside = v < SIZE
    at = logits + (clip * BOOKS + book) * SIZE + v
    stride = batch * BOOKS * SIZE
    less = tl.load(at + (BRANCHES - 1) * stride, mask=inside, other=0.0)
    guided = less
    for step in tl.static_range(BRANCHES - 1):
        more = tl.load(at + (BRANCHES - 2 - step) * stride, mask=inside, other=0.0)
        guided += tl.load(scales + (BRANCHES - 2 - step) * width_of_scales + now) * (more - less)
        less = more
    guided = tl.where(inside, guided, float("-inf"))
    if DRAWS:
        guided = guided / temperature
        if TOP_K > 0:
            # The k-th largest, bit by bit from the top, among keys that order as the numbers do.
            bits = (guided + 0.0).to(tl.int32, bitcast=True)  # as numbers the two zeros are one
            key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
            kth = tl.full([], 0, tl.int64)
            for bit in range(32):
                candidate = kth | (tl.full([], 2147483648, tl.int64) >> bit)
                enough = tl.sum((key >= candidate).to(tl.int32), 0) >= TOP_K
                kth = tl.where(enough, candidate, kth)
            guided = tl.where(key >= kth, guided, float("-inf"))
        address = ((clip * noise_columns + now % noise_columns) * BOOKS + book) * SIZE + v
        guided += tl.load(noise + address, mask=inside, other=0.0)
        guided = tl.where(inside, guided, float("-inf"))
    drawn = tl.argmax(guided, 0).to(tl.int64)
    to = columns + (clip * BOOKS + book) * length + now + 1
    given = tl.load(to)
    tl.store(to, tl.where(given == unknown, drawn, given))


@functools.cache
def launch(device: torch.device) -> dict[str, bool]:
    """How kernels follow each other: from Hopper on the next one starts while the last one ends (its programmatic
    dependent launch), each waiting inside for what it reads."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


@dataclass(frozen=True)
class Cut:
    """How a product is cut: `tile` inputs by `block` outputs at a time, by so many warps; `units`: on matrix units."""

    tile: int
    block: int
    warps: int
    stages: int = 3
    units: bool = False


def cut_of(rows: int, inputs: int, outputs: int, *, norm: bool, wide: bool = False) -> Cut:
    """The cut of a product, by its shape; found on an H200 with `benchmarks/kernels_gpu.py`.

    Args:
        norm: whether a norm is folded in.
        wide: whether the weight has 32 bits.
    """
    if rows > 2 or (outputs > 2 * inputs and inputs * outputs > 2**22):
        return Cut(128 if wide else 256, 64, 4, 3 if wide else 4, units=True)
    if norm:
        return Cut(512, 4, 2) if inputs <= 1024 else Cut(1024, 4, 4) if inputs < 2048 else Cut(512, 4, 4)
    if inputs > outputs:
        return Cut(2048, 4, 8) if outputs <= 1024 else Cut(1024, 4, 4)
    return Cut(1024, 4, 4) if inputs <= 1024 else Cut(2048, 4, 8)


class Linear:
    """A product `[R, K] -> [R, N]` with what stands before and after it; beyond `MAX_ROWS` rows it is torch's.

    Args:
        weight: `[N, K]`, 16 or 32 bits, or int8 with a scale.
        scale: `[N]` for int8.
        norm: weight, bias and epsilon of the LayerNorm before it.
        activation: name of what follows it, or nothing.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None = None,
        norm: tuple[Tensor, Tensor, float] | None = None,
        activation: str = "",
    ) -> None:
        self.weight, self.scale, self.norm = weight, scale, norm
        self.activation = activation
        self.cuts: dict[int, Cut] = {}  # that fit this GPU, by rows
        self.gain = self.of_norm = self.of_bias = None
        if norm is not None:
            wide = weight.float() if scale is None else weight.float() * scale.float()[:, None]
            self.gain, bias = norm[0].float(), norm[1].float()
            self.of_norm, self.of_bias = wide @ self.gain, wide @ bias

    def __call__(self, x: Tensor, out: Tensor, *, add: bool = False, cut: Cut | None = None) -> Tensor:
        """The product of `x` into `out`, or added to it; returns what holds it, beyond `MAX_ROWS` rows perhaps another.

        Without a cut it takes `cut_of`'s, in smaller tiles where the GPU has less shared memory than that asks for.
        """
        rows, (outputs, inputs) = x.shape[0], self.weight.shape
        if rows > MAX_ROWS:
            return self._by_torch(x, out, add)
        if cut is not None:
            self._launch(x, out, add, cut)
            return out
        wide = self.weight.element_size() > 2
        cut = self.cuts.get(rows) or cut_of(rows, inputs, outputs, norm=self.norm is not None, wide=wide)
        while True:
            try:
                self._launch(x, out, add, cut)
            except triton.OutOfResources:  # said before anything runs
                if cut.tile <= LEAST_TILE:
                    raise
                cut = replace(cut, tile=cut.tile // 2)
            else:
                self.cuts[rows] = cut
                return out

    def _launch(self, x: Tensor, out: Tensor, add: bool, cut: Cut) -> None:
        outputs, inputs = self.weight.shape
        kernel = _some_rows if cut.units else _few_rows
        kernel[(triton.cdiv(outputs, cut.block),)](
            x, self.weight, self.scale, self.gain, self.of_norm, self.of_bias, self.norm[2] if self.norm else 0.0, out,
            outputs, K=inputs, TILE=cut.tile, BLOCK=cut.block, ROWS=x.shape[0], NORM=self.norm is not None,
            SCALED=self.scale is not None, KIND=ACTIVATIONS[self.activation], ADD=add, **launch(x.device),
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def _by_torch(self, x: Tensor, out: Tensor, add: bool) -> Tensor:
        if self.norm is not None:
            weight, bias, eps = self.norm
            x = F.layer_norm(x, weight.shape, weight, bias, eps)
        plain = self.scale is None and not self.activation and out.dtype == x.dtype
        if plain:
            return torch.addmm(out, x, self.weight.t(), out=out) if add else torch.mm(x, self.weight.t(), out=out)
        y = F.linear(x, self.weight.to(x.dtype))
        if self.scale is not None:
            y = y * self.scale.to(y.dtype)
        if self.activation:
            y = F.gelu(y) if self.activation == "gelu" else F.relu(y)
        if add:
            return out.add_(y)
        # Not copied where the type is right: in a graph that is no kernel, behind which the next could start early.
        return y if y.dtype == out.dtype else out.copy_(y)


def reach_of(pairs: int, capacity: int) -> int:
    """Cache entries that one program reads, by how many rows times heads there are; found as `cut_of` was."""
    return 128 if pairs <= 256 else triton.cdiv(capacity, STEP) * STEP  # programs enough: nothing to put together


class Scratch:
    """Where the parts of an attention wait for each other; one for all layers, since they run one at a time.

    Args:
        device: where.
        rows, heads, capacity, width: of the caches.
        reach: cache entries that one program reads, a multiple of `STEP`; 0 takes `reach_of`.
    """

    def __init__(self, device: torch.device, rows: int, heads: int, capacity: int, width: int, reach: int = 0) -> None:
        self.reach = reach or reach_of(rows * heads, capacity)
        self.programs = triton.cdiv(capacity, self.reach)
        self.splits = triton.next_power_of_2(self.programs)
        count = rows * heads * (self.splits if self.splits > 1 else 0)
        self.padded = max(triton.next_power_of_2(width), 16)
        self.sums = torch.empty(count, device=device)
        self.tops = torch.empty(count, device=device)
        self.parts = torch.empty(count * self.padded, device=device)
        self.arrived = torch.zeros(rows * heads, dtype=torch.int32, device=device)


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, position: Tensor, scratch: Scratch, out: Tensor
) -> Tensor:
    """Self-attention of one new entry per row, which is written to the caches.

    Args:
        qkv: `[R, 3 H D]`.
        keys, values: caches `[R, H, capacity, D]`.
        visible: `[R, capacity]` bool, or None where a row sees all of its entries.
        position: `[1]` int64 on the device, entries in the cache.
        scratch: for these shapes.
        out: `[R, H D]`.
    """
    rows, heads, capacity, width = keys.shape
    _attend[(rows * heads, scratch.programs)](
        qkv, keys, values, visible, position, scratch.sums, scratch.tops, scratch.parts, scratch.arrived, out,
        capacity, width**-0.5, HEADS=heads, WIDTH=width, PADDED=scratch.padded, STEP=STEP, REACH=scratch.reach,
        SPLITS=scratch.splits, HIDES=visible is not None, **launch(qkv.device), num_warps=4,
    )  # fmt: skip
    return out


def hear(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, has_text: Tensor, out: Tensor) -> Tensor:
    """Cross-attention of `q` `[R, H D]` to `keys`, `values` `[R, H, L, D]` where `seen` `[R, L]`; `out` `[R, H D]`."""
    rows, heads, tokens, width = keys.shape
    padded = max(triton.next_power_of_2(width), 16)
    step = min(max(triton.next_power_of_2(tokens), 16), 64)
    _hear[(rows * heads,)](
        q, keys, values, seen, has_text, out, tokens, width**-0.5, HEADS=heads, WIDTH=width, PADDED=padded, STEP=step,
        STEPS=triton.cdiv(tokens, step), **launch(q.device), num_warps=4,
    )  # fmt: skip
    return out


def embed(
    tokens: Tensor, tables: Tensor, positions: Tensor, position: Tensor, shift: Tensor | None, out: Tensor
) -> Tensor:
    """Embeddings of `tokens` `[R, K]` from `tables` `[K (V + 1), D]` plus row `position` (`+ shift`) of `positions`."""
    rows, books = tokens.shape
    dim = tables.shape[1]
    block = min(triton.next_power_of_2(dim), 512)
    _embed[(rows, triton.cdiv(dim, block))](
        tokens, tables, positions, position, shift, out, tables.shape[0] // books, DIM=dim, BOOKS=books, BLOCK=block,
        SHIFTS=shift is not None, num_warps=4,
    )  # fmt: skip
    return out


def say(
    logits: Tensor, scales: Tensor, noise: Tensor | None, columns: Tensor, column: Tensor, unknown: int,
    *, top_k: int, temperature: float,
) -> None:  # fmt: skip
    """Draw the column after `column` and write it where it is unknown; `sampling.guide` and `sampling.draw` in one.

    Args:
        logits: `[branches B, K, V]` float32, the fullest branch first.
        scales: `[branches - 1, columns]` float32.
        noise: `[B, N, K, V]` Gumbel noise of columns modulo N; None takes the likeliest code.
        columns: `[B, K, S]` int64.
        column: `[1]` int64 on the device.
        top_k: 0 keeps all.
    """
    batch, books, length = columns.shape
    size = logits.shape[-1]
    draws = noise is not None
    filled: Any = noise if noise is not None else logits
    _say[(batch, books)](
        logits, scales, filled, columns, column, unknown, temperature, batch, length, filled.shape[1],
        scales.shape[1], BRANCHES=logits.shape[0] // batch, BOOKS=books, SIZE=size,
        PADDED=triton.next_power_of_2(size), TOP_K=top_k if 0 < top_k < size else 0, DRAWS=draws, num_warps=8,
    )  # fmt: skip
