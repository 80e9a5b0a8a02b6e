"""What a run says on the terminal beside its plan: the data before it, how it went after it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from musicgen.weights import non_commercial
from pipelines.takedown import SOURCES
from training import budget, controls, finetune, record, sources
from training.data import tracks_of

if TYPE_CHECKING:
    from musicgen.conditioning import TextEncoder
    from training.config import TrainConfig
    from training.module import MusicLMModule


def describe_data(shards: sources.Sources) -> str:
    """One line about a data set: tracks, hours, codec, version."""
    rate, parts = shards.info["codec"]["frame_rate"], []
    for split in ("train", "valid"):
        tracks = tracks_of(shards, split)
        parts.append(f"{len(tracks)} {split} tracks ({tracks.frames.sum() / rate / 3600:.2f} h)")
    codec = shards.info["codec"]
    made_of = f"codec {codec['name']} {codec['identity'][:12]}, version {shards.info['dataset_version'][:12]}"
    return f"{', '.join(parts)}; {made_of}"


def data_lines(
    config: TrainConfig,
    encoder: TextEncoder,
    shards: sources.Sources,
    start: int,
    unigram: list[float],
    *,
    begun: bool = False,
) -> list[str]:
    """What follows the plan: the data, what is heard, the length of the run, what the losses are read against.

    Args:
        start: the step that the run goes on from.
        begun: it has been started before.
    """
    again = ", from the first one again: the run has kept no state yet (log.state_every)" if begun else ""
    books, mixture = ", ".join(f"{h:.2f}" for h in unigram), sources.describe(shards)
    on = "validation crops" if len(tracks_of(shards, "valid")) else "training tracks (there are none to validate on)"
    return [
        f"data      {describe_data(shards)}" + (f"; mixture {mixture}" if mixture else ""),
        f"hears     {controls.described(config.lm.condition, encoder)}",
        *controls.untrained(config.lm.condition, shards, tracks_of(shards, "train").rows),
        *_left_out(shards),
        *_licences(shards, config.licence),
        *_too_long(config, shards),
        f"steps     {config.steps}" + (f", going on from {start}" if start else again),
        f"unigram   {sum(unigram) / len(unigram):.3f} nats on the {on}, mean of the codebooks [{books}]: "
        "the loss of a model that only knows how common each code is",
    ]


def _licences(shards: sources.Sources, licence: str) -> list[str]:
    """The licences of the music and of the releases, with a warning where the latter promises more."""
    found = sources.licences(shards)
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    out = [f"licences  {', '.join(found[:6])}{more} (the music); {licence} (the releases, --licence)"]
    bound = [name for name in found if non_commercial(name)]
    if bound and licence != "not stated" and not non_commercial(licence):
        out.append(
            f"warning   music under {', '.join(bound)} may not be used commercially without its rightsholders' grant, "
            f"and the releases are called {licence}; they say so to whoever loads them"
        )
    return out


def _left_out(shards: sources.Sources) -> list[str]:
    """Lines where a mixture leaves out tracks that a single set would have, or cannot tell whether it should."""
    out = []
    if gone := shards.taken_down:
        names = shards.index.column("track_id")
        some = [f"{names[row].as_py()!r} of {shards.sets[shards.source[row]].root} as {gone[row]}" for row in gone]
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        out.append(
            f"withdrawn {len(some)} track{'s are' if len(some) > 1 else ' is'} left out, whose sound another set's "
            f"catalogue took down ({'; '.join(some[:3])}{more}). If that is wrong, mend the row that took it down"
        )
    if shards.silent:
        out.append(
            f"warning   {', '.join(shards.silent)}: no {SOURCES} there, so it is not known what its catalogue took "
            "down, nor whether it holds what another one did"
        )
    if count := len(shards.heard_elsewhere):
        out.append(
            f"valid     {count} validation track{'s are' if count > 1 else ' is'} left out: their artist or work is "
            "trained on in another set of the mixture"
        )
    return out


def _too_long(config: TrainConfig, shards: sources.Sources) -> list[str]:
    """Lines for what is longer than what it is of: warm-up and stop_at than the run, a crop than any track."""
    longest = float(tracks_of(shards, "train").frames.max()) / shards.info["codec"]["frame_rate"]
    warm, crop, out = config.optim.warmup_steps, config.batch.crop_seconds, []
    if warm >= config.steps:
        out.append(
            f"warning   the warm-up (optim.warmup_steps {warm}) takes all {config.steps} steps; the rate gets to "
            f"{config.steps / warm:.0%} of optim.lr; a tenth of the steps is usual, "
            f"--optim.warmup_steps {max(config.steps // 10, 1)}"
        )
    if config.stop_at > config.steps:
        out.append(f"warning   stop_at {config.stop_at} lies past the last of {config.steps} steps, which ends the run")
    if crop > longest:
        out.append(
            f"warning   no training track is as long as a crop: the longest has {longest:.1f} s, batch.crop_seconds is "
            f"{crop:g}; what is missing is padding. Give --batch.crop_seconds {max(int(longest), 1)}"
        )
    return out


def summary(
    folder: Path, module: MusicLMModule, valid: dict[str, float], stop: int, total: int, plan: budget.Plan
) -> None:
    """Print how the run went, once it is over."""
    seen = module.progress.audio_seconds_seen
    print(f"done      {stop} of {total} steps, {seen / 3600:.2f} h of audio seen; record in {folder}/metrics.jsonl")
    if not plan.device.is_cpu:
        from training.callbacks import memory_gib

        used, planned = memory_gib(), plan.needed / 2**30
        print(f"memory    {used:.2f} GiB at most, planned {planned:.2f} ({used / planned - 1:+.0%})")
    if valid and module.progress.best_loss is not None:
        below = valid["valid/below_unigram"] + valid["valid/loss"] - module.progress.best_loss
        perplexity = math.exp(module.progress.best_loss)
        print(
            f"best      valid loss {module.progress.best_loss:.3f} (perplexity {perplexity:.0f}) at step "
            f"{module.progress.best_step}, {abs(below):.3f} nats {'below' if below >= 0 else 'above'} unigram; "
            f"release in {folder}/release"
        )
    for line in finetune.verdict(record.read_metrics(folder / "metrics.jsonl")):
        print(line)
