"""Stereo: left and right as two token streams of the mono codec, side by side in 2K codebooks.

The channels are encoded one by one; their codebooks alternate, 1L 1R 2L 2R ..., which is what the stereo patterns
(`stereo_delay`, `stereo_partial_delay`) expect. `StereoCodec` does this behind the methods of `Codec`, and
`musicgen.codec.load("stereo:NAME")` makes one, so that ingest, training and generation need not know: a data set or
a release names its codec, and the name says that it is stereo. `widen` turns the weights of a mono model into those of
a stereo model, from which the reference fine-tunes.

Source: Copet et al. 2023, section 4.3 and appendix; audiocraft `InterleaveStereoCompressionModel`, docs/MUSICGEN.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from musicgen.codec import CONTEXT_FRAMES, WINDOW_FRAMES, Codec
from musicgen.errors import UserError

PREFIX = "stereo:"


def join(left: Tensor, right: Tensor) -> Tensor:
    """Codes of two channels `[..., K, T]` as `[..., 2K, T]`: 1L 1R 2L 2R ..."""
    return torch.stack([left, right], dim=-2).flatten(-3, -2)


def split(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join`; raises `ValueError` for an odd number of codebooks."""
    if codes.shape[-2] % 2:
        raise ValueError(
            f"stereo codes have an even number of codebooks, left and right in turn; got {codes.shape[-2]}"
        )
    return codes[..., 0::2, :], codes[..., 1::2, :]


def identity_of(mono_identity: str) -> str:
    """Identity of the stereo tokens of a mono codec: tokens of the one are none of the other."""
    return hashlib.sha256(f"stereo, left and right in turn: {mono_identity}".encode()).hexdigest()


def widen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a mono model with K codebooks for a stereo model with 2K.

    Embedding and head of stereo codebook k are those of mono codebook k // 2; all else is taken as it is.
    """
    wide: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(emb|linears)\.(\d+)\.weight", name)
        if match is None:
            wide[name] = tensor
        else:
            for side in (0, 1):
                wide[f"{match[1]}.{2 * int(match[2]) + side}.weight"] = tensor.clone()
    return wide


class StereoCodec(Codec):
    """A mono codec, once for each channel.

    Attributes:
        name: `stereo:` and the mono codec's name.
        identity: see `identity_of`.
        channels: 2.
        num_codebooks: 2K.
        mono: the mono codec.
    """

    def __init__(self, mono: Codec) -> None:
        if mono.channels != 1:
            raise UserError(
                f"stereo tokens come from a mono codec, once for each channel; codec {mono.name!r} has "
                f"{mono.channels} channels already: leave out {PREFIX!r} (--channels 2)"
            )
        self.mono = mono
        self.name = f"{PREFIX}{mono.name}"
        self.identity = identity_of(mono.identity)
        self.model = mono.model
        self.sample_rate, self.hop, self.frame_rate = mono.sample_rate, mono.hop, mono.frame_rate
        self.channels, self.num_codebooks, self.codebook_size = 2, 2 * mono.num_codebooks, mono.codebook_size

    def to(self, device: str | torch.device) -> StereoCodec:
        """Move the network; returns self."""
        self.mono.to(device)
        return self

    def encode(self, audio: Tensor) -> Tensor:
        """Audio `[B, 2, N]` to codes `[B, 2K, ceil(N / hop)]`; see `Codec.encode`."""
        if audio.ndim != 3 or audio.shape[1] != 2:
            raise UserError(f"codec {self.name!r} takes audio [batch, 2, samples ≥ 1]; got shape {list(audio.shape)}")
        return join(self.mono.encode(audio[:, :1]), self.mono.encode(audio[:, 1:]))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, 2K, T]` to audio `[B, 2, hop * T]`; see `Codec.decode`."""
        self.check_codes(codes)
        left, right = split(codes)
        return torch.cat([self.mono.decode(left), self.mono.decode(right)], dim=1)

    def embed(self, codes: Tensor) -> Tensor:
        """Latents of both channels, `[B, 2H, T]`."""
        left, right = split(codes)
        return torch.cat([self.mono.embed(left), self.mono.embed(right)], dim=1)

    def encode_track(
        self, audio: np.ndarray, *, window_frames: int = WINDOW_FRAMES, context_frames: int = CONTEXT_FRAMES
    ) -> np.ndarray:
        """A whole track `[2, N]` to codes `[2K, T]` int16; see `Codec.encode_track`."""
        if audio.ndim != 2 or audio.shape[0] != 2:
            raise UserError(f"codec {self.name!r} takes tracks [2, samples]; got shape {list(audio.shape)}")
        left, right = (
            torch.from_numpy(
                self.mono.encode_track(channel[None], window_frames=window_frames, context_frames=context_frames)
            )
            for channel in audio
        )
        return join(left, right).numpy()
