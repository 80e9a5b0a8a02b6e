"""Codes to sound piece by piece, down to rounding equal to decoding the whole clip.

An EnCodec decoder is a convolution, an LSTM that runs forward in time, and upsampling convolutions. Cut anywhere, the
convolutions need a few frames on either side and the LSTM its state: both are kept here, so that the pieces join
without a seam and a clip of any length takes the memory of one piece. The sound lags `LOOKAHEAD` frames behind the
codes. The channels of a stereo codec pass as a batch of two.

Architecture: Défossez et al. 2022, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musicgen.codec import Codec
from musicgen.errors import UserError
from musicgen.stereo import StereoCodec, split

HEAD = 3  # frames that the first convolution (kernel 7) reaches to either side
TAIL = 4  # frames that the upsampling convolutions reach, with room (the shipped shapes reach one)
LOOKAHEAD = HEAD + TAIL


class StreamDecoder:
    """Decodes one clip; `push` codes as they come and say when they are the last.

    Raises:
        UserError: a codec that normalises over time, whose sound at one moment depends on all others.
    """

    def __init__(self, codec: Codec) -> None:
        config: Any = codec.model.config
        if config.norm_type == "time_group_norm":
            raise UserError(f"codec {codec.name!r} normalises over the whole clip and cannot be decoded in pieces")
        # A causal kernel reaches as far back as a centred one to both sides.
        self.behind = HEAD * (2 if config.use_causal_conv else 1)
        layers = list(codec.model.decoder.layers)
        recurrent = next(i for i, layer in enumerate(layers) if hasattr(layer, "lstm"))
        self.codec, self.head, self.tail = codec, layers[:recurrent], layers[recurrent + 1 :]
        self.mono = codec.mono if isinstance(codec, StereoCodec) else codec
        self.lstm: Any = layers[recurrent].lstm
        self.state: Any = None
        self.latents: Tensor | None = None  # what the head still needs, and from which frame on
        self.hidden: Tensor | None = None  # what the tail still needs, and from which frame on
        self.first_latent = self.first_hidden = 0
        self.known = self.heard = self.played = 0  # frames: given, through the LSTM, turned into sound

    @torch.no_grad()
    def push(self, codes: Tensor, last: bool = False) -> Tensor:
        """Codes `[1, K, n]`, n may be 0, to the sound `[1, C, m]` that is certain now; all that is left if `last`."""
        self.codec.check_codes(codes)
        if codes.shape[2]:
            sides = codes if self.mono is self.codec else torch.cat(split(codes))
            self.latents = _join(self.latents, self.mono.embed(sides))
            self.known += codes.shape[2]
        if self.latents is None:
            return torch.zeros(1, self.codec.channels, 0)
        ready = self.known if last else self.known - HEAD
        if ready > self.heard:
            before = max(0, self.heard - self.behind)
            x = _through(self.head, self.latents[..., before - self.first_latent :])
            x = x[..., self.heard - before : ready - before].permute(2, 0, 1)
            out, self.state = self.lstm(x, self.state)
            self.hidden = _join(self.hidden, (out + x).permute(1, 2, 0))
            self.heard = ready
            keep = max(0, self.heard - self.behind)
            self.latents, self.first_latent = self.latents[..., keep - self.first_latent :], keep
        certain = self.heard if last else self.heard - TAIL
        if certain <= self.played or self.hidden is None:
            return torch.zeros(1, self.codec.channels, 0)
        before = max(0, self.played - TAIL)
        sound = _through(self.tail, self.hidden[..., before - self.first_hidden :])
        sound = sound[..., (self.played - before) * self.codec.hop : (certain - before) * self.codec.hop]
        self.played = certain
        keep = max(0, self.played - TAIL)
        self.hidden, self.first_hidden = self.hidden[..., keep - self.first_hidden :], keep
        return sound if self.mono is self.codec else sound.transpose(0, 1)


def _join(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=-1)


def _through(layers: list[Any], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def decode_long(codec: Codec, codes: Tensor, piece_frames: int = 500) -> Tensor:
    """Codes `[1, K, T]` to sound `[1, C, hop * T]` on the CPU, in pieces: the memory of a piece for any length.

    A codec that normalises over its own chunks (48 kHz) decodes those.
    """
    if getattr(codec, "chunk", 0):
        return codec.decode(codes).cpu()
    decoder, frames = StreamDecoder(codec), codes.shape[2]
    pieces = [
        decoder.push(codes[..., start : start + piece_frames], last=start + piece_frames >= frames).cpu()
        for start in range(0, frames, piece_frames)
    ]
    return torch.cat(pieces, dim=-1)
