"""A style by example: no part of a model without it, without effect before training, audible after, deterministic."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musicgen import codec as codecs
from musicgen import generate, stereo, wav, weights
from musicgen.conditions import Conditions
from musicgen.config import ConditionConfig, LMConfig, StyleConfig
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.sampling import SamplingConfig
from musicgen.style import NONE, Latents, StyleEncoder
from tests.musicgen.small_model import STYLED, TEXT, write_release

STYLE = StyleConfig(dim=6, latent_dim=5, width=8, keep_every=4)
PREFIX = LMConfig(
    dim=16,
    num_layers=2,
    num_heads=2,
    codebook_size=20,
    cross_attention=False,
    condition=ConditionConfig(text_dim=8, melody=True, chroma_frames=4, style=STYLE),
)
CROSS = replace(PREFIX, cross_attention=True, condition=ConditionConfig(text_dim=8, style=STYLE))


def model(config: LMConfig, trained: bool = False) -> MusicLM:
    torch.manual_seed(3)
    lm = MusicLM(config)
    if trained:
        for name, parameter in lm.named_parameters():
            if "style.weight" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return lm.eval()


def inputs(config: LMConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    tokens = torch.randint(0, config.codebook_size, (3, 4, 7))
    return tokens, torch.randn(3, 4, 8), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("config", [CROSS, PREFIX])
def test_off_it_is_no_part_of_the_model_and_on_it_changes_nothing_at_first(config: LMConfig) -> None:
    plain = replace(config, condition=replace(config.condition, style=StyleConfig()))
    off, on = model(plain), model(config)
    assert not any("style" in name for name in off.state_dict())
    assert off.num_parameters() == plain.num_parameters() and on.num_parameters() == config.num_parameters()
    assert all(torch.equal(on.state_dict()[name], tensor) for name, tensor in off.state_dict().items())
    given = inputs(config)
    with torch.no_grad():
        assert torch.equal(on(*given, style=torch.randn(3, 9, 5)), off(*given))
    with pytest.raises(ValueError, match="no style"):
        off(*given, style=torch.randn(3, 9, 5))


@pytest.mark.parametrize("config", [CROSS, PREFIX])
def test_every_row_goes_by_its_own_excerpt_and_none_is_nothing(config: LMConfig) -> None:
    lm, given = model(config, trained=True), inputs(config)
    excerpts = torch.randn(3, 9, 5)
    excerpts[1] = 0
    with torch.no_grad():
        without, out = lm(*given), lm(*given, style=excerpts)
        others = lm(*given, style=torch.randn(3, 9, 5))
    assert torch.equal(out[1], without[1])
    for row in (0, 2):
        assert (out[row] - without[row]).abs().max() > 0.01 and (out[row] - others[row]).abs().max() > 0.01


@pytest.mark.parametrize("config", [CROSS, PREFIX])
def test_stepping_is_the_forward_pass(config: LMConfig) -> None:
    lm, (tokens, text, mask) = model(config, trained=True), inputs(config)
    excerpts = torch.randn(3, 9, 5)
    excerpts[2] = 0
    chroma = torch.zeros(3, 4, dtype=torch.uint8) if config.condition.melody else None
    with torch.no_grad():
        expected = lm(tokens, text, mask, chroma, style=excerpts)
        conditions = Conditions(text, mask, chroma, style=lm.style_vector(excerpts))
        engine = Engine(lm)
        cache = engine.start(conditions, 7)
        engine.listen(cache, conditions, chroma)
        stepped = [engine.feed(tokens[..., :3], cache)]
        stepped += [engine.feed(tokens[..., c : c + 1], cache) for c in range(3, 7)]
    torch.testing.assert_close(torch.stack(stepped, dim=2), expected[:, :, 2:], atol=1e-4, rtol=1e-4)


def test_the_vector_does_not_depend_on_padding_and_is_learned_through_the_bottleneck() -> None:
    torch.manual_seed(0)
    encoder = StyleEncoder(STYLE)
    excerpt = torch.randn(1, 9, 5)
    padded = torch.cat([excerpt, torch.zeros(1, 20, 5)], dim=1)
    torch.testing.assert_close(encoder(padded), encoder(excerpt), atol=1e-6, rtol=1e-5)
    assert (encoder(excerpt) - encoder(excerpt.flip(0) * 2)).abs().max() > 1e-4
    values = encoder.quantise(torch.tensor([-0.9, -0.2, 0.3, 0.8]))
    assert values.tolist() == pytest.approx([-1.0, 0.0, 0.5, 1.0])
    encoder(excerpt).sum().backward()
    assert encoder.input.weight.grad is not None and encoder.input.weight.grad.abs().sum() > 0


def test_latents_are_those_of_the_codec_in_one_scale() -> None:
    codec = codecs.tiny()
    codes = torch.randint(0, 2048, (2, 4, 300))
    latents, raw = Latents(codec)(codes), codec.embed(codes).transpose(1, 2)
    whitened = (raw - raw.mean(dim=(0, 1))) / raw.std(dim=(0, 1))
    both = torch.stack([latents.flatten(), whitened.flatten()])
    assert (latents - whitened).abs().max() < 0.5 and torch.corrcoef(both)[0, 1] > 0.99
    codes[1, :, 5:] = NONE
    assert not Latents(codec)(codes)[1, 5:].any() and Latents(codec)(codes)[1, :5].any()
    wide = Latents(stereo.StereoCodec(codec))
    left, right = codes[:1], codes[:1].flip(2)
    sides = wide(stereo.join(left, right))
    assert wide.dim == 2 * Latents(codec).dim
    assert torch.equal(sides, torch.cat([Latents(codec)(left), Latents(codec)(right)], dim=2))


def sound(seed: int, seconds: float = 4.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(round(32_000 * seconds))
    return (0.2 * np.convolve(noise, np.ones(1 + 20 * seed) / (1 + 20 * seed), mode="same")).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_release(folder / "styled", STYLED)
    heard = replace(STYLED.condition, melody=True, chroma_frames=8)
    write_release(folder / "both", replace(STYLED, cross_attention=False, condition=heard))
    write_release(folder / "text", TEXT)
    for seed in (0, 1):
        soundfile.write(folder / f"{seed}.flac", sound(seed), 32_000)
    soundfile.write(folder / "short.wav", sound(0, 1.2), 32_000)
    soundfile.write(folder / "silent.wav", np.zeros(96_000), 32_000)
    (folder / "words.mp3").write_text("not audio at all")
    return folder


def test_another_excerpt_is_another_clip(folder: Path) -> None:
    music = generate.load(folder / "styled" / "release")
    a, b = (generate.encode_audio(music, sound(seed)[None]) for seed in (0, 1))

    def made(styles: torch.Tensor | None, prompt: str | None = "waltz", **sampling: float) -> torch.Tensor:
        config = SamplingConfig(**sampling)  # type: ignore[arg-type]
        return generate.generate(music, [prompt], 0.6, [1], config, styles=styles)[1]

    outputs = [made(a), made(b), made(None), made(a, None), made(a, guidance=1.0), made(a, guidance_style=1.0)]
    for i, one in enumerate(outputs):
        assert all(not torch.equal(one, o) for o in outputs[i + 1 :]), i
    assert torch.equal(made(a), outputs[0]), "the same again"
    assert torch.equal(made(a, guidance_style=3.0), outputs[0]), "equal scales are the two-way form"
    batch = generate.generate(music, ["waltz"] * 3, 0.6, [1] * 3, styles=torch.cat([a, b, torch.full_like(a, NONE)]))
    assert torch.equal(batch[1], torch.cat(outputs[:3])), "alone and in a batch, each with its own excerpt or none"


@pytest.mark.parametrize(
    ("shape", "code", "message"),
    [
        ((1, 4, 0), 0, r"styles is \[1, 4, 0\], which holds nothing"),
        ((1, 3, 9), 0, r"takes codes of shape \[batch, 4, frames\]; got \[1, 3, 9\]"),
        ((1, 4, 9), 2048, r"codes must lie in 0…2047; got 2048…2048"),
        ((1, 4, 9), -2, r"codes must lie in 0…2047; got -2…-2"),
    ],
)
def test_codes_that_are_no_excerpt_are_refused(folder: Path, shape: tuple[int, ...], code: int, message: str) -> None:
    music = generate.load(folder / "styled" / "release")
    with pytest.raises((UserError, ValueError), match=message):
        generate.generate(music, ["waltz"], 0.6, [1], styles=torch.full(shape, code))


def test_text_melody_and_style_have_scales_of_their_own(folder: Path) -> None:
    music = generate.load(folder / "both" / "release")
    excerpt = generate.encode_audio(music, sound(0)[None])
    melody = torch.arange(8, dtype=torch.uint8)[None]

    def made(**sampling: float) -> torch.Tensor:
        config = SamplingConfig(**sampling)  # type: ignore[arg-type]
        return generate.generate(music, ["waltz"], 0.6, [1], config, styles=excerpt, melodies=melody)[1]

    one = made(guidance=3.0)
    assert torch.equal(made(guidance=3.0, guidance_melody=3.0, guidance_style=3.0), one)
    others = [
        made(guidance=1.0, guidance_melody=3.0, guidance_style=3.0),
        made(guidance=3.0, guidance_melody=1.0, guidance_style=3.0),
        made(guidance=3.0, guidance_melody=3.0, guidance_style=1.0),
    ]
    for i, other in enumerate([one, *others]):
        assert all(not torch.equal(other, o) for o in [one, *others][i + 1 :])


def command(folder: Path, model: str, *arguments: str) -> int:
    common = ["--model", str(folder / model / "release"), "--duration", "0.6", "--out", str(folder / "out.wav")]
    return generate.main([*common, *arguments])


def test_command_plays_in_the_style_of_a_file(folder: Path) -> None:
    made = []
    for name in ("0.flac", "1.flac", "0.flac"):
        assert command(folder, "styled", "--style", str(folder / name)) == 0
        made.append((folder / "out.wav").read_bytes())
    assert made[0] == made[2] != made[1]
    told = wav.read_marking(folder / "out.wav")["style"]
    digest = hashlib.sha256((folder / "0.flac").read_bytes()).hexdigest()
    assert told.items() >= {"seconds": 3.0, "file_sha256": digest}.items()
    music = generate.load(folder / "styled" / "release")
    excerpt, _ = generate.listen.read_middle(str(folder / "0.flac"), 32_000, 1, what="STYLE", seconds=3.0)
    styles = torch.nn.functional.pad(generate.encode_audio(music, excerpt), (0, 9), value=NONE)
    mark = generate.marking(music, generate.Request([None], 0.6, [0], styles=styles))
    assert mark["style"] == {"seconds": 3.0, "codes_sha256": told["codes_sha256"]}, "in a batch, beside a longer one"


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("styled", "short.wav", r"is 1.20 s long; a style needs at least 1.5 s"),
        ("styled", "silent.wav", "is silent in its middle"),
        ("styled", "words.mp3", "STYLE=.* is not audio"),
        ("styled", "gone.wav", "STYLE=.* does not exist"),
        ("text", "0.flac", "has no style input"),
    ],
)
def test_command_refuses_in_words(folder: Path, model: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        command(folder, model, "--style", str(folder / name))


def test_a_release_without_a_style_is_a_start_for_one_with(folder: Path) -> None:
    lm, info = weights.load_release(folder / "text" / "release")
    parts = info["codec"], info["text_encoder"]
    state = weights.initial_state(folder / "text" / "release", STYLED, *parts)
    assert state.keys() == lm.state_dict().keys()
    with pytest.raises(UserError, match=r"condition\.style\.dim: it has 8, given 0"):
        weights.initial_state(folder / "styled" / "release", TEXT, *parts)


def test_every_frame_of_an_excerpt_counts() -> None:
    torch.manual_seed(1)
    encoder = StyleEncoder(replace(STYLE, layers=0, levels=101))  # without attention, which could carry it elsewhere
    latents = torch.randn(1, 7, 5)
    for frame in range(7):
        changed = latents.clone()
        changed[:, frame] += 3.0
        assert not torch.allclose(encoder(changed), encoder(latents)), frame
