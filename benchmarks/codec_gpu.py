"""Speed of encoding on one GPU: times real time by batch, for the paper's 32 kHz network with random weights.

The measurement behind the section `codec` of `benchmarks.gpu`: 56.9 M parameters in float32 without TF32, clips of 30 s
that lie on the device. Aim: 3,000 times real time at batch 32 or more. The codes of a clip are held against those of
the CPU. `tiny` takes a small network and clips of a second, to try the code anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.codec import random_network
from musicgen import codec as codecs

BATCHES = (32, 64)
AIM = 3000


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


@torch.no_grad()
def measure(
    device: torch.device, *, tiny: bool = False, batches: Sequence[int] = BATCHES, repeats: int = 5
) -> dict[str, Any]:
    """Times real time and peak memory by batch; share of a clip's codes that equal the CPU's."""
    size = codecs.CodecConfig(num_filters=4, hidden_size=16) if tiny else codecs.CodecConfig()
    clip_seconds = 1.0 if tiny else 30.0
    model, twin = random_network(size, torch.randn(1, 1, size.sample_rate_hz) * 0.1), codecs.build(size)
    twin.load_state_dict(model.state_dict())
    on_cpu, codec = codecs.Codec(twin, "cpu"), codecs.Codec(model, "random").to(device)
    samples = round(clip_seconds * codec.sample_rate)
    clip = torch.randn(1, 1, samples) * 0.1
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in codec.model.parameters()),
        "clip_seconds": clip_seconds,
        "codes_equal_to_cpu": float((codec.encode(clip).cpu() == on_cpu.encode(clip)).float().mean()),
        "aim": AIM,
    }
    for batch in batches:
        clips = torch.randn(batch, 1, samples, device=device) * 0.1
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(lambda clips=clips: codec.encode(clips), device, repeats)
        found[f"{batch} clips"] = {
            "times_real_time": batch * clip_seconds / seconds,
            "seconds": seconds,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        }
    return found
