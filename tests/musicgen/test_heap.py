"""Freed memory stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, statistics, sys, threading
import torch
from musicgen import heap
if sys.argv[1] == "keep":
    assert heap.keep_freed()
def work():
    blocks = [torch.ones(n * 2**20) for n in (40, 12, 3)]
def count():
    faults = []
    for _ in range(17):  # the first half, until every size has found its place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(statistics.median(faults[8:]))
if sys.argv[2] == "thread":
    other = threading.Thread(target=count)
    other.start()
    other.join()
else:
    count()
"""


def _faults(mode: str, where: str) -> int:
    """Page faults of one round, the median of nine."""
    env = {**os.environ, **({"MALLOC_ARENA_MAX": "1"} if where == "thread" else {})}
    words = [sys.executable, "-c", SCRIPT, mode, where]
    return int(subprocess.run(words, check=True, capture_output=True, text=True, env=env).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc isn't glibc's here")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_large_blocks_are_not_mapped_anew(where: str) -> None:
    """In a thread with one arena for all, as Ray's workers have."""
    assert _faults("keep", where) < 0.1 * _faults("leave", where)
