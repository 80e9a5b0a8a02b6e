"""Who started this process, and which one it is among the others: torchrun, Slurm's srun, a Ray worker, or the user.

A launcher decides how many processes run where, so its word replaces `hardware.devices` and `hardware.nodes`; where the
two contradict each other the run stops in words. Without a launcher Lightning starts the processes of this machine.

Here is also what asks a process to leave, and how one that trains ends: at once, with its own code, the first one
speaking for all.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from musicgen import settings
from musicgen.errors import UserError
from training.strategy import HardwareConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a machine that is taken away; Slurm, some minutes before its limit
FIRST = "MUSICGEN_FIRST_PROCESS"
EXIT_REQUEUE = 75  # asked to leave: the state is saved, run the same command again (EX_TEMPFAIL of sysexits.h)
EXIT_INTERRUPTED = 130  # Ctrl-C, in the words of shells: 128 and the number of SIGINT


class SharedError(UserError):
    """What all processes of a training raise at the same step: the first one tells it, the others end quietly.

    Lightning kills those that it started together as soon as one of them ends with an error, and the first one may
    still have its record to close.
    """


def end_with_the_first(launched: Launched) -> None:
    """Let the kernel end this process together with the first one of its machine, where that one started it (Linux).

    A process inside a collective of NCCL hears of no other one's end, and would keep its GPU until a time limit. The
    first one leaves its number in the environment, so that no other parent is taken for it.
    """
    if launched.by:
        return
    if launched.local_rank == 0:
        os.environ[FIRST] = str(os.getpid())
    elif sys.platform == "linux" and os.environ.get(FIRST) == str(os.getppid()):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(main: Any) -> NoReturn:
    """`settings.run` for a process that trains: once its work is written it ends at once, with its own code.

    Processes that talk, write states and read tables hold threads of gloo, NCCL, Arrow and torch. One that still wants
    Python while the interpreter is taken down aborts the process (134, where a launcher sees a failed rank) or keeps it
    standing, after work that is done; and a thread that waits for a peer that is gone would be waited for.
    """
    code: Any = 1
    try:
        settings.run(main)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    end(code)


def end(code: int) -> NoReturn:
    """End this process after what was registered for its exit, without taking the interpreter down."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


@contextmanager
def outside_steps() -> Iterator[None]:
    """Inside, a signal of `SIGNALS` ends the process at once with `EXIT_REQUEUE` unless the training listens itself.

    While data and model are loaded there is nothing to save. Afterwards all signals do again what they did before,
    Ctrl-C too, which Lightning leaves unheard once it was pressed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: Any) -> None:
        if not any(os.environ.get(name, "0") != "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")):
            said = f"left      asked by {signal.Signals(number).name} outside the steps: nothing is lost, run the same"
            os.write(1, f"{said} command again to go on\n".encode())  # print may be what the signal came into
        raise SystemExit(EXIT_REQUEUE)

    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    for number in SIGNALS:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that Python did not install
                signal.signal(number, handler)


def was_interrupted(error: BaseException) -> bool:
    """Whether it was Ctrl-C that ended a training; Lightning makes an exit with code 1 of it."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def heard() -> list[int]:
    """The signals that ask a training to leave; Ctrl-C is none where a shell has started it in the background."""
    return [n for n in (*SIGNALS, signal.SIGINT) if n != signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]


class AskedToLeave:
    """Part of a callback that listens to signals while it trains: after Lightning, whose own answer saves nothing.

    SIGTERM, SIGUSR1 and a first Ctrl-C are written down; a second Ctrl-C does what it did before.

    Attributes:
        asked: number of the signal that came, 0 for none.
        speaks: whether this process answers Ctrl-C on the terminal.
    """

    def __init__(self) -> None:
        self.asked, self.speaks = 0, True
        self._before: dict[int, Any] = {}

    def listen_to_signals(self) -> None:
        """From now on write down what comes; Python hears signals in its main thread alone."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in heard()}

    def _ask(self, number: int, _: Any) -> None:
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(number, self._before.pop(number))
            if self.speaks:  # print may be what the signal came into
                os.write(2, b"\ninterrupted: saving after this step, then leaving; Ctrl-C once more leaves at once\n")

    def exit_code(self) -> int:
        """Of a process that left because it was asked to."""
        return EXIT_INTERRUPTED if self.asked == signal.SIGINT else EXIT_REQUEUE

    def restore_signals(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@dataclass(frozen=True)
class RayConfig:
    """Training on a Ray cluster instead of in this process.

    Args:
        address: `auto` for the cluster of this machine, host:port for another, `local` starts one here; empty trains
            without Ray. `hardware.devices` x `hardware.nodes` is then the number of workers, wherever Ray places them.
        restarts: failures of workers that a run outlives; each goes on from the last state.
        cpus: cores that each worker reserves.
        wait_minutes: how long to wait, in all, for the cluster to have room for the workers.
    """

    address: str = ""
    restarts: int = 5
    cpus: int = 1
    wait_minutes: int = 60

    def __post_init__(self) -> None:
        for name, least in (("restarts", 0), ("cpus", 1), ("wait_minutes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"ray.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class Launched:
    """One process among those that train together.

    Attributes:
        by: who started it; empty where that was the user or Lightning.
        rank: its number among all.
        local_rank: its number on this machine.
        world: how many there are; 0 where the settings decide.
        local_world: how many of them are on this machine.
        environment: how Lightning learns of the others; None leaves Lightning's choice.
        device: where it computes; None takes the GPU numbered as the local rank.
        asked: number of a signal that reached another process and asks this one to leave, 0 for none; None where all
            signals come here.
    """

    by: str = ""
    rank: int = 0
    local_rank: int = 0
    world: int = 0
    local_world: int = 0
    environment: Any = None
    device: Any = None
    asked: Callable[[], int] | None = None


def here(env: Mapping[str, str] = os.environ) -> Launched:
    """What the environment of this process says.

    Raises:
        UserError: Slurm was asked for different numbers of tasks on its machines.
    """
    from pytorch_lightning.plugins.environments import (
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )
    from pytorch_lightning.utilities import rank_zero_only

    def number(name: str) -> int:
        return int(env.get(name) or 0)

    if "TORCHELASTIC_RUN_ID" in env:
        ranks = number("RANK"), number("LOCAL_RANK"), number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE")
        return Launched("torchrun", *ranks, environment=TorchElasticEnvironment())
    # Set by srun alone, for the tasks of a step: a shell or a script inside an allocation is no task.
    if number("SLURM_STEP_NUM_TASKS") > 1:
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "")
        if "," in tasks:
            raise UserError(
                f"Slurm started {tasks} processes on its machines; every machine needs as many: give sbatch --nodes "
                "and --ntasks-per-node, not --ntasks"
            )
        local_world = int(tasks.partition("(")[0])  # "8", or "8(x4)" on four machines
        ranks = number("SLURM_PROCID"), number("SLURM_LOCALID"), number("SLURM_STEP_NUM_TASKS"), local_world
        # Saving and asking to be run again is ours (callbacks.States, infra/train.sbatch).
        return Launched("srun", *ranks, environment=SLURMEnvironment(auto_requeue=False))
    rank = int(getattr(rank_zero_only, "rank", 0) or 0)
    alone = LightningEnvironment() if "SLURM_JOB_ID" in env else None  # Lightning takes any shell of Slurm's for a task
    return Launched("", rank, number("LOCAL_RANK"), environment=alone)


def fitted(hardware: HardwareConfig, launched: Launched) -> HardwareConfig:
    """The settings with the processes that the launcher started.

    Raises:
        UserError: the settings name other numbers, the machines have different ones, or there are several and nobody
            started processes on them.
    """
    if not launched.by:
        if hardware.nodes > 1:
            raise UserError(
                f"--hardware.nodes is {hardware.nodes}, but this process was started alone and would wait for the "
                "others: start the command on every machine by torchrun or srun (see infra/README.md) or by Ray "
                "(--ray.address), or leave --hardware.nodes out"
            )
        return hardware
    nodes, rest = divmod(launched.world, launched.local_world)
    if rest:
        raise UserError(
            f"{launched.by} started {launched.world} processes, {launched.local_world} of them on this machine; "
            "every machine needs as many"
        )
    for name, given, found in (
        ("devices", hardware.devices, launched.local_world),
        ("nodes", hardware.nodes, nodes),
    ):
        if given not in (1, found):
            raise UserError(
                f"--hardware.{name} is {given}, but {launched.by} started {launched.local_world} processes on each of "
                f"{nodes} machines; leave --hardware.{name} out (GPUS, on the make line): the launcher decides"
            )
    return replace(hardware, devices=launched.local_world, nodes=nodes)
