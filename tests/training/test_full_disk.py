"""A training whose disk fills: states, releases, clips and records wait for room, and it goes on."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen import generate, weights
from musicgen.conditioning import TextEncoder
from musicgen.errors import UserError
from tests.training.small_run import SMALL, fill_disk, go, same, tensors
from tests.training.tiny_run import curves as metrics
from training import folder, lineage, module, products, record, sources, state
from training.config import read_config
from training.module import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("no_wandb")


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
    with pytest.raises(UserError, match=r"clips of step 4 could not be made in .*make generate MODEL="):
        go(data, tmp_path / "never", *options)
    assert released(tmp_path / "never") and state.steps_in(tmp_path / "never" / "state") == [4]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no 2 GiB left\nhint"), UserError("no 2 GiB left")])
def test_clips_that_find_no_memory_end_no_training(
    error: Exception, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(generate, "generate", fails)
    options = ["--steps", "4", "--log.clips", "1", "--log.clip_seconds", "0.5", "--log.clips_every", "2"]
    with pytest.raises(UserError, match=r"clips of step 4 could not be made in .*: no 2 GiB left\. State and release"):
        go(data, tmp_path / "run", *options)
    assert "the clips of step 2 could not be made" in (told := capsys.readouterr().out) and "hint" not in told
    assert released(tmp_path / "run") and state.steps_in(tmp_path / "run" / "state") == [4]


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


def test_a_release_that_waited_says_of_which_step_it_is(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(["--size", "demo", "--data", str(data), "--run", str(tmp_path), *SMALL])
    release = products.Release(tmp_path / "release", config, sources.open_data(str(data)), {}, {})
    (lm, _), encoder, progress = weights.load_release(whole / "release"), TextEncoder.load("minilm"), state.Progress(3)
    fill_disk(monkeypatch, weights, "write_folder", [True])
    release.write(lm.requires_grad_(True), encoder, progress, 1.5)
    progress.step = 9  # the training has gone on
    release.again(lm, encoder)
    told = weights.read_info(tmp_path / "release")["training"]
    assert release.waiting is None and (told["step"], told["valid_loss"]) == (3, 1.5)
