"""Speed of the loader: 30-second crops per second, read at random, captioned, tokenised and collated by its workers.

    python -m benchmarks.loader [--data URI] [--workers 2] [--batches 100] [--json FILE]        (make bench-loader)

The need it is read against: 3.3b at 50 % of the peak of an H200 takes 18.3 clips per second, and the loader is asked
for fifty times that on two cores. Without DATA a set of made-up tracks of two to four minutes is used, with captions
and a record of rights as long as ingest writes them. The tokeniser is the packaged one; no model is run. The first
fifth is left out, in which every track is compared with the index once.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musicgen import settings

NEEDED = 50 * 18.3


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Args:
        data: data set; made up when empty.
        tracks: tracks of the made-up set.
        workers: processes that read; 0 reads in this one.
        batch: clips per batch.
        batches: batches read, the first fifth left out.
        crop_seconds: length of a crop.
        json: also write the result to this file.
    """

    data: str = ""
    tracks: int = 300
    workers: int = 2
    batch: int = 192
    batches: int = 100
    crop_seconds: float = 30.0
    json: str = ""


def measure(config: BenchConfig, data: str) -> dict[str, Any]:
    """Clips per second of the loader, and the same without tokenising."""
    from musicgen.conditioning import TextEncoder
    from training.data import BatchConfig, Stream, training_loader
    from training.sources import open_data

    encoder = TextEncoder.load("minilm")
    batch = BatchConfig(crop_seconds=config.crop_seconds, size=config.batch, workers=config.workers)
    found: dict[str, Any] = {}
    for name, tokenize in (("clips_per_second", encoder.tokenize), ("without_tokenising", None)):
        loader = iter(training_loader(Stream(open_data(data), batch, seed=1, tokenize=tokenize)))
        warm = max(config.batches // 5, 1)
        for _ in range(warm):
            made = next(loader)
        began = time.perf_counter()
        for _ in range(config.batches - warm):
            made = next(loader)
        found[name] = config.batch * (config.batches - warm) / (time.perf_counter() - began)
    found["frames"], found["caption_tokens"] = made.codes.shape[-1], None
    tokens = encoder.tokenize(made.texts)
    found["caption_tokens"] = float(tokens.mask.sum() / max(len(tokens.mask), 1))
    return found


def made_up(folder: Path, tracks: int) -> Path:
    """A set of tracks of two to four minutes whose metadata is as long as that of a licensed catalogue."""
    from tests.training.synthetic import write_dataset

    caption = (
        "A warm and slowly moving piece for string quartet and solo piano in a minor key, with long held chords, "
        "a plain melody in the first violin and a quiet close."
    )
    more = {
        "captions": [
            {"text": f"{caption} {more}", "language": "en", "sources": ["description"]}
            for more in ("", "bpm: 84.0", "genre: chamber music, moods: calm, warm", "key: A minor, era: 1890s")
        ],
        "rights": {"licence": "CC-BY-4.0", "rightsholders": [{"party": "Example Music", "share": 100.0}] * 3},
    }
    return write_dataset(folder / "data", tracks=tracks, valid=2, frames=(6000, 12000), more=more)


def main(argv: Sequence[str]) -> int:
    """Measure and print; see `BenchConfig`. Exit code 1 where the loader is slower than needed."""
    config = settings.parse(BenchConfig, argv, prog="python -m benchmarks.loader")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as name:
        found = measure(config, config.data or str(made_up(Path(name), config.tracks)))
    rate = found["clips_per_second"]
    print(
        f"loader, {config.workers} workers, batches of {config.batch} x {config.crop_seconds:g} s, captions of "
        f"{found['caption_tokens']:.0f} tokens on average\n"
        f"  {rate:,.0f} clips per second, {found['without_tokenising']:,.0f} without tokenising; needed "
        f"{NEEDED:.0f} (50 x what 3.3b takes on an H200): {rate / NEEDED:.1f} times that"
    )
    document = {**settings.to_dict(config), **found, "needed": NEEDED}
    print(json.dumps(document))
    if config.json:
        Path(config.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if rate >= NEEDED else 1


if __name__ == "__main__":
    settings.run(main)
