"""Key, tempo and loudness of prepared mono audio; the only file that imports essentia.

essentia is AGPL and optional: `backend("auto")` takes it when it is installed, else the permissive measurements below
(chroma correlation with Krumhansl's profiles, autocorrelation of an onset curve, ITU-R BS.1770-4 loudness). Which one
was used is part of the settings of a data set, because it is part of its bytes. Confidence means the same for both:
correlation with the key profile, and height of the onset autocorrelation at the beat.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np

from musicgen.chroma import chromagram
from musicgen.errors import UserError

BACKENDS = ("auto", "essentia", "builtin")
NOTES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_MAJOR = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
_MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])
_ONSET_HZ = 100
_SLOWEST_BPM, _FASTEST_BPM = 40.0, 220.0
SILENT_LUFS = -70.0


def backend(wanted: str) -> str:
    """The backend that a setting means here: `essentia` or `builtin`. Raises `UserError` when it is not installed."""
    if wanted not in BACKENDS:
        raise UserError(f"analysis {wanted!r} is unknown; allowed: {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("essentia") is not None
    if wanted == "essentia" and not installed:
        raise UserError("analysis 'essentia' needs the package: pip install '.[analysis]', or choose 'builtin'")
    return ("essentia" if installed else "builtin") if wanted == "auto" else wanted


def analyse(audio: np.ndarray, sample_rate_hz: int, chosen: str) -> dict[str, Any]:
    """Measure mono audio [N] float32.

    Args:
        chosen: `essentia` or `builtin`, see `backend`.

    Returns:
        backend, key (`A minor`; None when there is no tone), key_confidence (0-1), tempo_bpm (None when there is no
        beat), tempo_confidence (0-1), loudness_lufs (at least -70). Rounded, so that they are facts and not noise.
    """
    measure = _essentia if chosen == "essentia" else _builtin
    curve = onset_curve(audio, sample_rate_hz)
    key, key_confidence, bpm, lufs = measure(audio, sample_rate_hz, curve)
    confidence = tempo_confidence(curve, bpm) if bpm else 0.0
    return {
        "backend": chosen,
        "key": key,
        "key_confidence": round(float(key_confidence), 3),
        "tempo_bpm": round(float(bpm), 1) if bpm else None,
        "tempo_confidence": round(confidence, 3),
        "loudness_lufs": round(max(float(lufs), SILENT_LUFS), 2),
    }


def _builtin(audio: np.ndarray, hz: int, curve: np.ndarray) -> tuple[str | None, float, float | None, float]:
    key, confidence = key_of_chroma(chromagram(audio, hz).numpy())
    return key, confidence, tempo(curve), loudness(audio, hz)


def key_of_chroma(chroma: np.ndarray) -> tuple[str | None, float]:
    """Key of a chromagram [12, T], C first: (`F# minor`, correlation with its profile); (None, 0) without any tone."""
    level = np.sqrt(np.maximum(chroma, 0.0)).astype(np.float64)
    total = level.mean(1)
    if total.max(initial=0.0) <= 1e-9 or np.ptp(total) <= 1e-9:
        return None, 0.0
    best, name = -1.0, None
    for mode, profile in (("major", _MAJOR), ("minor", _MINOR)):
        for tonic in range(12):
            correlation = float(np.corrcoef(total, np.roll(profile, tonic))[0, 1])
            if correlation > best:
                best, name = correlation, f"{NOTES[tonic]} {mode}"
    return name, max(0.0, best)


def onset_curve(audio: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Rise of the log spectrum, `_ONSET_HZ` times a second, without its slow trend: [T] float64."""
    hop, window = sample_rate_hz // _ONSET_HZ, 1024
    if audio.shape[0] < window + hop:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(audio, window)[::hop]
    curve = np.empty(frames.shape[0])
    last = None
    taper = np.hanning(window).astype(np.float32)
    for start in range(0, frames.shape[0], 2048):  # bounded memory on long tracks
        bands = np.abs(np.fft.rfft(frames[start : start + 2048] * taper, axis=1)).astype(np.float32)
        bands = np.log1p(100.0 * bands[:, :512].reshape(len(bands), 64, 8).mean(2))
        before = np.vstack([bands[:1] if last is None else last, bands[:-1]])
        curve[start : start + len(bands)] = np.maximum(bands - before, 0.0).mean(1)
        last = bands[-1:]
    width = _ONSET_HZ // 2
    padded = np.pad(curve, width, mode="edge")
    trend = np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), mode="valid")
    return np.maximum(curve - trend, 0.0)


def _autocorrelation(curve: np.ndarray) -> np.ndarray:
    """Unbiased autocorrelation of a curve [T], 1 at lag 0; empty when there is nothing to correlate."""
    centred = curve - curve.mean() if curve.size else curve
    power = float(np.dot(centred, centred))
    if curve.size < 2 * _ONSET_HZ or power <= 1e-12:
        return np.zeros(0)
    spectrum = np.fft.rfft(centred, 2 * curve.size)
    raw = np.fft.irfft(np.abs(spectrum) ** 2)[: curve.size // 2]
    return raw / power * curve.size / (curve.size - np.arange(raw.size))


def tempo(curve: np.ndarray) -> float | None:
    """Beats per minute of an onset curve; None when nothing repeats. Prefers tempi near 110 among its multiples."""
    correlation = _autocorrelation(curve)
    if correlation.size == 0:
        return None
    bpms = np.exp(np.linspace(np.log(_SLOWEST_BPM), np.log(_FASTEST_BPM), 800))
    lags = 60.0 * _ONSET_HZ / bpms
    steps = np.arange(correlation.size)
    # a beat also repeats after two, three and four of its periods; those pin the period finely
    score = sum(np.interp(lags * m, steps, correlation, right=0.0) / np.sqrt(m) for m in (1, 2, 3, 4))
    score = score * np.exp(-0.5 * (np.log2(bpms / 110.0) / 0.9) ** 2)
    best = int(np.argmax(score))
    return float(bpms[best]) if score[best] > 0 else None


def tempo_confidence(curve: np.ndarray, bpm: float) -> float:
    """Height (0-1) of the onset autocorrelation at one beat of `bpm`."""
    correlation = _autocorrelation(curve)
    if correlation.size == 0:
        return 0.0
    lag = 60.0 * _ONSET_HZ / bpm
    near = np.interp(lag + np.arange(-1.0, 1.5, 0.5), np.arange(correlation.size), correlation)
    return float(np.clip(near.max(), 0.0, 1.0))


def loudness(audio: np.ndarray, sample_rate_hz: int) -> float:
    """Integrated loudness of mono audio [N] in LUFS, ITU-R BS.1770-4 (one channel, weight 1); -70 when silent."""
    block, step = int(0.4 * sample_rate_hz), int(0.1 * sample_rate_hz)
    weighted = _k_weighted(audio, sample_rate_hz)
    if weighted.size < block:
        weighted = np.pad(weighted, (0, block - weighted.size))
    cumulative = np.concatenate([[0.0], np.cumsum(weighted**2)])
    starts = np.arange(0, weighted.size - block + 1, step)
    power = np.maximum((cumulative[starts + block] - cumulative[starts]) / block, 1e-20)
    level = -0.691 + 10 * np.log10(power)
    kept = power[level > SILENT_LUFS]
    if kept.size == 0:
        return SILENT_LUFS
    gate = -0.691 + 10 * np.log10(kept.mean()) - 10.0
    kept = power[(level > SILENT_LUFS) & (level > gate)]
    return float(-0.691 + 10 * np.log10(kept.mean()))


def _k_weighted(audio: np.ndarray, hz: int) -> np.ndarray:
    """The K filter of BS.1770 applied in the frequency domain, block by block with a second of run-up."""
    block, run_up = 1 << 19, hz
    size = block + 2 * run_up  # room for the tail, so that the cyclic convolution does not wrap
    response = _k_response(hz, size)
    out = np.empty(audio.shape[0])
    for start in range(0, audio.shape[0], block):
        first = max(0, start - run_up)
        piece = audio[first : start + block].astype(np.float64)
        filtered = np.fft.irfft(np.fft.rfft(piece, size) * response, size)
        out[start : start + block] = filtered[start - first : piece.size]
    return out


@functools.lru_cache(maxsize=4)
def _k_response(hz: int, size: int) -> np.ndarray:
    """Frequency response of the two biquads of BS.1770 at any sample rate."""
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    k = np.tan(np.pi * 1681.974450955533 / hz)
    q, high = 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    middle = high**0.4996667741545416
    shelf = (high + middle * k / q + k * k) + 2 * (k * k - high) * z + (high - middle * k / q + k * k) * z * z
    shelf /= (1 + k / q + k * k) + 2 * (k * k - 1) * z + (1 - k / q + k * k) * z * z
    k, q = np.tan(np.pi * 38.13547087602444 / hz), 0.5003270373238773
    norm = 1 + k / q + k * k
    return shelf * (1 - 2 * z + z * z) / (1 + 2 * (k * k - 1) / norm * z + (1 - k / q + k * k) / norm * z * z)


# --- essentia ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _standard() -> Any:
    import essentia

    essentia.log.infoActive = False
    essentia.log.warningActive = False
    from essentia import standard

    return standard


def _essentia(audio: np.ndarray, hz: int, curve: np.ndarray) -> tuple[str | None, float, float | None, float]:
    standard = _standard()
    signal = np.ascontiguousarray(audio, dtype=np.float32)
    note, scale, strength = standard.KeyExtractor(sampleRate=hz, profileType="edma")(signal)
    bpm = standard.PercivalBpmEstimator(sampleRate=hz)(signal) if curve.any() else 0.0
    both = np.stack([signal, np.zeros_like(signal)], axis=1)  # the second channel is silent: mono, weight 1
    lufs = standard.LoudnessEBUR128(sampleRate=hz)(both)[2]
    key = f"{note} {scale}" if strength > 0 else None
    return key, max(0.0, strength), bpm if bpm > 0 else None, lufs
