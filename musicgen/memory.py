"""Whether a request fits into memory, asked before the work begins.

The caches of a window, which grow with the batch, and the sound, which grows with the duration, are counted from
shapes; what is free is what the system or the GPU says.
"""

from __future__ import annotations

from pathlib import Path

import torch

from musicgen.codec import Codec
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.sampler import bucket
from musicgen.windows import Windows

_SOUND_COPIES = 4  # pieces, joined, trimmed, 16-bit


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def cache_bytes(engine: Engine, rows: int, columns: int) -> int:
    """Self-attention keys and values of `rows` over `columns`."""
    return 2 * rows * engine.config.num_layers * engine.config.dim * columns * (torch.finfo(engine.dtype).bits // 8)


def check(engine: Engine, codec: Codec, batch: int, branches: int, windows: Windows, seconds: float) -> None:
    """Refuse what does not fit.

    Raises:
        UserError: names what is needed and what is free.
    """
    caches = cache_bytes(
        engine, bucket(batch) * branches, windows.window + windows.margin + engine.config.num_codebooks
    )
    sound = round(seconds * codec.sample_rate) * codec.channels * 4 * batch * _SOUND_COPIES
    for needed, device in ((caches, engine.device), (sound, torch.device("cpu"))):
        free = free_bytes(device)
        if free is not None and needed > free:
            raise UserError(
                f"DURATION={seconds:g} for {batch} {'clip' if batch == 1 else 'clips'} needs about "
                f"{needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; "
                "give a shorter DURATION or fewer clips at a time"
            )
