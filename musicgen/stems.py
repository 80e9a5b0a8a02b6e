"""Voice and accompaniment of a recording, without drums and bass: what a melody is taken from (the extra `stems`).

The only file that imports demucs. Drums and bass would often be the loudest pitch class of a frame; the released
melody models were trained on the chroma of the other two stems.

Source: Copet et al. 2023, section 2.3; audiocraft `ChromaStemConditioner` (htdemucs, stems vocals and other).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import soxr
import torch

from musicgen.errors import UserError

SAMPLE_RATE = 44_100  # htdemucs
MODEL = "hf://htdemucs"  # the hub's safetensors; by another name demucs may unpickle a download
KEPT = ("vocals", "other")


def load() -> Any:
    """The separator with its published weights, which demucs fetches on first use.

    Raises:
        UserError: demucs is not installed, or its weights cannot be had.
    """
    try:
        from demucs.pretrained import get_model
    except ImportError:
        raise UserError(
            "melody_stems needs the package demucs, which is not installed; run `pip install 'demucs>=4.1,<5'` "
            "(the extra `stems`), or leave --melody_stems out to take the melody from the whole mix"
        ) from None
    try:
        return get_model(MODEL)
    except Exception as error:  # its loader raises what its network client raises
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"the weights of {MODEL.removeprefix('hf://')} are not here and could not be fetched ({reason}); "
            "run it once on a machine with network, or leave --melody_stems out"
        ) from error


def melody(audio: np.ndarray, to_hz: int, separator: Any = None) -> np.ndarray:
    """Voice and accompaniment of `audio` `[2, N]` at 44.1 kHz, mixed to mono `[M]` at `to_hz`.

    Args:
        separator: a demucs model; loaded when left out.
    """
    model = separator if separator is not None else load()
    from demucs.apply import apply_model

    mix = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
    with torch.no_grad():  # no random shifts: the same file gives the same melody
        parts = apply_model(model, mix[None], shifts=0, progress=False)[0]
    kept = sum(parts[model.sources.index(name)] for name in KEPT)
    return np.asarray(soxr.resample(kept.mean(dim=0).numpy(), SAMPLE_RATE, to_hz, quality="HQ"), dtype=np.float32)
