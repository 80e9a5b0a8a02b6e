"""Ray Train for real: a local Ray, two workers over gloo, one of them killed in mid-run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen.errors import UserError
from tests.training import tiny_run
from training import launch, state

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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_worker_costs_no_step(tmp_path: Path, strategy: str) -> None:
    data, run, log = tiny_run.dataset(tmp_path / "data"), tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "training.train", *tiny_run.ARGS, "--data", str(data), "--run", str(run)]
    with log.open("w") as out:
        driver = subprocess.Popen(
            [*command, *ON_RAY, "--hardware.strategy", strategy],
            env=ENV,
            stdout=out,
            stderr=out,
        )
        try:
            tiny_run.wait_for(lambda: tiny_run.last_step(run) >= 1, 200, log.read_text, driver)
            workers = workers_of(driver.pid)
            tiny_run.wait_for(lambda: bool(state.steps_in(run / "state")), 200, log.read_text, driver)
            os.kill(workers[-1], signal.SIGKILL)
            killed_at = tiny_run.last_step(run)
            assert driver.wait(timeout=200) == 0, log.read_text()
        finally:
            driver.kill()
    said = log.read_text()
    assert len(workers) == 2 and killed_at < tiny_run.STEPS
    assert "going on from" in said, said
    tiny_run.same(tiny_run.curves(run), tiny_run.undisturbed(data, tmp_path / "one"))
    assert state.read_progress(run / "state", tiny_run.STEPS).ranks == 2
    assert (run / "release" / "model.safetensors").is_file() and not list(tmp_path.glob(".run.ray*"))


def test_settings_of_ray_are_checked() -> None:
    with pytest.raises(ValueError, match=r"ray\.restarts is -1"):
        launch.RayConfig(address="auto", restarts=-1)


@pytest.mark.slow
def test_an_error_for_the_user_is_told_once_and_not_tried_for_ever(tmp_path: Path) -> None:
    data = tiny_run.dataset(tmp_path / "data")
    command = [sys.executable, "-m", "training.train", *tiny_run.ARGS, "--data", str(data), *ON_RAY]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("of something else")
    command += ["--run", str(tmp_path / "run"), "--ray.restarts", "50"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "is not a run of this program" in told[0]
    assert (tmp_path / "run" / "letter.txt").is_file()


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    from training import on_ray, train

    argv = [*tiny_run.ARGS, "--data", str(tmp_path), "--run", str(tmp_path / "run"), "--hardware.devices", "2"]
    with pytest.raises(UserError, match=r"RAY='127\.0\.0\.1:1' could not be reached"):
        on_ray.fit(train.read_config([*argv, "--ray.address", "127.0.0.1:1"]))
