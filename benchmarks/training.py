"""Speed of training: audio-seconds per second, where a step's time goes, and how much passes outside the model.

    python -m benchmarks.training [--size demo] [--data URI] [--steps 30] [--json FILE]

Two measurements. The run: `training.train` itself, with everything beside the step (reading, logging, Lightning). The
parts: one step taken apart, each part timed alone on one batch. Without DATA a set of made-up tokens is used; speed
does not depend on which tokens they are. Keep the machine otherwise idle.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from musicgen import settings
from training.strategy import HardwareConfig


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Args:
        size: demo, 300m, 1.5b or 3.3b.
        data: data set; made up when empty.
        steps: steps of the measured run; the first fifth is left out.
        precision: bf16, float32, or auto: what training itself would take here.
        batch: items per step; 0 takes the size's own.
        json: also write the result to this file.
    """

    size: str = "demo"
    data: str = ""
    steps: int = 30
    precision: Literal["auto", "bf16", "float32"] = "auto"
    batch: int = 0
    json: str = ""

    @property
    def number_format(self) -> str:
        """The precision that is measured."""
        return HardwareConfig(precision=self.precision).number_format


def measure_run(config: BenchConfig, data: str, folder: Path) -> dict[str, float]:
    """A run of `training.train`; audio-seconds per second and the share outside the model, after the warm-up."""
    from training import record, train

    warm = max(config.steps // 5, 1)
    argv = ["--size", config.size, "--data", data, "--run", str(folder / "run"), "--steps", str(config.steps)]
    argv += ["--hardware.precision", config.precision, "--log.clips", "0", "--log.every", str(warm)]
    argv += ["--log.valid_every", str(10**9), "--log.state_every", str(10**9), "--batch.valid_crops", "1"]
    argv += ["--batch.size", str(config.batch)] if config.batch else []
    train.main(argv)
    lines = [row for row in record.read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in row]
    lines = [row for row in lines if row["step"] > warm and row["step"] % warm == 0]
    return {
        "audio_seconds_per_second": statistics.harmonic_mean([r["train/audio_seconds_per_second"] for r in lines]),
        "outside_model_share": statistics.mean(r["train/outside_model_share"] for r in lines),
        "memory_gib": lines[-1]["train/memory_gib"],
    }


def measure_parts(config: BenchConfig, data: str, repeats: int = 5) -> dict[str, float]:
    """Seconds of each part of a step, alone: median of `repeats`."""
    from musicgen import patterns
    from musicgen.conditioning import TextEncoder
    from musicgen.lm import MusicLM
    from pipelines.shard import ShardSet
    from training import loss, optim, train
    from training.data import Batch, Stream

    options = ["--size", config.size, "--data", data, "--run", "unused"]
    run = train.read_config(options + (["--batch.size", str(config.batch)] if config.batch else []))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = Stream(ShardSet.open(data), run.batch, seed=0)
    encoder = TextEncoder.load(run.lm.condition.text_encoder).to(device)
    torch.manual_seed(0)
    lm = MusicLM(run.lm).to(device)
    optimizer = optim.build_optimizer(lm.parameters(), run.optim)
    seconds: dict[str, list[float]] = {}

    def timed(part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.setdefault(part, []).append(time.perf_counter() - began)
        return result

    def columns(batch: Batch) -> Any:
        lm = run.lm
        return patterns.training_columns(
            batch.codes.long(), lm.special_id, valid=batch.valid, pattern=lm.pattern, tail=lm.tail
        )

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for step in range(repeats + 1):
        batch = timed("read and collate", stream.batch, step, 0).to(device)
        text, mask = timed("text encoder", encoder.encode, batch.texts)
        inputs, targets, scored = timed("delay pattern", columns, batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.number_format == "bf16"):
            hidden = timed("layers forward", lm.hidden, inputs, text, mask)
            heads: Any = list(lm.linears)
            sums = timed("heads, loss, their gradient", loss.cross_entropy_sums, hidden, heads, targets, scored)
        timed("layers backward", (sums / scored.sum()).mean().backward)
        timed("clip", torch.nn.utils.clip_grad_norm_, lm.parameters(), run.optim.clip)
        timed("optimiser", update)
    return {part: statistics.median(values[1:]) for part, values in seconds.items()}


def table(config: BenchConfig, run: dict[str, float], parts: dict[str, float]) -> str:
    """Both measurements as text."""
    whole = sum(parts.values())
    lines = [f"training, size {config.size}, {config.number_format}, {torch.get_num_threads()} threads", ""]
    lines += [f"  {'part of a step':<34}{'ms':>9}{'share':>9}"]
    lines += [f"  {part:<34}{1e3 * value:>9.1f}{value / whole:>9.1%}" for part, value in parts.items()]
    lines += [f"  {'sum':<34}{1e3 * whole:>9.1f}", ""]
    lines += [
        f"  the run: {run['audio_seconds_per_second']:.1f} audio-seconds per second, "
        f"{run['outside_model_share']:.2%} of the time outside the model (aim: under 3 %), "
        f"{run['memory_gib']:.2f} GiB at most",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measure and print; see `BenchConfig`."""
    config = settings.parse(BenchConfig, argv, prog="python -m benchmarks.training")
    os.environ.setdefault("WANDB_MODE", "offline")
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), config.data
        if not data:
            from tests.training.synthetic import write_dataset

            data = str(write_dataset(folder / "data", tracks=80, valid=2, frames=(500, 2000)))
        result = {"run": measure_run(config, data, folder), "parts_seconds": measure_parts(config, data)}
    print("\n" + table(config, result["run"], result["parts_seconds"]))
    document = {**settings.to_dict(config), "threads": torch.get_num_threads(), **result}
    print(json.dumps(document))
    if config.json:
        Path(config.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    settings.run(main)
