"""On which hardware and how: the only file that names strategies and precision. Builds the Trainer, prints the plan.

One process trains alone; several run DDP, each with a whole copy of the model, gloo on CPUs and NCCL on GPUs. bf16
means autocast with float32 master weights; weights, moments and average stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from musicgen.config import LMConfig
from musicgen.errors import UserError

BYTES_PER_PARAMETER = 4 + 4 + 8 + 4  # weights, gradient, AdamW's two moments, average


@dataclass(frozen=True)
class HardwareConfig:
    """Where a run computes.

    Args:
        accelerator: `auto` takes a GPU when there is one.
        devices: processes (and GPUs) per node.
        nodes: machines.
        precision: `bf16` is autocast with float32 master weights; `auto` takes it on GPUs and on processors with
            512-bit vectors, and float32 elsewhere, where bf16 is emulated at a fraction of the speed.
        threads: CPU threads per process; 0 leaves torch's choice.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["auto", "bf16", "float32"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("nodes", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"hardware.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes

    @property
    def uses_gpu(self) -> bool:
        """Whether the run goes to GPUs."""
        return self.accelerator == "gpu" or (self.accelerator == "auto" and torch.cuda.is_available())

    @property
    def number_format(self) -> Literal["bf16", "float32"]:
        """The precision that a run computes in."""
        if self.precision != "auto":
            return self.precision
        fast = self.uses_gpu or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return "bf16" if fast else "float32"


def check(config: HardwareConfig) -> None:
    """Raises `UserError` when GPUs were asked for that are not there."""
    if config.uses_gpu and torch.cuda.device_count() < config.devices:
        raise UserError(
            f"hardware.devices is {config.devices}, but this machine shows {torch.cuda.device_count()} GPUs; "
            "lower it or set --hardware.accelerator cpu"
        )


def build_trainer(
    config: HardwareConfig, *, steps: int, accumulate: int, callbacks: Sequence[pl.Callback], logger: Any = None
) -> pl.Trainer:
    """A Trainer that makes `steps` steps; checkpoints and bar are ours, so Lightning's own are off."""
    if config.threads:
        torch.set_num_threads(config.threads)
    options: dict[str, Any] = {}
    if config.world > 1:
        options["strategy"] = pl.strategies.DDPStrategy(process_group_backend="nccl" if config.uses_gpu else "gloo")
    return pl.Trainer(
        accelerator="gpu" if config.uses_gpu else "cpu",
        devices=config.devices,
        num_nodes=config.nodes,
        precision="bf16-mixed" if config.number_format == "bf16" else "32-true",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=logger or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **options,
    )


def plan_lines(
    name: str,
    lm: LMConfig,
    hardware: HardwareConfig,
    *,
    data: str,
    batch: int,
    crop_seconds: float,
    steps: int,
    start: int,
    unigram: Sequence[float],
) -> list[str]:
    """The plan of a run, printed before it starts."""
    parameters = lm.num_parameters()
    device = f"{hardware.world} x {'GPU' if hardware.uses_gpu else 'CPU process'}"
    books = ", ".join(f"{h:.2f}" for h in unigram)
    return [
        f"model     {name}: {parameters:,} parameters ({lm.num_layers} layers, width {lm.dim}, {lm.num_heads} heads), "
        f"text encoder {lm.condition.text_encoder}",
        f"data      {data}",
        f"steps     {steps}"
        + (f", going on from {start}" if start else "")
        + f"; batch {batch} x {crop_seconds:g} s = {batch * crop_seconds:,.0f} s of audio a step",
        f"hardware  {device}, {hardware.number_format}, {parameters * BYTES_PER_PARAMETER / 2**30:.2f} GiB of weights, "
        "gradients, moments and average per process",
        f"unigram   {sum(unigram) / len(unigram):.3f} nats on the validation crops, mean of the codebooks [{books}]: "
        "the loss of a model that only knows how common each code is",
    ]
