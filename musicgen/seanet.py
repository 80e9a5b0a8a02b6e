"""The encoder of EnCodec laid out for speed: the weights of `transformers.EncodecModel`, the same codes, less time.

What the eager network loses on a CPU, and what is done instead: activations of a whole window fall out of the cache,
so each stage runs in blocks with a halo that is dropped; reflection padding copies every tensor, so a layer writes into
a buffer that already has room for its padding; `expm1` is slow, so ELU is made of `exp2`; 1-D convolutions run in a
layout that has to be reordered, so they run as 2-D ones with the channels last; the kernel of a downsampling is two of
its strides long, so two frames take three matrix products and not four; the LSTM waits for memory at batch one, so the
windows of a track go through it side by side (`musicgen.lstm`); the quantiser needs only x·e - |e|²/2, its maximum in
two levels.
On a GPU, where memory's bandwidth is the limit, channels come first and nothing runs in blocks. ELU writes straight
into what the next layer reads: padded, in rows of one stride (`_rows`) or above a row of ones that carries the bias, as
cuDNN would add it in one more pass; a product adds itself to the sum it belongs to. A batch that is too large at once
is split by items, so that no halo is computed. Network: Défossez et al. 2022, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen.lstm import Lstm

if TYPE_CHECKING:
    from transformers import EncodecModel

SHORT_FRAMES = 16
BLOCK_ELEMENTS = 1 << 20
SEGMENT_FRAMES = {"cpu": 1000, "cuda": 16_000}
ROWS = 512
WIDE = 64  # channels from which three products of matrices take less than a convolution


@dataclass(frozen=True)
class Conv:
    """A convolution with its padding: `weight [C_out, C_in, 1, kernel]`, sizes in samples of its input; `halves` where
    it runs as three products for two frames, `matrix [C_out, C_in · kernel + 1]`, bias last, where as one for all."""

    weight: Tensor
    bias: Tensor
    stride: int
    dilation: int
    left: int
    right: int
    halves: tuple[Tensor, Tensor, Tensor] | None = None
    matrix: Tensor | None = None

    @property
    def reach(self) -> int:
        """Input samples that an output sees on either side, at most."""
        return (self.weight.shape[-1] - 1) * self.dilation


@dataclass(frozen=True)
class Residual:
    """ELU, `wide`, ELU, `narrow`, and what is added to it: the input, or its `shortcut` convolution."""

    wide: Conv
    narrow: Conv
    shortcut: Conv | None

    @property
    def reach(self) -> int:
        """Input samples that an output sees on either side, at most."""
        return self.wide.reach + self.narrow.reach


@dataclass(frozen=True)
class Stage:
    """Layers at one sample rate: `first` (before stage one only), residual blocks, ELU and the downsampling `down`."""

    first: Conv | None
    residuals: tuple[Residual, ...]
    down: Conv

    @property
    def halo(self) -> int:
        """Input samples beside a block that its outputs depend on, rounded up to whole strides."""
        reach = (self.first.reach if self.first else 0) + sum(r.reach for r in self.residuals) + self.down.reach
        return math.ceil(reach / self.down.stride) * self.down.stride


def supports(model: EncodecModel) -> bool:
    """Whether this file can run the encoder: weight norm, a whole signal, known padding (the 24 and 32 kHz models)."""
    config = model.config
    whole = not config.normalize and config.chunk_length_s is None
    return whole and config.norm_type == "weight_norm" and config.pad_mode in ("reflect", "constant")


class Encoder:
    """Audio to codes with the weights of `model`, whose weight norm is folded already; lives on the model's device."""

    def __init__(self, model: EncodecModel, num_codebooks: int) -> None:
        self.hop: int = model.config.hop_length
        self.reflect = model.config.pad_mode == "reflect"
        layers: list[Any] = list(model.encoder.layers)
        weight = layers[0].conv.weight
        self.on_cpu = _on_cpu(weight)
        self.layout = torch.channels_last if self.on_cpu else torch.contiguous_format
        lstm = next(i for i, layer in enumerate(layers) if hasattr(layer, "lstm"))
        self.stages: list[Stage] = []
        first: Conv | None = self._conv(layers[0], product=True)
        residuals: list[Residual] = []
        for layer in layers[1:lstm]:
            if hasattr(layer, "block"):
                _, wide, _, narrow = layer.block
                shortcut = self._conv(layer.shortcut) if hasattr(layer.shortcut, "conv") else None
                residuals.append(Residual(self._conv(wide), self._conv(narrow, product=True), shortcut))
            elif hasattr(layer, "conv"):
                self.stages.append(Stage(first, tuple(residuals), self._conv(layer)))
                first, residuals = None, []
        self.lstm = Lstm(layers[lstm].lstm)
        self.last = self._conv(layers[-1])
        levels: list[Any] = list(model.quantizer.layers)[:num_codebooks]
        self.books: list[Tensor] = [level.codebook.embed for level in levels]
        self.half_norms = [-0.5 * book.double().square().sum(1).float() for book in self.books]
        self.halo_frames = self._halo_frames()
        self.margin_frames = self.halo_frames + self.last.reach

    def _conv(self, layer: Any, *, product: bool = False) -> Conv:
        """An `EncodecConv1d` as 2-D convolution of height one, padding as plain numbers; with few inputs and stride
        one, on a GPU, as a `product` of matrices."""
        conv = layer.conv
        kernel, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        total = (kernel - 1) * dilation + 1 - stride
        right = 0 if layer.causal else total // 2
        weight = conv.weight.detach().unsqueeze(2).contiguous(memory_format=self.layout)
        paired = conv.in_channels >= WIDE and kernel == 2 * stride > 2 and dilation == 1
        halves = _halves(conv.weight.detach(), stride, self.on_cpu) if paired else None
        matrix = _matrix(conv.weight.detach(), conv.bias.detach()) if product and not self.on_cpu else None
        return Conv(weight, conv.bias.detach(), stride, dilation, total - right, right, halves, matrix)

    def _halo_frames(self) -> int:
        """Frames beside a piece of audio on which the LSTM's input there depends, at most."""
        samples, rate = 0, 1
        for stage in self.stages:
            samples += stage.halo * rate
            rate *= stage.down.stride
        return math.ceil(samples / self.hop)

    def latents(self, audio: Tensor) -> Tensor:
        """Audio `[B, C, N]` float32 to latents `[B, H, ceil(N / hop)]`, each item as if it were alone."""
        with _exact(audio.device):
            features = self.features(audio)
            return self.tail(features + self.lstm(features))

    def latents_in_windows(self, audio: Tensor, window: int, context: int) -> Tensor:
        """Audio `[1, C, N]` to latents `[1, H, T]`; the LSTM sees at most `window` frames and `context` before them.

        Convolutions are those of the whole piece. The windows overlap by `context` frames, start from an empty memory
        and pass the LSTM side by side; the first one keeps its context, having nothing before it.
        """
        with _exact(audio.device):
            features = self.features(audio)
            total, width = features.shape[0], features.shape[2]
            count = math.ceil((total - context) / window)
            if count < 2:
                return self.tail(features + self.lstm(features))
            window = math.ceil((total - context) / count)  # equal windows leave least to fill up
            padded = F.pad(features[:, 0], (0, 0, 0, context + count * window - total))
            windows = padded.as_strided((context + window, count, width), (width, window * width, 1))
            memory = self.lstm(windows.contiguous())
            recalled = torch.cat([memory[:context, :1], memory[context:].transpose(0, 1).reshape(-1, 1, width)])
            return self.tail(features + recalled[:total])

    def features(self, audio: Tensor) -> Tensor:
        """Audio `[B, C, N]` through the convolutions before the LSTM: `[T, B, H]`; long audio in segments, on a GPU
        first item by item."""
        batch, total = len(audio), math.ceil(audio.shape[-1] / self.hop)
        limit = SEGMENT_FRAMES.get(audio.device.type, 1000)
        if not self.on_cpu and batch > 1 and batch * total > limit:
            pieces = math.ceil(batch / max(limit // total, 1))
            return torch.cat([self.features(items) for items in audio.chunk(pieces)], dim=1)
        segment = max(limit // batch, 4 * self.halo_frames)
        parts, start = [], 0
        while start < total:
            stop = start + segment if total - start - segment > SHORT_FRAMES else total
            first, last = max(0, start - self.halo_frames), min(total, stop + self.halo_frames)
            x = audio[..., first * self.hop : last * self.hop].unsqueeze(2).contiguous(memory_format=self.layout)
            for stage in self.stages:
                x = self._stage(stage, x)
            parts.append(x.squeeze(2).permute(2, 0, 1)[start - first : stop - first])
            start = stop
        return torch.cat(parts)

    def tail(self, recalled: Tensor) -> Tensor:
        """What follows the LSTM: `[T, B, H]` to latents `[B, D, T]`."""
        x = recalled.permute(1, 2, 0).unsqueeze(2)
        return self._apply(self.last, x, activate=True).squeeze(2)

    def _stage(self, stage: Stage, x: Tensor) -> Tensor:
        """One stage over `[B, C, 1, L]` in blocks that stay in the cache."""
        batch, channels, _, length = x.shape
        stride, halo = stage.down.stride, stage.halo
        width = max(channels, stage.first.weight.shape[0] if stage.first else 0)
        block = max(BLOCK_ELEMENTS // (batch * width), 4 * halo) // stride * stride
        if not self.on_cpu or length <= block + halo:
            return self._run(stage, x)
        shape = (batch, stage.down.weight.shape[0], 1, math.ceil(length / stride))
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.layout)
        start = 0
        while start < length:
            stop = start + block
            if length - stop <= halo:
                stop = length
            low, high = max(0, start - halo), min(length, stop + halo)
            y = self._run(stage, x[..., low:high])
            kept = slice(start // stride, math.ceil(stop / stride))
            out[..., kept] = y[..., kept.start - low // stride : kept.stop - low // stride]
            start = stop
        return out

    def _run(self, stage: Stage, x: Tensor) -> Tensor:
        """One stage over one block, padded at its ends as if they were those of the signal."""
        if stage.first is not None:
            x = self._apply(stage.first, x)
        for block in stage.residuals:
            y = self._apply(block.wide, x, activate=True)
            x = x if block.shortcut is None else self._apply(block.shortcut, x)
            x = self._apply(block.narrow, y, activate=True).add_(x) if self.on_cpu else self._add(block.narrow, y, x)
        if self.on_cpu or stage.down.halves is None:
            return self._apply(stage.down, x, activate=True)
        frames, rows = math.ceil(x.shape[-1] / stage.down.stride), self._rows(stage.down, x)
        del x  # its memory is free for the products
        return _downsample_batch(stage.down.halves, stage.down.bias, rows)[..., :frames]

    def _add(self, conv: Conv, x: Tensor, to: Tensor) -> Tensor:
        """ELU and a convolution over single samples, added to `to` in place."""
        assert conv.matrix is not None
        batch, channels, _, length = x.shape
        columns = x.new_empty(batch, channels + 1, length)
        self._elu(x.squeeze(2), columns[:, :-1])
        columns[:, -1] = 1.0
        to.squeeze(2).baddbmm_(conv.matrix.expand(batch, -1, -1), columns)
        return to

    def _rows(self, conv: Conv, x: Tensor) -> Tensor:
        """ELU of `x [B, C, 1, L]` between its padding, in an odd number of rows of one stride:
        `[B, 2n + 1, C · stride]`. The channels keep stretches of neighbouring samples, or reading would be slow."""
        stride, left, length = conv.stride, conv.left, x.shape[-1]
        frames, x = math.ceil(length / stride), x.squeeze(2)
        right, spare = conv.right + frames * stride - length, stride * (frames % 2)
        if self.reflect:
            before, after = x[..., 1 : left + 1].flip(-1), x[..., length - 1 - right : length - 1].flip(-1)
        else:
            before, after = x.new_zeros(*x.shape[:2], left), x.new_zeros(*x.shape[:2], right)
        whole = (left + length) // stride
        start, stop = stride - left, whole * stride - left
        head = torch.cat([before, x[..., :start]], dim=-1)
        end = torch.cat([x[..., stop:], after, x.new_zeros(*x.shape[:2], spare)], dim=-1)
        rows = x.new_empty(len(x), frames + 1 + frames % 2, x.shape[1] * stride)
        for part, at in ((head, 0), (x[..., start:stop], 1), (end, whole)):
            count = part.shape[-1] // stride
            room = rows[:, at : at + count].unflatten(-1, (x.shape[1], stride))
            self._elu(part.unflatten(-1, (count, stride)).transpose(1, 2), room)
        return rows

    def _apply(self, conv: Conv, x: Tensor, *, activate: bool = False) -> Tensor:
        """ELU (where asked for), padding, convolution."""
        length = x.shape[-1]
        frames = math.ceil(length / conv.stride)
        left, right = conv.left, conv.right + frames * conv.stride - length
        spare = conv.stride * (frames % 2) if conv.halves else 0
        if left + right or activate:
            room = (x.shape[0], x.shape[1], 1, left + length + right + spare)
            padded = torch.empty(room, dtype=x.dtype, device=x.device, memory_format=self.layout)
            inner = padded[..., left : left + length]
            if activate:
                self._elu(x, inner)
            else:
                inner.copy_(x)
            if left:
                padded[..., :left] = inner[..., 1 : left + 1].flip(-1) if self.reflect else 0.0
            if right:
                end = inner[..., length - 1 - right : length - 1].flip(-1) if self.reflect else 0.0
                padded[..., left + length : left + length + right] = end
            if spare:
                padded[..., -spare:] = 0.0
            x = padded
        if conv.matrix is not None:
            return _multiply(conv.matrix, x.squeeze(2), conv.weight.shape[-1]).unsqueeze(2)
        if conv.halves:
            return torch.cat([_downsample(conv.halves, conv.bias, item, conv.stride) for item in x])[..., :frames]
        return F.conv2d(x, conv.weight, conv.bias, stride=(1, conv.stride), dilation=(1, conv.dilation))

    def _elu(self, x: Tensor, out: Tensor) -> None:
        """ELU of `x` into `out`; on the CPU as max(x, min(2^(x·log2 e), 1) - 1), half the time of `expm1`."""
        if not self.on_cpu:
            torch.ops.aten.elu.out(x, out=out)
            return
        torch.mul(x, math.log2(math.e), out=out)
        out.exp2_().clamp_max_(1.0).sub_(1.0)
        torch.maximum(x, out, out=out)

    def quantise(self, latents: Tensor) -> Tensor:
        """Latents `[B, D, T]` to codes `[B, K, T]` int64: at each level the nearest entry to what is left."""
        with _exact(latents.device):
            return self._quantise(latents)

    def _quantise(self, latents: Tensor) -> Tensor:
        batch, width, frames = latents.shape
        rows = latents.transpose(1, 2).reshape(-1, width)
        codes = torch.empty((len(self.books), len(rows)), dtype=torch.int64, device=rows.device)
        size = ROWS if self.on_cpu else max(len(rows), 1)
        for start in range(0, len(rows), size):
            left = rows[start : start + size]
            for level, (book, half_norm) in enumerate(zip(self.books, self.half_norms)):
                nearest = _argmax(torch.addmm(half_norm, left, book.t()))
                codes[level, start : start + size] = nearest
                left = left - book[nearest]
        return codes.reshape(len(self.books), batch, frames).transpose(0, 1)


def _halves(weight: Tensor, stride: int, on_cpu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel of two strides `[C_out, C_in, 2 · stride]` as matrices, halves and sum: `[stride · C_in, C_out]` on a
    CPU, `[C_out, C_in · stride]` on a GPU."""
    halves = weight.split(stride, dim=2)
    first, second = ((h.permute(2, 1, 0).flatten(0, 1) if on_cpu else h.flatten(1)).contiguous() for h in halves)
    return first, second, first + second


def _matrix(weight: Tensor, bias: Tensor) -> Tensor:
    """A kernel `[C_out, C_in, kernel]` and its bias as one matrix `[C_out, C_in · kernel + 1]`, its columns together:
    C_out is a round number of bytes and the other is not."""
    return torch.cat([weight.flatten(1), bias[:, None]], dim=1).t().contiguous().t()


def _multiply(matrix: Tensor, x: Tensor, kernel: int) -> Tensor:
    """A convolution of `x [B, C, L + kernel - 1]` as one product, every sample under its kernel copied:
    `[B, C_out, L]`."""
    windows = x.unfold(-1, kernel, 1).transpose(2, 3)
    columns = x.new_empty(len(x), matrix.shape[1], windows.shape[-1])
    columns[:, :-1].unflatten(1, (x.shape[1], kernel)).copy_(windows)
    columns[:, -1] = 1.0
    return torch.bmm(matrix.expand(len(x), -1, -1), columns)


def _downsample_batch(halves: tuple[Tensor, Tensor, Tensor], bias: Tensor, rows: Tensor) -> Tensor:
    """`_downsample` for a GPU: `rows [B, 2n + 1, C · stride]` to `[B, C_out, 1, 2n]`, all items in one product.

    The products come out channels first, so the pass that adds them also puts the frames in their order.
    """
    first, second, both = (half.expand(len(rows), -1, -1) for half in halves)
    middle = rows[:, 1::2]
    (batch, pairs, width), wide = middle.shape, both.shape[1]
    apart = rows.new_empty(batch, pairs, 2, width)
    torch.sub(rows.unfold(1, 3, 2)[..., ::2].movedim(-1, 2), middle.unsqueeze(2), out=apart)
    products = rows.new_empty(3, batch, wide, pairs)
    torch.bmm(first, apart[:, :, 0].mT, out=products[0])
    torch.bmm(second, apart[:, :, 1].mT, out=products[1])
    torch.baddbmm(bias[:, None], both, middle.mT, out=products[2])
    out = rows.new_empty(batch, wide, pairs, 2)
    torch.add(products[:2].permute(1, 2, 3, 0), products[2].unsqueeze(-1), out=out)
    return out.flatten(2).unsqueeze(2)


def _downsample(halves: tuple[Tensor, Tensor, Tensor], bias: Tensor, x: Tensor, stride: int) -> Tensor:
    """A strided convolution of `x [C, 1, (2n + 1) · stride]`, channels last, to `[1, C_out, 1, 2n]`, by three products
    where two frames take four.

    With a, b, c the stretches of one stride that two neighbouring frames see, and u, v the halves of the kernel, the
    frames are au + bv and bu + cv, that is b(u + v) + (a - b)u and b(u + v) + (c - b)v.
    """
    first, second, both = halves
    rows = x[:, 0].t().reshape(-1, stride * x.shape[0])
    middle = rows[1:-1:2]
    common = torch.addmm(bias, middle, both)
    out = torch.empty(len(middle), 2, both.shape[1])
    torch.addmm(common, rows[0:-2:2] - middle, first, out=out[:, 0])
    torch.addmm(common, rows[2::2] - middle, second, out=out[:, 1])
    return out.flatten(0, 1).t()[None, :, None]


def _on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu"


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """On a GPU: no rounding to TF32, whatever is set elsewhere, and the same algorithms every time, or codes would
    follow neither CPU nor run."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    kinds: Any = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    precisions, ways = [kind.fp32_precision for kind in kinds], (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    legacy = _legacy_precision()
    try:
        if legacy != "highest":  # torch refuses to multiply while its two interfaces disagree
            torch.set_float32_matmul_precision("highest")
        for kind in kinds:
            kind.fp32_precision = "ieee"
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = True, False, True
        yield
    finally:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = ways
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for kind, precision in zip(kinds, precisions):
            kind.fp32_precision = precision


def _legacy_precision() -> str:
    """What `torch.set_float32_matmul_precision` was given; torch only tells while the other interface agrees, and when
    it doesn't the other was used and this one left alone."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def _argmax(scores: Tensor) -> Tensor:
    """First position of the maximum of each row `[N, S]`, over groups of 64 first: a maximum alone is ten times faster
    than one with its position."""
    rows, size = scores.shape
    if size % 64 or scores.device.type != "cpu":
        return scores.argmax(1)
    groups = scores.view(rows, size // 64, 64)
    best = groups.amax(2).argmax(1)
    return best * 64 + groups[torch.arange(rows), best].argmax(1)
