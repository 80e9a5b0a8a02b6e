"""Recordings made worse on purpose, for melodies that are heard through more than a clean mix.

A melody model that only ever hears the chroma of its own track may follow a hummed, noisy or differently mixed guide
badly; the authors of the source name the lack of such augmentation as a limit. Here are the audio forms of it:
equalisation, noise, other mixes of the stems. Everything is drawn from a generator that the caller seeds, so that the
same track gives the same variants. Ingest stores their chroma beside the track's own (`chroma_variants`).

Source: Copet et al. 2023, section 6 (limitations).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TAPS = 2049  # of the equaliser: 16 Hz wide at 32 kHz
MAX_GAIN_DB = 12.0
SNR_DB = (0.0, 15.0)
STEM_GAIN_DB = (-18.0, 6.0)
_BLOCK = 1 << 17


def filtered(wave: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """`wave` `[N]` through the linear-phase filter whose amplitude at equal steps up to half the rate is `gains`."""
    impulse = np.roll(np.fft.irfft(gains, TAPS - 1), TAPS // 2)
    impulse = (np.append(impulse, 0.0) * np.hanning(TAPS)).astype(np.float32)
    size = _BLOCK + TAPS - 1
    spectrum = np.fft.rfft(impulse, size)
    out = np.zeros(len(wave) + TAPS - 1, dtype=np.float32)
    for start in range(0, len(wave), _BLOCK):  # overlap and add: a track of any length in little memory
        block = np.fft.irfft(np.fft.rfft(wave[start : start + _BLOCK], size) * spectrum, size)
        part = out[start : start + size]
        part += block[: len(part)].astype(np.float32)
    return out[TAPS // 2 : TAPS // 2 + len(wave)]


def equalised(wave: np.ndarray, rng: np.random.Generator, sample_rate_hz: int) -> np.ndarray:
    """`wave` `[N]` with up to 12 dB more or less in each octave from 62 Hz on, drawn and joined smoothly."""
    centres = 62.5 * 2.0 ** np.arange(max(2, int(np.log2(sample_rate_hz / 2 / 62.5)) + 1))
    decibels = rng.uniform(-MAX_GAIN_DB, MAX_GAIN_DB, len(centres))
    hz = np.linspace(0, sample_rate_hz / 2, (TAPS - 1) // 2 + 1).clip(min=1.0)
    return filtered(wave, 10 ** (np.interp(np.log2(hz), np.log2(centres), decibels) / 20))


def noisy(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`wave` `[N]` with noise, 0 to 15 dB below it, of a colour from white to pink."""
    noise = rng.standard_normal(len(wave), dtype=np.float32)
    falling = np.arange((TAPS - 1) // 2 + 1).clip(min=1) ** (-0.5 * rng.uniform())
    noise = filtered(noise, falling)
    level, below = _rms(wave), rng.uniform(*SNR_DB)
    return wave + noise * np.float32(level * 10 ** (-below / 20) / max(_rms(noise), 1e-9))


def remixed(stems: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Another mix of a track's stems, each `[N]`: every one 18 dB softer to 6 dB louder."""
    gains = 10 ** (rng.uniform(*STEM_GAIN_DB, len(stems)) / 20)
    return np.asarray(sum(np.float32(gain) * stem for gain, stem in zip(gains, stems)), dtype=np.float32)


def degraded(
    wave: np.ndarray, seed: Sequence[int], sample_rate_hz: int, stems: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """A variant of a recording `[N]`: another mix where there are stems, equalised, with noise.

    Args:
        seed: address of everything drawn.
        stems: parts of the recording, each `[N]`, in place of it.
    """
    rng = np.random.default_rng(tuple(seed))
    mix = remixed(stems, rng) if stems is not None else wave
    return noisy(equalised(mix, rng, sample_rate_hz), rng)


def _rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if len(wave) else 0.0
