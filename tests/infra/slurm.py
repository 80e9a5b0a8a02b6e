"""A Slurm of one machine for as long as a test needs it, in a folder of its own; needs root, slurm-wlm and munge.

Nothing of the machine's own configuration is read or changed: munged, slurmctld and slurmd get their own sockets, keys,
ports and state.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"

MUNGE_FILES = ("socket", "pid", "log", "seed")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """Why there can be no Slurm here; empty when there can."""
    gone = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if gone:
        return f"Slurm is not installed ({', '.join(gone)} not found): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it; gives the environment in which sbatch and the others find it. Everything ends with the block."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=_free_ports(2)))
    env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
    munged += [f"--{what}{'' if what == 'socket' else '-file'}={folder}/munge.{what}" for what in MUNGE_FILES]
    running: list[subprocess.Popen[bytes]] = []
    with (folder / "daemons.log").open("wb") as log:
        try:
            for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
                running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
                time.sleep(1)
            until(lambda: "idle" in ask(["sinfo", "-h", "-o", "%t"], env), 60, folder)
            yield env
        finally:
            for daemon in reversed(running):
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(10)
                daemon.kill()


def until(what: object, seconds: float, folder: Path) -> None:
    """Wait until the callable `what` is true; else fail with what the daemons wrote."""
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in folder.glob("*.log"))
        time.sleep(0.2)


def ask(command: list[str], env: dict[str, str]) -> str:
    """What a command of Slurm's answers."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def job(number: str, env: dict[str, str]) -> dict[str, str]:
    """What Slurm knows of a job: JobState, Restarts, ExitCode, Reason and the rest."""
    return dict(re.findall(r"(\w+)=(\S+)", ask(["scontrol", "show", "job", number], env)))
