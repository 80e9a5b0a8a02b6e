"""Does a style by example do anything? The shipped model learns one, and what it brings is measured.

    python -m training.style_check --data runs/demo/data --run runs/style --steps 900

A model is trained on from a release with `lm.condition.style` added, by `training.train` as everybody's. Then, on the
held-out tracks: the loss when it hears an excerpt of the same track, of another track, and none; and clips made without
any text, with an excerpt and without: how many are nearest to the style centroid of the excerpt's genre (codec
embeddings, centroids from the training tracks, as in `training.music_check`). The model that was started from stands
beside it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from musicgen import files, generate, settings
from musicgen.errors import UserError
from musicgen.metrics import style
from musicgen.sampling import SamplingConfig
from musicgen.style import NONE
from pipelines.shard import ShardSet
from training import music_check, report, train
from training.data import Batch, BatchConfig, validation_batches


@dataclass(frozen=True)
class StyleCheckConfig:
    """What to train and measure.

    Args:
        init: the release that the training starts from.
        data: the data set, with validation tracks.
        run: folder of the training; the same folder goes on, and one that is done is only measured.
        steps: length of the training.
        arguments: more settings of the training.
        styles: how many of the commonest styles of the training tracks.
        excerpts_per_style: held-out excerpts of each style, and so many clips with and without.
        crop_seconds: of the crops that are trained and scored on.
        duration: seconds of each clip.
        valid_crops: crops that the losses are taken on.
        seed: seeds of the clips count up from here.
        batch: clips generated at a time.
        out: where to write the result as JSON, if anywhere.
        sampling: as in generation.
    """

    init: str = "demo"
    data: str = "data/demo"
    run: str = "runs/style"
    steps: int = 900
    arguments: tuple[str, ...] = ()
    styles: int = 10
    excerpts_per_style: int = 4
    crop_seconds: float = 5.0
    duration: float = 5.0
    valid_crops: int = 128
    seed: int = 0
    batch: int = 20
    out: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def arguments(config: StyleCheckConfig) -> list[str]:
    """The command line of the training."""
    values = {
        "size": "demo",
        "data": config.data,
        "run": config.run,
        "init": config.init,
        "steps": config.steps,
        "codebook_init": "false",
        "licence": "Apache-2.0",
        "lm.condition.style.dim": 64,
        "batch.crop_seconds": config.crop_seconds,
        "batch.tail_seconds": 2.5,
        "batch.text_dropout": 0.7,  # the source has 0.4: the style must be learned without the text, and soon
        "batch.style_dropout": 0.2,
        "batch.valid_crops": 32,
        "batch.size": 8,
        "batch.word_dropout": 0.3,
        "optim.lr": 2e-3,
        "optim.warmup_steps": 20,
        "optim.weight_decay": 0.1,
        "log.valid_every": 100,
        "log.clips": 0,
    }
    return [w for name, value in values.items() for w in (f"--{name}", str(value))] + list(config.arguments)


def with_styles(batches: Sequence[Batch], of: str) -> list[Batch]:
    """The batches with the excerpt of each crop's own track, of another track half the crops away, or none.

    Args:
        of: own, other or none.
    """
    if of == "own":
        return list(batches)
    every = torch.cat([batch.style for batch in batches if batch.style is not None])
    changed = torch.full_like(every, NONE) if of == "none" else every.roll(len(every) // 2, dims=0)
    parts = changed.split([len(batch.keys) for batch in batches])
    return [dataclasses.replace(batch, style=part) for batch, part in zip(batches, parts)]


def _crops(config: StyleCheckConfig) -> BatchConfig:
    return BatchConfig(
        crop_seconds=config.crop_seconds, tail_seconds=2.5, valid_crops=config.valid_crops, valid_batch=8
    )


def losses(model: generate.MusicGen, data: ShardSet, config: StyleCheckConfig) -> dict[str, float]:
    """Validation loss, mean of the codebooks, with the own excerpt, another track's, and none; crops that have one."""
    batches = validation_batches(data, _crops(config), condition=model.lm.config.condition)
    return {of: float(report.batch_losses(model, with_styles(batches, of)).mean()) for of in ("own", "other", "none")}


def chosen(data: ShardSet, names: Sequence[str], per_style: int, frames: int) -> list[tuple[str, np.ndarray]]:
    """(style, codes `[K, frames]`) from the middle of held-out tracks of each style, of training tracks where there
    are too few."""
    genre = data.index.column("genre").to_pylist()
    rows = [int(row) for split in ("valid", "test", "train") for row in data.rows(split)]
    found = []
    for name in names:
        fit = [row for row in rows if genre[row] == name and data.codes(row).shape[1] >= frames]
        for row in fit[:per_style]:
            codes = data.codes(row)
            start = (codes.shape[1] - frames) // 2
            found.append((name, np.asarray(codes[:, start : start + frames])))
    return found


def share_in_style(
    model: generate.MusicGen,
    styles: style.Styles,
    asked: Sequence[tuple[str, np.ndarray]],
    config: StyleCheckConfig,
    *,
    heard: bool,
) -> int:
    """How many clips without a text are nearest to the style of their excerpt; `heard` says whether they hear it."""
    hits = 0
    for start in range(0, len(asked), config.batch):
        part = asked[start : start + config.batch]
        seeds = [config.seed + start + i for i in range(len(part))]
        excerpts = torch.from_numpy(np.stack([codes for _, codes in part]).astype(np.int64)) if heard else None
        prompts: list[str | None] = [None] * len(part)
        made = generate.generate(model, prompts, config.duration, seeds, config.sampling, styles=excerpts)[1].numpy()
        for (name, _), codes in zip(part, made):
            hits += styles.nearest(music_check.embed_clips(model, codes, codes.shape[1])[0])[0] == name
    return hits


def check(config: StyleCheckConfig) -> dict[str, Any]:
    """Train and measure; the result as plain data.

    Raises:
        UserError: of the training, or data without validation tracks.
    """
    data = ShardSet.open(config.data)
    if not len(data.rows("valid")):
        raise UserError(f"DATA={config.data!r} has no validation tracks, on which the style would be measured")
    train.main(arguments(config))
    model, before = generate.load(f"{config.run}/release"), generate.load(config.init)
    rate, of = model.codec.frame_rate, model.lm.config.condition.style
    names = music_check.commonest_styles(data, config.styles)
    genre = data.index.column("genre").to_pylist()
    vectors, labels = [], []
    for row in data.rows("train"):
        if genre[row] in names:
            for vector in music_check.embed_clips(model, data.codes(int(row)), round(config.duration * rate)):
                vectors.append(vector)
                labels.append(genre[row])
    styles = style.style_centroids(np.stack(vectors), labels)
    asked = chosen(data, names, config.excerpts_per_style, round((of.min_seconds + of.max_seconds) / 2 * rate))
    real = [styles.nearest(music_check.embed_clips(model, codes, codes.shape[1])[0])[0] == n for n, codes in asked]
    hits = share_in_style(model, styles, asked, config, heard=True)
    return {
        "settings": settings.to_dict(config),
        "data_version": data.info["dataset_version"],
        "step": model.info["training"]["step"],
        "parameters": {"of_the_style": model.lm.num_parameters() - before.lm.num_parameters()},
        "loss_before": float(report.validation_losses(before, data, _crops(config)).mean()),
        "loss": losses(model, data, config),
        "clips": len(asked),
        "styles": len(names),
        "in_style": hits,
        "in_style_without": share_in_style(model, styles, asked, config, heard=False),
        "excerpts_in_style": sum(real),
        "binomial_p": style.binomial_p(hits, len(asked), 1 / len(names)),
    }


def main(argv: Sequence[str]) -> int:
    """`python -m training.style_check`: see `StyleCheckConfig`."""
    found = check(settings.parse(StyleCheckConfig, argv, prog="python -m training.style_check"))
    loss, clips = found["loss"], found["clips"]
    print(f"style     {found['parameters']['of_the_style']:,} parameters beside the model, step {found['step']}")
    print(
        f"loss      {loss['own']:.4f} with an excerpt of the same track, {loss['other']:.4f} of another, "
        f"{loss['none']:.4f} without; the model before {found['loss_before']:.4f}"
    )
    print(
        f"clips     without text, nearest to the style of the excerpt: {found['in_style']} of {clips} that heard it "
        f"(p = {found['binomial_p']:.2g}), {found['in_style_without']} of {clips} that did not, by luck "
        f"{clips / found['styles']:.0f}; the excerpts themselves {found['excerpts_in_style']} of {clips}"
    )
    if config_out := found["settings"]["out"]:
        files.write_bytes(config_out, (json.dumps(found, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    settings.run(main)
