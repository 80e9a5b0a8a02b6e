"""Tracks through Ray: the only file that imports it.

CPU tasks prepare micro-batches (decode, checks, resample, analysis, chroma), codec actors turn them into codes; the
audio between them rests in Ray's object store and the results go to the work folder. Both counts in flight are bounded,
so a slow codec holds decoding back and memory stays flat. Tasks and actors ask for half a core each: on every core one
of each takes turns, and the operating system keeps the core busy whatever their ratio is.

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


@dataclass(frozen=True)
class RunConfig:
    """How a run uses the machine; no part of a data set's identity.

    Args:
        cores: cores of the local Ray; 0 means all.
        address: an existing Ray cluster to work on (`auto` or host:port); empty starts a local one.
        codec_actors: processes that encode, one thread each; 0 means one per core.
        batch: tracks per micro-batch.
        in_flight: micro-batches being prepared at once per core.
        object_store_mb: shared memory of a local Ray.
        retry: reject codes to try again although their sources are unchanged, such as `timeout`.
    """

    cores: int = 0
    address: str = ""
    codec_actors: int = 0
    batch: int = 2
    in_flight: int = 2
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
    _encoders.clear()
    ray.shutdown()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_decoder: Decoder | None = None


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _prepare(jobs: list[Job], settings: TrackSettings, work: Place) -> tuple[list[str], list[Prepared]]:
    """A micro-batch on a CPU worker; rejects are saved here. The decoding child lives as long as the worker."""
    global _decoder
    _one_thread()
    if _decoder is None or _decoder.limits != settings.decode or _decoder.max_seconds != settings.checks.max_seconds:
        if _decoder is not None:
            _decoder.close()
        _decoder = Decoder(settings.decode, settings.checks.max_seconds)
    outcomes = [stages.prepare(job, settings, _decoder) for job in jobs]
    finished = []
    for job, outcome in zip(jobs, outcomes):
        if isinstance(outcome, Result):
            stages.save(work, job.work_id, outcome)
            finished.append(job.work_id)
    return finished, [o for o in outcomes if isinstance(o, Prepared)]


class _Encoder:
    """A codec in a process of its own; every call depends on its own tracks alone."""

    def __init__(self, codec: str) -> None:
        _one_thread()
        self.codec = stages.load_codec(codec)

    def identity(self) -> str:
        return self.codec.identity

    def encode(self, batch: list[Prepared], work: Place) -> list[tuple[str, float]]:
        """Encode and save; returns (work id, audio seconds) per track."""
        for prepared in batch:
            stages.save(work, prepared.job.work_id, stages.encode(prepared, self.codec))
        return [(p.job.work_id, p.seconds) for p in batch]


_remote_prepare: Any = ray.remote(num_cpus=0.5, max_retries=0, num_returns=2)(_prepare)
_RemoteEncoder: Any = ray.remote(num_cpus=0.5, max_restarts=0)(_Encoder)
_encoders: dict[tuple[str, str], list[Any]] = {}  # started once per codec; a second pass of a run finds them warm


class _Run:
    """One pass over the jobs: what is waiting, being prepared, and being encoded."""

    def __init__(
        self, settings: TrackSettings, work: Place, run: RunConfig, done: Callable[[int, float], None]
    ) -> None:
        self.settings, self.work, self.run, self.done = settings, work, run, done
        self.cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.count = run.codec_actors or self.cores
        self.waiting: deque[list[Job]] = deque()
        self.preparing: dict[Any, tuple[list[Job], Any]] = {}
        self.prepared: deque[tuple[list[Job], Any]] = deque()
        self.encoding: dict[Any, tuple[list[Job], Any]] = {}
        self.attempts: dict[str, int] = {}
        self.began = time.monotonic()
        self.timing = Timing()

    def _actor(self) -> Any:
        return _RemoteEncoder.options(scheduling_strategy="SPREAD").remote(self.settings.codec)

    def _start_actors(self) -> list[Any]:
        """As many codec processes as asked for, each with the very codec that the set names."""
        pool = _encoders.setdefault((self.settings.codec, self.settings.codec_identity), [])
        pool += [self._actor() for _ in range(self.count - len(pool))]
        for actor, identity in zip(pool, ray.get([actor.identity.remote() for actor in pool])):
            if identity != self.settings.codec_identity:
                ray.kill(actor)
                pool.remove(actor)
                raise UserError(
                    f"codec {self.settings.codec!r} is another one on a worker ({identity[:12]}) than here "
                    f"({self.settings.codec_identity[:12]}); every machine of the cluster needs the same files"
                )
        return pool

    def loop(self, jobs: Sequence[Job]) -> Timing:
        self.actors = self._start_actors()
        self.began = time.monotonic()
        settings, size = ray.put(self.settings), max(1, self.run.batch)
        self.waiting.extend(list(jobs[i : i + size]) for i in range(0, len(jobs), size))
        while self.waiting or self.preparing or self.prepared or self.encoding:
            self._feed(settings)
            ready, _ = ray.wait([*self.encoding, *self.preparing], num_returns=1, timeout=10.0)
            for ref in ready:
                self._collect(ref)
        return self.timing

    def _feed(self, settings: Any) -> None:
        room = 2 * self.count  # prepared batches that may wait for a codec; more would only fill memory
        while self.waiting and len(self.preparing) < self.run.in_flight * self.cores and len(self.prepared) < room:
            batch = self.waiting.popleft()
            finished, audio = _remote_prepare.remote(batch, settings, self.work)
            self.preparing[finished] = (batch, audio)
        load = {id(actor): 0 for actor in self.actors}
        for batch, actor in self.encoding.values():
            load[id(actor)] = load.get(id(actor), 0) + (2 if self._suspect(batch) else 1)
        while self.prepared:
            batch, audio = self.prepared[0]
            actor = min(self.actors, key=lambda a: load[id(a)])
            # One batch being encoded and one behind it, so that no actor waits for the driver; a track that has been
            # in a dying process before is alone, so that no other pays for it.
            if load[id(actor)] >= (1 if self._suspect(batch) else 2):
                break
            self.prepared.popleft()
            self.encoding[actor.encode.remote(audio, self.work)] = (batch, actor)
            load[id(actor)] += 2 if self._suspect(batch) else 1

    def _suspect(self, batch: list[Job]) -> bool:
        return any(job.work_id in self.attempts for job in batch)

    def _collect(self, ref: Any) -> None:
        if ref in self.preparing:
            batch, audio = self.preparing.pop(ref)
            try:
                finished = set(ray.get(ref))
            except RayError as error:
                self._lost(batch, error)
                return
            for job in batch:
                if job.work_id in finished:
                    self.done(1, 0.0)
            rest = [job for job in batch if job.work_id not in finished]
            if rest:
                self.prepared.append((rest, audio))
            return
        batch, actor = self.encoding.pop(ref)
        try:
            encoded = ray.get(ref)
        except RayError as error:
            if isinstance(error, RayActorError) and actor in self.actors:
                self.actors[self.actors.index(actor)] = self._actor()
            self._lost(batch, error)
            return
        now = time.monotonic() - self.began
        for _, seconds in encoded:
            self.timing.completions.append((now, seconds))
            self.done(1, seconds)

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
        raise UserError(f"a codec process could not start: {error}") from error
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    timing.start_seconds = one_pass.began - began
    return timing
