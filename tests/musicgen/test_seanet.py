"""The fast encoder is the encoder of `transformers`: every shape it can take, whatever the blocks and segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from musicgen import codec as codecs
from musicgen import lstm, seanet


def network(**other: Any) -> EncodecModel:
    """A small network with random weights and codebooks of the latents' size; `other` changes its settings."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "target_bandwidths": [2.2], "sampling_rate": 32_000, "num_filters": 4, "hidden_size": 16, "codebook_size": 2048,
        "upsampling_ratios": [4, 4, 5, 8], "use_causal_conv": False, "use_conv_shortcut": False, "num_lstm_layers": 1,
    }  # fmt: skip
    model = EncodecModel(EncodecConfig(**(settings | other))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
    return model


def music(batch: int, channels: int, samples: int) -> torch.Tensor:
    """Noise that is not white: `[B, C, N]`."""
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(batch, channels, samples, generator=generator).cumsum(-1).remainder(0.7) - 0.35


VARIANTS: dict[str, dict[str, Any]] = {
    "32 kHz": {},
    "two LSTM layers, strides of the paper": {"num_lstm_layers": 2, "upsampling_ratios": [8, 5, 4, 4]},
    "stereo": {"audio_channels": 2},
    "24 kHz": {"use_causal_conv": True, "use_conv_shortcut": True, "sampling_rate": 24_000, "codebook_size": 1024,
               "upsampling_ratios": [8, 5, 4, 2], "target_bandwidths": [1.5, 3.0]},
    "dilated residual blocks": {"num_residual_layers": 3},
}  # fmt: skip


@pytest.mark.parametrize("wide", [1, 64])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_way_of_the_gpu_is_that_network_too(name: str, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, products of matrices or plain convolutions, all rows at once: run here on a CPU."""
    monkeypatch.setattr(seanet, "WIDE", wide)
    model = network(**VARIANTS[name])
    audio = music(2, model.config.audio_channels, 40_123)
    with torch.no_grad():
        expected = model.quantizer.encode(model.encoder(audio), None).transpose(0, 1)
    monkeypatch.setattr(seanet, "_on_cpu", lambda weight: False)
    codec = codecs.Codec(model, name)
    assert codec.encoder is not None and not codec.encoder.on_cpu
    assert all((stage.down.halves is not None) == (wide == 1) for stage in codec.encoder.stages)
    assert float((codec.encode(audio) == expected).float().mean()) > 0.999


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["reflect", "constant"])
def test_both_ways_agree_at_every_length(padding: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd and even numbers of frames at each stage, whole ones and not, items alone and several, also split."""
    monkeypatch.setattr(seanet, "WIDE", 1)
    for ratios in ([4, 4, 5, 8], [8, 5, 4, 2]):
        model = network(pad_mode=padding, use_causal_conv=causal, upsampling_ratios=ratios)
        on_cpu = codecs.Codec(model, "small").encoder
        with monkeypatch.context() as patch:
            patch.setattr(seanet, "_on_cpu", lambda weight: False)
            on_gpu = seanet.Encoder(model, len(on_cpu.books))
        hop = model.config.hop_length
        for samples in (16 * hop, 17 * hop, 20 * hop + 1, 20 * hop - 1, 23 * hop + hop // 2 + 3, 61 * hop - hop // 8):
            for batch, limit in ((1, 1000), (3, 1000), (3, 20)):
                monkeypatch.setattr(seanet, "SEGMENT_FRAMES", {"cpu": limit})
                audio = music(batch, 1, samples)
                with torch.no_grad():
                    expected, found = on_cpu.latents(audio), on_gpu.latents(audio)
                case = (ratios, samples, batch, limit)
                assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max())), case
                assert torch.equal(on_gpu.quantise(expected), on_cpu.quantise(expected)), case
                assert (on_gpu.quantise(found) == on_cpu.quantise(expected)).float().mean() > 0.995, case


@pytest.mark.parametrize("wide", [1, 64])
def test_the_way_of_the_gpu_never_asks_the_host(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that have a device and no values: whoever reads one, or brings one of the CPU's, is caught."""
    monkeypatch.setattr(seanet, "WIDE", wide)
    encoder = codecs.Codec(network(), "small").to("meta").encoder
    assert encoder is not None
    with torch.no_grad():
        codes = encoder.quantise(encoder.latents(music(2, 1, 40_123).to("meta")))
    assert codes.is_meta and codes.shape == (2, 4, 63)


def precisions() -> list[Any]:
    """How a GPU is to multiply float32, and how cuDNN chooses its ways."""
    cudnn: Any = torch.backends.cudnn
    kinds: Any = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    return [kind.fp32_precision for kind in kinds] + [cudnn.enabled, cudnn.benchmark, cudnn.deterministic]


@pytest.mark.parametrize("asked", ["as it is", "legacy", "products", "everything"])
def test_a_gpu_rounds_nothing_and_is_left_as_it_was(asked: str) -> None:
    """Whatever the user set, by whichever of torch's interfaces, also where encoding fails."""
    everything: Any = torch.backends
    cudnn, matmul, untouched = everything.cudnn, everything.cuda.matmul, precisions()
    legacy, common = torch.get_float32_matmul_precision(), everything.fp32_precision
    try:
        if asked == "legacy":
            torch.set_float32_matmul_precision("high")
        if asked == "products":
            matmul.fp32_precision, cudnn.benchmark = "tf32", True
        if asked == "everything":
            everything.fp32_precision = "tf32"
        before = precisions()
        with pytest.raises(ValueError, match="midway"), seanet._exact(torch.device("cuda")):
            assert precisions() == ["ieee", "ieee", "ieee", True, False, True]
            raise ValueError("midway")
        assert precisions() == before
        with seanet._exact(torch.device("cpu")):
            assert precisions() == before
    finally:
        everything.fp32_precision = common
        if asked == "legacy":
            torch.set_float32_matmul_precision(legacy)
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision = untouched[:3]
        cudnn.benchmark = untouched[4]


@pytest.mark.parametrize("wide", [1, 64])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_network_of_transformers(name: str, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seanet, "WIDE", wide)
    model = network(**VARIANTS[name])
    audio = music(2, model.config.audio_channels, 40_123)
    with torch.no_grad():
        expected = model.encoder(audio)
        expected_codes = model.quantizer.encode(expected, None).transpose(0, 1)
    codec = codecs.Codec(model, name)
    with torch.no_grad():
        for block, segment in ((1 << 20, 1000), (4_000, 60)):
            monkeypatch.setattr(seanet, "BLOCK_ELEMENTS", block)
            monkeypatch.setattr(seanet, "SEGMENT_FRAMES", {"cpu": segment})
            latents = codec.encoder.latents(audio)
            assert torch.allclose(latents, expected, atol=1e-4 * float(expected.abs().max())), (block, segment)
    codes = codec.encode(audio)
    assert codes.shape == expected_codes.shape and codes.dtype == torch.int64
    assert (codes == expected_codes).float().mean() > 0.995


@pytest.mark.parametrize("samples", [1, 2, 639, 640, 641, 3_000, 9_999, 10_240, 10_241, 13_333, 20_480])
def test_short_audio_and_odd_ends(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seanet, "WIDE", 1)
    model = network()
    audio = music(1, 1, samples)
    with torch.no_grad():
        expected = model.encode(audio).audio_codes[0]
    codec = codecs.Codec(model, "small")
    codes = codec.encode(audio)
    assert codes.shape == expected.shape == (1, 4, -(-samples // 640))
    assert (codes == expected).float().mean() > 0.98
    assert (codec.encode_track(audio[0].numpy()) == codes[0].numpy()).mean() > 0.98


def test_the_nearest_entry_and_the_first_of_equals() -> None:
    scores = torch.randn(300, 2048)
    scores[:, 1000] = scores[:, 1900] = 9.0
    assert torch.equal(seanet._argmax(scores), torch.full((300,), 1000))
    scores = torch.randn(300, 2048)
    assert torch.equal(seanet._argmax(scores), scores.argmax(1))
    assert torch.equal(seanet._argmax(scores[:, :1000].contiguous()), scores[:, :1000].argmax(1))


def test_an_item_is_encoded_as_if_alone() -> None:
    codec = codecs.Codec(network(), "small")
    audio = music(3, 1, 50_000)
    together = codec.encode(audio)
    alone = torch.cat([codec.encode(item[None]) for item in audio])
    assert (together == alone).float().mean() > 0.995


def test_windows_meet_without_a_seam() -> None:
    """Away from the LSTM's memory, which starts anew, windows and pieces are the whole track: no convolution shows."""
    codec = codecs.Codec(network(), "small")
    for name, parameter in codec.encoder.lstm.plain.named_parameters():
        if name.startswith("weight_hh"):
            parameter.zero_()
        if name.startswith("bias_hh"):  # the forget gate shuts: no memory is left
            parameter[16 * 4 : 2 * 16 * 4] = -50.0
    audio = music(1, 1, 640 * 700 + 77)
    whole = codec.encode(audio)[0].numpy()
    assert (codec.encode_track(audio[0].numpy(), window_frames=13, context_frames=1) == whole).mean() > 0.999


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("bits", [16, 32])
def test_the_lstm_is_that_of_torch(rows: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits only where they hold the weights: rounding others would show."""
    torch.manual_seed(0)
    plain, x = torch.nn.LSTM(24, 24, 2), torch.randn(40, rows, 24)
    with torch.no_grad():
        if bits == 16:
            for parameter in plain.parameters():
                parameter.copy_(parameter.half())
        for wide in (24, 25):
            monkeypatch.setattr(lstm, "WIDE", wide)
            ours = lstm.Lstm(plain)
            assert bool(ours.layers) == (wide == 24)
            assert torch.allclose(ours(x), plain(x)[0], atol=2e-6)
