"""What a run takes from the hardware that it finds."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from musicgen.lm import MusicLM
from tests.training.ranks import part
from training import budget, devices, strategy
from training.config import read_config, task_of
from training.strategy import HardwareConfig
from training.traffic import Traffic


@pytest.mark.parametrize(("multiplies", "expected"), [(False, "float32"), (True, "bf16")])
def test_bf16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, multiplies: bool, expected: str) -> None:
    """Emulated bf16 trained the demo at a tenth of the speed of float32."""
    monkeypatch.setattr(strategy, "cpu_multiplies_bf16", lambda: multiplies)
    assert HardwareConfig(accelerator="cpu").number_format == expected
    assert HardwareConfig(accelerator="cpu", precision="bf16").number_format == "bf16"
    assert HardwareConfig(accelerator="gpu").number_format == "bf16"


def test_memory_grows_on_a_gpu_unless_the_user_says_how() -> None:
    gpu, wanted = HardwareConfig(accelerator="gpu"), {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    env: dict[str, str] = {}
    strategy.let_memory_grow(HardwareConfig(accelerator="cpu"), env)
    assert not env
    strategy.let_memory_grow(gpu, env)
    assert env == wanted
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        given = {name: "max_split_size_mb:64"}
        strategy.let_memory_grow(gpu, given)
        assert given == {name: "max_split_size_mb:64"}


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="this torch doesn't tell")
def test_torch_reads_it_after_its_import() -> None:
    words = (
        "import torch; from training import strategy; strategy.let_memory_grow(strategy.HardwareConfig('gpu')); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    env = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", words], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "expandable_segments:True"


def test_without_a_c_compiler_nothing_is_compiled_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = strategy.HardwareConfig()
    monkeypatch.setattr(strategy.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    strategy.check(config)
    assert config.compiles and not caplog.records
    monkeypatch.setattr(strategy.shutil, "which", lambda _: None)
    strategy.check(config)
    assert not config.compiles and "no C compiler" in caplog.text
    assert strategy.HardwareConfig(compile="on").compiles


@torch._dynamo.config.patch(optimize_ddp=True)
def test_a_block_is_one_graph_where_a_bucket_of_gradients_ends_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut there, as dynamo does under DDP, kernels that move memory could not be joined across the cut."""
    from torch._dynamo.backends.debugging import aot_eager

    pieces: list[int] = []

    def compiled(graph: Any, inputs: Any) -> Any:
        pieces.append(len(list(graph.graph.nodes)))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiled))
    run = read_config(["--size", "demo", "--hardware.compile", "on", "--lm.num_layers", "2"], folders=False)
    plan = budget.choose(task_of(run), devices.DEVICES["h200"], 1, checkpointing="none")
    lm = MusicLM(run.lm)
    strategy.prepare(lm, run.hardware, plan, torch.device("cpu"), Traffic())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        copies = nn.parallel.DistributedDataParallel(lm, gradient_as_bucket_view=True, bucket_cap_mb=0.1)  # type: ignore[arg-type]
        config = run.lm
        tokens = torch.randint(0, config.codebook_size, (2, config.num_codebooks, 20))
        text, mask = torch.randn(2, 32, config.condition.text_dim), torch.ones(2, 32, dtype=torch.bool)
        copies(tokens, text, mask).float().pow(2).mean().backward()
    finally:
        part()
    assert len(pieces) == 1, "both blocks share a graph"
