"""Where the time of a run goes: audio per second, the share outside the model, seconds per phase, MFU, a trace.

`Stopwatch` times windows of steps from outside, `Phases` takes one step apart from inside. Phases lie end to end, so
that with the wait for data they add up to the step: `text` is the frozen encoder, `forward` the model and the loss,
`backward` the gradients with all traffic that does not hide behind them, `optimizer` clipping, update and average.
On a GPU the marks are events in its queue, read when a line is logged: nothing waits in between. Which part of
`forward` and `backward` is `communication` says `training.traffic`.
"""

from __future__ import annotations

import errno
import gzip
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from musicgen import files
from musicgen.errors import UserError
from training import folder as folder_of
from training.traffic import mark, passed


class Phases:
    """Seconds of one step by phase: `begin`, then `mark` at the end of each stretch; the same phase adds up."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any]] = []
        self._on_gpu = False

    def begin(self, device: torch.device | None = None) -> None:
        """Start a new step, computed on `device`."""
        self._on_gpu = device is not None and device.type == "cuda"
        self._marks = [("", mark(self._on_gpu))]

    def mark(self, phase: str) -> None:
        """What has passed since the last mark was `phase`; an empty one counts for nothing."""
        if self._marks:
            self._marks.append((phase, mark(self._on_gpu)))

    def read(self) -> dict[str, float]:
        """Seconds by phase of the step that was begun last."""
        if self._on_gpu and self._marks:
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:]):
            if phase:
                found[phase] = found.get(phase, 0.0) + passed(before, after)
        return found


class Stopwatch(pl.Callback):
    """Times the batches: how much audio per second, and which share of the time passes outside the model.

    Outside is all that lies between the end of one batch and the start of the next: waiting for data, Lightning, and
    the callbacks' bookkeeping. Validation, clips and states are taken out by `pause`: they happen once in a while and
    are no part of a step.

    Args:
        step_flop: model FLOP of a step on all ranks.
        peak: FLOP per second that all ranks could make; None where it is not known.
        loader: has `waited`, seconds in which the loop waited for batches.
    """

    def __init__(self, step_flop: float = 0.0, peak: float | None = None, loader: Any = None) -> None:
        self.step_flop, self.peak, self.loader = step_flop, peak, loader
        self.reset(0.0, 0)

    def reset(self, audio_seconds: float, step: int) -> None:
        """Start a new window at this many seconds of audio seen and steps made."""
        self.begin = self.mark = time.perf_counter()
        self.outside = self.paused = 0.0
        self.audio_begin, self.step_begin = audio_seconds, step
        self.waited_begin = getattr(self.loader, "waited", 0.0)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.reset(module.progress.audio_seconds_seen, module.progress.step)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.outside += time.perf_counter() - self.mark

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.mark = time.perf_counter()

    def finish(self, device: torch.device) -> None:
        """Wait for what a GPU still has to compute of the last batch: that is no bookkeeping."""
        if device.type == "cuda":
            began = time.perf_counter()
            torch.cuda.synchronize(device)
            self.mark += time.perf_counter() - began

    def pause(self, since: float) -> None:
        """Leave the time since `since` (of `time.perf_counter`) out."""
        gone = time.perf_counter() - since
        self.paused += gone
        self.mark += gone

    def read(self, audio_seconds: float, step: int) -> dict[str, float]:
        """Figures of the window up to here, after a batch and before the next: a mean over its steps."""
        now = time.perf_counter()
        wall = max(now - self.begin - self.paused, 1e-9)
        outside = self.outside + now - self.mark
        steps = max(step - self.step_begin, 1)
        figures = {
            "train/audio_seconds_per_second": (audio_seconds - self.audio_begin) / wall,
            "train/outside_model_share": min(outside / wall, 1.0),
            "seconds/step": wall / steps,
            "seconds/data": (getattr(self.loader, "waited", 0.0) - self.waited_begin) / steps,
        }
        if self.peak and self.step_flop:
            figures["train/mfu"] = self.step_flop * steps / wall / self.peak
        return figures


class Profile(pl.Callback):
    """A trace of some steps, for Perfetto, and a table of what took longest, in the run's `profile/`.

    Where the disk does not take them the training goes on without.

    Args:
        folder: where they go.
        first: first step in the trace, counted from 1; 0 makes none.
        steps: how many steps.
    """

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self.folder, self.first, self.steps = folder, first, steps
        self.profiler: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if self.first and module.progress.step >= self.first:
            if trainer.global_rank == 0:
                made = f"{module.progress.step} are made; give a later one"
                print(f"profile   none: it was to begin at step {self.first} (log.profile_at), and {made}", flush=True)
            self.first = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        module = pl_module
        if self.first and self.profiler is None and module.progress.step == self.first - 1:
            self.profiler = torch.profiler.profile()  # the CPU and, where there is one, the GPU
            self.profiler.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        module = pl_module
        if self.profiler is not None and module.progress.step >= self.first - 1 + self.steps:
            self._write(trainer.global_rank)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.profiler is not None:
            self._write(trainer.global_rank)
        elif self.first and trainer.global_rank == 0:
            print(f"profile   none: it was to begin at step {self.first} (log.profile_at)", flush=True)

    def _write(self, rank: int) -> None:
        profiler, stem = self.profiler, self.folder / f"step-{self.first:07d}-rank-{rank}"
        self.profiler, self.first = None, 0
        profiler.stop()
        try:
            write_profile(profiler, stem)
        except (OSError, UserError) as error:
            why = folder_of.refused_by_disk(error)
            print(f"warning   the profile could not be written to {self.folder}: {why}; training goes on", flush=True)
            return
        if rank == 0:
            print(f"profile   {stem}.json.gz, for ui.perfetto.dev; what took longest: {stem}.txt", flush=True)


def write_profile(profiler: Any, stem: Path) -> None:
    """Write a stopped profiler's trace to `stem`.json.gz and its table to `stem`.txt: both whole, or none.

    Raises:
        OSError, UserError: the disk does not take them.
    """
    trace = stem.with_suffix(".json.gz")
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        if not plain.is_file():  # the profiler writes whole or not at all, and raises nothing
            raise OSError(errno.ENOSPC, f"no room in {tempfile.gettempdir()}, where a trace is made")
        with plain.open("rb") as whole, files.writing(str(trace)) as file, gzip.open(file, "wb") as packed:
            shutil.copyfileobj(whole, packed)
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=40)
    try:
        files.write_bytes(stem.with_suffix(".txt"), f"{table}\n".encode())
    except UserError:
        trace.unlink(missing_ok=True)
        raise
