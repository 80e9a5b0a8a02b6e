"""What only a GPU can show, in sections, as one JSON: `python -m benchmarks.gpu --out gpu.json [--sections training]`.

A section is a function that measures one thing on the GPU at hand and returns plain numbers; `SECTIONS` names them all.
Each runs in its own process, so that one that runs out of memory costs only itself and peaks are not mixed up.

`training`: twenty real steps of 3.3b and ten of each smaller size, where they fit, by `training.train` itself: clips
per second, model FLOP per second and their share of the peak by the stated rule, the widespread 6N + 12LdT figure
beside it, peak memory beside the planned one; then a step of 300m in four parts beside that of a plain transformers
MusicGen, and beside ours where every part casts the weights for itself.

`codec`: encoding by the paper's network, times real time by batch (`benchmarks.codec_gpu`).

`generation`: steps per second of one clip by size and weights and of a batch of clips of 3.3b, with the share of the
bandwidth's floor; captured graphs beside plain steps, and whether both draw the same tokens.

`--device cpu --tiny true` runs all of it small on a CPU, to try the code. An H200's figures are in `results/h200.json`.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from musicgen import settings
from musicgen.errors import UserError
from training.config import layout_settings, read_config, task_of

SIZES = ("300m", "1.5b", "3.3b")
PASSES = 12  # of a measured step at most: a batch of 192 takes 24 at 3.3b, and each spreads the update thinner


@dataclass(frozen=True)
class GpuConfig:
    """What to measure.

    Args:
        sections: names out of `SECTIONS`, with commas between; all when empty.
        sizes: that `training` trains, with commas between.
        steps: steps of 3.3b's training, half as many of the others'; the first fifth is left out.
        device: `cuda`, or `cpu` to try the code.
        tiny: small networks, to try the code.
        out: also write the result to this file.
    """

    sections: str = ""
    sizes: str = "300m,1.5b,3.3b"
    steps: int = 20
    device: Literal["cuda", "cpu"] = "cuda"
    tiny: bool = False
    out: str = ""

    def __post_init__(self) -> None:
        for size in self.sizes.split(","):
            if size not in SIZES:
                raise ValueError(f"sizes names {size!r}; allowed: {', '.join(SIZES)}, with commas between")


def training(config: GpuConfig) -> dict[str, Any]:
    """Speed, share of the peak and memory of training, by size."""
    from benchmarks import training as bench
    from benchmarks.models import write_t5
    from tests.training.synthetic import write_dataset
    from training import budget, devices

    on_gpu = config.device == "cuda"
    device = devices.device_here(1, uses_gpu=on_gpu)
    found: dict[str, Any] = {"flop_rule": budget.FLOP_RULE, "peak_flop_per_second": device.peak}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = str(write_dataset(folder / "data", tracks=80, valid=2, frames=(2000, 6000)))
        encoder = write_t5(folder / "t5", tiny=config.tiny)
        for size in ["demo"] if config.tiny else config.sizes.split(","):
            steps = config.steps if size == "3.3b" else max(config.steps // 2, 2)
            asked = bench.BenchConfig(size=size, steps=steps, crop_seconds=0.64 * config.tiny)
            run, plan = _planned(asked, device)
            if not plan.fits:
                found[size] = {"fits": False, "needed_gib": plan.needed / 2**30}
                continue
            asked = replace(asked, batch=plan.micro * min(plan.accumulate, PASSES))
            run, plan = _planned(asked, device)
            _forget_the_last(on_gpu)
            speed = bench.measure_run(asked, data, folder / size, encoder)
            shutil.rmtree(folder / size)  # a release of 3.3b alone is 6.5 GB
            clips = speed["audio_seconds_per_second"] / run.batch.crop_seconds
            rate, common = clips * plan.task.clip_flop, clips * budget.common_flop(run.lm, plan.task.frames)
            found[size] = {
                **speed,
                "batch": asked.batch,
                "micro_batch": plan.micro,
                "clips_per_second": clips,
                "flop_per_second": rate,
                "mfu": rate / device.peak if device.peak else None,
                "mfu_by_6n_12ldt": common / device.peak if device.peak else None,
                "planned_gib": plan.needed / 2**30,
            }
            print(f"{size}: {json.dumps(found[size])}", file=sys.stderr, flush=True)
    size, batch = ("demo", 1) if config.tiny else ("300m", 8)
    peer = bench.BenchConfig(size=size, batch=batch, parts=4, crop_seconds=0.64 * config.tiny)
    found["frames_per_second_beside_transformers"] = bench.measure_peer(peer, 2 if config.tiny else 6)
    return found


def _forget_the_last(on_gpu: bool) -> None:
    """Let go of the model that was trained before, which holds itself by its hooks, and count the peak anew."""
    import torch

    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _planned(asked: Any, device: Any) -> tuple[Any, Any]:
    """The settings of a measured training, and the plan that it will follow on this device."""
    from training import budget

    run = read_config(asked.shape(), folders=False)
    return run, budget.choose(task_of(run), device, 1, **layout_settings(run))


def codec(config: GpuConfig) -> dict[str, Any]:
    """Speed of encoding."""
    import torch

    from benchmarks import codec_gpu

    device = torch.device(config.device)
    return codec_gpu.measure(device, tiny=True, batches=(2, 3), repeats=1) if config.tiny else codec_gpu.measure(device)


def generation(config: GpuConfig) -> dict[str, Any]:
    """Speed of generation by size, weights and clips, graphs beside plain steps (`benchmarks.generate_gpu`)."""
    import torch

    from benchmarks import generate_gpu

    device = torch.device(config.device)
    return generate_gpu.measure(device, tiny=True, frames=50) if config.tiny else generate_gpu.measure(device)


SECTIONS: dict[str, Callable[[GpuConfig], dict[str, Any]]] = {
    "training": training,
    "codec": codec,
    "generation": generation,
}


def main(argv: Sequence[str]) -> int:
    """Measure the sections and print one JSON; exit code 1 where one of them failed."""
    config = settings.parse(GpuConfig, argv, prog="python -m benchmarks.gpu")
    wanted = [name.strip() for name in config.sections.split(",") if name.strip()] or list(SECTIONS)
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        raise UserError(f"unknown section {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
    import torch

    on_gpu = config.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UserError(
            "this measures a GPU and there is none here; on a CPU use make bench, bench-loader, bench-train, "
            "bench-codec, or try the code with --device cpu --tiny true"
        )
    if len(wanted) == 1:
        began = time.perf_counter()
        found = {wanted[0]: SECTIONS[wanted[0]](config)}
        found[wanted[0]]["section_seconds"] = time.perf_counter() - began
    else:
        found = {name: _apart(name, config) for name in wanted}
    name = torch.cuda.get_device_name(0) if on_gpu else "none"
    document = {"gpu": name, "torch": torch.__version__, "sections": found}
    print(json.dumps(document))
    if config.out:
        Path(config.out).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if any("error" in section for section in found.values()) else 0


def _apart(name: str, config: GpuConfig) -> dict[str, Any]:
    """A section in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--sections", name, "--out", str(out)]
        command += ["--sizes", config.sizes]
        command += ["--steps", str(config.steps), "--device", config.device, "--tiny", str(config.tiny).lower()]
        done = subprocess.run(command, check=False)
        if done.returncode or not out.is_file():
            return {"error": f"ended with exit code {done.returncode}"}
        return json.loads(out.read_text())["sections"][name]


if __name__ == "__main__":
    settings.run(main)
