"""Speed of encoding on one GPU: times real time by batch, for the paper's 32 kHz network with random weights.

The measurement behind the section `codec` of `benchmarks.gpu`: 56.9 M parameters in float32 without TF32, clips of 30 s
that lie on the device. Aim: 3,000 times real time at batch 32 or more. Beside it stands how many of the network's
multiplications and additions that is per second, and how many the device reaches in one large product of matrices
(`floor`); two frames of a downsampling take three products and not four, so the first counts more than is computed.
The codes of a clip are held against those of the CPU. `tiny` takes a small network, clips of a second and a small
product, to try the code anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.codec import mac_per_second, random_network
from musicgen import codec as codecs
from musicgen import seanet

BATCHES = (32, 64)
AIM = 3000
PRODUCT = 8192


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of `work` after one call that warms up, the device waited for at both ends."""
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def matmul_tflops(device: torch.device, size: int, repeats: int) -> float:
    """Trillions of multiplications and additions per second of a product of two `[size, size]` in exact float32."""
    a, b = torch.randn(2, size, size, device=device)
    with seanet._exact(device):
        return 2 * size**3 / timed(lambda: a @ b, device, repeats) / 1e12


@torch.no_grad()
def measure(
    device: torch.device, *, tiny: bool = False, batches: Sequence[int] = BATCHES, repeats: int = 5
) -> dict[str, Any]:
    """Times real time, trillions of operations per second beside those of a product of matrices, and peak memory by
    batch; share of a clip's codes that equal the CPU's."""
    size = codecs.CodecConfig(num_filters=4, hidden_size=16) if tiny else codecs.CodecConfig()
    clip_seconds = 1.0 if tiny else 30.0
    model, twin = random_network(size, torch.randn(1, 1, size.sample_rate_hz) * 0.1), codecs.build(size)
    twin.load_state_dict(model.state_dict())
    parameters = sum(p.numel() for p in model.parameters())  # before the codec folds them into plain weights
    tera_per_second = 2 * mac_per_second(model) / 1e12
    on_cpu, codec = codecs.Codec(twin, "cpu"), codecs.Codec(model, "random").to(device)
    samples = round(clip_seconds * codec.sample_rate)
    clip = torch.randn(1, 1, samples) * 0.1
    floor = matmul_tflops(device, 256 if tiny else PRODUCT, repeats)
    found: dict[str, Any] = {
        "parameters": parameters,
        "tflop_per_audio_second": tera_per_second,
        "clip_seconds": clip_seconds,
        "codes_equal_to_cpu": float((codec.encode(clip).cpu() == on_cpu.encode(clip)).float().mean()),
        "aim": AIM,
    }
    for batch in batches:
        clips = torch.randn(batch, 1, samples, device=device) * 0.1
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(lambda clips=clips: codec.encode(clips), device, repeats)
        times_real_time = batch * clip_seconds / seconds
        found[f"{batch} clips"] = {
            "times_real_time": times_real_time,
            "seconds": seconds,
            "tflop_per_second": tera_per_second * times_real_time,
            "floor_tflop_per_second": floor,
            "share_of_floor": tera_per_second * times_real_time / floor,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        }
    return found
