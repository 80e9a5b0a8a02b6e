"""What happens beside the step: record, validation, clips, states, release, progress bar.

Every callback acts on the number of completed steps, never on a count of its own, so a resumed run does the same at
the same steps. Order matters (record, validate, clips, state): a state of step N implies that all else of step N was
done.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from musicgen import files
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from training import folder as folder_of
from training import products, state, strategy, traffic
from training.data import Batch
from training.launch import AskedToLeave, SharedError
from training.module import MusicLMModule
from training.record import Record
from training.watch import Stopwatch

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from musicgen.model import MusicGen
    from training.products import Release


@dataclass(frozen=True)
class LogConfig:
    """When a run looks at itself; all in completed steps.

    Args:
        every: steps between two lines of training metrics.
        valid_every: steps between two validations.
        state_every: steps between two states to resume from, the last step included; 0 writes none but on a signal.
        state_keep: newest states that stay, beside the best validation's.
        state_keep_every: steps between states that stay for good; 0 keeps none.
        state_background: write states beside the training; `auto` does where there is memory for a copy.
        clips_every: steps between two sets of generated clips; 0 makes them at the end only.
        clips: clips of a set; 0 makes none.
        clip_seconds: length of a clip.
        prompts: prompts of the clips; when empty, descriptions of validation tracks.
        profile_at: first step of a trace in the run's `profile/`; 0 makes none.
        profile_steps: steps of the trace.
    """

    every: int = 10
    valid_every: int = 2000
    state_every: int = 2000
    state_keep: int = 2
    state_keep_every: int = 0
    state_background: Literal["auto", "on", "off"] = "auto"
    clips_every: int = 10_000
    clips: int = 4
    clip_seconds: float = 10.0
    prompts: tuple[str, ...] = ()
    profile_at: int = 0
    profile_steps: int = 3

    def __post_init__(self) -> None:
        least_of = {"every": 1, "valid_every": 1, "state_every": 0, "state_keep": 1, "state_keep_every": 0}
        least_of |= {"clips_every": 0, "clips": 0, "profile_at": 0, "profile_steps": 1}
        for name, least in least_of.items():
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


class Recorder(EachStep):
    """A line of training metrics every `every` steps: losses and phases of that step, speeds of the steps since the
    last line."""

    def __init__(self, record: Record | None, every: int, last_step: int, stopwatch: Stopwatch) -> None:
        super().__init__(last_step)
        self.record, self.every, self.stopwatch = record, every, stopwatch
        self.latest: dict[str, float] = {}

    def wanted(self, step: int) -> bool:
        """Whether the figures of this step make a line."""
        return self.due(step, self.every) or step == 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        pl_module.traffic.wanted = self.wanted(pl_module.progress.step + 1)

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if not self.wanted(step):
            return
        self.stopwatch.finish(module.device)
        metrics = module.step_metrics()
        seen = module.progress.audio_seconds_seen
        metrics |= {"train/audio_seconds": seen, "train/memory_gib": memory_gib()}
        metrics |= self.stopwatch.read(seen, step)
        phases = module.phases.read() | traffic.of_copies(trainer.strategy.model) | module.traffic.read()
        metrics |= {f"seconds/{phase}": seconds for phase, seconds in phases.items()}
        self.stopwatch.reset(seen, step)
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
        release: the release folder, written from the averaged model.
        before: validate before the first step too: a fine-tuning is read against what it starts from.
    """

    def __init__(
        self,
        record: Record | None,
        batches: list[Batch],
        every: int,
        last_step: int,
        unigram: float,
        release: Release,
        stopwatch: Stopwatch,
        *,
        before: bool = False,
    ) -> None:
        super().__init__(last_step)
        self.record, self.batches, self.every, self.before = record, batches, every, before
        self.unigram, self.release, self.stopwatch = unigram, release, stopwatch
        self.texts: dict[int, tuple[Tensor, Tensor]] = {}
        self.latest: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not (self.before and self.batches and pl_module.progress.step == 0):
            return
        began = time.perf_counter()
        loss = self._score(pl_module, 0)["valid/loss"]
        if trainer.is_global_zero:
            print(f"before    valid loss {loss:.3f} of the model that this run starts from", flush=True)
        self.stopwatch.pause(began)

    def _score(self, module: MusicLMModule, step: int) -> dict[str, float]:
        metrics = module.validate(self.batches, self.texts)
        metrics["valid/below_unigram"] = self.unigram - metrics["valid/loss"]
        self.latest = metrics
        if self.record is not None:
            self.record.log(step, metrics)
        return metrics

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if not self.due(step, self.every):
            return
        began = time.perf_counter()
        if self.batches:
            metrics = self._score(module, step)
            best, loss = module.progress.best_loss, metrics["valid/loss"]
            if math.isfinite(loss) and (best is None or loss < best):  # nothing would ever be below NaN
                module.progress.best_loss, module.progress.best_step = loss, step
                self._release(module, loss)
            else:
                self.release.again(module.lm, module.encoder)
        elif step == self.last_step:  # without validation tracks the last average is the release
            self._release(module, None)
        self.stopwatch.pause(began)

    def _release(self, module: MusicLMModule, valid_loss: float | None) -> None:
        with module.averaged() as model:
            if model is not None:
                self.release.write(model, module.encoder, module.progress, valid_loss)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.release.again(module.lm, module.encoder)


class Clips(EachStep):
    """Generated clips of the averaged weights, with their prompts, in samples/ and in the record.

    Where the disk does not take them, or the memory that training leaves is too small for them, the training goes on to
    the next ones; those of the last step are tried again at the end, when old states have gone.

    Args:
        record: where clips go; None on ranks other than 0.
        config: when, how many, how long.
        prompts: what to ask for.
        prepare: (averaged model, module) gives a model ready to generate.
        ceilings: (folder) writes recordings through the codec, the best that a clip can sound, and returns files and
            captions.

    Attributes:
        missing: what the disk said of the last step's clips, or why they could not be made; empty where they are there.
    """

    def __init__(
        self,
        record: Record | None,
        config: LogConfig,
        last_step: int,
        prompts: Sequence[str | None],
        prepare: Callable[[MusicLM, MusicLMModule], MusicGen],
        ceilings: Callable[[Path], list[tuple[Path, str]]],
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(last_step)
        self.record, self.config, self.prompts = record, config, list(prompts)
        self.prepare, self.ceilings, self.stopwatch = prepare, ceilings, stopwatch
        self.missing = ""

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        if not self.config.clips or not self.due(step, self.config.clips_every):
            return
        began = time.perf_counter()
        self._try(module, step)
        if self.missing:
            print(
                f"warning   the clips of step {step} could not be made in {self._folder}: {self.missing}; "
                "training goes on",
                flush=True,
            )
        self.stopwatch.pause(began)

    @property
    def _folder(self) -> Path | None:
        return self.record.folder / "samples" if self.record is not None else None

    def _try(self, module: MusicLMModule, step: int) -> None:
        with module.averaged() as model:
            if model is not None and self.record is not None:
                try:
                    self._make_all(self.record, self.prepare(model, module), step)
                except (OSError, UserError, torch.OutOfMemoryError) as error:
                    self.missing = _why(error)
                else:
                    self.missing = ""

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if module.progress.step != self.last_step:
            self.missing = ""
        elif self.missing and not strategy.is_sharded(module.lm):  # else the ranks would have to try together
            self._try(module, self.last_step)

    def _make_all(self, record: Record, model: MusicGen, step: int) -> None:
        folder = record.folder / "samples"
        folder.mkdir(exist_ok=True)
        clips = []
        if not any(folder.glob("ceiling-*.wav")):
            record.clips(step, self.ceilings(folder), "ceilings")
        for number, prompt in enumerate(self.prompts):
            path = folder / f"step-{step:07d}-{number}.wav"
            details = products.make_clip(model, path, prompt, number, self.config.clip_seconds)
            details = {"step": step, "prompt": prompt, "file": path.name, **details}
            about = json.dumps(details, indent=2, ensure_ascii=False) + "\n"
            files.write_bytes(path.with_suffix(".json"), about.encode())
            clips.append((path, prompt or "(no prompt)"))
        record.clips(step, clips)


def _why(error: OSError | UserError | torch.OutOfMemoryError) -> str:
    """What the disk said, else the error's own words, as far as its first line."""
    try:
        return folder_of.refused_by_disk(error)
    except (UserError, torch.OutOfMemoryError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_answer(error: UserError | None) -> UserError | None:
    """The first error that any rank has, on all of them (a `SharedError`); every rank calls it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return error
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if error is None else str(error))
    first = next((text for text in said if text is not None), None)
    return None if first is None else SharedError(first)


class States(EachStep, AskedToLeave):
    """A whole state every `every` steps and at the end, and at once when the machine asks the run to leave.

    SIGTERM (a machine taken away), SIGUSR1 (Slurm, some minutes before its limit) and a first Ctrl-C only set a flag;
    the ranks tell each other beside the next step, save at the same one and stop. So they do where a rank has seen a
    batch ahead that it cannot read. A second Ctrl-C ends the training at once, and the last state is what is left. A
    state that cannot be written on the way is said and tried again at the next; the last one is tried twice and must
    succeed, or all ranks end with what the disk said.

    Args:
        folder: the run's `state/`.
        loader: has `failed`, why a batch further on cannot be read.
        background: write beside the training.
        elsewhere: number of a signal that reached another process and is meant for this one, 0 for none.

    Attributes:
        left_at: the step at which the run stopped because it was asked to.
        unreadable: why the run stopped, where that was its data.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        last_step: int,
        stopwatch: Stopwatch,
        loader: Any,
        *,
        background: bool,
        elsewhere: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(last_step)
        self.folder, self.config, self.stopwatch, self.background = folder, config, stopwatch, background
        self.elsewhere = elsewhere
        AskedToLeave.__init__(self)
        self.loader = loader
        self.left_at: int | None = None
        self.unreadable: UserError | None = None
        self._vote: tuple[Any, Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        super().on_train_start(trainer, module)
        self.saver = state.Saver(
            self.folder,
            keep_last=self.config.state_keep,
            keep_every=self.config.state_keep_every,
            background=self.background,
        )
        self.speaks = trainer.is_global_zero
        self.listen_to_signals()

    def after_step(self, trainer: pl.Trainer, module: MusicLMModule, step: int) -> None:
        began = time.perf_counter()
        leave = self._all_agree(trainer)
        if leave or (self.config.state_every and self.due(step, self.config.state_every)):
            self._save(trainer, module, must=leave or step == self.last_step)
            self.stopwatch.pause(began)
        self._warn(self.saver.failed())
        if leave and step != self.last_step:
            trainer.should_stop = True
            self.unreadable = one_answer(self.loader.failed)
            self.left_at = step if self.unreadable is None else None

    def _save(self, trainer: pl.Trainer, module: MusicLMModule, *, must: bool) -> None:
        self._warn(self.saver.ended())  # the state before
        error = self._write(trainer, module, wait=must)
        if must and (error := one_answer(error)) is not None:
            self._warn(error, "it is tried once more")
            if (error := one_answer(self._write(trainer, module, wait=True))) is not None:
                raise error
        self._warn(error)

    def _write(self, trainer: pl.Trainer, module: MusicLMModule, *, wait: bool) -> UserError | None:
        """Write a state together with the other ranks; what this one knows of a failure where it has waited."""
        self.saver.save(module.lm, module.ema, trainer.optimizers[0], module.progress)
        return self.saver.ended() if wait or not self.background else None

    def _warn(self, error: UserError | None, then: str = "training goes on") -> None:
        if error is not None and self.saver.rank == 0:
            print(f"warning   {error}; {then}", flush=True)

    def _all_agree(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was asked to leave, or cannot go on, before the step that has just been made: the same
        answer on all.

        The exchange of a step is read at the next one, so nobody waits for it.
        """
        if self.elsewhere is not None:
            self.asked = self.asked or self.elsewhere()
        failed = int(self.loader.failed is not None)
        if trainer.world_size == 1:
            return bool(self.asked or failed)
        leave = False
        if self._vote is not None:
            work, votes = self._vote
            work.wait()
            leave = bool(votes.any())
            self.asked = self.asked or int(votes[0])
        votes = torch.tensor([self.asked, failed])
        self._vote = (dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group(), async_op=True), votes)
        return leave

    def _group(self) -> Any:
        if not hasattr(self, "_votes"):
            self._votes = dist.new_group(backend="gloo")
        return self._votes

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.restore_signals()
        if self._vote is not None:
            self._vote[0].wait()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.restore_signals()


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
