"""A batch of clips to make, and the making: codes, sound while it comes, or the whole.

`codes` runs the language model, `stream` turns its codes into sound while they come, `generate` waits for the whole.
The same request gives the same codes on one kind of processor, alone or in a batch, and but for a stream's rounding the
same samples: each prompt is encoded alone, random numbers are addressed by (seed, step, codebook), and clips are
decoded one by one. A clip longer than the crops the model learned from is made in windows (`musicgen.windows`); one may
begin with a recording and go on from there. `marking` says what made a clip.

Source: Copet et al. 2023, sections 2.2, 2.3 and 3.4.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen import about, attributes, memory, settings, style, weights
from musicgen.chroma import NONE, NUM_CHROMA
from musicgen.conditions import Conditions
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.model import MusicGen, encode_prompts, text_places
from musicgen.sampling import SamplingConfig
from musicgen.stream_decoder import StreamDecoder, decode_long
from musicgen.windows import LENGTH_BOUND, Windows, margin_of, stream_codes

MIN_SECONDS, MAX_SECONDS = 0.1, 3600.0
EXTEND_STRIDE = 0.6  # of the window, as 18 s of the reference's 30
DURATION_ADVICE = f"give seconds from {MIN_SECONDS:g} to {MAX_SECONDS:g}, such as DURATION=10"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """A batch of clips to make.

    Args:
        prompts: B texts in any script; None generates without a condition.
        duration_seconds: length, the audio prompt included; 0.1 to 3600. Beyond the training crop see `hints`.
        seeds: B seeds, any integers.
        sampling: how tokens are drawn.
        negatives: B texts to move away from, or None for the null condition; needs a guidance other than 1.
        given: codes `[B, K, P]` that the clips begin with, such as those of `encode_audio`.
        stride_seconds: by how much a window starts after the one before; 0 takes 0.6 of the window.
        attributes: B mappings from the name of an attribute to its value, for a model that has them.
        melodies: `[B, C]` uint8, pitch classes of `chroma.chroma_bins` from the clip's start, for a model that listens
            to a melody; a row of 255 has none.
        styles: codes `[B, K, F]` of excerpts in whose style to play, such as those of `encode_audio`, for a model with
            a style; a row of -1 has none.

    Raises:
        UserError: an empty prompt, an impossible duration or stride, an audio prompt that leaves nothing to make.
        ValueError: other than a row of each for every prompt, tensors of another shape, no pitch classes.
    """

    prompts: Sequence[str | None]
    duration_seconds: float
    seeds: Sequence[int]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    negatives: Sequence[str | None] | None = None
    given: Tensor | None = None
    stride_seconds: float = 0.0
    melodies: Tensor | None = None
    attributes: Sequence[Mapping[str, Any]] | None = None
    styles: Tensor | None = None

    def __post_init__(self) -> None:
        check_duration(self.duration_seconds)
        if not self.prompts:
            raise ValueError("there is no prompt to generate for; give at least one (None is unconditional)")
        for name, axes in (("given", "[B, K, P]"), ("melodies", "[B, C]"), ("styles", "[B, K, F]")):
            sound: Tensor | None = getattr(self, name)
            if sound is not None and (sound.ndim != len(axes.split(",")) or sound.is_floating_point()):
                raise ValueError(f"{name} is {list(sound.shape)} {sound.dtype}; give whole numbers of shape {axes}")
            if sound is not None and not sound.shape[-1] and name != "given":
                raise ValueError(f"{name} is {list(sound.shape)}, which holds nothing; leave it out, or give a frame")
        for name in ("seeds", "negatives", "attributes", "given", "melodies", "styles"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self.prompts):
                raise ValueError(f"{len(self.prompts)} prompts need {len(self.prompts)} {name}, got {len(rows)}")
        if self.melodies is not None:
            odd = self.melodies[((self.melodies < 0) | (self.melodies >= NUM_CHROMA)) & (self.melodies != NONE)]
            if len(odd):
                raise ValueError(f"melodies holds {int(odd[0])}; a pitch class is 0 (C) to 11 (B), or {NONE} for none")
        if any(prompt is not None and not prompt.strip() for prompt in self.prompts):
            raise UserError(EMPTY_PROMPT)


def check_duration(duration_seconds: float) -> float:
    """The duration; raises `UserError` when it is not a number in the allowed range."""
    if not (math.isfinite(duration_seconds) and MIN_SECONDS <= duration_seconds <= MAX_SECONDS):
        raise UserError(f"DURATION={duration_seconds:g} is not possible; {DURATION_ADVICE}")
    return duration_seconds


def _windows(model: MusicGen, request: Request) -> Windows:
    """How the clips of a request are cut; refuses what cannot be."""
    rate = model.codec.frame_rate
    total = max(1, math.ceil(request.duration_seconds * rate - 1e-6))
    trained = model.trained_seconds
    margin = margin_of(model.lm.config)
    fixed = bool(trained) and model.lm.config.pattern in LENGTH_BOUND
    window = round(trained * rate) - margin if trained else total
    window = window if fixed else min(window, total)
    if request.given is not None and request.given.shape[2] >= total:
        raise UserError(
            f"the audio prompt is {request.given.shape[2] / rate:g} s long and DURATION={request.duration_seconds:g} "
            "counts it in, so nothing is left to make; give a longer DURATION or less of the prompt (--prompt_seconds)"
        )
    stride = max(1, round((request.stride_seconds * rate) or EXTEND_STRIDE * window))
    if total > window and not 0 < stride < window:
        raise UserError(
            f"extend_stride is {request.stride_seconds:g} s; give more than 0 and less than the {window / rate:g} s "
            "that the model takes at a time"
        )
    window = max(window, 2)
    return Windows(total, window, min(stride, window - 1), rate, model.codec.sample_rate, margin, fixed)


def _branches(model: MusicGen, request: Request) -> tuple[list[Conditions], Tensor | None]:
    """The conditions of each branch of the guidance, and the scale of every frame."""
    prompted = replace(
        encode_prompts(model, request.prompts),
        chroma=_chroma(model, request),
        attributes=_attributes(model, request),
        style=_style(model, request),
    )
    negative = prompted.without_text(model.lm)
    if request.negatives is not None:
        negative = replace(encode_prompts(model, request.negatives), chroma=prompted.chroma, style=prompted.style)
    null, config = negative.without_melody().without_style(), request.sampling
    if (prompted.is_null() and null.is_null()) or not config.guides():
        return [prompted], None
    seconds = torch.arange(math.ceil(request.duration_seconds * model.codec.frame_rate)) / model.codec.frame_rate
    scale = torch.tensor([config.guidance_at(t) for t in seconds.tolist()], device=prompted.text.device)
    own_melody = config.guidance_melody if prompted.has_melody() else None
    own_style = config.guidance_style if prompted.has_style() else None
    # Each branch lacks one more condition; what has no scale of its own goes with the text.
    less = negative if own_melody is not None else negative.without_melody()
    less = less if own_style is not None else less.without_style()
    branches, scales = [prompted, less], [scale]
    if own_melody is not None:
        branches.append(less := less.without_melody())
        scales.append(torch.full_like(scale, own_melody))
    if own_style is not None:
        branches.append(less.without_style())
        scales.append(torch.full_like(scale, own_style))
    return branches, torch.stack(scales)


def _refuse_unheard(model: MusicGen, request: Request) -> None:
    """Raises `UserError` for a melody or a style that the model has no input for."""
    condition = model.lm.config.condition
    if request.melodies is not None and not condition.melody:
        raise UserError(
            "MELODY was given, but this model has no melody input: it was trained on text alone. Leave MELODY out, or "
            "give the MODEL of a run with --lm.condition.melody true"
        )
    if request.styles is not None and not condition.style.dim:
        raise UserError(
            "STYLE was given, but this model has no style input. Leave STYLE out, or give the MODEL of a run with "
            "--lm.condition.style.dim 64"
        )


def _chroma(model: MusicGen, request: Request) -> Tensor | None:
    """The melodies on the model's device, or none for each clip; None for a model without melody input."""
    if not model.lm.config.condition.melody:
        return None
    given = request.melodies
    none = torch.full((len(request.prompts), 1), NONE, dtype=torch.uint8)
    return (none if given is None else given).to(model.lm.out_norm.weight.device)


def _style(model: MusicGen, request: Request) -> Tensor | None:
    """Style vectors `[B, dim]`, zeros for a clip without an excerpt; None where no clip has one.

    Each excerpt is encoded alone: a value that lies between two levels must not depend on the batch.
    """
    given = request.styles
    if given is None:
        return None
    latents = style.Latents(model.codec).to(model.lm.out_norm.weight.device)
    with torch.no_grad():
        return torch.cat([model.lm.style_vector(latents(excerpt[None])) for excerpt in given])


def _attributes(model: MusicGen, request: Request) -> Tensor | None:
    """Shares of the attributes' rows `[B, N]`; None where no attribute is given."""
    if not any(request.attributes or ()):
        return None
    known = model.lm.config.condition.attributes
    rows = [attributes.weights(known, given) for given in request.attributes or ()]
    return torch.from_numpy(np.stack(rows)).to(model.lm.out_norm.weight.device)


def check(model: MusicGen, request: Request, engine: Engine | None = None) -> Windows:
    """Refuse what this model or this machine cannot make, before anything is encoded.

    Zeros can stand for the sounds in a request, one frame of each, so that it can be asked before they are read.

    Args:
        engine: the model packed for stepping, where it is not `model.engine`.

    Returns:
        how the clips are cut.

    Raises:
        UserError: what `Request` refuses for a model, top_k beyond the codebook, codes that are not the codec's, more
            than the memory holds.
    """
    size = model.lm.config.codebook_size
    if request.sampling.top_k > size:
        raise UserError(
            f"top_k is {request.sampling.top_k}, but a codebook has {size} codes; give 0 (all) up to {size}"
        )
    windows = _windows(model, request)
    _refuse_unheard(model, request)
    if request.given is not None:
        model.codec.check_codes(request.given)
    if request.styles is not None:
        model.codec.check_codes(request.styles.where(request.styles != style.NONE, 0))
    texts = [text or "" for text in (*request.prompts, *(request.negatives or ()))]
    encoder: Any = model.text_encoder.model.config
    load = memory.Load(
        len(request.prompts),
        _num_branches(request),
        _text_places(model, texts),
        0 if request.given is None else request.given.shape[2],
        windows,
        request.duration_seconds,
        int(getattr(encoder, "num_heads", 0) or getattr(encoder, "num_attention_heads", 0)),
    )
    memory.check(engine or model.engine or Engine(model.lm), model.codec, load)
    return windows


def _text_places(model: MusicGen, texts: Sequence[str]) -> int:
    """Places of the longest text as `encode_prompts` pads it, which refuses what is beyond the encoder's limit."""
    longest = max(model.text_encoder.num_tokens(text) for text in set(texts))
    longest = min(longest, model.text_encoder.max_tokens or longest)
    return text_places(longest)


def _num_branches(request: Request) -> int:
    """The most branches that `_branches` can have, from shapes alone."""
    given, config = (*request.prompts, *(request.negatives or ())), request.sampling
    melody, styled = request.melodies is not None, request.styles is not None
    heard = melody or styled or any(request.attributes or ()) or any(text is not None for text in given)
    if not heard or not config.guides():
        return 1
    own = (melody and config.guidance_melody is not None, styled and config.guidance_style is not None)
    return 2 + sum(own)


def codes(model: MusicGen, request: Request, progress: Progress | None = None) -> Iterator[Tensor]:
    """Codes `[B, K, n]` of a request as their frames become complete; see `generate` for errors."""
    engine = model.engine or Engine(model.lm)
    windows = check(model, request, engine)
    branches, scales = _branches(model, request)
    return stream_codes(engine, branches, request.seeds, request.sampling, windows, request.given, scales, progress)


def stream(model: MusicGen, request: Request, chunk_seconds: float = 0.5) -> Iterator[Tensor]:
    """Sound `[B, C, n]` of a request while it is being made, float32 on the CPU.

    Joined it is what `generate` gives down to rounding, as 16-bit samples within one step: of the same codes, but sums
    over pieces of another length round otherwise.

    Args:
        chunk_seconds: frames are decoded in pieces of about this length; the first comes as early as it can.
    """
    decoders = [StreamDecoder(model.codec) for _ in request.prompts]
    left = round(request.duration_seconds * model.codec.sample_rate)
    wanted, total = round(chunk_seconds * model.codec.frame_rate), _windows(model, request).total
    waiting: list[Tensor] = []
    done = 0
    for piece in codes(model, request):
        waiting.append(piece)
        done += piece.shape[2]
        held = sum(p.shape[2] for p in waiting)
        if held < wanted and done < total:
            continue
        block = torch.cat(waiting, dim=2)
        waiting = []
        pushed = [d.push(block[i : i + 1], last=done == total).cpu() for i, d in enumerate(decoders)]
        sound = torch.cat(pushed)[..., :left]
        left -= sound.shape[-1]
        if sound.shape[-1]:
            yield sound


def generate(
    model: MusicGen,
    prompts: Sequence[str | None],
    duration_seconds: float,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Sound for prompts.

    Args:
        prompts, duration_seconds, seeds, config: see `Request`, as are `more`.
        progress: called with (frames done, frames in all).

    Returns:
        audio [B, C, N] float32, N = duration x sample rate, and codes [B, K, T] int64, on the CPU.

    Raises:
        UserError, ValueError: what `Request` and `check` refuse.
    """
    request = Request(prompts, duration_seconds, seeds, config or SamplingConfig(), **more)
    made = torch.cat(list(codes(model, request, progress)), dim=2).cpu()
    samples = round(duration_seconds * model.codec.sample_rate)
    audio = torch.cat([decode_long(model.codec, item[None]) for item in made])[..., :samples]
    return audio.float(), made


def encode_audio(model: MusicGen, audio: np.ndarray) -> Tensor:
    """Codes `[1, K, P]` of an audio prompt `[C, N]` at the codec's rate, to be `Request.given`."""
    return torch.from_numpy(model.codec.encode_track(audio).astype(np.int64))[None]


def marking(model: MusicGen, request: Request, row: int = 0) -> dict[str, Any]:
    """The record that the file of one clip carries: that it is generated, by which model, under which licences, and
    all in the request that decides how it sounds. JSON can hold it, and of places on this machine it keeps the names.

    Sounds are told by the SHA-256 of what the model hears of them: codes as int64, pitch classes as uint8.
    """
    info = model.info
    training = info.get("training", {})
    origin = {key: info[key] for key in ("inherited", "base", "merged") if info.get(key)}
    return {
        "generated": True,
        "software": about.software(),
        "model": {"sha256": info.get("weights", {}).get("sha256"), "step": training.get("step")},
        "data_version": training.get("data_version"),
        **weights.named({"codec": info["codec"], "text_encoder": info["text_encoder"], **origin}),
        "licence": info.get("licence"),
        "precision": model.engine.precision if model.engine else "float32",
        "prompt": request.prompts[row],
        "seed": int(request.seeds[row]),
        "duration_seconds": float(request.duration_seconds),
        "sampling": settings.to_dict(request.sampling),
        **_controls(model, request, row),
    }


def _controls(model: MusicGen, request: Request, row: int) -> dict[str, Any]:
    """What the marking says of one row beside prompt and sampling, as far as there is any."""
    windows, rate, told = _windows(model, request), model.codec.frame_rate, dict[str, Any]()
    if windows.total > windows.window:
        told["extend_stride"] = windows.stride / rate
    if request.negatives is not None and request.negatives[row] is not None:
        told["negative_prompt"] = request.negatives[row]
    if request.attributes is not None and request.attributes[row]:
        told["attributes"] = json.loads(json.dumps(dict(request.attributes[row]), default=str))
    if request.given is not None and request.given.shape[2]:
        given = request.given[row].long()
        told["prompt_audio"] = {"seconds": given.shape[1] / rate, "codes_sha256": _sha256(given)}
    if request.melodies is not None and bool((request.melodies[row] != NONE).any()):
        melody = request.melodies[row].to(torch.uint8)
        told["melody"] = {"frames": len(melody), "pitch_classes_sha256": _sha256(melody)}
    if request.styles is not None and bool((heard := (request.styles[row] != style.NONE).all(dim=0)).any()):
        excerpt = request.styles[row][:, heard].long()
        told["style"] = {"seconds": excerpt.shape[1] / rate, "codes_sha256": _sha256(excerpt)}
    return told


def _sha256(heard: Tensor) -> str:
    return hashlib.sha256(heard.cpu().numpy().tobytes()).hexdigest()


EMPTY_PROMPT = (
    'PROMPT is empty; say what to play, such as PROMPT="slow waltz for piano", or add --unconditional true (ARGS) '
    "to let the model play what it likes"
)
