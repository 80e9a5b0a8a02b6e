"""Training end to end on a small real data set: learning, exact resume, the record, and what is refused."""

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musicgen import codec as codecs
from musicgen import weights
from musicgen.config import size
from musicgen.errors import UserError
from musicgen.settings import SettingsError
from pipelines.shard import ShardSet
from tests.training import tiny_run, wandb_file
from tests.training.small_run import SMALL, close, go, same, tensors
from tests.training.synthetic import write_dataset
from tests.training.tiny_run import curves as metrics
from training import data as reading
from training import folder, record, sources, start, state, train
from training.config import read_config
from training.data import unigram_loss
from training.module import MusicLMModule, NonFiniteLoss

pytestmark = pytest.mark.usefixtures("no_wandb")


def test_it_learns_and_releases_the_best(whole: Path, data: Path) -> None:
    rows = metrics(whole)
    valid = [row for row in rows if "valid/loss" in row]
    assert [row["step"] for row in valid] == [20, 40]
    assert valid[-1]["valid/below_unigram"] > 0.3
    config = read_config(["--data", str(data), "--run", str(whole), *SMALL]).batch
    unigram = unigram_loss(ShardSet.open(str(data)), config)
    assert valid[-1]["valid/below_unigram"] == pytest.approx(unigram.mean() - valid[-1]["valid/loss"])
    books = [valid[-1][f"valid/loss_q{k}"] for k in (1, 2, 3, 4)]
    assert sum(books) / 4 == pytest.approx(valid[-1]["valid/loss"])
    lm, info = weights.load_release(whole / "release")
    best = min(valid, key=lambda row: row["valid/loss"])
    assert info["training"]["step"] == best["step"] and info["training"]["valid_loss"] == best["valid/loss"]
    assert info["training"]["crop_seconds"] == 2.56
    assert info["codec"]["identity"] == ShardSet.open(str(data)).info["codec"]["identity"]
    averaged = tensors(whole, best["step"])
    for name, tensor in lm.state_dict().items():  # the release is the average, as float16
        assert torch.equal(tensor, averaged[f"ema/{name}"].half().float())
    assert lm.config.dim == 32


def test_stopped_and_resumed_equals_all_at_once(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "parts"
    go(data, run, "--stop_at", "13")
    assert state.steps_in(run / "state") == [13]
    with (run / "metrics.jsonl").open("a") as file:  # lines after the last state, as a kill leaves them
        file.write(json.dumps({"step": 15, "train/loss": 99.0}) + '\n{"step": 15, "tr')
    go(data, run)
    same(tensors(whole, 40), tensors(run, 40))
    assert metrics(run) == metrics(whole)
    # W&B: two offline files of one run, the same rows under the same steps.
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert {wandb_file.run_id(f) for f in files} == {stored["wandb_run_id"]}
    rows = [row for f in files for row in wandb_file.history(f)]
    assert all(row["_step"] == row[record.STEP] for row in rows)
    wandb_rows: dict[int, dict[str, float]] = {}
    for row in rows:
        kept = {k: v for k, v in row.items() if not k.startswith("_") and k != record.STEP}
        wandb_rows.setdefault(row[record.STEP], {}).update(kept)
    local: dict[int, dict[str, float]] = {}
    for row in record.read_metrics(run / "metrics.jsonl"):
        local.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k != "step"})
    assert wandb_rows == local


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_killed_at_any_step_and_resumed_equals_all_at_once(data: Path, tmp_path: Path, precision: str) -> None:
    options = ["--hardware.precision", precision, "--log.state_every", "4", "--log.every", "1", "--batch.workers", "2"]
    one = go(data, tmp_path / "one", *options)
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "training.train", "--size", "demo", "--data", str(data), "--run", str(run)]
    targets = random.Random(time.time_ns()).sample(range(1, 38), 3)
    assert tiny_run.killed([*command, *SMALL, *options], run, targets)
    go(data, run, *options)
    same(tensors(one, 40), tensors(run, 40))
    assert metrics(run) == metrics(one)


def test_killed_and_resumed_equals_all_at_once(whole: Path, data: Path, tmp_path: Path) -> None:
    """The same with one kill, somewhere, beside every other test; the slow one has more of them, and bf16."""
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "training.train", "--size", "demo", "--data", str(data), "--run", str(run)]
    options = ["--log.state_every", "4", "--batch.workers", "2"]
    assert tiny_run.killed([*command, *SMALL, *options], run, [random.Random(time.time_ns()).choice(range(5, 38))])
    go(data, run, *options)
    same(tensors(whole, 40), tensors(run, 40))
    assert metrics(run) == metrics(whole)


def test_what_cannot_fit_prints_its_plan_and_leaves(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--size", "3.3b", "--data", str(data), "--run", str(tmp_path / "run"), "--lm.codebook_size", "64"]
    argv += ["--hardware.accelerator", "cpu", "--lm.num_layers", "4800"]
    with pytest.raises(UserError, match=r"SIZE=3.3b does not fit 1 x cpu.*What fits: SIZE="):
        train.main(argv)
    said = capsys.readouterr().out
    assert "model     3.3b" in said and "memory    " in said and "no room" in said
    assert not (tmp_path / "run").exists()
    ended = subprocess.run([sys.executable, "-m", "training.train", *argv], capture_output=True, text=True)
    assert ended.returncode == 2 and "model     3.3b" in ended.stdout and "Traceback" not in ended.stderr
    assert "SIZE=3.3b does not fit" in " ".join(ended.stderr.split())


def test_a_mixture_trains_and_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = ShardSet.open(str(data)).info["codec"]
    other = write_dataset(tmp_path / "other", size=64, tracks=8, valid=1, codec=codec, seed=9)
    run = go(Path(f"{data}:0.7,{other}:0.3"), tmp_path / "mixed", "--steps", "2")
    assert "mixture 70% set, 30% other" in capsys.readouterr().out
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert [round(s["share"], 3) for s in stored["sources"]] == [0.7, 0.3]
    with pytest.raises(UserError, match="trained on data version"):
        go(Path(f"{data}:0.5,{other}:0.5"), run, "--steps", "2")


def test_what_is_longer_than_what_it_is_of_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--stop_at", "3", "--hardware.strategy", "fsdp"]
    go(data, tmp_path / "run", "--steps", "2", "--optim.warmup_steps", "50", "--batch.crop_seconds", "64", *more)
    told = capsys.readouterr().out
    assert "warning   the warm-up (optim.warmup_steps 50) takes all 2 steps; the rate gets to 4% of" in told
    assert "warning   stop_at 3 lies past the last of 2 steps" in told
    assert "strategy  single: one process; hardware.strategy fsdp takes several" in told
    assert "warning   no training track is as long as a crop" in told and "batch.crop_seconds is 64" in told


def test_running_again_does_nothing(whole: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    go(data, whole)
    assert "nothing to do" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_clips_with_prompts_in_files_and_in_wandb(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: codecs.Codec
) -> None:
    import soundfile

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = go(data, tmp_path / "clips", "--steps", "4", "--log.clips", "2", "--log.clip_seconds", "0.5")
    clips = sorted((run / "samples").glob("step-*.wav"))
    assert [c.name for c in clips] == ["step-0000004-0.wav", "step-0000004-1.wav"]
    details = [json.loads(c.with_suffix(".json").read_text()) for c in clips]
    assert all(d["step"] == 4 and d["prompt"] for d in details) and details[0]["prompt"] != details[1]["prompt"]
    audio, rate = soundfile.read(clips[0])
    assert rate == 32000 and len(audio) == 16000
    rows = wandb_file.history(next(run.glob("wandb/offline-run-*/*.wandb")))
    logged = next(row for row in rows if "samples/captions" in row)
    assert logged["_step"] == 4 and logged["samples/captions"] == [d["prompt"] for d in details]
    media = sorted(run.glob("wandb/offline-run-*/files/media/audio/*.wav"))
    files = [*clips, *sorted((run / "samples").glob("ceiling-*.wav"))]
    assert len(files) == 4 and sorted(m.read_bytes() for m in media) == sorted(f.read_bytes() for f in files)


def test_parts_of_a_step_make_the_same_step(data: Path, tmp_path: Path) -> None:
    one = go(data, tmp_path / "one", "--steps", "3")
    four = go(data, tmp_path / "four", "--steps", "3", "--batch.accumulate", "4")
    close(tensors(one, 3), tensors(four, 3))
    assert metrics(one)[0]["train/loss"] == pytest.approx(metrics(four)[0]["train/loss"], rel=1e-5)
    assert metrics(one)[-1]["valid/loss"] == pytest.approx(metrics(four)[-1]["valid/loss"], rel=1e-3)


def test_a_run_keeps_its_parts_per_step_on_as_many_ranks(data: Path) -> None:
    """Whatever has room now: other parts round otherwise."""
    shards = sources.open_data(str(data))

    def parts(ranks: int, *more: str) -> int:
        config = read_config(["--size", "demo", "--data", str(data), "--run", "x", *SMALL, *more])
        before = state.Progress(step=2, ranks=ranks, accumulate=4)
        return start.lay_out(config, shards, before, speaks=False).accumulate

    assert parts(1) == 4 and parts(2) == 1 and parts(1, "--batch.accumulate", "2") == 2


def test_gradients_are_clipped_and_the_record_has_their_norm_before(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--steps", "1", "--optim.clip", "1e-3", "--optim.beta1", "0.9")
    moments = [tensor.flatten() for name, tensor in tensors(run, 1).items() if name.endswith("/exp_avg")]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # 1 - beta1 of the clipped gradient
    assert metrics(run)[0]["train/grad_norm"] > 0.1


def test_the_average_moves_as_often_and_as_far_as_set(data: Path, tmp_path: Path) -> None:
    options = ["--steps", "5", "--optim.ema_every", "2", "--optim.ema_decay", "0.8", "--log.state_every", "1"]
    run = go(data, tmp_path / "run", *options, "--log.state_keep", "5")
    second, fourth, last = (tensors(run, step) for step in (2, 4, 5))
    for name in (name for name in last if name.startswith("model/")):
        average = last[name.replace("model/", "ema/")]
        torch.testing.assert_close(average, (0.8 * second[name] + fourth[name]) / 1.8)


def test_the_record_has_the_rate_of_the_step_that_was_made(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--steps", "3", "--log.every", "1")  # 5 steps of warm-up to 1e-2
    rates = [row["train/lr"] for row in metrics(run) if "train/lr" in row]
    assert rates == pytest.approx([2e-3, 4e-3, 6e-3])


def test_the_record_has_the_rate_that_an_adaptive_optimiser_found(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("dadaptation")
    run = go(data, tmp_path / "run", "--steps", "3", "--log.every", "1", "--optim.name", "dadapt", "--optim.lr", "1")
    found = [row["train/d"] for row in metrics(run) if "train/loss" in row]
    assert len(found) == 3 and 0 < found[0] <= found[-1]


def test_audio_seen_is_counted_without_padding(data: Path, tmp_path: Path) -> None:
    options = ["--steps", "3", "--log.every", "1", "--batch.accumulate", "2"]
    run = go(data, tmp_path / "run", *options)
    config = read_config(["--data", str(data), "--run", str(run), *SMALL, *options])
    stream = reading.Stream(ShardSet.open(str(data)), config.batch, seed=config.seed)
    seconds = [float(stream.batch(step, 0).valid_frames.sum()) / 50 for step in range(3)]
    seen = [row["train/audio_seconds"] for row in metrics(run) if "train/loss" in row]
    assert seen == pytest.approx([sum(seconds[:n]) for n in (1, 2, 3)]) and seen[-1] < 0.99 * 3 * 8 * 2.56


def test_dropout_acts_in_training_and_not_in_validation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a validation, and after a release that was made of it."""
    found: list[tuple[bool, bool]] = []
    after: list[bool] = []
    score, validate = MusicLMModule.score, MusicLMModule.validate

    def scored(module: MusicLMModule, *given: Any) -> Any:
        found.append((torch.is_grad_enabled(), module.lm.training))
        return score(module, *given)

    def validated(module: MusicLMModule, *given: Any) -> Any:
        figures = validate(module, *given)
        after.append(module.lm.training)
        return figures

    monkeypatch.setattr(MusicLMModule, "score", scored)
    monkeypatch.setattr(MusicLMModule, "validate", validated)
    go(data, tmp_path / "run", "--steps", "3", "--log.valid_every", "1", "--lm.dropout", "0.1")
    assert found == [(True, True), (False, False)] * 3 and after == [True] * 3


def test_what_is_made_again_has_the_dropout_that_it_had(data: Path, tmp_path: Path) -> None:
    kept, *again = (
        tensors(go(data, tmp_path / kind, "--steps", "2", "--lm.dropout", "0.3", "--hardware.checkpointing", kind), 2)
        for kind in ("none", "selective", "full")
    )
    for made in again:
        close(kept, made)


def test_a_run_may_leave_no_state_and_says_so_when_it_begins_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = go(data, tmp_path / "run", "--steps", "2", "--log.state_every", "0")
    assert not state.steps_in(run / "state") and (run / "release" / "model.safetensors").is_file()
    assert "\nsteps     2\n" in capsys.readouterr().out
    go(data, tmp_path / "run", "--steps", "2", "--log.state_every", "0")
    assert "\nsteps     2, from the first one again: the run has kept no state yet" in capsys.readouterr().out


def test_a_state_that_lost_a_file_or_a_part_of_one_is_refused(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--stop_at", "2")
    [file] = (run / "state" / "step-2").glob("*.safetensors")
    whole = file.read_bytes()
    for spoil in (lambda: file.write_bytes(whole[:-4]), file.unlink):
        spoil()
        with pytest.raises(UserError, match="cannot be read"):
            go(data, run, "--stop_at", "3")
        file.write_bytes(whole)
    go(data, run, "--stop_at", "3")


def test_two_trainings_of_one_run_are_refused(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--stop_at", "2")
    other = "import sys, time; from pathlib import Path; from training import folder; folder.hold(Path(sys.argv[1]))"
    shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns(".lock"))
    with subprocess.Popen(
        [sys.executable, "-c", other + "; print('held', flush=True); time.sleep(100)", str(tmp_path / "other")],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=f"is being trained by process {process.pid} on"):
                go(data, tmp_path / "other", "--stop_at", "3")
            assert folder.is_held(tmp_path / "other") is True
        finally:
            process.kill()
    assert folder.is_held(tmp_path / "other") is False  # whoever died holds nothing
    go(data, tmp_path / "other", "--stop_at", "3")
    assert folder.is_held(tmp_path / "other") is True and folder.is_held(tmp_path / "nowhere") is None


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_make_the_same_steps(data: Path, tmp_path: Path, checkpointing: str) -> None:
    """Compiled, stopped and gone on uncompiled: hardware is free to change, and the names in the state stay."""
    from torch._dynamo.utils import counters

    one = go(data, tmp_path / "one", "--steps", "4")
    options = ["--steps", "4", "--hardware.checkpointing", checkpointing]
    counters.clear()
    two = go(data, tmp_path / "two", *options, "--hardware.compile", "on", "--stop_at", "2")
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    go(data, two, *options)
    close(tensors(one, 4), tensors(two, 4))
    assert metrics(two)[-1] == pytest.approx(metrics(one)[-1], rel=1e-3)


@pytest.mark.slow
def test_two_ranks_make_the_same_steps(data: Path, tmp_path: Path) -> None:
    one = go(data, tmp_path / "one", "--steps", "3")
    two = tmp_path / "two"
    command = [sys.executable, "-m", "training.train", "--size", "demo", "--data", str(data), "--run", str(two), *SMALL]
    options = ["--steps", "3", "--hardware.devices", "2"]
    done = subprocess.run(
        [*command, *options], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    close(tensors(one, 3), tensors(two, 3))
    for a, b in zip(metrics(one), metrics(two)):
        assert a["step"] == b["step"]
        assert a == pytest.approx(b, rel=1e-3)


def test_text_is_learned(data: Path, whole: Path) -> None:
    """The right caption explains the tokens better than another one: the condition is not decoration."""
    from musicgen import patterns
    from musicgen.conditioning import TextEncoder
    from training import loss

    lm, _ = weights.load_release(whole / "release")
    config = reading.BatchConfig(crop_seconds=2.56)
    [batch] = reading.validation_batches(ShardSet.open(str(data)), config)
    encoder = TextEncoder.load("minilm")
    inputs, targets, scored = patterns.training_columns(batch.codes.long(), 64, valid=batch.valid)

    def score(texts: Sequence[str | None]) -> float:
        sums = loss.cross_entropy_sums(lm.hidden(inputs, *encoder.encode(texts)), list(lm.linears), targets, scored)
        return float(sums.sum() / scored.sum())

    wrong = batch.texts[1:] + batch.texts[:1]
    with torch.no_grad():
        assert score(batch.texts) < score(wrong)


def test_a_loss_that_is_not_finite_stops_before_the_update(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--stop_at", "2")
    [file] = (run / "state/step-2").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
    broken = load_file(file)
    broken["model/out_norm.weight"][0] = torch.inf
    save_file(broken, file, about)
    with pytest.raises(NonFiniteLoss, match=r"loss is not finite at step 3 \(tracks 0.*no update was made"):
        go(data, run)
    assert state.steps_in(run / "state") == [2]


def test_a_validation_that_is_not_finite_is_never_the_best(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, spoilt = MusicLMModule.validate, [True, False]

    def sometimes(module: MusicLMModule, *given: Any) -> dict[str, float]:
        figures = validate(module, *given)
        return figures | {"valid/loss": math.nan} if spoilt.pop(0) else figures

    monkeypatch.setattr(MusicLMModule, "validate", sometimes)
    run = go(data, tmp_path / "run", "--steps", "2", "--log.valid_every", "1")
    _, info = weights.load_release(run / "release")
    assert info["training"]["step"] == state.read_progress(run / "state", 2).best_step == 2


def test_without_validation_tracks_the_last_weights_are_the_release(
    tmp_path: Path, codec: codecs.Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "set", tracks=6, valid=0, size=64)
    run = go(data, tmp_path / "run", "--steps", "2", "--lm.tail", "reference")
    told = capsys.readouterr().out
    assert "no validation tracks" in told and "nats on the training tracks (there are none to validate on)" in told
    lm, info = weights.load_release(run / "release")
    assert info["training"]["valid_loss"] is None and info["training"]["step"] == 2
    assert lm.config.tail == "reference"


def test_bad_words_on_the_command_line(data: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for argv, message in (
        (["--size", "demi"], "unknown SIZE 'demi'; allowed: demo, 300m, 1.5b, 3.3b"),
        (["--size", "demo"], "DATA is missing"),
        (["--data", "x"], "RUN is missing"),
        (["--data", str(tmp_path / "none"), "--run", run], "does not exist"),
        (["--data", str(data), "--run", run, "--steps", "0"], "steps is 0"),
        (["--data", str(data), "--run", run, "--seed", "-1"], r"seed is -1; give a whole number from 0"),
        (["--data", str(data), "--run", run, "--seed", str(2**63)], r"seed is 9223372036854775808; give"),
        (["--data", str(data), "--run", run, "--hardware.nodes", "2"], r"hardware.nodes is 2, but this process was"),
        (["--data", str(data), "--run", run, '--lora={"rank": 4}'], "give --lora.rank on the command line"),
        (["--data", str(data), "--run", run, "--hardware.accelerator", "gpu"], "this machine shows 0 GPUs"),
        (["--data", "a:0.7,b:-1", "--run", run], "the share of 'b' is -1; it must be a number above 0"),
        (["--data", str(data), "--run", run], "the model expects 4 of 2048"),
        (["--data", str(data), "--run", run, *SMALL, "--lm.condition.text_dim", "99"], "text_dim 384"),
        (["--data", str(data), "--run", run, *SMALL, "--log.clips", "1", "--codec", "/nowhere"], "could not be loaded"),
    ):
        if "gpu" in argv and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=message):
            train.main(argv if "gpu" not in argv else [*argv, *SMALL, "--hardware.accelerator", "gpu"])
    with pytest.raises(SettingsError, match=r"unknown setting 'optim.lrr'.*did you mean 'optim.lr'"):
        train.main(["--data", str(data), "--run", run, "--optim.lrr", "1"])
    with pytest.raises(SettingsError, match=r"optim.lr_min_ratio is 1.5; it is a share"):
        train.main(["--data", str(data), "--run", run, "--optim.lr_min_ratio", "1.5"])
    with pytest.raises(SettingsError, match=r"optim.lr is -1"):
        train.main(["--data", str(data), "--run", run, "--optim.lr", "-1"])
    assert not (tmp_path / "run").exists()  # nothing that was refused left a folder


def test_a_run_of_something_else_is_refused(whole: Path, data: Path, tmp_path: Path, codec: codecs.Codec) -> None:
    with pytest.raises(
        UserError, match=r"(?s)other settings:\n  optim.lr: the run has 0.01, given 0.5\n  seed: .* given 7"
    ):
        go(data, whole, "--optim.lr", "0.5", "--seed", "7")
    other = tmp_path / "other"
    shutil.copytree(data, other)
    info = json.loads((other / "dataset.json").read_text())
    info["codec"] |= {"name": "another", "identity": "f" * 64}
    (other / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"trained with codec .*small.*but now there is 'another' \(identity ffff"):
        go(other, whole)
    with pytest.raises(UserError, match=r"tokens of codec 'another' \(identity ffff.*another one"):
        go(other, tmp_path / "fresh", "--log.clips", "1", "--codec", codec.name)
    grown = write_dataset(
        tmp_path / "grown", tracks=30, size=64, codec={"name": codec.name, "identity": codec.identity}
    )
    with pytest.raises(UserError, match="trained on data version"):
        go(grown, whole)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run of this program"):
        go(data, tmp_path / "taken")


def test_a_run_starts_from_a_release(whole: Path, data: Path, tmp_path: Path) -> None:
    released, _ = weights.load_release(whole / "release")
    tuned = go(data, tmp_path / "tuned", "--init", str(whole / "release"), "--optim.lr", "1e-9", "--steps", "1")
    made = tensors(tuned, 1)
    for name, tensor in released.state_dict().items():
        torch.testing.assert_close(made[f"model/{name}"], tensor, atol=1e-6, rtol=0)
    first = next(row for row in metrics(tuned) if "train/loss" in row)
    assert first["train/loss"] < metrics(whole)[0]["train/loss"] - 0.5  # it starts where the other ended
    _, info = weights.load_release(tuned / "release")
    assert info["training"]["init"] == str(whole / "release")
    with pytest.raises(UserError, match=r"(?s)model of another shape:\n  lm.num_layers: it has 2, given 3"):
        go(data, tmp_path / "other", "--init", str(whole / "release"), "--lm.num_layers", "3")
    elsewhere = write_dataset(tmp_path / "elsewhere", size=64)
    with pytest.raises(UserError, match=r"was trained with codec .*small.*this run has 'tiny'"):
        go(elsewhere, tmp_path / "other", "--init", str(whole / "release"))


def test_real_sizes_have_their_settings() -> None:
    for name, dropout in (("300m", 0.3), ("1.5b", 0.3), ("3.3b", 0.2)):
        config = read_config(["--size", name, "--data", "x", "--run", "y"])
        assert config.lm == size(name)
        assert config.batch.word_dropout == dropout and config.batch.condition_dropout == 0.2
        assert config.batch.size == 192 and config.batch.crop_seconds == 30 and config.steps == 1_000_000
        assert config.optim.warmup_steps == 4000 and config.optim.clip == 1.0 and config.optim.weight_decay == 0.1
    changed = read_config(["--size=300m", "--data", "x", "--run", "y", "--lm.activation", "relu"])
    assert changed.lm == dataclasses.replace(size("300m"), activation="relu")


def test_a_settings_file_chooses_size_and_fine_tuning(tmp_path: Path) -> None:
    """As the command line does: shape and defaults follow, and what comes later on the line wins."""
    file = tmp_path / "mine.yaml"
    file.write_text("size: 300m\ninit: x\nlora:\n  rank: 16\n")
    words = ["--size", "300m", "--init", "x", "--lora.rank", "16"]
    told = read_config(words, folders=False)
    assert told.lm.dim == 1024 and told.optim.lr == 2e-4 and told.steps == 1000
    assert read_config(["--config", str(file)], folders=False) == told
    assert read_config([f"--config={file}"], folders=False) == told
    larger = read_config(["--config", str(file), "--size", "1.5b", "--lora.rank=0"], folders=False)
    assert larger == read_config(["--size", "1.5b", "--init", "x"], folders=False)
    assert read_config(["--size", "1.5b", "--config", str(file)], folders=False) == told


def test_wandb_is_offline_without_key_or_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert record.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    began = time.monotonic()
    assert record.wandb_mode() == "offline"
    assert time.monotonic() - began < 5
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert record.wandb_mode() == "disabled"


def test_a_failing_wandb_does_not_stop_the_record(tmp_path: Path) -> None:
    class Broken:
        @property
        def experiment(self) -> Any:
            raise OSError("no space left")

    journal = record.Record(tmp_path, 0, Broken())
    journal.log(1, {"train/loss": 1.0})
    journal.log(2, {"train/loss": 0.5})
    journal.finish()
    assert [r["train/loss"] for r in record.read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.5]


def test_a_run_of_an_earlier_version_goes_on(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--stop_at", "1")
    stored = yaml.safe_load((run / "config.yaml").read_text())
    del stored["settings"]["lm"]["pattern"]  # as a run begun before there were patterns
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    go(data, run, "--stop_at", "2")
    assert state.steps_in(run / "state")[-1] == 2
    with pytest.raises(UserError, match=r"lm.pattern: the run has 'delay', given 'parallel'"):
        go(data, run, "--lm.pattern", "parallel")
