"""Training on a Ray cluster, by Ray Train: the only file of this package that imports ray.

Every worker calls the same `train.fit` as any other launcher; Ray places the processes and connects them. When one
dies, Ray ends the others and starts all anew, on the machines that are left or have come, and the run goes on from its
last state. The run's folder and a local DATA must lie where all machines see them.

Ray takes every error for a failure that a new start may mend. An error meant for the user is one only when a second
start says the same words, so the workers leave them with an actor; those of a peer's death do not come twice. By the
same actor a SIGTERM, SIGUSR1 or Ctrl-C of the command reaches the workers: they save and leave, and it ends with 75
(130 for Ctrl-C).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import sys
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or all that a worker says is said twice
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a worker stands where the command was given, see `_work`

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from musicgen import heap, settings
from musicgen.errors import UserError
from training import launch
from training.config import TrainConfig
from training.launch import EXIT_INTERRUPTED, EXIT_REQUEUE


class _Words:
    """What passes between command and workers: their errors' words, by the start (an id of its own each) in which they
    were said, and the signal that asks them to leave."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.final = ""
        self.latest = ""
        self.asked = 0
        self.left = 0

    def say(self, start: str, text: str) -> None:
        if self.said.setdefault(text, start) != start:
            self.final = text
        self.latest = text

    def read(self) -> tuple[str, str]:
        """(what a new start would only say again, what was said last)."""
        return self.final, self.latest

    def ask(self, number: int) -> None:
        """Pass a signal on to the workers."""
        self.asked = number

    def signal(self) -> int:
        """The signal that was passed on, 0 for none."""
        return self.asked

    def leave(self, code: int) -> None:
        """The state is saved, the workers leave; the command ends with this code."""
        self.left = code

    def has_left(self) -> int:
        """The exit code of workers that left because they were asked to, 0 where they did not."""
        return self.left


def fit(config: TrainConfig) -> Path:
    """Train or go on, on the cluster at `config.ray.address`; returns the run's folder.

    Raises:
        SystemExit: with `EXIT_REQUEUE`, when a signal asked the run to leave and its state is saved; with
            `EXIT_INTERRUPTED` where that was Ctrl-C.
        UserError: what a worker said twice, no cluster there, too few machines, more failures than allowed.
    """
    address, run = config.ray.address, Path(config.run).resolve()
    _connect(address, config.hardware.world * config.ray.cpus)
    try:
        use_gpu = _uses_gpu(config)
        config = dataclasses.replace(
            config,
            run=str(run),
            hardware=dataclasses.replace(config.hardware, accelerator="gpu" if use_gpu else "cpu"),
        )
        return _fit(config, run, use_gpu)
    finally:
        ray.shutdown()


def _fit(config: TrainConfig, run: Path, use_gpu: bool) -> Path:
    from training.strategy import process_group_backend

    # Beside the command: it has to outlive every machine of the workers.
    beside: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    words: Any = ray.remote(num_cpus=0, scheduling_strategy=beside)(_Words).remote()
    # A start that finds no room gives up after a minute and is tried again. Ray's news of every second is noise; what
    # matters is said by the run, and by the last error. (Types know only the elder of Ray's two configurations.)
    again: Any = {"max_failures": config.ray.restarts, "controller_failure_limit": config.ray.wait_minutes}
    more: Any = {
        "failure_config": ray.train.FailureConfig(**again),
        "logging_config": ray.train.LoggingConfig(log_level="ERROR"),
        # Ray trains in a thread; with one arena the setting of `heap.keep_freed` is the thread's too.
        "worker_runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "1"}},
    }
    run.parent.mkdir(parents=True, exist_ok=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": settings.to_dict(config), "words": words, "folder": os.getcwd()},
        torch_config=TorchConfig(backend=process_group_backend(config.hardware)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.hardware.world,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.ray.cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # Beside the run: Ray checks by a file there that all machines see the same disk.
            name=f".{run.name}.ray",
            storage_path=str(run.parent),
            **more,
        ),
    )
    try:
        _fitted(trainer, words)
    except ray.train.TrainingFailedError as error:
        _, latest = ray.get(words.read.remote())
        print(error, file=sys.stderr)
        raise UserError(
            latest
            or f"training on Ray failed more than --ray.restarts {config.ray.restarts} times, or found no room within "
            f"--ray.wait_minutes {config.ray.wait_minutes} ({str(error).strip().splitlines()[-1][:300]}). The states "
            "are kept: run the same command again to go on"
        ) from error
    finally:
        shutil.rmtree(run.parent / f".{run.name}.ray", ignore_errors=True)
    final, _ = ray.get(words.read.remote())
    if final:
        raise UserError(final)
    if code := ray.get(words.has_left.remote()):
        raise SystemExit(code)
    return run


def _fitted(trainer: Any, words: Any) -> None:
    """`trainer.fit()` in a thread of its own, where Ray takes no signal for itself; this one hears them.

    The first SIGTERM, SIGUSR1 or Ctrl-C goes to the workers. The next does what it did before, so that a command that
    still waits for machines can be ended.
    """
    asked: list[int] = []
    ended: Future[Any] = Future()

    def fit() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:
            ended.set_exception(error)

    def hear(number: int, _: Any) -> None:
        restore()
        asked.append(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, hear) for number in launch.heard()}
    told = False
    try:
        threading.Thread(target=fit, daemon=True).start()
        while not wait([ended], timeout=0.2).done:
            if asked and not told:
                told = True
                ray.get(words.ask.remote(asked[0]))
                print(
                    f"{signal.Signals(asked[0]).name}: the workers save after their next steps and leave; once more "
                    "ends this command at once",
                    flush=True,
                )
    finally:
        restore()
    ended.result()


class _Asked:
    """The signal that the command got, read every second beside the training."""

    def __init__(self, words: Any) -> None:
        self.number = 0
        self.words, self.over = words, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self) -> int:
        return self.number

    def _watch(self) -> None:
        while not self.over.wait(1.0) and not self.number:
            self.number = ray.get(self.words.signal.remote())


def _work(given: dict[str, Any]) -> None:
    """What one worker does: `train.fit` as the process that Ray made of it."""
    from pytorch_lightning.utilities import rank_zero_only

    from training import train

    told: Any = rank_zero_only
    heap.keep_freed()

    words, start = given["words"], os.environ["MASTER_ADDR"] + ":" + os.environ["MASTER_PORT"]
    if ray.get(words.read.remote())[0]:
        return
    if Path(given["folder"]).is_dir():
        os.chdir(given["folder"])
    config = settings.from_dict(TrainConfig, given["config"])
    hardware = dataclasses.replace(config.hardware, devices=1, nodes=1)
    asked = _Asked(words)
    try:
        launched = dataclasses.replace(_launched(), asked=asked)
        told.rank = launched.rank
        train.fit(dataclasses.replace(config, hardware=hardware), launched)
    except UserError as error:
        ray.get(words.say.remote(start, str(error)))
        raise
    except SystemExit as left:
        if left.code not in (EXIT_REQUEUE, EXIT_INTERRUPTED):
            raise
        ray.get(words.leave.remote(left.code))  # a worker that ends otherwise would be started again
    finally:
        asked.over.set()


def _launched() -> launch.Launched:
    """This worker among the others, as Ray's context says.

    Raises:
        UserError: Ray placed different numbers of workers on its machines.
    """
    import torch.distributed as dist
    from ray.train.lightning import RayLightningEnvironment

    context = ray.train.get_context()
    world, local = context.get_world_size(), context.get_local_world_size()
    counts: list[Any] = [local]
    if world > 1:
        counts = [None] * world
        dist.all_gather_object(counts, local)
    if len(set(counts)) > 1:
        raise UserError(
            f"Ray placed {max(counts)} workers on one machine and {min(counts)} on another; every machine needs as "
            f"many: give a number of GPUS ({world} now) that fills whole machines"
        )
    return launch.Launched(
        "Ray",
        context.get_world_rank(),
        context.get_local_rank(),
        world,
        local,
        environment=RayLightningEnvironment(),
        device=ray.train.torch.get_device(),
    )


def _connect(address: str, cores: int) -> None:
    """Join the cluster, or start one of `cores` here."""
    options: dict[str, Any] = {"address": address}
    if address == "local":
        options |= {"num_cpus": cores, "include_dashboard": False}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "://" not in host:  # Ray itself asks for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"RAY={address!r} could not be reached: {error}. Give `auto` on a machine of the cluster, host:port "
            "(6379 as a rule) of its head, or `local` to start one here"
        ) from error


def _uses_gpu(config: TrainConfig) -> bool:
    """Whether workers get GPUs: the driver's machine may have none. Says so where the cluster is too small yet."""
    have, world = ray.cluster_resources(), config.hardware.world
    wanted = config.hardware.accelerator
    use_gpu = wanted == "gpu" or (wanted == "auto" and have.get("GPU", 0) > 0)
    kind, needed = ("GPU", world) if use_gpu else ("CPU", world * config.ray.cpus)
    if have.get(kind, 0) < needed:
        lack = f"the Ray cluster has {have.get(kind, 0):g} {kind}s, {world} workers need {needed}"
        if config.ray.address == "local":
            raise UserError(f"{lack}; lower GPUS, or set --hardware.accelerator cpu")
        print(f"waiting   {lack}; up to {config.ray.wait_minutes} minutes for machines to join", flush=True)
    return use_gpu
