"""audiocraft's exported files: `state_dict.bin` (language model) and `compression_state_dict.bin` (codec).

Each is a dictionary with `best_state`, a flat state, and `xp.cfg`, the experiment's settings as YAML. They are read
with weights-only loading, which unpickles tensors and plain values and nothing else, and written the same way. Our
names are audiocraft's already; only the chroma window and the codec's names differ. The text encoder is not inside:
audiocraft fetches it by name.

Source: audiocraft `utils/export.py`, `models/loaders.py`, `models/builders.py`, `config/`.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from musicgen import about, chroma, patterns
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.errors import UserError
from musicgen.interop.parts import Parts, card, check_reference, codec_network, read_card, stated

LM_FILE, CODEC_FILE = "state_dict.bin", "compression_state_dict.bin"
TEXT_ENCODERS = {  # those that audiocraft fetches by name, and how wide their hidden states are
    "t5-small": 512, "t5-base": 768, "t5-large": 1024, "t5-3b": 1024, "t5-11b": 1024, "google/flan-t5-small": 512,
    "google/flan-t5-base": 768, "google/flan-t5-large": 1024,
}  # fmt: skip
_CONDITIONERS = "condition_provider.conditioners."
_WINDOW = f"{_CONDITIONERS}self_wav.chroma.spec.window"  # a buffer of theirs, a constant of ours


# --- patterns -----------------------------------------------------------------------------------------------------


def pattern_settings(pattern: str, num_codebooks: int) -> dict[str, Any]:
    """`codebooks_pattern` of audiocraft for one of our patterns."""
    books = list(range(num_codebooks))
    rest = [min(q, 1) for q in books]
    delays = {"delay": books, "partial_delay": rest, "stereo_delay": books}
    delays["stereo_partial_delay"] = [q // 2 for q in books]
    if pattern in delays:
        return {"modeling": "delay", "delay": {"delays": delays[pattern], "flatten_first": 0, "empty_initial": 0}}
    if pattern in ("flattening", "partial_flattening"):
        flattening = books if pattern == "flattening" else rest
        return {"modeling": "unroll", "unroll": {"flattening": flattening, "delays": [0] * num_codebooks}}
    if pattern == "coarse_first":
        return {"modeling": "coarse_first", "coarse_first": {"delays": [0] * (num_codebooks - 1)}}
    if pattern not in ("parallel", "musiclm"):
        raise UserError(f"pattern {pattern!r} is none of audiocraft's; a model that has it cannot be exported there")
    return {"modeling": pattern, **({"musiclm": {"group_by": 2}} if pattern == "musiclm" else {})}


def pattern_of(settings: dict[str, Any], num_codebooks: int, stereo: bool, source: str) -> str:
    """The name of the pattern that these settings describe; raises `UserError` when it is none of ours."""
    modeling = settings.get("modeling")
    defaults = {"delay": {"flatten_first": 0, "empty_initial": 0}, "musiclm": {"group_by": 2}}
    given = {**defaults.get(str(modeling), {}), **(settings.get(str(modeling)) or {})}
    for name in patterns.PATTERNS:
        if name.startswith("stereo") != stereo or (stereo and num_codebooks % 2):
            continue
        ours = pattern_settings(name, num_codebooks)
        if ours["modeling"] == modeling and ours.get(str(modeling), {}) == given:
            return name
    raise UserError(
        f"FROM={source!r} was trained with codebook pattern {modeling!r} {given}"
        f"{' over two channels' if stereo else ''}; this program has {', '.join(patterns.PATTERNS)}"
    )


# --- reading ------------------------------------------------------------------------------------------------------


def _load(file: Path, source: str) -> dict[str, Any]:
    try:
        package = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"FROM={source!r}: {file.name} holds more than tensors and plain values, and is not unpickled "
            f"({str(error).splitlines()[0][:150]}). Export it with audiocraft's own `export_lm`, on a machine where "
            "its origin is trusted"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"FROM={source!r}: {file.name} cannot be read ({str(error).splitlines()[0][:150]})") from None
    if not isinstance(package, dict) or not ({"best_state", "xp.cfg"} <= set(package) or "pretrained" in package):
        raise UserError(
            f"FROM={source!r}: {file.name} is not an exported audiocraft file (it has no best_state and xp.cfg); "
            "a training checkpoint must first be exported with audiocraft's `export_lm` or `export_encodec`"
        )
    return package


def _settings(package: dict[str, Any]) -> dict[str, Any]:
    """`xp.cfg` as a tree; `${a.b}` is what stands at a.b."""
    tree = yaml.safe_load(package["xp.cfg"])

    def resolved(value: Any, depth: int = 0) -> Any:
        if isinstance(value, dict):
            return {k: resolved(v, depth) for k, v in value.items()}
        if isinstance(value, list):
            return [resolved(v, depth) for v in value]
        match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if match is None or depth > 10:
            return value
        target: Any = tree
        for part in match[1].split("."):
            target = target.get(part) if isinstance(target, dict) else None
        return resolved(target, depth + 1)

    return resolved(tree)


def read(folder: Path, source: str, codec: str = "", text_encoder: str = "") -> Parts:
    """A folder with audiocraft's two files taken apart.

    Args:
        codec: name or folder of the codec, where `compression_state_dict.bin` is missing or names one that is not here.
        text_encoder: name or folder of the text encoder, where the one that is named is not here.

    Raises:
        UserError: a file is missing, not an export, or describes another architecture than the reference's MusicGen.
    """
    package = _load(folder / LM_FILE, source)
    settings = _settings(package)
    stereo = bool((settings.get("interleave_stereo_codebooks") or {}).get("use"))
    state = {name: tensor.float() for name, tensor in package["best_state"].items() if name != _WINDOW}
    config = _config_of(settings, state, stereo, source)
    network, codec_name = _codec_of(folder, source, codec)
    encoder = TextEncoder.load(text_encoder or config.condition.text_encoder)
    encoder.name = config.condition.text_encoder
    licence, inherited = read_card(folder)
    seconds = float((settings.get("dataset") or {}).get("segment_duration") or 30.0)
    return Parts(
        config=config,
        state=state,
        network=network,
        channels=2 if stereo else 1,
        text_encoder=encoder,
        codec_name=codec_name,
        source=source,
        licence=stated(package.get("licence")) or licence,
        inherited=package.get("inherited_licences") or inherited,
        training={"crop_seconds": seconds},
    )


# What the reference's MusicGen fixes and other audiocraft models may have otherwise.
_FIXED = {
    "norm_first": True, "bias_proj": False, "bias_ff": False, "bias_attn": False, "causal": True, "layer_scale": None,
    "positional_embedding": "sin", "xpos": False, "qk_layer_norm": False, "qk_layer_norm_cross": False, "kv_repeat": 1,
    "past_context": None, "norm": "layer_norm",
}  # fmt: skip


def _config_of(settings: dict[str, Any], state: dict[str, Tensor], stereo: bool, source: str) -> LMConfig:
    lm, conditioners = settings["transformer_lm"], dict(settings.get("conditioners") or {})
    conditioners.pop("args", None)
    odd = [f"transformer_lm.{k}: {lm[k]!r}" for k, v in _FIXED.items() if k in lm and lm[k] != v]
    if settings.get("lm_model", "transformer_lm") != "transformer_lm":
        odd.append(f"lm_model: {settings['lm_model']!r}")
    for name, allowed in (("description", "t5"), ("self_wav", "chroma_stem")):
        kind = (conditioners.pop(name, None) or {}).get("model", allowed if name == "self_wav" else None)
        if kind != allowed:
            odd.append(f"conditioners.{name}: {kind!r}")
    odd += [f"conditioners.{name}" for name in conditioners]
    fuser = settings.get("fuser") or {}
    cross, prepend = list(fuser.get("cross") or []), list(fuser.get("prepend") or [])
    melody = "self_wav" in (settings.get("conditioners") or {})
    # Text models: text by cross-attention, or before the columns. Melody models: [chroma | text | columns].
    allowed_fusions = [([], ["description", "self_wav"])] if melody else [(["description"], []), ([], ["description"])]
    if (cross, sorted(prepend)) not in allowed_fusions or fuser.get("cross_attention_pos_emb"):
        odd.append(f"fuser: cross {cross}, prepend {prepend}")
    if odd:
        raise UserError(
            f"FROM={source!r} is not a text or melody MusicGen of the reference: {'; '.join(odd)}. "
            "Only those can be imported"
        )
    books = int(lm["n_q"])
    text = str(settings["conditioners"]["description"]["t5"]["name"])
    seconds = float((settings.get("dataset") or {}).get("segment_duration") or 30.0)
    weight = state.get(f"{_CONDITIONERS}description.output_proj.weight")
    return LMConfig(
        dim=int(lm["dim"]),
        num_layers=int(lm["num_layers"]),
        num_heads=int(lm["num_heads"]),
        ffn_mult=int(lm.get("hidden_scale", 4)),
        num_codebooks=books,
        codebook_size=int(lm["card"]),
        activation=lm.get("activation", "gelu"),
        cross_attention=bool(cross),
        pattern=pattern_of(settings["codebooks_pattern"], books, stereo, source),
        tail="reference",
        condition=ConditionConfig(
            text_encoder=text,
            text_dim=int(weight.shape[1]) if weight is not None else 768,
            melody=melody,
            chroma_frames=1 + int(seconds * settings.get("sample_rate", 32_000)) // chroma.HOP,
            null="released" if melody else "zeros",
        ),
    )


def _codec_of(folder: Path, source: str, codec: str) -> tuple[Any, str]:
    """The codec's network and name: the one given, the one inside, or the one the file points to."""
    if codec:
        return codec_network(codec), codec
    if not (folder / CODEC_FILE).is_file():
        raise UserError(
            f"FROM={source!r} has no {CODEC_FILE}; put it beside {LM_FILE}, or name the codec with --codec "
            "(facebook/encodec_32khz for the released models)"
        )
    package = _load(folder / CODEC_FILE, source)
    if "pretrained" in package:
        return codec_network(str(package["pretrained"])), str(package["pretrained"])
    return codec_from(package, source), "codec"


# --- the codec ----------------------------------------------------------------------------------------------------


def codec_from(package: dict[str, Any], source: str) -> Any:
    """An `EncodecModel` of transformers from an exported compression model."""
    import transformers

    settings = _settings(package)
    if settings.get("compression_model") != "encodec":
        raise UserError(f"FROM={source!r}: the codec is a {settings.get('compression_model')!r}; an EnCodec is needed")
    seanet, rvq, encodec = settings["seanet"], settings["rvq"], settings["encodec"]
    rate, bins = int(encodec["sample_rate"]), int(rvq["bins"])
    hop = 1
    for ratio in seanet["ratios"]:
        hop *= int(ratio)
    network = transformers.EncodecModel(
        transformers.EncodecConfig(
            target_bandwidths=[int(rvq["n_q"]) * -(-rate // hop) * (bins.bit_length() - 1) / 1000],
            sampling_rate=rate,
            audio_channels=int(encodec["channels"]),
            normalize=bool(encodec.get("renormalize", False)),
            hidden_size=int(seanet["dimension"]),
            num_filters=int(seanet["n_filters"]),
            num_residual_layers=int(seanet["n_residual_layers"]),
            upsampling_ratios=[int(r) for r in seanet["ratios"]],
            norm_type=seanet["norm"],
            kernel_size=int(seanet["kernel_size"]),
            last_kernel_size=int(seanet["last_kernel_size"]),
            residual_kernel_size=int(seanet["residual_kernel_size"]),
            dilation_growth_rate=int(seanet["dilation_base"]),
            use_causal_conv=bool(seanet["causal"]),
            pad_mode=seanet["pad_mode"],
            compress=int(seanet["compress"]),
            num_lstm_layers=int(seanet["lstm"]),
            trim_right_ratio=float(seanet["decoder"]["trim_right_ratio"]),
            codebook_size=bins,
            use_conv_shortcut=not seanet["true_skip"],
        )
    )
    state = {_codec_name_of_ours(name): tensor.float() for name, tensor in package["best_state"].items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"FROM={source!r}: the codec's weights do not fit its settings: {error}") from None
    return network.eval()


def _codec_name_of_ours(name: str) -> str:
    """audiocraft's name of a codec tensor as transformers'."""
    name = re.sub(r"^(encoder|decoder)\.model\.", r"\1.layers.", name)
    name = re.sub(r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook.", name)
    name = name.replace(".conv.conv.", ".conv.").replace(".convtr.convtr.", ".conv.")
    return re.sub(r"\.weight_([gv])$", lambda m: f".parametrizations.weight.original{'gv'.index(m[1])}", name)


def codec_state(network: Any) -> dict[str, Tensor]:
    """An `EncodecModel`'s tensors by audiocraft's names."""
    upsampling = {n for n, m in network.named_modules() if type(m).__name__ == "EncodecConvTranspose1d"}
    out: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        new = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)
        new = re.sub(r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook.", new)
        if ".conv." in name:
            module = name.split(".conv.")[0]
            new = new.replace(".conv.", ".convtr.convtr." if module in upsampling else ".conv.conv.")
        new = re.sub(r"\.parametrizations\.weight\.original([01])$", lambda m: f".weight_{'gv'[int(m[1])]}", new)
        out[new] = tensor.detach().contiguous().clone()
    return out


def _codec_settings(network: Any) -> dict[str, Any]:
    config = network.config
    return {
        "compression_model": "encodec",
        "sample_rate": config.sampling_rate,
        "channels": config.audio_channels,
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": config.sampling_rate,
            "channels": config.audio_channels,
            "causal": config.use_causal_conv,
            "renormalize": config.normalize,
        },
        "seanet": {
            "dimension": config.hidden_size,
            "channels": config.audio_channels,
            "causal": config.use_causal_conv,
            "n_filters": config.num_filters,
            "n_residual_layers": config.num_residual_layers,
            "ratios": list(config.upsampling_ratios),
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": config.norm_type,
            "norm_params": {},
            "kernel_size": config.kernel_size,
            "residual_kernel_size": config.residual_kernel_size,
            "last_kernel_size": config.last_kernel_size,
            "dilation_base": config.dilation_growth_rate,
            "pad_mode": config.pad_mode,
            "true_skip": not config.use_conv_shortcut,
            "compress": config.compress,
            "lstm": config.num_lstm_layers,
            "disable_norm_outer_blocks": 0,
            "decoder": {
                "trim_right_ratio": config.trim_right_ratio,
                "final_activation": None,
                "final_activation_params": None,
            },
            "encoder": {},
        },
        "rvq": {
            "n_q": config.num_quantizers,
            "q_dropout": False,
            "bins": config.codebook_size,
            "decay": 0.99,
            "kmeans_init": True,
            "kmeans_iters": 50,
            "threshold_ema_dead_code": 2,
            "orthogonal_reg_weight": 0.0,
            "orthogonal_reg_active_codes_only": False,
        },
    }


# --- writing ------------------------------------------------------------------------------------------------------


def check(parts: Parts, text_encoder: str = "") -> str:
    """The text encoder's name for audiocraft; raises `UserError` for what audiocraft cannot express."""
    check_reference(parts)
    name = text_encoder or parts.text_encoder.name
    name = name.removeprefix("google-t5/")
    if name not in TEXT_ENCODERS:
        raise UserError(
            f"MODEL={parts.source!r} listens to text encoder {name!r}; audiocraft fetches its encoder by name and "
            f"knows {', '.join(TEXT_ENCODERS)}. If it is one of these, say which with --text_encoder_name"
        )
    return name


def _lm_settings(parts: Parts, text_encoder: str) -> dict[str, Any]:
    """`xp.cfg` with everything that audiocraft's `builders.get_lm_model` and `MusicGen` read."""
    config, melody = parts.config, parts.config.condition.melody
    rate = parts.network.config.sampling_rate
    seconds = parts.training.get("crop_seconds") or 30.0
    if melody:
        seconds = int(config.condition.chroma_frames * chroma.HOP / rate)  # decides the prefix's length there
    conditioners: dict[str, Any] = {
        "description": {
            "model": "t5",
            "t5": {"name": text_encoder, "finetune": False, "word_dropout": 0.0, "normalize_text": False},
        }
    }
    if melody:
        stem = {"sample_rate": rate, "n_chroma": chroma.NUM_CHROMA, "radix2_exp": chroma.WINDOW.bit_length() - 1}
        stem |= {"argmax": True, "match_len_on_eval": False, "eval_wavs": None, "n_eval_wavs": 100}
        conditioners["self_wav"] = {"model": "chroma_stem", "chroma_stem": stem}
    prepend = [] if config.cross_attention else (["self_wav"] if melody else []) + ["description"]
    return {
        "solver": "musicgen",
        "sample_rate": rate,
        "channels": parts.channels,
        "lm_model": "transformer_lm",
        "codebooks_pattern": pattern_settings(config.pattern, config.num_codebooks),
        "transformer_lm": {
            "dim": config.dim,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "hidden_scale": config.ffn_mult,
            "n_q": config.num_codebooks,
            "card": config.codebook_size,
            "dropout": 0.0,
            "emb_lr": None,
            "activation": config.activation,
            "memory_efficient": True,
            "custom": False,
            "attention_as_float32": False,
            "weight_init": "gaussian",
            "depthwise_init": "current",
            "zero_bias_init": True,
            "cross_attention": config.cross_attention,
            "attention_dropout": None,
            "checkpointing": "none",
            "two_step_cfg": False,
            **_FIXED,
        },
        "classifier_free_guidance": {"training_dropout": 0.2, "inference_coef": 3.0},
        "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {}},
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": prepend,
            "cross": ["description"] if config.cross_attention else [],
            "input_interpolate": [],
        },
        "conditioners": conditioners,
        "dataset": {"segment_duration": seconds},
        "interleave_stereo_codebooks": {"use": parts.channels == 2, "per_timestep": False},
        "compression_model_n_q": None,
    }


def write(parts: Parts, folder: Path, text_encoder: str = "") -> None:
    """Write both files and the card into an existing folder; raises as `check` does."""
    name = check(parts, text_encoder)
    state = {key: tensor.detach().contiguous().clone() for key, tensor in parts.state.items()}
    if parts.config.condition.melody:
        state[_WINDOW] = torch.hann_window(chroma.WINDOW)
    common = {
        "version": about.software(),
        "exported": True,
        "licence": parts.binding_licence,
        "inherited_licences": parts.inherited,
    }
    settings = yaml.safe_dump(_lm_settings(parts, name), sort_keys=False)
    torch.save({"best_state": state, "xp.cfg": settings, **common}, folder / LM_FILE)
    settings = yaml.safe_dump(_codec_settings(parts.network), sort_keys=False)
    torch.save({"best_state": codec_state(parts.network), "xp.cfg": settings, **common}, folder / CODEC_FILE)
    (folder / "README.md").write_text(card(parts, "MusicGen for audiocraft"), encoding="utf-8")
