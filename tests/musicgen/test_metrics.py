"""Measures give known values on made signals, and find what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from musicgen.metrics import audio as measures
from musicgen.metrics import style

RATE = 32000


def _chords(semitones: float = 0.0, seconds: float = 8.0) -> np.ndarray:
    """Four piano-like chords in turn, mono."""
    t = np.arange(int(RATE * seconds)) / RATE
    signal = np.zeros_like(t)
    for i, chord in enumerate([(60, 64, 67), (65, 69, 72), (67, 71, 74), (69, 72, 76)] * 2):
        inside = (t >= i) & (t < i + 1)
        for note in chord:
            hz = 440 * 2 ** ((note + semitones - 69) / 12)
            for harmonic in (1, 2, 3):
                signal += inside * np.sin(2 * np.pi * hz * harmonic * t) * np.exp(-2 * (t - i)) / harmonic
    return (0.1 * signal).astype(np.float32)


def test_log_mel_distance() -> None:
    x = _chords()
    assert measures.log_mel_distance(x, x) == 0.0
    assert measures.log_mel_distance(np.stack([x, x]), x) == 0.0, "channels are mixed down"
    noise = np.random.default_rng(0).normal(0, 0.3, RATE * 4).astype(np.float32)
    assert measures.log_mel_distance(noise, 0.1 * noise) == pytest.approx(2.0, abs=0.02), "20 dB of power is 2 in log10"
    small = measures.log_mel_distance(x, x + 0.001 * np.random.default_rng(1).normal(size=len(x)).astype(np.float32))
    assert 0 < small < measures.log_mel_distance(x, _chords(3)) + 1
    assert measures.log_mel_distance(x, x[:-640]) == 0.0
    with pytest.raises(ValueError, match="differ in length"):
        measures.log_mel_distance(x, x[: RATE * 4])


def test_log_mel_puts_a_tone_in_its_band() -> None:
    t = torch.arange(RATE) / RATE
    low, high = (measures.log_mel(torch.sin(2 * math.pi * hz * t)[None])[0, :, 60].argmax() for hz in (300.0, 6000.0))
    mel = [2595 * math.log10(1 + hz / 700) for hz in (64.0, 300.0, 6000.0, 16000.0)]
    for band, value in ((low, mel[1]), (high, mel[2])):
        expected = (value - mel[0]) / (mel[3] - mel[0]) * 65 - 1
        assert abs(float(band) - expected) <= 1


def test_chroma_agreement() -> None:
    x = _chords()
    assert measures.chroma_agreement(x, x) == 1.0
    assert measures.chroma_agreement(x, 0.5 * x) == 1.0
    assert measures.chroma_agreement(x, _chords(semitones=1)) < 0.3
    silent_half = x.copy()
    silent_half[: len(x) // 2] = 0
    assert measures.chroma_agreement(silent_half, x) > 0.9, "silence of the reference is left out"
    assert measures.chroma_agreement(x, silent_half) < 0.6, "silence of the estimate is a difference"
    assert math.isnan(measures.chroma_agreement(0 * x, x))


def test_si_sdr() -> None:
    x = _chords()
    noise = np.random.default_rng(3).normal(size=len(x)).astype(np.float32)
    noise *= 0.1 * np.sqrt(np.mean(x**2) / np.mean(noise**2))
    assert measures.si_sdr(x, x + noise) == pytest.approx(20.0, abs=0.1), "a tenth of the amplitude is 20 dB"
    assert measures.si_sdr(x, 0.3 * (x + noise)) == pytest.approx(measures.si_sdr(x, x + noise), abs=1e-3), "no scale"
    assert measures.si_sdr(x, x + noise + 0.2) == pytest.approx(20.0, abs=0.1), "no offset"
    assert measures.si_sdr(x, 2 * x) > 100
    assert measures.si_sdr(x, 0 * x) == -math.inf
    assert math.isnan(measures.si_sdr(0 * x, x))


def test_silence_and_noise() -> None:
    x = _chords()
    noise = np.random.default_rng(0).normal(0, 0.1, RATE * 3).astype(np.float32)
    assert measures.silence_share(x) == 0.0 and measures.silence_share(0 * x) == 1.0
    assert measures.silence_share(np.concatenate([noise, 0 * noise])) == pytest.approx(0.5, abs=0.01)
    assert measures.spectral_flatness(noise) == pytest.approx(0.56, abs=0.03)
    assert measures.spectral_flatness(x) < 0.05
    assert measures.spectral_flatness(0 * x) == 0.0


def test_opus_is_aligned_and_worse_at_fewer_bits() -> None:
    x = _chords() + np.random.default_rng(2).normal(0, 0.002, RATE * 8).astype(np.float32)
    coded = {bitrate: measures.opus(x, bitrate) for bitrate in (6000, 64000)}
    assert all(len(y) == len(x) for y in coded.values())
    assert np.corrcoef(x, coded[64000])[0, 1] > 0.99, "sample-aligned"
    lags = range(-40, 41)
    middle = slice(RATE, 5 * RATE)
    best = max(lags, key=lambda lag: float(np.dot(np.roll(coded[6000], lag)[middle], x[middle])))
    assert abs(best) <= 1
    spent = {bitrate: measures.opus_and_rate(x, bitrate)[1] for bitrate in (6000, 64000)}
    assert spent[6000] == pytest.approx(6000, rel=0.3) and spent[64000] == pytest.approx(64000, rel=0.3)
    distance = {b: measures.log_mel_distance(x, y) for b, y in coded.items()}
    assert distance[64000] < 0.5 * distance[6000]
    assert measures.chroma_agreement(x, coded[64000]) > 0.95


def test_memorised_window_is_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    tracks = [(f"track{i}", rng.integers(0, 2048, (4, 700))) for i in range(40)]
    index = style.CodeIndex(tracks)
    clip = rng.integers(0, 2048, (4, 500))
    assert index.best_match(clip).share < 0.05
    planted = clip.copy()
    planted[0, 120:370] = tracks[17][1][0, 400:650]
    planted[0, 120:370:6] = 2047  # 42 of 250 wrong: 83 % left
    match = index.best_match(planted)
    assert match.copied and match.track == "track17"
    assert (match.clip_frame, match.track_frame) == (120, 400) or match.track_frame - match.clip_frame == 280
    assert match.share == pytest.approx(1 - 42 / 250, abs=0.01)
    planted[0, 121:370:6] = 2046  # two thirds left: like, but no copy
    assert not index.best_match(planted).copied
    shifted = planted.copy()
    shifted[1] = tracks[17][1][0, :500]
    assert index.best_match(shifted).share == index.best_match(planted).share, "only the first codebook counts"


def test_memorisation_agrees_with_brute_force_and_respects_track_borders() -> None:
    rng = np.random.default_rng(1)
    tracks = [(str(i), rng.integers(0, 6, 90)) for i in range(5)]
    clip = rng.integers(0, 6, 70)
    index = style.CodeIndex(tracks, window=20)
    brute = max(
        float((clip[a : a + 20] == codes[b : b + 20]).mean())
        for _, codes in tracks
        for a in range(51)
        for b in range(len(codes) - 19)
    )
    assert index.best_match(clip).share == pytest.approx(brute)
    joined = np.concatenate([tracks[0][1][-15:], tracks[1][1][:15]])
    assert index.best_match(joined).share < 1.0, "a window across two tracks is no window of either"
    assert index.best_match(clip[:10]).share == 0.0
    assert style.CodeIndex([], window=20).best_match(clip).share == 0.0


def test_styles_and_binomial() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8))
    labels = [name for name in "abc" for _ in range(20)]
    points = np.repeat(centres, 20, axis=0) + 0.1 * rng.normal(size=(60, 8))
    styles = style.style_centroids(points * 100 + 7, labels)
    fresh = (centres + 0.1 * rng.normal(size=(3, 8))) * 100 + 7
    assert styles.nearest(fresh) == ["a", "b", "c"]
    assert style.binomial_p(0, 40, 0.1) == pytest.approx(1.0)
    assert style.binomial_p(10, 40, 0.1) == pytest.approx(0.0051, abs=0.0002), "ten of forty has p below 0.01"
    assert style.binomial_p(9, 40, 0.1) > 0.01
    embedded = style.embedding(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    assert embedded.tolist() == [2.0, 2.0, 1.0, 0.0]
