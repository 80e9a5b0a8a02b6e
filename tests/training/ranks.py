"""One of several real processes that train together: a list of runs, one after the other, and what became of each.

    python -m tests.training.ranks JOBS.json OUT.json

Started by `together` with the variables that a launcher sets. JOBS holds argument lists of `training.train`; OUT gets
`ok`, the exit code, or the words of the error. A job with `signal` sends that signal to this rank once it trains, one
with `withdraw` deletes a file then; one with `casts` lets every part of a step cast the weights for itself.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock


def part() -> None:
    """End the group of this process.

    A gloo thread may still hold a finished sum of gradients, and with it the context of Python that a backward pass
    keeps: it wants Python to let go. The group's end waits for that thread and holds Python meanwhile, for ever
    (torch 2.13, plain DistributedDataParallel: within 300 times).
    """
    import torch.distributed as dist

    time.sleep(0.2)
    dist.destroy_process_group()


def together(jobs: list[dict[str, Any]], folder: Path, ranks: int = 2, timeout: float = 400) -> list[list[str]]:
    """Run the jobs on so many ranks; returns what became of each job on each rank.

    Args:
        jobs: `argv`, and optionally `signal` = [rank, number, metrics file to wait for], `withdraw` = [rank, file,
            metrics file to wait for], `full` = [rank, the largest file that it can write], or `casts` = true.
        folder: for the exchange.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    for rank in range(ranks):
        env = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }
        if sys.platform == "linux":
            env["GLOO_SOCKET_IFNAME"] = "lo"  # else each group of processes asks for this machine's name
        command = [
            sys.executable,
            "-m",
            "tests.training.ranks",
            str(folder / "jobs.json"),
            str(folder / f"{rank}.json"),
        ]
        with logs[rank].open("w") as log:
            children.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        became = wait_for(children, timeout)
    finally:
        for child in children:
            child.kill()
            child.wait()
    if any(became):  # the output of all: who was stuck waited for another
        said = [log.read_text(errors="replace")[-6000:] for log in logs]
        raise AssertionError(
            "\n".join(f"--- rank {i}: {how}\n{text}" for i, (how, text) in enumerate(zip(became, said)))
        )
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [list(job) for job in zip(*by_rank)]


def wait_for(children: list[subprocess.Popen[bytes]], timeout: float, grace: float = 5) -> list[int | str]:
    """Wait for processes that train together; returns the exit code of each, `stuck` where it did not end.

    Who is stuck is asked by SIGUSR2 to write down where its threads stand.

    Args:
        timeout: seconds for all.
        grace: seconds that the others have once one has failed, for which they might wait in vain.
    """
    deadline = time.monotonic() + timeout
    while None in (codes := [child.poll() for child in children]) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.05)
    for child, code in zip(children, codes):
        if code is None:
            child.send_signal(signal.SIGUSR2)
    if None in codes:
        time.sleep(1)
    return ["stuck" if code is None else code for code in codes]


def _when(once: Path, act: Callable[[], None]) -> None:
    while not (once.is_file() and once.stat().st_size):
        time.sleep(0.02)
    act()


def main() -> None:
    """Run the jobs of the file."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    from musicgen.errors import UserError
    from training import train
    from training.copies import WorkingCopies

    rank, results = int(os.environ["RANK"]), []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        for what, act in (("signal", functools.partial(os.kill, os.getpid())), ("withdraw", os.unlink)):
            if job.get(what, [None])[0] == rank:
                _, given, once = job[what]
                threading.Thread(target=_when, args=(Path(once), functools.partial(act, given)), daemon=True).start()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if job.get("full", [None])[0] == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["full"][1], limits[1]))
        try:
            with mock.patch.object(WorkingCopies, "put_in", lambda _: None) if job.get("casts") else nullcontext():
                train.main(job["argv"])
            results.append("ok")
        except SystemExit as left:
            results.append(f"exit {left.code}")
        except UserError as error:
            results.append(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    from training.launch import end

    main()
    end(0)  # as the command does
