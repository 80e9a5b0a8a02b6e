"""What happens beside the step: record, validation, clips, states, release, progress bar.

Every callback acts on the number of completed steps, never on a count of its own, so a resumed run does the same at
the same steps. Order matters (record, validate, clips, state): a state of step N implies that all else of step N was
done.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from training import state
from training.data import Batch
from training.module import MusicLMModule
from training.record import Record

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


@dataclass(frozen=True)
class LogConfig:
    """When a run looks at itself; all in completed steps.

    Args:
        every: steps between two lines of training metrics.
        valid_every: steps between two validations.
        state_every: steps between two states to resume from.
        clips_every: steps between two sets of generated clips; 0 makes them at the end only.
        clips: clips of a set; 0 makes none.
        clip_seconds: length of a clip.
        prompts: prompts of the clips; when empty, descriptions of validation tracks.
    """

    every: int = 10
    valid_every: int = 2000
    state_every: int = 2000
    clips_every: int = 10_000
    clips: int = 4
    clip_seconds: float = 10.0
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("valid_every", 1), ("state_every", 1), ("clips_every", 0), ("clips", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"log.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0.1 <= self.clip_seconds <= 300:
            raise ValueError(f"log.clip_seconds is {self.clip_seconds}; it must be 0.1 to 300")


def memory_gib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class EachStep(pl.Callback):
    """Calls `after_step` once per completed step (with accumulation a step has several batches)."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._seen = module.progress.step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        module = pl_module
        if module.progress.step != self._seen:
            self._seen = module.progress.step
            self.after_step(trainer, module, self._seen)

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        """Act after `step` completed steps."""
        raise NotImplementedError

    def due(self, step: int, every: int) -> bool:
        """Whether something done `every` steps is due, the last step included."""
        return step == self.last_step or (every > 0 and step % every == 0)


class Stopwatch(pl.Callback):
    """Times the batches: how much audio per second, and which share of the time passes outside the model.

    Outside is all that lies between the end of one batch and the start of the next: waiting for data, Lightning, and
    the callbacks' bookkeeping. Validation, clips and states are taken out by `pause`: they happen once in a while and
    are no part of a step.
    """

    def __init__(self) -> None:
        self.reset(0.0)

    def reset(self, audio_seconds: float) -> None:
        """Start a new window at this many seconds of audio seen."""
        self.begin = self.mark = time.perf_counter()
        self.outside = self.paused = 0.0
        self.audio_begin = audio_seconds

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.reset(module.progress.audio_seconds_seen)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.outside += time.perf_counter() - self.mark

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.mark = time.perf_counter()

    def pause(self, since: float) -> None:
        """Leave the time since `since` (of `time.perf_counter`) out."""
        gone = time.perf_counter() - since
        self.paused += gone
        self.mark += gone

    def read(self, audio_seconds: float) -> tuple[float, float]:
        """Audio seconds per second and share outside the model since the window began."""
        wall = max(time.perf_counter() - self.begin - self.paused, 1e-9)
        return (audio_seconds - self.audio_begin) / wall, min(self.outside / wall, 1.0)


class Recorder(EachStep):
    """A line of training metrics every `every` steps: the values of that step, not a mean of a window."""

    def __init__(self, record: Record | None, every: int, last_step: int, stopwatch: Stopwatch) -> None:
        super().__init__(last_step)
        self.record, self.every, self.stopwatch = record, every, stopwatch
        self.latest: dict[str, float] = {}

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if not (self.due(step, self.every) or step == 1):
            return
        metrics = module.step_metrics()
        seen = module.progress.audio_seconds_seen
        rate, outside = self.stopwatch.read(seen)
        metrics |= {
            "train/audio_seconds_per_second": rate,
            "train/audio_seconds": seen,
            "train/outside_model_share": outside,
            "train/memory_gib": memory_gib(),
        }
        self.stopwatch.reset(seen)
        self.latest = metrics
        if self.record is not None:
            self.record.log(step, metrics)


class Validation(EachStep):
    """Losses of the averaged weights on the fixed crops; the best ones become the release.

    Args:
        record: where results go, None on ranks other than 0.
        batches: this rank's validation batches; empty when the data set has none.
        every: steps between two validations.
        unigram: loss of a unigram model on the same crops, mean over codebooks, in nats.
        release: writes the release folder from the module (averaged weights in place) and a validation loss.
    """

    def __init__(
        self,
        record: Record | None,
        batches: list[Batch],
        every: int,
        last_step: int,
        unigram: float,
        release: Callable[[MusicLMModule, float | None], None],
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(last_step)
        self.record, self.batches, self.every = record, batches, every
        self.unigram, self.release, self.stopwatch = unigram, release, stopwatch
        self.texts: dict[int, tuple[Tensor, Tensor]] = {}
        self.latest: dict[str, float] = {}

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if not self.due(step, self.every):
            return
        began = time.perf_counter()
        if self.batches:
            metrics = module.validate(self.batches, self.texts)
            metrics["valid/below_unigram"] = self.unigram - metrics["valid/loss"]
            self.latest = metrics
            if self.record is not None:
                self.record.log(step, metrics)
            best = module.progress.best_loss
            if best is None or metrics["valid/loss"] < best:
                module.progress.best_loss, module.progress.best_step = metrics["valid/loss"], step
                self._release(module, metrics["valid/loss"])
        elif step == self.last_step:  # without validation tracks the last average is the release
            self._release(module, None)
        self.stopwatch.pause(began)

    def _release(self, module: MusicLMModule, valid_loss: float | None) -> None:
        if self.record is not None:
            with module.ema.swapped(module.lm):
                self.release(module, valid_loss)


class Clips(EachStep):
    """Generated clips of the averaged weights, with their prompts, in samples/ and in the record.

    Args:
        record: where clips go; None on ranks other than 0.
        config: when, how many, how long.
        prompts: what to ask for.
        make: (module, prompts, seconds, seeds) -> audio `[B, C, N]` and the sample rate in Hz.
    """

    def __init__(
        self,
        record: Record | None,
        config: LogConfig,
        last_step: int,
        prompts: Sequence[str | None],
        make: Callable[[MusicLMModule, Path, str | None, int, float], dict[str, Any]],
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(last_step)
        self.record, self.config, self.prompts = record, config, list(prompts)
        self.make, self.stopwatch = make, stopwatch

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if self.record is None or not self.prompts or not self.due(step, self.config.clips_every):
            return
        began = time.perf_counter()
        folder = self.record.folder / "samples"
        folder.mkdir(exist_ok=True)
        clips = []
        module.lm.eval()
        with module.ema.swapped(module.lm):
            for number, prompt in enumerate(self.prompts):
                path = folder / f"step-{step:07d}-{number}.wav"
                details = self.make(module, path, prompt, number, self.config.clip_seconds)
                details = {"step": step, "prompt": prompt, "file": path.name, **details}
                path.with_suffix(".json").write_text(json.dumps(details, indent=2, ensure_ascii=False) + "\n")
                clips.append((path, prompt or "(no prompt)"))
        module.lm.train()
        self.record.clips(step, clips)
        self.stopwatch.pause(began)


class States(EachStep):
    """A whole state every `every` steps and at the end."""

    def __init__(self, folder: Path | None, every: int, last_step: int, stopwatch: Stopwatch) -> None:
        super().__init__(last_step)
        self.folder, self.every, self.stopwatch = folder, every, stopwatch

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if self.folder is None or not self.due(step, self.every):
            return
        began = time.perf_counter()
        state.save(self.folder, module.lm, module.ema, trainer.optimizers[0], module.progress)
        self.stopwatch.pause(began)


class Bar(EachStep):
    """A rich progress bar, and a printed line per validation so that a log file without a terminal tells it too."""

    def __init__(self, recorder: Recorder, validation: Validation, total_steps: int, last_step: int) -> None:
        super().__init__(last_step)
        self.recorder, self.validation, self.total_steps = recorder, validation, total_steps
        self.bar: RichProgress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().on_train_start(trainer, module)
        if trainer.is_global_zero:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total_steps, completed=module.progress.step)

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if self.bar is None:
            return
        train, valid = self.recorder.latest, self.validation.latest
        text = (
            f"loss {train['train/loss']:.3f}  {train['train/audio_seconds_per_second']:.0f} audio-s/s" if train else ""
        )
        if valid:
            text += f"  valid {valid['valid/loss']:.3f}"
        self.bar.update(self.task, completed=step, description=text)
        if valid and self.validation.due(step, self.validation.every):
            self.bar.console.print(describe(step, train, valid), highlight=False)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self._stop()


def describe(step: int, train: dict[str, float], valid: dict[str, float]) -> str:
    """One line about a validation, the losses of the codebooks in brackets."""
    books = ", ".join(f"{v:.2f}" for k, v in valid.items() if k.startswith("valid/loss_q"))
    below = valid["valid/below_unigram"]
    side = "below" if below >= 0 else "above"
    return (
        f"step {step}: train {train.get('train/loss', float('nan')):.3f}  valid {valid['valid/loss']:.3f} [{books}]  "
        f"{abs(below):.3f} nats {side} unigram"
    )
