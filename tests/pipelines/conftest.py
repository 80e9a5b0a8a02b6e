"""Small real things for the pipeline's tests: synthesised tracks, catalogues, one Ray for the whole session."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

TODAY = "2026-11-01"


def tone(seed: int, seconds: float = 2.5, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """A few notes with overtones, [N, C] float32; another seed is other music."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    wave = np.zeros(t.size)
    for start in np.arange(0, seconds, 0.5):
        pitch = 220 * 2 ** (rng.integers(0, 12) / 12)
        on = (t >= start) * np.exp(-3 * np.clip(t - start, 0, None))
        wave += on * sum(np.sin(2 * np.pi * pitch * h * t) / h for h in (1, 2, 3))
    wave = 0.2 * wave / np.abs(wave).max()
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """Samples [N, C] as a file's bytes."""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, subtype=subtype)
    return out.getvalue()


def rights(**changes: Any) -> dict[str, Any]:
    """A rights record that is admitted, with changes (None takes a field away)."""
    record: dict[str, Any] = {
        "rightsholders": [{"party": "Example Music", "share": 100.0, "role": "master"}],
        "licence": "CC-BY-4.0",
        "licence_doc_sha256": "ab" * 32,
        "grants": ["train", "generate_commercially"],
        "territory": ["WORLD"],
        "valid_from": "2024-01-01",
        "valid_until": "2030-12-31",
        "consent_evidence": "contract 7, signed 2024-01-01",
        "status": "active",
        **changes,
    }
    return {k: v for k, v in record.items() if v is not None}


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A catalogue row that is admitted; its audio is `audio/t<number>.wav`."""
    return {
        "track_id": f"t{number:03d}",
        "uri": f"audio/t{number:03d}.wav",
        "title": f"Piece {number}",
        "artist": f"Artist {number % 7}",
        "work": f"Work {number}",
        "genre": ["folk", "waltz", "ragtime"][number % 3],
        "moods": ["calm", "warm"],
        "instruments": ["piano", "double bass"],
        "bpm": 90.0 + number,
        "key": "C major",
        "language": "en",
        "region": "Europe",
        "era": "1800s",
        "descriptions": [
            {"text": f"A quiet piece, number {number}.", "language": "en"},
            {"text": f"Ein ruhiges Stück, Nummer {number}", "language": "de"},
        ],
        "rights": rights(),
        **changes,
    }


def write_rows(folder: Path, rows: list[dict[str, Any]], *, audio: bool = True) -> str:
    """Write catalog.jsonl and the audio that its rows name (where no file stands yet); returns the catalogue's path."""
    for at, item in enumerate(rows):
        if audio and item.get("uri", "").endswith(".wav") and not (folder / item["uri"]).exists():
            path = folder / item["uri"]
            path.parent.mkdir(parents=True, exist_ok=True)
            digits = "".join(c for c in Path(item["uri"]).stem if c.isdigit())
            path.write_bytes(wav(tone(int(digits or at))))
    catalogue = folder / "catalog.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    catalogue.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return str(catalogue)


@pytest.fixture(scope="session")
def local_ray() -> Any:
    """One real local Ray for every test that needs it; returns its address."""
    import ray

    from pipelines import cluster

    cluster.start(cluster.RunConfig(cores=2, object_store_mb=200))
    yield ray.get_runtime_context().gcs_address
    cluster.stop()


@pytest.fixture
def ingest(local_ray: str) -> Any:
    """`ingest(catalog, out, *more)` runs the command in this process with a tiny codec; returns the exit code."""
    from pipelines import ingest as command

    def call(catalogue: str, out: Path | str, *more: str) -> int:
        base = ["--codec", "tiny", "--analysis", "builtin", "--buckets", "2", "--rights.today", TODAY]
        base += ["--splits.train", "0.6", "--splits.valid", "0.2", "--splits.test", "0.2"]
        return command.main(["--catalog", catalogue, "--out", str(out), *base, *more])

    return call


def digests(out: Path | str) -> dict[str, str]:
    """Hashes of the shard files."""
    import hashlib

    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(out, "shards").glob("*.tar"))}
