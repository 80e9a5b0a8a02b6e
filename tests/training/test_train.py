"""Training end to end on a small real data set: learning, exact resume, the record, and what is refused."""

import dataclasses
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from tests.training.synthetic import small_codec, write_dataset
from tests.training.tiny_run import curves as metrics
from tests.training.tiny_run import last_step
from training import folder, launch, lineage, module, record, start, state, strategy, train
from training.config import read_config
from training.data import unigram_loss
from training.module import NonFiniteLoss

SMALL = shlex.split(
    "--lm.dim 32 --lm.num_layers 2 --lm.num_heads 2 --lm.codebook_size 64 --batch.crop_seconds 2.56 --batch.size 8 "
    "--optim.lr 1e-2 --optim.warmup_steps 5 --hardware.precision float32 --hardware.accelerator cpu "
    "--codebook_init false --log.every 5 --log.valid_every 20 --log.state_every 20 --log.clips 0 --steps 40"
)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> codecs.Codec:
    return small_codec(tmp_path_factory.mktemp("codec") / "small")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, codec: codecs.Codec) -> Path:
    identity = {"name": codec.name, "identity": codec.identity}
    return write_dataset(tmp_path_factory.mktemp("data") / "set", size=64, codec=identity)


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def go(data: Path, run: Path, *more: str) -> Path:
    assert train.main(["--size", "demo", "--data", str(data), "--run", str(run), *SMALL, *more]) == 0
    return run


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    return state.tensors(run / "state" / f"step-{step}")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], kind: str = "model") -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if name.startswith(kind):
            torch.testing.assert_close(b[name], tensor, atol=2e-4, rtol=1e-3)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return go(data, tmp_path_factory.mktemp("runs") / "whole")


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


def test_a_signal_saves_and_asks_to_be_run_again(whole: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "asked"

    def ask() -> None:
        while not last_step(run):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        go(data, run)
    assert left.value.code == launch.EXIT_REQUEUE and signal.getsignal(signal.SIGTERM) == before
    [step] = state.steps_in(run / "state")
    assert 0 < step < 20
    go(data, run)
    same(tensors(whole, 40), tensors(run, 40))
    assert metrics(run) == metrics(whole)


def test_a_disk_that_fills_does_not_stop_the_training(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = go(data, tmp_path / "full", "--stop_at", "20")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # states are larger; record and release are not
    try:
        with pytest.raises(UserError, match=r"state of step 40 could not be written.*last whole state is step 20"):
            go(data, run, "--log.state_every", "10")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the state of step 30 could not be written" in capsys.readouterr().out
    assert state.steps_in(run / "state") == [20]
    go(data, run)
    same(tensors(whole, 40), tensors(run, 40))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something inside a step of the training."""
    real = module.MusicLMModule.training_step

    def training_step(self: Any, batch: Any, index: int) -> Any:
        if self.progress.step + 1 == step:
            act()
        return real(self, batch, index)

    monkeypatch.setattr(module.MusicLMModule, "training_step", training_step)


def replaced(shard: Path) -> None:
    """Another file under the name, with other codes in it."""
    altered = bytearray(shard.read_bytes())
    for row in ShardSet.open(str(shard.parent.parent)).index.to_pylist():
        if row["split"] == "train":
            altered[row["codes_offset"] + 200] ^= 1
    shard.with_suffix(".new").write_bytes(altered)
    os.replace(shard.with_suffix(".new"), shard)


WITHDRAWN: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (Path.unlink, "is gone"),
    "replaced": (replaced, "was altered since it was made.*Nothing was trained on what is there now"),
    "cut": (lambda shard: os.truncate(shard, 1000), "was altered since it was made"),
}


@pytest.mark.parametrize(("how", "workers"), [("gone", 0), ("replaced", 0), ("cut", 0), ("cut", 2)])
def test_music_withdrawn_in_mid_run_stops_it_with_its_state_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, workers: int
) -> None:
    act, words = WITHDRAWN[how]
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shard = copy / "shards" / "train-00000.tar"
    options = ["--batch.workers", str(workers), "--log.state_every", "40"]
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: act(shard))
        with pytest.raises(UserError, match=words) as stopped:
            go(copy, tmp_path / "run", *options)
    (step,) = state.steps_in(tmp_path / "run" / "state")
    end = lineage.read(tmp_path / "run")[-1]
    assert 4 <= step < 40 and end["how"] == "failed" and end["step"] == step
    assert f"The run has saved its state of step {step}" in str(stopped.value) and "INIT=" in str(stopped.value)
    if workers:
        return
    shutil.copy(data / "shards" / shard.name, shard)
    go(copy, tmp_path / "run", *options)
    whole = go(data, tmp_path / "whole", *options)
    same(tensors(tmp_path / "run", 40), tensors(whole, 40))


@pytest.fixture
def at_a_terminal() -> Iterator[None]:
    """SIGINT as a terminal's programs have it; those that a script starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("at_a_terminal")
def test_ctrl_c_saves_and_leaves(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as left:
        go(data, run, "--batch.workers", "1")
    said = capfd.readouterr()
    assert left.value.code == 130 and "Ctrl-C once more leaves at once" in said.err
    assert "left      after step 3 of 40, asked by SIGINT; the state is saved, run the same command again" in said.out
    assert lineage.read(run)[-1]["how"] == "interrupted" and state.steps_in(run / "state") == [3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    go(data, run)
    same(tensors(whole, 40), tensors(run, 40))


@pytest.mark.usefixtures("at_a_terminal")
def test_a_second_ctrl_c_leaves_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = go(data, tmp_path / "run", "--stop_at", "2")
    at_step(monkeypatch, 4, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)] and None)
    with pytest.raises(KeyboardInterrupt):  # of which `settings.run` makes a line and the exit code 130
        go(data, run)
    end = lineage.read(run)[-1]
    assert end["how"] == "interrupted" and end["step"] == 3 and "error" not in end
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert state.steps_in(run / "state") == [2]


def test_a_signal_before_the_first_step_asks_to_be_run_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for owner, name in ((start, "load_encoder"), (record, "Record"), (strategy, "prepare")):
        with monkeypatch.context() as patch:
            real = getattr(owner, name)

            def ask(*given: Any, real: Any = real) -> Any:
                os.kill(os.getpid(), signal.SIGTERM)
                return real(*given)

            patch.setattr(owner, name, ask)
            with pytest.raises(SystemExit) as left:
                go(data, tmp_path / name)
        assert left.value.code == launch.EXIT_REQUEUE
        assert capfd.readouterr().out.count("left      asked by SIGTERM outside the steps: nothing is lost") == 1
    assert lineage.read(tmp_path / "prepare")[-1]["how"] == "left"
    assert signal.getsignal(signal.SIGTERM) == before


def fill_disk(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, full: list[bool]) -> None:
    """Let a function that writes meet a disk without room at the calls that `full` says, and with room after them."""
    real = getattr(module, name)

    def write(*given: Any, **more: Any) -> Any:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if full and full.pop(0):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            return real(*given, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(module, name, write)


def released(run: Path) -> bytes:
    assert not list(run.glob(".release*"))
    return (run / "release" / "model.safetensors").read_bytes()


def test_a_release_waits_for_room(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk(monkeypatch, weights, "write_folder", [True, True, False])  # at steps 20, 40 and at the end
    run = go(data, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("release of step") == 2 and "that of step 40 is written now" in said
    assert released(run) == released(whole) and metrics(run) == metrics(whole)
    same(tensors(whole, 40), tensors(run, 40))


def test_a_release_that_finds_no_room_is_written_by_the_next_start(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, weights, "write_folder", [False, True, True])
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"release of step 40 could not be .*: File too large. The state of step 40 is"):
        go(data, run)
    assert lineage.read(run)[-1]["how"] == "failed"
    _, info = weights.load_release(run / "release")
    assert info["training"]["step"] == 20 and state.steps_in(run / "state") == [20, 40]
    go(data, run)
    assert released(run) == released(whole)


def test_a_release_that_found_no_room_half_way(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fill_disk(monkeypatch, weights, "write_folder", [True, True])
    with pytest.raises(UserError, match="release of step 20 could not be written"):
        go(data, run, "--stop_at", "20")
    assert not (run / "release").exists()
    go(data, run, "--stop_at", "21")
    assert weights.read_info(run / "release")["training"]["step"] == 20
    # Where the best step's state is gone as well, the next validation is released.
    shutil.rmtree(run / "release")
    shutil.rmtree(run / "state" / "step-20")
    document = json.loads((run / "state/step-21/state.json").read_text())
    document["best_loss"] = 0.1  # better than any
    (run / "state/step-21/state.json").write_text(json.dumps(document))
    go(data, run)
    assert released(run) == released(whole)


def test_a_finished_run_writes_its_release_again(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "release")
    go(data, run)
    assert "from the state of step 40" in capsys.readouterr().out and released(run) == released(whole)
    shutil.rmtree(run / "release")
    document = json.loads((run / "state/step-40/state.json").read_text())
    document["best_step"] = 35  # of which no state is kept
    (run / "state/step-40/state.json").write_text(json.dumps(document))
    go(data, run)
    assert weights.read_info(run / "release")["training"]["valid_loss"] is None and released(run) == released(whole)
    go(data, run)
    assert "nothing to do" in capsys.readouterr().out


def test_what_a_killed_run_was_writing_is_cleared(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--stop_at", "2")
    (run / "samples").mkdir()
    for name in (".release.ab.tmp", ".release.ab.old"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_bytes(b"half")
    (run / "samples" / ".step-0000002-0.wav.ab.tmp").write_bytes(b"half")
    go(data, run, "--stop_at", "3")
    assert not list(run.glob(".release*")) and not list((run / "samples").iterdir())
    assert (run / "release" / "model.safetensors").read_bytes() == b"half"  # the one that stood there before


def test_clips_wait_for_room(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from musicgen import wav

    options = ["--steps", "4", "--log.clips", "1", "--log.clip_seconds", "0.5", "--log.clips_every", "2"]
    fill_disk(monkeypatch, wav, "write", [True, True, False])
    run = go(data, tmp_path / "run", *options)
    assert capsys.readouterr().out.count("warning   the clips of step") == 2
    found = sorted(path.name for path in (run / "samples").iterdir())
    assert found == ["ceiling-0.wav", "step-0000004-0.json", "step-0000004-0.wav"]
    fill_disk(monkeypatch, wav, "write", [True, True, True])
    with pytest.raises(UserError, match=r"clips of step 4 could not be written .*make generate MODEL="):
        go(data, tmp_path / "never", *options)
    assert released(tmp_path / "never") and state.steps_in(tmp_path / "never" / "state") == [4]


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


def test_a_run_may_leave_no_state(data: Path, tmp_path: Path) -> None:
    run = go(data, tmp_path / "run", "--steps", "2", "--log.state_every", "0")
    assert not state.steps_in(run / "state") and (run / "release" / "model.safetensors").is_file()


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


def test_a_full_disk_keeps_the_record_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics_file, real = record.MetricsFile(tmp_path / "metrics.jsonl"), record.append_whole

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    metrics_file.append(1, {"x": 1.0})
    monkeypatch.setattr(record, "append_whole", full)
    metrics_file.append(2, {"x": 2.0})
    metrics_file.append(3, {"x": 3.0})
    assert [row["step"] for row in record.read_metrics(tmp_path / "metrics.jsonl")] == [1]
    monkeypatch.setattr(record, "append_whole", real)
    metrics_file.append(4, {"x": 4.0})
    assert [row["step"] for row in record.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_start_on_a_full_disk_says_so(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, folder, "make_run", [True])
    with pytest.raises(UserError, match=r"run' cannot be written: File too large. Free some room"):
        go(data, tmp_path / "run")
    assert not list(tmp_path.iterdir())
    run = go(data, tmp_path / "run", "--stop_at", "2", "--log.every", "1")
    before = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    for owner, name, file in ((lineage, "began", "starts"), (record, "MetricsFile", "metrics")):
        fill_disk(monkeypatch, owner, name, [True])
        with pytest.raises(UserError, match=rf"RUN: .*{file}.jsonl cannot be written: .*Free some room"):
            go(data, run)
        assert (run / f"{file}.jsonl").read_bytes() == before[f"{file}.jsonl"] and not list(run.glob(".metrics*"))


def test_a_full_disk_does_not_hide_what_ended_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = go(data, tmp_path / "run", "--stop_at", "2")
    fill_disk(monkeypatch, lineage, "ended", [True])

    def fail(*_: Any) -> None:
        with (run / "starts.jsonl").open("a") as file:
            file.write(" " * 1000 + "\n")
        raise NonFiniteLoss("the true error")

    monkeypatch.setattr(module.MusicLMModule, "training_step", fail)
    with pytest.raises(NonFiniteLoss, match="the true error"):
        go(data, run)
    assert "the end of the run is not in it" in caplog.text


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
        finally:
            process.kill()
    go(data, tmp_path / "other", "--stop_at", "3")  # whoever died holds nothing


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
    from training import data as reading
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


def test_without_validation_tracks_the_last_weights_are_the_release(
    tmp_path: Path, codec: codecs.Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "set", tracks=6, valid=0, size=64)
    run = go(data, tmp_path / "run", "--steps", "2", "--lm.tail", "reference")
    assert "no validation tracks" in capsys.readouterr().out
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
