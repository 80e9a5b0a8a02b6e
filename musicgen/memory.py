"""Whether a request fits into memory, asked before anything is encoded.

What grows with the batch and the window (the caches with the prefix, the noise of the draw, logits, the first columns
on their way through a block, the text) and what grows with the duration (the sound) is counted from shapes; what is
free is what the system or the GPU says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from musicgen import patterns
from musicgen.codec import Codec
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.sampler import NOISE_COLUMNS, bucket
from musicgen.windows import Windows

_SOUND_COPIES = 4  # pieces, joined, trimmed, 16-bit
_NOISE_BYTES = 4 + 28  # a float32 that is kept; words, bits and two logarithms while it is made
_BRANCH_LOGITS, _GUIDED_LOGITS = 2, 8  # copies: as computed and as float32; then scaled, sorted, masked, with noise
_ATTENTION_COPIES = 3  # bias, scores and weights of the text encoder's attention


@dataclass(frozen=True)
class Load:
    """What a request asks of a model.

    Attributes:
        clips: B.
        branches: of the guidance.
        text: positions of the longest text, padding included.
        given: frames that the clips begin with.
        windows: how the clips are cut.
        seconds: length of a clip.
        text_heads: attention heads of the text encoder, which hears each text alone.
    """

    clips: int
    branches: int
    text: int
    given: int
    windows: Windows
    seconds: float
    text_heads: int = 0


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


def cache_bytes(engine: Engine, rows: int, entries: int) -> int:
    """Keys and values of `rows` over `entries`, in all layers."""
    return 2 * rows * engine.config.num_layers * engine.config.dim * entries * (torch.finfo(engine.dtype).bits // 8)


def engine_bytes(engine: Engine, load: Load) -> int:
    """What a request allocates beside the weights, on the model's device."""
    lm, windows = engine.config, load.windows
    padded = bucket(load.clips)
    rows, width = padded * load.branches, torch.finfo(engine.dtype).bits // 8
    longest = windows.window if windows.fixed else min(windows.window, windows.total)
    heard = load.text + len(lm.condition.attributes)
    prefix = (lm.condition.chroma_frames if lm.condition.melody else 0) + (0 if lm.cross_attention else heard)
    columns = _columns(engine, longest + windows.margin)
    capacity = engine.capacity(columns + prefix)
    known = max(load.given, windows.window - windows.stride if windows.total > windows.window else 0)
    fed = max(prefix, _columns(engine, min(known, longest)) if known else 1)
    codes = lm.num_codebooks * lm.codebook_size
    encoding = load.text_heads * load.text**2 * 4 * _ATTENTION_COPIES
    parts = (
        cache_bytes(engine, rows, capacity),
        cache_bytes(engine, rows, heard) if lm.cross_attention else 0,
        capacity * lm.dim * width,  # the table of positions
        rows * heard * (2 * lm.condition.text_dim * 4 + lm.dim * 4),  # each branch, all together, projected
        padded * lm.num_codebooks * columns * 8,
        padded * NOISE_COLUMNS * codes * _NOISE_BYTES,
        (rows * _BRANCH_LOGITS + padded * _GUIDED_LOGITS) * codes * 4,
        rows * fed * lm.dim * (6 + 2 * lm.ffn_mult) * width,
    )
    return max(sum(parts), encoding)  # texts are encoded before anything else is allocated


def _columns(engine: Engine, frames: int) -> int:
    """Columns of so many frames; linear, so that no layout of an hour is made for its length."""
    lm = engine.config
    one, two = (patterns.num_columns(n, lm.num_codebooks, pattern=lm.pattern) for n in (1, 2))
    return one + (two - one) * (frames - 1)


def check(engine: Engine, codec: Codec, load: Load) -> None:
    """Refuse what does not fit.

    Raises:
        UserError: names what is needed and what is free.
    """
    sound = round(load.seconds * codec.sample_rate) * codec.channels * 4 * load.clips * _SOUND_COPIES
    needs = {torch.device("cpu"): sound}
    needs[engine.device] = needs.get(engine.device, 0) + engine_bytes(engine, load)  # on a CPU both come from one
    for device, needed in needs.items():
        free = free_bytes(device)
        if free is not None and needed > free:
            raise UserError(
                f"DURATION={load.seconds:g} for {load.clips} {'clip' if load.clips == 1 else 'clips'} needs about "
                f"{needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; "
                "give a shorter DURATION or fewer clips at a time"
                + (f", or a shorter PROMPT than {load.text} tokens" if load.text > 1024 else "")
            )
