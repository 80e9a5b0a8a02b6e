"""The melody bottleneck: lengths of the reference, the right pitch classes, silence marked."""

from __future__ import annotations

import numpy as np
import pytest

from musicgen import chroma
from musicgen.chroma import HOP, NONE, chroma_bins

A4 = 9


def tone(hz: float, seconds: float) -> np.ndarray:
    """A sine `[N]` at 32 kHz."""
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(32_000 * seconds)) / 32_000)).astype(np.float32)


def test_lengths_of_the_reference() -> None:
    assert len(chroma_bins(np.zeros(30 * 32_000, np.float32))) == 235
    assert len(chroma_bins(np.zeros(1, np.float32))) == 5


@pytest.mark.parametrize("semitone", range(12))
def test_every_pitch_class(semitone: int) -> None:
    bins = chroma_bins(tone(440.0 * 2 ** (semitone / 12), 2.0))
    assert set(bins[2:-2]) == {(A4 + semitone) % 12}


def test_silence_is_marked_and_only_silence() -> None:
    audio = np.concatenate([tone(440.0, 2.0), np.zeros(64_000, np.float32)])
    bins = chroma_bins(audio)
    middle = 64_000 // HOP
    assert (bins[: middle - 2] == A4).all() and (bins[middle + 3 :] == NONE).all()


def test_equals_librosa_formula_of_transformers() -> None:
    """The dominant bin is that of `transformers`' own spectrogram and filter bank."""
    from transformers.audio_utils import chroma_filter_bank, spectrogram, window_function

    audio = sum(tone(hz, 3.0) for hz in (261.6, 329.6, 392.0, 523.3))
    power = spectrogram(
        audio, window_function(16_384, "hann"), frame_length=16_384, hop_length=HOP, power=2.0, pad_mode="reflect"
    )
    bank = chroma_filter_bank(num_frequency_bins=16_384, num_chroma=12, sampling_rate=32_000, tuning=0.0)
    assert (chroma_bins(audio) == (bank @ power).argmax(0)).all()


@pytest.mark.parametrize("seconds", [41.0, 20.5, 20.48, 20.6])
def test_a_long_recording_is_heard_in_blocks(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    audio = np.concatenate([tone(hz, 0.3) for hz in rng.uniform(100, 2000, int(seconds / 0.3) + 1)])
    audio = audio[: int(seconds * 32_000)] + rng.normal(scale=0.01, size=int(seconds * 32_000)).astype(np.float32)
    whole = chroma_bins(audio)
    monkeypatch.setattr(chroma, "_BLOCK", 32)
    most, real = 0, chroma.chromagram

    def watched(wave: object, rate: int) -> object:
        nonlocal most
        most = max(most, len(wave))  # type: ignore[arg-type]
        return real(wave, rate)  # type: ignore[arg-type]

    monkeypatch.setattr(chroma, "chromagram", watched)
    assert (chroma_bins(audio) == whole).all()
    assert most <= 40 * HOP
