"""Weight matrices in the form that a generation step reads fastest.

One step multiplies every weight matrix by a handful of rows, so its time is the time of reading the weights. `pack`
turns a matrix into a callable of that product:

- `float32`: on a CPU oneDNN's layout, whose kernels read at the memory's speed where BLAS does not for few rows.
- `float16`: on a CPU half the bytes, widened to float32 in registers (FBGEMM); on a GPU plain float16.
- `bf16`: on a CPU that multiplies bfloat16 oneDNN's layout, elsewhere plain.
- `int8`: a quarter of the bytes, one scale per output row. On a CPU FBGEMM's kernel, which rounds the input to 7 bits
  by one scale per call: the product then depends slightly on the other rows of the batch. On a GPU the input stays.

Every form gives the same function up to rounding; what that rounding costs is measured by `benchmarks/generate.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen.errors import UserError

Precision = Literal["float32", "bf16", "float16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Product = Callable[[Tensor], Tensor]


def stream_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Type of what flows between the products."""
    if precision == "bf16" or (precision == "int8" and device.type != "cpu"):
        return torch.bfloat16
    return torch.float16 if precision == "float16" and device.type != "cpu" else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this is an x86 processor with instructions for products of bfloat16; elsewhere they are emulated, at a
    tenth of the speed of float32 on some."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pack(weight: Tensor, precision: Precision) -> Product:
    """`x [..., in] -> [..., out]` for `weight [out, in]`; `x` has the type of `stream_dtype`.

    Raises:
        UserError: this build of torch has no kernel for the precision.
    """
    weight = weight.detach()
    dtype = stream_dtype(precision, weight.device)
    if weight.device.type != "cpu":
        return OnGpu(*stored(weight, precision))
    if precision in ("float32", "bf16"):
        return _onednn(weight.to(dtype)) if _has_onednn(dtype) else _plain(weight.to(dtype))
    _need_fbgemm(precision)
    return _fbgemm_float16(weight.float()) if precision == "float16" else _fbgemm_int8(weight.float())


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[out, in]` and scales `[out]` with weight ≈ int8 x scale: symmetric, one scale per output row."""
    scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _plain(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type here with the processor's own instructions."""
    return torch.backends.mkldnn.is_available() and (dtype == torch.float32 or cpu_multiplies_bf16())


def _onednn(weight: Tensor) -> Product:
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight.contiguous(), 2)  # laid out for a clip's two rows; right for any number
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")


class OnGpu:
    """A product as torch does it on a GPU, for any number of rows; for few `musicgen.kernels` reads the same tensors.

    int8 is widened first: torch's own kernel for it took nine times as long for two rows (H200, torch 2.11).
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        self.weight, self.scale = weight, scale

    def __call__(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return F.linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


def stored(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """A matrix as a GPU keeps it: in the type of the stream, or int8 with its scales."""
    if precision == "int8":
        return quantize_rows(weight)
    return weight.detach().to(stream_dtype(precision, weight.device)), None


def has_fbgemm() -> bool:
    """Whether this processor's build of torch can pack float16 and int8."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def _need_fbgemm(precision: str) -> None:
    if not has_fbgemm():
        raise UserError(
            f"precision {precision!r} needs torch's FBGEMM kernels, which this processor's build lacks; "
            "give float32 or bf16"
        )


class _engine:
    """FBGEMM's own packing while inside, whatever the process chose for itself."""

    def __enter__(self) -> None:
        self.before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"

    def __exit__(self, *_: object) -> None:
        torch.backends.quantized.engine = self.before


def _fbgemm_float16(weight: Tensor) -> Product:
    ops: Any = torch.ops.quantized
    with _engine():
        packed = ops.linear_prepack_fp16(weight, None)
    return lambda x: ops.linear_dynamic_fp16(x, packed)


def _fbgemm_int8(weight: Tensor) -> Product:
    ops: Any = torch.ops.quantized
    quantized, scale = quantize_rows(weight)
    zero = torch.zeros(len(scale), dtype=torch.long)
    with _engine(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantised tensors leave torch after the range we allow
        tensor = torch._make_per_channel_quantized_tensor(quantized, scale.double(), zero, 0)
        packed = ops.linear_prepack(tensor, None)
    # With 8-bit inputs the instruction without VNNI saturates its 16-bit sums; 7 bits cannot.
    return lambda x: ops.linear_dynamic(x, packed, True)
