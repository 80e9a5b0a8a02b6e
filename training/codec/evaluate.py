"""How good is a codec: `make codec-eval` measures it on held-out tracks beside Opus at 6 and 12 kbit/s.

Log-mel distance (mean L1 of log10 mel, 64 mels, n_fft 1024, hop 256, floor 1e-5, 32 kHz mono) and chroma agreement
(share of 4096-sample frames with the same dominant pitch class, silence left out) on the validation split; the share of
each codebook's entries that occurs over the whole catalogue. Prints a table and writes JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from musicgen import codec as codecs
from musicgen import settings
from musicgen.metrics.audio import chroma_agreement, log_mel_distance, opus
from pipelines.assemble import SplitConfig
from training.codec import data


@dataclass(frozen=True)
class CodecEvalConfig:
    """Settings of `python -m training.codec.evaluate`.

    Args:
        codec: `demo`, a codec folder or a hub name.
        data: catalogue URI or PCM cache folder; distances on its split `valid`, codebook use on all of it.
        cache: where the decoded audio of a catalogue is kept.
        opus: bit rates of Opus to compare with, bit/s.
        max_seconds: seconds of each track that are measured.
        out: JSON file; empty for none.
        splits: shares of the split groups, as in ingest.
    """

    codec: str = "demo"
    data: str = "musicgen/assets/catalogue/catalog.jsonl"
    cache: str = "data/codec-eval-pcm"
    opus: tuple[int, ...] = (6000, 12000)
    max_seconds: float = 60.0
    out: str = ""
    splits: SplitConfig = field(default_factory=lambda: SplitConfig(0.85, 0.15, 0.0))


def measure(codec: codecs.Codec, valid: data.Pcm, opus_rates: tuple[int, ...], max_seconds: float) -> dict[str, dict]:
    """Per system (codec and each Opus rate): mean `log_mel`, mean `chroma`, over the tracks of `valid`."""
    from rich.progress import track

    systems = [codec.name, *(f"opus {rate // 1000} kbit/s" for rate in opus_rates)]
    log_mel: dict[str, list[float]] = {name: [] for name in systems}
    chroma: dict[str, list[float]] = {name: [] for name in systems}
    for number in track(range(len(valid.track_ids)), description="held-out tracks"):
        original = valid.track(number)[:, : int(max_seconds * codec.sample_rate)]
        mono = original.mean(0)
        decoded = _decode(codec, codec.encode_track(original)).mean(0)[: len(mono)]
        versions = [decoded, *(opus(mono, rate) for rate in opus_rates)]
        for name, version in zip(systems, versions, strict=True):
            log_mel[name].append(log_mel_distance(mono, version))
            chroma[name].append(chroma_agreement(mono, version))
    return {
        name: {"log_mel": float(np.mean(log_mel[name])), "chroma": float(np.nanmean(chroma[name]))}
        | {"tracks": len(log_mel[name])}
        for name in systems
    }


def _decode(codec: codecs.Codec, codes: np.ndarray) -> np.ndarray:
    import torch

    return codec.decode(torch.from_numpy(codes.astype(np.int64))[None])[0].numpy()


def codebook_use(codec: codecs.Codec, splits: list[data.Pcm]) -> tuple[list[float], list[float]]:
    """Share of entries in use and perplexity, per codebook, over all tracks."""
    from rich.progress import track

    counts = np.zeros((codec.num_codebooks, codec.codebook_size), np.int64)
    for pcm in splits:
        for number in track(range(len(pcm.track_ids)), description="codebook use"):
            codes = codec.encode_track(pcm.track(number))
            for level in range(codec.num_codebooks):
                counts[level] += np.bincount(codes[level], minlength=codec.codebook_size)
    share = counts / counts.sum(1, keepdims=True)
    entropy = -(share * np.log(np.clip(share, 1e-12, None))).sum(1)
    return list((counts > 0).mean(1)), list(np.exp(entropy))


def main(argv: list[str]) -> int:
    """Measure and print; 0."""
    from rich.console import Console
    from rich.table import Table

    config = settings.parse(CodecEvalConfig, argv, prog="python -m training.codec.evaluate")
    codec = codecs.load(config.codec)
    shape = codecs.CodecConfig(sample_rate_hz=codec.sample_rate, channels=codec.channels)
    cache = data.prepare(config.data, Path(config.cache), shape, config.splits)
    train, valid = data.open_cache(cache, "train"), data.open_cache(cache, "valid")
    result = measure(codec, valid, config.opus, config.max_seconds)
    used, perplexity = codebook_use(codec, [train, valid])

    table = Table(title=f"codec {codec.name} ({codec.identity[:12]}), {len(valid.track_ids)} held-out tracks")
    for column in ("system", "kbit/s", "log-mel distance", "× Opus 6k", "chroma agreement"):
        table.add_column(column, justify="left" if column == "system" else "right")
    bits = codec.num_codebooks * codec.frame_rate * (codec.codebook_size.bit_length() - 1) / 1000
    base = next((r["log_mel"] for name, r in result.items() if name.startswith("opus")), float("nan"))
    for name, row in result.items():
        rate = f"{bits:.1f}" if name == codec.name else name.split()[1]
        table.add_row(name, rate, f"{row['log_mel']:.4f}", f"{row['log_mel'] / base:.2f}", f"{row['chroma']:.3f}")
    console = Console()
    console.print(table)
    hours = train.hours + valid.hours
    for level, (share, ppl) in enumerate(zip(used, perplexity, strict=True), 1):
        console.print(f"codebook {level}: {share:.1%} of the entries in use over {hours:.2f} h, perplexity {ppl:.0f}")
    if config.out:
        report = {"codec": codecs.describe(codec), "systems": result, "used": used, "perplexity": perplexity}
        Path(config.out).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    settings.run(main)
