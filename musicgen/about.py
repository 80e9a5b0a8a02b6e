"""Which program made a file."""

from __future__ import annotations

import importlib.metadata


def software() -> str:
    """Name and version of this program; the name alone where it runs from its sources without being installed."""
    try:
        return f"musicgen-pipeline {importlib.metadata.version('musicgen-pipeline')}"
    except importlib.metadata.PackageNotFoundError:
        return "musicgen-pipeline"
