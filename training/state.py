"""The run's own checkpoints, runs/<name>/state/step-N: whole or absent, addressed by the step, nothing pickled.

    shard-*.safetensors    weights, their average and the optimiser's moments, each rank's part (torch DCP)
    state.json             step, audio seconds seen, best validation loss, EMA count, the optimiser's numbers; last

Tensors are copied aside at the step and written by a thread beside the training (`Saver`), under a temporary name that
is renamed when every rank's part is on the disk. A state holds what is trained: of an adapter its factors alone. Names
do not depend on the strategy, so a state of one rank loads on eight and a DDP run goes on under FSDP2 and back. All
else that a run needs follows from the step: crops, captions and drop-outs (training.plan), the learning rate
(training.optim).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import reprlib
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from musicgen.errors import UserError
from training.optim import EMA, trained

FILE_BYTES = 2**29  # of one file: a file is put together in memory before it is written


@dataclass
class Progress:
    """What a run knows beside its weights.

    Attributes:
        step: completed steps.
        audio_seconds_seen: seconds of audio trained on, padding left out.
        best_loss: lowest validation loss so far, None before the first validation.
        best_step: its step.
        ema_count: the average's bias correction.
        ranks: processes that made the last step.
        accumulate: parts of their share of the batch; on as many ranks the run goes on with as many parts.
    """

    step: int = 0
    audio_seconds_seen: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    ema_count: float = 0.0
    ranks: int = 1
    accumulate: int = 1


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole states in `folder` (a run's `state/`), ascending.

    Raises:
        ValueError: a folder among them whose name is no step.
    """
    found = _whole_in(folder)
    if not all(map(is_step, found)):
        raise ValueError(f"{folder} holds more than states: {', '.join(found)}")
    return _steps_of(found)


def kept_in(folder: Path) -> list[int]:
    """As `steps_in`, beside folders of other names: a user may copy a state while a run writes the next."""
    return _steps_of(name for name in _whole_in(folder) if is_step(name))


def _whole_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*") if (p / "state.json").is_file())


def _steps_of(names: Iterable[str]) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in names)


def is_step(name: str) -> bool:
    """Whether a state's folder can have this name: `step-20`, but not `step-020`, `step--5` or `step-20.bak`."""
    return re.fullmatch(r"step-(0|[1-9][0-9]{0,17})", name) is not None


def _named(model: nn.Module, ema: EMA) -> dict[str, Tensor]:
    weights = {f"model/{name}": p.detach() for name, p in trained(model).items()}
    return weights | {f"ema/{name}": tensor for name, tensor in ema.shadow.items()}


def _optimizer_parts(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors `optimizer/<parameter>/<moment>`, and its numbers by the same names."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            name = f"optimizer/{names[parameter]}/{key}"
            if isinstance(value, Tensor) and value.dim():
                tensors[name] = value.detach()
            else:
                number = value.item() if isinstance(value, Tensor) else value
                numbers[name] = {"value": number, "tensor": isinstance(value, Tensor)}
    groups = [
        {key: value for key, value in group.items() if isinstance(value, (int, float)) and key != "lr"}
        for group in optimizer.param_groups
    ]
    return tensors, {"numbers": numbers, "groups": groups, "moments": sorted(tensors)}


class Saver:
    """Writes states, keeps some, drops the others.

    Args:
        folder: the run's `state/`.
        keep_last: newest states that stay; so do the best one's and every `keep_every`-th step's.
        keep_every: 0 keeps none for this reason.
        background: copy the tensors and write them beside the training (needs memory for the copy).
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_every: int = 0, background: bool = True) -> None:
        self.folder, self.keep_last, self.keep_every, self.background = folder, keep_last, keep_every, background
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.several else 0
        # A group of its own: a thread's messages must not mix with those of the training.
        self.group = dist.new_group(backend="gloo") if self.several else None
        self._written = threading.Event()
        self._written.set()
        self._errors: list[UserError] = []
        if self.rank == 0:
            for left in folder.glob(".step-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)

    def save(self, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write the state of `progress.step`; returns once its tensors may change again.

        Every rank calls this at the same step. What became of it is told by `failed` and `ended`: an error of one rank
        must not keep it from writing together with the others.
        """
        import torch.distributed.checkpoint as dcp

        self._written.wait()
        progress.ema_count = ema.count
        moments, numbers = _optimizer_parts(optimizer, model)
        tensors = _named(model, ema) | moments
        document = {**asdict(progress), "optimizer": numbers}
        if not _is_number(progress.best_loss):  # NaN, which no later validation would be below
            document["best_loss"] = None
        place = self.folder / f".step-{progress.step}.tmp"
        self._written.clear()
        with contextlib.suppress(OSError):  # which DCP meets again, and tells to all ranks
            place.mkdir(parents=True, exist_ok=True)
        try:
            options: dict[str, Any] = {
                "storage_writer": dcp.HuggingFaceStorageWriter(str(place), _files(tensors), save_distributed=True),
                "process_group": self.group,
                "no_dist": not self.several,
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.background:
                    written: Any = dcp.async_save(tensors, **options)
                    written.add_done_callback(lambda done: self._finish(place, document, done.exception()))
                    return
                dcp.save(tensors, **options)
        except (Exception, dcp.api.CheckpointException) as error:
            self._finish(place, document, error)
        else:
            self._finish(place, document, None)

    def ended(self) -> UserError | None:
        """The error of a state that could not be written, once; waits until none is being written."""
        self._written.wait()
        return self.failed()

    def failed(self) -> UserError | None:
        """The error of a state that could not be written, once, without waiting."""
        return self._errors.pop(0) if self._written.is_set() and self._errors else None

    def _finish(self, place: Path, document: dict[str, Any], error: BaseException | None) -> None:
        """Make the state visible on rank 0 once all parts are there, or take back what there is of it."""
        try:
            if error is None and self.rank == 0:
                document["files"] = self._files_of(place)
                write_synced(place / "state.json", json.dumps(document, indent=1).encode())
                target = self.folder / f"step-{document['step']}"
                shutil.rmtree(target, ignore_errors=True)
                os.rename(place, target)
                self._drop(document["best_step"])
        except OSError as problem:
            error = problem
        finally:
            try:
                if error is not None:
                    shutil.rmtree(place, ignore_errors=True)
                    self._errors.append(self._sorry(document["step"], error))
            finally:
                self._written.set()  # whatever happened: the next state waits for it

    def _files_of(self, place: Path) -> dict[str, int]:
        """Names and sizes of a state's files. Raises `OSError` where a rank's are not there."""
        files = {path.name: path.stat().st_size for path in sorted(place.glob("*.safetensors"))}
        ranks = {name.split("-model-")[0] for name in files}
        world = dist.get_world_size() if self.several else 1
        if len(ranks) < world:
            raise OSError(f"{world - len(ranks)} of {world} ranks wrote nothing into {place}")
        return files

    def _drop(self, best_step: int | None) -> None:
        steps = kept_in(self.folder)
        kept = {*steps[-self.keep_last :], best_step}
        for step in steps:
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)

    def _sorry(self, step: int, error: BaseException) -> UserError:
        kept = kept_in(self.folder)
        return UserError(
            f"the state of step {step} could not be written to {self.folder}: {_reason(error)}. "
            f"The last whole state is {f'step {kept[-1]}' if kept else 'none'}; free some room and run the same "
            "command again"
        )


def _reason(error: BaseException) -> str:
    """What the disk said, out of what DCP made of it."""
    for _, (cause, *_rest) in getattr(error, "failures", {}).items():
        error = cause
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (error.strerror if isinstance(error, OSError) else None) or _first(error)


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file each tensor goes to, in order, about `FILE_BYTES` in each."""
    numbers, total = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = total // FILE_BYTES + 1
        total += tensor.numel() * tensor.element_size()
    # Files are numbered without a gap.
    order = {number: i for i, number in enumerate(sorted(set(numbers.values())), start=1)}
    return {name: order[number] for name, number in numbers.items()}


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and return once it is on the disk, for a rename that makes it visible."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_progress(folder: Path, step: int) -> Progress:
    """What `folder/step-N` knows beside its tensors. Raises `UserError` when it is damaged."""
    document = _document(folder / f"step-{step}")
    return Progress(**{field.name: document[field.name] for field in fields(Progress)})


def _document(place: Path) -> dict[str, Any]:
    """state.json of a state, checked: whoever reads it need not look at it again."""
    try:
        document = json.loads((place / "state.json").read_bytes())
        wrong = _wrong_in(document, place.name)
    except OSError as error:
        raise _damaged(place, f"cannot be read: state.json: {error.strerror or error}") from error
    except ValueError as error:
        raise _damaged(place, f"cannot be read: state.json: {error}") from error
    except RecursionError as error:
        raise _damaged(place, "cannot be read: state.json is nested too deeply to be one") from error
    if isinstance(document, dict) and {"files"} <= _PARTS.keys() - document.keys() <= {"files", "optimizer"}:
        raise UserError(
            f"{place} was written by an earlier version of this program; finish the run with that version, or start "
            "another RUN from its weights: INIT=<run>/release"
        )
    if wrong:
        raise _damaged(place, f"is damaged: state.json does not hold what this program writes there ({wrong})")
    return document


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN is not, nor what no float can be


# What state.json holds: what each part must be, in words and as a check.
_PARTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "step": ("a whole number", _is_count),
    "audio_seconds_seen": ("a number from 0", lambda v: _is_number(v) and v >= 0),
    "best_loss": ("a number or null", lambda v: v is None or _is_number(v)),
    "best_step": ("a whole number or null", lambda v: v is None or _is_count(v)),
    "ema_count": ("a number from 0", lambda v: _is_number(v) and v >= 0),
    "ranks": ("a whole number from 1", lambda v: _is_count(v, 1)),
    "accumulate": ("a whole number from 1", lambda v: _is_count(v, 1)),
    "optimizer": ("a mapping with numbers, groups and moments", lambda v: isinstance(v, dict)),
    "files": (
        "a mapping of files to sizes",
        lambda v: isinstance(v, dict) and bool(v) and all(map(_is_count, v.values())),
    ),
}


def _wrong_in(document: Any, name: str) -> str:
    """What is wrong with the contents of state.json in the folder of this name; empty where nothing is."""
    if not isinstance(document, dict):
        return "it is no mapping"
    if lost := [part for part in _PARTS if part not in document]:
        return f"it has no {lost[0]}"
    if odd := [part for part in document if part not in _PARTS]:
        return f"{reprlib.repr(odd[0])} is none of its parts"
    for part, (words, fits) in _PARTS.items():
        if not fits(document[part]):
            return f"{part} is {reprlib.repr(document[part])}, not {words}"
    if f"step-{document['step']}" != name:
        return f"it is the state of step {document['step']} and its folder is named {name}"
    return _wrong_in_optimizer(document["optimizer"], begun=document["step"] > 0)


def _wrong_in_optimizer(stored: dict[str, Any], *, begun: bool) -> str:
    numbers, groups, moments = (stored.get(part) for part in ("numbers", "groups", "moments"))
    if not isinstance(numbers, dict) or not all(
        isinstance(n, dict) and type(n.get("value")) in (int, float) and type(n.get("tensor")) is bool
        for n in numbers.values()
    ):
        return "optimizer.numbers is not a mapping of numbers"
    if not isinstance(moments, list) or not all(isinstance(name, str) for name in moments):
        return "optimizer.moments is not a list of names"
    kinds = (bool, int, float)
    if not (
        isinstance(groups, list)
        and groups
        and all(isinstance(group, dict) and all(type(v) in kinds for v in group.values()) for group in groups)
    ):
        return "optimizer.groups is not a list of settings"
    if begun and not (numbers and moments):
        return f"optimizer.{'moments' if numbers else 'numbers'} is empty"
    of: dict[str, set[str]] = {}
    for name in (*numbers, *moments):
        owner, _, kind = name.rpartition("/")
        of.setdefault(owner, set()).add(kind)
    short = [owner for owner, kept in of.items() if kept != set().union(*of.values())]
    return f"the optimiser's state of {short[0]!r} is not whole" if short else ""


def load(folder: Path, step: int, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Restore weights, average and optimiser from `folder/step-N` in place, each rank its own part.

    Raises:
        UserError: the state does not fit the model or is damaged.
    """
    import torch.distributed.checkpoint as dcp

    place = folder / f"step-{step}"
    document = _document(place)
    several = dist.is_initialized() and dist.get_world_size() > 1
    for name, size in document["files"].items():  # the reader fills what it finds and leaves the rest as it was
        there = (place / name).stat().st_size if (place / name).is_file() else None
        if there != size:
            raise _damaged(place, f"cannot be read: {name} has {there} bytes, {size} were written")
    try:
        targets = _named(model, ema)
        moments = _moment_targets(model, document["optimizer"]) if optimizer is not None else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = dcp.HuggingFaceStorageReader(str(place))
            dcp.load({**targets, **moments}, storage_reader=reader, no_dist=not several)
        ema.count = document["ema_count"]
        if optimizer is not None:
            _restore(optimizer, model, moments, document["optimizer"])
    except (Exception, dcp.api.CheckpointException) as error:
        raise _damaged(place, f"cannot be read: {_reason(error)}") from error


def _damaged(place: Path, what: str) -> UserError:
    return UserError(
        f"{place} {what}. Delete this folder to go on from an earlier state, or give another RUN to start anew"
    )


def _moment_targets(model: nn.Module, stored: Any) -> dict[str, Tensor]:
    """Tensors to read moments into: shaped and spread like their parameters (flat where Prodigy keeps them so)."""
    parameters = dict(model.named_parameters())
    # Only Prodigy keeps the starting point p0: flat as its s is, or one number where the weights started from zero.
    starts = {name for name in (*stored["moments"], *stored["numbers"]) if name.endswith("/p0")}
    targets = {}
    for name in stored["moments"]:
        owner, key = name.rsplit("/", 1)
        like = torch.zeros_like(parameters[owner.removeprefix("optimizer/")].detach())
        targets[name] = like.flatten() if key in ("s", "p0") and f"{owner}/p0" in starts else like
    return targets


def _restore(optimizer: torch.optim.Optimizer, model: nn.Module, moments: dict[str, Tensor], stored: Any) -> None:
    """Put moments and numbers back into an optimiser over `model`'s parameters."""
    parameters = dict(model.named_parameters())
    for name, tensor in moments.items():
        parameter, key = name.removeprefix("optimizer/").rsplit("/", 1)
        optimizer.state[parameters[parameter]][key] = tensor
    for name, entry in stored["numbers"].items():
        parameter, key = name.removeprefix("optimizer/").rsplit("/", 1)
        value = torch.tensor(float(entry["value"])) if entry["tensor"] else entry["value"]
        if entry["tensor"]:
            value = value.to(parameters[parameter].device)
        optimizer.state[parameters[parameter]][key] = value
    for group, numbers in zip(optimizer.param_groups, stored["groups"], strict=True):
        group.update(numbers)


def tensors(place: Path, kind: str = "") -> dict[str, Tensor]:
    """All tensors of a state folder, whole, by name (`model/…`, `ema/…`, `optimizer/…`).

    Args:
        kind: read those alone whose name begins with this, and leave it out of their names.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(place))
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    chosen = {name: m for name, m in found.items() if name.startswith(kind)}
    whole = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in chosen.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(whole), storage_reader=dcp.HuggingFaceStorageReader(str(place)), no_dist=True)
    return {name.removeprefix(kind): tensor for name, tensor in whole.items()}


def _first(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
