"""What a run tells about itself: phases, MFU, traces, ceilings, where it came from; and a W&B that says nothing."""

import json
import os
import re
import resource
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from musicgen import codec as codecs
from musicgen import wav
from musicgen.errors import UserError
from tests.training import wandb_file
from tests.training.small_run import SMALL, fill_disk
from training import budget, callbacks, lineage, record, runs, state, train, watch
from training import data as reading
from training.config import read_config
from training.module import MusicLMModule


def words(data: Path, run: Path, *more: str) -> list[str]:
    return ["--size", "demo", "--data", str(data), "--run", str(run), *SMALL, "--steps", "10", *more]


@pytest.fixture(scope="module")
def run(data: Path, codec: codecs.Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in two goes, with clips and a trace."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    more = ["--codec", codec.name, "--log.clips", "2", "--log.clip_seconds", "0.5", "--log.profile_at", "3"]
    more += ["--log.profile_steps", "2", "--log.every", "2", "--batch.accumulate", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        assert train.main(words(data, folder, *more, "--stop_at", "6")) == 0
        assert train.main(words(data, folder, *more)) == 0
    return folder


def test_phases_lie_end_to_end_and_make_the_step(run: Path, data: Path) -> None:
    rows = [row for row in record.read_metrics(run / "metrics.jsonl") if "seconds/step" in row]
    assert [row["step"] for row in rows] == [1, 2, 4, 6, 8, 10]
    phases = ("text", "forward", "backward", "optimizer")
    for row in rows:
        assert all(row[f"seconds/{phase}"] > 0 for phase in phases) and row["seconds/data"] >= 0
    row = rows[-1]  # steps are alike here, so one step's phases make up most of the mean step
    inside = sum(row[f"seconds/{phase}"] for phase in phases) + row["seconds/data"]
    assert 0.3 * row["seconds/step"] < inside < 3 * row["seconds/step"]
    assert not any("communication" in name for name in row)  # one process talks to nobody


def test_a_run_records_nothing_that_has_no_name(run: Path) -> None:
    found = {re.sub(r"_q\d+$", "_qK", name) for row in record.read_metrics(run / "metrics.jsonl") for name in row}
    assert found - {"step"} <= record.NAMES.keys()
    assert record.NAMES.keys() - found <= {"train/d", "seconds/communication", "seconds/communication_total"}


def test_waiting_for_data_shows(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = reading.Stream.batch

    def slowly(*which: Any) -> reading.Batch:
        time.sleep(0.2)
        return batch(*which)

    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(reading.Stream, "batch", slowly)
    more = ["--batch.workers", "0", "--batch.accumulate", "2", "--steps", "7", "--log.every", "1"]
    assert train.main(words(data, tmp_path / "run", *more)) == 0
    rows = [row for row in record.read_metrics(tmp_path / "run" / "metrics.jsonl") if "seconds/data" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    for row in rows[1:4]:  # two batches a step, each waited for; towards the end they have been fetched ahead
        assert 0.4 <= row["seconds/data"] < row["seconds/step"]
        assert row["train/outside_model_share"] > 0.9 * row["seconds/data"] / row["seconds/step"]


def test_what_callbacks_do_after_a_step_lies_outside_and_a_validation_in_no_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(owner: Any, name: str, seconds: float) -> None:
        real = getattr(owner, name)

        def act(*given: Any, **more: Any) -> Any:
            time.sleep(seconds)
            return real(*given, **more)

        monkeypatch.setattr(owner, name, act)

    monkeypatch.setenv("WANDB_MODE", "disabled")
    slowly(MusicLMModule, "step_metrics", 0.1)
    slowly(callbacks.Bar, "after_step", 0.1)
    slowly(MusicLMModule, "validate", 3.0)
    more = ["--steps", "4", "--log.every", "1", "--log.valid_every", "2", "--log.state_every", "0"]
    assert train.main(words(data, tmp_path / "run", *more)) == 0
    rows = [row for row in record.read_metrics(tmp_path / "run" / "metrics.jsonl") if "seconds/step" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows[1:]:
        assert 0.2 < row["seconds/step"] < 3
        assert row["train/outside_model_share"] > 0.9 * 0.2 / row["seconds/step"]


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def test_the_memory_of_a_line_is_the_most_so_far(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    before = peak_gib()
    assert train.main(words(data, tmp_path / "run", "--steps", "2", "--log.every", "1")) == 0
    rows = [row for row in record.read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    memory = [row["train/memory_gib"] for row in rows]
    assert len(memory) == 2 and 0.1 < before <= memory[0] <= memory[1] <= peak_gib()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert callbacks.memory_gib() == 3  # of a GPU, where there is one


def test_mfu_is_flop_by_time_by_peak() -> None:
    clock = watch.Stopwatch(step_flop=6e9, peak=1e12)
    clock.reset(0.0, 10)
    clock.begin -= 3.0
    figures = clock.read(audio_seconds=30.0, step=20)
    assert figures["train/mfu"] == pytest.approx(6e9 * 10 / 3.0 / 1e12, rel=1e-2)
    assert figures["seconds/step"] == pytest.approx(0.3, rel=1e-2)
    assert figures["train/audio_seconds_per_second"] == pytest.approx(10.0, rel=1e-2)
    assert "train/mfu" not in watch.Stopwatch(step_flop=6e9, peak=None).read(1.0, 1)


def test_figures_of_a_window_are_means_over_its_steps_without_what_was_paused() -> None:
    loader = SimpleNamespace(waited=1.0)
    clock = watch.Stopwatch(loader=loader)
    clock.reset(0.0, 10)
    loader.waited += 2.0
    clock.begin -= 10.0  # ten seconds of steps, of which a validation takes six
    clock.pause(time.perf_counter() - 6.0)
    figures = clock.read(audio_seconds=8.0, step=14)
    assert figures["seconds/step"] == pytest.approx(1.0, rel=1e-2)
    assert figures["seconds/data"] == pytest.approx(0.5, rel=1e-2)
    assert clock.mark - time.perf_counter() == pytest.approx(6.0, abs=0.1)  # so that none of it lies outside the model


def test_the_recorded_mfu_is_that_of_the_plan(run: Path, data: Path) -> None:
    config = read_config(words(data, run, "--batch.accumulate", "2"))
    flop = config.batch.size * budget.train_flop(config.lm, 128)
    row = record.read_metrics(run / "metrics.jsonl")[-2]
    reached = flop / row["seconds/step"]
    assert 0 < row["train/mfu"] < 1.5 and reached / row["train/mfu"] > 1e9  # the peak of any processor is above this


def test_phases_add_up_and_skip_what_is_nobodys() -> None:
    phases = watch.Phases()
    assert phases.read() == {}
    phases.mark("text")  # outside any step
    phases.begin()
    for phase in ("text", "forward", "", "text"):
        time.sleep(0.01)
        phases.mark(phase)
    found = phases.read()
    assert list(found) == ["text", "forward"] and 0.02 <= found["text"] < 0.2 and 0.01 <= found["forward"] < 0.1


def test_a_trace_of_the_steps_asked_for(run: Path) -> None:
    names = sorted(path.name for path in (run / "profile").iterdir())
    assert names == ["step-0000003-rank-0.json.gz", "step-0000003-rank-0.txt"]
    import gzip

    events = json.loads(gzip.decompress((run / "profile" / names[0]).read_bytes()))["traceEvents"]
    updates = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
    assert len(updates) == 2  # two steps
    assert "aten::" in (run / "profile" / names[1]).read_text()


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [(watch, "write_profile", "no room in "), (watch.files, "write_bytes", "File too large")],
)
def test_a_trace_that_the_disk_does_not_take_ends_nothing(
    module: Any,
    name: str,
    said: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that is full from the trace on, and one that has no room left for the table."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fill_disk(monkeypatch, module, name, [True] if module is watch else [False, True])  # tracks.parquet comes first
    run = tmp_path / "run"
    more = ["--log.profile_at", "2", "--log.profile_steps", "1", "--steps", "4", "--log.state_every", "4"]
    assert train.main(words(data, run, *more)) == 0
    [warned] = [line for line in capsys.readouterr().out.splitlines() if "profile" in line]
    assert warned.startswith(f"warning   the profile could not be written to {run / 'profile'}: {said}")
    assert warned.endswith("; training goes on")
    assert not (run / "profile").exists() or not list((run / "profile").iterdir())
    assert state.steps_in(run / "state") == [4] and lineage.read(run)[-1]["how"] == "done"


def test_a_trace_that_no_folder_takes(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    profile = watch.Profile(tmp_path / "profile", 1, 1)
    profile.profiler = torch.profiler.profile()
    profile.profiler.start()
    profile._write(0)
    assert profile.profiler is None and (tmp_path / "profile").read_text() == "in the way"


def test_clips_have_a_ceiling_beside_them(run: Path, codec: codecs.Codec) -> None:
    clips = sorted(path.name for path in (run / "samples").glob("*.wav"))
    assert clips == ["ceiling-0.wav", "ceiling-1.wav", "step-0000010-0.wav", "step-0000010-1.wav"]
    made = [json.loads((run / "samples" / f"step-0000010-{number}.json").read_text()) for number in (0, 1)]
    assert [details["seed"] for details in made] == [0, 1]  # at every step, so that clips of one prompt compare
    about = wav.read_marking(run / "samples" / "ceiling-0.wav")
    prompt = json.loads((run / "samples" / "step-0000010-0.json").read_text())["prompt"]
    assert about["what"] == "a held-out recording through the codec" and about["caption"] == prompt


def test_runs_are_listed_with_state_and_lineage(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    events = lineage.read(run)
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("end", 6), ("start", 6), ("end", 10)]
    assert [e["how"] for e in events if e["event"] == "end"] == ["paused", "done"]
    assert any(line.startswith("memory") for line in events[0]["plan"])
    child = run.parent / "second"
    assert train.main(words(data, child, "--init", str(run / "release"), "--stop_at", "4")) == 0
    # What a killed run leaves: a start of a process that is gone.
    lines = (child / lineage.FILE).read_text().splitlines()
    (child / lineage.FILE).write_text(json.dumps({**json.loads(lines[0]), "pid": 2**22 - 3}) + "\n" + '{"event": "en')
    capsys.readouterr()
    assert runs.main(["--folder", str(run.parent)]) == 0
    table = capsys.readouterr().out
    first = next(line for line in table.splitlines() if "first" in line and "second" not in line)
    second = next(line for line in table.splitlines() if "second" in line)
    assert "done" in first and "10 of 10" in first and " new " in first
    assert "killed" in second and "4 of 10" in second
    assert runs.main(["--run", str(child)]) == 0
    told = capsys.readouterr().out
    assert f"from      {run / 'release'}: 10 steps on data " in told and "start     " in told and "memory " in told
    with pytest.raises(UserError, match="holds no training run"):
        runs.main(["--run", str(run.parent / "third")])
    assert runs.main(["--folder", str(run.parent / "nowhere")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_a_running_run_is_told_from_a_killed_one() -> None:
    import platform

    start = {"event": "start", "host": platform.node(), "pid": os.getpid()}
    assert lineage.state_of([start]) == lineage.state_of([start], held=True) == "running"
    assert lineage.state_of([start], held=False) == "killed"  # its number is another process's by now
    assert lineage.state_of([start | {"host": "elsewhere"}]) == "unknown"
    assert lineage.state_of([start, {"event": "end", "how": "left"}]) == "left"
    assert lineage.state_of([]) == "unknown"


def test_the_code_is_named_by_its_commit(tmp_path: Path) -> None:
    assert lineage.git_state(tmp_path) == {}  # no checkout
    here = lineage.git_state()
    assert not here or (len(here["commit"]) == 40 and isinstance(here["changed"], bool))


def test_wandb_shows_settings_code_and_plan(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    git = {"commit": "c" * 40, "changed": True}
    monkeypatch.setattr(lineage, "git_state", lambda: git)
    run = tmp_path / "run"
    assert train.main(words(data, run, "--steps", "1")) == 0
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    shown: dict[str, Any] = {}
    for entry in wandb_file.records(file):
        updates = entry.run.config if entry.WhichOneof("record_type") == "run" else entry.config
        shown |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates.update}
    [start, _] = lineage.read(run)
    assert shown["git"] == start["git"] == git
    assert shown["plan"] == start["plan"] and any(line.startswith("memory") for line in shown["plan"])
    assert shown["settings"]["optim"]["lr"] == 0.01 and shown["settings"]["run"] == str(run)


def test_a_wandb_server_that_says_nothing_holds_nobody(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    held: list[socket.socket] = []

    def take() -> None:
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=take, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(record, "INIT_SECONDS", 2.0)
    monkeypatch.setattr(record, "FINISH_SECONDS", 2.0)
    assert record.wandb_mode() == "online"
    began = time.monotonic()
    try:
        assert train.main(words(data, tmp_path / "run")) == 0
    finally:
        server.close()
        for connection in held:
            connection.close()
    assert held and time.monotonic() - began < 90
    assert [row["step"] for row in record.read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == 10
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))  # kept, to be sent later


def test_a_trace_of_steps_that_are_made_or_never_come_is_missed_aloud(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a resume may ask for another batch of validation and another type of the release's weights."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    argv = words(data, run := tmp_path / "run", "--steps", "4", "--log.state_every", "2")
    assert train.main([*argv, "--stop_at", "2", "--log.profile_at", "3"]) == 0
    assert "profile   none: it was to begin at step 3 (log.profile_at)\n" in capsys.readouterr().out
    assert train.main([*argv, "--log.profile_at", "2", "--batch.valid_batch", "1", "--release_dtype", "float16"]) == 0
    assert "profile   none: it was to begin at step 2 (log.profile_at), and 2 are made" in capsys.readouterr().out
    assert state.steps_in(run / "state")[-1] == 4 and not (run / "profile").exists()
    with safe_open(run / "release" / "model.safetensors", "pt") as file:
        assert file.get_slice("out_norm.weight").get_dtype() == "F16"
