"""Key, tempo and loudness, by essentia and by the permissive fallback."""

from __future__ import annotations

import numpy as np
import pytest

from musicgen.errors import UserError
from pipelines import analysis

HZ = 32_000
BACKENDS = [
    "builtin",
    pytest.param("essentia", marks=pytest.mark.skipif(analysis.backend("auto") != "essentia", reason="not installed")),
]


def song(bpm: float, tonic: int, minor: bool, seconds: float = 12.0) -> np.ndarray:
    """Chords I-IV-V-I struck on every beat with a click, [N] float32; tonic 0 = C."""
    rng = np.random.default_rng(0)
    wave = np.zeros(int(HZ * seconds))
    for beat in range(int(seconds * bpm / 60)):
        start = int(beat * 60 / bpm * HZ)
        t = np.arange(min(int(0.4 * HZ), wave.size - start)) / HZ
        root, third = [(0, 3 if minor else 4), (5, 3 if minor else 4), (7, 4), (0, 3 if minor else 4)][beat // 4 % 4]
        for step in (0, third, 7):
            pitch = 261.6256 * 2 ** ((tonic + root + step) / 12 - 1)
            wave[start : start + t.size] += sum(np.sin(2 * np.pi * pitch * h * t) / h for h in (1, 2, 3)) * np.exp(
                -6 * t
            )
        wave[start : start + t.size] += rng.normal(size=t.size) * np.exp(-60 * t) * 2
    return (0.1 * wave).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bpm", "tonic", "minor", "key"),
    [(72, 9, True, "A minor"), (100, 3, False, "Eb major"), (140, 6, True, "F# minor")],
)
def test_key_and_tempo(backend: str, bpm: float, tonic: int, minor: bool, key: str) -> None:
    found = analysis.analyse(song(bpm, tonic, minor), HZ, backend)
    assert found["key"] == key and 0.5 < found["key_confidence"] <= 1
    assert found["tempo_bpm"] == pytest.approx(bpm, rel=0.02) and 0.5 < found["tempo_confidence"] <= 1
    assert found["backend"] == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_silence_and_noise_claim_nothing(backend: str) -> None:
    silent = analysis.analyse(np.zeros(HZ * 4, np.float32), HZ, backend)
    assert silent["key"] is None and silent["tempo_bpm"] is None and silent["loudness_lufs"] == -70
    noise = np.random.default_rng(1).normal(size=HZ * 8).astype(np.float32) * 0.1
    found = analysis.analyse(noise, HZ, backend)
    assert found["key_confidence"] < 0.7 and found["tempo_confidence"] < 0.3


@pytest.mark.parametrize("backend", BACKENDS)
def test_loudness_of_the_reference_tone(backend: str) -> None:
    # ITU-R BS.1770: a 0 dBFS sine at 997 Hz in one channel reads -3.01 LUFS
    t = np.arange(HZ * 20) / HZ
    full = np.sin(2 * np.pi * 997 * t).astype(np.float32)
    assert analysis.analyse(full, HZ, backend)["loudness_lufs"] == pytest.approx(-3.01, abs=0.05)
    assert analysis.analyse(full * 0.1, HZ, backend)["loudness_lufs"] == pytest.approx(-23.01, abs=0.05)
    # the relative gate leaves out what is far below the rest
    half = np.concatenate([full, full * 0.001])
    assert analysis.analyse(half, HZ, backend)["loudness_lufs"] == pytest.approx(-3.01, abs=0.1)


def test_blocks_of_the_filter_join_without_a_seam() -> None:
    noise = np.random.default_rng(2).normal(size=(1 << 19) + 90_000).astype(np.float32)
    whole = analysis._k_weighted(noise, HZ)
    start = (1 << 19) - 40_000
    piece = analysis._k_weighted(noise[start - HZ :], HZ)[HZ:]
    assert np.abs(whole[start:] - piece).max() < 1e-3


def test_backend_names() -> None:
    with pytest.raises(UserError, match="allowed: auto, essentia, builtin"):
        analysis.backend("librosa")
