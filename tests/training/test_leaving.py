"""A training that has to leave: asked by a signal or Ctrl-C, or because its music was taken away; nothing is lost."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytorch_lightning as pl

from musicgen.errors import UserError
from pipelines.shard import ShardSet
from tests.training.small_run import go, same, tensors
from tests.training.tiny_run import curves as metrics
from tests.training.tiny_run import last_step
from training import callbacks, launch, lineage, module, record, start, state, strategy, watch
from training import data as reading

pytestmark = pytest.mark.usefixtures("no_wandb")


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


def test_a_run_asked_to_leave_before_its_first_step_has_an_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reading.validation_batches

    def asked(*given: Any, **more: Any) -> Any:
        if lineage.read(tmp_path / "run"):
            signal.raise_signal(signal.SIGTERM)
        return read(*given, **more)

    monkeypatch.setattr(reading, "validation_batches", asked)
    with pytest.raises(SystemExit) as left:
        go(data, tmp_path / "run")
    assert left.value.code == launch.EXIT_REQUEUE
    assert [line.get("how") for line in lineage.read(tmp_path / "run")] == [None, "left"]


def test_a_run_may_stand_in_the_folder_one_is_in(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    go(data, Path("."), "--stop_at", "2")
    assert state.steps_in(tmp_path / "state") == [2]


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


def test_a_signal_of_its_own_counts_where_others_reach_it_from_elsewhere(tmp_path: Path) -> None:
    """As a worker of Ray, which is taken away by its machine while the command was asked for nothing."""
    loader, one = SimpleNamespace(failed=None), cast(pl.Trainer, SimpleNamespace(world_size=1))
    states = callbacks.States(
        tmp_path, callbacks.LogConfig(), 9, watch.Stopwatch(), loader, background=False, elsewhere=lambda: 0
    )
    assert not states._all_agree(one)
    states._ask(signal.SIGTERM, None)
    assert states._all_agree(one) and states.asked == signal.SIGTERM


def test_ctrl_c_is_not_for_a_training_in_the_background() -> None:
    """A shell has it ignored there, and the terminal's Ctrl-C is meant for what runs in front."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert launch.heard() == [*launch.SIGNALS]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert launch.heard() == [*launch.SIGNALS, signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
