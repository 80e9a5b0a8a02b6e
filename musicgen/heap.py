"""Freed memory stays with the process.

glibc maps every large block anew and hands what is freed back to the kernel, which clears each page again when it is
next touched. Activations, gradients and decoded sound are such blocks, and the same sizes come back at every step: on
two cores a training step of 300M met 122,000 page faults and spent a third of its time in them, decoding half of it
(LOG.md, 2026-11-26). So every command keeps what it has freed. The peak does not change, what lies below it stays.

This is a setting of malloc's main arena, that of the main thread, where ours do their work; a process that trains in
another thread (a worker of Ray) needs MALLOC_ARENA_MAX=1 in its environment as well.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # <malloc.h>
LARGEST = 2**30


def keep_freed() -> bool:
    """Blocks of up to `LARGEST` bytes come from the heap, which does not shrink; False where malloc isn't glibc's.

    An older glibc, whose threshold ends at 32 MiB, takes blocks of any size from the heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system or another C library
        return False
    from_heap = mallopt(_MMAP_THRESHOLD, LARGEST) or mallopt(_MMAP_MAX, 0)
    return bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(from_heap)
