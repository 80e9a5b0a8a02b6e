"""The plan's memory against torch's own tracker, over steps that are made on tensors without storage."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from musicgen import patterns
from musicgen.adapters import AdapterConfig
from musicgen.config import LMConfig, size
from musicgen.errors import UserError
from training import forecast, rehearsal
from training.budget import Task, choose
from training.devices import DEVICES

FRAMES = 1500


def layers_of(name: str, layers: int) -> LMConfig:
    return dataclasses.replace(size(name), num_layers=layers)


def both(lm: LMConfig, micro: int, ranks: int = 1, accumulate: int = 1, **layout: Any) -> tuple[float, float]:
    """Bytes by the plan and by the tracker."""
    task = Task(lm, micro * ranks * accumulate, FRAMES, 1000)
    plan = choose(task, DEVICES["h100-80"], ranks, accumulate=accumulate, **layout)
    assert plan.micro == micro and plan.accumulate == accumulate
    return plan.needed - plan.memory["text encoder"], rehearsal.peak_bytes(plan)


@pytest.mark.parametrize(
    ("name", "layers", "micro", "ranks", "accumulate", "layout"),
    [
        ("300m", 24, 8, 1, 1, {}),
        ("300m", 12, 6, 1, 1, {"checkpointing": "selective"}),
        ("1.5b", 12, 4, 1, 1, {"checkpointing": "full"}),
        ("3.3b", 6, 2, 2, 2, {"strategy": "ddp"}),
        ("3.3b", 16, 3, 8, 1, {"strategy": "fsdp", "checkpointing": "selective"}),
        ("1.5b", 12, 2, 16, 2, {"strategy": "hybrid", "nodes": 2, "checkpointing": "none"}),
    ],
)
def test_the_plan_is_what_torch_counts(
    name: str, layers: int, micro: int, ranks: int, accumulate: int, layout: dict[str, Any]
) -> None:
    planned, counted = both(layers_of(name, layers), micro, ranks, accumulate, **layout)
    assert planned == pytest.approx(counted, rel=0.07)


def test_a_melody_model_keeps_one_mask_for_all_layers() -> None:
    lm = layers_of("300m", 8)
    condition = dataclasses.replace(lm.condition, melody=True)
    planned, counted = both(dataclasses.replace(lm, cross_attention=False, condition=condition), 4)
    assert planned == pytest.approx(counted, rel=0.05)


def test_recomputing_saves_what_it_should() -> None:
    lm = layers_of("300m", 6)
    task = Task(lm, 8, FRAMES, 1000)
    kept = [
        rehearsal.peak_bytes(choose(task, DEVICES["h200"], 1, checkpointing=kind, accumulate=1))
        for kind in ("none", "selective", "full")  # type: ignore[arg-type]
    ]
    assert kept[0] > 1.1 * kept[1] > 1.1 * kept[2]


def test_nothing_of_a_rehearsal_stays() -> None:
    both(layers_of("300m", 1), 1, 2, strategy="fsdp")
    assert not dist.is_initialized()
    inputs, _, _ = patterns.training_columns(torch.ones(1, 4, FRAMES, dtype=torch.long), 2048)
    assert int(inputs[0, 0, 1]) == 1  # numbers, no shapes alone, from whatever is cached


def test_not_inside_a_training(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="in a process of its own"):
            both(layers_of("300m", 1), 1)
    finally:
        dist.destroy_process_group()


def test_make_plan_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--size", "demo", "--gpu", "rtx4090", "--gpus", "2", "--rehearse", "true"]
    assert forecast.main(argv) == 0
    line = re.search(r"rehearsal ([\d.]+) GiB at the peak .*the plan says ([\d.]+)", capsys.readouterr().out)
    assert line is not None and float(line[2]) == pytest.approx(float(line[1]), rel=0.1)


def test_what_is_not_rehearsed() -> None:
    task = Task(layers_of("300m", 1), 2, FRAMES, 1000)
    cpu = dataclasses.replace(DEVICES["h200"], name="cpu")
    for plan in (
        choose(task, cpu, 1),
        choose(dataclasses.replace(task, lora=AdapterConfig(rank=4)), DEVICES["h200"], 1),
        choose(dataclasses.replace(task, moments=4), DEVICES["h200"], 1),
    ):
        with pytest.raises(UserError, match="only plans of whole models on GPUs"):
            rehearsal.peak_bytes(plan)
