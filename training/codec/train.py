"""Train an EnCodec: `python -m training.codec.train --data CATALOGUE_OR_CACHE --run runs/codec`; same run = resume.

Lightning drives, on a CPU or a GPU. Every `validate_every` steps the averaged weights are measured on held-out tracks,
written to `runs/<name>/release/` when they are the best so far, and the whole state to `runs/<name>/state/last.ckpt`.
The record is `runs/<name>/metrics.jsonl`, mirrored to Weights & Biases (offline when there is no key or network).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from musicgen import settings
from musicgen.errors import UserError
from training import record


def main(argv: list[str]) -> int:
    """Parse settings, prepare the audio, fit or resume; 0 when the run reached its last step."""
    import warnings

    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from musicgen import codec as codecs
    from training.codec import data
    from training.codec.initial import start_from
    from training.codec.module import CodecModule, CodecTrainConfig

    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    config = settings.parse(CodecTrainConfig, argv, prog="python -m training.codec.train")
    if config.size not in codecs.CODEC_SIZES:
        raise UserError(f"unknown codec SIZE {config.size!r}; allowed: {', '.join(codecs.CODEC_SIZES)}")
    if not config.data:
        raise UserError("DATA is missing: give the URI of a catalogue (catalog.jsonl) or a PCM cache folder")
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    _keep_config(run, config)

    shape = codecs.CODEC_SIZES[config.size]
    cache = data.prepare(config.data, run / "pcm", shape, config.splits)
    train, valid = data.open_cache(cache, "train"), data.open_cache(cache, "valid")
    rng = np.random.default_rng(config.seed)
    picks = sorted(rng.permutation(len(valid.track_ids))[: config.validation_tracks])
    held_out = [valid.track(int(i))[:, : 20 * shape.sample_rate_hz] for i in picks]
    num_samples = int(config.crop_seconds * shape.sample_rate_hz) // shape.hop * shape.hop
    stream = data.CropStream(train, seed=config.seed, batch_size=config.batch_size, num_samples=num_samples)

    module = CodecModule(config, held_out)
    parameters = sum(p.numel() for p in module.network.parameters())
    print(
        f"codec {config.size}: {parameters:,} parameters; {train.hours:.2f} h in {len(train.track_ids)} tracks, "
        f"{len(valid.track_ids)} held out; {config.steps} steps of {config.batch_size} × {config.crop_seconds} s",
        flush=True,
    )
    last = run / "state" / "last.ckpt"
    if last.is_file():
        stream.first_step = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
        print(f"resuming at step {stream.first_step}", flush=True)
    elif config.init:
        print(f"starting from {start_from(module, config.init)}", flush=True)
    logger = record.wandb_logger(run, _run_id(run), settings.to_dict(config))
    watch = Watch(record.Record(run, stream.first_step, logger), config)
    trainer = pl.Trainer(
        max_steps=config.steps, max_epochs=-1, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, num_sanity_val_steps=0,
        callbacks=[watch],
    )  # fmt: skip
    finished = 1
    try:
        trainer.fit(
            module,
            DataLoader(stream, batch_size=None),
            ckpt_path=str(last) if last.is_file() else None,
            weights_only=True,
        )
        finished = 0
    finally:
        watch.record.finish(finished)
    print(f"codec written to {run / 'release'}")
    return 0


def _keep_config(run: Path, config: Any) -> None:
    """Write the resolved settings; a run folder of other settings is refused, except for its length."""
    path, now = run / "config.yaml", json.loads(json.dumps(settings.to_dict(config)))
    if path.is_file():
        before = yaml.safe_load(path.read_text())
        free = {"steps", "cooldown_steps", "threads", "run", "data"}
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            told = "; ".join(f"{k}: {before.get(k)} there, {now[k]} now" for k in changed)
            raise UserError(
                f"run folder {run} was made with other settings ({told}); take another RUN or the old settings"
            )
    path.write_text(yaml.safe_dump(now, sort_keys=False))


def _run_id(run: Path) -> str:
    """The W&B id of a run folder; the same over every resume."""
    path = run / "wandb-id"
    if not path.is_file():
        path.write_text(record.new_run_id())
    return path.read_text()


def _callback_base() -> type:
    import pytorch_lightning as pl

    return pl.Callback


class Watch(_callback_base()):  # type: ignore[misc]
    """Progress, metrics.jsonl, validation, state and release of a codec run."""

    def __init__(self, kept: record.Record, config: Any) -> None:
        self.record, self.config = kept, config
        self.run = kept.folder
        self.began = time.monotonic()
        self.begin_step = 0
        earlier = record.read_metrics(kept.metrics.path)
        self.best = min((line["valid/score"] for line in earlier if "valid/score" in line), default=float("inf"))

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the clock."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.began, self.begin_step = time.monotonic(), trainer.global_step
        self.bar = Progress(
            TextColumn("codec"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=self.config.steps, completed=trainer.global_step)
        self.bar.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        """Record every 50 steps; validate and save every `validate_every`."""
        step = trainer.global_step
        self.bar.update(self.task, completed=step)
        if step % 50 == 0 or step == self.config.steps:
            seconds = time.monotonic() - self.began
            rate = (step - self.begin_step) * self.config.batch_size * self.config.crop_seconds / seconds
            self.record.log(step, {"train/audio_seconds_per_second": rate, **module.record})
            mel = module.record.get("train/mel", module.record.get("train/msspec", float("nan")))
            self.bar.update(self.task, description=f"mel {mel:.3f}, {rate:.1f} audio-s/s")
        if step > self.config.warmup_steps and (step % self.config.validate_every == 0 or step == self.config.steps):
            self._validate(trainer, module, step)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Close the bar."""
        self.bar.stop()

    def _validate(self, trainer: Any, module: Any, step: int) -> None:
        from musicgen import codec as codecs

        result = module.evaluate()
        result["valid/score"] = result["valid/log_mel"] - result["valid/chroma"]
        self.record.log(step, result)
        self.bar.console.print(f"step {step}: " + ", ".join(f"{k[6:]} {v:.3f}" for k, v in result.items()))
        state = self.run / "state"
        state.mkdir(exist_ok=True)
        trainer.save_checkpoint(state / "last.ckpt.partial")
        os.replace(state / "last.ckpt.partial", state / "last.ckpt")
        if result["valid/score"] < self.best:
            self.best = result["valid/score"]
            network = codecs.build(module.shape)
            network.load_state_dict(module.network.state_dict())
            for parameter, mean in zip(network.parameters(), module.ema, strict=True):
                parameter.data.copy_(mean)
            codecs.save(network, self.run / "release")
            about = {"step": step, **result, "config": dataclasses.asdict(self.config)}
            (self.run / "release" / "training.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    settings.run(main)
