"""The codec: what `transformers` does with the same weights, windows, identity, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen import codec as codecs
from musicgen.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random codec saved the way ours are shipped: float16, without training buffers."""
    torch.manual_seed(0)
    model = codecs.build(codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1))
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.1)
    return codecs.save(model, tmp_path_factory.mktemp("codec"))


def test_transformers_reads_it_and_agrees(folder: Path) -> None:
    from transformers import EncodecModel

    ours = codecs.load(folder)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "whoever reads config.json reads the weights"
    theirs = EncodecModel.from_pretrained(folder).eval()  # as anybody would; saved in 16 bits
    audio = torch.randn(2, 1, 20_000) * 0.1
    with torch.no_grad():
        expected = theirs.encode(audio)
        decoded = theirs.decode(expected.audio_codes, expected.audio_scales).audio_values
    codes = ours.encode(audio)
    assert (codes == expected.audio_codes[0]).float().mean() > 0.995
    assert torch.allclose(ours.decode(expected.audio_codes[0]), decoded, atol=1e-5)


def test_frames_and_samples(folder: Path) -> None:
    codec = codecs.load(folder)
    assert (codec.hop, codec.frame_rate, codec.num_codebooks, codec.codebook_size) == (640, 50, 4, 2048)
    codes = codec.encode(torch.randn(1, 1, 641))
    assert codes.shape == (1, 4, 2)
    assert codec.decode(codes).shape == (1, 1, 1280)


def test_a_track_in_windows_is_the_track_at_once() -> None:
    codec = codecs.tiny()
    audio = (np.random.default_rng(0).normal(size=(1, 32_000 * 7)) * 0.1).astype(np.float32)
    whole = codec.encode(torch.from_numpy(audio)[None])[0].numpy()
    windows = codec.encode_track(audio, window_frames=100, context_frames=25)
    assert windows.shape == whole.shape and windows.dtype == np.int16
    assert (windows == whole).mean() > 0.97
    without_context = codec.encode_track(audio, window_frames=100, context_frames=0)
    assert (without_context == whole).mean() < (windows == whole).mean()


def test_identity_follows_weights_and_settings(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first = codecs.load(folder).identity
    assert first == codecs.load(folder).identity
    tensors = load_file(folder / "model.safetensors")
    tensors["quantizer.layers.3.codebook.embed"][7, 3] += 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert codecs.load(tmp_path).identity != first
    settings = json.loads((folder / "config.json").read_text()) | {"pad_mode": "constant"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert codecs.load(tmp_path).identity != first


def test_no_training_buffers_are_shipped(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert all(file.get_tensor(n).dtype == torch.float16 for n in names)
    assert not [n for n in names if n.endswith(codecs.TRAINING_BUFFERS)]


@pytest.mark.parametrize(
    ("audio", "told"),
    [
        (torch.zeros(1, 2, 1000), "takes audio"),
        (torch.zeros(1, 1, 0), "samples ≥ 1"),
        (torch.full((1, 1, 1000), float("nan")), "not finite"),
    ],
)
def test_bad_audio(folder: Path, audio: torch.Tensor, told: str) -> None:
    with pytest.raises(UserError, match=told):
        codecs.load(folder).encode(audio)


def test_bad_codes(folder: Path) -> None:
    codec = codecs.load(folder)
    with pytest.raises(UserError, match="4 codebooks"):
        codec.decode(torch.zeros(1, 8, 5, dtype=torch.long))
    with pytest.raises(UserError, match=r"0…2047"):
        codec.decode(torch.full((1, 4, 5), 2048))


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for a minute
    with pytest.raises(UserError, match="neither 'demo', nor a folder"):
        codecs.load("./nowhere")
    with pytest.raises(UserError, match="could not be had from the hub"):
        codecs.load("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="type 't5'"):
        codecs.load(tmp_path)


def test_a_codec_replaces_no_other_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "musicgen-release"}')
    with pytest.raises(UserError, match="another kind of model"):
        codecs.save(codecs.build(codecs.CodecConfig(num_filters=2, hidden_size=4)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_every_number_of_codebooks_is_built(rate: int) -> None:
    """The network is described by bandwidths, from which transformers counts the codebooks back."""
    for ratios in ((2, 2, 2, 2), (8, 5, 4, 4), (4, 4, 5, 8), (7, 3)):
        for books in (*range(1, 17), 32):
            for size in (2, 64, 1024, 2048):
                shape = codecs.CodecConfig(sample_rate_hz=rate, ratios=ratios, num_codebooks=books, codebook_size=size)
                config = codecs.network_config(shape)
                assert config.num_quantizers == books, (rate, ratios, books, size, config.num_quantizers)
