"""What MODEL=, INIT= and FROM= may name beside our own releases, and how it becomes one.

A transformers folder, a folder with audiocraft's exported files, or a model hub's name such as
`facebook/musicgen-small`. Where a release is wanted, it is imported once into a cache (`MUSICGEN_CACHE`, else
`~/.cache/musicgen-pipeline`) and read from there. The released models of the paper are CC-BY-NC-4.0; their licence
goes along with everything made of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path

from musicgen import files
from musicgen.errors import UserError
from musicgen.interop.parts import NON_COMMERCIAL, Parts, as_trained, to_release

_SIZES = ("small", "medium", "large", "melody", "melody-large")
PUBLISHED = tuple(f"facebook/musicgen-{kind}{size}" for kind in ("", "stereo-") for size in _SIZES)
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "README.md"]  # never a pickled file of transformers
_AUDIOCRAFT = ["state_dict.bin", "compression_state_dict.bin", "README.md"]


def kind_of(name: str) -> str | None:
    """`transformers`, `audiocraft` or `hub` for what can be imported; None for all else (releases, mistakes)."""
    path = Path(name.removeprefix("file://")).expanduser()
    if path.name == "state_dict.bin" and path.is_file():
        return "audiocraft"
    if path.is_dir():
        if (path / "state_dict.bin").is_file():
            return "audiocraft"
        return "transformers" if files.model_type(path) in ("musicgen", "musicgen_melody") else None
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return None
    # A name of two parts whose first is a folder here is a mistyped path, not a hub's model.
    return None if Path(name.split("/")[0]).is_dir() else "hub"


def fetch(name: str) -> Path:
    """The folder of a hub's model: from the hub's local cache, else fetched.

    Raises:
        UserError: it is not here and the hub cannot be reached, or has no such model; says what to do.
    """
    import huggingface_hub

    from musicgen import conditioning

    def snapshot(local: bool) -> Path:
        patterns = _WANTED
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=local))
        if not list(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_AUDIOCRAFT, local_files_only=local))
        return folder

    def whole(folder: Path) -> bool:
        return bool(list(folder.glob("*.safetensors"))) or (folder / "state_dict.bin").is_file()

    try:
        folder = snapshot(local=True)
        if whole(folder):
            return folder
    except (OSError, ValueError, RecursionError):
        pass
    try:
        conditioning._reach_hub()
        folder = snapshot(local=False)
    except Exception as error:  # the hub client raises many kinds: DNS, proxy, 404, gated, time-out
        known = "" if name in PUBLISHED else f" (the paper's own are {', '.join(PUBLISHED)})"
        raise UserError(
            f"{name!r} is neither a folder here nor on this machine's copy of the model hub, and could not be fetched "
            f"from the hub ({conditioning._first_line(error)}){known}. On a machine with network run "
            f"`hf download {name} --local-dir FOLDER`, copy FOLDER here and give it instead of the name"
        ) from error
    if not whole(folder):
        raise UserError(f"{name!r} on the model hub holds neither safetensors nor audiocraft's state_dict.bin")
    return folder


def read(source: str, codec: str = "", text_encoder: str = "") -> Parts:
    """The model that `source` names, taken apart.

    Args:
        source: a transformers folder, a folder with audiocraft's files (or its state_dict.bin), or a hub name.
        codec, text_encoder: name or folder of each, where audiocraft's files only name them and they stand elsewhere.

    Raises:
        UserError: nothing that can be imported.
    """
    from musicgen.interop import audiocraft, huggingface

    kind = kind_of(source)
    if kind is None:
        raise UserError(
            f"FROM={source!r} is nothing that can be imported; give a transformers folder (config.json of a MusicGen "
            f"and model.safetensors), a folder with audiocraft's state_dict.bin, or a hub name such as {PUBLISHED[0]}"
        )
    folder = fetch(source) if kind == "hub" else Path(source.removeprefix("file://")).expanduser()
    if folder.is_file():
        folder = folder.parent
    try:
        if (folder / "state_dict.bin").is_file() and not list(folder.glob("*.safetensors")):
            parts = audiocraft.read(folder, source, codec, text_encoder)
        else:
            parts = huggingface.read(folder, source)
        parts = as_trained(parts, folder)
    except UserError:
        raise
    except Exception as error:  # files from elsewhere: whatever is wrong with them is not this program's state
        raise UserError(
            f"FROM={source!r} is damaged or not what its files say it is "
            f"({type(error).__name__}: {' '.join(str(error).split())[:150]}); copy or export it again"
        ) from error
    if source in PUBLISHED:
        parts.licence = NON_COMMERCIAL
    return parts


def _kept() -> Path:
    """Where imported models are kept."""
    root = Path(os.environ.get("MUSICGEN_CACHE") or Path.home() / ".cache" / "musicgen-pipeline")
    return root / "imports"


def imported() -> list[str]:
    """The releases that were imported on this machine."""
    folder = _kept()
    return sorted(str(p) for p in folder.iterdir() if (p / "config.json").is_file()) if folder.is_dir() else []


def as_release(name: str) -> str:
    """The release behind what can be imported, made once and kept; any other name comes back as it is.

    Raises:
        UserError: as `read`.
    """
    kind = kind_of(name)
    if kind is None:
        return name
    folder = fetch(name) if kind == "hub" else Path(name.removeprefix("file://")).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), state]).encode()).hexdigest()[:16]
    kept = _kept() / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-')[-60:]}-{key}"
    if not (kept / "config.json").is_file():
        print(f"importing {name} once, into {kept}", file=sys.stderr)
        kept.parent.mkdir(parents=True, exist_ok=True)
        to_release(read(name), kept)
    return str(kept)
