"""A small data set in the true shard format, with structure that a model can learn.

Every style has its own few codes and repeats them in loops; later codebooks follow the first. The captions name the
style, so that text tells something about the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musicgen import codec as codecs
from pipelines import shard
from pipelines.store import Place

STYLES = ("slow waltz for strings", "fast jazz piano trio", "brass march with drums", "solo guitar folk song")


def codes_of(style: int, frames: int, rng: np.random.Generator, size: int, books: int = 4) -> np.ndarray:
    """Codes `[K, T]`: loops over the style's codes with a little noise."""
    palette = np.random.default_rng(style).integers(0, size, 12)
    loop = rng.choice(palette, 8)
    first = np.resize(np.repeat(loop, 4), frames)
    rows = [(first * (3 * q + 1) + 17 * q + style) % size for q in range(books)]
    codes = np.stack(rows)
    noisy = rng.random(codes.shape) < 0.1
    return np.where(noisy, rng.integers(0, size, codes.shape), codes).astype(np.int16)


def small_codec(folder: Path) -> codecs.Codec:
    """A small random codec of 64 codes per codebook, saved in `folder`."""
    torch.manual_seed(0)
    shape = codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1, codebook_size=64)
    network = codecs.build(shape)
    for layer in network.quantizer.layers:
        layer.codebook.embed.normal_()
    return codecs.load(codecs.save(network, folder))


def write_dataset(
    folder: Path,
    *,
    tracks: int = 24,
    frames: tuple[int, int] = (90, 260),
    valid: int = 4,
    size: int = 2048,
    codec: dict[str, Any] | None = None,
    seed: int = 0,
    books: int = 4,
    more: dict[str, Any] | Callable[[int], dict[str, Any]] | None = None,
    melody: Callable[[int, int], np.ndarray] | None = None,
) -> Path:
    """Write a data set of `tracks` tracks, the last `valid` of them in the split `valid`; returns its folder.

    `more` is added to the metadata of every track, or what it gives for a track's number; `melody` gives the chroma
    bins of a track by number and frames, silence without it.
    """
    rng = np.random.default_rng(seed)
    (folder / "shards").mkdir(parents=True)
    records: dict[str, list[shard.Record]] = {"train": [], "valid": []}
    rows: list[dict[str, Any]] = []
    for number in range(tracks):
        style = number % len(STYLES)
        length = int(rng.integers(*frames))
        split = "valid" if number >= tracks - valid else "train"
        text = STYLES[style]
        meta = {
            "key": f"{number:016x}",
            "track_id": f"track-{number}",
            "descriptions": [{"text": text, "language": "en"}],
            "captions": [
                {"text": f"{text}.", "language": "en", "sources": ["description"]},
                {"text": f"{text}. bpm: 120.0", "language": "en", "sources": ["description", "bpm"]},
            ],
            **((more(number) if callable(more) else more) or {}),
        }
        codes = codes_of(style, length, rng, size, books)
        chroma = melody(number, length) if melody else np.full(-(-length // 6), 255)
        records[split].append(shard.make_record(codes, chroma, meta))
        rows.append(
            {
                "key": meta["key"],
                "track_id": meta["track_id"],
                "shard": f"shards/{split}-00000.tar",
                "split": split,
                "artist": f"artist {number}",
                "work": f"work {number}",
                "genre": text,
                "language": "en",
                "frames": length,
                "weight": 1.0,
                "duration_seconds": length / 50,
                "licence": "CC0-1.0",
                "withdrawn": False,
            }
        )
    by_key = {row["key"]: row for row in rows}
    for split, made in records.items():
        if made:
            for extent in shard.write_tar(str(folder / f"shards/{split}-00000.tar"), made):
                by_key[str(extent["key"])] |= extent
    table = shard.index_table(rows)
    (folder / "index.parquet").write_bytes(shard.table_bytes(table))
    described = {"name": "tiny", "identity": "0" * 64, **(codec or {})}
    info = {
        "schema_version": shard.SCHEMA_VERSION,
        "codec": {
            "frame_rate": 50,
            "num_codebooks": books,
            "codebook_size": size,
            "sample_rate_hz": 32000,
            **described,
        },
        "dataset_version": shard.dataset_version(table),
    }
    (Place.at(str(folder)) / "dataset.json").write(shard.json_bytes(info))
    return folder
