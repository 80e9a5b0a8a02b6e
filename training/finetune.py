"""Going on from a model: what INIT= and LORA= change of a run.

Fine-tunes of a few minutes of music end in noise where they move like a training from nothing: thousands of steps at a
full rate. So a run with INIT= reads configs/train/finetune.yaml between its size and the command line, and one with
LORA= lora.yaml on top (`-<size>` variants after each); it validates before its first step, and says at the end whether
it got better than what it started from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen.errors import UserError
from training import folder as folder_of

if TYPE_CHECKING:
    from musicgen.lm import MusicLM
    from training.config import TrainConfig


def layers(configs: Path, size: str, *, init: bool, adapter: bool) -> list[Path]:
    """The settings files of a run, in order: of its size, of fine-tuning, of adapters; those that exist."""
    names = [size]
    names += ["finetune", f"finetune-{size}"] if init else []
    names += ["lora", f"lora-{size}"] if init and adapter else []
    return [path for name in names if (path := configs / f"{name}.yaml").is_file()]


def base_of(config: TrainConfig) -> dict[str, Any]:
    """The model that the run's adapter is made for, as `adapters.base_of`; nothing where there is no adapter.

    Raises:
        UserError: no INIT, or a model of other codebooks than the run's.
    """
    if not config.lora.rank:
        return {}
    if not config.init:
        raise UserError(
            f"LORA={config.lora.rank} trains an adapter, and INIT is missing: give the model to adapt, a release "
            "folder or a hub name such as INIT=facebook/musicgen-small"
        )
    from musicgen import adapters

    info = _info_of(config)
    shape = info.get("lm")
    books = shape.get("num_codebooks") if isinstance(shape, dict) else None
    if books != config.lm.num_codebooks:
        raise UserError(
            f"LORA={config.lora.rank} on INIT={config.init!r}, which has {books} codebooks, in a run of "
            f"{config.lm.num_codebooks}: an adapter cannot widen a mono model for stereo. Train the stereo model whole "
            "first (without LORA), and adapt that one"
        )
    return adapters.name_of(config.init, info)


def origin_of(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What the run's releases say of the model it began from: its identity and inherited licences, and an adapter's
    codec and text encoder, which are its base's (whose identity the base has).

    A run that goes on has it in its config.yaml and does not need INIT for it, unless that stands elsewhere now or no
    step was made: then its identity is read again, for `folder.check_same_run` to compare.

    Args:
        folder: the run's folder.

    Raises:
        UserError: INIT is not there and needed, or the run's config.yaml is damaged.
    """
    if not config.init:
        return {}
    from musicgen import adapters, weights

    stored = folder_of.stored_config(folder) or {}
    origin = stored.get("origin")
    if origin is not None:
        moved = stored["settings"].get("init") != config.init
        if "began_from" in origin and (moved or not folder_of.steps_of(folder)):
            return {**origin, "began_from": adapters.name_of(config.init, _info_of(config))}
        return origin
    info = _info_of(config)
    adapted = {part: info[part] for part in ("codec", "text_encoder")}
    began = {"began_from": adapters.name_of(config.init, info)}
    return {**(adapted if config.lora.rank else began), "inherited": weights.inherited(config.init)}


def _info_of(config: TrainConfig) -> dict[str, Any]:
    """What the release of INIT says of itself."""
    from musicgen import weights

    try:
        return weights.read_info(config.init)
    except UserError as error:
        if not (Path(config.run) / "config.yaml").exists():
            raise UserError(
                f"INIT={config.init!r}, the model to "
                + ("train an adapter of" if config.lora.rank else "begin from")
                + f", cannot be read: {error}"
            ) from error
        raise UserError(
            f"INIT={config.init!r}, the model that this run "
            + ("trains an adapter of" if config.lora.rank else "began from")
            + f", is needed and cannot be read: {error}. Put it back, or give another RUN to start anew"
        ) from error


def check_inputs(config: TrainConfig, lm: MusicLM, weights: dict[str, Any]) -> None:
    """Raises `UserError` where an adapter would leave an input that the model of INIT lacks untrained."""
    if config.lora.rank and (missing := sorted(lm.state_dict().keys() - weights.keys())):
        raise UserError(
            f"INIT={config.init!r} has no {missing[0]}, and LORA={config.lora.rank} trains an adapter alone, which "
            "would leave it untrained. Train the model with its new melody or style first (without LORA), then adapt it"
        )


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the validations of a fine-tuning say, from the lines of its metrics.jsonl; empty without such lines."""
    losses = {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row}
    if 0 not in losses or len(losses) < 2:
        return []
    before, last = losses[0], losses[max(losses)]
    best = min((step for step in losses if step), key=lambda step: losses[step])
    out = [f"finetune  valid loss {before:.3f} before, {losses[best]:.3f} at best (step {best}), {last:.3f} at the end"]
    if losses[best] >= before:
        out.append(
            "warning   it never got better than the model it started from: lower --optim.lr, or give it more music"
        )
    elif last > losses[best] + 0.1 * (before - losses[best]):
        out.append(
            f"note      it rose again after step {best}: the release is that of step {best}; fewer --steps suffice"
        )
    return out
