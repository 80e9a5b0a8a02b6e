"""Losses, discriminator and balancer of codec training: the reference's shapes and formulas, and what silence does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.codec import discriminator as adversary
from training.codec import losses
from training.codec.balancer import Balancer, BalancerConfig
from training.codec.discriminator import Discriminator, DiscriminatorConfig
from training.codec.losses import LossConfig

ALL = LossConfig(wave=1.0, mel=1.0, log_mel=1.0, tonal=1.0, chroma=1.0, l1=1.0, msspec=1.0)


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_mel_powers_are_those_of_another_implementation() -> None:
    """`transformers.audio_utils.spectrogram` with the reference's settings: HTK mels from 64 Hz, unit-energy window."""
    from transformers.audio_utils import mel_filter_bank, spectrogram

    wave = np.random.default_rng(0).normal(size=32_000).astype(np.float32) * 0.1
    for n_fft in losses.MSSPEC_WINDOWS:
        pad = (n_fft - n_fft // 4) // 2
        window = np.hanning(n_fft + 1)[:-1]
        theirs = spectrogram(
            np.pad(wave, pad, mode="reflect"), window, n_fft, n_fft // 4, power=2.0, center=False,
            mel_filters=mel_filter_bank(n_fft // 2 + 1, 64, 64.0, 16_000.0, 32_000, None, "htk"), mel_floor=0.0,
        )  # fmt: skip
        ours = losses.power_mel(torch.from_numpy(wave)[None], n_fft, 32_000)[0]
        assert ours.shape == (64, 32_000 // (n_fft // 4))
        np.testing.assert_allclose(ours, theirs / np.square(window).sum(), rtol=2e-3, atol=1e-7)


def test_msspec_follows_its_formula() -> None:
    """Twice the amplitude: powers differ by 3 P, their logarithms by log10(4) wherever the floor is far below."""
    torch.manual_seed(0)
    x = torch.randn(2, 32_000)
    powers = [losses.power_mel(x, n, 32_000) for n in losses.MSSPEC_WINDOWS]
    expected = sum(
        3 * p.mean() + ((4 * p + 1e-5).log10() - (p + 1e-5).log10()).square().mean() for p in powers
    ) / 10  # fmt: skip
    torch.testing.assert_close(losses.msspec_loss(x, 2 * x, 32_000), expected, rtol=1e-4, atol=0)
    assert losses.msspec_loss(x, x, 32_000) == 0


def test_silence_and_equal_signals_give_finite_gradients() -> None:
    noise = torch.randn(1, 1, 32_000) * 0.1
    for original, decoded in ((torch.zeros_like(noise), torch.zeros_like(noise)), (torch.zeros_like(noise), noise)):
        output = decoded.clone().requires_grad_()
        found = losses.reconstruction_losses(original, output, ALL, 32_000)
        assert found.keys() == {"wave", "mel", "log_mel", "tonal", "chroma", "l1", "msspec"}
        for name, loss in found.items():
            assert torch.isfinite(loss), name
            assert torch.isfinite(torch.autograd.grad(loss, output, retain_graph=True)[0]).all(), name


def test_shortest_crop_is_the_shortest_that_works() -> None:
    for config in (ALL, LossConfig(chroma=0.0, tonal=0.0), LossConfig(wave=0.0, mel=0.0, tonal=0.0, msspec=1.0)):
        least = losses.shortest(config)
        x = torch.randn(1, 1, least)
        losses.reconstruction_losses(x, x + 0.1, config, 32_000)
        with pytest.raises(RuntimeError):
            losses.reconstruction_losses(x[..., :-2], x[..., :-2] + 0.1, config, 32_000)


def test_discriminator_has_the_shapes_of_the_reference() -> None:
    critic = Discriminator(DiscriminatorConfig(), channels=1)
    # (2·27+1)·32 without weight norm, then 3 × (32·27+2)·32 and (32·9+2)·32 and 32·9+2 with it, at each of five scales
    assert sum(p.numel() for p in critic.parameters()) == 5 * (1760 + 3 * 27_712 + 9280 + 290)
    assert all("parametrizations" not in name for name, _ in critic.scales[0].layers[0].named_parameters())
    verdicts = critic(torch.randn(1, 1, 8000))
    for verdict, window in zip(verdicts, (1024, 2048, 512, 256, 128), strict=True):
        frames = (8000 - window) // (window // 4) + 1
        bins = [window // 2 + 1]
        for _ in range(3):
            bins.append((bins[-1] - 1) // 2 + 1)
        shapes = [(1, 32, frames, b) for b in (*bins, bins[-1])]
        assert [tuple(f.shape) for f in verdict.features] == shapes
        assert tuple(verdict.logits.shape) == (1, 1, frames, bins[-1])
    stereo = Discriminator(DiscriminatorConfig(windows=(256,), filters=2), channels=2)
    one = stereo(torch.cat([torch.randn(1, 1, 1000), torch.zeros(1, 1, 1000)], dim=1))
    assert one[0].logits.shape == (1, 1, 12, 17)


def test_hinge_and_feature_losses() -> None:
    real, fake = [torch.tensor([2.0, 0.5]), torch.tensor([-1.0])], [torch.tensor([-2.0, 0.0]), torch.tensor([1.0])]
    # scale 1: mean relu(1 - r) = 0.25, mean relu(1 + f) = 0.5; scale 2: 2 and 2
    assert adversary.hinge_loss(real, fake) == pytest.approx((0.75 + 4.0) / 2)
    verdicts = [adversary.Verdict(f, [f, 3 * f]) for f in fake]
    assert adversary.adversarial_loss(verdicts) == pytest.approx(-(-1.0 + 1.0) / 2)
    others = [adversary.Verdict(r, [r, 3 * r]) for r in real]
    # |f - r|: (4 + 0.5) / 2 and 2, times (1 + 3) / 2 over the layers
    assert adversary.feature_loss(others, verdicts) == pytest.approx((2.25 * 2 + 2 * 2) / 2)


def test_discriminator_learns_to_hear_noise() -> None:
    torch.manual_seed(0)
    critic = Discriminator(DiscriminatorConfig(windows=(256,), filters=4), channels=1)
    adam = torch.optim.Adam(critic.parameters(), lr=3e-3)
    time = torch.arange(8000) / 32_000
    for _ in range(30):
        tones = torch.sin(2 * math.pi * (200 + 2000 * torch.rand(4, 1, 1)) * time)
        real, fake = critic(tones), critic(tones + 0.3 * torch.randn_like(tones))
        loss = adversary.hinge_loss([v.logits for v in real], [v.logits for v in fake])
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 1.5, "two means that nothing is told apart"
    assert adversary.adversarial_loss(fake) > adversary.adversarial_loss(real)


def test_balancer_gives_each_loss_its_share() -> None:
    """G = Σ total_norm · g / avg‖g‖ · w / Σ w, with the norm per item and a bias-corrected running mean."""
    torch.manual_seed(0)
    balancer = Balancer(BalancerConfig(decay=0.5, total_norm=2.0))
    small, large = torch.randn(3, 1, 50) * 1e-4, torch.randn(3, 1, 50) * 1e3
    weights = {"small": 3.0, "large": 1.0}
    total, shares = balancer.combine({"small": small, "large": large}, weights, balance=True)
    norms = [g.flatten(1).norm(dim=1).mean() for g in (small, large)]
    torch.testing.assert_close(total, 2.0 * (0.75 * small / norms[0] + 0.25 * large / norms[1]))
    assert shares == pytest.approx({"small": 0.75, "large": 0.25})
    # a loss three times as steep at the next step: running mean (0.5 · 1 + 3) / 1.5 of the first norm
    total, shares = balancer.combine({"small": 3 * small, "large": large}, weights, balance=True)
    first = 3 * 1.5 / 3.5
    torch.testing.assert_close(total, 2.0 * (0.75 * first * small / norms[0] + 0.25 * large / norms[1]))
    assert shares["small"] == pytest.approx(0.75 * first / (0.75 * first + 0.25))
    plain, shares = balancer.combine({"small": small, "large": large}, weights, balance=False)
    torch.testing.assert_close(plain, 3 * small + large)
    assert shares["large"] > 0.999
    again = Balancer(balancer.config)
    again.load_state_dict(balancer.state_dict())
    both = [b.combine({"small": small, "large": large}, weights, balance=True)[0] for b in (balancer, again)]
    assert torch.equal(*both)
