"""Degraded recordings: the same by seed, as long as before, of the level and colour that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from musicgen import degrade
from musicgen.chroma import chroma_bins

RATE = 32_000


def tones(seconds: float = 3.0) -> np.ndarray:
    t = np.arange(round(RATE * seconds)) / RATE
    return np.concatenate([0.2 * np.sin(2 * np.pi * hz * t[: len(t) // 4]) for hz in (262, 330, 392, 494)]).astype(
        np.float32
    )


def test_the_seed_decides() -> None:
    wave = tones()
    one, again, other = (degrade.degraded(wave, seed, RATE) for seed in ((7, 1), (7, 1), (7, 2)))
    assert one.dtype == np.float32 and one.shape == wave.shape and np.isfinite(one).all()
    assert np.array_equal(one, again) and not np.allclose(one, other, atol=0.01)


def test_a_flat_filter_changes_nothing_and_blocks_leave_no_seam() -> None:
    noise = np.random.default_rng(0).standard_normal(degrade._BLOCK + 5000).astype(np.float32)
    flat = degrade.filtered(noise, np.ones((degrade.TAPS - 1) // 2 + 1))
    assert np.abs(flat - noise).max() < 1e-4
    low = np.zeros((degrade.TAPS - 1) // 2 + 1)
    low[:100] = 1.0
    part = slice(degrade._BLOCK - 3000, degrade._BLOCK + 3000)
    alone = degrade.filtered(noise[part], low)
    assert np.abs(degrade.filtered(noise, low)[part][1500:-1500] - alone[1500:-1500]).max() < 1e-3


def test_noise_lies_below_the_sound_and_bands_move() -> None:
    wave = np.random.default_rng(1).standard_normal(4 * RATE).astype(np.float32)
    ratios = []
    for seed in range(8):
        added = degrade.noisy(wave, np.random.default_rng(seed)) - wave
        ratios.append(20 * np.log10(degrade._rms(wave) / degrade._rms(added)))
    low, high = degrade.SNR_DB
    assert low - 0.1 <= min(ratios) < max(ratios) <= high + 0.1 and max(ratios) - min(ratios) > 4
    shaped = degrade.equalised(wave, np.random.default_rng(0), RATE)
    change = 10 * np.log10(np.abs(np.fft.rfft(shaped)) ** 2 / np.abs(np.fft.rfft(wave)) ** 2)
    bands = [change[4 * a : 4 * b].mean() for a, b in ((100, 150), (400, 600), (1600, 2400), (6000, 9000))]
    assert max(bands) - min(bands) > 3 and max(map(abs, bands)) <= degrade.MAX_GAIN_DB


def test_the_dominant_pitch_class_suffers_but_does_not_drown() -> None:
    wave = tones(8.0)
    clean = chroma_bins(wave)
    same = [(chroma_bins(degrade.degraded(wave, (seed,), RATE)) == clean).mean() for seed in range(4)]
    assert 0.5 < np.mean(same) <= 1.0


def test_stems_are_mixed_anew() -> None:
    stems = [tones(), tones()[::-1].copy()]
    mix = degrade.remixed(stems, np.random.default_rng(3))
    a, b = np.linalg.lstsq(np.stack(stems, axis=1), mix, rcond=None)[0]
    lowest, highest = (10 ** (db / 20) for db in degrade.STEM_GAIN_DB)
    assert lowest <= a <= highest and lowest <= b <= highest and a != pytest.approx(b, abs=0.01)
