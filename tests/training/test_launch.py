"""Who started the processes, and torchrun for real: two processes, asked to leave, started again."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen.errors import UserError
from tests.training import tiny_run
from training import launch, state, train
from training.launch import Launched
from training.strategy import HardwareConfig

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_a_launcher_says_how_many_processes_there_are() -> None:
    found = launch.here(TORCHRUN)
    assert (found.by, found.rank, found.local_rank, found.world, found.local_world) == ("torchrun", 5, 1, 8, 4)
    fitted = launch.fitted(HardwareConfig(), found)
    assert (fitted.devices, fitted.nodes, fitted.world) == (4, 2, 8)
    assert launch.fitted(HardwareConfig(devices=4, nodes=2), found) == fitted
    with pytest.raises(UserError, match=r"--hardware\.devices is 8, but torchrun started 4 processes on each of 2"):
        launch.fitted(HardwareConfig(devices=8), found)
    with pytest.raises(UserError, match=r"--hardware\.nodes is 3"):
        launch.fitted(HardwareConfig(nodes=3), found)
    with pytest.raises(UserError, match="every machine needs as many"):
        launch.fitted(HardwareConfig(), Launched("torchrun", 0, 0, 5, 2))


def test_a_task_of_slurm_is_one_and_a_shell_of_slurm_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    found = launch.here()
    assert (found.by, found.rank, found.local_rank, found.world, found.local_world) == ("srun", 3, 1, 4, 2)
    assert found.environment.auto_requeue is False
    assert launch.fitted(HardwareConfig(), found).nodes == 2
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,1")
    with pytest.raises(UserError, match="not --ntasks"):
        launch.here()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    alone = launch.here()
    assert not alone.by and type(alone.environment).__name__ == "LightningEnvironment"
    assert launch.fitted(HardwareConfig(devices=2), alone) == HardwareConfig(devices=2)
    two = HardwareConfig(nodes=2)
    with pytest.raises(UserError, match=r"hardware.nodes is 2, but this process was started alone"):
        launch.fitted(two, alone)


@pytest.mark.parametrize(
    ("does", "code", "said"),
    [
        ("print('done')", 0, "done"),
        ("raise SystemExit(75)", 75, ""),
        ("raise UserError('no such folder')", 2, "error: no such folder"),
        ("raise KeyboardInterrupt", 130, "interrupted; run the same command again"),
        ("[][1]", 1, "IndexError: list index out of range"),
    ],
)
def test_a_process_ends_with_its_code_whatever_its_threads_do(does: str, code: int, said: str) -> None:
    job = (
        "import atexit, sys, threading, time; from musicgen.errors import UserError; from training import launch\n"
        "threading.Thread(target=time.sleep, args=(600,)).start(); atexit.register(print, 'closed')\n"
        f"def main(argv):\n    {does}\n"
        "launch.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True, timeout=100)
    assert done.returncode == code and said in done.stdout + done.stderr and done.stdout.endswith("closed\n")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("starts", [True, False])
def test_a_rank_ends_with_the_one_that_started_it(starts: bool) -> None:
    """As one of Lightning's, whose first process is killed: nobody else would tell it. Another parent is none of it."""
    ours = "import os, subprocess, sys, time; from training import launch; launch.end_with_the_first(launch.here()); "
    rank = ours + "print(os.getpid(), flush=True); time.sleep(600)"
    begin = ours if starts else "import os, subprocess, sys, time; "
    spawn = f"subprocess.Popen([sys.executable, '-c', {rank!r}], env={{**os.environ, 'LOCAL_RANK': '1'}})"
    first, env = f"{begin}{spawn}; time.sleep(600)", {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}
    parent = subprocess.Popen([sys.executable, "-c", first], env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as said:
        child = int(said.readline())
        parent.kill()
        parent.wait()
        try:
            gone, _, _ = select.select([said], [], [], 30 if starts else 1)  # its end closes what it writes to
            assert bool(gone) == starts
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_torchrun_asked_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM reaches every process, the loader's workers too, as batch systems send it; the run goes on alone."""
    data, run, log = tiny_run.dataset(tmp_path / "data"), tmp_path / "run", tmp_path / "log"
    argv = [*tiny_run.ARGS, "--data", str(data), "--run", str(run), "--batch.workers", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("w") as out:
        ranks = subprocess.Popen(
            [*command, "-m", "training.train", "--", *argv],
            env=tiny_run.ENV,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            tiny_run.wait_for(lambda: tiny_run.last_step(run) >= 3, 200, log.read_text, ranks)
            os.killpg(ranks.pid, signal.SIGTERM)
            ranks.wait(timeout=100)
        finally:
            if ranks.poll() is None:
                os.killpg(ranks.pid, signal.SIGKILL)
    left, said = tiny_run.last_step(run), log.read_text()
    assert 3 <= left < tiny_run.STEPS, said
    assert state.steps_in(run / "state")[-1] == left and "asked by SIGTERM" in said
    assert state.read_progress(run / "state", left).ranks == 2, said
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train.main(argv)
    tiny_run.same(tiny_run.curves(run), tiny_run.undisturbed(data, tmp_path / "one"))
