"""Low-rank adapters (LoRA): a model that has learned a little more, stored as that little alone.

    release/   config.json               what a release says of itself, and of which model this is an adapter
               adapter_config.json       the library peft's own description
               adapter_model.safetensors the factors A and B of every adapted layer, some megabytes

The library peft holds and trains the factors. It adapts `nn.Linear` layers, and the attention of `musicgen.transformer`
packs queries, keys and values into one matrix, so `split` first gives each a layer of its own. What leaves this file is
an ordinary `MusicLM` again: `load` and `merged` add B A to the weights and pack them, so that generation, export and
training know nothing of adapters. The base model is found by its place and checked by the hash of its weights.

Source: Hu et al. 2021, LoRA.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musicgen import config as shapes
from musicgen import files, settings, weights
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.transformer import Attention

WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PARTS = ("q_proj", "k_proj", "v_proj")
# In the blocks alone: a condition's encoder may have layers of the same names.
TARGETS = rf"transformer\.layers\.\d+\.(\w+\.)?({'|'.join(PARTS)}|out_proj|linear1|linear2)"
_PREFIX = "base_model.model."  # what peft's own loader expects before every name
_NAME = "default"


@dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter on the attention and feed-forward layers of every block.

    Args:
        rank: r, of the factors A `[r, in]` and B `[out, r]`; 0 trains the whole model instead.
        alpha: the adapter's output is multiplied by alpha / rank; 0 takes the rank, hence a factor of 1.
        dropout: on the adapter's input while training.
    """

    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= 1024:
            raise ValueError(f"lora.rank is {self.rank}; it must be 1 to 1024 (16 is usual), or 0 for no adapter")
        if self.alpha < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora.alpha is {self.alpha} and lora.dropout {self.dropout}; alpha must be at least 0 and dropout "
                "in [0, 1)"
            )


def num_parameters(lm: shapes.LMConfig, rank: int) -> int:
    """Parameters that an adapter of this rank adds to a model of this shape."""
    attentions = 2 if lm.cross_attention else 1
    return lm.num_layers * rank * lm.dim * (attentions * 4 * 2 + 2 * (1 + lm.ffn_mult))


class SplitAttention(Attention):
    """Attention whose projections are layers of their own; the same numbers as the packed one it is made of."""

    def __init__(self, packed: Attention) -> None:
        nn.Module.__init__(self)
        self.num_heads = packed.num_heads
        for name, rows in zip(PARTS, packed.in_proj_weight.detach().chunk(3)):
            layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(rows.clone())
            self.add_module(name, layer)
        self.out_proj = packed.out_proj

    def _project(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, ...]:
        seen = x if text is None else text
        return tuple(self.get_submodule(name)(of) for name, of in zip(PARTS, (x, seen, seen)))


def split(lm: MusicLM) -> MusicLM:
    """Give queries, keys and values a layer each, in place; returns the same model."""
    for module in list(lm.transformer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Attention:
                setattr(module, name, SplitAttention(child))
    return lm


def attach(lm: MusicLM, config: AdapterConfig) -> MusicLM:
    """Put a fresh adapter on the model, in place; from then on only it is trained. It begins as zero.

    Args:
        lm: an ordinary model; A is drawn from torch's global generator, B is zero.
        config: of rank 1 or more.
    """
    from peft import LoraConfig

    alpha = config.alpha or config.rank
    return _inject(
        lm,
        LoraConfig(
            r=config.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=TARGETS,
            bias="none",
        ),
    )


def _inject(lm: MusicLM, config: Any) -> MusicLM:
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, split(lm), _NAME)
    return lm


def is_adapted(lm: nn.Module) -> bool:
    """Whether an adapter is on this model."""
    return hasattr(lm, "peft_config")


def _layers(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in lm.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def merged(lm: MusicLM) -> MusicLM:
    """An ordinary model (new, eval mode, on the same device) with W + alpha / r B A in place of every adapted W."""
    added = {name: layer.get_delta_weight(_NAME) for name, layer in _layers(lm)}
    state: dict[str, Tensor] = {}
    for name, tensor in lm.state_dict().items():
        stem, found, rest = name.partition(".base_layer.")
        if found:
            state[f"{stem}.{rest}"] = tensor + added[stem].to(tensor.dtype)
        elif ".lora_" not in name:
            state[name] = tensor
    for name in [name for name in state if name.endswith(f".{PARTS[0]}.weight")]:
        stem = name.removesuffix(f"{PARTS[0]}.weight")
        state[f"{stem}in_proj_weight"] = torch.cat([state.pop(f"{stem}{part}.weight") for part in PARTS])
    with torch.device("meta"):
        made = MusicLM(lm.config)
    made.load_state_dict(state, assign=True)
    return made.eval().requires_grad_(False)


# --- the folder ----------------------------------------------------------------------------------------------------


def base_of(model: str | os.PathLike[str]) -> dict[str, Any]:
    """How an adapter names its base: `{name, identity, licence}`. Raises `UserError` when `model` is no release."""
    return name_of(model, weights.read_info(model))


def name_of(model: str | os.PathLike[str], info: dict[str, Any]) -> dict[str, Any]:
    """The same where the release's config.json (`info`) is read already."""
    return {"name": os.fspath(model), "identity": _identity(model, info), "licence": info.get("licence")}


def _identity(model: str | os.PathLike[str], info: dict[str, Any]) -> str:
    identity = info.get("weights", {}).get("sha256")
    if not isinstance(identity, str):
        raise UserError(
            f"MODEL={os.fspath(model)!r}: {weights.CONFIG} does not name the sha256 of its weights; copy or write the "
            "release again"
        )
    return identity


def save(folder: str | os.PathLike[str], lm: MusicLM, info: dict[str, Any], base: dict[str, Any]) -> Path:
    """Write the adapter on `lm` as a folder, whole or absent; an older one there is replaced.

    Args:
        lm: a model with an adapter.
        info: as for `weights.save_release`.
        base: from `base_of`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save as to_bytes

    state = {
        f"{_PREFIX}{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(lm, adapter_name=_NAME).items()
    }
    raw = to_bytes(dict(sorted(state.items())), metadata={"format": "pt"})
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in _described(lm).items()}
    described |= {"base_model_name_or_path": base["name"], "inference_mode": True}
    document = {
        "format": weights.ADAPTER,
        "schema_version": shapes.SCHEMA_VERSION,
        "base": base,
        "lm": settings.to_dict(lm.config),
        **info,
        "weights": {
            "file": WEIGHTS,
            "sha256": hashlib.sha256(raw).hexdigest(),
            "dtype": "float32",
            "parameters": sum(t.numel() for t in state.values()),
        },
    }
    described_text = json.dumps(described, indent=2, sort_keys=True) + "\n"
    return weights.write_folder(folder, document, {WEIGHTS: raw, PEFT_CONFIG: described_text.encode()})


def _described(lm: Any) -> dict[str, Any]:
    tree = lm.peft_config[_NAME].to_dict()
    return {key: getattr(value, "value", value) for key, value in tree.items() if key != "runtime_config"}


def find_base(model: str | os.PathLike[str], info: dict[str, Any], given: str = "") -> str:
    """The place of the model that an adapter was made for, by its name and told by the hash of its weights.

    Args:
        model: the adapter's folder.
        info: its config.json.
        given: the base's folder, where it is known to stand elsewhere (BASE=); else it is looked for as it was named
            in training, below the folders that hold the adapter, and among the models imported on this machine.

    Raises:
        UserError: it is not there, or what is there is another model.
    """
    wanted, others = info["base"], []
    for place in [given] if given else _places(model, wanted["name"]):
        try:
            identity = _identity(place, weights.read_info(place))
        except UserError:
            if given:
                raise
            continue
        if identity == wanted["identity"]:
            return place
        others.append(f"{place!r} is another model (identity {identity[:12]}…)")
    what = f"MODEL={os.fspath(model)!r} is an adapter of {wanted['name']!r} (identity {wanted['identity'][:12]}…)"
    found = f", but {' and '.join(others)}" if others else ", which is not here"
    raise UserError(f"{what}{found}. Give the folder of the model it was trained from as BASE=FOLDER")


def _places(model: str | os.PathLike[str], name: str) -> Iterator[str]:
    from musicgen.interop import sources

    yield name
    here = files.local_path(model)
    if here is not None and "://" not in name and not os.path.isabs(name):
        for folder in here.resolve().parents:
            if (folder / name).is_dir():
                yield str(folder / name)
    yield from sources.imported()


def load(model: str | os.PathLike[str], info: dict[str, Any], base: str = "") -> MusicLM:
    """The base of an adapter with the adapter merged into it: an ordinary model, float32, eval mode, CPU.

    Raises:
        UserError: the base is missing or another model; the adapter is damaged, or not one that can be merged here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    name, folder = os.fspath(model), weights.resolve(model)
    raw, text = (files.read_bytes(files.join(folder, file)) for file in _there(name, folder))
    if hashlib.sha256(raw).hexdigest() != info.get("weights", {}).get("sha256"):
        raise UserError(
            f"MODEL={name!r}: {WEIGHTS} is not the file that {weights.CONFIG} describes (its sha256 differs: cut "
            "short, damaged or exchanged); copy or write the adapter again"
        )
    try:
        state, described = from_bytes(raw), json.loads(text)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"MODEL={name!r}: the adapter cannot be read ({error}); copy or write it again") from None
    chosen = _read_config(name, described)
    lm, _ = weights.load_release(find_base(model, info, base), quiet=True)
    with torch.random.fork_rng(devices=[]):  # the factors are overwritten; the caller's randomness is not spent
        try:
            _inject(lm, chosen)
        except (TypeError, ValueError, LookupError, AttributeError, re.error) as error:  # peft's
            raise _not_described(name, error) from None
    _put(name, lm, {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()})
    return merged(lm)


def _there(name: str, folder: str) -> tuple[str, str]:
    for file in (WEIGHTS, PEFT_CONFIG):
        if not files.exists(files.join(folder, file)):
            raise UserError(f"MODEL={name!r} is an adapter without its {file}; copy or write the adapter again")
    return WEIGHTS, PEFT_CONFIG


def _read_config(name: str, described: Any) -> Any:
    from peft import LoraConfig

    if not isinstance(described, dict):
        raise _not_described(name, f"it holds a {type(described).__name__} instead of a mapping")
    plain = described.get("peft_type") == "LORA" and described.get("bias", "none") == "none"
    if not plain or described.get("use_dora") or described.get("modules_to_save"):
        raise UserError(
            f"MODEL={name!r}: {PEFT_CONFIG} describes another kind of adapter than plain LoRA, which alone is merged "
            "here; merge it with peft"
        )
    kept = ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern")
    try:
        return LoraConfig(**{key: described[key] for key in kept if key in described}, bias="none")
    except (TypeError, ValueError, AttributeError) as error:
        raise _not_described(name, error) from None


def _not_described(name: str, why: object) -> UserError:
    return UserError(f"MODEL={name!r}: {PEFT_CONFIG} describes no adapter ({why}); copy or write the adapter again")


def _put(name: str, lm: MusicLM, state: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = {key: tensor.shape for key, tensor in get_peft_model_state_dict(lm, adapter_name=_NAME).items()}
    if wanted != {key: tensor.shape for key, tensor in state.items()}:
        odd = sorted({*wanted} ^ {*state}) or [key for key in state if wanted[key] != state[key].shape]
        raise UserError(
            f"MODEL={name!r}: {WEIGHTS} does not fit {PEFT_CONFIG} and the base model ({len(odd)} tensors, such as "
            f"{odd[0]!r}); copy or write the adapter again"
        )
    set_peft_model_state_dict(lm, state, adapter_name=_NAME)
