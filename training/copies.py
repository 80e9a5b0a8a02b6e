"""The matrices of the blocks in bf16, made once per step for all of its passes.

Autocast makes these copies anew in every pass, and autograd widens every gradient of theirs to float32 before it is
added to the sum: of each weight 24 bytes pass through memory per pass. Here the copies stand in the model while a pass
is made, and each gradient is added to the float32 one as it comes: 10 bytes. The numbers are the same to the bit.
Optimiser, average, states and all else that looks at the model between two passes find the float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class WorkingCopies:
    """Copies of the matrices of some modules in a type of few bits.

    Only for models whose matrices are used in `F.linear` alone, under autocast to that type, and whose gradients
    nobody else waits for: those of a pass over the copies never reach the hooks of DDP or FSDP. An adapter's own small
    matrices are left out: peft takes its input, and a dropout on it, to their type.

    Args:
        modules: whose parameters of two dimensions are copied; frozen ones too, which have no gradient.
        dtype: of the copies.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        for path, module in (named for root in modules for named in root.named_modules()):
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 2 and "lora_" not in path:
                    copy = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=weight.requires_grad)
                    if weight.requires_grad:
                        copy.register_post_accumulate_grad_hook(_adder(weight))
                    self._places.append((module, name, weight, copy))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights as they are now."""
        for _, _, weight, copy in self._places:
            storage = copy.untyped_storage()
            if not storage.nbytes():  # a GPU's is made anew and copied even where its size stays
                storage.resize_(copy.numel() * copy.element_size())
            copy.copy_(weight)

    def put_in(self) -> None:
        """Let the modules compute with the copies, forward and backward."""
        for module, name, _, copy in self._places:
            module._parameters[name] = copy

    def put_back(self) -> None:
        """Give the modules their own weights back; those have the gradients then."""
        for module, name, weight, _ in self._places:
            module._parameters[name] = weight

    def free(self) -> None:
        """Give the memory of the copies back, until they are made again."""
        for _, _, _, copy in self._places:
            copy.untyped_storage().resize_(0)


def _adder(weight: nn.Parameter) -> Callable[[Tensor], None]:
    """What adds a copy's gradient to that of the weight, as soon as it is made."""

    def add(copy: Tensor) -> None:
        assert copy.grad is not None
        if weight.grad is None:
            weight.grad = copy.grad.to(weight.dtype)
        else:
            weight.grad += copy.grad
        copy.grad = None

    return add
