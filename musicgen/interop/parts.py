"""A model taken apart: language model, codec, text encoder and what is known of them, between two formats.

`to_release` puts the parts together as a release folder that holds everything (`codec/` and `text_encoder/` inside);
`of_release` takes a release apart. Weights are float32 on the way and stored as float16 where that loses nothing, so
that a model that went out and came back is the same file, byte for byte.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from musicgen import about, stereo, weights
from musicgen import codec as codecs
from musicgen.conditioning import TextEncoder
from musicgen.config import LMConfig, Tail
from musicgen.errors import UserError
from musicgen.lm import MusicLM

NON_COMMERCIAL = "CC-BY-NC-4.0"


@dataclass
class Parts:
    """A whole model.

    Attributes:
        config: shape of the language model.
        state: its weights by our names, float32.
        network: the mono codec, a `transformers.EncodecModel`.
        channels: 1, or 2 where the codebooks of left and right alternate.
        text_encoder: model and tokenizer.
        codec_name: what the codec is called elsewhere (a hub name), for the record.
        source: where the model was read from.
        licence: of the weights, None where nobody said.
        inherited: `{model, licence}` of what the weights derive from.
        training: what is known of the training (see `weights.save_release`).
    """

    config: LMConfig
    state: dict[str, Tensor]
    network: Any
    channels: int
    text_encoder: TextEncoder
    codec_name: str
    source: str
    licence: str | None = None
    inherited: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def binding_licence(self) -> str | None:
        """The licence a receiver must follow: a non-commercial one that is inherited outweighs the model's own."""
        bound = [item["licence"] for item in self.inherited if weights.non_commercial(item["licence"])]
        return bound[0] if bound else self.licence

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What a model made of this one inherits: this one too, where its own licence is not among the inherited."""
        known = [item["licence"] for item in self.inherited]
        if known and self.licence in (None, *known):
            return self.inherited
        return [weights.ancestor(self.source, self.licence, self.training), *self.inherited]


def codec_network(name: str) -> Any:
    """The `EncodecModel` behind a codec's name, its weight normalisation in place; raises as `codec.load` does."""
    network: Any = codecs.load_network(name.removeprefix(stereo.PREFIX))
    for layer in network.quantizer.layers:  # our files leave the statistics of training out
        codebook = layer.codebook
        codebook.embed_avg.copy_(codebook.embed)
        codebook.cluster_size.fill_(1.0)
        codebook.inited.fill_(1.0)
    return network


def of_release(model: str | os.PathLike[str], codec: str = "", text_encoder: str = "", base: str = "") -> Parts:
    """A release taken apart; an adapter is merged into the model it was made for.

    Args:
        model: `demo`, a release folder, or what `weights.resolve` turns into one.
        codec, text_encoder: name or folder of each, where it stands elsewhere than the release says.
        base: the model that an adapter was made for, where it stands elsewhere than in training.

    Raises:
        UserError: no release, or its codec or text encoder is missing or another one.
    """
    lm, info = weights.load_release(model, base)
    codec_name = codec or weights.place_of(model, info, "codec", base)
    network = codec_network(codec_name)
    loaded = codecs.load(codec_name)
    weights.check_codec(info, loaded)
    encoder = TextEncoder.load(text_encoder or weights.place_of(model, info, "text_encoder", base))
    if encoder.identity != info["text_encoder"]["identity"]:
        raise UserError(
            f"MODEL={os.fspath(model)!r} was trained with another text encoder than {encoder.name!r}; give the one it "
            f"names ({info['text_encoder']['name']!r}) with --text_encoder"
        )
    encoder.name = info["text_encoder"]["name"]
    return Parts(
        config=lm.config,
        state=lm.state_dict(),
        network=network,
        channels=loaded.channels,
        text_encoder=encoder,
        codec_name=str(info["codec"]["name"]).removeprefix(stereo.PREFIX),
        source=os.fspath(model),
        licence=stated(info.get("licence")),
        inherited=info.get("inherited", []),
        training=info["training"],
    )


def to_release(parts: Parts, out: str | os.PathLike[str]) -> Path:
    """Write the parts as a release folder with its codec and text encoder inside.

    Raises:
        UserError: weights of another shape than the settings say, a codec with other codebooks, `out` not writable.
    """
    with tempfile.TemporaryDirectory() as scratch:
        codec_folder = codecs.save(parts.network, Path(scratch) / "codec", dtype=torch.float32)
        text_folder = Path(scratch) / "text_encoder"
        parts.text_encoder.model.save_pretrained(text_folder)  # type: ignore[operator]
        parts.text_encoder.tokenizer.save_pretrained(text_folder)
        # The identities are those of what will be loaded.
        codec: codecs.Codec = codecs.load(codec_folder)
        if parts.channels == 2:
            codec = stereo.StereoCodec(codec)
        encoder = TextEncoder.load(str(text_folder))
        _check(parts, codec, encoder)
        with torch.random.fork_rng(devices=[]):
            lm = MusicLM(parts.config)
        try:
            lm.load_state_dict(parts.state)
        except RuntimeError as error:
            raise UserError(
                f"FROM={parts.source!r}: the weights do not fit the settings beside them: {error}"
            ) from None
        prefix = stereo.PREFIX if parts.channels == 2 else ""
        info = {
            "codec": {"name": f"{prefix}{parts.codec_name}", "identity": codec.identity, "folder": "codec"},
            "text_encoder": {
                "name": parts.text_encoder.name,
                "identity": encoder.identity,
                "folder": "text_encoder",
            },
            "training": {"step": None, "data_version": None, **parts.training},
            "licence": parts.licence or "not stated",
            "inherited": parts.lineage,
            "imported_from": parts.source,
            "made_by": about.software(),
        }
        folders = {"codec": codec_folder, "text_encoder": text_folder}
        return weights.save_release(out, lm, info, _dtype(parts.state), folders=folders)


def _check(parts: Parts, codec: codecs.Codec, encoder: TextEncoder) -> None:
    config = parts.config
    if (codec.num_codebooks, codec.codebook_size) != (config.num_codebooks, config.codebook_size):
        raise UserError(
            f"FROM={parts.source!r}: the language model speaks {config.num_codebooks} codebooks of "
            f"{config.codebook_size} codes, codec {parts.codec_name!r} has {codec.num_codebooks} of "
            f"{codec.codebook_size}; give the codec it was trained with (--codec)"
        )
    if encoder.dim != config.condition.text_dim:
        raise UserError(
            f"FROM={parts.source!r}: the language model takes a text encoder of width {config.condition.text_dim}, "
            f"{parts.text_encoder.name!r} has {encoder.dim}; give the one it was trained with (--text_encoder)"
        )


def _dtype(state: dict[str, Tensor]) -> torch.dtype:
    """float16 where it holds every weight exactly, else float32."""
    exact = all(torch.equal(tensor.half().float(), tensor) for tensor in state.values())
    return torch.float16 if exact else torch.float32


def check_reference(parts: Parts) -> None:
    """Raises `UserError` for a model that hears what no other program's MusicGen hears."""
    condition = parts.config.condition
    if condition.attributes:
        raise UserError(
            f"MODEL={parts.source!r} listens to attributes ({', '.join(a.name for a in condition.attributes)}), which "
            "exist in this program alone; only models without condition.attributes can be exported"
        )
    if condition.style.dim:
        raise UserError(
            f"MODEL={parts.source!r} has a style input, which exists in this program alone; only models with "
            "condition.style.dim 0 can be exported"
        )
    if condition.melody and parts.config.cross_attention:
        raise UserError(
            f"MODEL={parts.source!r} has a melody and cross-attention; the reference's melody models have no "
            "cross-attention, its text models no melody"
        )


# --- the card that goes with every export -------------------------------------------------------------------------


def card(parts: Parts, title: str) -> str:
    """README.md of an export: licence and origin, as front matter that model hubs and `read_card` understand."""
    import yaml

    licence = parts.binding_licence
    front: dict[str, Any] = {"license": (licence or "other").lower(), "pipeline_tag": "text-to-audio"}
    inherited = weights.named(parts.inherited)
    front["inherited_licences"] = inherited
    known = {name: parts.training.get(name) for name in ("step", "data_version")}
    front["trained"] = {"tail": parts.config.tail} | {name: value for name, value in known.items() if value}
    lines = [f"- {item['model']}: {item['licence'] or 'not stated'}" for item in inherited]
    return (
        "---\n"
        + yaml.safe_dump(front, sort_keys=False)
        + f"---\n\n# {title}\n\nLicence of these weights: {licence or 'not stated'}.\n"
        + ("\nThey derive from, and are bound by the licences of:\n\n" + "\n".join(lines) + "\n" if lines else "")
        + ("\nNot for commercial use, nor is what is trained from them.\n" if weights.non_commercial(licence) else "")
    )


def read_card(folder: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Licence and inherited licences that a folder's README.md states in its front matter."""
    front = _front(folder)
    inherited = front.get("inherited_licences")
    return stated(front.get("license")), inherited if isinstance(inherited, list) else []


def as_trained(parts: Parts, folder: Path) -> Parts:
    """The parts with what the card of an export of ours says of their training: steps, data, and the pattern's tail,
    for which neither form has a word. Anybody may have written it, so only values of the right kind count."""
    told = _front(folder).get("trained")
    told = told if isinstance(told, dict) else {}
    tail: Any = told.get("tail")
    config = replace(parts.config, tail=tail) if tail in get_args(Tail) else parts.config
    step, version = told.get("step"), told.get("data_version")
    known: dict[str, Any] = {"step": step} if type(step) is int and step > 0 else {}
    known |= {"data_version": version} if isinstance(version, str) and re.fullmatch("[0-9a-f]{64}", version) else {}
    return replace(parts, config=config, training=parts.training | known)


def _front(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's README.md, empty where there is none."""
    import yaml

    file = folder / "README.md"
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        front = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    return front if isinstance(front, dict) else {}


def stated(licence: Any) -> str | None:
    """A licence by its SPDX name, which model hubs write in lower case; None for words that name none."""
    if licence in (None, "", "other", "unknown", "not stated"):
        return None
    known = ("Apache-2.0", "MIT", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", NON_COMMERCIAL, "CC-BY-NC-SA-4.0")
    return {k.lower(): k for k in known}.get(str(licence).lower(), str(licence))
