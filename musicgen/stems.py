"""The stems of a recording: voice and accompaniment, without drums and bass, are what a melody is taken from.

Drums and bass would often be the loudest pitch class of a frame; the released melody models were trained on the chroma
of the other two stems. Where nobody has the stems, Demucs separates them: the extra `stems`, and the only file that
imports demucs.

Source: Copet et al. 2023, section 2.3; audiocraft `ChromaStemConditioner` (htdemucs, stems vocals and other).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import soxr
import torch

from musicgen.errors import UserError

SAMPLE_RATE = 44_100  # htdemucs
MODEL = "hf://htdemucs"  # the hub's safetensors; by another name demucs may unpickle a download
_DRUMS = (
    r"drum\w*|\w+drum|perc|percussion|kick|snare|rim|rimshot|tom|tomtom|cymbal|hat|hihat|hh|crash|clap|shaker|tambourine"
    r"|conga|bongo|cajon|cowbell|808|909"
)
_BASS = r"\w*bass|bassline|bassguitar|sub"
_VOICED = r"clarinet|flute|oboe|recorder|sax|saxophone|trumpet|trombone|voice|vocal|vox|singer|choir"  # a bass of these


def load(setting: str = "melody_stems") -> Any:
    """The separator with its published weights, which demucs fetches on first use.

    Args:
        setting: what asked for it, for the message.

    Raises:
        UserError: demucs is not installed, or its weights cannot be had.
    """
    try:
        from demucs.pretrained import get_model
    except ImportError:
        raise UserError(
            f"{setting} needs the package demucs, which is not installed; run `pip install 'demucs>=4.1,<5'` "
            f"(the extra `stems`), or leave --{setting} out to take the melody from the whole mix"
        ) from None
    try:
        return get_model(MODEL)
    except Exception as error:  # its loader raises what its network client raises
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(
            f"the weights of {MODEL.removeprefix('hf://')} are not here and could not be fetched ({reason}); "
            f"run it once on a machine with network, or leave --{setting} out"
        ) from error


def melody(audio: np.ndarray, to_hz: int, separator: Any = None) -> np.ndarray:
    """Voice and accompaniment of `audio` `[2, N]` at 44.1 kHz, mixed to mono `[M]` at `to_hz`.

    Args:
        separator: a demucs model; loaded when left out.
    """
    model = separator if separator is not None else load()
    parts = _apart(audio, model)
    return _mono(sum(part for name, part in zip(model.sources, parts) if has_melody(name)), to_hz)


def has_melody(name: str) -> bool:
    """Whether a stem of this name counts for the melody: all but drums and bass.

    Told by its words in any number, together or apart: "Hi-Hats", "kickDrum 2" and "808" are drums, "Bass guitar" and
    "SubBass" bass; "Bass clarinet" and "Bass voice" are melody.
    """
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())
    drums, bass, voiced = (
        any(re.fullmatch(rf"(?:{kind})(?:e?s)?", word) for word in (*words, "".join(words)))
        for kind in (_DRUMS, _BASS, _VOICED)
    )
    return not drums and (voiced or not bass)


def likeness(sound: np.ndarray, other: np.ndarray, sample_rate_hz: int, seconds: float) -> float:
    """How much a recording and a part of it are one: their largest correlation within a shift of so many `seconds`.

    Both `[N]`, mono. Heard are the 30 s around the loudest second of `other`. A part of a mix has 0.2 to 1, another
    piece hardly 0.06 (the demo's stems); silence has 1, for it may be a part of anything.
    """
    n = min(len(sound), len(other), 30 * sample_rate_hz)
    if not n:
        return 1.0
    power = np.add.reduceat(np.square(other, dtype=np.float64), np.arange(0, len(other), sample_rate_hz))
    start = int(np.clip(int(power.argmax()) * sample_rate_hz - n // 2, 0, min(len(sound), len(other)) - n))
    a, b = (x[start : start + n].astype(np.float64) for x in (sound, other))
    level = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    if level < 1e-6:
        return 1.0
    size, most = 1 << (2 * n - 1).bit_length(), round(seconds * sample_rate_hz)
    found = np.abs(np.fft.irfft(np.fft.rfft(a, size) * np.conj(np.fft.rfft(b, size)), size))
    return float(max(found[: most + 1].max(), found[-most:].max()) / level)


def separate(audio: np.ndarray, to_hz: int, separator: Any = None) -> dict[str, np.ndarray]:
    """All stems of `audio` `[2, N]` at 44.1 kHz by name, each mono `[M]` at `to_hz`."""
    model = separator if separator is not None else load()
    return {name: _mono(part, to_hz) for name, part in zip(model.sources, _apart(audio, model))}


def _apart(audio: np.ndarray, model: Any) -> torch.Tensor:
    """`[stems, 2, N]`; no random shifts: the same file gives the same stems."""
    from demucs.apply import apply_model

    mix = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
    with torch.no_grad():
        return apply_model(model, mix[None], shifts=0, progress=False)[0]


def _mono(part: Any, to_hz: int) -> np.ndarray:
    return np.asarray(soxr.resample(part.mean(dim=0).numpy(), SAMPLE_RATE, to_hz, quality="HQ"), dtype=np.float32)
