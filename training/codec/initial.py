"""Where a run starts from other weights: `--init` takes a codec folder, a run folder or a run's `state/last.ckpt`.

A run's state gives everything that fits: weights, codebooks with their running sums, averaged weights, Adam's moments,
the discriminator, the balancer's norms. A codec folder holds weights and codebooks only; the running sums are rebuilt
by counting which entries latents of the training audio choose, one added to every count, so that an entry nothing
chose begins just above where it would count as dead and has to prove itself. States are read without unpickling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from musicgen import codec as codecs
from musicgen.codec import TRAINING_BUFFERS
from musicgen.errors import UserError
from training.codec import quantiser

# Settings that shape what tensors of equal shapes do.
SETTINGS = (
    "sampling_rate", "audio_channels", "upsampling_ratios", "use_causal_conv", "use_conv_shortcut", "pad_mode",
    "normalize", "dilation_growth_rate", "trim_right_ratio",
)  # fmt: skip


def start_from(module: Any, source: str) -> str:
    """Put the weights of `source` into a fresh `CodecModule`; returns what was taken, for the user to read.

    Raises:
        UserError: nothing usable there, or a codec of another shape.
    """
    place = Path(source)
    state = place / "state" / "last.ckpt" if (place / "state" / "last.ckpt").is_file() else place
    if state.is_file():
        return _from_state(module, state)
    release = place / "release" if (place / "release" / "config.json").is_file() else place
    if (release / "config.json").is_file() and (release / "model.safetensors").is_file():
        return _from_folder(module, release)
    raise UserError(
        f"INIT {source!r} holds no codec; give a codec folder (config.json and model.safetensors), the folder of a "
        "codec run, or its state/last.ckpt"
    )


def _from_folder(module: Any, folder: Path) -> str:
    try:
        model = codecs.load_network(folder)
    except UserError as error:
        raise UserError(f"INIT {str(folder)!r} cannot be read as an EnCodec: {error}") from error
    pairs = {name: (getattr(model.config, name), getattr(module.network.config, name)) for name in SETTINGS}
    other = [f"{name} is {there} there, {here} in this run" for name, (there, here) in pairs.items() if there != here]
    if other:
        raise UserError(f"INIT {str(folder)!r} is another kind of codec: {'; '.join(other)}")
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith(TRAINING_BUFFERS)}
    _take(module, tensors, folder)
    module.ema = [p.detach().clone() for p in module.network.parameters()]
    module.rebuild_sums = True
    return f"weights and codebooks of {folder}"


def _from_state(module: Any, path: Path) -> str:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors: dict[str, Tensor] = state["state_dict"]
        ema: list[Tensor] = state["ema"]
    except Exception as error:
        raise UserError(f"INIT {str(path)!r} is not the state of a codec run: {error}") from error
    _check_shape(module, path, state.get("network"))
    prefix = "network."
    _take(module, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path)
    module.ema = [mean.clone() for mean in ema]
    moments = [optimiser["state"] for optimiser in state["optimizer_states"]]
    taken = ["weights, codebooks, averages and moments"]
    prefix = "discriminator."
    critic = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if module.discriminator is not None and _shapes(critic) == _shapes(module.discriminator.state_dict()):
        module.discriminator.load_state_dict(critic)
        module.balancer.load_state_dict(state["balancer"])
        taken.append("the discriminator")
    else:
        moments = moments[:1]
    module.start_moments = moments
    return f"{' and '.join(taken)} of {path} (step {state['global_step']})"


def _check_shape(module: Any, path: Path, there: Any) -> None:
    """Refuse a state of a codec of another rate, channels or ratios, which tensors of equal shapes do not tell.

    Args:
        there: the shape that the state states; None for one that was written before states did, whose run has it in
            its config.yaml.
    """
    if there is None:
        try:
            there = yaml.safe_load((path.parent.parent / "config.yaml").read_text(encoding="utf-8"))["network"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return
    shape = module.shape
    here = {"sample_rate_hz": shape.sample_rate_hz, "channels": shape.channels, "ratios": list(shape.ratios)}
    other = [f"{k} is {there.get(k)} there, {v} in this run" for k, v in here.items() if there.get(k, v) != v]
    if other:
        raise UserError(f"INIT {str(path)!r} is another kind of codec: {'; '.join(other)}")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _take(module: Any, tensors: dict[str, Tensor], source: Path) -> None:
    """Load into the network; only training buffers may be missing, nothing may differ in shape."""
    there, here = _shapes(tensors), _shapes(module.network.state_dict())
    books = [[shape for name, shape in shapes.items() if name.endswith("codebook.embed")] for shapes in (there, here)]
    if books[0] != books[1]:
        told = [f"{len(b)} codebooks of {b[0][0]} entries × {b[0][1]} numbers" if b else "no codebooks" for b in books]
        raise UserError(
            f"INIT {str(source)!r} has {told[0]}; this run (SIZE {module.config.size}) needs {told[1]}. "
            "Give a codec of the same shape"
        )
    missing = {name for name in here.keys() - there.keys() if name.endswith(TRAINING_BUFFERS)}
    other = sorted({n for n in there.keys() | here.keys() if there.get(n) != here.get(n)} - missing)
    if other:
        shapes = [list(side[other[0]]) if other[0] in side else "missing" for side in (there, here)]
        raise UserError(
            f"INIT {str(source)!r} is a codec of another shape: {other[0]} is {shapes[0]} there, {shapes[1]} in this "
            f"run (SIZE {module.config.size})"
        )
    module.network.load_state_dict(tensors, strict=False)


@torch.no_grad()
def rebuild_sums(quantizer: Any, latents: Tensor) -> None:
    """Running counts and sums of codebooks that came without, from which entries `latents [N, H]` choose."""
    residual = latents.detach().float()
    for layer in quantizer.layers:
        book = layer.codebook
        chosen = quantiser.nearest(residual, book.embed)
        counts = torch.bincount(chosen, minlength=book.codebook_size).float() + 1
        book.cluster_size.copy_(counts / counts.mean())
        book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
        residual = residual - book.embed[chosen]
