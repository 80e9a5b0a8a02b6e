"""A model ready to generate: a release with the codec and text encoder it names, and prompts as it hears them.

`load` refuses in words what does not belong together. Each prompt is encoded alone and padded to a bucket of text
lengths, so that a clip is the same alone and in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from musicgen import weights
from musicgen.conditions import Conditions
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.packing import PRECISIONS, Precision, stream_dtype

if TYPE_CHECKING:
    from musicgen.codec import Codec
    from musicgen.conditioning import TextEncoder
    from musicgen.lm import MusicLM

TEXT_BUCKET = 32  # text is padded to a multiple, so that a batch and a single prompt take the same kernels


@dataclass(frozen=True)
class MusicGen:
    """A language model with the codec and text encoder it was trained with.

    Attributes:
        info: the release's config.json.
        engine: the model packed for stepping; None packs it anew for each call, for a model that is being trained.
    """

    lm: MusicLM
    codec: Codec
    text_encoder: TextEncoder
    info: dict[str, Any]
    engine: Engine | None = None

    @property
    def trained_seconds(self) -> float | None:
        """Length of the training crops, beyond which quality is not promised; None when not recorded."""
        return self.info.get("training", {}).get("crop_seconds")


def load(
    model: str | os.PathLike[str] = "demo",
    codec: Codec | str | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    base: str = "",
) -> MusicGen:
    """A model ready to generate.

    Args:
        model: `demo` (ships with the program), a release folder, or its URI; an adapter's folder too.
        codec: the codec, or its name or folder, where it stands elsewhere than the release says.
        device: where everything runs: `cpu`, `cuda`, `auto`.
        precision: of the weights while generating: `float32`, `bf16`, `float16` or `int8` (see `musicgen.packing`).
        base: the model that an adapter was made for, where it stands elsewhere than in training.

    Raises:
        UserError: not a release, or its codec or text encoder is missing or another one.
    """
    from musicgen import codec as codecs
    from musicgen.conditioning import TextEncoder

    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not known; give one of {', '.join(PRECISIONS)}")
    where = _device(device)
    lm, info = weights.load_release(model, base)
    if codec is None or isinstance(codec, str):
        name = codec or weights.place_of(model, info, "codec", base)
        try:
            codec = codecs.load(name)
        except (UserError, OSError) as error:
            raise UserError(
                f"MODEL={os.fspath(model)!r} needs codec {info['codec']['name']!r}, and {name!r} could not be loaded: "
                f"{error}. Give its folder with --codec"
            ) from error
    weights.check_codec(info, codec)
    encoder = TextEncoder.load(weights.place_of(model, info, "text_encoder", base))
    if encoder.identity != info["text_encoder"]["identity"]:
        raise UserError(
            f"MODEL={os.fspath(model)!r} was trained with another text encoder than the {encoder.name!r} on this "
            f"machine (identity {info['text_encoder']['identity'][:12]}…, here {encoder.identity[:12]}…); "
            "install the one it names"
        )
    # On a GPU the model itself is kept as narrow as it is stepped; on a CPU its packed copy is.
    lm = lm.to(where) if where.type == "cpu" else lm.to(where, stream_dtype(precision, where))
    return MusicGen(lm, codec.to(where), encoder.to(where), info, Engine(lm, precision))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); give cpu or auto") from None
    return device


def hints(model: MusicGen, prompt: str | None, duration_seconds: float) -> list[str]:
    """What the user should know before listening: an unknown script, a length the model has not learned."""
    found = []
    unknown = model.text_encoder.unknown_share(prompt) if prompt else 0.0
    if unknown > 0.5:
        found.append(
            f"the text encoder {model.text_encoder.name!r} does not know {unknown:.0%} of the tokens of this prompt, "
            "so the music will hardly follow it; English words work best"
        )
    trained = model.trained_seconds
    if trained and duration_seconds > trained:
        found.append(
            f"the model learned from {trained:g} s of music at a time; the {duration_seconds:g} s asked for are made "
            "in windows of that length, each of which hears only the end of the one before, so it may lose the thread"
        )
    return found


def text_places(tokens: int) -> int:
    """Places L that a text of so many tokens takes beside others."""
    return -(-tokens // TEXT_BUCKET) * TEXT_BUCKET


@torch.no_grad()
def encode_prompts(model: MusicGen, prompts: Sequence[str | None]) -> Conditions:
    """Conditions of prompts, each encoded alone, L padded to a multiple of 32; None is the null condition.

    Raises:
        UserError: a prompt longer than the encoder takes.
    """
    for prompt in prompts:
        used, limit = model.text_encoder.num_tokens(prompt or ""), model.text_encoder.max_tokens
        if limit is not None and used > limit:
            raise UserError(
                f"PROMPT has {used} tokens and the text encoder {model.text_encoder.name!r} takes {limit}; shorten it"
            )
    parts = [model.text_encoder.encode([p]) for p in prompts]
    longest = max(int(hidden.shape[1]) for hidden, _ in parts)
    length = text_places(longest)
    first, place = parts[0][0], model.lm.out_norm.weight.device  # an encoder may stand elsewhere, as in training
    hidden = first.new_zeros(len(parts), length, first.shape[2], device=place)
    mask = torch.zeros(len(parts), length, dtype=torch.bool, device=place)
    for row, (h, m) in enumerate(parts):
        hidden[row, : h.shape[1]] = h[0]
        mask[row, : m.shape[1]] = m[0]
    return Conditions(hidden, mask)
