"""The loss balancer: weights say which share of the gradient each loss gets, whatever its own scale.

Every loss is differentiated with respect to the decoder's output alone; each of these gradients is divided by the
running mean of its norm, multiplied by its weight's share, and their sum goes on into the network. So the adversarial
loss, whose gradient grows and shrinks with the discriminator, cannot drown the others. Défossez et al. 2022, section
3.4; as in the reference the norm is that of one item, averaged over the batch, and the running mean is bias-corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

EPSILON = 1e-12


@dataclass(frozen=True)
class BalancerConfig:
    """How gradients are balanced.

    Args:
        decay: EMA decay of the gradient norms per step.
        total_norm: sum of the balanced gradients' norms per item; what commitment and clipping are relative to.
    """

    decay: float = 0.999
    total_norm: float = 1.0


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over all processes; `values` itself where there is one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class Balancer:
    """Running gradient norms by loss name, and the weighted sum they lead to."""

    def __init__(self, config: BalancerConfig) -> None:
        self.config = config
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def combine(
        self, gradients: Mapping[str, Tensor], weights: Mapping[str, float], *, balance: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """The gradient that goes into the network, and the share of it that each loss has.

        Args:
            gradients: per loss its gradient with respect to the decoder's output `[B, C, N]`.
            weights: per loss its weight: a share of the gradient with `balance`, a plain factor without.

        Returns:
            gradient `[B, C, N]`; shares per loss, adding up to one: norm of its part over the sum of the norms.
        """
        norms = mean_over_ranks(torch.stack([g.flatten(1).norm(dim=1).mean() for g in gradients.values()]))
        now = dict(zip(gradients, norms.double().tolist(), strict=True))
        for name, norm in now.items():
            self.sums[name] = self.sums.get(name, 0.0) * self.config.decay + norm
            self.counts[name] = self.counts.get(name, 0.0) * self.config.decay + 1.0
        factors = {name: float(weights[name]) for name in gradients}
        if balance:
            whole = sum(factors.values())
            factors = {
                name: self.config.total_norm * weight / whole / (EPSILON + self.sums[name] / self.counts[name])
                for name, weight in factors.items()
            }
        total = torch.zeros_like(next(iter(gradients.values())))
        for name, gradient in gradients.items():
            total.add_(gradient, alpha=factors[name])
        parts = {name: factors[name] * norm for name, norm in now.items()}
        whole = sum(parts.values()) or 1.0
        return total, {name: part / whole for name, part in parts.items()}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take a checkpoint's state back."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
