"""A release folder comes back as it was, and everything that is not one is refused in words."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musicgen import codec as codecs
from musicgen import weights
from musicgen.config import ConditionConfig, LMConfig
from musicgen.errors import UserError
from musicgen.lm import MusicLM

CONFIG = LMConfig(dim=32, num_layers=2, num_heads=2, condition=ConditionConfig("minilm", 384))
INFO = {
    "codec": {"name": "tiny", "identity": "c" * 64},
    "text_encoder": {"name": "minilm", "identity": "e" * 64},
    "training": {"step": 7, "audio_seconds_seen": 70.0, "data_version": "d1", "valid_loss": 6.5, "crop_seconds": 10.0},
    "licence": "Apache-2.0",
    "made_by": "tests",
}


@pytest.fixture(scope="module")
def lm() -> MusicLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MusicLM(CONFIG).eval()


def test_float32_round_trip_is_exact_and_records_what_it_is(lm: MusicLM, tmp_path: Path) -> None:
    folder = weights.save_release(tmp_path / "release", lm, INFO)
    before = torch.random.get_rng_state()
    loaded, info = weights.load_release(folder)
    assert torch.equal(before, torch.random.get_rng_state()), "loading must not spend the caller's randomness"
    assert loaded.config == CONFIG and not loaded.training
    for name, tensor in lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert {k: info[k] for k in INFO} == INFO
    assert info["format"] == "musicgen-release" and info["weights"]["parameters"] == lm.num_parameters()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["release"], "nothing temporary is left"


def test_float16_is_half_the_size_and_upcast_at_load(lm: MusicLM, tmp_path: Path) -> None:
    full = weights.save_release(tmp_path / "full", lm, INFO)
    half = weights.save_release(tmp_path / "half", lm, INFO, torch.float16)
    ratio = (half / "model.safetensors").stat().st_size / (full / "model.safetensors").stat().st_size
    assert ratio < 0.52
    loaded, _ = weights.load_release(half)
    state = loaded.state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    for name, tensor in lm.state_dict().items():
        assert torch.equal(state[name], tensor.half().float())


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("codec", None, "codec must have a name"),
        ("text_encoder", [], "text_encoder must have a name"),
        ("codec", {"name": None, "identity": "x"}, "codec must have a name"),
        ("training", None, "training must be a mapping"),
        ("training", {"crop_seconds": "long"}, "its crop_seconds a length"),
        ("training", {"crop_seconds": float("nan")}, "its crop_seconds a length"),
        ("training", {"crop_seconds": -5}, "its crop_seconds a length"),
        ("weights", "x", "weights must be a mapping"),
        ("inherited", [{}], "inherited must list"),
        ("codec", {"name": "a", "identity": "b", "folder": "/etc"}, "codec may lie in the folder 'codec' alone"),
        ("text_encoder", {"name": "a", "identity": "b", "folder": "../x"}, "text_encoder may lie in the folder"),
    ],
)
def test_a_damaged_description_is_named(part: str, value: object, words: str, lm: MusicLM, tmp_path: Path) -> None:
    folder = weights.save_release(tmp_path / "release", lm, INFO)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, part: value}))
    with pytest.raises(UserError, match=f"config.json is damaged: .*{words}"):
        weights.load_release(folder)


def test_folders_in_the_place_of_files(lm: MusicLM, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        folder = weights.save_release(tmp_path / "release", lm, INFO)
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            weights.load_release(folder)
        (folder / name).rmdir()
        (folder / "config.json").write_text('{"format": "musicgen-release"}')
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        weights.load_release(folder)


def test_what_is_no_release_is_not_replaced(lm: MusicLM, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert weights.save_release(tmp_path / "empty", lm, INFO).is_dir()
    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for target in (thesis.parent, thesis, tmp_path / "bert"):
        with pytest.raises(UserError, match="holds something else than a release, which would be lost"):
            weights.save_release(target, lm, INFO)
    assert thesis.read_text() == "years" and [p.name for p in (tmp_path / "bert").iterdir()] == ["config.json"]


def test_saving_again_replaces_and_a_failed_save_keeps_the_old_one(
    lm: MusicLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "release"
    weights.save_release(target, lm, INFO)
    weights.save_release(target, lm, {**INFO, "training": {"step": 8}})
    assert weights.read_info(target)["training"]["step"] == 8

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(UserError, match="No space left"):
            weights.save_release(target, lm, {**INFO, "training": {"step": 9}})
    assert weights.load_release(target)[1]["training"]["step"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


def test_a_uri_reads_the_same(lm: MusicLM, tmp_path: Path) -> None:
    folder = weights.save_release(tmp_path / "release", lm, INFO)
    assert weights.load_release(folder.as_uri())[1] == weights.load_release(folder)[1]


def test_another_codec_is_refused_by_name(lm: MusicLM, tmp_path: Path) -> None:
    codec = codecs.tiny()
    info = {**INFO, "codec": {"name": "tiny", "identity": codec.identity}}
    weights.check_codec(info, codec)
    with pytest.raises(UserError, match=r"trained on tokens of codec 'tiny'.*but codec 'tiny'") as caught:
        weights.check_codec(info, codecs.tiny(seed=1))
    assert codec.identity[:12] in str(caught.value) and codecs.tiny(seed=1).identity[:12] in str(caught.value)


def test_what_is_not_a_release_is_refused_with_what_to_do(lm: MusicLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' does not exist; give 'demo' or the release folder"):
        weights.load_release(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json is missing"):
        weights.load_release(tmp_path)
    run = tmp_path / "run"
    weights.save_release(run / "release", lm, INFO)
    with pytest.raises(UserError, match=r"did you mean .*run/release"):
        weights.load_release(run)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="'llama' instead of format 'musicgen-release'"):
        weights.load_release(foreign)
    (foreign / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        weights.load_release(foreign)


def test_damaged_weights_are_refused_and_nothing_is_unpickled(lm: MusicLM, tmp_path: Path) -> None:
    folder = weights.save_release(tmp_path / "release", lm, INFO)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="sha256 differs"):
        weights.load_release(folder)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="sha256 differs"):
        weights.load_release(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        weights.load_release(folder)

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "sprung"),))  # type: ignore[return-value]

    import hashlib

    file.write_bytes(pickle.dumps(Trap()))
    info = json.loads((folder / "config.json").read_text())
    info["weights"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="not a safetensors file"):
        weights.load_release(folder)
    assert not (tmp_path / "sprung").exists()


def test_weights_of_another_shape_and_another_schema_are_refused(lm: MusicLM, tmp_path: Path) -> None:
    folder = weights.save_release(tmp_path / "release", lm, INFO)
    info = json.loads((folder / "config.json").read_text())
    info["lm"]["num_layers"] = 3
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"does not fit the settings"):
        weights.load_release(folder)
    info["lm"]["num_layerz"] = 3
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"num_layers"):
        weights.load_release(folder)
    info["schema_version"] = 99
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"schema 99, this program reads 1"):
        weights.load_release(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_layers", "2", "num_layers is '2'; it must be int"),
        ("num_layers", 2.0, "it must be int"),
        ("activation", "swish", "activation is 'swish'; it must be Literal"),
        ("num_heads", 0, "cannot be read"),
        ("condition", None, "condition is None"),
        ("dim", 2_000_000, "does not fit the settings"),
    ],
)
def test_settings_of_wrong_types_are_refused(lm: MusicLM, tmp_path: Path, key: str, value: object, words: str) -> None:
    folder = weights.save_release(tmp_path / "release", lm, INFO)
    info = json.loads((folder / "config.json").read_text())
    info["lm"][key] = value
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=words):
        weights.load_release(folder)


def test_a_damaged_codec_is_refused_in_words(tmp_path: Path) -> None:
    for file, raw in (("config.json", b"{"), ("config.json", b"[1]"), ("model.safetensors", b"\x00" * 50)):
        folder = tmp_path / f"{file}-{len(raw)}"
        shutil.copytree(codecs.DEMO_FOLDER, folder)
        (folder / file).write_bytes(raw)
        with pytest.raises(UserError, match="CODEC"):
            codecs.load(folder)


def test_a_codec_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(codecs.DEMO_FOLDER, tmp_path / "codec")
    tensors = load_file(tmp_path / "codec" / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("decoder.")}
    save_file(kept, tmp_path / "codec" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights are missing"):
        codecs.load(tmp_path / "codec")
