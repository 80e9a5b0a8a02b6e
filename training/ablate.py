"""The paper's comparison of codebook patterns as a command: `make ablate DATA=… [STEPS=400]`.

    python -m training.ablate --data runs/demo/data --out runs/ablate

Every pattern trains the same model on the same crops in the same order, for as many updates; then those whose columns
cost more train again for as much compute as delay had. A loss is the mean cross-entropy per code over all K codebooks
on the same held-out crops, so that losses of different patterns compare: each predicts the same codes, and differs in
what it has seen when it does so. Parallel predicts the K codes of a frame from the past alone, flattening each from all
codes before it; delay lies between.

Each training is a run folder below `--out`: the same command goes on where it stopped. Settings of training pass
through (`ARGS='--batch.size 4'`); configs/train/ablate.yaml lies on top of those of the size.

Source: Copet et al. 2023, section 4.3 and table 4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from musicgen import files, patterns, settings
from musicgen.errors import UserError
from training import budget, record, train
from training.config import CONFIGS, TrainConfig, read_config, task_of, value_of

# Table 4: columns of 30 s, FAD, KL, CLAP score as printed; OVL and REL were noted from memory (see UNVERIFIED).
PAPER: dict[str, tuple[int, float, float, float, float, float]] = {
    "delay": (1500, 0.96, 0.52, 0.35, 79.69, 80.16),
    "partial_delay": (1500, 1.51, 0.54, 0.32, 79.13, 79.67),
    "parallel": (1500, 2.58, 0.62, 0.27, 72.21, 80.30),
    "partial_flattening": (3000, 1.32, 0.54, 0.34, 78.56, 79.18),
    "coarse_first": (3000, 1.98, 0.56, 0.30, 74.42, 76.55),
    "flattening": (6000, 0.86, 0.51, 0.37, 79.71, 82.03),
}
UNVERIFIED = "unverified: noted from memory, not checked against the paper"
REFERENCE = "delay"  # the pattern whose compute the second table gives to all
ALIKE = 0.02  # compute that differs by less is equal
CLOSE = 0.01  # nats; one run of each pattern cannot tell less from chance


@dataclass(frozen=True)
class AblateConfig:
    """Which patterns to compare; all else are settings of training.

    Args:
        patterns: names of `musicgen.patterns.PATTERNS`.
        equal_compute: train those that cost more again, for as much compute as `delay` (or the first of `patterns`).
        out: folder for the runs and figures.json.
    """

    patterns: tuple[str, ...] = tuple(PAPER)
    equal_compute: bool = True
    out: str = "runs/ablate"

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError("out is empty; give a folder for the runs and figures.json, such as OUT=runs/ablate")
        for name in self.patterns:
            if name not in patterns.PATTERNS:
                raise ValueError(f"unknown pattern {name!r}; allowed: {', '.join(patterns.PATTERNS)}")
        if not self.patterns or len(set(self.patterns)) < len(self.patterns):
            raise ValueError(f"patterns is {list(self.patterns)}; give different names, at least one")


# Settings of training that the comparison sets itself, and what to give instead.
_OWN = {
    "lm.pattern": 'give the patterns to compare as --patterns \'["delay", "parallel"]\'',
    "run": "give the folder of all runs as OUT",
    "stop_at": "patterns are compared after all their steps; give fewer as STEPS",
}


def check_training(argv: Sequence[str]) -> None:
    """Refuse what would be overridden or spoil the comparison among the settings that go on to training.

    Raises:
        UserError: naming the setting and what to give instead.
    """
    for name, instead in _OWN.items():
        given = value_of(name, argv)
        if given and (name, given) != ("stop_at", "0"):
            raise UserError(f"--{name} {given} cannot be given to a comparison of patterns: {instead}")


def equal_steps(steps: int, flop: float, reference: float) -> int:
    """Steps of a pattern that cost as much as `steps` of the reference (FLOP per step of each)."""
    return max(round(steps * reference / flop), 1)


def step_flop(config: TrainConfig) -> float:
    """Model FLOP of one step by `budget.FLOP_RULE`."""
    return config.batch.size * task_of(config).clip_flop


def result_of(config: TrainConfig) -> dict[str, Any]:
    """What a finished run came to: updates, audio, compute, and the losses of its last validation.

    Raises:
        UserError: the run has no validation at its end.
    """
    rows = record.read_metrics(Path(config.run) / "metrics.jsonl")
    last = next((r for r in reversed(rows) if "valid/loss" in r and r["step"] == config.steps), None)
    if last is None:
        raise UserError(f"{config.run} has no validation after step {config.steps}: DATA needs validation tracks")
    books = [last[f"valid/loss_q{k}"] for k in range(1, config.lm.num_codebooks + 1)]
    speed = [r["train/audio_seconds_per_second"] for r in rows if "train/audio_seconds_per_second" in r]
    seen = [r["train/audio_seconds"] for r in rows if "train/audio_seconds" in r]
    return {
        "pattern": config.lm.pattern,
        "columns_per_second": budget.positions(config.lm, task_of(config).frames) / config.batch.crop_seconds,
        "steps": config.steps,
        "audio_seconds": seen[-1],
        "flop": config.steps * step_flop(config),
        "audio_seconds_per_second": sorted(speed)[len(speed) // 2],
        "loss": last["valid/loss"],
        "perplexity": math.exp(last["valid/loss"]),
        "codebooks": books,
    }


def run_all(config: AblateConfig, training: Sequence[str]) -> dict[str, Any]:
    """Train what is not yet trained; the figures of both tables.

    Args:
        training: arguments of `training.train`; RUN and the pattern are set here.

    Raises:
        UserError: as training.
    """
    lead = REFERENCE if REFERENCE in config.patterns else config.patterns[0]
    order = sorted(config.patterns, key=lambda name: name != lead)
    updates, compute = [], []
    reference: TrainConfig | None = None
    for pattern in order:
        made = _config(config, training, pattern, pattern)
        reference = reference or made
        updates.append(_train(made))
        cost, budgeted = step_flop(made), step_flop(reference)
        if not config.equal_compute:
            continue
        steps = equal_steps(made.steps, cost, budgeted)
        if abs(cost / budgeted - 1) < ALIKE or steps == made.steps:
            compute.append(updates[-1])
            continue
        shorter = replace(made, steps=steps, run=f"{made.run}-compute")
        shorter = replace(shorter, optim=replace(made.optim, warmup_steps=min(made.optim.warmup_steps, steps // 10)))
        compute.append(_train(shorter))
    place = {name: i for i, name in enumerate(config.patterns)}
    by_place = lambda row: place[row["pattern"]]  # noqa: E731
    return {"updates": sorted(updates, key=by_place), "compute": sorted(compute, key=by_place), "reference": lead}


def _config(config: AblateConfig, training: Sequence[str], pattern: str, name: str) -> TrainConfig:
    layer = ["--config", str(CONFIGS / "ablate.yaml")]
    return read_config([*layer, *training, "--lm.pattern", pattern, "--run", str(Path(config.out) / name)])


def _train(config: TrainConfig) -> dict[str, Any]:
    print(f"\n{Path(config.run).name}: {config.steps} steps, {config.steps * step_flop(config):.3g} FLOP", flush=True)
    train.fit(config)
    return result_of(config)


def lines(found: dict[str, Any]) -> list[str]:
    """Both tables, the paper's figures beside them, and whether the paper's order shows."""
    out = [
        "",
        "Equal updates, equal audio. Loss: nats per code, mean over all codebooks, on the same held-out crops. FLOP: "
        f"{budget.FLOP_RULE}.",
        "",
        *_table(found["updates"], paper=True),
        "",
        f"Paper: table 4, 30 s in its domain. OVL and REL {UNVERIFIED}.",
    ]
    if found["compute"]:
        out += ["", f"Equal compute, that of {found['reference']}:", "", *_table(found["compute"], paper=False)]
    return [*out, "", *verdict(found["updates"])]


def _table(rows: list[dict[str, Any]], *, paper: bool) -> list[str]:
    head = ["pattern", "columns per s of audio", "updates", "audio, h", "FLOP", "loss", "perplexity", "by codebook"]
    more = ["audio-s per s", "paper: columns of 30 s", "FAD", "KL", "CLAP", "OVL (unverified)", "REL (unverified)"]
    head += more if paper else []
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row["pattern"].replace("_", " "),
            f"{row['columns_per_second']:.0f}",
            str(row["steps"]),
            f"{row['audio_seconds'] / 3600:.2f}",
            f"{row['flop']:.3g}",
            f"{row['loss']:.3f}",
            f"{row['perplexity']:.0f}",
            " ".join(f"{x:.2f}" for x in row["codebooks"]),
        ]
        if paper:
            theirs = [f"{x:g}" for x in PAPER.get(row["pattern"], ())] or ["–"] * 6
            cells += [f"{row['audio_seconds_per_second']:.0f}", *theirs]
        out.append("| " + " | ".join(cells) + " |")
    return out


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Whether flattening <= delay < parallel, with the differences and the codebooks they come from."""
    by = {row["pattern"]: row for row in rows}
    out = []
    for low, high, sign in (("flattening", "delay", "<="), ("delay", "parallel", "<")):
        if low not in by or high not in by:
            continue
        gap = by[high]["loss"] - by[low]["loss"]
        shows = gap >= 0 if sign == "<=" else gap > 0
        word = "DOES NOT SHOW" if not shows else "shows" if gap >= CLOSE else "shows, but by less than one run can tell"
        books = ", ".join(f"{b - a:+.3f}" for a, b in zip(by[low]["codebooks"], by[high]["codebooks"]))
        out.append(f"order     {low} {sign} {high}: {word}, {high} is {gap:+.3f} nats from {low} (by codebook {books})")
    return out


def main(argv: Sequence[str]) -> int:
    """Train, print the tables, write figures.json; see `AblateConfig`."""
    own, training = settings.split(AblateConfig, argv)
    config = settings.parse(AblateConfig, own, prog="python -m training.ablate")
    check_training(training)
    found = run_all(config, training)
    files.write_bytes(files.join(config.out, "figures.json"), (json.dumps(found, indent=2) + "\n").encode())
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    settings.run(main)
