"""Optimiser, learning rate and the averaged weights, each addressed by the step.

AdamW with decoupled decay on every parameter (norms and embeddings too, as the reference), a linear warm-up and a
cosine, and an exponential moving average of the weights (EMA) with the reference's bias correction: the n-th update
moves the average by 1 / (1 + d + d^2 + ...), so that the first one copies the model. D-Adaptation, which the paper uses
for its smallest size, and Prodigy, its maintained successor, find the step size themselves; they are an extra.

Source: Copet et al. 2023, section 3; audiocraft `optim/ema.py`, `optim/cosine_lr_scheduler.py`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from musicgen.errors import UserError

# Numbers per parameter that each optimiser keeps, for the plan.
MOMENTS = {"adamw": 2, "dadapt": 3, "prodigy": 4}


@dataclass(frozen=True)
class OptimConfig:
    """How the weights move.

    Args:
        name: `adamw`, or one that finds its step size and takes `lr` as a factor on it (1 as a rule): `dadapt`
            (D-Adaptation Adam, as the paper trains 300M) or `prodigy`; these two come with the extra `adaptive`.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up from 0.
        lr_min_ratio: where the cosine ends, as a share of `lr`.
        beta1, beta2: moments of AdamW.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay, on every parameter.
        clip: largest norm of the gradient.
        ema_decay: decay of the averaged weights at each of their updates.
        ema_every: steps between two updates of the average.
    """

    name: Literal["adamw", "dadapt", "prodigy"] = "adamw"
    lr: float = 1e-4
    warmup_steps: int = 4000
    lr_min_ratio: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    ema_decay: float = 0.99
    ema_every: int = 10

    def __post_init__(self) -> None:
        for name, high in (("lr", 10), ("eps", 1)):
            if not 0 < getattr(self, name) <= high:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be above 0 and at most {high}")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"optim.clip is {self.clip}; it must be above 0 and finite (1e9 never clips)")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name, least in (("warmup_steps", 0), ("weight_decay", 0), ("ema_every", 1)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be at least {least} and finite")
        if not 0 <= self.lr_min_ratio <= 1:
            raise ValueError(f"optim.lr_min_ratio is {self.lr_min_ratio}; it is a share of optim.lr and must be 0 to 1")


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of 0-based step `step` of `total_steps`: linear warm-up, then a cosine to `lr_min_ratio`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    through = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))
    return config.lr * (config.lr_min_ratio + (1 - config.lr_min_ratio) * cosine)


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over all parameters in one group; the module sets the learning rate of each step.

    Raises:
        UserError: the adaptive optimisers are not installed.
    """
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    with contextlib.redirect_stdout(io.StringIO()):  # both print a line of their own
        try:
            if config.name == "dadapt":
                from dadaptation import DAdaptAdam

                return DAdaptAdam(parameters, decouple=True, **common)
            from prodigyopt import Prodigy

            return Prodigy(parameters, decouple=True, safeguard_warmup=True, **common)
        except ImportError as error:
            raise UserError(
                f"--optim.name {config.name} needs the package {error.name}; install it with "
                "`pip install -e '.[adaptive]'`, or use --optim.name adamw"
            ) from error


def found_rate(optimizer: Any) -> dict[str, float]:
    """`train/d`, the step size that an adaptive optimiser has found; nothing of others."""
    group = optimizer.param_groups[0]
    return {"train/d": float(group["d"])} if "d" in group else {}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that move, by name: all, or those of an adapter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class EMA:
    """Averaged copy of the parameters that a model trains, in float32 beside it, spread over the ranks as the model is.

    Attributes:
        shadow: name to averaged tensor.
        count: the bias correction's running sum.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0.0
        self.shadow = {name: p.detach().clone() for name, p in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights."""
        self.count = self.decay * self.count + 1
        self._move(model, 1 / self.count)

    def _move(self, model: nn.Module, share: float) -> None:
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in trained(model).values()], share)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Be the model's weights as long as there is no average, so that a run of few steps gives away what it learned;
        the first update takes the model's weights anyway."""
        self._move(model, 1.0)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights inside the block, its own again after it (even after an error).

        Values change places, not tensors: a sharded model keeps references to its storage.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, p in trained(model).items():
            own = p.detach().clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(own)
