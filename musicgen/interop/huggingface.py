"""transformers' MusicGen folders: `MusicgenForConditionalGeneration` and `MusicgenMelodyForConditionalGeneration`.

A folder holds language model, codec and text encoder together; it loads with `from_pretrained` and with the
text-to-audio pipeline. transformers knows two interleavings only: delay, and for two channels left and right with the
same delays (our `stereo_partial_delay`); what has another one cannot go there and is refused. Weights are read from
safetensors alone.

Key maps: the reference's conversion scripts (`models/musicgen*/convert_*.py` of transformers).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musicgen import chroma
from musicgen.codec import TRAINING_BUFFERS
from musicgen.conditioning import TextEncoder, _first_line, _quiet
from musicgen.config import ConditionConfig, LMConfig
from musicgen.errors import UserError
from musicgen.interop.parts import Parts, card, check_reference, read_card

TYPES = ("musicgen", "musicgen_melody")
VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")  # without: all unknown
_REFERENCE_SECONDS = 30.0
_DECODER = "decoder.model.decoder."
# Ours to theirs, for everything but the packed q/k/v.
_RULES = (
    (r"^emb\.(\d+)\.", rf"{_DECODER}embed_tokens.\1."),
    (r"^linears\.(\d+)\.", r"decoder.lm_heads.\1."),
    (r"^out_norm\.", rf"{_DECODER}layer_norm."),
    (r"^transformer\.layers\.(\d+)\.", rf"{_DECODER}layers.\1."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm_cross\.", ".encoder_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.linear1\.", ".fc1."),
    (r"\.linear2\.", ".fc2."),
    (r"^condition_provider\.conditioners\.description\.output_proj\.", "enc_to_dec_proj."),
    (r"^condition_provider\.conditioners\.self_wav\.output_proj\.", "audio_enc_to_dec_proj."),
)


def _their_name(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def to_theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The language model's weights by transformers' names; packed projections are cut into q, k and v."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("in_proj_weight"):
            stem = _their_name(name.removesuffix("in_proj_weight"))
            for letter, part in zip("qkv", tensor.chunk(3)):
                theirs[f"{stem}{letter}_proj.weight"] = part.contiguous()
        else:
            theirs[_their_name(name)] = tensor
    return theirs


def from_theirs(theirs: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """The inverse of `to_theirs` for a model of this shape; what belongs to codec and text encoder is left out.

    A missing text projection (transformers has none where both widths are equal) is the identity.
    """
    from musicgen.lm import MusicLM

    with torch.device("meta"):
        names = list(MusicLM(config).state_dict())
    state: dict[str, Tensor] = {}
    for name in names:
        if name.endswith("in_proj_weight"):
            stem = _their_name(name.removesuffix("in_proj_weight"))
            wanted = [f"{stem}{letter}_proj.weight" for letter in "qkv"]
            if all(key in theirs for key in wanted):
                state[name] = torch.cat([theirs[key] for key in wanted]).float()
        elif (key := _their_name(name)) in theirs:
            state[name] = theirs[key].float()
        elif key == "enc_to_dec_proj.weight" and config.condition.text_dim == config.dim:
            state[name] = torch.eye(config.dim)
        elif key == "enc_to_dec_proj.bias" and config.condition.text_dim == config.dim:
            state[name] = torch.zeros(config.dim)
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(f"weights are missing: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}")
    return state


def read(folder: Path, source: str) -> Parts:
    """A transformers folder taken apart.

    Args:
        folder: with config.json, safetensors and the tokenizer's files.
        source: what the user called it.

    Raises:
        UserError: not whole, or a model that is not the reference's architecture.
    """
    import transformers

    _quiet()
    try:
        whole = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"FROM={source!r}: config.json cannot be read ({_first_line(error)})") from None
    if whole.model_type not in TYPES:
        raise UserError(f"FROM={source!r} is a model of type {whole.model_type!r}; allowed: {', '.join(TYPES)}")
    config = _config_of(whole, source)
    kind: Any = (
        transformers.MusicgenMelodyForConditionalGeneration
        if whole.model_type == "musicgen_melody"
        else transformers.MusicgenForConditionalGeneration
    )
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if not any((Path(folder) / name).is_file() for name in VOCABULARIES):
            raise OSError(f"it has no tokenizer ({', '.join(VOCABULARIES)}); save that of its text encoder there")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"FROM={source!r} cannot be read: {_first_line(error)}; it needs config.json, model.safetensors and the "
            "tokenizer's files, as transformers' save_pretrained writes them (pickled weights are not read)"
        ) from None
    more = [k for k in report["unexpected_keys"] if k.startswith("decoder.") and "embed_positions" not in k]
    if more:
        raise UserError(
            f"FROM={source!r}: weights that config.json knows no place for: {', '.join(sorted(more)[:5])}; "
            "is its number of layers right?"
        )
    lost = [k for k in report["missing_keys"] if "embed_positions" not in k and not k.endswith(TRAINING_BUFFERS)]
    if lost:
        raise UserError(f"FROM={source!r}: weights are missing: {', '.join(sorted(lost)[:5])}")
    licence, inherited = read_card(folder)
    text_name = str(getattr(whole.text_encoder, "_name_or_path", "") or "text_encoder")
    return Parts(
        config=config,
        state=from_theirs(model.state_dict(), config),
        network=model.audio_encoder,
        channels=whole.decoder.audio_channels,
        text_encoder=TextEncoder(text_name, model.text_encoder, tokenizer),
        codec_name=str(getattr(whole.audio_encoder, "_name_or_path", "") or "codec"),
        source=source,
        licence=licence,
        inherited=inherited,
        training={"crop_seconds": _crop_seconds(folder, whole)},
    )


def _crop_seconds(folder: Path, whole: Any) -> float:
    """Length of the training crops: what generation_config.json has the model make, else the reference's 30 s.

    Its `max_length` counts frames in the released models (1500) and columns in our exports, the delays of the
    codebooks included; the delays are taken off where that leaves tenths of a second.
    """
    try:
        length = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("max_length")
    except (OSError, ValueError, AttributeError):
        return _REFERENCE_SECONDS
    rate, books = int(whole.audio_encoder.frame_rate), whole.decoder.num_codebooks // whole.decoder.audio_channels
    if not isinstance(length, int) or length < rate + books:  # the library's own default is 20
        return _REFERENCE_SECONDS
    columns = (length - books) % (rate // 10 if rate % 10 == 0 else rate) == 0
    return (length - books if columns else length) / rate


def _config_of(whole: Any, source: str) -> LMConfig:
    decoder, melody = whole.decoder, whole.model_type == "musicgen_melody"
    if decoder.activation_function not in ("gelu", "relu") or decoder.ffn_dim % decoder.hidden_size:
        raise UserError(
            f"FROM={source!r} has feed-forward {decoder.activation_function!r} of width {decoder.ffn_dim}; "
            f"gelu or relu of a multiple of {decoder.hidden_size} can be imported"
        )
    if getattr(decoder, "scale_embedding", False):
        raise UserError(f"FROM={source!r} scales its embeddings (scale_embedding), which no MusicGen does")
    return LMConfig(
        dim=decoder.hidden_size,
        num_layers=decoder.num_hidden_layers,
        num_heads=decoder.num_attention_heads,
        ffn_mult=decoder.ffn_dim // decoder.hidden_size,
        num_codebooks=decoder.num_codebooks,
        codebook_size=decoder.vocab_size,
        activation=decoder.activation_function,
        cross_attention=not melody,
        pattern="stereo_partial_delay" if decoder.audio_channels == 2 else "delay",
        tail="reference",
        condition=ConditionConfig(
            text_encoder=str(getattr(whole.text_encoder, "_name_or_path", "") or "text_encoder"),
            text_dim=whole.text_encoder.hidden_size,
            melody=melody,
            chroma_frames=getattr(whole, "chroma_length", 235),
            null="released" if melody else "zeros",
        ),
    )


def check(parts: Parts) -> None:
    """Raises `UserError` for a model that transformers' classes cannot express."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    check_reference(parts)
    config = parts.config
    allowed = "stereo_partial_delay" if parts.channels == 2 else "delay"
    if config.pattern != allowed:
        raise UserError(
            f"MODEL={parts.source!r} has pattern {config.pattern!r}; transformers generates {allowed!r} with "
            f"{parts.channels} channel(s) only. Export it with TO=audiocraft"
        )
    if not config.condition.melody and not config.cross_attention:
        raise UserError(
            f"MODEL={parts.source!r} has neither a melody nor cross-attention; transformers has text models with "
            "cross-attention and melody models without. Export it with TO=audiocraft"
        )
    kind = parts.text_encoder.model.config.model_type  # type: ignore[union-attr]
    if kind not in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        raise UserError(f"MODEL={parts.source!r}: transformers' MusicGen takes no text encoder of type {kind!r}")
    projection = parts.state["condition_provider.conditioners.description.output_proj.weight"]
    bias = parts.state["condition_provider.conditioners.description.output_proj.bias"]
    same_width = config.condition.text_dim == config.dim
    if same_width and (bias.any() or not torch.equal(projection, torch.eye(config.dim))):
        raise UserError(
            f"MODEL={parts.source!r}: text encoder and model have the same width {config.dim}, for which transformers "
            "has no text projection, but this model learned one; it cannot be exported there. Use TO=audiocraft"
        )


def write(parts: Parts, folder: Path) -> None:
    """Write a folder that `from_pretrained` and the text-to-audio pipeline load; raises as `check` does."""
    import transformers

    check(parts)
    config, melody = parts.config, parts.config.condition.melody
    shape = {
        "vocab_size": config.codebook_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.ffn_mult * config.dim,
        "activation_function": config.activation,
        "num_codebooks": config.num_codebooks,
        "audio_channels": parts.channels,
        "pad_token_id": config.special_id,
        "bos_token_id": config.special_id,
        "dropout": 0.0,
        "tie_word_embeddings": False,
    }
    names = "MusicgenMelody" if melody else "Musicgen"
    decoder = getattr(transformers, f"{names}ForCausalLM")(getattr(transformers, f"{names}DecoderConfig")(**shape))
    whole_config = getattr(transformers, f"{names}Config")(
        text_encoder=parts.text_encoder.model.config,
        audio_encoder=parts.network.config,
        decoder=decoder.config,
        **({"chroma_length": config.condition.chroma_frames} if melody else {}),
    )
    whole_config.text_encoder._name_or_path = parts.text_encoder.name
    whole_config.audio_encoder._name_or_path = parts.codec_name
    model = getattr(transformers, f"{names}ForConditionalGeneration")(
        config=whole_config, text_encoder=parts.text_encoder.model, audio_encoder=parts.network, decoder=decoder
    )
    theirs = to_theirs(parts.state)
    own = {k for k in model.state_dict() if not k.startswith(("text_encoder.", "audio_encoder."))}
    extra = {"enc_to_dec_proj.weight", "enc_to_dec_proj.bias"} - own  # the identity, see `check`
    theirs = {k: v for k, v in theirs.items() if k not in extra}
    report = model.load_state_dict(theirs, strict=False)
    left = [k for k in report.missing_keys if k in own and "embed_positions" not in k]
    if left or report.unexpected_keys:
        raise RuntimeError(f"key map is incomplete: missing {left[:3]}, unexpected {report.unexpected_keys[:3]}")
    _generation(model, parts)
    model.save_pretrained(folder)
    _processor(parts, folder)
    (folder / "README.md").write_text(card(parts, "MusicGen for transformers"), encoding="utf-8")
    for file in folder.iterdir():  # weights come for their owner alone
        file.chmod((folder / "README.md").stat().st_mode)


def _generation(model: Any, parts: Parts) -> None:
    """Sampling as the paper's, and as long as the training crops."""
    special, books = parts.config.special_id, parts.config.num_codebooks // parts.channels
    rate = parts.network.config.frame_rate
    settings = model.generation_config
    settings.bos_token_id = settings.pad_token_id = settings.decoder_start_token_id = special
    settings.do_sample, settings.guidance_scale, settings.top_k = True, 3.0, min(250, parts.config.codebook_size)
    settings.max_length = round((parts.training.get("crop_seconds") or 30.0) * rate) + books


def _processor(parts: Parts, folder: Path) -> None:
    """Tokenizer and feature extractor beside the weights."""
    import transformers

    rate = parts.network.config.sampling_rate
    # A tokenizer of BERT's kind gives token types as well, which generate() refuses; the encoder takes them as zeros.
    tokenizer: Any = parts.text_encoder.tokenizer
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if not parts.config.condition.melody:
        extractor = transformers.EncodecFeatureExtractor(
            feature_size=parts.channels, sampling_rate=rate, padding_side="left"
        )
        transformers.MusicgenProcessor(extractor, parts.text_encoder.tokenizer).save_pretrained(folder)
        return
    # The melody models' extractor needs torchaudio to be built; its settings are a small file.
    parts.text_encoder.tokenizer.save_pretrained(folder)
    settings = {
        "feature_extractor_type": "MusicgenMelodyFeatureExtractor",
        "processor_class": "MusicgenMelodyProcessor",
        "feature_size": chroma.NUM_CHROMA,
        "num_chroma": chroma.NUM_CHROMA,
        "sampling_rate": rate,
        "hop_length": chroma.HOP,
        "n_fft": chroma.WINDOW,
        "chunk_length": round(parts.config.condition.chroma_frames * chroma.HOP / rate),
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "stem_indices": [3, 2],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
