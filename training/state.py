"""The run's own checkpoints, runs/<name>/state/step-N: whole or absent, addressed by the step, nothing pickled.

    model.safetensors      the weights being trained, float32
    ema.safetensors        their moving average
    optimizer.safetensors  AdamW's moments by parameter name
    state.json             step, audio seconds seen, best validation loss, EMA count

A state is written under a temporary name, synced and renamed. All else that a run needs follows from the step: crops,
captions and drop-outs (training.plan), the learning rate (training.optim).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musicgen.errors import UserError
from training.optim import EMA

KEEP_LAST = 2


@dataclass
class Progress:
    """What a run knows beside its weights.

    Attributes:
        step: completed steps.
        audio_seconds_seen: seconds of audio trained on, padding left out.
        best_loss: lowest validation loss so far, None before the first validation.
        best_step: its step.
        ema_count: the average's bias correction.
    """

    step: int = 0
    audio_seconds_seen: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    ema_count: float = 0.0


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole states in `folder` (a run's `state/`), ascending."""
    found = folder.glob("step-*") if folder.is_dir() else []
    return sorted(int(p.name.removeprefix("step-")) for p in found if (p / "state.json").is_file())


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """An optimiser's state as named tensors: `<parameter>/<moment>`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.detach().cpu().clone()
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put named tensors back into an optimiser over `model`'s parameters."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        moments.setdefault(name, {})[moment] = value
    tree = optimizer.state_dict()
    tree["state"] = {i: moments[names[p]] for i, p in enumerate(order) if names[p] in moments}
    optimizer.load_state_dict(tree)


def save(folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write `folder/step-N`, then drop states other than the last two and the best one's.

    Raises:
        UserError: the disk refuses (full, no rights); earlier states are untouched.
    """
    from safetensors.torch import save as to_bytes

    target = folder / f"step-{progress.step}"
    temporary = folder / f".step-{progress.step}.tmp"
    parts = {
        "model.safetensors": {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()},
        "ema.safetensors": {name: t.detach().cpu().contiguous() for name, t in ema.shadow.items()},
        "optimizer.safetensors": optimizer_tensors(optimizer, model),
    }
    progress.ema_count = ema.count
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in parts.items():
            _write_synced(temporary / name, to_bytes(tensors))
        _write_synced(temporary / "state.json", json.dumps(asdict(progress), indent=2).encode())
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = steps_in(folder)
        raise UserError(
            f"the state of step {progress.step} could not be written to {folder}: {error.strerror or error}. "
            f"The last whole state is {f'step {kept[-1]}' if kept else 'none'}; free some room and run the same "
            "command again"
        ) from error
    kept_steps = {*steps_in(folder)[-KEEP_LAST:], progress.best_step}
    for step in steps_in(folder):
        if step not in kept_steps:
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
    return target


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path, step: int, model: nn.Module, ema: EMA) -> tuple[Progress, dict[str, Tensor]]:
    """Restore weights and average from `folder/step-N`.

    Returns:
        the progress, and the optimiser's tensors for `restore_optimizer` (it does not exist yet at this point).

    Raises:
        UserError: the state does not fit the model or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = folder / f"step-{step}"
    try:
        model.load_state_dict(load_file(place / "model.safetensors"))
        progress = Progress(**json.loads((place / "state.json").read_text()))
        ema.load(load_file(place / "ema.safetensors"), progress.ema_count)
        return progress, load_file(place / "optimizer.safetensors")
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{place} cannot be read: {_first(error)}. Delete this folder to go on from an earlier state, "
            "or give another RUN to start anew"
        ) from error


def _first(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
