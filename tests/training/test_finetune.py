"""Fine-tuning: an adapter trains alone and resumes to the bit, a part of the data is chosen, and the run says how it
went."""

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from musicgen import adapters, weights
from musicgen import codec as codecs
from musicgen.conditioning import TextEncoder
from musicgen.errors import UserError
from tests.training import tiny_run
from tests.training.small_run import SMALL, fill_disk, same, tensors
from tests.training.synthetic import STYLES, write_dataset
from tests.training.tiny_run import curves as rows
from training import budget, devices, finetune, finetune_check, forecast, products, rerecord, selection, sources, train
from training.config import CONFIGS, read_config, task_of
from training.optim import trained
from training.selection import Selection

LORA = shlex.split(
    "--lora.rank 4 --lora.dropout 0.1 --optim.lr 3e-2 --optim.warmup_steps 2 --steps 12 --batch.sample_by tracks "
    "--log.valid_every 4 --log.state_every 4 --optim.ema_every 1 --log.every 1"
)


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def go(place: Path, run: str, *more: str) -> Path:
    argv = ["--size", "demo", "--data", str(place / "data"), "--run", str(place / run), *SMALL, *more]
    assert train.main(argv) == 0
    return place / run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a base model of ten steps, and an adapter trained on it in one go."""
    folder = tmp_path_factory.mktemp("finetune")
    write_dataset(folder / "data", size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        go(folder, "base", "--steps", "10")
        go(folder, "whole", "--init", str(folder / "base" / "release"), *LORA)
    return folder


def test_a_run_without_an_average_yet_gives_away_what_it_learned(place: Path) -> None:
    """Three steps, and the average's first one is the tenth: not the model it began with."""
    short = ["--steps", "3", "--optim.ema_every", "10", "--log.valid_every", "3", "--log.state_every", "3"]
    go(place, "short", "--init", str(place / "base" / "release"), *short)
    held = tensors(place / "short", 3)
    lm, info = weights.load_release(place / "short" / "release")
    before, _ = weights.load_release(place / "base" / "release")
    name = "transformer.layers.1.linear1.weight"
    assert info["training"]["step"] == 3 and torch.equal(held[f"ema/{name}"], held[f"model/{name}"])
    assert torch.equal(lm.state_dict()[name], held[f"model/{name}"].half().float())
    assert not torch.equal(lm.state_dict()[name], before.state_dict()[name])


def test_only_the_adapter_is_trained_kept_and_released(place: Path) -> None:
    held = tensors(place / "whole", 12)
    assert held and all(".lora_" in name for name in held)
    assert {name.split("/")[0] for name in held} == {"model", "ema", "optimizer"}
    found = sorted(p.name for p in (place / "whole" / "release").iterdir())
    assert found == ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    info = weights.read_info(place / "whole" / "release")
    base = weights.read_info(place / "base" / "release")
    name = str(place / "base" / "release")
    assert info["base"] == {"name": name, "identity": base["weights"]["sha256"], "licence": "not stated"}
    learned = {key: base["training"][key] for key in ("data_version", "data_licences")}
    assert info["inherited"] == [{"model": name, "licence": "not stated", **learned}]
    lm, _ = weights.load_release(place / "whole" / "release")
    best = tensors(place / "whole", info["training"]["step"])
    stem = "ema/transformer.layers.1.linear1.lora_"
    added = best[f"{stem}B.default.weight"] @ best[f"{stem}A.default.weight"]  # the average is what is released
    before, _ = weights.load_release(place / "base" / "release")
    key = "transformer.layers.1.linear1.weight"
    torch.testing.assert_close(lm.state_dict()[key], before.state_dict()[key] + added, atol=1e-6, rtol=1e-5)
    assert float(added.abs().max()) > 1e-3


def test_it_starts_from_the_model_and_gets_better(place: Path) -> None:
    losses = {row["step"]: row["valid/loss"] for row in rows(place / "whole") if "valid/loss" in row}
    started = [row["valid/loss"] for row in rows(place / "base") if "valid/loss" in row][-1]
    assert losses[0] == pytest.approx(started, abs=2e-3)  # the release is float16
    assert min(losses.values()) < losses[0] - 0.02 and list(losses) == [0, 4, 8, 12]


def test_stopped_and_resumed_equals_all_at_once(place: Path) -> None:
    init = ["--init", str(place / "base" / "release")]
    run = go(place, "parts", *init, *LORA, "--stop_at", "5")
    go(place, "parts", *init, *LORA)
    same(tensors(place / "whole", 12), tensors(run, 12))
    assert rows(run) == rows(place / "whole")


def test_an_adapter_waits_for_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, weights, "write_folder", [True, True, True])
    run = go(place, "full", "--init", str(place / "base" / "release"), *LORA)
    same(tensors(place / "whole", 12), tensors(run, 12))  # the model in training kept its own weights
    file = Path("release", adapters.WEIGHTS)
    assert (run / file).read_bytes() == (place / "whole" / file).read_bytes()
    (run / file).unlink()
    (run / "release" / "config.json").unlink()
    go(place, "full", "--init", str(place / "base" / "release"), *LORA)
    assert (run / file).read_bytes() == (place / "whole" / file).read_bytes()


def test_the_adapter_in_training_has_its_own_weights_again_after_a_release_that_waited(place: Path) -> None:
    lm, _ = weights.load_release(place / "base" / "release")
    adapters.attach(lm, adapters.AdapterConfig(rank=2))
    own = {name: p.detach().clone() for name, p in trained(lm).items()}
    with pytest.raises(OSError), products._model_of(lm, {name: p + 1 for name, p in own.items()}) as waited:
        assert all(torch.equal(p, own[name] + 1) for name, p in trained(waited).items())
        raise OSError
    assert all(torch.equal(p, own[name]) for name, p in trained(lm).items())


@pytest.mark.slow
def test_an_adapter_killed_and_resumed_equals_all_at_once(place: Path) -> None:
    run, init = place / "killed", ["--init", str(place / "base" / "release")]
    words = [sys.executable, "-m", "training.train", "--size", "demo", "--data", str(place / "data"), "--run", str(run)]
    words += [*SMALL, *init, *LORA, "--batch.workers", "2"]
    assert tiny_run.killed(words, run, [3, 7, 10])
    go(place, "killed", *init, *LORA, "--batch.workers", "2")
    one = go(place, "one", *init, *LORA, "--batch.workers", "2")
    same(tensors(one, 12), tensors(run, 12))
    assert rows(run) == rows(one)


def test_a_base_that_changed_under_a_run_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base" / "release", tmp_path / "base")
    init = ["--init", str(tmp_path / "base")]
    go(place, "moved", *init, *LORA, "--stop_at", "4")
    lm, info = weights.load_release(tmp_path / "base")
    with torch.no_grad():
        lm.out_norm.weight.add_(1.0)
    weights.save_release(tmp_path / "base", lm, info)
    with pytest.raises(UserError, match=r"trains an adapter of the model .* but INIT is now another one"):
        go(place, "moved", *init, *LORA)


def test_a_fine_tuning_goes_on_without_the_model_it_began_from(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base" / "release", tmp_path / "base")
    init = ["--init", str(tmp_path / "base"), "--steps", "4", "--log.valid_every", "2"]
    for run, more in (("whole model", []), ("adapter", ["--lora.rank", "4"])):
        go(place, run, *init, *more, "--stop_at", "1")
    stored = yaml.safe_load((place / "whole model" / "config.yaml").read_text())
    shutil.rmtree(tmp_path / "base")
    go(place, "whole model", *init)
    info = weights.read_info(place / "whole model" / "release")
    assert info["inherited"] == stored["origin"]["inherited"]
    assert [inherited["model"] for inherited in info["inherited"]] == [str(tmp_path / "base")]
    for run, more, words in (
        ("adapter", ["--lora.rank", "4"], "the model that this run trains an adapter of, is needed and cannot be"),
        ("new", [], r"INIT='.*base', the model to begin from, cannot be read: .*does not exist"),
        ("new", ["--lora.rank", "4"], "the model to train an adapter of, cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            go(place, run, *init, *more)
    assert not (place / "new").exists()


def test_a_fine_tuning_follows_the_model_it_began_from(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base" / "release", tmp_path / "base")
    more = ["--steps", "4", "--log.valid_every", "2"]
    kinds = (("follows", []), ("adapter follows", ["--lora.rank", "4"]))
    for run, kind in kinds:
        go(place, run, "--init", str(tmp_path / "base"), *more, *kind, "--stop_at", "1")
    (tmp_path / "base").rename(tmp_path / "moved")
    for run, kind in kinds:
        go(place, run, "--init", str(tmp_path / "moved"), *more, *kind, "--stop_at", "2")
        info = weights.read_info(place / run / "release")
        named = info["base"] if kind else info["began_from"]
        base = weights.read_info(place / "base" / "release")
        assert named == {
            "name": str(tmp_path / "moved"),
            "identity": base["weights"]["sha256"],
            "licence": "not stated",
        }
        [inherited] = info["inherited"]
        assert (inherited["model"], inherited["licence"]) == (str(tmp_path / "base"), "not stated")
    lm, about = weights.load_release(tmp_path / "moved")
    with torch.no_grad():
        lm.out_norm.weight.add_(1.0)
    weights.save_release(tmp_path / "other", lm, about)
    for run, kind in kinds:
        with pytest.raises(UserError, match=r"but INIT is now another one"):
            go(place, run, "--init", str(tmp_path / "other"), *more, *kind)
    # Before its first step a run reads the model: the same name is not enough.
    shutil.rmtree(place / "follows" / "state")
    shutil.rmtree(tmp_path / "moved")
    shutil.copytree(tmp_path / "other", tmp_path / "base")
    with pytest.raises(UserError, match=r"began from the model .* but INIT is now another one"):
        go(place, "follows", "--init", str(tmp_path / "base"), *more)


def test_what_an_adapter_cannot_do_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"LORA=4 trains an adapter, and INIT is missing"):
        go(place, "bare", "--lora.rank", "4")
    with pytest.raises(UserError, match=r"has 4 codebooks, in a run of 8: an adapter cannot widen"):
        write_dataset(place / "eight" / "data", size=64, books=8, tracks=6, valid=1)
        stereo = ["--lm.num_codebooks", "8", "--lm.pattern", "stereo_delay"]
        go(place / "eight", "run", "--init", str(place / "base" / "release"), *LORA, *stereo)
    config = read_config(["--size", "300m", "--init", "x", "--lora.rank", "16"], folders=False)
    device = devices.device_named("rtx4090")
    with pytest.raises(UserError, match="strategy fsdp with LORA"):
        budget.choose(task_of(config), device, 2, strategy="fsdp")


def test_the_plan_counts_what_is_trained() -> None:
    device = devices.device_named("rtx4090")
    argv = ["--size", "3.3b", "--init", "x"]
    adapter = task_of(read_config([*argv, "--lora.rank", "16"], folders=False))
    adapter = dataclasses.replace(adapter, bf16=True)
    whole = dataclasses.replace(adapter, lora=adapters.AdapterConfig())
    chosen = budget.choose(adapter, device, 1)
    assert adapter.adapter == adapters.num_parameters(adapter.lm, 16) < 0.02 * whole.trained
    assert chosen.fits and not budget.choose(whole, device, 1).fits  # on one consumer GPU
    assert chosen.memory["optimiser"] == 8 * adapter.adapter and chosen.memory["weights"] > 4 * whole.trained
    assert "adapter " in "\n".join(forecast.lines(chosen, name="3.3b", rate=None, rate_said=""))


def test_fine_tuning_has_defaults_of_its_own() -> None:
    fresh = read_config(["--size", "300m"], folders=False)
    tuned = read_config(["--size", "300m", "--init", "facebook/musicgen-small"], folders=False)
    adapter = read_config(["--size", "300m", "--init=facebook/musicgen-small", "--lora.rank=16"], folders=False)
    assert tuned.optim.lr < fresh.optim.lr / 3 and tuned.optim.warmup_steps < tuned.steps / 5
    assert tuned.steps <= 2000 < fresh.steps and adapter.optim.lr > tuned.optim.lr
    own = read_config(["--size", "300m", "--init", "x", "--optim.lr", "7e-6"], folders=False)
    assert own.optim.lr == 7e-6
    files = [p.stem for p in finetune.layers(CONFIGS, "demo", init=True, adapter=True)]
    assert files == ["demo", "finetune", "finetune-demo", "lora", "lora-demo"]


def test_the_verdict_names_the_best_step_and_what_went_wrong() -> None:
    def said(*losses: float) -> list[str]:
        return finetune.verdict([{"step": 10 * i, "valid/loss": loss} for i, loss in enumerate(losses)])

    assert said(5.0, 4.0, 3.9) == ["finetune  valid loss 5.000 before, 3.900 at best (step 20), 3.900 at the end"]
    assert "never got better" in said(5.0, 5.1, 5.2)[1]
    assert "rose again after step 10" in said(5.0, 4.0, 4.5)[1]
    assert said(5.0) == [] and finetune.verdict([{"step": 5, "valid/loss": 1.0}]) == []


def seconds(shards: sources.Sources, split: str) -> float:
    return float(shards.index.column("frames").to_numpy()[shards.rows(split)].sum() / 50)


def test_a_part_of_the_data_is_chosen(place: Path) -> None:
    def chosen(**given: Any) -> sources.Sources:
        shards = sources.open_data(str(place / "data"))
        selection.apply(shards, Selection(**given))
        return shards

    whole = chosen()
    style = chosen(genres=(STYLES[1].upper(),))
    genre = np.array(style.index.column("genre").to_pylist())
    assert set(genre[style.rows("train")]) == set(genre[style.rows("valid")]) == {STYLES[1]}
    assert len(style.rows("train")) == sum(genre[whole.rows("train")] == STYLES[1])
    short = chosen(minutes=0.5)
    assert 24 < seconds(short, "train") <= 30 and seconds(short, "valid") == seconds(whole, "valid")
    assert set(short.rows("train")) < set(whole.rows("train"))
    own = chosen(genres=(STYLES[1],), hold_out=0.3)
    pooled = [*own.rows("train"), *own.rows("valid")]
    assert sorted(pooled) == sorted(np.flatnonzero(genre == STYLES[1]))
    share = seconds(own, "valid") / (seconds(own, "valid") + seconds(own, "train"))
    assert 0.25 < share < 0.55
    alone = chosen(artists=("artist 3",), hold_out=0.3)  # one work: it stays to train on
    assert len(alone.rows("train")) == 1 and len(alone.rows("valid")) == 0
    both = chosen(artists=("artist 1", "artist 2"), genres=(STYLES[1],))  # these artists, in this style alone
    assert [whole.index.column("artist")[int(row)].as_py() for row in both.rows("train")] == ["artist 1"]


def test_a_selection_of_nothing_is_refused(place: Path) -> None:
    shards = sources.open_data(str(place / "data"))
    with pytest.raises(UserError, match=r"no track whose artist is 'artist 99'; it has 24, such as artist "):
        selection.apply(shards, Selection(artists=("artist 3", "artist 99")))
    with pytest.raises(UserError, match=r"leaves no training tracks.*--select.hold_out"):
        selection.apply(shards, Selection(artists=("artist 23",)))  # it lies in the validation split
    with pytest.raises(ValueError, match="hold_out"):
        Selection(hold_out=1.0)


# --- the check on ten minutes -------------------------------------------------------------------------------------


def test_the_check_scores_as_training_does(place: Path) -> None:
    lm, _ = weights.load_release(place / "base" / "release")
    argv = ["--size", "demo", "--data", str(place / "data"), "--run", "x", *SMALL, *LORA]
    batch = read_config([*argv, "--init", "x"]).batch
    shards = sources.open_data(str(place / "data"))
    found = finetune_check.validation_loss(lm, TextEncoder.load("minilm"), shards, batch)
    before = next(row["valid/loss"] for row in rows(place / "whole") if row["step"] == 0)
    assert found == pytest.approx(before, abs=1e-5)


def test_unheard_artists_are_those_of_the_validation_split_with_the_most_music(place: Path) -> None:
    shards = sources.open_data(str(place / "data"))
    frames = shards.index.column("frames").to_numpy()
    longest = max(shards.rows("valid"), key=lambda row: frames[row])
    assert finetune_check.unheard_artists(shards, 0.01) == (shards.index.column("artist")[int(longest)].as_py(),)
    with pytest.raises(UserError, match="minutes of 4 artists"):
        finetune_check.unheard_artists(shards, 60)


def test_an_old_tape_is_lower_slower_and_dull(tmp_path: Path, place: Path) -> None:
    time = np.arange(64_000) / 32_000
    dull = rerecord.old_tape(np.stack([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 5000 * time)]), 32_000)
    assert dull.shape[1] == pytest.approx(64_000 * rerecord.SEMITONE, rel=1e-3)
    middle = dull[:, 10_000:-10_000]
    peak = np.abs(np.fft.rfft(middle[0])).argmax() * 32_000 / middle.shape[1]
    assert peak == pytest.approx(440 / rerecord.SEMITONE, rel=2e-3)
    assert np.abs(middle[1]).max() < 0.01 < np.abs(middle[0]).max()
    codec = codecs.tiny()
    made_by = {"name": "tiny", "identity": codec.identity}
    data = write_dataset(tmp_path / "data", tracks=4, valid=1, size=codec.codebook_size, codec=made_by)
    shards = sources.open_data(str(data))
    folder = rerecord.write(shards, [0, 3], codec, tmp_path / "tape")
    made = sources.open_data(str(folder))
    assert len(made.rows("train")) == 2 and len(made) == 2
    for row in range(2):  # read with their hashes checked
        original = next(r for r in range(4) if shards.meta(r)["key"] == made.meta(row)["key"])
        ratio = made.codes(row).shape[1] / shards.codes(original).shape[1]
        assert ratio == pytest.approx(rerecord.SEMITONE, rel=0.03)
        assert made.index.column("artist")[row].as_py() == shards.index.column("artist")[original].as_py()
    before = (folder / "dataset.json").stat().st_mtime_ns
    rerecord.write(shards, [0, 3], codec, tmp_path / "tape")
    assert (folder / "dataset.json").stat().st_mtime_ns == before
    shutil.copytree(data, tmp_path / "copy")  # of other tracks it is made anew, those of two sets are taken once
    mixed = sources.open_data(f"{data},{tmp_path / 'copy'}")
    rerecord.write(mixed, [0, 1, 4, 5, 7], codec, tmp_path / "tape")
    ids = sources.open_data(str(folder)).index.column("track_id").to_pylist()
    assert sorted(ids) == ["track-0", "track-1", "track-3"]


def test_the_check_tells_collapse_noise_and_a_large_adapter() -> None:
    def of(course: list[float], size: int = 10, **more: float) -> dict[str, Any]:
        return {"course": dict(enumerate(course)), "bytes": size, **more}

    good = {"base": {"bytes": 100}, "whole": of([7.0, 6.9], 100), "adapter": of([7.0, 6.9])}
    assert finetune_check._verdict(good) == {"passed": True, "wrong": []}
    for change, words in (
        ({"adapter": of([7.0, 7.1])}, "adapter: the validation loss never fell"),
        ({"adapter": of([7.0, 6.9, 6.95])}, "rose by 0.050"),
        ({"whole": of([7.0, 6.9], 100, flatness=0.5)}, "a clip is noise"),
        ({"whole": of([7.0, 6.9], 100, silence=0.9)}, "silent for 90%"),
        ({"adapter": of([7.0, 6.9], 50)}, "not small: 50 bytes"),
    ):
        found = finetune_check._verdict({**good, **change})
        assert not found["passed"] and words in found["wrong"][0]
