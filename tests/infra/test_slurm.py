"""infra/train.sbatch on a real Slurm: asked to leave by its signal, back in the queue, finished, no step lost."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra import slurm
from tests.training import tiny_run
from training import state

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "infra" / "train.sbatch"


def test_the_script_asks_for_what_requeuing_needs() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    name, seconds = options["signal"].split("@")
    assert getattr(signal, f"SIG{name}") == signal.SIGUSR1 and int(seconds) >= 120  # to the tasks, not to the script
    assert "requeue" in options and options["open-mode"] == "append"


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm.lacking()), reason=slurm.lacking() or "Slurm is here")
def test_a_job_that_is_asked_to_leave_is_queued_again_and_finishes(tmp_path: Path) -> None:
    data, run, log = tiny_run.dataset(tmp_path / "data"), tmp_path / "run", tmp_path / "job.log"
    with slurm.cluster(tmp_path / "slurm") as found:
        env = {**tiny_run.ENV, **found, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        command = ["sbatch", "--ntasks-per-node", "2", "--time", "10", "--output", str(log), "infra/train.sbatch"]
        command += [*tiny_run.ARGS, "--data", str(data), "--run", str(run), "--batch.workers", "1"]
        said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        number = said.stdout.split()[-1]

        def words() -> str:
            return (log.read_text() if log.is_file() else "") + str(slurm.job(number, env))

        tiny_run.wait_for(lambda: tiny_run.last_step(run) >= 3, 200, words)
        slurm.ask(["scancel", "--signal=USR1", number], env)  # as --signal does it: to the tasks
        tiny_run.wait_for(lambda: slurm.job(number, env)["Restarts"] == "1", 100, words)
        left = tiny_run.last_step(run)
        assert 3 <= left < tiny_run.STEPS and state.steps_in(run / "state")[-1] == left, words()
        tiny_run.wait_for(lambda: slurm.job(number, env)["JobState"] == "COMPLETED", 400, words)
        about = slurm.job(number, env)
    assert about["ExitCode"] == "0:0" and about["Restarts"] == "1"
    text = log.read_text()
    assert "asked by SIGUSR1" in text and f"going on from {left}" in text and "start 1 of job" in text
    tiny_run.same(tiny_run.curves(run), tiny_run.undisturbed(data, tmp_path / "one"))
