"""Speed of training: a step beside the peer's, where its time goes, and how much passes outside the model.

    python -m benchmarks.training [--size 300m] [--batch 1 --crop_seconds 5] [--data URI] [--json FILE]

Three measurements. The peer: a training step of this model and one of a plain `transformers.MusicgenForCausalLM` of the
same shape, in turn, on the same batch, each in a process of its own, in float32 and, where the processor has bf16, in
bf16 autocast; both at their best precision are compared, and once more with the peer's process set up as ours is. With
PARTS the step has several, and ours is measured with a cast of the weights in each of them as well.
The run: `training.train` itself, with everything beside the step (reading, logging, Lightning). The parts: one step
taken apart. Without DATA a set of made-up tokens is used; speed does not depend on which tokens they are. Sizes other
than demo hear a text encoder of T5-base's shape with random weights. Keep the machine otherwise idle.
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

from benchmarks.models import write_t5
from musicgen import settings
from musicgen.errors import UserError
from training.config import read_config, task_of
from training.strategy import HardwareConfig
from training.traffic import Traffic

CASTS = "a cast per part"
PHASES = tuple(f"seconds/{phase}" for phase in ("step", "data", "text", "forward", "backward", "optimizer"))


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Args:
        size: demo, 300m, 1.5b or 3.3b.
        data: data set; made up when empty.
        steps: steps of the measured run, the first fifth left out; 0 leaves run and parts out.
        rounds: steps of ours and of the peer's, in turn, in each precision, the first left out; 0 leaves them out.
        precision: of run and parts: bf16, float32, or auto, what training itself would take here.
        batch: items per step; 0 takes the size's own, on a CPU 1 of the real sizes.
        parts: of a step beside the peer's, of `batch` items each; the run has those of its plan.
        crop_seconds: length of a crop; 0 takes the size's own, on a CPU 5 s of the real sizes.
        json: also write the result to this file.
    """

    size: str = "demo"
    data: str = ""
    steps: int = 30
    rounds: int = 4
    precision: Literal["auto", "bf16", "float32"] = "auto"
    batch: int = 0
    parts: int = 1
    crop_seconds: float = 0.0
    json: str = ""

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"parts is {self.parts}; a step has at least 1")
        if self.rounds == 1:
            raise ValueError("rounds is 1, and the first is left out; give 0 or at least 2")

    @property
    def number_format(self) -> str:
        """The precision that is measured."""
        return HardwareConfig(precision=self.precision).number_format

    def shape(self, text_encoder: str = "") -> list[str]:
        """The settings of training that follow from these, with the size's text encoder or one of T5-base's width."""
        small = self.size != "demo" and not torch.cuda.is_available()
        batch, crop = self.batch or small, self.crop_seconds or 5.0 * small
        words = ["--size", self.size, "--hardware.precision", self.precision, "--codebook_init", "false"]
        words += ["--batch.size", str(int(batch))] if batch else []
        words += ["--batch.crop_seconds", str(crop)] if crop else []
        if text_encoder:
            words += ["--lm.condition.text_encoder", text_encoder, "--lm.condition.text_dim", "768"]
        return words


def measure_run(config: BenchConfig, data: str, folder: Path, encoder: str) -> dict[str, float]:
    """A run of `training.train`; audio-seconds per second and the share outside the model, after the warm-up."""
    from training import record, train

    warm = max(config.steps // 5, 1)
    argv = [*config.shape(encoder), "--data", data, "--run", str(folder / "run"), "--steps", str(config.steps)]
    argv += ["--log.clips", "0", "--log.every", str(warm), "--log.valid_every", str(10**9)]
    argv += ["--log.state_every", "0", "--batch.valid_crops", "1"]
    train.main(argv)
    lines = [row for row in record.read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in row]
    lines = [row for row in lines if row["step"] > warm and row["step"] % warm == 0]
    return {
        "audio_seconds_per_second": statistics.harmonic_mean([r["train/audio_seconds_per_second"] for r in lines]),
        "outside_model_share": statistics.mean(r["train/outside_model_share"] for r in lines),
        "memory_gib": lines[-1]["train/memory_gib"],
        **{key.replace("/", "_"): statistics.median([r[key] for r in lines]) for key in PHASES if key in lines[-1]},
    }


def measure_parts(config: BenchConfig, data: str, encoder_name: str, repeats: int = 5) -> dict[str, float]:
    """Seconds of each part of a step, alone: median of `repeats`."""
    from musicgen import patterns
    from musicgen.conditioning import TextEncoder
    from musicgen.lm import MusicLM
    from pipelines.shard import ShardSet
    from training import loss, optim
    from training.data import Batch, Stream

    run = read_config(config.shape(encoder_name), folders=False)
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


def _our_side(run: Any) -> tuple[Any, Callable[[], torch.Tensor]]:
    """Our model in training, compiled where training compiles it, and its loss on the batch of `_batch`."""
    from musicgen.lm import MusicLM
    from training import budget, devices, loss, strategy

    inputs, targets, scored, mask, device = _batch(run)
    text = torch.randn(*mask.shape, run.lm.condition.text_dim, device=device)
    lm = MusicLM(run.lm).to(device)
    heads: Any = list(lm.linears)
    if run.hardware.compiles:
        here = devices.device_here(1, uses_gpu=run.hardware.uses_gpu)
        strategy.prepare(
            lm, run.hardware, budget.choose(task_of(run), here, 1, checkpointing="none"), device, Traffic()
        )

    def value() -> torch.Tensor:
        hidden = lm.hidden(inputs, text, mask)
        sums = loss.cross_entropy_sums(hidden, heads, targets, scored, compiled=run.hardware.compiles)
        return loss.mean_over_codebooks(sums, scored.sum((0, 2)))

    return lm, value


def _their_side(run: Any) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The peer's model of the same shape in training, and its loss on the same batch."""
    from transformers import MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    shape = run.lm
    inputs, targets, scored, mask, device = _batch(run)
    text = torch.randn(*mask.shape, shape.dim, device=device)  # it has no projection of its own
    labels = torch.where(scored, targets, -100).transpose(1, 2).contiguous()
    config = MusicgenDecoderConfig(
        vocab_size=shape.codebook_size,
        max_position_embeddings=inputs.shape[2],
        num_hidden_layers=shape.num_layers,
        ffn_dim=shape.ffn_mult * shape.dim,
        num_attention_heads=shape.num_heads,
        hidden_size=shape.dim,
        num_codebooks=shape.num_codebooks,
        dropout=0.0,
        activation_function=shape.activation,
        pad_token_id=shape.special_id,
        bos_token_id=shape.special_id,
    )
    config._attn_implementation = "sdpa"
    peer = MusicgenForCausalLM(config).to(device).train()

    def value() -> torch.Tensor:
        out = peer(
            input_ids=inputs.flatten(0, 1), encoder_hidden_states=text, encoder_attention_mask=mask.long(),
            labels=labels, use_cache=False,
        )  # fmt: skip
        return out.loss

    return peer, value


def _batch(run: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.device]:
    """Columns in, targets, what is scored, the text's mask, and the device."""
    from musicgen import patterns
    from training import budget

    shape, device = run.lm, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, batch = round(50 * run.batch.crop_seconds), run.batch.size
    codes = torch.randint(
        0, shape.codebook_size, (batch, shape.num_codebooks, frames), generator=torch.Generator().manual_seed(0)
    )
    valid = torch.ones(batch, frames, dtype=torch.bool)
    columns = patterns.training_columns(codes, shape.special_id, valid=valid, pattern=shape.pattern, tail=shape.tail)
    inputs, targets, scored = (part.to(device) for part in columns)
    return inputs, targets, scored, torch.ones(batch, budget.TEXT_TOKENS, dtype=torch.bool, device=device), device


def _serve(side: Literal["ours", "transformers"], config: BenchConfig, threads: int, told: Any) -> None:
    """One side in a process of its own: makes a step of the precision that it is told, answers its seconds.

    Ours shares copies of the weights between the parts of a step in bf16, unless told "a cast per part".
    """
    from musicgen import heap
    from training import optim
    from training.copies import WorkingCopies

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = read_config(config.shape(), folders=False)
    if side == "ours":
        heap.keep_freed()  # as every command of ours does
    model, make_loss = _our_side(run) if side == "ours" else _their_side(run)
    device = next(model.parameters()).device
    optimizer = optim.build_optimizer(model.parameters(), run.optim)
    blocks = model.transformer.layers if side == "ours" and config.parts > 1 else []
    copies = WorkingCopies(blocks, torch.bfloat16)
    told.send("ready")
    while True:
        try:
            order = told.recv()
        except EOFError:
            return
        if order == "keep freed memory":
            told.send(heap.keep_freed())
            continue
        began = time.perf_counter()
        if order == "bf16":
            copies.refresh()
            copies.put_in()
        for _ in range(config.parts):
            with torch.autocast(device.type, torch.bfloat16, enabled=order != "float32"):
                value = make_loss() / config.parts
            value.backward()
        copies.put_back()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        told.send(time.perf_counter() - began)


def measure_peer(config: BenchConfig, rounds: int) -> dict[str, dict[str, float]]:
    """Frames per second of whole training steps, ours and the peer's in turn, by side and precision; text states given.

    Each side is a process, since what malloc keeps is a process's own. `transformers, memory kept` is the peer with our
    setting of malloc, measured last, beside ours once more; `ours, a cast per part` is ours without shared copies.
    """
    import multiprocessing

    from rich.progress import track

    run = read_config(config.shape(), folders=False)
    frames = config.parts * run.batch.size * round(50 * run.batch.crop_seconds)
    spawn, sides = multiprocessing.get_context("spawn"), {}
    for name in ("ours", "transformers"):
        here, there = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(name, config, torch.get_num_threads(), there), daemon=True)
        process.start()
        there.close()
        sides[name] = (process, here)

    def answer(name: str) -> Any:
        try:
            return sides[name][1].recv()
        except EOFError as error:
            raise UserError(f"the process of {name} ended; its error stands above") from error

    def ask(name: str, order: str) -> Any:
        sides[name][1].send(order)
        return answer(name)

    rates: dict[str, dict[str, float]] = {}
    # Emulated bf16 is ten times slower on both sides and nobody's best.
    precisions = ["bf16", "float32"] if HardwareConfig(precision="auto").number_format == "bf16" else ["float32"]
    try:
        for name in sides:
            answer(name)
        for suffix in ("", ", memory kept"):
            if suffix and (torch.cuda.is_available() or not ask("transformers", "keep freed memory")):
                break
            for precision in precisions:
                turns = {name: (name, precision) for name in sides}
                if config.parts > 1 and precision == "bf16":
                    turns[f"ours, {CASTS}"] = ("ours", CASTS)
                seconds: dict[str, list[float]] = {turn: [] for turn in turns}
                for _ in track(range(rounds), description=f"steps in {precision}{suffix}"):
                    for turn, times in seconds.items():
                        times.append(ask(*turns[turn]))
                for turn, times in seconds.items():
                    rates.setdefault(turn + suffix, {})[precision] = frames / statistics.median(times[1:])
    finally:
        for _, here in sides.values():
            here.close()  # a side that waits for its next order ends by that
        for process, _ in sides.values():
            process.join(3)
            process.terminate()
    return rates


def peer_lines(config: BenchConfig, peer: dict[str, dict[str, float]]) -> list[str]:
    """The comparison as text, with the FLOP that it amounts to and the rule they are counted by."""
    from training import budget

    run = read_config(config.shape(), folders=False)
    frames = round(50 * run.batch.crop_seconds)
    best = {name: max(kinds.values()) for name, kinds in peer.items()}
    per_frame = budget.train_flop(run.lm, frames) / frames
    of = f"{config.parts} parts of " if config.parts > 1 else ""
    lines = [f"a step of {of}{run.batch.size} x {run.batch.crop_seconds:g} s, frames per second by precision"]
    for name, kinds in peer.items():
        said = ", ".join(f"{kind} {rate:.1f}" for kind, rate in kinds.items())
        lines.append(f"  {name:<36}{said}; best is {best[name] * per_frame / 1e9:.1f} GFLOP/s")
    lines.append(f"  ours / transformers, both at their best: {best['ours'] / best['transformers']:.2f}")
    if "ours, memory kept" in best:
        again = best["ours, memory kept"] / best["transformers, memory kept"]
        lines.append(f"  ours / transformers with our setting of malloc (musicgen/heap.py): {again:.2f}")
    if f"ours, {CASTS}" in best:
        gain = best["ours"] / best[f"ours, {CASTS}"]
        lines.append(f"  ours with copies of the weights that the parts share / with {CASTS}: {gain:.3f}")
    lines.append(f"  FLOP: {budget.FLOP_RULE}")
    return lines


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
    result: dict[str, Any] = {}
    if config.rounds:
        result["frames_per_second"] = measure_peer(config, config.rounds)
        print("\n".join(peer_lines(config, result["frames_per_second"])), flush=True)
    if config.steps:
        with tempfile.TemporaryDirectory() as name:
            folder, data = Path(name), config.data
            if not data:
                from tests.training.synthetic import write_dataset

                data = str(write_dataset(folder / "data", tracks=80, valid=2, frames=(500, 2000)))
            encoder = "" if config.size == "demo" else write_t5(folder / "t5")
            result["run"] = measure_run(config, data, folder, encoder)
            result["parts_seconds"] = measure_parts(config, data, encoder)
        print("\n" + table(config, result["run"], result["parts_seconds"]))
    document = {**settings.to_dict(config), "threads": torch.get_num_threads(), **result}
    print(json.dumps(document))
    if config.json:
        Path(config.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    settings.run(main)
