"""What a run may compute on: kinds of GPU with memory, peak and links, and what this machine has.

Peaks are the makers' dense figures, in bf16 and, without tensor cores, in float32: training takes no TF32. Links are
what collectives reach, about 0.8 of the nominal rate. They are yardsticks for a plan (training.budget), not measured.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from musicgen.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One kind of processor.

    Attributes:
        memory: bytes of one.
        peak: dense bf16 FLOP per second; None when it is not known.
        peak_float32: the same in float32.
        link: bytes per second and GPU of a collective inside a node (bus bandwidth).
        network: the same across nodes, all network cards of a node together.
        per_node: GPUs of a usual node.
    """

    name: str
    memory: float
    peak: float | None
    peak_float32: float | None = None
    link: float = 350e9
    network: float = 350e9
    per_node: int = 8

    @property
    def is_cpu(self) -> bool:
        """Whether these are processes on a CPU."""
        return self.name == "cpu"

    def peak_in(self, *, bf16: bool) -> float | None:
        """Dense FLOP per second in bf16, else in float32; None when it is not known."""
        return self.peak if bf16 else self.peak_float32


DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("h200", 139.8 * GIB, 989e12, 67e12),
        Device("h100-80", 79.1 * GIB, 989e12, 67e12),
        Device("a100-80", 79.2 * GIB, 312e12, 19.5e12, link=230e9, network=160e9),
        Device("a100-40", 39.4 * GIB, 312e12, 19.5e12, link=230e9, network=160e9),
        Device("l40s", 44.4 * GIB, 362e12, 91.6e12, link=22e9, network=20e9),
        Device("a10g", 22.0 * GIB, 70e12, 35e12, link=10e9, network=6e9, per_node=4),
        Device("rtx4090", 23.6 * GIB, 165e12, 82.6e12, link=20e9, network=3e9, per_node=4),
        Device("rtx3090", 23.6 * GIB, 71e12, 35.6e12, link=10e9, network=3e9, per_node=4),
    )
}


# A word of the name that the driver gives, and the kind it stands for; the memory is the one that it reports.
_BY_WORD = {
    "h200": "h200",
    "h100": "h100-80",
    "a100": "a100-80",
    "l40s": "l40s",
    "a10g": "a10g",
    "4090": "rtx4090",
    "3090": "rtx3090",
}


def device_named(name: str) -> Device:
    """The GPU of a name in `DEVICES`. Raises `UserError` naming all."""
    if name.lower() not in DEVICES:
        raise UserError(f"unknown GPU {name!r}; allowed: {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def device_here(processes: int, uses_gpu: bool) -> Device:
    """What this machine has: its GPU (by name, with the memory it reports), or its memory shared by the processes."""
    if not uses_gpu:
        return Device("cpu", host_memory() / processes, None, link=5e9, network=1e9, per_node=processes)
    import torch

    properties = torch.cuda.get_device_properties(0)
    title = properties.name.lower()
    for word, key in _BY_WORD.items():
        if word in title:
            return replace(DEVICES[key], memory=float(properties.total_memory))
    return Device(properties.name, float(properties.total_memory), None)


def host_memory() -> float:
    """Bytes of memory that this process may use: the machine's, or the container's limit where that is lower."""
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, float(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return total


@functools.cache
def cpu_rate(bf16: bool, seconds: float = 0.2) -> float:
    """FLOP per second of a matrix product of this process, measured once: the yardstick for a time on a CPU."""
    import torch

    a = torch.randn(768, 768, dtype=torch.bfloat16 if bf16 else torch.float32)
    a @ a
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ a
        done += 1
    return done * 2 * 768**3 / (time.perf_counter() - began)


def peak_of(device: Device, ranks: int, *, bf16: bool) -> float | None:
    """FLOP per second of all ranks that an MFU is a share of, in the run's precision: dense peaks of GPUs, on a CPU
    what a matrix product of this process reaches; None for a GPU that is not known."""
    peak = cpu_rate(bf16) if device.is_cpu else device.peak_in(bf16=bf16)
    return None if peak is None else ranks * peak


# Share of the bf16 peak that training reached on one H200, by the model's width (LOG.md, 2026-11-26; `make bench-gpu`).
MEASURED = {1024: 0.43, 1536: 0.47, 2048: 0.50}


def expected_mfu(width: int) -> float:
    """The share of the peak to reckon with for a model of this width: that of the next smaller one measured."""
    return MEASURED[max((measured for measured in MEASURED if measured <= width), default=min(MEASURED))]


def rate_of(device: Device, *, bf16: bool, mfu: float, assumed: bool = True) -> tuple[float | None, str]:
    """Model FLOP per second and rank to reckon with, and the words that say so.

    Args:
        assumed: whether `mfu` is somebody's guess and not `expected_mfu`.
    """
    if device.is_cpu:
        rate = cpu_rate(bf16)
        return mfu * rate, f"{mfu:.0%} of the {rate / 1e9:.0f} GFLOP/s that a matrix product reaches here"
    peak = device.peak_in(bf16=bf16)
    if peak is None:
        return None, ""
    source = "assumed" if assumed else "one H200's at the nearest width"
    if not (assumed or bf16):
        source = "that of bf16, not measured in float32"
    precision = "bf16" if bf16 else "float32"
    return mfu * peak, f"an MFU of {mfu:.0%} ({source}; of {peak / 1e12:.3g} TFLOP/s dense {precision})"
