"""Prompt to sound: the one path that training samples, the command line, evaluation and the demo go through.

`load` brings a release with the codec and text encoder it names; `generate` runs the language model column by column
(delay pattern, cached keys and values, prompted and null rows in one batch), draws tokens, and decodes them. The
same prompt, seed and settings give the same samples on one kind of processor, alone or in a batch: each prompt is
encoded alone, random numbers are addressed by (seed, step, codebook), and clips are decoded one by one.

    PROMPT="slow waltz for piano" python -m musicgen.generate --duration 10 --out waltz.wav

Source: Copet et al. 2023, sections 2.2, 2.3 and 3.4.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from musicgen import files, patterns, sampling, settings, wav, weights
from musicgen.errors import UserError
from musicgen.sampling import SamplingConfig

if TYPE_CHECKING:
    from musicgen.codec import Codec
    from musicgen.conditioning import TextEncoder
    from musicgen.lm import MusicLM

MIN_SECONDS, MAX_SECONDS = 0.1, 300.0
_DURATION_ADVICE = f"give seconds from {MIN_SECONDS:g} to {MAX_SECONDS:g}, such as DURATION=10"
_DEFAULTS = Path(__file__).parent.parent / "configs" / "generate" / "default.yaml"
_TEXT_BUCKET = 32  # text is padded to a multiple, so that a batch and a single prompt take the same kernels


@dataclass(frozen=True)
class MusicGen:
    """A language model with the codec and text encoder it was trained with; `info` is the release's config.json."""

    lm: MusicLM
    codec: Codec
    text_encoder: TextEncoder
    info: dict[str, Any]

    @property
    def trained_seconds(self) -> float | None:
        """Length of the training crops, beyond which quality is not promised; None when not recorded."""
        return self.info.get("training", {}).get("crop_seconds")


def load(model: str | os.PathLike[str] = "demo", codec: Codec | str | None = None, device: str = "cpu") -> MusicGen:
    """A model ready to generate.

    Args:
        model: `demo` (ships with the program), a release folder, or its URI.
        codec: the codec, or its name or folder, where it stands elsewhere than the release says.
        device: where the language model and the text encoder run: `cpu`, `cuda`, `auto`.

    Raises:
        UserError: not a release, or its codec or text encoder is missing or another one.
    """
    from musicgen import codec as codecs
    from musicgen.conditioning import TextEncoder

    where = _device(device)
    lm, info = weights.load_release(model)
    if codec is None or isinstance(codec, str):
        name = codec or info["codec"]["name"]
        try:
            codec = codecs.load(name)
        except (UserError, OSError) as error:
            raise UserError(
                f"MODEL={os.fspath(model)!r} needs codec {info['codec']['name']!r}, and {name!r} could not be loaded: "
                f"{error}. Give its folder with --codec"
            ) from error
    weights.check_codec(info, codec)
    encoder = TextEncoder.load(info["text_encoder"]["name"])
    if encoder.identity != info["text_encoder"]["identity"]:
        raise UserError(
            f"MODEL={os.fspath(model)!r} was trained with another text encoder than the {encoder.name!r} on this "
            f"machine (identity {info['text_encoder']['identity'][:12]}…, here {encoder.identity[:12]}…); "
            "install the one it names"
        )
    return MusicGen(lm.to(where), codec, encoder.to(where), info)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); give cpu or auto") from None
    return device


def check_duration(duration_seconds: float) -> float:
    """The duration; raises `UserError` when it is not a number in the allowed range."""
    if not (math.isfinite(duration_seconds) and MIN_SECONDS <= duration_seconds <= MAX_SECONDS):
        raise UserError(f"DURATION={duration_seconds:g} is not possible; {_DURATION_ADVICE}")
    return duration_seconds


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
            f"the model learned from {trained:g} s of music at a time; beyond that, up to the {duration_seconds:g} s "
            "asked for, it may lose the thread"
        )
    return found


@torch.no_grad()
def encode_prompts(model: MusicGen, prompts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """Hidden states [B, L, E] and mask [B, L] of prompts, each encoded alone; None is the null condition."""
    parts = [model.text_encoder.encode([p]) for p in prompts]
    longest = max(int(hidden.shape[1]) for hidden, _ in parts)
    length = -(-longest // _TEXT_BUCKET) * _TEXT_BUCKET
    first = parts[0][0]
    hidden = first.new_zeros(len(parts), length, first.shape[2])
    mask = torch.zeros(len(parts), length, dtype=torch.bool, device=first.device)
    for row, (h, m) in enumerate(parts):
        hidden[row, : h.shape[1]] = h[0]
        mask[row, : m.shape[1]] = m[0]
    return hidden, mask


@torch.no_grad()
def generate_codes(
    lm: MusicLM,
    text: Tensor,
    text_mask: Tensor,
    num_frames: int,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Codes [B, K, num_frames] for text conditions [B, L, E] and masks [B, L].

    Args:
        seeds: one per item; an item's tokens depend on its own seed and condition only.
        progress: called with (columns done, columns in all) after each.
    """
    config = config or SamplingConfig()
    batch, books, special = text.shape[0], lm.config.num_codebooks, lm.config.special_id
    if len(seeds) != batch:
        raise ValueError(f"{batch} prompts need {batch} seeds, got {len(seeds)}")
    guided = config.guidance != 1.0 and bool(text_mask.any())
    if guided:  # prompted rows first, then the same number of null rows
        text = torch.cat([text, torch.zeros_like(text)])
        text_mask = torch.cat([text_mask, torch.zeros_like(text_mask)])
    device = text.device
    # Python's integers are unbounded; the address takes their lowest 64 bits.
    address = torch.from_numpy(np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], np.uint64).view(np.int64)).to(device)
    unknown = torch.full((batch, books, num_frames), -1, dtype=torch.long, device=device)
    columns, holds_code = patterns.interleave(unknown, special, pattern=lm.config.pattern)
    steps = columns.shape[-1] - 1
    cache = lm.start_cache(text, text_mask, steps)
    for step in range(steps):
        column = columns[..., step]
        logits = lm.step(torch.cat([column, column]) if guided else column, cache)
        if guided:
            logits = sampling.guide(logits[:batch], logits[batch:], config.guidance)
        drawn = sampling.sample(logits, address, step, config)
        columns[..., step + 1] = torch.where(holds_code[:, step + 1], drawn, special)
        if progress is not None:
            progress(step + 1, steps)
    return patterns.deinterleave(columns, pattern=lm.config.pattern)


def generate(
    model: MusicGen,
    prompts: Sequence[str | None],
    duration_seconds: float,
    seeds: Sequence[int],
    config: SamplingConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sound for prompts.

    Args:
        prompts: B texts in any script; None generates without a condition.
        duration_seconds: length, 0.1 to 300; beyond the training crop the model may lose the thread (see `hints`).
        seeds: B seeds, any integers.
        progress: called with (columns done, columns in all).

    Returns:
        audio [B, C, N] float32, N = duration x sample rate, and codes [B, K, T] int64, on the CPU.

    Raises:
        UserError: an empty prompt, an impossible duration, top_k beyond the codebook.
    """
    config = config or SamplingConfig()
    check_duration(duration_seconds)
    size = model.lm.config.codebook_size
    if config.top_k > size:
        raise UserError(f"top_k is {config.top_k}, but a codebook has {size} codes; give 0 (all) up to {size}")
    for prompt in prompts:
        if prompt is not None and not prompt.strip():
            raise UserError(EMPTY_PROMPT)
    if len(prompts) == 0:
        raise ValueError("there is no prompt to generate for; give at least one (None is unconditional)")
    frames = max(1, math.ceil(duration_seconds * model.codec.frame_rate - 1e-6))
    text, mask = encode_prompts(model, prompts)
    codes = generate_codes(model.lm, text, mask, frames, seeds, config, progress).cpu()
    samples = round(duration_seconds * model.codec.sample_rate)
    audio = torch.cat([model.codec.decode(item[None]) for item in codes])[..., :samples]
    return audio.float().cpu(), codes


def marking(
    model: MusicGen, prompt: str | None, seed: int, duration_seconds: float, config: SamplingConfig
) -> dict[str, Any]:
    """The record that a generated file carries: that it is generated, by which model, from what."""
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
        duration: seconds.
        out: the WAV file to write, a path or URI.
        seed: the same seed gives the same file.
        codec: codec name or folder, where the one named by the release stands elsewhere.
        device: cpu, cuda or auto.
        sampling: guidance, top-k, top-p, temperature.
    """

    model: str = "demo"
    prompt: str = ""
    unconditional: bool = False
    duration: float = 10.0
    out: str = "generated.wav"
    seed: int = 0
    codec: str | None = None
    device: str = "cpu"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def _check_out(out: str) -> None:
    if not out.lower().endswith(".wav"):
        raise UserError(f"OUT={out!r} must end in .wav, such as OUT=waltz.wav")
    path = files.local_path(out)
    if path is not None and path.is_dir():
        raise UserError(f"OUT={out!r} is a folder; give the file to write, such as OUT={out.rstrip('/')}/waltz.wav")


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
    if prompt == "":
        raise UserError(EMPTY_PROMPT)
    check_duration(config.duration)
    _check_out(config.out)
    model = load(config.model, config.codec, config.device)
    for hint in hints(model, prompt, config.duration):
        print(f"warning: {hint}", file=sys.stderr)
    audio = _generate_with_bar(model, prompt, config)
    mark = marking(model, prompt, config.seed, config.duration, config.sampling)
    wav.write(config.out, audio, model.codec.sample_rate, mark)
    peak = float(audio.abs().max())
    level = 20 * math.log10(peak) if peak > 0 else -math.inf
    print(f"{config.out}: {config.duration:g} s, peak {level:.1f} dBFS, marked as generated (seed {config.seed})")
    return 0


def _generate_with_bar(model: MusicGen, prompt: str | None, config: GenerateConfig) -> Tensor:
    """Audio [C, N] of the command's one prompt, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=None)
        audio, _ = generate(
            model,
            [prompt],
            config.duration,
            [config.seed],
            config.sampling,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    return audio[0]


if __name__ == "__main__":
    settings.run(main)
