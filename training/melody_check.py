"""How well does a melody model follow its guide, and does augmentation help where the guide is worse?

    python -m pipelines.demo.catalogue --out data/stems --hours 4 --stems
    python -m pipelines.ingest --catalog data/stems/catalog.jsonl --out data/melody --chroma_variants 3
    python -m pipelines.ingest --catalog data/stems/catalog.jsonl --out data/mixes --chroma_variants 3 \\
        --chroma_stems true
    python -m training.melody_check --data data/melody --mixes data/mixes --runs runs/melody

Models of the same start and as many steps are trained by `training.train`: one on melodies as they are, one with
`batch.augment` on the same crops, one with that again whose variants are other mixes of the stems besides (of the same
tracks, drawn in another order). All then make clips after held-out tracks: with the chroma of the track's sound, with
that of the sound equalised and in noise (`musicgen.degrade`), with holes, with frames out of step, and with that of
another mix, equalised and in noise, as ingest keeps it. The figure is the share of the chroma frames in which clip
and guide have the same dominant pitch class; the guide is always the clean one. Differences from the model trained on
melodies as they are come with their standard error over the clips. Clips without a melody stand beside as what luck
brings, the losses on held-out crops with the right melody and with another track's as what the model has learned to
hear.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from musicgen import files, generate, settings
from musicgen.chroma import HOP, NONE, chroma_bins
from musicgen.degrade import degraded
from musicgen.errors import UserError
from musicgen.metrics.audio import SAMPLE_RATE_HZ, chroma_agreement
from musicgen.sampling import SamplingConfig
from pipelines.shard import ShardSet
from training import augment, report, train
from training.augment import AugmentConfig
from training.data import BatchConfig, validation_batches

AUGMENTED = AugmentConfig(frame_dropout=0.15, frame_jitter=0.2, variants=0.5)
FIRST = 64  # codec frames left out at the start of a track, exactly ten of the chroma


@dataclass(frozen=True)
class MelodyCheckConfig:
    """What to train and measure.

    Args:
        init: the release that both trainings start from, which gets a melody input; empty trains from nothing.
        data: a data set ingested with `chroma_variants`, with validation tracks.
        mixes: the same with `chroma_stems` as well, for a third model and guides in another mix; empty goes without.
        runs: folder of the runs, `plain`, `augmented` and `mixes`; those that are done are only measured.
        steps: length of each training.
        arguments: more settings of both trainings.
        clips: held-out guides, one clip each; every track gives one before any gives two.
        crop_seconds: of the crops that are trained and scored on.
        duration: seconds of each clip.
        seed: seeds of the clips count up from here; the guides are degraded by it.
        guidance: of the melody.
        out: where to write the result as JSON, if anywhere.
        augment: of the second training.
    """

    init: str = "demo"
    data: str = "data/melody"
    mixes: str = ""
    runs: str = "runs/melody"
    steps: int = 2500
    arguments: tuple[str, ...] = ()
    clips: int = 128
    crop_seconds: float = 5.0
    duration: float = 5.0
    seed: int = 0
    guidance: float = 3.0
    out: str | None = None
    augment: AugmentConfig = field(default_factory=lambda: AUGMENTED)

    def __post_init__(self) -> None:
        for name, least in (("clips", 2), ("duration", 1.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least:g}")

    @property
    def trainings(self) -> tuple[str, ...]:
        """Names of the runs."""
        return ("plain", "augmented", "mixes") if self.mixes else ("plain", "augmented")


def arguments(config: MelodyCheckConfig, name: str) -> list[str]:
    """The command line of one training, `plain`, `augmented` or `mixes`."""
    values: dict[str, Any] = {
        "size": "demo",
        "data": config.mixes if name == "mixes" else config.data,
        "run": f"{config.runs}/{name}",
        "steps": config.steps,
        "init": config.init,
        "codebook_init": str(not config.init).lower(),
        "licence": "Apache-2.0",
        "lm.condition.melody": "true",
        "lm.condition.chroma_frames": 1 + int(config.crop_seconds * SAMPLE_RATE_HZ / HOP),
        "batch.crop_seconds": config.crop_seconds,
        "batch.melody_dropout": 0.1,
        "batch.text_dropout": 0.5,
        "batch.tail_seconds": 2.5,
        "batch.valid_crops": 16,
        "batch.size": 8,
        "batch.word_dropout": 0.3,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 20,
        "optim.weight_decay": 0.1,
        "log.valid_every": 100,
        "log.clips": 0,
    }
    if name != "plain":
        values |= {f"batch.augment.{key}": value for key, value in settings.to_dict(config.augment).items()}
    return [w for key, value in values.items() for w in (f"--{key}", str(value))] + list(config.arguments)


def guides(sound: np.ndarray, sample_rate_hz: int, seed: int, mix: np.ndarray | None) -> dict[str, np.ndarray]:
    """Pitch classes [T_c] of a guide `[N]`, clean and in each of the worse forms; `mix` is that of another mix."""
    clean = chroma_bins(sound, sample_rate_hz)
    _, lost = augment.frames(len(clean), AugmentConfig(frame_dropout=0.3), (seed, 1))
    source, _ = augment.frames(len(clean), AugmentConfig(frame_jitter=0.5), (seed, 2))
    noisy = chroma_bins(degraded(sound, (seed, 3), sample_rate_hz), sample_rate_hz)
    found = {"clean": clean, "noisy": noisy, "holes": np.where(lost, np.uint8(NONE), clean), "jitter": clean[source]}
    return found if mix is None else {**found, "mix": mix}


def losses(model: generate.MusicGen, data: ShardSet, crop_seconds: float) -> dict[str, float]:
    """Validation loss, mean of the codebooks, with the own melody, another track's, and none."""
    crops = BatchConfig(crop_seconds=crop_seconds, tail_seconds=2.5, valid_crops=64, valid_batch=8)
    batches = validation_batches(data, crops, condition=model.lm.config.condition)
    of: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "own": lambda chroma: chroma,
        "other": lambda chroma: chroma.roll(len(chroma) // 2, dims=0),
        "none": lambda chroma: torch.full_like(chroma, NONE),
    }
    every = torch.cat([batch.chroma for batch in batches if batch.chroma is not None])
    found = {}
    for name, change in of.items():
        parts = change(every).split([len(batch.keys) for batch in batches])
        changed = [dataclasses.replace(batch, chroma=part) for batch, part in zip(batches, parts)]
        found[name] = float(report.batch_losses(model, changed).mean())
    return found


def agreement(
    model: generate.MusicGen, melodies: Sequence[np.ndarray | None], sounds: Sequence[np.ndarray], config: Any
) -> np.ndarray:
    """Share of frames of each clip [clips], made after a melody (or none), that agree with the clean guide's sound."""
    prompts: list[str | None] = [None] * len(sounds)
    seeds = [config.seed + i for i in range(len(sounds))]
    given = None if melodies[0] is None else torch.from_numpy(np.stack([m for m in melodies if m is not None]))
    sampling = SamplingConfig(guidance=config.guidance)
    made, _ = generate.generate(model, prompts, config.duration, seeds, sampling, melodies=given)
    return np.array([chroma_agreement(s, clip[0]) for s, clip in zip(sounds, made)])


def windows(data: ShardSet, rows: Sequence[int], frames: int, count: int) -> list[tuple[int, int]]:
    """Up to `count` stretches (row, first codec frame) of `frames` frames, the first of every track to begin with."""
    step = -(-frames // FIRST) * FIRST  # a whole number of chroma frames
    places = [(start, row) for row in rows for start in range(FIRST, int(data.codes(row).shape[1]) - frames + 1, step)]
    return [(row, start) for start, row in sorted(places)[:count]]


def compared(shares: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Mean agreement by training and guide, with difference from `plain` and its standard error over the clips."""
    found: dict[str, dict[str, Any]] = {}
    for name, by_guide in shares.items():
        found[name] = {}
        for guide, values in by_guide.items():
            difference = values - shares["plain"][guide]
            error = float(np.nanstd(difference, ddof=1) / np.sqrt(np.isfinite(difference).sum()))
            mean = float(np.nanmean(values))
            found[name][guide] = {"mean": mean, "difference": float(np.nanmean(difference)), "error": error}
    return found


def check(config: MelodyCheckConfig) -> dict[str, Any]:
    """Train both and measure; the result as plain data.

    Raises:
        UserError: of the training, or data without validation tracks or without variants of the chroma.
    """
    data = ShardSet.open(config.data)
    held_out, rate = data.rows("valid"), data.info["codec"]["frame_rate"]
    if not len(held_out) or len(data.chromas(int(held_out[0]))) < 2:
        raise UserError(
            f"DATA={config.data!r} needs validation tracks and degraded chroma; ingest with --chroma_variants 3"
        )
    if data.info.get("settings", {}).get("melody_stems"):
        raise UserError(
            f"DATA={config.data!r} holds melodies of stems, and guides here are chroma of whole recordings; ingest it "
            "without --melody_stems"
        )
    other = mixes_of(config, data) if config.mixes else {}
    frames = round(config.duration * rate)
    places = windows(data, [int(row) for row in held_out], frames, config.clips)
    if len(places) < 2:
        raise UserError(
            f"DATA={config.data!r} has {len(places)} held-out stretches of {config.duration:g} s, at least 2 are "
            "needed; lower --duration or ingest more tracks"
        )
    for name in config.trainings:
        train.main(arguments(config, name))
    models = {name: generate.load(f"{config.runs}/{name}/release") for name in config.trainings}
    codec = models["plain"].codec
    sounds, given = [], []
    for number, (row, start) in enumerate(places):
        codes = torch.from_numpy(data.codes(row)[:, start : start + frames].astype(np.int64))[None]
        sounds.append(codec.decode(codes)[0].mean(0).cpu().numpy())
        mix = None
        if other:
            first, length = round(start * codec.sample_rate / codec.frame_rate / HOP), 1 + sounds[-1].size // HOP
            mix = np.full(length, NONE, np.uint8)  # a track's chroma may end a frame before its codes
            heard = other[row][first : first + length]
            mix[: len(heard)] = heard
        given.append(guides(sounds[-1], codec.sample_rate, config.seed + number, mix))
    kept = {name: float(np.mean([(g[name] == g["clean"]).mean() for g in given])) for name in given[0]}
    none: list[np.ndarray | None] = [None] * len(sounds)
    shares: dict[str, dict[str, np.ndarray]] = {}
    for name, model in models.items():
        shares[name] = {guide: agreement(model, [g[guide] for g in given], sounds, config) for guide in kept}
        shares[name]["none"] = agreement(model, none, sounds, config)
    figures = compared(shares)
    return {
        "settings": settings.to_dict(config),
        "data_version": data.info["dataset_version"],
        "clips": len(sounds),
        "guides_unchanged": kept,
        "models": {
            name: {
                "step": model.info["training"]["step"],
                "loss": losses(model, data, config.crop_seconds),
                "agreement": figures[name],
            }
            for name, model in models.items()
        },
    }


def mixes_of(config: MelodyCheckConfig, data: ShardSet) -> dict[int, np.ndarray]:
    """Chroma [T_c] of another mix of each validation track, by its row in `data`.

    Raises:
        UserError: `mixes` holds other tracks, or none in other mixes.
    """
    mixes = ShardSet.open(config.mixes)
    if not mixes.info.get("settings", {}).get("chroma_stems") or mixes.info["codec"] != data.info["codec"]:
        raise UserError(
            f"mixes={config.mixes!r} must be DATA's catalogue ingested by the same codec with --chroma_stems true"
        )
    rows = {mixes.meta(int(row))["track_id"]: int(row) for row in mixes.rows("valid")}
    names = {int(row): data.meta(int(row))["track_id"] for row in data.rows("valid")}
    if lacking := sorted(set(names.values()) - set(rows)):
        raise UserError(f"mixes={config.mixes!r} lacks tracks of DATA: {', '.join(lacking[:5])}; ingest one catalogue")
    return {row: mixes.chromas(rows[name])[1] for row, name in names.items()}


def main(argv: Sequence[str]) -> int:
    """`python -m training.melody_check`: see `MelodyCheckConfig`."""
    found = check(settings.parse(MelodyCheckConfig, argv, prog="python -m training.melody_check"))
    print(f"guides    frames unchanged: {', '.join(f'{n} {v:.0%}' for n, v in found['guides_unchanged'].items())}")
    for name, of in found["models"].items():
        loss = of["loss"]
        print(
            f"{name:<10}loss {loss['own']:.4f} with the melody, {loss['other']:.4f} with another's, {loss['none']:.4f} "
            f"without (step {of['step']}); same pitch class as the clean guide in {found['clips']} clips: "
            + ", ".join(
                f"{guide} {share['mean']:.1%}"
                + ("" if name == "plain" else f" ({100 * share['difference']:+.1f} ± {100 * share['error']:.1f})")
                for guide, share in of["agreement"].items()
            )
        )
    if out := found["settings"]["out"]:
        files.write_bytes(out, (json.dumps(found, indent=2) + "\n").encode())
    return 0


if __name__ == "__main__":
    settings.run(main)
