"""What a run gives away: releases, and clips to hear on the way. Both are made from the averaged weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen import about, files

if TYPE_CHECKING:
    from musicgen.codec import Codec
    from musicgen.lm import MusicLM
    from training.callbacks import LogConfig
    from training.data import Batch
    from training.module import MusicLMModule
    from training.sources import Sources
    from training.train import TrainConfig


def release_info(
    module: MusicLMModule, config: TrainConfig, shards: Sources, valid_loss: float | None
) -> dict[str, Any]:
    """What a release says about itself (see musicgen.weights)."""
    from musicgen import adapters, settings
    from musicgen.weights import inherited, read_info

    codec = shards.info["codec"]
    parts = {
        "codec": {"name": config.codec or codec["name"], "identity": codec["identity"]},
        "text_encoder": {"name": module.encoder.name, "identity": module.encoder.identity},
    }
    if adapters.is_adapted(module.lm):  # an adapter speaks through its base, and takes what belongs to it from there
        base = read_info(config.init)
        parts = {part: base[part] for part in parts}
    return {
        **parts,
        "training": {
            "step": module.progress.step,
            "audio_seconds_seen": round(module.progress.audio_seconds_seen, 2),
            "data_version": shards.info["dataset_version"],
            "valid_loss": valid_loss,
            "crop_seconds": config.batch.crop_seconds,
            **({"init": config.init} if config.init else {}),
            **({"selection": settings.to_dict(config.select)} if config.select else {}),
        },
        "licence": config.licence,
        **({"inherited": inherited(config.init)} if config.init else {}),
        "made_by": about.software(),
    }


def write_release(
    model: MusicLM,
    module: MusicLMModule,
    valid_loss: float | None,
    *,
    folder: Path,
    config: TrainConfig,
    shards: Sources,
    base: dict[str, Any],
) -> None:
    """The release folder from a model that holds the averaged weights; of an adapter the adapter alone.

    Args:
        base: of `adapters.base_of`, for an adapter.
    """
    import torch

    from musicgen import adapters
    from musicgen.weights import save_release

    info = release_info(module, config, shards, valid_loss)
    if adapters.is_adapted(model):
        adapters.save(folder, model, info, base)
        return
    save_release(folder, model, info, getattr(torch, config.release_dtype))


def make_clip(
    lm: MusicLM,
    module: MusicLMModule,
    path: Path,
    prompt: str | None,
    seed: int,
    seconds: float,
    *,
    codec: Codec | None,
    info: Any,
) -> dict[str, Any]:
    """Generate one clip into `path` with the averaged model; returns what made it."""
    from musicgen import adapters, generate, wav
    from musicgen.sampling import SamplingConfig

    if codec is None:
        raise ValueError("clips need the codec")
    lm = adapters.merged(lm) if adapters.is_adapted(lm) else lm
    module.encoder.to(next(lm.parameters()).device)  # a model put together from shards may stand elsewhere
    model = generate.MusicGen(lm, codec, module.encoder, info(module))
    sampling = SamplingConfig(top_k=min(SamplingConfig().top_k, lm.config.codebook_size))
    audio, _ = generate.generate(model, [prompt], seconds, [seed], sampling)
    mark = generate.marking(model, prompt, seed, seconds, sampling)
    wav.write(str(path), audio[0], codec.sample_rate, mark)
    module.encoder.to(module.device)
    return {"seed": seed, "duration_seconds": seconds}


def clip_prompts(shards: Sources, config: LogConfig, validation_texts: Iterable[str | None]) -> list[str | None]:
    """Prompts of the clips: the given ones, or different descriptions of the validation crops."""
    if config.prompts:
        return list(config.prompts[: config.clips])
    texts = [text for text in dict.fromkeys(validation_texts) if text]
    stride = max(len(texts) // max(config.clips, 1), 1)
    chosen: list[str | None] = [*texts[::stride]]
    return (chosen or [None])[: config.clips]


def make_ceilings(
    folder: Path, *, batches: Iterable[Batch], prompts: Sequence[str | None], codec: Codec | None, seconds: float
) -> list[tuple[Path, str]]:
    """For every prompt a recording through the codec, the best that its clip can sound: the validation crop with that
    description, else another one. Returns files and captions."""
    from musicgen import wav

    if codec is None:
        raise ValueError("ceilings need the codec")
    crops = [
        (text, codes[:, : int(frames)], key)
        for batch in batches
        for text, codes, frames, key in zip(batch.texts, batch.codes, batch.valid.sum(1), batch.keys)
        if frames
    ]
    made = []
    for number, prompt in enumerate(prompts[: len(crops)]):
        text, codes, key = next((crop for crop in crops if crop[0] == prompt), crops[number])
        sound = codec.decode(codes[None, :, : round(seconds * codec.frame_rate)].long())[0].cpu()
        path, what = folder / f"ceiling-{number}.wav", "a held-out recording through the codec"
        mark = {"what": what, "track": key, "caption": text}
        files.write_bytes(path, wav.encode(sound, codec.sample_rate, mark, generated=False))
        made.append((path, f"{what}: {text or '(no description)'}"))
    return made
