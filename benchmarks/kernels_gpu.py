"""How to cut the kernels of a generation step on this GPU: `python -m benchmarks.kernels_gpu`.

Every product of a layer of 300m, 1.5b and 3.3b is timed in captured graphs under each of some cuts, on fresh weights so
that none come from the cache; attention under several reaches. The best of each is what `musicgen.kernels.cut_of` and
`reach_of` should say. Printed beside them: bytes over seconds, whose ceiling is the memory's bandwidth, and the
error against float64. Compiling goes first, in as many processes as there are cores.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

WIDTHS = {"300m": 1024, "1.5b": 1536, "3.3b": 2048}
PRODUCTS = {"qkv": (3, 1), "out": (1, 1), "query": (1, 1), "up": (4, 1), "down": (1, 4)}  # outputs, inputs in widths
FEW = [(512, 4, 2), (512, 4, 4), (512, 2, 2), (1024, 4, 4), (1024, 2, 4), (2048, 4, 8), (2048, 2, 4)]
UNITS = [
    (256, 64, 4, 4), (256, 64, 4, 3), (256, 64, 4, 5), (128, 64, 4, 6), (512, 64, 4, 3), (512, 64, 8, 3),
    (256, 64, 8, 4), (256, 128, 8, 3), (128, 128, 4, 5), (256, 16, 2, 5), (256, 32, 2, 4), (512, 16, 2, 3),
]  # fmt: skip
FRESH_BYTES = 150_000_000

Case = tuple[str, str, int, bool]  # size, product, rows, int8


def cases() -> Iterator[Case]:
    """Every product at two rows; 3.3b's also in int8, at four and at sixteen rows."""
    for size in WIDTHS:
        for product in PRODUCTS:
            yield size, product, 2, False
    for rows, int8 in ((2, True), (4, False), (16, False)):
        for product in PRODUCTS:
            yield "3.3b", product, rows, int8


def cuts(rows: int) -> list[Any]:
    """What is tried for a product of so many rows."""
    from musicgen.kernels import Cut

    few = [Cut(*cut) for cut in FEW] if rows <= 2 else []
    return few + [Cut(*cut, units=True) for cut in UNITS]


def layers(case: Case, copies: int = 1) -> tuple[list[Any], torch.Tensor, torch.Tensor, bool]:
    """So many products of a kind with weights of their own, input, output, and whether they add to it."""
    from musicgen.kernels import Linear

    size, product, rows, int8 = case
    outputs, inputs = (WIDTHS[size] * times for times in PRODUCTS[product])
    device = torch.device("cuda")

    def one() -> Any:
        norm = None
        if product in ("qkv", "query", "up"):
            gain, bias = torch.rand(2, inputs, device=device).bfloat16()
            norm = (gain, bias, 1e-5)
        activation = "gelu" if product == "up" else ""
        if int8:
            weight = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
            return Linear(weight, torch.rand(outputs, device=device) / 1000, norm, activation)
        return Linear(torch.randn(outputs, inputs, device=device).bfloat16() / 50, None, norm, activation)

    x = torch.randn(rows, inputs, device=device).bfloat16()
    out = torch.zeros(rows, outputs, device=device).bfloat16()
    return [one() for _ in range(copies)], x, out, product in ("out", "down")


def error_of(case: Case) -> float:
    """Relative error of a product as it is cut now, against float64."""
    (linear,), x, out, adds = layers(case)
    linear(x, out, add=adds)
    weight = linear.weight.double() * (1 if linear.scale is None else linear.scale.double()[:, None])
    true = x.double()
    if linear.norm is not None:
        gain, bias, eps = linear.norm
        true = F.layer_norm(true, gain.shape, gain.double(), bias.double(), eps)
    true = true @ weight.t()
    true = F.gelu(true) if linear.activation else true
    return float((out.double() - true).norm() / true.norm())


def compile_cuts(case: Case) -> None:
    """Have every cut of a case in Triton's cache; what does not compile is left out later."""
    (linear,), x, out, adds = layers(case)
    for cut in cuts(case[2]):
        try:
            linear(x, out, add=adds, cut=cut)
        except Exception as error:  # more shared memory or registers than there are
            print(f"{case}: {cut}: {type(error).__name__}")


def microseconds(work: Callable[[], Any], count: int) -> float:
    """Of one of `count` pieces of `work`, by replaying it as a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(5):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1000 / 5 / count


def time_of(made: list[Any], x: torch.Tensor, out: torch.Tensor, adds: bool, cut: Any) -> float:
    """Microseconds of one of these products under a cut; None takes the one that `cut_of` says."""
    return microseconds(lambda: [one(x, out, add=adds, cut=cut) for one in made], len(made))


def measure_products() -> None:
    """Print the cuts of each product, fastest first."""
    for case in cases():
        size, product, rows, int8 = case
        outputs, inputs = (WIDTHS[size] * times for times in PRODUCTS[product])
        read = outputs * inputs * (1 if int8 else 2)
        drawn = layers(case, max(4, FRESH_BYTES // read))
        found: list[tuple[float, Any]] = []
        for cut in cuts(rows):
            with contextlib.suppress(Exception):  # what did not compile
                found.append((time_of(*drawn, cut), cut))
        found.sort(key=lambda pair: pair[0])
        now = time_of(*drawn, None)
        said = ", ".join(
            f"{us:.2f} {'units' if cut.units else 'lanes'} {cut.tile}/{cut.block}/{cut.warps}/{cut.stages}"
            for us, cut in found[:4]
        )
        print(
            f"{size} {product:<6}{rows:>3} rows {'int8' if int8 else 'bf16'}: now {now:.2f} us, "
            f"{read / now / 1e3:.0f} GB/s, error {error_of(case):.4f}; best {said}",
            flush=True,
        )


def measure_attention() -> None:
    """Print the time of attention by reach, at three lengths."""
    from musicgen import kernels

    capacity, width = 1536, 64
    for rows, heads in ((2, 16), (2, 32), (16, 32), (128, 32)):
        shape = (rows, heads, capacity, width)
        count = 8 if rows == 2 else 2
        caches = [tuple(torch.randn(shape, device="cuda").bfloat16() for _ in range(2)) for _ in range(count)]
        qkv = torch.randn(rows, 3 * heads * width, device="cuda").bfloat16()
        out = torch.zeros(rows, heads * width, device="cuda").bfloat16()
        for reach in (64, 128, 256, capacity):
            scratch, said = kernels.Scratch(qkv.device, *shape, reach), []
            for length in (300, 800, 1500):
                at = torch.tensor([length], device="cuda")
                reads = [functools.partial(kernels.attend, qkv, k, v, None, at, scratch, out) for k, v in caches]
                taken = microseconds(lambda every=reads: [read() for read in every], count)
                bytes_read = rows * heads * (length + 1) * width * 4
                said.append(f"{length + 1}: {taken:.2f} us, {bytes_read / taken / 1e3:.0f} GB/s")
            print(f"attention of {rows} rows and {heads} heads with a reach of {reach}: " + "; ".join(said), flush=True)


def main(argv: Sequence[str]) -> None:
    """Compile, measure, print; `attention` alone leaves the products out."""
    if not torch.cuda.is_available():
        raise SystemExit("error: this measures kernels on a GPU, and torch finds none here")
    if "attention" in argv:
        measure_attention()
        return
    processes = max(min((os.cpu_count() or 2) - 2, 14), 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_cuts, list(cases()), chunksize=1)
    with torch.no_grad():
        measure_products()
        measure_attention()


if __name__ == "__main__":
    main(sys.argv[1:])
