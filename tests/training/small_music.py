"""A small catalogue of made music with a real codec, data set and run: what the tests of the demo's report stand on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch

from musicgen import codec as codecs
from musicgen.chroma import chroma_bins
from pipelines import shard

STYLES = ("reel", "waltz", "samba")
RATE = 32000


def melody(seed: int, seconds: float) -> np.ndarray:
    """A plucked melody over a bass, [N] float32 at 32 kHz; the seed chooses notes and tempo."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    sound = np.zeros_like(t)
    beat = rng.choice([0.25, 0.375, 0.5])
    for i in range(int(seconds / beat)):
        note = 60 + rng.choice([0, 2, 4, 5, 7, 9, 11, 12]) - (24 if i % 4 == 0 else 0)
        after = np.clip(t - i * beat, 0, None)
        hz = 440 * 2 ** ((note - 69) / 12)
        pluck = sum(np.sin(2 * np.pi * hz * h * after) / h**1.5 for h in (1, 2, 3, 4))
        sound += (t >= i * beat) * pluck * np.exp(-4 * after)
    return (0.15 * sound).astype(np.float32)


def make_codec(folder: Path) -> Path:
    """A small random codec as a folder that `musicgen.codec.load` reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = codecs.build(
            codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1)
        )
        spread = network.encoder(torch.randn(1, 1, RATE) * 0.1).std().item()
        for layer in network.quantizer.layers:
            layer.codebook.embed.normal_(std=spread)
    return codecs.save(network, folder)


def make_catalog(folder: Path, tracks: int, seconds: float = 6.0) -> Path:
    """A catalogue of `tracks` WAV files with full rights; every artist and work is another one."""
    (folder / "audio").mkdir(parents=True)
    rows = []
    for i in range(tracks):
        soundfile.write(folder / "audio" / f"{i:02d}.wav", melody(i, seconds), RATE)
        style = STYLES[i % 3]
        rows.append(
            {
                "track_id": f"t{i:02d}",
                "uri": f"audio/{i:02d}.wav",
                "title": f"{style.title()} no. {i} <in C>",
                "artist": f"Artist {i}",
                "work": f"Work {i}",
                "genre": style,
                "language": "en",
                "descriptions": [{"text": f"a plucked {style} in C, number {i}", "language": "en"}],
                "rights": {
                    "licence": "CC0-1.0",
                    "rightsholders": [{"party": f"Artist {i}", "role": "author", "share": 1.0}],
                    "grants": ["train", "generate", "distribute"],
                    "territory": ["WORLD"],
                    "valid_from": "2020-01-01",
                    "valid_until": "perpetual",
                    "consent_evidence": "made for this test",
                    "status": "active",
                },
            }
        )
    path = folder / "catalog.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def make_data(root: Path, catalog: Path, codec: codecs.Codec, valid: int) -> Path:
    """The data set of a catalogue as ingest lays it out; the last `valid` tracks are held out."""
    rows = [json.loads(line) for line in catalog.read_text().splitlines()]
    (root / "shards").mkdir(parents=True)
    (root / "card").mkdir()
    index = []
    for split, part in (("train", rows[: len(rows) - valid]), ("valid", rows[len(rows) - valid :])):
        records = []
        for row in part:
            sound, _ = soundfile.read(catalog.parent / row["uri"], dtype="float32")
            codes = codec.encode_track(sound[None])
            meta = {**row, "key": f"key{row['track_id']}", "captions": row["descriptions"], "frames": codes.shape[1]}
            records.append(shard.make_record(codes, chroma_bins(sound), meta))
        name = f"shards/{split}-00000.tar"
        for row, extent in zip(part, shard.write_tar(str(root / name), records)):
            frames = (soundfile.info(str(catalog.parent / row["uri"])).frames + 639) // 640
            facts = {k: row[k] for k in ("track_id", "artist", "work", "genre", "language")}
            more = {"shard": name, "split": split, "frames": frames, "duration_seconds": frames / 50, "weight": 1.0}
            index.append({**facts, **more, **extent, "licence": "CC0-1.0", "withdrawn": False})
    table = shard.index_table(index)
    (root / "index.parquet").write_bytes(shard.table_bytes(table))
    (root / "card" / "index.html").write_text("<!doctype html><title>card</title><p id=card>The data card's own text")
    info = {
        "schema_version": shard.SCHEMA_VERSION,
        "codec": codecs.describe(codec),
        "dataset_version": shard.dataset_version(table),
        "counts": {"rows": len(rows), "tracks": len(rows), "rejects": 0, "hours": table.num_rows * 6 / 3600},
    }
    (root / "dataset.json").write_text(json.dumps(info))
    return root
