"""The parts of style_check and melody_check that decide what is compared with what."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from musicgen import codec as codecs
from musicgen.adapters import AdapterConfig
from musicgen.chroma import NONE
from musicgen.config import ConditionConfig, LMConfig, StyleConfig
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.settings import SettingsError
from musicgen.style import NONE as NO_CODE
from pipelines.shard import ShardSet
from tests.musicgen.test_degrade import RATE, tones
from tests.training.synthetic import write_dataset
from training import finetune, melody_check, style_check
from training.config import TrainConfig
from training.data import Batch


def batch(first: int, count: int) -> Batch:
    codes = torch.zeros(count, 4, 8, dtype=torch.int16)
    style = torch.arange(first, first + count, dtype=torch.int16)[:, None, None].expand(count, 4, 3)
    frames = np.full(count, 8)
    return Batch(codes, torch.ones(count, 8).bool(), [None] * count, frames, -1, ["k"] * count, style=style)


def test_excerpts_of_another_track_and_none() -> None:
    batches = [batch(0, 4), batch(4, 2)]

    def numbers(of: str) -> list[list[int]]:
        found = style_check.with_styles(batches, of)
        return [made.style[:, 0, 0].tolist() for made in found if made.style is not None]

    assert numbers("own") == [[0, 1, 2, 3], [4, 5]]
    assert numbers("other") == [[3, 4, 5, 0], [1, 2]]
    assert numbers("none") == [[NO_CODE] * 4, [NO_CODE] * 2]


def test_guides_are_worse_in_one_way_each_and_the_same_by_seed() -> None:
    sound = tones(12.0)
    made, again, other = (melody_check.guides(sound, RATE, seed, None) for seed in (5, 5, 6))
    assert set(made) == {"clean", "noisy", "holes", "jitter"}
    assert melody_check.guides(sound, RATE, 5, made["holes"])["mix"] is made["holes"]
    assert all(np.array_equal(made[name], again[name]) for name in made)
    assert any(not np.array_equal(made[name], other[name]) for name in made)
    lost = made["holes"] == NONE
    assert 0.1 < lost.mean() < 0.5 and np.array_equal(made["holes"][~lost], made["clean"][~lost])
    assert 0 < (made["jitter"] != made["clean"]).mean() < 0.3, "only where the note changes"


def test_guides_are_stretches_on_the_grid_of_the_chroma_first_of_each_track(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", size=64, valid=3, frames=(300, 600))
    data = ShardSet.open(str(tmp_path / "set"))
    rows = [int(row) for row in data.rows("valid")]
    every = melody_check.windows(data, rows, 100, 1000)
    assert [row for row, _ in every[: len(rows)]] == rows, "one of each before a second of any"
    assert all(start % 32 == 0 and 64 <= start <= data.codes(row).shape[1] - 100 for row, start in every)
    by_row = {row: sorted(start for r, start in every if r == row) for row in rows}
    assert all(b - a >= 100 for starts in by_row.values() for a, b in itertools.pairwise(starts))
    assert melody_check.windows(data, rows, 100, 2) == every[:2]


def melody_set(folder: Path, **settings: bool) -> str:
    """A set in the demo codec's name with a variant of each melody, and what ingest would say of its stems."""
    codec = codecs.load("demo")
    described = {"name": codec.name, "identity": codec.identity}

    def melody(number: int, frames: int) -> np.ndarray:
        length = frames * 5 // 32  # as short as a track's chroma may be
        return np.stack([np.full(length, number % 12), np.full(length, (number + 1) % 12)]).astype(np.uint8)

    write_dataset(folder, tracks=8, valid=3, frames=(180, 300), codec=described, melody=melody)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, "settings": settings}))
    return str(folder)


def test_melodies_are_checked_from_data_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    data, mixes = melody_set(tmp_path / "data"), melody_set(tmp_path / "mixes", chroma_stems=True)
    small = ["--lm.dim", "16", "--lm.num_layers", "1", "--lm.num_heads", "1", "--batch.workers", "0"]
    argv = [f"--data={data}", f"--mixes={mixes}", f"--runs={tmp_path / 'runs'}", "--init=", "--steps=2"]
    argv += [f"--arguments={json.dumps(small)}", "--clips=4", "--duration=1.5", "--crop_seconds=1.28"]
    argv += [f"--out={tmp_path / 'found.json'}"]
    for odd, words in ((["--clips", "1"], "clips is 1"), (["--duration", "30"], "0 held-out stretches of 30 s")):
        with pytest.raises((UserError, SettingsError), match=words):
            melody_check.main([*argv, *odd])
    with pytest.raises(UserError, match=r"must be DATA's catalogue .* --chroma_stems true"):
        melody_check.main([*argv, f"--mixes={data}"])
    assert not (tmp_path / "runs").exists(), "said before anything is trained"
    assert melody_check.main(argv) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["models"]) == ["plain", "augmented", "mixes"] and found["clips"] == 4
    for of in found["models"].values():
        assert of["step"] == 2 and set(of["agreement"]) == {"clean", "noisy", "holes", "jitter", "mix", "none"}
    assert "in 4 clips" in capsys.readouterr().out
    stored = yaml.safe_load((tmp_path / "runs/mixes/config.yaml").read_text())["settings"]
    assert stored["data"] == mixes and stored["batch"]["augment"]["variants"] == 0.5


def test_differences_from_the_plain_model_are_paired_by_clip() -> None:
    rng = np.random.default_rng(1)
    plain = rng.random(400)
    better = plain + 0.01 + 0.001 * rng.standard_normal(400)
    plain[0] = np.nan  # a silent clip counts for neither
    found = melody_check.compared({"plain": {"clean": plain}, "augmented": {"clean": better}})
    one, two = found["plain"]["clean"], found["augmented"]["clean"]
    assert one["difference"] == one["error"] == 0 and two["mean"] == pytest.approx(better.mean())
    assert two["difference"] == pytest.approx(0.01, abs=3e-4) and two["error"] == pytest.approx(5e-5, rel=0.2)


def test_an_adapter_does_not_leave_a_new_input_untrained() -> None:
    plain = LMConfig(dim=16, num_layers=1, num_heads=2, codebook_size=8, condition=ConditionConfig("minilm", 384))
    style = StyleConfig(dim=4, latent_dim=4, width=8, layers=1)
    wider = replace(plain, condition=replace(plain.condition, style=style))
    config = TrainConfig(init="x", lm=wider, lora=AdapterConfig(rank=2))
    weights = MusicLM(plain).state_dict()
    with pytest.raises(UserError, match=r"has no .*style.*LORA=2 trains an adapter alone"):
        finetune.check_inputs(config, MusicLM(wider), weights)
    finetune.check_inputs(replace(config, lora=AdapterConfig()), MusicLM(wider), weights)
    finetune.check_inputs(config, MusicLM(plain), weights)
