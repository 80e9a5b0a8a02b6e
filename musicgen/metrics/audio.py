"""Measures on signals at 32 kHz: log-mel distance, SI-SDR, chroma agreement, silence, noise; Opus to compare with.

All are deterministic and fast (hundreds of times real time on one core), take NumPy arrays or tensors, and mix
several channels down to one. The log-mel transform is the reference codec's (n_fft 1024, hop 256, 64 HTK mels from
64 Hz, power, window-normalised, log10(mel + 1e-5)); the distance is its mean absolute difference.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE_HZ = 32000
N_FFT, HOP, MELS, F_MIN, FLOOR = 1024, 256, 64, 64.0, 1e-5
CHROMA_SILENT = 255
Audio = np.ndarray | Tensor


def mono(audio: Audio) -> Tensor:
    """Audio [N] or [C, N] as float32 [N] on the CPU; raises `ValueError` on another number of axes."""
    signal = torch.as_tensor(audio).detach().to("cpu", torch.float32)
    if signal.ndim == 2:
        signal = signal.mean(dim=0)
    if signal.ndim != 1:
        raise ValueError(f"expected audio of shape [N] or [C, N], got {tuple(signal.shape)}")
    return signal


@functools.cache
def _mel_filters() -> Tensor:
    """HTK mel triangles without area normalisation, [MELS, N_FFT // 2 + 1]."""

    def to_mel(hz: float) -> float:
        return 2595.0 * math.log10(1.0 + hz / 700.0)

    edges_mel = np.linspace(to_mel(F_MIN), to_mel(SAMPLE_RATE_HZ / 2), MELS + 2)
    edges = 700.0 * (10.0 ** (edges_mel / 2595.0) - 1.0)
    bins = np.linspace(0.0, SAMPLE_RATE_HZ / 2, N_FFT // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0.0, np.minimum(rising, falling))).float()


def log_mel(audio: Tensor) -> Tensor:
    """log10 mel spectrogram [..., 64, 1 + N // 256] of float audio [..., N] at 32 kHz (differentiable, any device)."""
    window = torch.hann_window(N_FFT, device=audio.device, dtype=audio.dtype)
    flat = audio.reshape(-1, audio.shape[-1])
    spectrum = torch.stft(
        flat, N_FFT, HOP, window=window, center=True, pad_mode="constant", normalized=False, return_complex=True
    )
    power = spectrum.abs().square() / window.square().sum()
    mel = _mel_filters().to(audio.device, audio.dtype) @ power
    return torch.log10(mel + FLOOR).reshape(*audio.shape[:-1], MELS, mel.shape[-1])


def _same_length(a: Audio, b: Audio) -> tuple[Tensor, Tensor]:
    x, y = mono(a), mono(b)
    if abs(len(x) - len(y)) > SAMPLE_RATE_HZ // 20:
        raise ValueError(f"the signals differ in length: {len(x)} and {len(y)} samples; compare the same stretch")
    n = min(len(x), len(y))
    if n == 0:
        raise ValueError("there is no audio to compare (0 samples)")
    return x[:n], y[:n]


def log_mel_distance(reference: Audio, estimate: Audio) -> float:
    """Mean absolute difference of log10 mel spectrograms (0 = equal); inputs [N] or [C, N] at 32 kHz.

    Lengths may differ by up to 50 ms (a codec's last frame); the common part is compared.
    """
    x, y = _same_length(reference, estimate)
    return float((log_mel(x) - log_mel(y)).abs().mean())


def chroma_agreement(reference: Audio, estimate: Audio) -> float:
    """Share of 4096-sample frames in which both have the same dominant pitch class, 0..1.

    Frames in which the reference is silent are left out; one that is silent only in the estimate counts as different.
    NaN when the reference is silent throughout.
    """
    from musicgen.chroma import chroma_bins

    x, y = _same_length(reference, estimate)
    a, b = chroma_bins(x.numpy()), chroma_bins(y.numpy())
    n = min(len(a), len(b))
    sounding = a[:n] != CHROMA_SILENT
    return float((a[:n] == b[:n])[sounding].mean()) if sounding.any() else float("nan")


def si_sdr(reference: Audio, estimate: Audio) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (higher is better), means removed; inputs as above.

    Le Roux et al. 2019: the estimate is held against the multiple of the reference that fits it best. `inf` for a
    multiple of the reference, NaN when the reference is silent throughout, `-inf` when only the estimate is.
    """
    x, y = (signal.double() - signal.double().mean() for signal in _same_length(reference, estimate))
    if float(x.square().mean()) < 1e-12:
        return float("nan")
    wanted = (x @ y) / (x @ x) * x
    kept, lost = float(wanted.square().sum()), float((y - wanted).square().sum())
    if kept == 0.0:
        return -math.inf
    return 10.0 * math.log10(kept / lost) if lost > 0.0 else math.inf


def silence_share(audio: Audio, threshold_db: float = -60.0, frame_seconds: float = 0.05) -> float:
    """Share of 50 ms frames whose RMS level is below -60 dB full scale, 0..1; 1 for no audio."""
    signal = mono(audio)
    frame = round(frame_seconds * SAMPLE_RATE_HZ)
    if len(signal) < frame:
        return 1.0
    power = signal[: len(signal) // frame * frame].double().reshape(-1, frame).square().mean(dim=1)
    return float((power < 10.0 ** (threshold_db / 10.0)).double().mean())


def spectral_flatness(audio: Audio) -> float:
    """Median over sounding frames of geometric / arithmetic mean of the power spectrum, 0..1.

    White noise is near 0.56, a tone near 0, music mostly below 0.1. 0 when nothing sounds.
    The frames are 2048 samples and the spectrum is taken from 60 Hz to 8 kHz, where music has its notes.
    """
    signal = mono(audio)
    n_fft = 2048
    if len(signal) < n_fft:
        return 0.0
    frames = signal.unfold(0, n_fft, n_fft // 2)
    frames = frames[frames.square().mean(dim=1) > 1e-6]
    if len(frames) == 0:
        return 0.0
    power = torch.fft.rfft(frames * torch.hann_window(n_fft)).abs().square().double()
    low, high = round(60 * n_fft / SAMPLE_RATE_HZ), round(8000 * n_fft / SAMPLE_RATE_HZ)
    power = power[:, low:high] + 1e-12
    return float((power.log().mean(dim=1).exp() / power.mean(dim=1)).median())


def opus(audio: Audio, bitrate: int = 6000) -> np.ndarray:
    """Audio [N] at 32 kHz through libopus and back, [N]: the sound of `opus_and_rate`."""
    return opus_and_rate(audio, bitrate)[0]


def opus_and_rate(audio: Audio, bitrate: int) -> tuple[np.ndarray, float]:
    """Audio [N] at 32 kHz through libopus (mono, variable rate about `bitrate` bit/s) and back, delay-aligned, [N].

    Also the bits per second of its packets, the container left out. The sound is resampled to 48 kHz and back, as Opus
    needs. The container's pre-skip removes the nominal delay; what is left (up to 10 ms, it depends on the mode the
    encoder chose) is found by cross-correlation and removed.
    """
    import av
    import soxr

    signal = mono(audio).numpy()
    at_48k = soxr.resample(signal, SAMPLE_RATE_HZ, 48000, "HQ").astype(np.float32)
    buffer, size = io.BytesIO(), 0
    with av.open(buffer, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=48000, layout="mono", options={"application": "audio"})
        stream.bit_rate = bitrate
        pcm = np.ascontiguousarray(np.clip(at_48k, -1.0, 1.0)[None])
        frame = av.AudioFrame.from_ndarray(pcm, format="flt", layout="mono")
        frame.sample_rate = 48000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            size += packet.size
            container.mux(packet)
    buffer.seek(0)
    with av.open(buffer, "r") as source:
        parts = [f.to_ndarray().reshape(1, -1)[0] for f in source.decode(audio=0)]
    decoded = soxr.resample(np.concatenate(parts).astype(np.float32), 48000, SAMPLE_RATE_HZ, "HQ").astype(np.float32)
    return _align(signal, decoded), 8 * size * SAMPLE_RATE_HZ / len(signal)


def _align(reference: np.ndarray, delayed: np.ndarray, reach: int = 320) -> np.ndarray:
    """`delayed` shifted by the lag (at most `reach` samples) that correlates best, cut or filled to the length."""
    n = min(len(reference), len(delayed), 20 * SAMPLE_RATE_HZ)
    size = 1 << (n + reach).bit_length()
    spectrum = np.conj(np.fft.rfft(reference[:n], size)) * np.fft.rfft(delayed[:n], size)
    correlation = np.fft.irfft(spectrum, size)
    lags = np.concatenate([correlation[-reach:], correlation[: reach + 1]])
    lag = int(np.argmax(lags)) - reach
    shifted = delayed[lag:] if lag >= 0 else np.concatenate([np.zeros(-lag, np.float32), delayed])
    result = np.zeros(len(reference), np.float32)
    m = min(len(result), len(shifted))
    result[:m] = shifted[:m]
    return result
