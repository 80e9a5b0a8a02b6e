"""How good is a codec: `make codec-eval` measures it on held-out tracks beside Opus at 6 and 12 kbit/s.

Per system, over the validation split, mixed to mono at 32 kHz: log-mel distance (mean L1 of log10 mel, 64 mels, n_fft
1024, hop 256, floor 1e-5), multi-scale mel distance (the reference's own, windows of 64 to 1024 samples), SI-SDR,
chroma agreement (share of 4096-sample frames with the same dominant pitch class, silence left out), bits per second. Of
the codec also how much of each codebook occurs over the whole catalogue, and how evenly. Prints a table, writes JSON
and a page with spectrograms and sound side by side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from musicgen import codec as codecs
from musicgen import settings
from musicgen.errors import UserError
from musicgen.metrics.audio import SAMPLE_RATE_HZ, chroma_agreement, log_mel_distance, opus_and_rate, si_sdr
from musicgen.stream_decoder import decode_long
from pipelines.assemble import SplitConfig
from pipelines.store import Place
from training.codec import data, losses

MEASURES = ("log_mel", "mel_scales", "si_sdr", "chroma", "bits_per_second")


@dataclass(frozen=True)
class CodecEvalConfig:
    """Settings of `python -m training.codec.evaluate`.

    Args:
        codec: `demo`, a codec folder or a hub name.
        data: catalogue URI, audio shards or PCM cache; distances on its split `valid`, codebook use on all of it.
        cache: where the decoded audio of a catalogue is kept.
        opus: bit rates of Opus to compare with, bit/s.
        max_seconds: seconds of each track that are measured.
        out: JSON file; empty for none.
        page: HTML file; empty for none.
        clips: held-out tracks to see and hear on the page.
        clip_seconds: length of what is seen and heard of each.
        splits: shares of the split groups, as in ingest.
    """

    codec: str = "demo"
    data: str = "musicgen/assets/catalogue/catalog.jsonl"
    cache: str = "data/codec-eval-pcm"
    opus: tuple[int, ...] = (6000, 12000)
    max_seconds: float = 60.0
    out: str = ""
    page: str = ""
    clips: int = 4
    clip_seconds: float = 8.0
    splits: SplitConfig = field(default_factory=lambda: SplitConfig(0.85, 0.15, 0.0))

    def __post_init__(self) -> None:
        if self.max_seconds <= 0 or self.clips < 0 or self.clip_seconds <= 0:
            raise ValueError("max_seconds and clip_seconds must be positive and clips not negative")
        if low := [rate for rate in self.opus if not 6000 <= rate <= 510_000]:
            raise ValueError(f"opus takes 6000 to 510000 bit/s; got {low}")


def nominal_bits_per_second(codec: codecs.Codec) -> float:
    """Bits per second of the codes as they are stored: codebooks times frame rate times bits of an entry."""
    return codec.num_codebooks * codec.frame_rate * math.log2(codec.codebook_size)


def measure(
    codec: codecs.Codec, valid: data.Pcm, opus_rates: Sequence[int], max_seconds: float
) -> dict[str, dict[str, float]]:
    """Per system (codec and each Opus rate): means of `MEASURES` over the tracks of `valid`, and how many `tracks`."""
    from rich.progress import track

    found: dict[str, list[dict[str, float]]] = {}
    for number in track(range(len(valid.track_ids)), description="held-out tracks"):
        original = valid.track(number)[:, : int(max_seconds * codec.sample_rate)]
        versions = coded_versions(codec, original, opus_rates)
        mono = versions.pop("original")[0]
        for name, (version, rate) in versions.items():
            found.setdefault(name, []).append(compare(mono, version) | {"bits_per_second": rate})
    if not found:
        raise UserError("the split 'valid' has no tracks to measure; give DATA with more artists")
    return {
        name: {key: _mean([row[key] for row in rows]) for key in MEASURES} | {"tracks": len(rows)}
        for name, rows in found.items()
    }


def coded_versions(
    codec: codecs.Codec, original: np.ndarray, opus_rates: Sequence[int]
) -> dict[str, tuple[np.ndarray, float]]:
    """`original [C, N]` at the codec's rate, what the codec and Opus make of it: mono `[N']` at 32 kHz, bits/s."""
    codes = torch.from_numpy(codec.encode_track(original).astype(np.int64))[None]
    sound = decode_long(codec, codes)
    decoded = sound[0, :, : original.shape[1]].cpu().numpy()
    mono = _at_32k(original.mean(0), codec.sample_rate)
    versions = {"original": (mono, 16.0 * SAMPLE_RATE_HZ)}
    versions[codec.name] = (_at_32k(decoded.mean(0), codec.sample_rate), nominal_bits_per_second(codec))
    return versions | {f"opus {rate // 1000} kbit/s": opus_and_rate(mono, rate) for rate in opus_rates}


def compare(original: np.ndarray, version: np.ndarray) -> dict[str, float]:
    """The measures of `version [N]` against `original [N]`, both at 32 kHz."""
    x, y = (torch.from_numpy(np.ascontiguousarray(s))[None] for s in (original, version))
    return {
        "log_mel": log_mel_distance(original, version),
        "mel_scales": float(losses.msspec_loss(x, y, SAMPLE_RATE_HZ)),
        "si_sdr": si_sdr(original, version),
        "chroma": chroma_agreement(original, version),
    }


def codebook_use(codec: codecs.Codec, splits: Sequence[data.Pcm]) -> tuple[list[float], list[float]]:
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
    return [float(u) for u in (counts > 0).mean(1)], [float(p) for p in np.exp(entropy)]


def _mean(values: list[float]) -> float:
    """Mean of the finite values: a silent track has no pitch and no SI-SDR."""
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")


def _at_32k(signal: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    import soxr

    if sample_rate_hz == SAMPLE_RATE_HZ:
        return signal
    return soxr.resample(signal, sample_rate_hz, SAMPLE_RATE_HZ, "HQ").astype(np.float32)


def _cache(config: CodecEvalConfig, codec: codecs.Codec) -> Path:
    """The cache's folder of this catalogue as it is now, at the codec's rate and channels."""
    source = Place.at(config.data)
    content = source.read() if source.is_file() else b""  # what a folder holds is looked at where it is decoded
    what = json.dumps([config.data, codec.sample_rate, codec.channels, settings.to_dict(config.splits)])
    return Path(config.cache) / hashlib.sha256(what.encode() + content).hexdigest()[:12]


def rows(result: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table, in words."""
    head = ["system", "kbit/s", "log-mel", "× Opus 6k", "mel", "SI-SDR, dB", "chroma"]
    base = result.get("opus 6 kbit/s", {}).get("log_mel", float("nan"))
    return head, [
        [
            name,
            f"{row['bits_per_second'] / 1000:.2f}",
            f"{row['log_mel']:.4f}",
            f"{row['log_mel'] / base:.2f}" if math.isfinite(base) else "",
            f"{row['mel_scales']:.4f}",
            f"{row['si_sdr']:.1f}",
            f"{row['chroma']:.3f}",
        ]
        for name, row in result.items()
    ]


def main(argv: Sequence[str]) -> int:
    """Measure and print; 0."""
    from rich.console import Console
    from rich.table import Table

    config = settings.parse(CodecEvalConfig, argv, prog="python -m training.codec.evaluate")
    codec = codecs.load(config.codec)
    shape = codecs.CodecConfig(sample_rate_hz=codec.sample_rate, channels=codec.channels)
    cache = data.prepare(config.data, _cache(config, codec), shape, config.splits)
    train, valid = (data.open_cache(cache, split, shape) for split in ("train", "valid"))
    result = measure(codec, valid, config.opus, config.max_seconds)
    used, perplexity = codebook_use(codec, [train, valid])
    hours = sum(pcm.samples.shape[1] for pcm in (train, valid)) / codec.sample_rate / 3600

    head, lines = rows(result)
    table = Table(title=f"codec {codec.name} ({codec.identity[:12]}), {len(valid.track_ids)} held-out tracks")
    for column in head:
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=column == "system")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    for level, (share, ppl) in enumerate(zip(used, perplexity, strict=True), 1):
        console.print(f"codebook {level}: {share:.1%} of the entries in use over {hours:.2f} h, perplexity {ppl:.0f}")
    entropy = codec.frame_rate * sum(math.log2(ppl) for ppl in perplexity)
    console.print(
        f"bits per second: {nominal_bits_per_second(codec):.0f} as stored, {entropy:.0f} by how common codes are"
    )
    report = {
        "codec": codecs.describe(codec),
        "systems": result,
        "used": used,
        "perplexity": perplexity,
        "entropy_bits_per_second": entropy,
        "hours": hours,
    }
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps(report, indent=2) + "\n")
    if config.page:
        from training.codec import page

        target = page.build(config, codec, valid, report, Path(config.page))
        console.print(f"open {target.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    settings.run(main)
