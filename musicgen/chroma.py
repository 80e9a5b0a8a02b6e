"""The melody bottleneck: which of the twelve pitch classes is loudest, frame by frame.

Window 2^14, hop 2^12 at 32 kHz (0.128 s a frame, 235 frames for 30 s), as in Copet et al. 2023, section 3: power
spectrum with a Hann window, centred frames, the chroma filter bank that librosa defines (taken from `transformers`),
dominant bin. 30 s of our frames are the reference's frames; silence is marked instead of falling on C.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

WINDOW = 16_384
HOP = 4_096
NUM_CHROMA = 12
NONE = 255
SILENCE_DBFS = -60.0
_BLOCK = 4096  # frames whose spectrum is held at a time, nine minutes at 32 kHz


@lru_cache(maxsize=4)
def _bank(sample_rate_hz: int) -> Tensor:
    from transformers.audio_utils import chroma_filter_bank

    bank = chroma_filter_bank(
        num_frequency_bins=WINDOW, num_chroma=NUM_CHROMA, sampling_rate=sample_rate_hz, tuning=0.0
    )
    return torch.from_numpy(np.asarray(bank, dtype=np.float32)).reshape(NUM_CHROMA, -1)


def _mono(audio: np.ndarray | Tensor) -> Tensor:
    wave = audio.float() if isinstance(audio, Tensor) else torch.from_numpy(np.asarray(audio, dtype=np.float32))
    if wave.ndim != 1:
        raise ValueError(f"chroma takes mono audio [samples]; got shape {list(wave.shape)}")
    missing = max(0, WINDOW - wave.shape[0])
    return torch.nn.functional.pad(wave, (missing // 2, missing - missing // 2))


def chroma_energy(waves: Tensor, sample_rate_hz: int = 32_000) -> Tensor:
    """Chroma energy of waves `[B, N]`, N at least the window: `[B, 12, 1 + N // 4096]`; differentiable, any device."""
    window = torch.hann_window(WINDOW, device=waves.device)
    spectrum = torch.stft(waves, WINDOW, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum.abs().square() / window.square().sum()
    return _bank(sample_rate_hz).to(waves.device) @ power


def chromagram(audio: np.ndarray | Tensor, sample_rate_hz: int = 32_000) -> Tensor:
    """Chroma energy of mono audio `[N]`: `[12, 1 + N // 4096]` float32, C first, not normalised.

    Audio shorter than the window is zero-padded on both sides, as the reference does.
    """
    return chroma_energy(_mono(audio)[None], sample_rate_hz)[0]


def chroma_bins(audio: np.ndarray | Tensor, sample_rate_hz: int = 32_000) -> np.ndarray:
    """Dominant pitch class per frame of mono audio `[N]`: uint8 `[1 + N // 4096]`; 0 = C … 11 = B, 255 = silence.

    A frame is silent where the power under its window lies below -60 dBFS.
    """
    wave = _mono(audio)
    frames = 1 + wave.shape[0] // HOP
    if frames <= _BLOCK:
        bins = chromagram(wave, sample_rate_hz).argmax(dim=0).to(torch.uint8)
    else:
        # A block of sound has its frames at the same places as the whole, but for those near its ends.
        beside, found = WINDOW // HOP, []
        for first in range(0, frames, _BLOCK):
            start = max(0, first - beside)
            piece = wave[start * HOP : (first + _BLOCK + beside) * HOP]
            found.append(chromagram(piece, sample_rate_hz).argmax(dim=0)[first - start :][:_BLOCK])
        bins = torch.cat(found).to(torch.uint8)
    power = torch.nn.functional.pad(wave.square()[None, None], (WINDOW // 2, WINDOW // 2 + HOP))
    level = torch.nn.functional.avg_pool1d(power, WINDOW, HOP)[0, 0][: bins.shape[0]]
    bins[level < 10 ** (SILENCE_DBFS / 10)] = NONE
    return bins.numpy()
