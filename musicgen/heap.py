"""Freed memory stays with the process.

glibc maps every large block anew and hands what is freed back to the kernel, which clears each page again when it is
next touched. Activations, gradients and decoded sound are such blocks, and the same sizes come back at every step: on
two cores a training step of 300M met 122,000 page faults and spent a third of its time in them, decoding half of it
(LOG.md, 2026-11-26). So every command keeps what it has freed. The peak does not change, what lies below it stays.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST = 2**30


def keep_freed() -> bool:
    """Blocks of up to `LARGEST` bytes come from the heap, which does not shrink; False where malloc isn't glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system or another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, -1))
