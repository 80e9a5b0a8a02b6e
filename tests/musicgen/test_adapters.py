"""Adapters: what is added is alpha / r B A and nothing else, the folder is peft's own form, and the base is checked."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from musicgen import adapters, generate, wav, weights
from musicgen.adapters import AdapterConfig
from musicgen.config import LMConfig
from musicgen.errors import UserError
from musicgen.interop import command
from musicgen.lm import MusicLM
from tests.musicgen.small_model import TEXT, write_release
from tests.musicgen.test_interop import foreign, theirs_of, tokenizer

CONFIG = AdapterConfig(rank=4, alpha=6.0)


def disturb(lm: MusicLM) -> MusicLM:
    """The model with an adapter that has learned something: B is not zero any more."""
    adapters.attach(lm, CONFIG)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    return lm


def write_adapter(folder: Path, base: str) -> tuple[MusicLM, Path]:
    torch.manual_seed(3)
    lm, info = weights.load_release(base)
    disturb(lm)
    kept = {key: info[key] for key in ("codec", "text_encoder", "training", "licence")}
    more = {"inherited": weights.inherited(base), "made_by": "tests"}
    return lm, adapters.save(folder, lm, {**kept, **more}, adapters.base_of(base))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base release (base/release), an adapter of it (mine)."""
    folder = tmp_path_factory.mktemp("adapters")
    write_release(folder / "base")
    write_adapter(folder / "mine", str(folder / "base" / "release"))
    return folder


def logits(lm: MusicLM) -> torch.Tensor:
    noise = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, lm.config.codebook_size + 1, (2, lm.config.num_codebooks, 9), generator=noise)
    text = torch.randn(2, 5, lm.config.condition.text_dim, generator=noise)
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])  # the second item hears nothing
    with torch.no_grad():
        return lm.eval()(tokens, text, mask)


@pytest.mark.parametrize(("cross", "style"), [(True, 0), (False, 0), (True, 16)])
def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(cross: bool, style: int) -> None:
    condition = replace(TEXT.condition, style=replace(TEXT.condition.style, dim=style))
    config = LMConfig(dim=32, num_layers=2, num_heads=2, codebook_size=64, cross_attention=cross, condition=condition)
    torch.manual_seed(0)
    lm = MusicLM(config)
    before, names = logits(lm), list(lm.state_dict())
    adapters.attach(lm, CONFIG)
    torch.testing.assert_close(logits(lm), before, atol=1e-5, rtol=1e-5)
    moving = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert all(".lora_" in name and name.startswith("transformer.layers.") for name in moving)
    per_attention = 4 if not cross else 8
    assert len(moving) == 2 * 2 * (per_attention + 2)  # A and B of every projection and both feed-forward layers
    found = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert found == adapters.num_parameters(config, 4)
    assert list(adapters.merged(lm).state_dict()) == names


def test_merged_weights_are_base_plus_scaled_b_a(place: Path) -> None:
    base, _ = weights.load_release(place / "base" / "release")
    whole, info = weights.load_release(place / "mine")
    factors = load_file(place / "mine" / "adapter_model.safetensors")
    stem = "base_model.model.transformer.layers."

    def product(layer: str) -> torch.Tensor:
        b, a = factors[f"{stem}{layer}.lora_B.weight"], factors[f"{stem}{layer}.lora_A.weight"]
        return (6.0 / 4.0) * b.double() @ a.double()

    state, own = whole.state_dict(), base.state_dict()
    changed = set()
    for layer in (0, 1):
        for attention in ("self_attn", "cross_attention"):
            name = f"{layer}.{attention}"
            packed = torch.cat([product(f"{name}.{part}_proj") for part in "qkv"])
            for leaf, added in (("in_proj_weight", packed), ("out_proj.weight", product(f"{name}.out_proj"))):
                key = f"transformer.layers.{name}.{leaf}"
                torch.testing.assert_close(state[key].double(), own[key].double() + added, atol=1e-6, rtol=1e-6)
                assert float(added.abs().max()) > 0.01
                changed.add(key)
        for leaf in ("linear1", "linear2"):
            key = f"transformer.layers.{layer}.{leaf}.weight"
            expected = own[key].double() + product(f"{layer}.{leaf}")
            torch.testing.assert_close(state[key].double(), expected, atol=1e-6, rtol=1e-6)
            changed.add(key)
    assert all(torch.equal(state[key], own[key]) for key in state if key not in changed)
    assert info["format"] == weights.ADAPTER and not any(p.requires_grad for p in whole.parameters())


def test_the_adapted_model_and_the_merged_one_are_the_same(place: Path, tmp_path: Path) -> None:
    lm, folder = write_adapter(tmp_path / "adapter", str(place / "base" / "release"))
    whole, _ = weights.load_release(folder)
    torch.testing.assert_close(logits(whole), logits(lm), atol=1e-4, rtol=1e-4)
    base, _ = weights.load_release(place / "base" / "release")
    assert float((logits(whole) - logits(base)).abs().max()) > 0.1, "the adapter acts"


def test_peft_reads_the_folder_by_itself(place: Path) -> None:
    from peft import PeftModel

    base, _ = weights.load_release(place / "base" / "release")
    theirs: Any = PeftModel.from_pretrained(adapters.split(base), str(place / "mine"))
    whole, _ = weights.load_release(place / "mine")
    torch.testing.assert_close(logits(theirs.get_base_model()), logits(whole), atol=1e-4, rtol=1e-4)


def test_an_adapter_scaled_by_the_root_of_its_rank_is_merged_so(place: Path, tmp_path: Path) -> None:
    """As peft trains with `use_rslora`: alpha / sqrt(r), here twice alpha / r."""
    shutil.copytree(place / "mine", tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    base, plain, rooted = (
        weights.load_release(folder, base=base)[0].state_dict()
        for folder, base in (
            (place / "base" / "release", ""),
            (place / "mine", ""),
            (tmp_path / "theirs", str(place / "base" / "release")),
        )
    )
    key = "transformer.layers.1.linear1.weight"
    torch.testing.assert_close(rooted[key] - base[key], 2 * (plain[key] - base[key]), atol=1e-6, rtol=1e-5)


def test_to_load_an_adapter_spends_none_of_the_callers_random_numbers(place: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    weights.load_release(place / "mine")
    assert torch.rand(()) == expected


def test_the_folder_is_small_and_the_same_adapter_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    assert sorted(p.name for p in (place / "mine").iterdir()) == names
    _, again = write_adapter(tmp_path / "again", str(place / "base" / "release"))
    assert all((again / name).read_bytes() == (place / "mine" / name).read_bytes() for name in names)
    size = (place / "mine" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * adapters.num_parameters(TEXT, 4) + 10_000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "describes no adapter .it holds a list"),
        ("null", "describes no adapter .it holds a NoneType"),
        ("[" * 100_000, "the adapter cannot be read"),
        ('{"peft_type": "LORA", "r": "x"}', "describes no adapter"),
        ('{"peft_type": "LORA", "r": 4, "target_modules": "("}', "describes no adapter"),
    ],
)
def test_a_description_of_something_else_is_refused(place: Path, tmp_path: Path, text: str, told: str) -> None:
    shutil.copytree(place / "mine", tmp_path / "mine")
    (tmp_path / "mine" / adapters.PEFT_CONFIG).write_text(text)
    with pytest.raises(UserError, match=told):
        weights.load_release(tmp_path / "mine")


def test_a_base_that_does_not_name_its_weights_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base" / "release", tmp_path / "base")
    document = json.loads((tmp_path / "base" / "config.json").read_text())
    del document["weights"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="does not name the sha256 of its weights"):
        adapters.base_of(tmp_path / "base")


def test_generate_takes_an_adapter_and_merge_makes_the_same_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPT", "slow waltz")
    more = ["--duration", "0.3", "--seed", "4"]
    clips = []
    assert command.main(["merge", "--model", str(place / "mine"), "--out", str(tmp_path / "whole")]) == 0
    for name, folder in (("a", place / "mine"), ("b", tmp_path / "whole"), ("c", place / "base" / "release")):
        assert generate.main(["--model", str(folder), "--out", str(tmp_path / f"{name}.wav"), *more]) == 0
        clips.append((tmp_path / f"{name}.wav").read_bytes()[-8000:])  # the sound, behind the marking
    assert clips[0] == clips[1] != clips[2]
    info = weights.read_info(tmp_path / "whole")
    assert info["merged"]["base"]["name"] == str(place / "base" / "release")
    known = {"licence": "Apache-2.0", "data_version": "d1"}
    assert info["inherited"] == [{"model": str(place / "base" / "release"), **known}]
    adapted, whole = (wav.read_marking(tmp_path / f"{name}.wav") for name in "ab")
    digest = weights.read_info(place / "base" / "release")["weights"]["sha256"]
    assert adapted["base"] == {"name": "release", "identity": digest, "licence": "Apache-2.0"}
    assert whole["merged"] == {"base": adapted["base"], "adapter": adapted["model"]["sha256"]}
    assert adapted["inherited"] == whole["inherited"] == [{"model": "release", **known}]
    assert "base" not in whole and not {"base", "merged", "inherited"} & wav.read_marking(tmp_path / "c.wav").keys()
    with pytest.raises(UserError, match="is a whole model already"):
        command.merge_model(command.MergeConfig(str(tmp_path / "whole"), str(tmp_path / "more")))
    with pytest.raises(UserError, match="exists and is not empty; give a new folder"):
        command.merge_model(command.MergeConfig(str(place / "mine"), str(tmp_path / "whole")))


def test_an_adapter_of_an_imported_model_merges_and_exports(tmp_path: Path) -> None:
    foreign("mono").save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    command.main(["import", "--source", str(tmp_path / "theirs"), "--out", str(tmp_path / "base")])
    lm, folder = write_adapter(tmp_path / "mine", str(tmp_path / "base"))
    command.main(["merge", "--model", str(folder), "--out", str(tmp_path / "whole")])
    assert (tmp_path / "whole" / "codec").is_dir() and (tmp_path / "whole" / "text_encoder").is_dir()
    model = generate.load(folder)  # codec and text encoder are the base's
    tokens = torch.randint(0, 64, (1, 4, 7), generator=torch.Generator().manual_seed(2))
    hidden, mask = model.text_encoder.encode(["slow piano waltz"])
    with torch.no_grad():
        expected = lm.eval()(tokens, hidden, mask)
    for number, source in enumerate((folder, tmp_path / "whole")):  # export merges by itself
        out = tmp_path / f"out{number}"
        command.main(["export", "--model", str(source), "--to", "transformers", "--out", str(out)])
        theirs = transformers.MusicgenForConditionalGeneration.from_pretrained(out).eval()
        with torch.no_grad():
            found = theirs(**theirs_of("mono"), decoder_input_ids=tokens[0]).logits
        assert float((found.reshape(1, 4, -1, 64)[:, :, -7:] - expected).abs().max()) <= 1e-4
        assert "theirs" in (out / "README.md").read_text(), "what it derives from goes along"


def test_the_base_is_found_where_it_moved_with_the_adapter_or_is_asked_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("MUSICGEN_CACHE", str(tmp_path / "cache"))  # what this machine has imported is looked at as well
    write_adapter(place / "relative", "base/release")
    shutil.copytree(place / "base", tmp_path / "project" / "base")
    shutil.copytree(place / "relative", tmp_path / "project" / "deep" / "mine")
    os.chdir(tmp_path)
    weights.load_release(tmp_path / "project" / "deep" / "mine")  # its name is below a folder that holds the adapter
    shutil.move(tmp_path / "project" / "base", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is an adapter of 'base/release' \(identity .*which is not here.*BASE="):
        weights.load_release(tmp_path / "project" / "deep" / "mine")
    weights.load_release(tmp_path / "project" / "deep" / "mine", str(tmp_path / "elsewhere" / "release"))
    with pytest.raises(UserError, match="for adapters"):
        weights.load_release(tmp_path / "elsewhere" / "release", "demo")


def test_another_base_is_refused_by_name(place: Path) -> None:
    with pytest.raises(UserError, match=r"but 'demo' is another model \(identity [0-9a-f]{12}…\)"):
        weights.load_release(place / "mine", "demo")
    with pytest.raises(UserError, match="does not exist"):
        weights.load_release(place / "mine", "nowhere")


def test_what_is_damaged_or_another_kind_is_refused(place: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(place / "mine", tmp_path / name))

    cut = copy("cut")
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match="sha256 differs"):
        weights.load_release(cut)
    bare = copy("bare")
    (bare / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"without its adapter_config\.json"):
        weights.load_release(bare)
    for change, words in (
        ({"use_dora": True}, "another kind of adapter than plain LoRA"),
        ({"peft_type": "IA3"}, "another kind of adapter than plain LoRA"),
        ({"r": 8}, "does not fit"),
        ({"target_modules": ["q_proj"]}, "does not fit"),
    ):
        other = copy(f"other-{next(iter(change))}")
        described = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps(described | change))
        with pytest.raises(UserError, match=words):
            weights.load_release(other)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora\.rank is -1"):
        AdapterConfig(rank=-1)
    with pytest.raises(ValueError, match="dropout"):
        AdapterConfig(rank=4, dropout=1.0)
