"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from musicgen import heap
if sys.argv[1] == "keep":
    assert heap.keep_freed()
def work():
    blocks = [torch.ones(n * 2**20) for n in (3, 12, 40)]
for _ in range(8):  # until every size has found its place
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc isn't glibc's here")
def test_large_blocks_are_not_mapped_anew() -> None:
    assert _faults("keep") < 0.1 * _faults("leave")
