"""The multi-scale STFT discriminator: hears whether a second of sound is a recording or came out of the decoder.

One small convolutional network per STFT resolution looks at real and imaginary part, wide along frequency and dilated
along time, and says "real" or "decoded" for every patch. It learns with the hinge loss; the codec learns to be taken
for real (adversarial loss) and to give the same features in every layer as the original does (feature matching).
Défossez et al. 2022, section 3.4, with the reference's shapes: first convolution without weight norm, 3 × 9 kernels,
stride 2 along frequency. `filters` and `windows` set the cost, which at the reference's size is several times that of
the codec itself; `seconds` and `every` let a small machine hear less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape and training of the discriminator; the defaults are the reference's.

    Args:
        windows: FFT size per scale; the hop is a quarter.
        filters: channels of every hidden layer.
        dilations: dilation along time of the strided layers.
        slope: negative slope of the leaky ReLU.
        seconds: it hears a random part of each crop, of this length; 0 for all of it.
        every: steps between its updates; the codec hears it at every step.
        lr: Adam learning rate; cools down together with the codec's.
        betas: Adam betas.
    """

    windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    filters: int = 32
    dilations: tuple[int, ...] = (1, 2, 4)
    slope: float = 0.3
    seconds: float = 0.0
    every: int = 1
    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.9)

    def __post_init__(self) -> None:
        if not self.windows or min(self.windows) < 16 or self.filters < 1 or self.every < 1:
            raise ValueError(
                "discriminator: windows need at least one size of 16 or more, filters and every at least 1; "
                f"got windows {list(self.windows)}, filters {self.filters}, every {self.every}"
            )


@dataclass
class Verdict:
    """What one scale says of a batch: `logits [B, 1, frames, bins]`, positive for real, and its layers' `features`."""

    logits: Tensor
    features: list[Tensor]


def _conv(inner: int, outer: int, kernel: tuple[int, int], *, dilation: int = 1, stride: int = 1) -> nn.Conv2d:
    padding = ((kernel[0] - 1) * dilation // 2, (kernel[1] - 1) // 2)
    return nn.Conv2d(inner, outer, kernel, stride=(1, stride), dilation=(dilation, 1), padding=padding)


class _Scale(nn.Module):
    """The network of one STFT resolution."""

    def __init__(self, config: DiscriminatorConfig, window: int, channels: int) -> None:
        super().__init__()
        self.window, self.slope = window, config.slope
        width = config.filters
        self.layers = nn.ModuleList([_conv(2 * channels, width, (3, 9))])
        for dilation in config.dilations:
            self.layers.append(weight_norm(_conv(width, width, (3, 9), dilation=dilation, stride=2)))
        self.layers.append(weight_norm(_conv(width, width, (3, 3))))
        self.last = weight_norm(_conv(width, 1, (3, 3)))
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def forward(self, wave: Tensor) -> Verdict:
        batch, channels, _ = wave.shape
        hann: Any = self.hann
        with torch.autocast(wave.device.type, enabled=False):
            bins = torch.stft(
                wave.float().flatten(0, 1), self.window, self.window // 4, window=hann, center=False,
                return_complex=True,
            ) / hann.square().sum().sqrt()  # fmt: skip
        parts = torch.view_as_real(bins).unflatten(0, (batch, channels))  # [B, C, bins, frames, 2]
        z = parts.permute(0, 4, 1, 3, 2).flatten(1, 2)
        features = []
        for layer in self.layers:
            z = F.leaky_relu(layer(z), self.slope)
            features.append(z)
        return Verdict(self.last(z), features)


class Discriminator(nn.Module):
    """All scales; takes `wave [B, C, N]`, N at least the longest window, and gives a `Verdict` per scale."""

    def __init__(self, config: DiscriminatorConfig, channels: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList([_Scale(config, window, channels) for window in config.windows])

    def forward(self, wave: Tensor) -> list[Verdict]:
        """Verdicts on `wave [B, C, N]`, one per scale."""
        return [scale(wave) for scale in self.scales]


def hinge_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The discriminator's loss on its logits per scale: mean over scales of E relu(1 - real) + E relu(1 + fake)."""
    pairs = [F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(pairs).mean()


def adversarial_loss(fake: list[Verdict]) -> Tensor:
    """The codec's loss for being heard as decoded: mean over scales of -E logits."""
    return -torch.stack([v.logits.float().mean() for v in fake]).mean()


def feature_loss(real: list[Verdict], fake: list[Verdict]) -> Tensor:
    """L1 between the features of original and decoded, averaged over layers, then over scales."""
    scales = [
        torch.stack([F.l1_loss(b.float(), a.float()) for a, b in zip(r.features, f.features, strict=True)]).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(scales).mean()
