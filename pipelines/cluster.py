"""Tracks through Ray: the only file that imports it.

CPU workers prepare micro-batches (decode, checks, resample, analysis, chroma), codec workers turn them into codes; the
audio between them rests in Ray's object store and the results go to the work folder. Both counts in flight are bounded,
so a slow codec holds decoding back and memory stays flat. Each worker asks for half a core: on every core one of each
kind takes turns, and the operating system keeps the core busy whatever their ratio is. Both kinds are actors, because
Ray ends idle task workers within a second, and each new one would spend several core-seconds on imports.

A worker that dies takes its micro-batch with it; the batch's tracks are then tried one by one, and the one that kills
its worker again is rejected as `crash`. A full disk ends the run with its message.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 would let any other program starve the workers

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from musicgen.errors import UserError
from pipelines import stages
from pipelines.audio import Decoder
from pipelines.stages import Job, Prepared, Result, TrackSettings
from pipelines.store import Place

ATTEMPTS = 2  # for a track whose worker died
START_ATTEMPTS = 3
START_SECONDS = 900


@dataclass(frozen=True)
class RunConfig:
    """How a run uses the machine; no part of a data set's identity.

    Args:
        cores: cores of the local Ray; 0 means all.
        address: an existing Ray cluster to work on (`auto` or host:port); empty starts a local one.
        codec_actors: processes that encode, one thread each; 0 means one per core.
        workers: processes that prepare tracks for the codec; 0 means one per core.
        batch: tracks per micro-batch.
        object_store_mb: shared memory of a local Ray.
        retry: reject codes to try again although their sources are unchanged, such as `timeout`.
    """

    cores: int = 0
    address: str = ""
    codec_actors: int = 0
    workers: int = 0
    batch: int = 2
    object_store_mb: int = 512
    retry: list[str] = field(default_factory=list)


@dataclass
class Timing:
    """Wall-clock facts of a run.

    Attributes:
        start_seconds: starting Ray and its workers, before the first track could begin.
        completions: (seconds since the workers were ready, audio seconds) of every finished track.
    """

    start_seconds: float = 0.0
    completions: list[tuple[float, float]] = field(default_factory=list)

    def steady_rate(self) -> float:
        """Audio-seconds per second between 10 % and 90 % of the tracks; of the whole when they are few."""
        done = sorted(self.completions)
        if not done:
            return 0.0
        low, high = (len(done) // 10, len(done) * 9 // 10) if len(done) >= 20 else (0, len(done))
        began = done[low - 1][0] if low else 0.0
        span = done[high - 1][0] - began
        return sum(seconds for _, seconds in done[low:high]) / span if span > 0 else 0.0


def start(run: RunConfig) -> float:
    """Connect to Ray, or start it on this machine; returns the seconds it took (0 when it was there already)."""
    if ray.is_initialized():
        return 0.0
    began = time.monotonic()
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if run.address:
        options["address"] = run.address
    else:
        # every child process inherits these: one thread per worker, as the plan of one process per core asks
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        options["num_cpus"] = run.cores or available_cores()
        options["object_store_memory"] = run.object_store_mb * 2**20
        options["include_dashboard"] = False
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(**options)
            break
        except Exception as error:  # Ray raises bare Exceptions when a busy machine is slower than its own limits
            ray.shutdown()
            if run.address or attempt == START_ATTEMPTS - 1:
                where = f"at run.address={run.address!r}" if run.address else "on this machine"
                raise UserError(f"Ray could not be reached {where}: {error}") from error
    return time.monotonic() - began


def stop() -> None:
    """Disconnect; ends a Ray that was started here."""
    _pools.clear()
    ray.shutdown()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


class _Preparer:
    """Everything before the codec, in a process of its own; the decoding child lives as long as it does."""

    def __init__(self) -> None:
        _one_thread()
        self.decoder: Decoder | None = None

    def ready(self) -> str:
        return ""

    def run(self, jobs: list[Job], settings: TrackSettings, work: Place) -> tuple[list[str], list[Prepared]]:
        """A micro-batch; rejects are saved here. Returns (ids of the rejects, tracks for the codec)."""
        limits, longest = settings.decode, settings.checks.max_seconds
        if self.decoder is None or (self.decoder.limits, self.decoder.max_seconds) != (limits, longest):
            if self.decoder is not None:
                self.decoder.close()
            self.decoder = Decoder(limits, longest)
        finished, prepared = [], []
        for job in jobs:
            outcome = stages.prepare(job, settings, self.decoder)
            if isinstance(outcome, Result):
                stages.save(work, job.work_id, outcome)
                finished.append(job.work_id)
            else:
                prepared.append(outcome)
        return finished, prepared


class _Encoder:
    """A codec in a process of its own; every call depends on its own tracks alone."""

    def __init__(self, codec: str) -> None:
        _one_thread()
        self.codec = stages.load_codec(codec)

    def ready(self) -> str:
        return self.codec.identity

    def run(self, batch: list[Prepared], work: Place) -> list[tuple[str, float]]:
        """Encode and save; returns (work id, audio seconds) per track."""
        for prepared in batch:
            stages.save(work, prepared.job.work_id, stages.encode(prepared, self.codec))
        return [(p.job.work_id, p.seconds) for p in batch]


_RemotePreparer: Any = ray.remote(num_cpus=0.5, max_restarts=0)(_Preparer)
_RemoteEncoder: Any = ray.remote(num_cpus=0.5, max_restarts=0)(_Encoder)


class _Pool:
    """Workers of one kind. Each has at most two batches: one in work and one behind it, so that none waits for us."""

    DEPTH = 2

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.actors: list[Any] = []
        self.running: dict[Any, tuple[list[Job], Any, bool]] = {}

    def grow(self, count: int) -> list[str]:
        """Have at least `count` workers and wait until all are ready; returns what they say."""
        self.actors += [self.make() for _ in range(count - len(self.actors))]
        try:
            return ray.get([actor.ready.remote() for actor in self.actors], timeout=START_SECONDS)
        except GetTimeoutError as error:
            raise UserError(
                f"Ray gave no room for {count} workers of half a core each within {START_SECONDS} s; wait until other "
                "work on the cluster has ended, or ask for less with run.codec_actors and run.workers"
            ) from error

    def free(self, alone: bool) -> Any:
        """A worker that can take a batch (one that must be alone: an idle worker); None when all are busy."""
        load = dict.fromkeys(map(id, self.actors), 0)
        for _, actor, is_alone in self.running.values():
            load[id(actor)] = load.get(id(actor), 0) + (self.DEPTH if is_alone else 1)
        actor = min(self.actors, key=lambda a: load[id(a)])
        return actor if load[id(actor)] < (1 if alone else self.DEPTH) else None

    def submit(self, actor: Any, batch: list[Job], alone: bool, outputs: int, *arguments: Any) -> list[Any]:
        """Give a worker a batch; returns the references of its outputs, the first of which `running` knows."""
        refs = actor.run.options(num_returns=outputs).remote(*arguments)
        refs = refs if outputs > 1 else [refs]
        self.running[refs[0]] = (batch, actor, alone)
        return refs

    def take(self, ref: Any) -> tuple[list[Job], Any, RayError | None]:
        """The finished batch of a reference: its jobs, what came back, and the error; a dead worker is replaced."""
        batch, actor, _ = self.running.pop(ref)
        try:
            return batch, ray.get(ref), None
        except RayError as error:
            if isinstance(error, RayActorError) and actor in self.actors:
                self.actors[self.actors.index(actor)] = self.make()
            return batch, None, error


_pools: dict[tuple[str, str], _Pool] = {}  # started once; a second pass of a run finds its workers warm


class _Run:
    """One pass over the jobs: what is waiting, being prepared, prepared, and being encoded."""

    def __init__(
        self, settings: TrackSettings, work: Place, run: RunConfig, done: Callable[[int, float], None]
    ) -> None:
        self.settings, self.work, self.run, self.done = settings, work, run, done
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        spread = {"scheduling_strategy": "SPREAD"}
        name, identity = settings.codec, settings.codec_identity
        self.preparers = _pools.setdefault(("", ""), _Pool(lambda: _RemotePreparer.options(**spread).remote()))
        self.encoders = _pools.setdefault(
            (name, identity), _Pool(lambda: _RemoteEncoder.options(**spread).remote(name))
        )
        for pool in (self.preparers, self.encoders):
            pool.running.clear()  # what an earlier pass of this process left behind when it failed
        for said in self.encoders.grow(run.codec_actors or cores):
            if said != identity:
                del _pools[name, identity]
                raise UserError(
                    f"codec {name!r} is another one on a worker ({said[:12]}) than here ({identity[:12]}); "
                    "every machine of the cluster needs the same files"
                )
        self.preparers.grow(run.workers or cores)
        self.waiting: deque[list[Job]] = deque()
        self.audio: dict[Any, Any] = {}
        self.prepared: deque[tuple[list[Job], Any]] = deque()
        self.attempts: dict[str, int] = {}
        self.began = time.monotonic()
        self.timing = Timing()

    def loop(self, jobs: Sequence[Job]) -> Timing:
        size = max(1, self.run.batch)
        self.waiting.extend(list(jobs[i : i + size]) for i in range(0, len(jobs), size))
        while self.waiting or self.prepared or self.preparers.running or self.encoders.running:
            self._feed()
            ready, _ = ray.wait([*self.encoders.running, *self.preparers.running], num_returns=1, timeout=10.0)
            for ref in ready:
                self._collect(ref)
        return self.timing

    def _feed(self) -> None:
        # A track that has been in a dying process before is alone in its worker, so that no other pays for it.
        while self.prepared:
            batch, audio = self.prepared[0]
            actor = self.encoders.free(alone := self._suspect(batch))
            if actor is None:
                break
            self.prepared.popleft()
            self.encoders.submit(actor, batch, alone, 1, audio, self.work)
        room = 2 * len(self.encoders.actors)  # prepared batches that may wait; more would only fill memory
        while self.waiting and len(self.prepared) + len(self.preparers.running) < room + len(self.preparers.actors):
            actor = self.preparers.free(alone := self._suspect(self.waiting[0]))
            if actor is None:
                break
            batch = self.waiting.popleft()
            finished, audio = self.preparers.submit(actor, batch, alone, 2, batch, self.settings, self.work)
            self.audio[finished] = audio

    def _suspect(self, batch: list[Job]) -> bool:
        return any(job.work_id in self.attempts for job in batch)

    def _collect(self, ref: Any) -> None:
        if ref in self.encoders.running:
            batch, encoded, error = self.encoders.take(ref)
            now = time.monotonic() - self.began
            for _, seconds in encoded or []:
                self.timing.completions.append((now, seconds))
                self.done(1, seconds)
        else:
            audio = self.audio.pop(ref)
            batch, finished, error = self.preparers.take(ref)
            rest = [job for job in batch if job.work_id not in (finished or [])]
            if error is None:
                self.done(len(batch) - len(rest), 0.0)
                if rest:
                    self.prepared.append((rest, audio))
        if error is not None:
            self._lost(batch, error)

    def _lost(self, batch: list[Job], error: RayError) -> None:
        """A micro-batch that ended with an error: its tracks alone, then rejects; other errors are raised."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            raise error.cause from None
        if not isinstance(error, WorkerCrashedError | RayActorError | OutOfMemoryError | ObjectLostError):
            raise error
        code = "oom" if isinstance(error, OutOfMemoryError) else "crash"
        for job in batch:
            self.attempts[job.work_id] = self.attempts.get(job.work_id, 0) + (len(batch) == 1)
            if self.attempts[job.work_id] < ATTEMPTS:
                self.waiting.appendleft([job])
            else:
                message = f"its worker died {ATTEMPTS} times: {type(error).__name__}"
                stages.save(self.work, job.work_id, stages.rejected("worker", code, message))
                self.done(1, 0.0)


def process(
    jobs: Sequence[Job],
    settings: TrackSettings,
    work: Place,
    run: RunConfig,
    done: Callable[[int, float], None] = lambda tracks, seconds: None,
) -> Timing:
    """Bring every job to a result in the work folder.

    Args:
        jobs: what to do; longest first keeps the end short.
        settings: for every track.
        work: folder of the results.
        done: called with (tracks, audio seconds) as they are finished.

    Raises:
        UserError: nothing can be written, the codec cannot be loaded, Ray cannot be reached.
    """
    began = time.monotonic()
    start(run)
    try:
        one_pass = _Run(settings, work, run, done)
        timing = one_pass.loop(jobs)
    except RayActorError as error:
        raise UserError(f"a worker could not start: {error}") from error
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    timing.start_seconds = one_pass.began - began
    return timing
