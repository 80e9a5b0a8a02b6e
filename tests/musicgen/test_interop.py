"""Import and export against transformers' own classes: equal logits, equal greedy tokens, equal bytes after a round
trip; audiocraft's files by their published layout; and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from musicgen import codec as codecs
from musicgen import conditioning, generate, patterns, stereo, weights
from musicgen.attributes import AttributeConfig
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig, StyleConfig
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.interop import audiocraft, command, huggingface, parts, sources
from musicgen.lm import MusicLM
from musicgen.model import encode_prompts
from musicgen.sampling import SamplingConfig
from musicgen.windows import Windows, stream_codes

WORDS = ["<pad>", "</s>", "<unk>", "slow", "fast", "piano", "waltz", "drums"]
SIZE, BOOKS = 64, 4
KINDS = ("mono", "stereo", "melody", "stereo-melody")
MELODY = torch.tensor([[0, 4, 7, 11, 2, 2, 9, 9, 5]])


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def text_config() -> Any:
    return transformers.T5Config(vocab_size=len(WORDS), d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)


def network(seed: int = 0) -> Any:
    """A small EnCodec of 64 codes whose codebooks fit its latents."""
    torch.manual_seed(seed)
    shape = codecs.CodecConfig(
        num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1, codebook_size=SIZE
    )
    model: Any = codecs.build(shape)
    with torch.no_grad():
        spread = float(model.encoder(torch.randn(1, 1, 32_000) * 0.1).std())
        for layer in model.quantizer.layers:
            layer.codebook.embed.normal_(std=spread)
    return model.eval()


def foreign(kind: str) -> Any:
    """A small random MusicGen of transformers."""
    channels, melody = (2 if "stereo" in kind else 1), "melody" in kind
    name = "MusicgenMelody" if melody else "Musicgen"
    codec = network()
    torch.manual_seed(1)
    decoder = getattr(transformers, f"{name}DecoderConfig")(
        vocab_size=SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=128,
        activation_function="relu" if kind == "stereo" else "gelu",
        num_codebooks=BOOKS * channels,
        audio_channels=channels,
        pad_token_id=SIZE,
        bos_token_id=SIZE,
        dropout=0.0,
        initializer_factor=0.3,
        tie_word_embeddings=False,
    )
    config = getattr(transformers, f"{name}Config")(
        text_encoder=text_config(),
        audio_encoder=codec.config,
        decoder=decoder,
        initializer_factor=0.3,
        **({"chroma_length": 7} if melody else {}),
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        config=config,
        text_encoder=transformers.T5EncoderModel(text_config()),
        audio_encoder=codec,
        decoder=getattr(transformers, f"{name}ForCausalLM")(decoder),
    )
    with torch.no_grad():  # biases and norms that are not where they start, so that the map of each is tested
        for key, value in model.named_parameters():
            if (key.endswith(".bias") and "encoder." not in key) or "layer_norm" in key:
                value.add_(torch.randn(value.shape) * 0.2)
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = SIZE
    model.generation_config.bos_token_id = SIZE
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path, Path]:
    """The kind, a model of transformers, its folder, and our release imported from it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = foreign(request.param)
    model.save_pretrained(folder / "theirs")
    tokenizer().save_pretrained(folder / "theirs")
    assert command.main(["import", "--source", str(folder / "theirs"), "--out", str(folder / "ours")]) == 0
    return request.param, model, folder / "theirs", folder / "ours"


def conditions(encoder: TextEncoder, kind: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    hidden, mask = encoder.encode(["slow piano waltz"])
    return hidden, mask, {"chroma": MELODY} if "melody" in kind else {}


def theirs_of(kind: str) -> dict[str, torch.Tensor]:
    given = dict(tokenizer()(["slow piano waltz"], return_tensors="pt"))
    given.pop("token_type_ids", None)
    if "melody" in kind:
        given["input_features"] = torch.nn.functional.one_hot(MELODY, 12).float()
    return given


def test_logits_equal_those_of_transformers(pair: tuple[str, Any, Path, Path]) -> None:
    kind, theirs, _, folder = pair
    model = generate.load(folder)
    books = model.lm.config.num_codebooks
    assert books == (8 if "stereo" in kind else 4) and model.codec.channels == (2 if "stereo" in kind else 1)
    tokens = torch.randint(0, SIZE + 1, (1, books, 13), generator=torch.Generator().manual_seed(2))
    hidden, mask, more = conditions(model.text_encoder, kind)
    with torch.no_grad():
        expected = theirs(**theirs_of(kind), decoder_input_ids=tokens[0]).logits
        ours = model.lm(tokens, hidden, mask, **more)
    expected = expected.reshape(1, books, -1, SIZE)[:, :, -13:]  # melody models give logits of the prefix as well
    assert float((ours - expected).abs().max()) <= 1e-4
    assert float(expected.std()) > 0.1, "the comparison is of something"
    if "melody" in kind:  # without a melody theirs hears C throughout, and so does the imported model
        given = theirs_of(kind)
        del given["input_features"]
        with torch.no_grad():
            expected = theirs(**given, decoder_input_ids=tokens[0]).logits.reshape(1, books, -1, SIZE)[:, :, -13:]
            assert float((model.lm(tokens, hidden, mask) - expected).abs().max()) <= 1e-4


def greedy_codes(model: generate.MusicGen, kind: str, frames: int) -> torch.Tensor:
    """Greedy codes with guidance 3 by the loop of `make generate`, down to the last column as transformers does it."""
    request = generate.Request(
        ["slow piano waltz"],
        frames / model.codec.frame_rate,
        [0],
        SamplingConfig(top_k=0, temperature=0.0, guidance=3.0),
        melodies=MELODY.to(torch.uint8) if "melody" in kind else None,
    )
    melody = MELODY.to(torch.uint8) if "melody" in kind else None
    prompted = replace(encode_prompts(model, request.prompts), chroma=melody)
    branches = [prompted, prompted.without_text(model.lm).without_melody()]
    scales = torch.full((1, frames), 3.0)
    windows = Windows(frames, frames, frames - 1, model.codec.frame_rate, model.codec.sample_rate)
    found = list(stream_codes(Engine(model.lm), branches, [0], request.sampling, windows, None, scales))
    # The command's own windows end beyond the clip, clear of columns never trained: until there they are equal.
    played = torch.cat(list(generate.codes(model, request)), dim=-1)
    whole = torch.cat(found, dim=-1)
    assert torch.equal(played[..., : frames - BOOKS], whole[..., : frames - BOOKS])
    return whole


def test_greedy_generation_gives_identical_tokens(pair: tuple[str, Any, Path, Path]) -> None:
    kind, theirs, _, folder = pair
    frames, codes = 12, []
    decode = theirs.audio_encoder.decode

    def listen(audio_codes: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        codes.append(audio_codes)
        return decode(audio_codes, *args, **kwargs)

    theirs.audio_encoder.decode = listen
    try:
        audio = theirs.generate(**theirs_of(kind), do_sample=False, guidance_scale=3.0, max_length=frames + BOOKS)
    finally:
        del theirs.audio_encoder.decode
    expected = codes[0][0] if len(codes) == 1 else stereo.join(codes[0][0], codes[1][0])
    model = generate.load(folder)
    found = greedy_codes(model, kind, frames)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 3
    torch.testing.assert_close(model.codec.decode(found), audio, atol=1e-4, rtol=1e-3)


def test_there_and_back_is_the_same_file(pair: tuple[str, Any, Path, Path], tmp_path: Path) -> None:
    kind, _, folder, ours = pair
    assert command.main(["export", "--model", str(ours), "--to", "transformers", "--out", str(tmp_path / "out")]) == 0
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # who may read one may read all
    # Every tensor of the language model and of the text encoder as it was; the codec without training statistics.
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    statistics = (".inited", ".cluster_size", ".embed_avg")
    assert all(torch.equal(before[k], after[k]) for k in before if not k.endswith(statistics))
    assert command.main(["import", "--source", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    first, second = weights.read_info(ours), weights.read_info(tmp_path / "back")
    for part in ("codec", "text_encoder"):
        assert first[part]["identity"] == second[part]["identity"]
    assert first["lm"] == second["lm"]

    argv = ["--out", str(tmp_path / "craft"), "--text_encoder_name", "t5-small"]
    assert command.main(["export", "--model", str(ours), "--to", "audiocraft", *argv]) == 0
    package = torch.load(tmp_path / "craft/state_dict.bin", weights_only=True)
    assert ("condition_provider.conditioners.self_wav.chroma.spec.window" in package["best_state"]) == (
        "melody" in kind
    )
    argv = ["--text_encoder", str(ours / "text_encoder"), "--out", str(tmp_path / "again")]
    assert command.main(["import", "--source", str(tmp_path / "craft"), *argv]) == 0
    third = weights.read_info(tmp_path / "again")
    assert third["codec"]["identity"] == first["codec"]["identity"]
    shape, wanted = third["lm"], dict(first["lm"])
    # audiocraft knows the melody's length by whole seconds only, and the encoder by the name it was given.
    for lm in (shape, wanted):
        lm["condition"] = {k: v for k, v in lm["condition"].items() if k not in ("chroma_frames", "text_encoder")}
    assert shape == wanted
    assert (tmp_path / "again/model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


def test_an_export_loads_with_the_pipeline(pair: tuple[str, Any, Path, Path], tmp_path: Path) -> None:
    kind, _, _, ours = pair
    assert command.main(["export", "--model", str(ours), "--to", "transformers", "--out", str(tmp_path / "out")]) == 0
    if "melody" in kind:  # the melody models' extractor needs torchaudio; the model itself does not
        loaded = transformers.MusicgenMelodyForConditionalGeneration.from_pretrained(tmp_path / "out")
        settings = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
        assert settings["feature_extractor_type"] == "MusicgenMelodyFeatureExtractor" and settings["n_fft"] == 2**14
        audio = loaded.generate(**theirs_of(kind), max_new_tokens=20)
        assert audio.shape[1] == (2 if "stereo" in kind else 1)
        return
    player = transformers.pipeline("text-to-audio", model=str(tmp_path / "out"), device="cpu")
    out = player("slow piano waltz", forward_params={"max_new_tokens": 20})
    assert out["sampling_rate"] == 32_000
    assert out["audio"].reshape(-1).shape[0] >= 10 * 640 and abs(out["audio"]).max() > 0
    settings = player.model.generation_config
    assert (settings.do_sample, settings.guidance_scale, settings.top_k) == (True, 3.0, SIZE)
    assert settings.max_length == 30 * 50 + BOOKS


def test_the_demo_plays_in_the_pipeline(tmp_path: Path) -> None:
    """Its text encoder is of BERT's kind, whose tokenizer has more to say than generate() takes."""
    assert command.main(["export", "--model", "demo", "--to", "transformers", "--out", str(tmp_path / "out")]) == 0
    player = transformers.pipeline("text-to-audio", model=str(tmp_path / "out"), device="cpu")
    assert abs(player("calm koto", forward_params={"max_new_tokens": 12})["audio"]).max() > 0


def released(config: LMConfig, folder: Path, *, codec: Any = None, licence: str = "Apache-2.0") -> Path:
    """A release of a random model with a small T5 and codec beside it."""
    codecs.save(codec or network(), folder / "codec", dtype=torch.float32)
    torch.manual_seed(3)
    transformers.T5EncoderModel(text_config()).save_pretrained(folder / "t5")
    tokenizer().save_pretrained(folder / "t5")
    name = f"{'stereo:' if config.pattern.startswith('stereo') else ''}{folder / 'codec'}"
    encoder = TextEncoder.load(str(folder / "t5"))
    info = {
        "codec": {"name": name, "identity": codecs.load(name).identity},
        "text_encoder": {"name": str(folder / "t5"), "identity": encoder.identity},
        "training": {"step": 5, "crop_seconds": 10.0},
        "licence": licence,
    }
    return weights.save_release(folder / "release", MusicLM(config), info, torch.float16)


CONFIG = LMConfig(
    dim=32, num_layers=2, num_heads=2, codebook_size=SIZE, activation="relu", condition=ConditionConfig("t5", 24)
)


def test_a_float16_release_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = released(CONFIG, tmp_path)
    for to in ("transformers", "audiocraft"):
        argv = ["--out", str(tmp_path / to), "--text_encoder_name", "t5-base"]
        assert command.main(["export", "--model", str(folder), "--to", to, *argv]) == 0
        argv = ["--out", str(tmp_path / f"{to}-back"), "--text_encoder", str(tmp_path / "t5")]
        assert command.main(["import", "--source", str(tmp_path / to), *argv]) == 0
        back = tmp_path / f"{to}-back"
        assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        info = weights.read_info(back)
        assert info["licence"] == "Apache-2.0" and info["lm"]["activation"] == "relu"
        assert info["training"]["crop_seconds"] == 10.0
        assert info["inherited"] == [{"model": str(tmp_path / to), "licence": "Apache-2.0"}]


@pytest.mark.parametrize(
    ("card", "given", "made", "commercial"),
    [
        ("license: cc-by-nc-4.0", "Apache-2.0", None, False),
        ("license: cc-by-nc-nd-4.0", "MIT", None, False),
        ("license: cc-by-nc-nd-4.0", "CC-BY-NC-ND-4.0", "cc-by-nc-nd-4.0", False),
        ("license: mit", "MIT", "MIT", True),
        ("license: mit", "", "MIT", True),
        ("license: other", "cc-by-nc-4.0", "CC-BY-NC-4.0", False),
        ("license: not stated", "MIT", "MIT", True),
        ("license: other", "", "not stated", True),
        ("inherited_licences: [{model: m, licence: CC-BY-NC-4.0}]", "MIT", "MIT", False),
    ],
)
def test_a_licence_that_the_source_states_stays(
    card: str, given: str, made: str | None, commercial: bool, tmp_path: Path
) -> None:
    """`made` is the licence of the import, None where it is refused; `commercial` what is told of its descendants."""
    foreign("mono").save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text(f"---\n{card}\n---\n")
    config = command.ImportConfig(str(tmp_path / "theirs"), str(tmp_path / "ours"), licence=given)
    if made is None:
        with pytest.raises(
            UserError, match=rf"(?i)licence is '{given}', but FROM='.*' says .*cc-by-nc.*leave --licence out"
        ):
            command.import_model(config)
        assert not (tmp_path / "ours").exists()
        return
    info = weights.read_info(command.import_model(config))
    assert info["licence"] == made
    assert ("not for commercial use" in weights.notice(info)) is not commercial


def test_the_licence_of_an_import_is_inherited_beside_those_it_inherits(tmp_path: Path) -> None:
    folder = released(CONFIG, tmp_path, licence="CC-BY-NC-4.0")
    about = json.loads((folder / "config.json").read_text())
    about["inherited"] = [{"model": "theirs", "licence": "Apache-2.0"}]
    (folder / "config.json").write_text(json.dumps(about))
    assert command.main(["export", "--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert command.main(["import", "--source", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    own = {"model": str(tmp_path / "out"), "licence": "CC-BY-NC-4.0"}
    assert weights.inherited(tmp_path / "back") == [own, *about["inherited"]]


@pytest.mark.parametrize(
    "pattern",
    ["parallel", "partial_delay", "flattening", "partial_flattening", "coarse_first", "musiclm", "stereo_delay"],
)
def test_every_pattern_goes_to_audiocraft_and_back(pattern: str) -> None:
    books = 8 if pattern.startswith("stereo") else 4
    settings = audiocraft.pattern_settings(pattern, books)
    assert audiocraft.pattern_of(settings, books, pattern.startswith("stereo"), "x") == pattern


def test_what_transformers_cannot_say_is_refused(tmp_path: Path) -> None:
    folder = released(replace(CONFIG, pattern="parallel"), tmp_path)
    with pytest.raises(UserError, match=r"pattern 'parallel'; transformers generates 'delay'.*TO=audiocraft"):
        command.main(["export", "--model", str(folder), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"text encoder '.*t5'; audiocraft fetches its encoder by name"):
        command.main(["export", "--model", str(folder), "--to", "audiocraft", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="not empty"):
        command.main(["export", "--model", str(folder), "--out", str(tmp_path / "full")])
    with pytest.raises(UserError, match="FROM is missing"):
        command.main(["import", "--source", "", "--out", "x"])
    with pytest.raises(UserError, match="nothing that can be imported"):
        command.main(["import", "--source", str(tmp_path / "full"), "--out", str(tmp_path / "x")])
    heard = replace(CONFIG.condition, attributes=(AttributeConfig("genre", values=("folk", "jazz")),))
    for to in ("transformers", "audiocraft"):
        folder = released(replace(CONFIG, condition=heard), tmp_path / to)
        with pytest.raises(UserError, match=r"listens to attributes \(genre\)"):
            command.main(["export", "--model", str(folder), "--to", to, "--out", str(tmp_path / "x")])
        styled = replace(CONFIG.condition, style=StyleConfig(dim=4, latent_dim=8, width=8))
        folder = released(replace(CONFIG, condition=styled), tmp_path / f"styled-{to}")
        with pytest.raises(UserError, match="has a style input"):
            command.main(["export", "--model", str(folder), "--to", to, "--out", str(tmp_path / "x")])
    same = replace(CONFIG, dim=24, condition=ConditionConfig("t5", 24))
    with pytest.raises(UserError, match="same width 24"):
        command.main(["export", "--model", str(released(same, tmp_path / "same")), "--out", str(tmp_path / "x")])


def craft(tmp_path: Path, **changes: Any) -> Path:
    """audiocraft's files of a small model, with changes to `xp.cfg`."""
    folder = released(CONFIG, tmp_path)
    argv = ["--out", str(tmp_path / "craft"), "--text_encoder_name", "t5-base"]
    assert command.main(["export", "--model", str(folder), "--to", "audiocraft", *argv]) == 0
    file = tmp_path / "craft/state_dict.bin"
    package = torch.load(file, weights_only=True)
    settings = yaml.safe_load(package["xp.cfg"])
    for key, value in changes.items():
        target = settings
        *path, last = key.split("__")
        for part in path:
            target = target[part]
        target[last] = value
    package["xp.cfg"] = yaml.safe_dump(settings)
    torch.save(package, file)
    return tmp_path / "craft"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebooks_pattern__delay__delays": [0, 2, 3, 4]}, r"codebook pattern 'delay' .*\[0, 2, 3, 4\]"),
        ({"codebooks_pattern__delay__flatten_first": 2}, "flatten_first.: 2"),
        ({"transformer_lm__positional_embedding": "rope"}, "positional_embedding: 'rope'"),
        ({"transformer_lm__num_layers": 3}, "do not fit the settings"),
        ({"transformer_lm__n_q": 5}, "codebook pattern"),
        ({"conditioners__style": {"model": "style"}}, "conditioners.style"),
        ({"fuser__cross": [], "fuser__prepend": ["description"]}, "do not fit the settings"),
        ({"lm_model": "transformer_lm_magnet"}, "transformer_lm_magnet"),
    ],
)
def test_audiocraft_models_of_another_kind_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = craft(tmp_path, **changes)
    argv = ["--text_encoder", str(tmp_path / "t5"), "--out", str(tmp_path / "ours")]
    with pytest.raises(UserError, match=message):
        command.main(["import", "--source", str(folder), *argv])
    assert not (tmp_path / "ours").exists()


def test_audiocraft_settings_point_at_each_other(tmp_path: Path) -> None:
    """Exports of audiocraft's own keep OmegaConf's references; a file path instead of its folder is taken as well."""
    folder = craft(tmp_path, transformer_lm__card="${codec.bins}", codec={"bins": SIZE})
    argv = ["--text_encoder", str(tmp_path / "t5"), "--out", str(tmp_path / "ours")]
    assert command.main(["import", "--source", str(folder / "state_dict.bin"), *argv]) == 0
    assert weights.load_release(tmp_path / "ours")[0].config.codebook_size == SIZE


def test_the_codec_by_names_of_audiocraft() -> None:
    model = network()
    state = audiocraft.codec_state(model)
    for name in (
        "encoder.model.0.conv.conv.weight_g",
        "encoder.model.1.block.1.conv.conv.bias",
        "encoder.model.13.lstm.weight_ih_l0",
        "decoder.model.3.convtr.convtr.weight_v",
        "decoder.model.15.conv.conv.weight_v",
        "quantizer.vq.layers.3._codebook.embed_avg",
    ):
        assert name in state
    # For transposed convolutions the norm's factor is per input channel.
    assert state["decoder.model.3.convtr.convtr.weight_g"].shape == (64, 1, 1)
    assert not any("parametrizations" in name or ".layers." in name.replace("vq.layers", "") for name in state)


def test_another_codec_is_refused(tmp_path: Path) -> None:
    folder = craft(tmp_path)
    shape = codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1, codebook_size=32)
    other = codecs.save(codecs.build(shape), tmp_path / "other")
    argv = ["--text_encoder", str(tmp_path / "t5"), "--out", str(tmp_path / "ours"), "--codec", str(other)]
    with pytest.raises(UserError, match=r"speaks 4 codebooks of 64 codes, codec '.*other' has 4 of 32"):
        command.main(["import", "--source", str(folder), *argv])
    (folder / "compression_state_dict.bin").unlink()
    with pytest.raises(UserError, match=r"has no compression_state_dict.bin.*--codec"):
        command.main(["import", "--source", str(folder), *argv[:4]])


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = craft(tmp_path)
    package = torch.load(folder / "state_dict.bin", weights_only=True)
    torch.save({**package, "history": Trap()}, folder / "state_dict.bin")
    argv = ["--text_encoder", str(tmp_path / "t5"), "--out", str(tmp_path / "ours")]
    with pytest.raises(UserError, match=r"holds more than tensors and plain values, and is not unpickled"):
        command.main(["import", "--source", str(folder), *argv])
    (folder / "state_dict.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"state_dict.bin"):
        command.main(["import", "--source", str(folder), *argv])
    assert not (tmp_path / "sprung").exists()
    torch.save({"model": {}}, folder / "state_dict.bin")
    with pytest.raises(UserError, match=r"not an exported audiocraft file"):
        command.main(["import", "--source", str(folder), *argv])


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ('{"max_length": 1500}', 30.0),  # the released models
        ('{"max_length": 504}', 10.0),  # our export of crops of 10 s
        ('{"max_length": 750}', 15.0),
        ('{"max_length": 509}', 10.1),
        ('{"max_length": 20}', 30.0),  # transformers' own default says nothing
        ('{"max_length": "long"}', 30.0),
        ("[]", 30.0),
        (None, 30.0),
    ],
)
def test_the_length_of_the_crops_comes_from_what_the_model_makes(
    settings: str | None, seconds: float, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    if settings is not None:
        (tmp_path / "generation_config.json").write_text(settings)
    whole = SimpleNamespace(
        audio_encoder=SimpleNamespace(frame_rate=50), decoder=SimpleNamespace(num_codebooks=4, audio_channels=1)
    )
    assert huggingface._crop_seconds(tmp_path, whole) == pytest.approx(seconds)


def test_damaged_transformers_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    foreign("mono").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    part = {k: v for k, v in whole.items() if k != "decoder.model.decoder.layers.1.fc1.weight"}
    save_file(part, folder / "model.safetensors", metadata={"format": "pt"})
    argv = ["import", "--source", str(folder), "--out", str(tmp_path / "ours")]
    with pytest.raises(UserError, match=r"weights are missing: decoder.model.decoder.layers.1.fc1.weight"):
        command.main(argv)
    (folder / "model.safetensors").unlink()
    torch.save(whole, folder / "pytorch_model.bin")  # a pickled file is not a way in
    with pytest.raises(UserError, match=r"cannot be read.*pickled weights are not read"):
        command.main(argv)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["activation_function"] = "silu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"feed-forward 'silu'"):
        command.main(argv)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without network whose copy of the model hub is this folder."""
    import huggingface_hub

    def no_network() -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(conditioning, "_reach_hub", no_network)
    monkeypatch.setenv("MUSICGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


def test_published_names_without_network(hub: Path) -> None:
    assert "facebook/musicgen-stereo-melody-large" in sources.PUBLISHED and len(sources.PUBLISHED) == 10
    for call in (
        lambda: command.main(["import", "--source", "facebook/musicgen-small", "--out", str(hub / "x")]),
        lambda: generate.load("facebook/musicgen-small"),
        lambda: weights.read_info("facebook/musicgen-small"),
    ):
        with pytest.raises(
            UserError, match=r"(?s)no network.*hf download facebook/musicgen-small.*instead of the name"
        ):
            call()
    with pytest.raises(UserError, match=r"(?s)'someone/model'.*the paper's own are facebook/musicgen-small"):
        weights.read_info("someone/model")


def test_published_names_from_the_machines_copy_of_the_hub(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = hub / "models--facebook--musicgen-small/snapshots" / ("a" * 40)
    foreign("mono").save_pretrained(snapshot)
    tokenizer().save_pretrained(snapshot)
    refs = hub / "models--facebook--musicgen-small/refs/main"
    refs.parent.mkdir(parents=True)
    refs.write_text("a" * 40)
    model = generate.load("facebook/musicgen-small")
    said = capsys.readouterr().err
    assert "importing facebook/musicgen-small once" in said
    assert "derive from facebook/musicgen-small: CC-BY-NC-4.0; not for commercial use" in said
    assert model.info["licence"] == "CC-BY-NC-4.0"
    audio, _ = generate.generate(model, ["slow piano"], 0.3, [1], SamplingConfig(top_k=0))
    assert audio.shape == (1, 1, 9600)
    generate.load("facebook/musicgen-small")
    assert "importing" not in capsys.readouterr().err, "the second time it is there"
    # What is trained from it inherits the licence, and its export says so.
    assert weights.inherited("facebook/musicgen-small") == [
        {"model": "facebook/musicgen-small", "licence": "CC-BY-NC-4.0"}
    ]
    info = {**model.info, "licence": "Apache-2.0", "codec": dict(model.info["codec"])}
    tuned = weights.save_release(
        tmp_path / "tuned",
        model.lm,
        info,
        folders={p: Path(weights.place_of("facebook/musicgen-small", info, p)) for p in ("codec", "text_encoder")},
    )
    assert command.main(["export", "--model", str(tuned), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "license: cc-by-nc-4.0" in text and "facebook/musicgen-small: CC-BY-NC-4.0" in text
    assert parts.read_card(tmp_path / "out")[0] == "CC-BY-NC-4.0"
    of_here = replace(parts.of_release(tuned), inherited=[{"model": str(tuned), "licence": "MIT"}])
    said = parts.card(of_here, "tuned")
    assert "- tuned: MIT" in said and str(tmp_path) not in said, "a card goes out into the world"
    shutil.rmtree(tmp_path / "cache")


def test_a_model_without_a_tokenizer_is_no_model(tmp_path: Path) -> None:
    """transformers makes one up then, for which nearly every word is unknown."""
    foreign("mono").save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"cannot be read: it has no tokenizer \(tokenizer.json, "):
        command.main(["import", "--source", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])


def test_only_patterns_that_audiocraft_has_are_written_for_it() -> None:
    for name in patterns.PATTERNS:
        assert audiocraft.pattern_settings(name, 4)["modeling"]
    with pytest.raises(UserError, match="'delay_by_two' is none of audiocraft's"):
        audiocraft.pattern_settings("delay_by_two", 4)


@pytest.mark.parametrize(("to", "named"), [("transformers", []), ("audiocraft", ["--text_encoder_name", "t5-small"])])
def test_an_export_of_ours_comes_back_as_it_was_trained(
    to: str, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither form has a word for the pattern's tail, by which long clips are cut, nor for the data."""
    command.main(["export", "--model", "demo", "--to", to, "--out", str(tmp_path / "out"), *named])
    told = "demo hears text of width 384 and t5-small gives 512: audiocraft" in capsys.readouterr().err
    assert told == (to == "audiocraft")
    demo = parts.of_release("demo")
    encoder = [] if to == "transformers" else ["--text_encoder", "minilm"]
    command.main(["import", "--source", str(tmp_path / "out"), "--out", str(tmp_path / "back"), *encoder])
    back = parts.of_release(tmp_path / "back")
    assert back.config.tail == demo.config.tail == "full"
    assert {name: back.training[name] for name in ("step", "data_version")} == {
        name: demo.training[name] for name in ("step", "data_version")
    }
    card = (tmp_path / "out" / "README.md").read_text()
    for forged in ("{tail: none, step: true, data_version: [1]}", "{tail: [full], step: -1, data_version: x}", "7"):
        front = card.split("trained:")[0] + f"trained: {forged}\n---\n"
        (tmp_path / "out" / "README.md").write_text(front)
        plain = parts.as_trained(replace(demo, training={}), tmp_path / "out")
        assert plain.config == demo.config and plain.training == {}
