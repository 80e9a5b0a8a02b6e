"""Prompt to sound: the one path that training samples, the command line, evaluation and the demo go through.

`codes` runs the language model, `stream` turns its codes into sound while they come, `generate` waits for the whole.
The same request gives the same samples on one kind of processor, alone or in a batch: each prompt is encoded alone,
random numbers are addressed by (seed, step, codebook), and clips are decoded one by one. A clip longer than the crops
the model learned from is made in windows (`musicgen.windows`); one may begin with a recording and go on from there.

    PROMPT="slow waltz for piano" python -m musicgen.generate --duration 10 --out waltz.wav

Source: Copet et al. 2023, sections 2.2, 2.3 and 3.4.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen import attributes, files, listen, memory, settings, stems, wav
from musicgen.chroma import NONE, chroma_bins
from musicgen.chroma import WINDOW as CHROMA_WINDOW
from musicgen.conditions import Conditions
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.model import MusicGen, encode_prompts, hints, load
from musicgen.packing import Precision
from musicgen.sampling import SamplingConfig
from musicgen.stream_decoder import StreamDecoder, decode_long
from musicgen.windows import LENGTH_BOUND, Windows, margin_of, stream_codes

__all__ = ["GenerateConfig", "MusicGen", "Request", "codes", "encode_prompts", "generate", "hints", "load", "stream"]

MIN_SECONDS, MAX_SECONDS = 0.1, 3600.0
EXTEND_STRIDE = 0.6  # of the window, as 18 s of the reference's 30
_DURATION_ADVICE = f"give seconds from {MIN_SECONDS:g} to {MAX_SECONDS:g}, such as DURATION=10"
_DEFAULTS = Path(__file__).parent.parent / "configs" / "generate" / "default.yaml"
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

    Raises:
        UserError: an empty prompt, an impossible duration or stride, an audio prompt that leaves nothing to make.
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

    def __post_init__(self) -> None:
        check_duration(self.duration_seconds)
        if not self.prompts:
            raise ValueError("there is no prompt to generate for; give at least one (None is unconditional)")
        if len(self.seeds) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts need {len(self.prompts)} seeds, got {len(self.seeds)}")
        if self.negatives is not None and len(self.negatives) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts need as many negatives, got {len(self.negatives)}")
        if self.attributes is not None and len(self.attributes) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts need as many attributes, got {len(self.attributes)}")
        if any(prompt is not None and not prompt.strip() for prompt in self.prompts):
            raise UserError(EMPTY_PROMPT)


def check_duration(duration_seconds: float) -> float:
    """The duration; raises `UserError` when it is not a number in the allowed range."""
    if not (math.isfinite(duration_seconds) and MIN_SECONDS <= duration_seconds <= MAX_SECONDS):
        raise UserError(f"DURATION={duration_seconds:g} is not possible; {_DURATION_ADVICE}")
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
    stride = round(request.stride_seconds * rate) or max(1, round(EXTEND_STRIDE * window))
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
    )
    negative = prompted.without_text(model.lm)
    if request.negatives is not None:
        negative = replace(encode_prompts(model, request.negatives), chroma=prompted.chroma)
    null, config = negative.without_melody(), request.sampling
    if (prompted.is_null() and null.is_null()) or not config.guides():
        return [prompted], None
    seconds = torch.arange(math.ceil(request.duration_seconds * model.codec.frame_rate)) / model.codec.frame_rate
    scale = torch.tensor([config.guidance_at(t) for t in seconds.tolist()], device=prompted.text.device)
    if config.guidance_melody is None or not prompted.has_melody():
        return [prompted, null], scale[None]
    return [prompted, negative, null], torch.stack([scale, torch.full_like(scale, config.guidance_melody)])


def _chroma(model: MusicGen, request: Request) -> Tensor | None:
    """The melodies on the model's device, or none for each clip; None for a model without melody input."""
    if model.lm.config.condition.melody:
        given = request.melodies
        none = torch.full((len(request.prompts), 1), NONE, dtype=torch.uint8)
        return (none if given is None else given).to(model.lm.out_norm.weight.device)
    if request.melodies is not None:
        raise UserError(
            "MELODY was given, but this model has no melody input: it was trained on text alone. Leave MELODY out, or "
            "give the MODEL of a run with --lm.condition.melody true"
        )
    return None


def _attributes(model: MusicGen, request: Request) -> Tensor | None:
    """Shares of the attributes' rows `[B, N]`; None where no attribute is given."""
    if not any(request.attributes or ()):
        return None
    known = model.lm.config.condition.attributes
    rows = [attributes.weights(known, given) for given in request.attributes or ()]
    return torch.from_numpy(np.stack(rows)).to(model.lm.out_norm.weight.device)


def codes(model: MusicGen, request: Request, progress: Progress | None = None) -> Iterator[Tensor]:
    """Codes `[B, K, n]` of a request as their frames become complete; see `generate` for errors."""
    size = model.lm.config.codebook_size
    if request.sampling.top_k > size:
        raise UserError(
            f"top_k is {request.sampling.top_k}, but a codebook has {size} codes; give 0 (all) up to {size}"
        )
    windows = _windows(model, request)
    branches, scales = _branches(model, request)
    engine = model.engine or Engine(model.lm)
    memory.check(engine, model.codec, len(request.prompts), len(branches), windows, request.duration_seconds)
    return stream_codes(engine, branches, request.seeds, request.sampling, windows, request.given, scales, progress)


def stream(model: MusicGen, request: Request, chunk_seconds: float = 0.5) -> Iterator[Tensor]:
    """Sound `[B, C, n]` of a request while it is being made, float32 on the CPU; joined it is what `generate` gives.

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
        UserError: what `Request` refuses, top_k beyond the codebook, more than the memory holds.
    """
    request = Request(prompts, duration_seconds, seeds, config or SamplingConfig(), **more)
    made = torch.cat(list(codes(model, request, progress)), dim=2).cpu()
    samples = round(duration_seconds * model.codec.sample_rate)
    audio = torch.cat([decode_long(model.codec, item[None]) for item in made])[..., :samples]
    return audio.float(), made


def encode_audio(model: MusicGen, audio: np.ndarray) -> Tensor:
    """Codes `[1, K, P]` of an audio prompt `[C, N]` at the codec's rate, to be `Request.given`."""
    return torch.from_numpy(model.codec.encode_track(audio).astype(np.int64))[None]


def marking(
    model: MusicGen, prompt: str | None, seed: int, duration_seconds: float, config: SamplingConfig, **more: Any
) -> dict[str, Any]:
    """The record that a generated file carries: that it is generated, by which model, from what (`more` included)."""
    training = model.info.get("training", {})
    return {
        "generated": True,
        "software": wav.software(),
        "model": {"sha256": model.info.get("weights", {}).get("sha256"), "step": training.get("step")},
        "data_version": training.get("data_version"),
        "codec": model.info["codec"],
        "text_encoder": model.info["text_encoder"],
        "licence": model.info.get("licence"),
        "prompt": prompt,
        "seed": seed,
        "duration_seconds": duration_seconds,
        "sampling": settings.to_dict(config),
        **more,
    }


EMPTY_PROMPT = (
    'PROMPT is empty; say what to play, such as PROMPT="slow waltz for piano", or add --unconditional true (ARGS) '
    "to let the model play what it likes"
)


@dataclass(frozen=True)
class GenerateConfig:
    """One prompt to one WAV file.

    Args:
        model: `demo`, a release folder (runs/<name>/release) or its URI.
        prompt: the text; when left out, the environment variable PROMPT.
        unconditional: play without a prompt.
        negative_prompt: what to move away from, with the strength of the guidance.
        prompt_audio: an audio file that the clip begins with and goes on from (AUDIO=).
        prompt_seconds: how much of its beginning to take; 0 takes all.
        duration: seconds, the audio prompt included.
        out: the WAV file to write, a path or URI; `-` writes it to standard output.
        seed: the same seed gives the same file.
        attributes: named attributes beside the text, for a model that has them, such as --attributes.genre jazz.
        melody: an audio file whose melody to follow, for a model that listens to one (MELODY=).
        melody_stems: take the melody from voice and accompaniment alone, without drums and bass, as Demucs separates
            them (the extra `stems`).
        extend_stride: seconds by which a window starts after the one before in clips longer than the training crop;
            0 takes 0.6 of the crop.
        stream: write the sound while it is being made, and say when the first was ready.
        chunk_seconds: piece of sound that a stream decodes at a time.
        codec: codec name or folder, where the one named by the release stands elsewhere.
        device: cpu, cuda or auto.
        precision: of the weights: float32, bf16, float16 or int8.
        sampling: guidance, top-k, top-p, temperature.
    """

    model: str = "demo"
    prompt: str = ""
    unconditional: bool = False
    negative_prompt: str = ""
    prompt_audio: str = ""
    prompt_seconds: float = 0.0
    attributes: dict[str, str] = field(default_factory=dict)
    melody: str = ""
    melody_stems: bool = False
    duration: float = 10.0
    out: str = "generated.wav"
    seed: int = 0
    extend_stride: float = 0.0
    stream: bool = False
    chunk_seconds: float = 0.5
    codec: str | None = None
    device: str = "cpu"
    precision: Precision = "float32"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for name, least in (("prompt_seconds", 0.0), ("extend_stride", 0.0), ("chunk_seconds", 0.02)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} is {value:g}; give seconds, at least {least:g}")


def _check_out(out: str, streaming: bool) -> None:
    if out == "-":
        return
    if not out.lower().endswith(".wav"):
        raise UserError(f"OUT={out!r} must end in .wav, such as OUT=waltz.wav")
    path = files.local_path(out)
    if path is not None and path.is_dir():
        raise UserError(f"OUT={out!r} is a folder; give the file to write, such as OUT={out.rstrip('/')}/waltz.wav")
    if streaming and path is None:
        raise UserError(f"OUT={out!r} takes whole files only; stream to a local file or to - and copy it there")


def main(argv: Sequence[str]) -> int:
    """`python -m musicgen.generate`: see `GenerateConfig`."""
    layers = [_DEFAULTS] if _DEFAULTS.is_file() else []
    try:
        config = settings.parse(GenerateConfig, argv, layers=layers, prog="python -m musicgen.generate")
    except settings.SettingsError as error:
        if '"duration"' not in str(error):
            raise
        given = str(error).rsplit("Got value: ", 1)[-1].strip()
        raise UserError(f"DURATION={given} is not a number; {_DURATION_ADVICE}") from None
    prompt = None if config.unconditional else (config.prompt or os.environ.get("PROMPT", "")).strip()
    if prompt == "" and (config.attributes or config.melody):
        prompt = None  # they say what to play
    if prompt == "":
        raise UserError(EMPTY_PROMPT)
    check_duration(config.duration)
    _check_out(config.out, config.stream)
    model = load(config.model, config.codec, config.device, config.precision)
    request, told = _request(model, prompt, config)
    for hint in hints(model, prompt, config.duration):
        print(f"warning: {hint}", file=sys.stderr)
    mark = marking(model, prompt, config.seed, config.duration, config.sampling, precision=config.precision, **told)
    began = time.perf_counter()
    first = None
    if config.stream:
        peak, first = _write_stream(model, request, mark, config)
    else:
        audio = _generate_with_bar(model, request)
        _write_whole(config.out, wav.encode(audio, model.codec.sample_rate, mark))
        peak = float(audio.abs().max())
    seconds = time.perf_counter() - began
    level = 20 * math.log10(peak) if peak > 0 else -math.inf
    print(
        f"{config.out}: {config.duration:g} s, peak {level:.1f} dBFS, marked as generated (seed {config.seed}); "
        + (f"first sound after {first:.2f} s, " if first is not None else "")
        + f"made in {seconds:.1f} s ({config.duration / seconds:.2f} x real time)",
        file=sys.stderr if config.out == "-" else sys.stdout,
    )
    return 0


def _request(model: MusicGen, prompt: str | None, config: GenerateConfig) -> tuple[Request, dict[str, Any]]:
    """The command's request, and what the marking says about it beside prompt and sampling."""
    given: Tensor | None = None
    told: dict[str, Any] = {}
    if config.prompt_audio:
        limit = config.prompt_seconds or MAX_SECONDS
        codec = model.codec
        sound = listen.read(config.prompt_audio, codec.sample_rate, codec.channels, what="AUDIO", max_seconds=limit)
        given = encode_audio(model, sound)
        told["prompt_audio_seconds"] = given.shape[2] / codec.frame_rate
    if config.attributes:
        told["attributes"] = dict(config.attributes)
    melodies = None
    if config.melody:
        melodies = _melody(model, config)
        told["melody"] = {"stems": config.melody_stems, "frames": melodies.shape[1]}
    negatives = None
    if config.negative_prompt.strip():
        negatives = [config.negative_prompt.strip()]
        told["negative_prompt"] = negatives[0]
    return Request(
        [prompt],
        config.duration,
        [config.seed],
        config.sampling,
        negatives,
        given,
        config.extend_stride,
        melodies,
        [config.attributes],
    ), told


def _melody(model: MusicGen, config: GenerateConfig) -> Tensor:
    """Pitch classes `[1, C]` of the melody file."""
    rate = model.codec.sample_rate
    if config.melody_stems:
        sound = stems.melody(listen.read(config.melody, stems.SAMPLE_RATE, 2, what="MELODY"), rate)
    else:
        sound = listen.read(config.melody, rate, 1, what="MELODY")[0]
    if len(sound) < CHROMA_WINDOW:
        raise UserError(
            f"MELODY={config.melody!r} is {len(sound) / rate:.2f} s long; a melody needs at least "
            f"{CHROMA_WINDOW / rate:.2f} s, one window of the chromagram"
        )
    bins = torch.from_numpy(chroma_bins(sound, rate))[None]
    if bool((bins == NONE).all()):
        raise UserError(f"MELODY={config.melody!r} is silent throughout; give a recording with a melody")
    return bins


def _generate_with_bar(model: MusicGen, request: Request) -> Tensor:
    """Audio [C, N] of a request of one clip, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=None)
        pieces = list(codes(model, request, lambda done, total: bar.update(task, completed=done, total=total)))
    samples = round(request.duration_seconds * model.codec.sample_rate)
    return decode_long(model.codec, torch.cat(pieces, dim=2))[0, :, :samples]


def _write_whole(out: str, data: bytes) -> None:
    if out == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        files.write_bytes(out, data)


def _write_stream(
    model: MusicGen, request: Request, mark: dict[str, Any], config: GenerateConfig
) -> tuple[float, float]:
    """Write the sound as it comes; peak and the seconds until the first of it was ready.

    A file stands under its name once it is whole; standard output gets each piece at once.
    """
    began, first, peak = time.perf_counter(), math.nan, 0.0
    rate, channels = model.codec.sample_rate, model.codec.channels
    with files.writing(config.out) as file:
        file.write(wav.header(channels, round(request.duration_seconds * rate), rate, mark))
        for piece in stream(model, request, config.chunk_seconds):
            file.write(wav.pcm16(piece[0]).T.tobytes())
            file.flush()
            if math.isnan(first):
                first = time.perf_counter() - began
                print(f"first sound after {first:.2f} s", file=sys.stderr)
            peak = max(peak, float(piece.abs().max()))
    return peak, first


if __name__ == "__main__":
    settings.run(main)
