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
    """Samples [N, C] as a file's bytes; 16-bit ones are rounded here, because the writers do it each in its own way."""
    out = io.BytesIO()
    if subtype == "PCM_16":
        samples = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
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
def aws() -> Any:
    """Keys for the local S3 server; set before Ray starts, so that its workers have them too."""
    names = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def local_ray(aws: None) -> Any:
    """One real local Ray for every test that needs it; returns its address."""
    import ray

    from pipelines import cluster

    # room for two drivers with one worker of each kind: this process, and the child of the kill test
    cluster.start(cluster.RunConfig(cores=2, object_store_mb=200))
    yield ray.get_runtime_context().gcs_address
    cluster.stop()


def digests(out: Path | str) -> dict[str, str]:
    """Hashes of the shard files."""
    import hashlib

    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(out, "shards").glob("*.tar"))}


@pytest.fixture(scope="session")
def s3_server(aws: None) -> Any:
    """A local server that speaks S3, with the bucket `music`; yields host:port."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="music")
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def s3_root(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A URI in the bucket, fresh for this test."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"s3://music/{name}?scheme=http&endpoint_override={s3_server.replace(':', '%3A')}&region=us-east-1"
