"""Does fine-tuning on ten minutes of music help, without collapsing? `make check-finetune [DATA=…]`, as a table.

    python -m training.finetune_check --data musicgen/assets/held_out --out runs/check-finetune

The music is that of artists whom the base model has not heard (half an hour by such artists ships for the demo model):
those of the validation split with the most music, unless they are named, as it is or as an old tape would have it
(`--sound`, see `training.rerecord`). A fifth of their works is held out. The base is fine-tuned twice, whole and by an
adapter, as `make train INIT=… [LORA=…]` does it by default, each in a run folder of its own (so that this command goes
on where it stopped). Base and results are scored on the held-out works (did it learn?), over the whole run (did it
collapse?), on the other artists of the validation split (what did it forget?), and by clips of the same prompts and
seeds (is it noise or silence?). The exit code says whether all is well.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from musicgen import adapters, files, generate, settings, weights
from musicgen.codec import DEMO_FOLDER
from musicgen.conditioning import TextEncoder
from musicgen.errors import UserError
from musicgen.metrics import audio as measures
from musicgen.sampling import SamplingConfig
from pipelines.shard import SPLITS
from training import data, finetune, loss, record, rerecord, selection, sources, train
from training.config import read_config
from training.module import MusicLMModule
from training.music_check import NOISE_FLATNESS, SILENT_SHARE
from training.optim import OptimConfig
from training.selection import Selection
from training.start import load_codec

HELD_OUT = DEMO_FOLDER.parent / "held_out"


@dataclass(frozen=True)
class FinetuneCheckConfig:
    """What to fine-tune on what.

    Args:
        model: the base: `demo`, a release folder or a hub name.
        size: its size, whose settings of fine-tuning are used.
        data: a data set of ingest that holds artists whom the base has not heard; such music ships for the demo model.
        artists: whose music; when empty, artists of the validation split, those with the most music first.
        sound: `as_is`, or `old_tape`, a sound that no model of the demo has heard.
        minutes: music to train on.
        hold_out: share of that music's works to validate on.
        rank: of the adapter.
        steps: length of both fine-tunings; 0 takes the settings' own.
        rest_crops: most crops of the other artists that are scored.
        clips: clips generated of each model; 0 makes none.
        clip_seconds: their length.
        out: folder for the runs and figures.json.
        threads: CPU threads of the trainings; 0 leaves torch's choice.
    """

    model: str = "demo"
    size: str = "demo"
    data: str = str(HELD_OUT)
    artists: tuple[str, ...] = ()
    sound: Literal["as_is", "old_tape"] = "old_tape"
    minutes: float = 10.0
    hold_out: float = 0.2
    rank: int = 16
    steps: int = 0
    rest_crops: int = 64
    clips: int = 4
    clip_seconds: float = 5.0
    out: str = "runs/check-finetune"
    threads: int = 0


def unheard_artists(shards: sources.Sources, minutes: float) -> tuple[str, ...]:
    """Artists of the validation split that together have so much music, those with the most first.

    Raises:
        UserError: there is not as much, or none would be left for the rest.
    """
    rate, played = shards.info["codec"]["frame_rate"], Counter[str]()
    frames, names = shards.index.column("frames"), shards.index.column("artist")
    for row in shards.rows("valid").tolist():
        played[names[row].as_py()] += frames[row].as_py() / rate / 60
    chosen: list[str] = []
    for name, _ in sorted(played.items(), key=lambda item: (-item[1], item[0])):
        if sum(played[c] for c in chosen) >= minutes:
            return tuple(chosen)
        chosen.append(name)
    raise UserError(
        f"DATA's validation split has {sum(played.values()):.1f} minutes of {len(played)} artists; {minutes:.1f} of "
        "some and one more artist are needed. Give more music, or fewer --minutes"
    )


@torch.no_grad()
def validation_loss(lm: Any, encoder: TextEncoder, shards: sources.Sources, batch: data.BatchConfig) -> float:
    """Loss of a model on the validation crops of `shards`, as training reports it (mean of the codebooks, nats)."""
    rule = data.crop_rule(batch, shards.info["codec"]["frame_rate"])
    module = MusicLMModule(lm, encoder, OptimConfig(), total_steps=1, crop_frames=rule.frames)
    scored = [module.score(b) for b in data.validation_batches(shards, batch, condition=lm.config.condition)]
    sums, counts = (torch.stack(parts).sum(0).tolist() for parts in zip(*scored))
    return loss.metrics(sums, counts, "valid")["valid/loss"]


def clip_figures(folder: str, prompts: Sequence[str | None], seconds: float) -> dict[str, float]:
    """Noise and silence in clips of a model: largest spectral flatness and largest share of silence."""
    model = generate.load(folder)
    sampling = replace(SamplingConfig(), top_k=min(SamplingConfig().top_k, model.lm.config.codebook_size))
    audio, _ = generate.generate(model, list(prompts), seconds, list(range(len(prompts))), sampling)
    return {
        "flatness": max(measures.spectral_flatness(clip) for clip in audio),
        "silence": max(measures.silence_share(clip) for clip in audio),
    }


def check(config: FinetuneCheckConfig) -> dict[str, Any]:
    """Fine-tune, score, and return the figures as plain data, with `passed`.

    Raises:
        UserError: no music that fits, or as training.
    """
    whole = sources.open_data(config.data)
    artists = config.artists or unheard_artists(whole, config.minutes / (1 - config.hold_out))
    chosen = Selection(artists=tuple(artists), minutes=config.minutes, hold_out=config.hold_out)
    place, names = config.data, whole.index.column("artist")
    if config.sound == "old_tape":
        every = np.concatenate([whole.rows(split) for split in SPLITS]).tolist()
        mine = [row for row in every if names[row].as_py() in artists]
        place = str(rerecord.write(whole, mine, load_codec(whole, ""), Path(config.out) / "tape"))
    own, rest = sources.open_data(place), sources.open_data(config.data)
    selection.apply(own, chosen)
    others = [r for r in whole.rows("valid").tolist() if names[r].as_py() not in artists]
    nothing = np.empty(0, dtype=np.int64)
    rest.narrow({"train": nothing, "valid": np.array(others, dtype=np.int64), "test": nothing})
    said = {"train_minutes": _minutes(own, "train"), "valid_minutes": _minutes(own, "valid")}
    common = ["--size", config.size, "--data", place, "--init", config.model]
    common += ["--select.artists", json.dumps(list(artists)), "--select.minutes", str(config.minutes)]
    common += ["--select.hold_out", str(config.hold_out), "--log.clips", "0"]
    common += ["--hardware.threads", str(config.threads), *(["--steps", str(config.steps)] if config.steps else [])]
    out, models = Path(config.out), {}
    for name, more in (("whole", []), ("adapter", ["--lora.rank", str(config.rank)])):
        print(f"\n{name}: fine-tuning on {said['train_minutes']:.1f} min of {', '.join(artists)}", flush=True)
        run = out / name
        settings_of = read_config([*common, *more, "--run", str(run)])
        train.fit(settings_of)
        models[name] = (str(run / "release"), settings_of)
    batch = replace(models["whole"][1].batch, valid_crops=config.rest_crops)
    encoder = TextEncoder.load(weights.place_of(config.model, weights.read_info(config.model), "text_encoder"))
    prompts = [t for b in data.validation_batches(own, batch) for t in b.texts][:: max(1, config.clips)][: config.clips]
    rows: dict[str, dict[str, Any]] = {}
    for name, folder in (("base", config.model), *((n, f) for n, (f, _) in models.items())):
        lm, _ = weights.load_release(folder, quiet=True)
        rows[name] = {
            "own": validation_loss(lm, encoder, own, batch),
            "rest": validation_loss(lm, encoder, rest, batch),
            **(clip_figures(folder, prompts, config.clip_seconds) if prompts else {}),
        }
        if name != "base":
            rows[name] |= _course(out / name, Path(folder))
    base_file = files.local_path(files.join(weights.resolve(config.model), weights.WEIGHTS))
    rows["base"]["bytes"] = base_file.stat().st_size if base_file and base_file.is_file() else None
    found = {"artists": list(artists), "sound": config.sound, **said, "rows": rows}
    return {**found, **_verdict(rows)}


def _minutes(shards: sources.Sources, split: str) -> float:
    frames = shards.index.column("frames").to_numpy()[shards.rows(split)]
    return float(frames.sum() / shards.info["codec"]["frame_rate"] / 60)


def _course(run: Path, release: Path) -> dict[str, Any]:
    """What the validations of a run were, and how many bytes its release has."""
    rows = record.read_metrics(run / "metrics.jsonl")
    losses = {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row}
    name = adapters.WEIGHTS if (release / adapters.WEIGHTS).is_file() else weights.WEIGHTS
    course = {"course": losses, "verdict": finetune.verdict(rows), "bytes": (release / name).stat().st_size}
    return {**course, "parameters": weights.read_info(str(release))["weights"]["parameters"]}


def _verdict(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether all is well, and in words what is not."""
    wrong = []
    for name in ("whole", "adapter"):
        row, course = rows[name], list(rows[name]["course"].values())
        gain = course[0] - min(course)
        if gain <= 0:
            wrong.append(f"{name}: the validation loss never fell")
        elif course[-1] > min(course) + 0.1 * gain:
            wrong.append(f"{name}: the validation loss rose by {course[-1] - min(course):.3f} after its best")
        if row.get("flatness", 0) > max(NOISE_FLATNESS, rows["base"].get("flatness", 0)):
            wrong.append(f"{name}: a clip is noise (flatness {row['flatness']:.2f})")
        if row.get("silence", 0) > max(SILENT_SHARE, rows["base"].get("silence", 0)):
            wrong.append(f"{name}: a clip is silent for {row['silence']:.0%}")
    if rows["adapter"]["bytes"] * 4 > rows["whole"]["bytes"]:
        wrong.append(f"the adapter is not small: {rows['adapter']['bytes']:,} bytes")
    return {"passed": not wrong, "wrong": wrong}


def lines(found: dict[str, Any]) -> list[str]:
    """The figures as a table."""
    out = [
        f"{found['train_minutes']:.1f} min to learn from, {found['valid_minutes']:.1f} min held out, of "
        f"{', '.join(found['artists'])} ({found['sound'].replace('_', ' ')})",
        "",
        "| model | held-out loss | on the way: first, best, last | others' loss | bytes | flatness | silence |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        course = list(row.get("course", {}).values())
        run = f"{course[0]:.3f}, {min(course):.3f}, {course[-1]:.3f}" if course else ""
        heard = f"{row['flatness']:.2f} | {row['silence']:.0%}" if "flatness" in row else " | "
        size = f"{row['bytes']:,}" if row["bytes"] else ""
        out.append(f"| {name} | {row['own']:.3f} | {run} | {row['rest']:.3f} | {size} | {heard} |")
    out += ["", *(f"{name}: {line}" for name in ("whole", "adapter") for line in found["rows"][name]["verdict"])]
    out += [f"WRONG     {line}" for line in found["wrong"]]
    return [*out, "passed" if found["passed"] else "NOT passed"]


def main(argv: Sequence[str]) -> int:
    """Check and print; see `FinetuneCheckConfig`. Returns 1 where something is wrong."""
    config = settings.parse(FinetuneCheckConfig, argv, prog="python -m training.finetune_check")
    found = check(config)
    files.write_bytes(files.join(config.out, "figures.json"), (json.dumps(found, indent=2) + "\n").encode())
    print("\n" + "\n".join(lines(found)))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    settings.run(main)
