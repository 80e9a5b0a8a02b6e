"""Speed of generation on one GPU: steps per second by size, batches of clips, captured graphs beside plain steps.

The measurement behind the section `generation` of `benchmarks.gpu`. Random weights, guidance on, whole clips of 30 s so
that the caches are read at every length. Beside each figure stands its floor: the bytes that the steps must read over
the read bandwidth of this GPU, measured here. `tiny` takes the demo's shape and clips of a second, to try the code.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.models import TEXT_TOKENS, random_model
from musicgen import memory
from musicgen.conditions import Conditions
from musicgen.engine import Engine
from musicgen.lm import MusicLM
from musicgen.packing import Precision
from musicgen.sampler import UNKNOWN, Sampler, bucket
from musicgen.sampling import SamplingConfig

FRAMES = 1500
CASES: tuple[tuple[str, Precision, int], ...] = (
    ("300m", "bf16", 1), ("300m", "int8", 1), ("1.5b", "bf16", 1), ("3.3b", "bf16", 1), ("3.3b", "int8", 1),
    ("3.3b", "bf16", 4), ("3.3b", "bf16", 16), ("3.3b", "bf16", 64),
)  # fmt: skip


TINY: tuple[tuple[str, Precision, int], ...] = (("demo", "bf16", 1), ("demo", "int8", 1), ("demo", "bf16", 3))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sampler_of(engine: Engine, clips: int, frames: int, *, graphs: bool = True) -> Sampler:
    """A window of guided clips, laid out and ready to advance."""
    shape = (clips, TEXT_TOKENS, engine.config.condition.text_dim)
    text = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(engine.device)
    prompted = Conditions(text, torch.ones(shape[:2], dtype=torch.bool, device=engine.device))
    made = Sampler(
        engine, [prompted, prompted.without_text(engine.lm)], list(range(clips)), SamplingConfig(), frames,
        frame_rate=50, sample_rate_hz=32_000, graphs=graphs, scales=torch.full((1, frames), 3.0, device=engine.device),
    )  # fmt: skip
    return made


def begin(sampler: Sampler, frames: int) -> None:
    """Lay the window out anew; graphs that were captured stay."""
    shape = (sampler.batch, sampler.engine.config.num_codebooks, frames)
    sampler.begin(torch.full(shape, UNKNOWN, device=sampler.engine.device))


def seconds_of(sampler: Sampler, frames: int) -> float:
    """Seconds of all steps of a window, the device waited for at both ends only."""
    device = sampler.engine.device
    begin(sampler, frames)
    _wait(device)
    began = time.perf_counter()
    while not sampler.done:
        sampler.advance()
    _wait(device)
    return time.perf_counter() - began


def read_bandwidth(device: torch.device, elements: int = 2**30) -> float:
    """Bytes per second of summing so many float32 (4 GiB), the best of ten."""
    data = torch.ones(elements, device=device)
    best = float("inf")
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        data.sum()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return data.numel() * 4 / best


def graphs_equal_plain_steps(lm: MusicLM, frames: int = 400) -> bool:
    """Whether captured graphs draw the tokens that plain steps draw, over two windows."""
    engine, made = Engine(lm, "bf16"), []
    for graphs in (True, False):
        sampler = sampler_of(engine, 2, frames, graphs=graphs)
        for _ in range(2):
            seconds_of(sampler, frames)
        made.append(sampler.codes(0, frames))
    return bool(torch.equal(*made))


def error_of_kernels(lm: MusicLM, precision: Precision, clips: int = 1, columns: int = 40) -> float | None:
    """Relative distance of the logits of `musicgen.fused` from those of torch's operations, over the same columns; None
    where that way is not taken."""
    engine, made = Engine(lm, precision), []
    fused = engine.fused
    if fused is None:
        return None
    for engine.fused in (fused, None):
        sampler = sampler_of(engine, clips, 300, graphs=False)
        begin(sampler, 300)
        sampler.cache.rewind()
        said, generator = [], torch.Generator().manual_seed(0)
        for _ in range(columns):
            tokens = torch.randint(0, engine.config.codebook_size, (clips, 4, 1), generator=generator)
            tokens = tokens.repeat(2, 1, 1).to(engine.device)
            said.append(engine.feed(tokens, sampler.cache, sampler.cache.capacity).clone())
            sampler.cache.position += 1
        made.append(torch.stack(said))
    return float((made[0] - made[1]).norm() / made[1].norm())


def measure(device: torch.device, *, tiny: bool = False, frames: int = FRAMES) -> dict[str, Any]:
    """All figures; a case that does not fit into the memory says so."""
    on_gpu = device.type == "cuda"
    bandwidth = read_bandwidth(device, 2**20 if tiny else 2**30)
    found: dict[str, Any] = {"read_bandwidth_gb_per_second": bandwidth / 1e9}
    lm, name = None, ""
    for size, precision, clips in TINY if tiny else CASES:
        if size != name:
            lm, name = None, size
            torch.cuda.empty_cache()
            lm = random_model(size, device, torch.bfloat16)
        assert lm is not None
        if "graphs_equal_plain_steps" not in found:
            found["graphs_equal_plain_steps"] = graphs_equal_plain_steps(lm, min(frames, 400))
            found["error_of_kernels"] = {kind: error_of_kernels(lm, kind) for kind in ("bf16", "int8")}
        engine = Engine(lm, precision)
        case = f"{size}, {precision}, {clips} {'clip' if clips == 1 else 'clips'}"
        needed, free = memory.cache_bytes(engine, 2 * bucket(clips), frames), memory.free_bytes(device)
        if free is not None and needed > 0.95 * free:
            found[case] = {"fits": False, "cache_gib": needed / 2**30}
            continue
        sampler = sampler_of(engine, clips, frames)
        seconds_of(sampler, frames)  # captures
        seconds = seconds_of(sampler, frames)
        steps = sampler.length - 2  # the first column is the start, the second is drawn with the layout
        floor = sum(engine.step_bytes(2 * clips, p, TEXT_TOKENS) for p in range(0, frames, 50)) * 50 / bandwidth
        found[case] = {
            "steps_per_second": steps / seconds,
            "times_real_time": clips * frames / 50 / seconds,
            "share_of_floor": floor / seconds,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        }
        if clips == 1 and precision == "bf16":
            few = min(frames, 200)
            plain = sampler_of(engine, 1, few, graphs=False)
            seconds_of(plain, few)
            found[case]["steps_per_second_without_graphs"] = (plain.length - 2) / seconds_of(plain, few)
            del plain
        del sampler, engine
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return found
