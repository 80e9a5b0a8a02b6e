"""Audio for codec training: a PCM cache made once from a catalogue, and crops addressed by (seed, step, item).

Decoding for every crop would cost more than the network on a laptop, so the tracks of a catalogue are decoded once to
16-bit PCM at the codec's rate and channels, back to back in one file per split, memory-mapped afterwards. Rights,
decoding, level checks and the split are the ones of ingest: a track that may not become tokens may not train a codec.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from musicgen.codec import CodecConfig
from musicgen.errors import UserError
from pipelines import audio
from pipelines.assemble import SplitConfig, split_groups, split_of
from pipelines.catalog import Row
from pipelines.catalog import read as read_catalog
from pipelines.checks import CheckConfig
from pipelines.checks import first as first_problem
from pipelines.rights import RightsConfig, admit
from pipelines.store import Place


@dataclass(frozen=True)
class Pcm:
    """PCM of one split: `samples [C, N_total]` int16 (memory-mapped), `starts [num_tracks + 1]`, `track_ids`."""

    samples: np.ndarray
    starts: np.ndarray
    track_ids: list[str]

    @property
    def hours(self) -> float:
        """Length at 32 kHz, in hours."""
        return self.samples.shape[1] / 32_000 / 3600

    def track(self, number: int) -> np.ndarray:
        """One track `[C, N]` float32 in -1…1."""
        return self.samples[:, self.starts[number] : self.starts[number + 1]].astype(np.float32) / 32_768


def open_cache(folder: str | Path, split: str) -> Pcm:
    """Open a split of a PCM cache; raises `UserError` when it isn't there."""
    folder = Path(folder)
    described = folder / f"{split}.json"
    if not described.is_file():
        raise UserError(f"no PCM of split {split!r} in {folder}; make it with `make codec DATA=<catalogue>`")
    about = json.loads(described.read_text())
    starts = np.asarray(about["starts"], dtype=np.int64)
    shape = (int(about["channels"]), int(starts[-1]))
    if shape[1] == 0:
        return Pcm(np.zeros(shape, np.int16), starts, [])
    flat = np.memmap(folder / f"{split}.pcm16", dtype=np.int16, mode="r", shape=(shape[1], shape[0]))
    return Pcm(flat.T, starts, about["track_ids"])


def write_cache(folder: str | Path, split: str, tracks: Iterator[tuple[str, np.ndarray]], channels: int) -> None:
    """Write tracks `(track_id, audio [C, N] float32)` as a split of the cache; whole or absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts, ids = [0], []
    scratch = folder / f"{split}.pcm16.partial"
    with scratch.open("wb") as file:
        for track_id, audio in tracks:
            pcm = np.clip(np.rint(audio * 32_768), -32_768, 32_767).astype(np.int16)
            file.write(np.ascontiguousarray(pcm.T).tobytes())
            starts.append(starts[-1] + pcm.shape[1])
            ids.append(track_id)
    os.replace(scratch, folder / f"{split}.pcm16")
    about = json.dumps({"channels": channels, "starts": starts, "track_ids": ids})
    (folder / f"{split}.json.partial").write_text(about)
    os.replace(folder / f"{split}.json.partial", folder / f"{split}.json")


def prepare(source: str, cache: Path, shape: CodecConfig, splits: SplitConfig, workers: int = 2) -> Path:
    """The PCM cache of `source`: itself when it is one, else made in `cache` from a catalogue (once).

    Rows pass the same rights gate, decoder, checks and split as in ingest; what is refused is counted and named in
    `cache/rejects.json`.

    Raises:
        UserError: neither a cache nor a catalogue, or no admissible track in a split.
    """
    if (Path(source) / "train.json").is_file():
        return Path(source)
    if (cache / "train.json").is_file() and (cache / "valid.json").is_file():
        return cache
    catalog = read_catalog(source)
    rights = RightsConfig()
    admitted = [row for row in catalog.rows if not row.problems and admit(row.rights, rights, rights.day()) is None]
    groups = split_groups(admitted)
    rejects = {str(row.track_id): "row or rights" for row in catalog.rows if row not in admitted}
    for split in ("train", "valid"):
        rows = [row for row in admitted if split_of(groups[str(row.track_id)], splits) == split]
        if not rows:
            raise UserError(f"DATA {source!r} has no admissible track in split {split!r}; two splits are needed")
        write_cache(cache, split, _decode_all(rows, catalog.folder, shape, rejects, workers, split), shape.channels)
    (cache / "rejects.json").write_text(json.dumps(rejects, indent=1))
    return cache


def _decode_all(
    rows: list[Row], folder: Place, shape: CodecConfig, rejects: dict[str, str], workers: int, split: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Decoded, checked and resampled tracks in catalogue order, with a bar; refusals go to `rejects`."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import local

    from rich.progress import track

    limits, mine = CheckConfig(), local()

    def one(row: Row) -> tuple[Row, np.ndarray | str]:
        if not hasattr(mine, "decoder"):
            mine.decoder = audio.Decoder(audio.DecodeConfig(), limits.max_seconds)
        try:
            decoded = mine.decoder.decode(folder.join(row.values["uri"]).read())
            audio.verify(decoded, limits)
        except (audio.DecodeError, OSError) as error:
            return row, str(error)
        refused = first_problem(decoded.pcm, decoded.sample_rate_hz, limits)
        if refused is not None:
            return row, refused.message
        return row, audio.prepare(decoded.pcm, decoded.sample_rate_hz, shape.sample_rate_hz, shape.channels)

    with ThreadPoolExecutor(workers) as pool:
        for start in track(range(0, len(rows), 16), description=f"decoding {split}"):
            for row, result in pool.map(one, rows[start : start + 16]):
                if isinstance(result, str):
                    rejects[str(row.track_id)] = result
                else:
                    yield str(row.track_id), result


def crops(pcm: Pcm, *, seed: int, step: int, rank: int, batch_size: int, num_samples: int) -> np.ndarray:
    """The crops of one step on one rank: `[B, C, num_samples]` float32.

    Tracks are drawn by length, starts uniformly, gain by up to ±6 dB downward-biased; item `i` of the global batch
    depends on (seed, step, i) only. Tracks shorter than a crop are padded with silence.
    """
    out = np.zeros((batch_size, pcm.samples.shape[0], num_samples), np.float32)
    total = int(pcm.starts[-1])
    for row in range(batch_size):
        rng = np.random.default_rng([seed, step, rank * batch_size + row])
        track = int(np.searchsorted(pcm.starts, rng.integers(total), side="right")) - 1
        begin, end = int(pcm.starts[track]), int(pcm.starts[track + 1])
        start = begin + int(rng.integers(max(1, end - begin - num_samples + 1)))
        piece = pcm.samples[:, start : min(end, start + num_samples)].astype(np.float32) / 32_768
        out[row, :, : piece.shape[1]] = piece * 10 ** (rng.uniform(-6, 1.5) / 20)
    return out


class CropStream(IterableDataset[Tensor]):
    """Batches of consecutive steps, from `first_step` on; the loader's whole state is that number."""

    def __init__(self, pcm: Pcm, *, seed: int, batch_size: int, num_samples: int, rank: int = 0) -> None:
        self.pcm, self.seed, self.batch_size, self.num_samples, self.rank = pcm, seed, batch_size, num_samples, rank
        self.first_step = 0

    def batch(self, step: int) -> Tensor:
        """The batch of one step: `[B, C, num_samples]` float32."""
        audio = crops(
            self.pcm, seed=self.seed, step=step, rank=self.rank,
            batch_size=self.batch_size, num_samples=self.num_samples,
        )  # fmt: skip
        return torch.from_numpy(audio)

    def __iter__(self) -> Iterator[Tensor]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1
