"""What the codec is asked to keep: waveform, mel spectra at several scales, and the tones that make the harmony.

The waveform term is the energy of the error relative to that of the signal. It is what gets a fresh network going: its
optimum under uncertainty is the mean, where that of an L1 is silence, and the spectral terms alone settle for noise of
the right envelope. Once the quantiser is in, waveforms can no longer be matched at 2 kbit/s and the spectra take over.

The multi-scale mel loss compares log10 mel energies (L1) and linear ones (L1) from 256-sample to 2048-sample windows,
as in Défossez et al. 2022, section 3.4. Its floor lies at -100 dB, where nobody hears; the log-mel loss asks for what
`musicgen.metrics.audio.log_mel_distance` measures, mel energies down to -50 dB, at several scales. Small codecs trained
for a short time get the spectral envelope right long before the pitch; the tonal loss compares linear-frequency
magnitudes below 3 kHz in long windows, where neighbouring semitones are separate lines; the chroma loss asks directly
for the right pitch class. `msspec` and `l1` are the reference's own mel and waveform losses, for the paper's size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musicgen.chroma import WINDOW as CHROMA_WINDOW
from musicgen.chroma import chroma_energy

FLOOR = 1e-5
RECONSTRUCTION = ("wave", "l1", "mel", "log_mel", "tonal", "chroma", "msspec")
MSSPEC_WINDOWS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class LossConfig:
    """Weights and scales of the losses; a loss of weight 0 is not computed.

    Args:
        balance: weights are shares of the gradient (see `training.codec.balancer`); else plain factors.
        wave: weight of the waveform's relative error energy.
        mel: weight of the multi-scale mel loss.
        log_mel: weight of the multi-scale distance of log10 mel energies, floor 1e-5, HTK mels from 64 Hz.
        tonal: weight of the tonal loss.
        chroma: weight of the chroma loss (needs crops of more than half a second).
        l1: weight of the waveform's mean absolute error.
        msspec: weight of the reference's multi-scale mel loss.
        adversarial: weight of the adversarial loss, where there is a discriminator.
        feature: weight of its feature matching.
        commitment: weight of the commitment loss of the quantiser, a plain factor always.
        mel_windows: FFT sizes of the mel and log-mel scales; the hop is a quarter.
        tonal_windows: FFT sizes of the tonal scales; the hop is a quarter.
        tonal_max_hz: tonal loss looks below this frequency.
    """

    balance: bool = False
    wave: float = 0.5
    mel: float = 1.0
    log_mel: float = 0.0
    tonal: float = 1.0
    chroma: float = 0.0
    l1: float = 0.0
    msspec: float = 0.0
    adversarial: float = 0.0
    feature: float = 0.0
    commitment: float = 0.5
    mel_windows: tuple[int, ...] = (256, 512, 1024, 2048)
    tonal_windows: tuple[int, ...] = (4096, 8192)
    tonal_max_hz: float = 3000.0


def shortest(config: LossConfig) -> int:
    """Samples that a crop needs at least for the losses that have a weight."""
    needs = [0]
    if config.mel or config.log_mel:
        needs += [n // 2 + 1 for n in config.mel_windows]
    if config.tonal:
        needs += [n // 2 + 1 for n in config.tonal_windows]
    if config.chroma:
        needs.append(CHROMA_WINDOW // 2 + 1)
    if config.msspec:
        needs.append(3 * max(MSSPEC_WINDOWS) // 8 + 1)
    return max(needs)


@lru_cache(maxsize=32)
def mel_bank(n_fft: int, sample_rate_hz: int, num_mels: int) -> Tensor:
    """Slaney-normalised triangular mel filters `[num_mels, n_fft // 2 + 1]` float32."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=sample_rate_hz / 2,
        sampling_rate=sample_rate_hz,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(np.ascontiguousarray(bank.T, dtype=np.float32))


@lru_cache(maxsize=32)
def htk_bank(n_fft: int, sample_rate_hz: int, num_mels: int) -> Tensor:
    """HTK mel triangles from 64 Hz, not normalised: those of the evaluation, `[num_mels, n_fft // 2 + 1]` float32."""
    from transformers.audio_utils import mel_filter_bank

    with warnings.catch_warnings():  # in short windows some of the reference's 64 filters lie between two bins
        warnings.simplefilter("ignore")
        bank = mel_filter_bank(n_fft // 2 + 1, num_mels, 64.0, sample_rate_hz / 2, sample_rate_hz, mel_scale="htk")
    return torch.from_numpy(np.ascontiguousarray(bank.T, dtype=np.float32))


@lru_cache(maxsize=32)
def _hann(n_fft: int) -> Tensor:
    return torch.hann_window(n_fft)


def spectrum(wave: Tensor, n_fft: int) -> Tensor:
    """Magnitudes `[B, n_fft // 2 + 1, frames]` of `wave [B, N]`, Hann window of unit energy, hop a quarter."""
    window = _hann(n_fft).to(wave.device)
    out = torch.stft(wave, n_fft, n_fft // 4, window=window, center=True, pad_mode="reflect", return_complex=True)
    return out.abs() / window.square().sum().sqrt()


def reconstruction_losses(
    original: Tensor, decoded: Tensor, config: LossConfig, sample_rate_hz: int
) -> dict[str, Tensor]:
    """Unweighted losses, those with a weight, between `[B, C, N]` signals; channels are treated as items."""
    x, y = original.flatten(0, 1), decoded.flatten(0, 1)
    losses: dict[str, Tensor] = {}
    if config.wave:
        losses["wave"] = (x - y).square().mean() / x.square().mean().clamp(min=1e-6)
    if config.l1:
        losses["l1"] = F.l1_loss(y, x)
    if config.mel or config.log_mel:
        losses |= _mel_losses(x, y, config, sample_rate_hz)
    if config.tonal:
        losses["tonal"] = _tonal_loss(x, y, config, sample_rate_hz)
    if config.chroma:
        losses["chroma"] = _chroma_loss(x, y, sample_rate_hz)
    if config.msspec:
        losses["msspec"] = msspec_loss(x, y, sample_rate_hz)
    return losses


def _mel_losses(x: Tensor, y: Tensor, config: LossConfig, sample_rate_hz: int) -> dict[str, Tensor]:
    """`mel` and `log_mel`, those with a weight, on the same spectra."""
    mel, log_mel = x.new_zeros(()), x.new_zeros(())
    for n_fft in config.mel_windows:
        num_mels = min(64, n_fft // 16)
        of_x, of_y = spectrum(x, n_fft), spectrum(y, n_fft)
        if config.mel:
            bank = mel_bank(n_fft, sample_rate_hz, num_mels).to(x.device)
            a, b = bank @ of_x, bank @ of_y
            mel = mel + ((a + FLOOR).log10() - (b + FLOOR).log10()).abs().mean()
            mel = mel + 0.5 * (a - b).abs().mean() / a.mean().clamp(min=1e-4)
        if config.log_mel:
            bank = htk_bank(n_fft, sample_rate_hz, num_mels).to(x.device)
            a, b = bank @ of_x.square(), bank @ of_y.square()
            log_mel = log_mel + ((a + FLOOR).log10() - (b + FLOOR).log10()).abs().mean()
    found = {"mel": mel, "log_mel": log_mel}
    return {name: value / len(config.mel_windows) for name, value in found.items() if getattr(config, name)}


def _tonal_loss(x: Tensor, y: Tensor, config: LossConfig, sample_rate_hz: int) -> Tensor:
    """Magnitudes below `tonal_max_hz` in long windows: their relative L1 and that of their logarithms."""
    tonal = x.new_zeros(())
    for n_fft in config.tonal_windows:
        top = int(config.tonal_max_hz * n_fft / sample_rate_hz)
        a, b = spectrum(x, n_fft)[:, :top], spectrum(y, n_fft)[:, :top]
        tonal = tonal + (a - b).abs().mean() / a.mean().clamp(min=1e-4)
        tonal = tonal + 0.3 * ((a + 1e-3).log10() - (b + 1e-3).log10()).abs().mean()
    return tonal / max(1, len(config.tonal_windows))


def _chroma_loss(x: Tensor, y: Tensor, sample_rate_hz: int) -> Tensor:
    """Cross-entropy of the twelve pitch classes' shares of energy, sharpened, frame by frame; silence left out."""
    energy = chroma_energy(x, sample_rate_hz)
    wanted = (energy + 1e-6).square()
    wanted = wanted / wanted.sum(1, keepdim=True)
    got = ((chroma_energy(y, sample_rate_hz) + 1e-6).log() * 2).log_softmax(1)
    entropy = -(wanted * wanted.clamp(min=1e-8).log()).sum(1)
    sounding = (energy.sum(1) > 1e-4).float()
    return ((-(wanted * got).sum(1) - entropy) * sounding).sum() / sounding.sum().clamp(min=1)


def power_mel(wave: Tensor, n_fft: int, sample_rate_hz: int) -> Tensor:
    """Mel powers of `wave [B, N]` as the reference takes them: `[B, 64, ceil(N / hop)]`, Hann window of unit energy,
    hop a quarter, reflected by three eighths of the window on each side."""
    hop = n_fft // 4
    missing = -wave.shape[1] % hop
    wave = F.pad(F.pad(wave[:, None], ((n_fft - hop) // 2,) * 2, "reflect"), (0, missing))[:, 0]
    window = _hann(n_fft).to(wave.device)
    bins = torch.stft(wave, n_fft, hop, window=window, center=False, return_complex=True)
    bank = htk_bank(n_fft, sample_rate_hz, 64).to(wave.device)
    return bank @ (bins.real.square() + bins.imag.square()) / window.square().sum()


def msspec_loss(x: Tensor, y: Tensor, sample_rate_hz: int) -> Tensor:
    """The reference's multi-scale mel loss of `[B, N]`: per scale L1 of mel powers plus MSE of their log10, over 10."""
    total = x.new_zeros(())
    for n_fft in MSSPEC_WINDOWS:
        a, b = power_mel(x, n_fft, sample_rate_hz), power_mel(y, n_fft, sample_rate_hz)
        total = total + F.l1_loss(b, a) + F.mse_loss((b + FLOOR).log10(), (a + FLOOR).log10())
    return total / (2 * len(MSSPEC_WINDOWS))
