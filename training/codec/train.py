"""Train an EnCodec: `python -m training.codec.train --data CATALOGUE --run runs/codec`; same run = resume.

Settings come from configs/codec/<size>.yaml, then from the command line. Lightning drives, on CPUs or GPUs. Every
`validate_every` steps the averaged weights are measured on held-out tracks, written to `runs/<name>/release/` when they
are the best so far (the discriminator hears what the measure does not: once its part is whole, the best since then),
and the whole state to `runs/<name>/state/last.ckpt`. The record is `metrics.jsonl` and `samples/`,
mirrored to Weights & Biases (offline when there is no key or network).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from musicgen import files, settings
from musicgen.errors import UserError
from training import launch, record
from training.launch import AskedToLeave, Launched

VALIDATION_SECONDS = 20
MELS = ("train/log_mel", "train/mel", "train/msspec")
# What may change between two starts of one run; hardware may, too.
FREE = ("steps", "cooldown_steps", "run", "data", "clips")


def main(argv: list[str]) -> int:
    """Parse settings, prepare the audio, fit or resume; 0 when the run reached its last step."""
    with launch.outside_steps():
        return _main(argv)


def _main(argv: list[str]) -> int:
    import warnings

    import torch

    from training import strategy
    from training.codec import data
    from training.codec.config import check, read_config
    from training.codec.initial import start_from
    from training.codec.module import CodecModule

    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    config, launched = read_config(argv), launch.here()
    if launched.by:
        config = dataclasses.replace(config, hardware=launch.fitted(config.hardware, launched))
        check(config)
    strategy.check(config.hardware)
    rank = launched.rank
    run, shape = Path(config.run), config.network
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"RUN={config.run!r} cannot be made: {error.strerror or error}; give another folder") from None
    _check_config(run, config)

    cache = data.prepare(config.data, run / "pcm", shape, config.splits)
    train, valid = (data.open_cache(cache, split, shape) for split in ("train", "valid"))
    stream = data.CropStream(
        train, seed=config.seed, batch_size=config.batch_size, num_samples=config.crop_samples, rank=rank,
        world=config.hardware.world,
    )  # fmt: skip
    names, held_out = _held_out(config, valid)
    module = CodecModule(config, held_out)
    last = run / "state" / "last.ckpt"
    started = ""
    if last.is_file():
        stream.first_step = _step_of(last)
        started = f"resuming at step {stream.first_step}"
    elif config.init:
        started = f"starting from {start_from(module, config.init)}"
    if rank == 0:  # not before all else was found right: a run folder keeps to its settings
        files.write_bytes(run / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False).encode())
        _print_plan(module, train, valid, started)
    _fit(module, stream, names, run, last if last.is_file() else None, launched)
    if rank == 0:
        print(f"codec written to {run / 'release'}")
    return 0


def _fit(module: Any, stream: Any, names: list[str], run: Path, last: Path | None, launched: Launched) -> None:
    """Run Lightning's loop from the state `last`, recording on the first rank."""
    from torch.utils.data import DataLoader

    from training import strategy

    config, first = module.config, launched.rank == 0
    logger = record.wandb_logger(run, _run_id(run), settings.to_dict(config)) if first else None
    journal = record.Record(run, stream.first_step, logger) if first else None
    watch = Watch(journal, run, config, names)
    trainer = strategy.build_codec_trainer(config.hardware, steps=config.steps, callbacks=[watch], launched=launched)
    finished = 1
    launch.end_with_the_first(launched)
    try:
        trainer.fit(module, DataLoader(stream, batch_size=None), ckpt_path=last, weights_only=True)
        finished = 0
    except BaseException as error:
        if launch.was_interrupted(error):  # a second time
            raise KeyboardInterrupt from None
        raise
    finally:
        if journal is not None:
            journal.finish(finished)
    if watch.left_at is not None and first:  # the first one speaks for all
        name = signal.Signals(watch.asked).name if watch.asked else "another process"
        print(f"left after step {watch.left_at} of {config.steps}, asked by {name}; the same command goes on")
        raise SystemExit(watch.exit_code())


def _held_out(config: Any, valid: Any) -> tuple[list[str], list[np.ndarray]]:
    """Ids and first twenty seconds of the tracks that every validation looks at."""
    order = np.random.default_rng(config.seed).permutation(len(valid.track_ids))
    picks = sorted(int(i) for i in order[: config.validation_tracks])
    samples = VALIDATION_SECONDS * config.network.sample_rate_hz
    return [valid.track_ids[i] for i in picks], [valid.track(i)[:, :samples] for i in picks]


def _step_of(last: Path) -> int:
    """Completed steps of a state. Raises `UserError` when it cannot be read."""
    import torch

    try:
        return int(torch.load(last, map_location="cpu", weights_only=True)["global_step"])
    except Exception as error:
        raise UserError(
            f"{last} cannot be read ({type(error).__name__}). Delete it to start this run anew, or take another RUN "
            f"and go on from the release: --init {last.parent.parent / 'release'}"
        ) from error


def _print_plan(module: Any, train: Any, valid: Any, started: str) -> None:
    config = module.config
    codec = sum(p.numel() for p in module.network.parameters())
    critic = sum(p.numel() for p in module.discriminator.parameters()) if module.discriminator is not None else 0
    print(
        f"codec {config.size}: {codec:,} parameters, {'stereo' if config.network.channels == 2 else 'mono'}"
        + (f", discriminator of {critic:,} from step {config.adversarial_start} on" if critic else "")
        + f"; {train.hours:.2f} h in {len(train.track_ids)} tracks, {len(valid.track_ids)} held out; {config.steps} "
        f"steps of {config.batch_size} × {config.crop_seconds} s" + (f"\n{started}" if started else ""),
        flush=True,
    )


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(settings.to_dict(config)))


def _check_config(run: Path, config: Any) -> None:
    """Refuse a run folder of other settings, except for its length and hardware."""
    from musicgen import codec as codecs

    path = run / "config.yaml"
    if not path.is_file():
        return
    # A setting that did not exist when the run began has its default, which is what the run did then.
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        network = {"network": dataclasses.asdict(codecs.CODEC_SIZES[stored["size"]])}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(f"run folder {run} holds a config.yaml that is none of a codec run; take another RUN") from None
    trees = (_plain(type(config)()), json.loads(json.dumps(network)), stored)
    before = {name: value for tree in trees for name, value in settings.flat(tree).items()}
    now = settings.flat(_plain(config))
    kept = [k for k in now if k not in FREE and not k.startswith("hardware.")]
    told = "; ".join(f"{k}: {before.get(k)} there, {now[k]} now" for k in kept if before.get(k) != now[k])
    if told:
        raise UserError(f"run folder {run} was made with other settings ({told}); take another RUN or the old settings")


def _run_id(run: Path) -> str:
    """The W&B id of a run folder; the same over every resume."""
    path = run / "wandb-id"
    if not path.is_file():
        files.write_bytes(path, record.new_run_id().encode())
    return path.read_text()


def _callback_base() -> type:
    import pytorch_lightning as pl

    return pl.Callback


class Watch(AskedToLeave, _callback_base()):  # type: ignore[misc]
    """Progress, metrics.jsonl, validation, clips, state and release of a codec run; `journal` on the first rank."""

    def __init__(self, journal: record.Record | None, run: Path, config: Any, names: list[str]) -> None:
        super().__init__()
        self.journal, self.run, self.config, self.names = journal, run, config, names
        self.began = time.monotonic()
        self.begin_step = 0
        self.bar: Any = None
        self.left_at: int | None = None
        earlier = record.read_metrics(run / "metrics.jsonl")
        self.scores = {line["step"]: line["valid/score"] for line in earlier if "valid/score" in line}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the clock and listen to signals."""
        self.speaks = trainer.is_global_zero
        self.listen_to_signals()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.began, self.begin_step = time.monotonic(), trainer.global_step
        if self.journal is None:
            return
        self.bar = Progress(
            TextColumn("codec"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=self.config.steps, completed=trainer.global_step)
        self.bar.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        """Record every 50 steps; validate and save every `validate_every`; save and leave when asked to."""
        step = trainer.global_step
        last = step == self.config.steps
        figures = module.whole_record() if step % 50 == 0 or last else None
        if self.journal is not None:
            self.bar.update(self.task, completed=step)
            if figures is not None:
                self._record(figures, step)
        leave = bool(self.asked)
        if trainer.world_size > 1:
            leave = trainer.strategy.reduce_boolean_decision(leave, all=False)
        due = step % self.config.validate_every == 0 or last
        if due and step > self.config.warmup_steps and self.journal is not None:
            self._validate(module, step)  # before, the quantiser is not trained
        if due or leave:
            self._save(trainer)
        if leave and not last:
            self.left_at = step
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Close the bar, so that the error stands below it."""
        self._close()

    def _close(self) -> None:
        self.restore_signals()
        if self.bar is not None:
            self.bar.stop()

    def _record(self, figures: dict[str, float], step: int) -> None:
        """Losses, gradient shares and speed of this step."""
        journal: Any = self.journal
        seconds = time.monotonic() - self.began
        rate = (step - self.begin_step) * self.config.batch_size * self.config.crop_seconds / seconds
        journal.log(step, {"train/audio_seconds_per_second": rate, **figures})
        mel = next((figures[name] for name in MELS if name in figures), float("nan"))
        self.bar.update(self.task, description=f"mel {mel:.3f}, {rate:.1f} audio-s/s")

    def _validate(self, module: Any, step: int) -> None:
        """Measure the averaged weights, write clips, and the release when they are the best so far of their phase."""
        from musicgen import codec as codecs

        journal: Any = self.journal
        result, heard = module.evaluate()
        result["valid/score"] = result["valid/log_mel"] - result["valid/chroma"]
        journal.log(step, result)
        self.bar.console.print(f"step {step}: " + ", ".join(f"{k[6:]} {v:.3f}" for k, v in result.items()))
        journal.clips(step, self._clips(module, step, heard))
        score = result["valid/score"]
        phase = [s for other, s in self.scores.items() if self._judged(other) == self._judged(step)]
        self.scores[step] = score
        if math.isfinite(score) and score < min(filter(math.isfinite, phase), default=math.inf):
            codecs.save(module.averaged_network(), self.run / "release")
            about = {"step": step, **result, "config": dataclasses.asdict(self.config)}
            files.write_bytes(self.run / "release" / "training.json", (json.dumps(about, indent=2) + "\n").encode())

    def _judged(self, step: int) -> bool:
        """Whether the last update before completed step `step` had the discriminator's losses at their whole weight."""
        begin = self.config.adversarial_begin
        return begin is not None and step > begin + self.config.adversarial_ramp

    def _clips(self, module: Any, step: int, heard: list[np.ndarray]) -> list[tuple[Path, str]]:
        """Reconstructions in samples/, and once what they are reconstructions of: files and their captions."""
        from musicgen import wav

        clips = []
        for name, original, decoded in zip(self.names, module.validation_audio, heard, strict=False):
            stem = self.run / "samples" / "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:80]
            before = stem.with_name(f"{stem.name}-original.wav")
            after = stem.with_name(f"{stem.name}-step-{step:07d}.wav")
            made = [(after, decoded, "reconstruction by the codec")]
            if not before.is_file():
                made.insert(0, (before, original[:, : decoded.shape[1]], "excerpt of a recording"))
            for path, sound, what in made:
                mark = {"what": what, "track_id": name, "step": step}
                files.write_bytes(path, wav.encode(sound, module.shape.sample_rate_hz, mark, generated=False))
                clips.append((path, f"{name}: {what}, step {step}"))
        return clips

    def _save(self, trainer: Any) -> None:
        """The whole state; every rank takes part, the first one renames it when it is whole."""
        state = self.run / "state"
        state.mkdir(exist_ok=True)
        trainer.save_checkpoint(state / "last.ckpt.partial")
        if trainer.is_global_zero:
            os.replace(state / "last.ckpt.partial", state / "last.ckpt")


if __name__ == "__main__":
    launch.run(main)
