"""The `encodec` package as oracle: its networks, copied into ours, give its codes and its sound.

Runs where the package can be imported and says so where it cannot: its release is CC-BY-NC and needs torchaudio.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from musicgen import codec as codecs
from musicgen import encodec_package
from musicgen.errors import UserError


@pytest.fixture(scope="module")
def package() -> Any:
    """The package, or a skip that says why its networks were not compared."""
    try:
        return encodec_package.imported()
    except UserError as error:
        pytest.skip(f"encodec is not the oracle here: {error}")


def spread_codebooks(theirs: Any, audio: torch.Tensor) -> None:
    """Random codebooks as wide as the latents, so that codes vary."""
    with torch.no_grad():
        width = float(theirs.encoder(audio).std())
        for layer in theirs.quantizer.vq.layers:
            layer._codebook.embed.normal_(std=width)


@pytest.mark.parametrize("kbit", [6.0, 24.0])
def test_24khz_gives_the_package_s_codes_and_sound(package: Any, kbit: float) -> None:
    torch.manual_seed(0)
    theirs = package.EncodecModel.encodec_model_24khz(pretrained=False)
    audio = torch.randn(1, 1, 24_000 * 2 + 77) * 0.1
    spread_codebooks(theirs, audio)
    theirs.set_target_bandwidth(kbit)
    ours = codecs.Codec(encodec_package.convert(theirs), "24khz", kbit)
    assert (ours.sample_rate, ours.channels, ours.frame_rate, ours.num_codebooks) == (24_000, 1, 75, round(kbit / 0.75))
    with torch.no_grad():
        frames = theirs.encode(audio)
        sound = theirs.decode(frames)
    codes = ours.encode(audio)
    assert codes.shape == frames[0][0].shape
    assert (codes == frames[0][0]).float().mean() > 0.995
    assert torch.allclose(ours.decode(frames[0][0]), sound[..., : codes.shape[2] * ours.hop], atol=1e-4)


def test_48khz_second_by_second(package: Any) -> None:
    """The package's network without its scale and overlap, for which tokens have no place."""
    torch.manual_seed(0)
    theirs = package.EncodecModel.encodec_model_48khz(pretrained=False)
    audio = torch.randn(1, 2, 48_000 * 2 + 4_000) * 0.1
    spread_codebooks(theirs, audio[..., :48_000])
    ours = codecs.Codec(encodec_package.convert(theirs), "48khz", 6.0)
    theirs.normalize, theirs.overlap = False, 0.0
    theirs.set_target_bandwidth(6.0)
    with torch.no_grad():
        frames = theirs.encode(audio / codecs.CHUNK_LEVEL)
        sound = theirs.decode(frames) * codecs.CHUNK_LEVEL
    expected = torch.cat([codes for codes, _ in frames], dim=2)
    codes = ours.encode(audio)
    assert codes.shape == expected.shape == (1, 4, 313)
    assert (codes == expected).float().mean() > 0.995
    decoded = ours.decode(expected)
    assert torch.allclose(decoded[..., : sound.shape[-1]], sound[..., : decoded.shape[-1]], atol=1e-4)
    assert (ours.encode_track(audio[0].numpy()) == codes[0].numpy()).all()


def test_rates_are_asked_for_by_name_and_make_another_codec() -> None:
    model = codecs.build(codecs.CodecConfig(num_filters=2, hidden_size=8))
    model.config.target_bandwidths = [1.1, 2.2]
    full, half = codecs.Codec(model, "x"), codecs.Codec(model, "x@1.1", 1.1)
    assert (full.num_codebooks, half.num_codebooks) == (4, 2)
    assert full.identity != half.identity
    audio = torch.randn(1, 1, 32_000)
    assert torch.equal(half.encode(audio), full.encode(audio)[:, :2])
    with pytest.raises(UserError, match=r"it has 1.1, 2.2"):
        codecs.Codec(model, "x@3", 3.0)


def test_what_the_package_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="take 24khz or 48khz"):
        codecs.load("encodec:32khz")
    monkeypatch.setitem(__import__("sys").modules, "encodec", None)
    with pytest.raises(UserError, match=r"musicgen-pipeline\[encodec\]"):
        codecs.load("encodec:24khz@6")
