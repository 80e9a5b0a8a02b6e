"""Stereo tokens: their order, the codec that makes them, and mono weights widened to a stereo model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen import codec as codecs
from musicgen import stereo, weights
from musicgen.config import ConditionConfig, LMConfig
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.stream_decoder import decode_long

MONO = LMConfig(
    dim=32, num_layers=2, num_heads=2, codebook_size=64, tail="reference", condition=ConditionConfig("minilm", 20)
)
TEXT = {"name": "minilm", "identity": "e" * 64}
STEREO = replace(MONO, num_codebooks=8, pattern="stereo_partial_delay")


@pytest.fixture(scope="module")
def codec() -> stereo.StereoCodec:
    return stereo.StereoCodec(codecs.tiny())


def test_left_and_right_alternate() -> None:
    left = torch.tensor([[1, 1], [2, 2], [3, 3], [4, 4]])
    both = stereo.join(left, left + 10)
    assert both[:, 0].tolist() == [1, 11, 2, 12, 3, 13, 4, 14]
    batch = torch.randint(0, 9, (3, 8, 5))
    assert torch.equal(stereo.join(*stereo.split(batch)), batch)
    with pytest.raises(ValueError, match="even number"):
        stereo.split(torch.zeros(1, 5, 2))


def test_the_codec_is_the_mono_codec_on_each_channel(codec: stereo.StereoCodec) -> None:
    mono = codec.mono
    assert (codec.channels, codec.num_codebooks, codec.frame_rate) == (2, 8, 50)
    assert codec.identity != mono.identity and codec.identity == stereo.identity_of(mono.identity)
    audio = torch.randn(2, 2, 3000, generator=torch.Generator().manual_seed(0)) * 0.1
    codes = codec.encode(audio)
    assert codes.shape == (2, 8, 5)
    assert torch.equal(codes[:, 0::2], mono.encode(audio[:, :1])) and torch.equal(
        codes[:, 1::2], mono.encode(audio[:, 1:])
    )
    assert not torch.equal(codes[:, 0::2], codes[:, 1::2])
    sound = codec.decode(codes)
    assert sound.shape == (2, 2, 3200)
    assert torch.equal(sound[:, 1:], mono.decode(codes[:, 1::2]))
    track = codec.encode_track(audio[0].numpy())
    assert track.dtype == np.int16 and np.array_equal(track[0::2], mono.encode_track(audio[0, :1].numpy()))
    # A mono sound in both channels gives the same tokens twice.
    same = codec.encode(audio[:, :1].expand(-1, 2, -1))
    assert torch.equal(same[:, 0::2], same[:, 1::2])


def test_a_stream_is_the_whole_in_pieces(codec: stereo.StereoCodec) -> None:
    codes = torch.randint(0, codec.codebook_size, (1, 8, 40), generator=torch.Generator().manual_seed(1))
    pieces = decode_long(codec, codes, piece_frames=13)
    assert pieces.shape == (1, 2, 40 * 640)
    torch.testing.assert_close(pieces, codec.decode(codes), atol=1e-5, rtol=1e-4)


def test_by_name_and_what_is_refused(codec: stereo.StereoCodec) -> None:
    demo = codecs.load("stereo:demo")
    assert isinstance(demo, stereo.StereoCodec) and demo.name == "stereo:demo" and demo.num_codebooks == 8
    assert codecs.describe(demo)["channels"] == 2
    with pytest.raises(UserError, match=r"takes audio \[batch, 2"):
        codec.encode(torch.zeros(1, 1, 700))
    with pytest.raises(UserError, match="has 8 codebooks"):
        codec.decode(torch.zeros(1, 4, 3, dtype=torch.long))
    with pytest.raises(UserError, match="2 channels already"):
        stereo.StereoCodec(codec)


def released(config: LMConfig, codec: codecs.Codec, folder: Path) -> tuple[MusicLM, Path]:
    torch.manual_seed(0)
    lm = MusicLM(config).eval()
    info = {
        "codec": {"name": codec.name, "identity": codec.identity},
        "text_encoder": {"name": "minilm", "identity": "e" * 64},
        "training": {"step": 1},
        "licence": "CC-BY-NC-4.0",
    }
    return lm, weights.save_release(folder, lm, info)


def test_mono_weights_are_widened(codec: stereo.StereoCodec, tmp_path: Path) -> None:
    mono, folder = released(MONO, codec.mono, tmp_path / "mono")
    lm = MusicLM(STEREO).eval()
    lm.load_state_dict(weights.initial_state(folder, STEREO, codecs.describe(codec), TEXT))
    state = mono.state_dict()
    for k in range(8):
        assert torch.equal(lm.emb[k].weight, state[f"emb.{k // 2}.weight"])
        assert torch.equal(lm.linears[k].weight, state[f"linears.{k // 2}.weight"])
    for name, value in lm.state_dict().items():
        if not name.startswith(("emb.", "linears.")):
            assert torch.equal(value, state[name])
    assert weights.inherited(folder) == [{"model": str(folder), "licence": "CC-BY-NC-4.0"}]
    # Left alone, with nothing on the right, is what the mono model hears: silence aside, the sum of its embeddings.
    tokens = torch.randint(0, 64, (1, 4, 6))
    halves = stereo.join(tokens, tokens)
    torch.testing.assert_close(lm._embed(halves), 2 * mono._embed(tokens))


def test_other_shapes_patterns_and_codecs_are_named(codec: stereo.StereoCodec, tmp_path: Path) -> None:
    _, folder = released(MONO, codec.mono, tmp_path / "mono")
    _, parallel = released(replace(MONO, pattern="parallel"), codec.mono, tmp_path / "parallel")
    mono, wide, other = codecs.describe(codec.mono), codecs.describe(codec), {"name": "t5", "identity": "f" * 64}
    for config, source, tokens, text, message in (
        (MONO, folder, wide, TEXT, "trained with codec 'tiny'.*this run has 'stereo:tiny'"),
        (STEREO, folder, mono, TEXT, "trained with codec 'tiny'"),
        (MONO, folder, mono, other, "trained with text encoder 'minilm'.*this run has 't5'"),
        (MONO, parallel, mono, TEXT, "lm.pattern: it has 'parallel', given 'delay'"),
        (STEREO, parallel, wide, TEXT, "lm.pattern: it has 'parallel', given 'stereo_partial_delay'"),
        (replace(MONO, num_codebooks=8), folder, mono, TEXT, "lm.num_codebooks: it has 4, given 8"),
        (replace(MONO, dim=64), folder, mono, TEXT, "lm.dim: it has 32, given 64"),
        (replace(MONO, cross_attention=False), folder, mono, TEXT, "lm.cross_attention: it has True, given False"),
    ):
        with pytest.raises(UserError, match=f"(?s){message}"):
            weights.initial_state(source, config, tokens, text)
