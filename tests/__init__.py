"""Tests mirror the three packages. Triton decides when it is imported how kernels run: here in its interpreter."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
