"""Clips beyond the training crop, continuations, streams: one clip however it is made, no seam where pieces meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from musicgen import codec as codecs
from musicgen import generate, listen, memory, sampler
from musicgen.conditions import Conditions
from musicgen.config import ConditionConfig, LMConfig
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.metrics.audio import spectral_flatness
from musicgen.packing import Precision
from musicgen.sampling import SamplingConfig
from musicgen.stream_decoder import StreamDecoder, decode_long
from musicgen.windows import Windows
from tests.musicgen.small_model import TEXT, write_release

CATALOGUE = codecs.DEMO_FOLDER.parent / "catalogue" / "audio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> generate.MusicGen:
    """It learned from 0.4 s, 20 frames, at a time."""
    return generate.load(write_release(tmp_path_factory.mktemp("model"), crop_seconds=0.4))


def codes(model: generate.MusicGen, seconds: float, **more: object) -> torch.Tensor:
    return generate.generate(model, ["slow waltz"], seconds, [1], **more)[1]  # type: ignore[arg-type]


def test_windows_follow_each_other() -> None:
    windows = Windows(total=70, window=30, stride=18, frame_rate=50, sample_rate_hz=32_000)
    assert [windows.start_after(done) for done in (0, 29, 30, 48, 66)] == [0, 0, 18, 36, 54]
    with pytest.raises(ValueError, match="a stride of 30 frames"):
        Windows(70, 30, 30, 50, 32_000)


def test_a_window_goes_on_from_the_end_of_the_one_before(model: generate.MusicGen) -> None:
    """The second window is the continuation of the 8 frames that both share, drawn at its own place of the clip."""
    long = codes(model, 1.0)
    assert long.shape[2] == 50
    assert torch.equal(codes(model, 0.4), long[..., :20]), "a longer clip begins like a shorter one"
    other = codes(model, 1.0, stride_seconds=0.3)
    assert torch.equal(other[..., :20], long[..., :20]) and not torch.equal(other, long)
    engine, branches = model.engine, [generate.encode_prompts(model, ["slow waltz"])]
    branches.append(branches[0].without_text(model.lm))
    assert engine is not None

    def window_at(offset: int) -> torch.Tensor:
        window = sampler.Sampler(
            engine, branches, [1], SamplingConfig(), 20,
            frame_rate=50, sample_rate_hz=32_000, scales=torch.full((1, 50), 3.0),
        )  # fmt: skip
        given = torch.full((1, 4, 20), sampler.UNKNOWN)
        given[..., :8] = long[..., 12:20]
        window.begin(given, offset)
        while not window.done:
            window.advance()
        return window.codes(0, 20)

    assert torch.equal(window_at(12), long[..., 12:32])
    assert not torch.equal(window_at(0), long[..., 12:32]), "random numbers belong to the clip's place"


def test_the_way_of_the_gpu_says_the_same(model: generate.MusicGen, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured on a GPU, run as it is: positions on the device, spans of entries under a mask, two spans."""
    monkeypatch.setattr(sampler, "SPAN", 8)
    prompted = generate.encode_prompts(model, ["slow waltz", "samba", None])

    def made(on_device: bool) -> torch.Tensor:
        assert model.engine is not None
        window = sampler.Sampler(
            model.engine, [prompted, prompted.without_text(model.lm)], [1, 2, 3], SamplingConfig(), 20,
            frame_rate=50, sample_rate_hz=32_000, scales=torch.linspace(1, 5, 20)[None],
        )  # fmt: skip
        window.begin(torch.full((3, 4, 20), sampler.UNKNOWN))
        while not window.done:
            if on_device:
                window._noise(window.known)
                window.advance_in_spans()
                window.known += 1
            else:
                window.advance()
        return window.codes(0, 20)

    assert torch.equal(made(True), made(False))


@pytest.mark.parametrize("precision", ["bf16", "float16", "int8"])
def test_the_way_of_the_gpu_never_asks_the_host(precision: Precision) -> None:
    """On tensors that have a device and no values: whoever reads one, or brings one of the CPU's, is caught."""
    shape = (2, 8, LMConfig().condition.text_dim)
    with torch.device("meta"):
        lm = MusicLM(LMConfig(dim=128, num_layers=2, num_heads=2))
        prompted = Conditions(torch.zeros(shape), torch.ones(shape[:2], dtype=torch.bool))
        window = sampler.Sampler(
            Engine(lm, precision), [prompted, prompted.without_text(lm)], [1, 2], SamplingConfig(), 20,
            frame_rate=50, sample_rate_hz=32_000, scales=torch.full((1, 20), 3.0),
        )  # fmt: skip
    window.cache.position, window.offset, window.first_drawn = 1, 0, 1  # as after `begin`, which may ask
    for column in (1, 2):
        window._noise(column)
        window.advance_in_spans()
    assert window.columns.is_meta and window.cache.position == 3


def test_windows_of_a_prefix_keep_their_addresses() -> None:
    """A captured graph reads mask and places where the first window put them."""
    torch.manual_seed(0)
    condition = replace(LMConfig().condition, melody=True, chroma_frames=3, text_dim=8)
    lm = MusicLM(LMConfig(dim=64, num_layers=1, num_heads=2, cross_attention=False, condition=condition)).eval()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    heard = Conditions(torch.randn(2, 3, 8), mask)
    window = sampler.Sampler(
        Engine(lm), [heard, heard.without_text(lm)], [1, 2], SamplingConfig(), 10, frame_rate=50, sample_rate_hz=32_000,
        scales=torch.full((1, 20), 3.0),
    )  # fmt: skip
    places = []
    for offset in (0, 10):
        window.begin(torch.full((2, 4, 10), sampler.UNKNOWN), offset)
        assert window.cache.visible is not None and window.cache.shift is not None
        places.append((window.cache.visible.data_ptr(), window.cache.shift.data_ptr()))
    assert places[0] == places[1]


def test_memory_does_not_grow_with_the_clip(model: generate.MusicGen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times as long: the same one cache of one window."""
    capacities: list[int] = []
    start = Engine.start

    def counting(self: Engine, conditions: object, columns: int) -> object:
        cache = start(self, conditions, columns)  # type: ignore[arg-type]
        capacities.append(cache.capacity)
        return cache

    monkeypatch.setattr(Engine, "start", counting)
    codes(model, 0.5)
    codes(model, 2.0)
    assert capacities == [24, 24]


@pytest.mark.parametrize("melody", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # a device without storage rounds as a GPU does
def test_a_cache_takes_the_memory_that_was_counted(melody: bool, device: str) -> None:
    """The melody before the columns, and on a GPU the rest of a span."""
    condition = ConditionConfig("minilm", 20, melody=melody, chroma_frames=235)
    with torch.device(device):
        lm = MusicLM(LMConfig(dim=16, num_layers=2, num_heads=2, codebook_size=16, condition=condition))
        engine, conditions = Engine(lm), Conditions(torch.zeros(3, 4, 20), torch.zeros(3, 4, dtype=torch.bool))
    cache = engine.start(conditions, 30)
    counted = memory.cache_bytes(engine, 3, engine.capacity(30 + 235 * melody))
    assert counted == sum(part.nbytes for part in [*cache.keys, *cache.values])


@pytest.mark.parametrize("seconds", [0.3, 0.9])
def test_a_continuation_begins_with_its_prompt_and_depends_on_it(model: generate.MusicGen, seconds: float) -> None:
    """A prompt shorter and one longer than a window."""
    frames = round(50 * seconds)
    given = list(torch.randint(0, 2048, (2, 1, 4, frames), generator=torch.Generator().manual_seed(0)))
    made = [codes(model, seconds + 0.4, given=g) for g in given]
    for clip, g in zip(made, given):
        assert torch.equal(clip[..., :frames], g) and clip.shape[2] == frames + 20
    assert (made[0][..., frames:] != made[1][..., frames:]).float().mean() > 0.05
    text = generate.generate(model, ["samba"], seconds + 0.4, [1], given=given[0])[1]
    assert not torch.equal(text[..., frames:], made[0][..., frames:])


def test_a_clip_continued_from_its_own_codes_is_the_clip(model: generate.MusicGen) -> None:
    """k frames and then the rest are all frames at once: columns of the delay pattern that both hold are given."""
    whole = codes(model, 0.4, config=SamplingConfig(temperature=0.0))
    again = codes(model, 0.4, config=SamplingConfig(temperature=0.0), given=whole[..., :9])
    assert torch.equal(whole, again)
    drawn = codes(model, 0.4)
    assert torch.equal(codes(model, 0.4, given=drawn[..., :9]), drawn)


def test_the_end_of_a_clip_is_as_the_middle_with_the_tail_of_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Models whose tail columns were never trained: the last frames come from columns inside a longer window."""
    config: LMConfig = replace(TEXT, tail="reference")
    model = generate.load(write_release(tmp_path_factory.mktemp("tail"), config, crop_seconds=10.0))
    seeds = list(range(16))
    short, longer = (generate.generate(model, ["slow waltz"] * 16, seconds, seeds)[1] for seconds in (0.4, 0.8))
    assert torch.equal(short, longer[..., :20]), "every code of the last frames, not only the first codebook's"


def test_length_bound_patterns_keep_the_length_they_learned(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With coarse first a clip of half the crop is the first half of a whole one: the same columns were made."""
    config = replace(TEXT, pattern="coarse_first")
    model = generate.load(write_release(tmp_path_factory.mktemp("coarse"), config, crop_seconds=0.4))
    whole = codes(model, 0.4)
    assert torch.equal(codes(model, 0.2), whole[..., :10])
    assert torch.equal(codes(model, 0.7)[..., :20], whole)


@pytest.mark.parametrize("batch", [1, 3])
def test_streamed_sound_is_the_sound(model: generate.MusicGen, batch: int) -> None:
    prompts, seeds = ["slow waltz", "samba", None][:batch], [1, 2, 3][:batch]
    whole, _ = generate.generate(model, prompts, 1.23, seeds)
    request = generate.Request(prompts, 1.23, seeds)
    pieces = list(generate.stream(model, request, chunk_seconds=0.1))
    assert len(pieces) > 5 and all(p.shape[:2] == (batch, 1) for p in pieces)
    streamed = torch.cat(pieces, dim=-1)
    assert streamed.shape == whole.shape
    assert float((streamed - whole).abs().max()) < 1e-5 * float(whole.abs().max())


def test_a_stream_sounds_before_the_clip_is_made(model: generate.MusicGen) -> None:
    request = generate.Request(["slow waltz"], 2.0, [1])
    steps: list[int] = []
    advance = sampler.Sampler.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.Sampler, "advance", lambda self: (steps.append(1), advance(self))[1])
        first = next(iter(generate.stream(model, request, chunk_seconds=0.1)))
    assert first.shape[-1] > 0 and len(steps) < 25, "0.1 s, the lookahead and the delay; not the 100 frames"


def test_a_causal_codec_has_no_seam_either() -> None:
    config = EncodecConfig(
        sampling_rate=24_000, num_filters=4, hidden_size=16, codebook_size=64, upsampling_ratios=[8, 5, 4, 2],
        use_causal_conv=True, use_conv_shortcut=True, target_bandwidths=[1.5], num_lstm_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    network = EncodecModel(config)
    for layer in network.quantizer.layers:
        layer.codebook.embed.normal_()
    codec = codecs.Codec(network, "causal")
    tokens = torch.randint(0, 64, (1, codec.num_codebooks, 90))
    whole = codec.decode(tokens)
    assert float((decode_long(codec, tokens, piece_frames=10) - whole).abs().max()) < 1e-4 * float(whole.abs().max())


@pytest.mark.parametrize("pieces", [1, 7, 50])
def test_decoding_in_pieces_is_decoding_at_once(pieces: int) -> None:
    """On the codec that ships: any cut, the edges of the clip included, down to rounding."""
    codec = codecs.load("demo")
    tokens = torch.randint(0, 2048, (1, 4, 120), generator=torch.Generator().manual_seed(pieces))
    whole = codec.decode(tokens)
    joined = decode_long(codec, tokens, piece_frames=pieces)
    assert joined.shape == whole.shape
    assert float((joined - whole).abs().max()) < 1e-5 * float(whole.abs().max())


def test_pieces_without_context_do_not_join() -> None:
    """On real music: what the context is for. Each piece decoded alone differs audibly from the whole, and at the seams
    most."""
    codec = codecs.load("demo")
    track = listen.read(str(CATALOGUE / "demo-0033.flac"), codec.sample_rate, 1, what="track", max_seconds=4)
    tokens = torch.from_numpy(codec.encode_track(track)).long()[None]
    whole = codec.decode(tokens)
    alone = torch.cat([codec.decode(part) for part in tokens.split(10, dim=2)], dim=-1)

    def error(sound: torch.Tensor) -> float:
        return float((sound - whole).norm() / whole.norm())

    assert error(decode_long(codec, tokens, piece_frames=10)) < 1e-5
    assert error(alone) > 0.05


def test_a_stream_decoder_keeps_little() -> None:
    codec = codecs.load("demo")
    decoder = StreamDecoder(codec)
    tokens = torch.randint(0, 2048, (1, 4, 400))
    for part in tokens.split(20, dim=2):
        decoder.push(part)
        assert decoder.latents is not None and decoder.hidden is not None
        assert decoder.latents.shape[2] <= 10 and decoder.hidden.shape[2] <= 10


def test_requests_that_cannot_be(model: generate.MusicGen, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the audio prompt is 0.4 s long and DURATION=0.4 counts it in"):
        codes(model, 0.4, given=codes(model, 0.4))
    with pytest.raises(UserError, match=r"extend_stride is 0.5 s; give more than 0 and less than the 0.4 s"):
        codes(model, 1.0, stride_seconds=0.5)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"DURATION=1 for 1 clip needs about .* GiB are free; give a shorter DURATION"):
        codes(model, 1.0)


def test_shipped_model_has_no_click_or_noise_at_borders_and_end() -> None:
    """The demo model over two windows of 10 s, the second from 6 s on: where the new codes begin and in the last half
    second neither jumps between samples nor the flatness of the spectrum exceed by half what the clip has elsewhere."""
    model = generate.load("demo")
    audio, _ = generate.generate(model, ["slow waltz for piano"], 13.0, [3])
    quarter = model.codec.sample_rate // 4

    def stands_out(sound: torch.Tensor) -> bool:
        blocks = sound[0, 0].view(-1, quarter)
        border = torch.zeros(len(blocks), dtype=torch.bool)
        border[39:41] = border[-2:] = True
        jumps = blocks.diff(dim=1).abs().amax(dim=1)
        flatness = torch.tensor([spectral_flatness(block) for block in blocks])
        return any(float(m[border].max()) > 1.5 * float(m[~border].max()) for m in (jumps, flatness))

    assert not stands_out(audio)
    noisy, clicked = audio.clone(), audio.clone()
    noisy[..., -quarter:] += 0.02 * torch.randn(quarter, generator=torch.Generator().manual_seed(0))
    clicked[..., 10 * 32_000 + 5 :] += 0.3
    assert stands_out(noisy) and stands_out(clicked), "the measure sees noise in the end and a step at the border"
