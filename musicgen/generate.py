"""Prompt to sound, the command. Training samples, evaluation and the demo take the same path by the names given on.

    PROMPT="slow waltz for piano" python -m musicgen.generate --duration 10 --out waltz.wav

The model is found by `musicgen.model`, the clips are made by `musicgen.request`; this file reads what the user said and
writes marked files, at once or piece by piece.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from musicgen import files, listen, settings, stems, wav
from musicgen.chroma import HOP as CHROMA_HOP
from musicgen.chroma import NONE, SILENCE_DBFS, chroma_bins
from musicgen.chroma import WINDOW as CHROMA_WINDOW
from musicgen.errors import UserError
from musicgen.model import MusicGen, encode_prompts, hints, load
from musicgen.packing import Precision
from musicgen.request import (
    DURATION_ADVICE,
    EMPTY_PROMPT,
    MAX_SECONDS,
    Request,
    check,
    check_duration,
    codes,
    encode_audio,
    generate,
    marking,
    stream,
)
from musicgen.sampling import SamplingConfig
from musicgen.stream_decoder import decode_long

__all__ = [
    "GenerateConfig", "MusicGen", "Request", "check_duration", "codes", "encode_audio", "encode_prompts", "generate",
    "hints", "load", "marking", "stream",
]  # fmt: skip

_DEFAULTS = Path(__file__).parent.parent / "configs" / "generate" / "default.yaml"


@dataclass(frozen=True)
class GenerateConfig:
    """One prompt to one WAV file.

    Args:
        model: `demo`, a release folder (runs/<name>/release) or its URI; an adapter's folder too.
        base: the model that an adapter was made for, where it stands elsewhere than in training (BASE=).
        prompt: the text; when left out, the environment variable PROMPT.
        unconditional: play without a prompt.
        negative_prompt: what to move away from, with the strength of the guidance.
        prompt_audio: an audio file that the clip begins with and goes on from (AUDIO=).
        prompt_seconds: how much of its beginning to take; 0 takes all.
        duration: seconds, the audio prompt included.
        out: the WAV file to write, a path or URI; `-` writes it to standard output.
        seed: the same seed gives the same file.
        clips: clips to make at once, with the seeds from `seed` on; OUT=waltz.wav then gives waltz-1.wav, waltz-2.wav …
        attributes: named attributes beside the text, for a model that has them, such as --attributes.genre jazz.
        melody: an audio file whose melody to follow, for a model that listens to one (MELODY=).
        melody_stems: take the melody from voice and accompaniment alone, without drums and bass, as Demucs separates
            them (the extra `stems`).
        style: an audio file in whose style to play, for a model with a style (STYLE=); a few seconds from its middle.
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
    base: str = ""
    prompt: str = ""
    unconditional: bool = False
    negative_prompt: str = ""
    prompt_audio: str = ""
    prompt_seconds: float = 0.0
    attributes: dict[str, str] = field(default_factory=dict)
    melody: str = ""
    melody_stems: bool = False
    style: str = ""
    duration: float = 10.0
    out: str = "generated.wav"
    seed: int = 0
    clips: int = 1
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
        if self.clips < 1 or (self.clips > 1 and (self.stream or self.out == "-")):
            raise ValueError(f"clips is {self.clips}; give 1 or more, and 1 for a stream or OUT=-")


def _check_text(name: str, text: str) -> None:
    """Refuse bytes that are no UTF-8, which Python hands on as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds bytes that are no UTF-8, after {text[: error.start][-20:]!r}; give it in UTF-8 (such as "
            "`iconv -f latin1 -t utf-8` makes it)"
        ) from None


def _print(line: str, file: Any) -> None:
    """Print what may hold a file's name in any bytes, to a reader who may have gone."""
    try:
        print(line.encode("utf-8", "backslashreplace").decode(), file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # or Python complains again at its end


def _check_out(out: str, streaming: bool) -> None:
    if out == "-":
        return
    if not out.lower().endswith(".wav"):
        raise UserError(f"OUT={out!r} must end in .wav, such as OUT=waltz.wav")
    path = files.local_path(out)
    if path is not None and os.path.isdir(path):
        raise UserError(f"OUT={out!r} is a folder; give the file to write, such as OUT={out.rstrip('/')}/waltz.wav")
    if path is not None:
        made = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
        if not made.is_dir() or not os.access(made, os.W_OK | os.X_OK) or len(os.fsencode(path.name)) > 255:
            raise UserError(f"OUT={out!r} cannot be written: {made} takes no such file; give another place or name")
    if streaming and path is None:
        raise UserError(f"OUT={out!r} takes whole files only; stream to a local file or to - and copy it there")


def main(argv: Sequence[str]) -> int:
    """`python -m musicgen.generate`: see `GenerateConfig`."""
    layers = [_DEFAULTS] if _DEFAULTS.is_file() else []
    try:
        config = settings.parse(GenerateConfig, argv, layers=layers, prog="python -m musicgen.generate")
    except settings.SettingsError as error:
        if (given := re.match(r"duration is '(.*)'; it must be a number", str(error), re.DOTALL)) is None:
            raise
        raise UserError(f"DURATION={given[1]} is not a number; {DURATION_ADVICE}") from None
    prompt: str | None = (config.prompt or os.environ.get("PROMPT", "")).strip()
    if config.unconditional:
        if prompt:
            print("warning: unconditional true plays without a prompt; PROMPT is not heard", file=sys.stderr)
        prompt = None
    for name, text in (("PROMPT", prompt or ""), ("negative_prompt", config.negative_prompt)):
        _check_text(name, text)
    if prompt == "" and (config.attributes or config.melody or config.style):
        prompt = None  # they say what to play
    if prompt == "":
        raise UserError(EMPTY_PROMPT)
    check_duration(config.duration)
    if config.device == "meta":
        raise UserError("device 'meta' holds no numbers; give cpu or auto")
    _check_out(config.out, config.stream)
    model = load(config.model, config.codec, config.device, config.precision, config.base)
    request, heard = _request(model, prompt, config)
    for hint in hints(model, prompt, config.duration):
        print(f"warning: {hint}", file=sys.stderr)
    marks = [marking(model, request, row) for row in range(config.clips)]
    for mark in marks:
        mark.update({name: mark[name] | told for name, told in heard.items()})
    began = time.perf_counter()
    if config.stream:
        peak, first = _write_stream(model, request, marks[0], config)
        written, note = [(config.out, peak)], f"first sound after {first:.2f} s, "
    else:
        written, note = _write_clips(model, request, marks, config.out), ""
    seconds = time.perf_counter() - began
    for (out, peak), seed in zip(written, request.seeds):
        level = 20 * math.log10(peak) if peak > 0 else -math.inf
        _print(
            f"{out}: {config.duration:g} s, peak {level:.1f} dBFS, marked as generated (seed {seed}); {note}"
            f"made in {seconds:.1f} s ({config.clips * config.duration / seconds:.2f} x real time)",
            sys.stderr if out == "-" else sys.stdout,
        )
    return 0


def _request(model: MusicGen, prompt: str | None, config: GenerateConfig) -> tuple[Request, dict[str, dict[str, Any]]]:
    """The command's request, and what the marking says beside it of each file that is heard, by its setting.

    Whether it can be made is asked before the sounds in it are read.
    """
    many, negatives = config.clips, None
    for name, given, sound, of in (
        ("sampling.guidance_melody", config.sampling.guidance_melody is not None, config.melody, "a MELODY"),
        ("sampling.guidance_style", config.sampling.guidance_style is not None, config.style, "a STYLE"),
        ("melody_stems", config.melody_stems, config.melody, "a MELODY"),
        ("prompt_seconds", config.prompt_seconds > 0, config.prompt_audio, "an AUDIO"),
    ):
        if given and not sound:
            print(f"warning: {name} acts on {of}; there is none", file=sys.stderr)
    if config.negative_prompt.strip():
        if not config.sampling.guides():
            raise UserError(
                "negative_prompt is what guidance moves away from, and the guidance is 1, which is none; "
                "give --sampling.guidance 3, or leave the negative prompt out"
            )
        negatives = [config.negative_prompt.strip()] * many
    request = Request(
        [prompt] * many,
        config.duration,
        range(config.seed, config.seed + many),
        config.sampling,
        negatives,
        stride_seconds=config.extend_stride,
        melodies=torch.zeros(many, 1, dtype=torch.uint8) if config.melody else None,
        attributes=[config.attributes] * many,
        styles=torch.zeros(many, model.codec.num_codebooks, 1, dtype=torch.long) if config.style else None,
    )
    check(model, request)
    sounds, heard = dict[str, Any](), dict[str, dict[str, Any]]()
    for name, part, read in (
        ("prompt_audio", "given", _prompt_audio),
        ("melody", "melodies", _melody),
        ("style", "styles", _style),
    ):
        if getattr(config, name):
            digest = hashlib.sha256()
            one = read(model, config, digest)
            sounds[part] = one.expand(many, *one.shape[1:])
            heard[name] = {"file_sha256": digest.hexdigest()}
            if (made := wav.marking_of(getattr(config, name))) is not None:
                heard[name]["marking"] = made  # what it was made from goes on to what is made of it
    if config.melody:
        heard["melody"]["stems"] = config.melody_stems
    return replace(request, **sounds), heard


def _prompt_audio(model: MusicGen, config: GenerateConfig, digest: hashlib._Hash) -> Tensor:
    """Codes `[1, K, P]` that the clip begins with, of sound that is refused first where it leaves nothing to make."""
    codec, limit = model.codec, min(config.prompt_seconds or MAX_SECONDS, config.duration)
    sound = listen.read(
        config.prompt_audio, codec.sample_rate, codec.channels, what="AUDIO", max_seconds=limit, digest=digest
    )
    if sound.shape[1] >= round(config.duration * codec.sample_rate):
        raise UserError(
            f"AUDIO={config.prompt_audio!r} is {config.duration:g} s long or longer and DURATION={config.duration:g} "
            "counts it in, so nothing is left to make; give a longer DURATION or less of it (--prompt_seconds)"
        )
    if sound.shape[1] < codec.hop:
        least = f"an audio prompt needs at least {codec.hop / codec.sample_rate:g} s, one frame of the codec"
        if 0 < config.prompt_seconds < codec.hop / codec.sample_rate:
            raise UserError(f"prompt_seconds is {config.prompt_seconds:g}; {least}, and 0 takes all of AUDIO")
        raise UserError(f"AUDIO={config.prompt_audio!r} is {sound.shape[1] / codec.sample_rate:g} s long; {least}")
    return encode_audio(model, sound)


def _melody(model: MusicGen, config: GenerateConfig, digest: hashlib._Hash) -> Tensor:
    """Pitch classes `[1, C]` of as much of the melody file as the clip can hear: its last window may begin anywhere."""
    rate = model.codec.sample_rate
    heard = config.duration + (model.lm.config.condition.chroma_frames * CHROMA_HOP + CHROMA_WINDOW) / rate
    limit = min(heard, listen.MAX_SECONDS)
    if config.melody_stems:
        sound = listen.read(config.melody, stems.SAMPLE_RATE, 2, what="MELODY", max_seconds=limit, digest=digest)
        sound = stems.melody(sound, rate)
    else:
        sound = listen.read(config.melody, rate, 1, what="MELODY", max_seconds=limit, digest=digest)[0]
    if len(sound) < CHROMA_WINDOW:
        raise UserError(
            f"MELODY={config.melody!r} is {len(sound) / rate:.2f} s long; a melody needs at least "
            f"{CHROMA_WINDOW / rate:.2f} s, one window of the chromagram"
        )
    bins = torch.from_numpy(chroma_bins(sound, rate))[None]
    if bool((bins == NONE).all()):
        raise UserError(
            f"MELODY={config.melody!r} is silent throughout the {len(sound) / rate:.1f} s that are heard of it; "
            "give a recording with a melody"
        )
    return bins


def _style(model: MusicGen, config: GenerateConfig, digest: hashlib._Hash) -> Tensor:
    """Codes `[1, K, F]` of an excerpt from the middle of the style file, as long as the mean one of the training."""
    codec, style = model.codec, model.lm.config.condition.style
    wanted = (style.min_seconds + style.max_seconds) / 2
    excerpt, seconds = listen.read_middle(
        config.style, codec.sample_rate, codec.channels, what="STYLE", seconds=wanted, digest=digest
    )
    if seconds < style.min_seconds:
        raise UserError(
            f"STYLE={config.style!r} is {seconds:.2f} s long; a style needs at least {style.min_seconds:g} s of music"
        )
    if float(abs(excerpt).max()) < 10 ** (SILENCE_DBFS / 20):
        raise UserError(f"STYLE={config.style!r} is silent in its middle; give a recording with music")
    return encode_audio(model, excerpt)


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    """Standard output for sound; raises `UserError` where it cannot be written, such as to a full disk."""
    with files.writing("-") as file:
        try:
            yield file
        except BrokenPipeError:  # its reader has gone
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
            raise UserError(
                f"OUT=- cannot be written: {error.strerror or error}; free the place or give OUT="
            ) from None


def _write_clips(
    model: MusicGen, request: Request, marks: Sequence[dict[str, Any]], out: str
) -> list[tuple[str, float]]:
    """Make the clips, with a progress bar on standard error, and write them; name and peak of each."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=None)
        pieces = list(codes(model, request, lambda done, total: bar.update(task, completed=done, total=total)))
    samples, written = round(request.duration_seconds * model.codec.sample_rate), []
    for number, (made, mark) in enumerate(zip(torch.cat(pieces, dim=2), marks), start=1):
        audio = decode_long(model.codec, made[None])[0, :, :samples]
        data = wav.encode(audio, model.codec.sample_rate, mark)
        name = out if len(marks) == 1 else f"{out[: -len('.wav')]}-{number}.wav"
        if name == "-":
            with _standard_output() as file:
                file.write(data)
                file.flush()
        else:
            files.write_bytes(name, data)
        written.append((name, float(audio.abs().max())))
    return written


def _write_stream(
    model: MusicGen, request: Request, mark: dict[str, Any], config: GenerateConfig
) -> tuple[float, float]:
    """Write the sound as it comes; peak and the seconds until the first of it was ready.

    A file stands under its name once it is whole; standard output gets each piece at once.
    """
    began, first, peak = time.perf_counter(), math.nan, 0.0
    rate, channels = model.codec.sample_rate, model.codec.channels
    with _standard_output() if config.out == "-" else files.writing(config.out) as file:
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
