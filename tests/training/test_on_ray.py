"""Ray Train for real: a local Ray, two workers over gloo, one of them killed in mid-run."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from musicgen.errors import UserError
from tests.training import tiny_run
from training import launch, lineage, state
from training.config import read_config

ENV = {**tiny_run.ENV, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
ON_RAY = ["--ray.address", "local", "--hardware.devices", "2"]


def workers_of(driver: int) -> list[int]:
    """Process ids of the training workers below a driver."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        try:
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if b"RayTrainWorker" in (entry / "cmdline").read_bytes():
                found.append(pid)
        except (ValueError, OSError):
            continue

    def below(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    return sorted(filter(below, found))


def command(data: Path, run: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "training.train", *tiny_run.ARGS, "--data", str(data), "--run", str(run), *ON_RAY, *more
    ]  # fmt: skip


def on_two_workers(words: list[str], log: Path, run: Path, then: Callable[[subprocess.Popen[bytes]], None]) -> int:
    """Start the command, do something to it once it makes steps; its exit code."""
    with log.open("w") as out:
        hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where these tests do not
        driver = subprocess.Popen(words, env=ENV, stdout=out, stderr=out, preexec_fn=hears)
        try:
            tiny_run.wait_for(lambda: tiny_run.last_step(run) >= 1, 200, log.read_text, driver)
            then(driver)
            return driver.wait(timeout=200)
        finally:
            driver.kill()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_worker_costs_no_step(tmp_path: Path, strategy: str) -> None:
    data, run, log = tiny_run.dataset(tmp_path / "data"), tmp_path / "run", tmp_path / "log"
    workers: list[int] = []

    def kill_one(driver: subprocess.Popen[bytes]) -> None:
        workers.extend(workers_of(driver.pid))
        tiny_run.wait_for(lambda: bool(state.steps_in(run / "state")), 200, log.read_text, driver)
        os.kill(workers[-1], signal.SIGKILL)
        assert tiny_run.last_step(run) < tiny_run.STEPS

    code = on_two_workers(command(data, run, "--hardware.strategy", strategy), log, run, kill_one)
    said = log.read_text()
    assert code == 0 and len(workers) == 2 and "going on from" in said, said
    tiny_run.same(tiny_run.curves(run), tiny_run.undisturbed(data, tmp_path / "one"))
    assert state.read_progress(run / "state", tiny_run.STEPS).ranks == 2
    assert (run / "release" / "model.safetensors").is_file() and not list(tmp_path.glob(".run.ray*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exits", "how"),
    [(signal.SIGTERM, launch.EXIT_REQUEUE, "left"), (signal.SIGINT, launch.EXIT_INTERRUPTED, "interrupted")],
)
def test_a_signal_to_the_command_reaches_the_workers(tmp_path: Path, number: int, exits: int, how: str) -> None:
    """They save and leave, and the command says so by its exit code; the next one goes on."""
    data, run, log = tiny_run.dataset(tmp_path / "data"), tmp_path / "run", tmp_path / "log"
    long = ["--steps", "400", "--log.state_every", "1000", "--log.valid_every", "1000"]
    code = on_two_workers(command(data, run, *long), log, run, lambda driver: driver.send_signal(number))
    assert code == exits and lineage.read(run)[-1]["how"] == how, log.read_text()
    [left] = state.steps_in(run / "state")
    said = f"left      after step {left} of 400, asked by {signal.Signals(number).name}"
    assert 1 <= left < 400 and said in log.read_text()
    stop = ["--stop_at", str(left + 2)]
    done = subprocess.run(command(data, run, *long, *stop), env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tiny_run.last_step(run) == left + 2
    steps = [row["step"] for row in tiny_run.curves(run)]
    assert steps == list(range(1, left + 3))


def test_settings_of_ray_are_checked() -> None:
    with pytest.raises(ValueError, match=r"ray\.restarts is -1"):
        launch.RayConfig(address="auto", restarts=-1)


@pytest.mark.slow
def test_an_error_for_the_user_is_told_once_and_not_tried_for_ever(tmp_path: Path) -> None:
    data = tiny_run.dataset(tmp_path / "data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("of something else")
    words = command(data, tmp_path / "run", "--ray.restarts", "50")
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "is not a run of this program" in told[0]
    assert (tmp_path / "run" / "letter.txt").is_file()


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    from training import on_ray

    argv = [*tiny_run.ARGS, "--data", str(tmp_path), "--run", str(tmp_path / "run"), "--hardware.devices", "2"]
    with pytest.raises(UserError, match=r"RAY='127\.0\.0\.1:1' could not be reached"):
        on_ray.fit(read_config([*argv, "--ray.address", "127.0.0.1:1"]))
