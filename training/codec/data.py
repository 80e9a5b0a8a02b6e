"""Audio for codec training: a PCM cache made once, and crops of it addressed by (seed, step, item).

Decoding for every crop would cost more than the network on a laptop, so the admitted tracks (training.codec.sources)
are decoded once to 16-bit PCM at the codec's rate and channels, back to back in one file per split, memory-mapped
afterwards. Any split of the ranks sees the same crops: an item's address is its place in the global batch.
"""

from __future__ import annotations

import fcntl
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
from pipelines.assemble import SplitConfig
from training.codec import sources

SOUNDS = "sounds.json"


@dataclass(frozen=True)
class Pcm:
    """PCM of one split: `samples [C, N_total]` int16 (memory-mapped), `starts [num_tracks + 1]`, `track_ids`."""

    samples: np.ndarray
    starts: np.ndarray
    track_ids: list[str]
    sample_rate_hz: int = 32_000

    @property
    def hours(self) -> float:
        """Length in hours."""
        return self.samples.shape[1] / self.sample_rate_hz / 3600

    def track(self, number: int) -> np.ndarray:
        """One track `[C, N]` float32 in -1…1."""
        return self.samples[:, self.starts[number] : self.starts[number + 1]].astype(np.float32) / 32_768


def open_cache(folder: str | Path, split: str, shape: CodecConfig | None = None) -> Pcm:
    """Open a split of a PCM cache; raises `UserError` when it isn't there, is damaged, or does not fit `shape`."""
    folder = Path(folder)
    described = folder / f"{split}.json"
    if not described.is_file():
        raise UserError(f"no PCM of split {split!r} in {folder}; make it with `make codec DATA=<catalogue>`")

    def damaged(how: str) -> UserError:
        return UserError(
            f"the PCM of split {split!r} in {folder} is damaged ({how}); delete {folder} and give the catalogue or the "
            "audio shards it was made from as DATA"
        )

    try:
        about = json.loads(described.read_text())
        rate, channels = int(about.get("sample_rate_hz", 32_000)), int(about["channels"])
        starts, ids = np.asarray(about["starts"], dtype=np.int64), [str(name) for name in about["track_ids"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise damaged(f"{described.name} is cut short or none of ours") from None
    if shape is not None and (rate, channels) != (shape.sample_rate_hz, shape.channels):
        raise UserError(
            f"DATA {str(folder)!r} holds PCM of {rate} Hz and {channels} channel(s); this codec takes "
            f"{shape.sample_rate_hz} Hz and {shape.channels}. Give the catalogue or the audio shards it was made from"
        )
    if starts.ndim != 1 or len(starts) != len(ids) + 1 or starts[0] or (np.diff(starts) < 0).any() or channels < 1:
        raise damaged(f"{described.name} places no tracks")
    size = (channels, int(starts[-1]))
    if size[1] == 0:
        return Pcm(np.zeros(size, np.int16), starts, [], rate)
    sound = folder / f"{split}.pcm16"
    held = sound.stat().st_size if sound.is_file() else 0
    if held != 2 * size[0] * size[1]:
        raise damaged(f"{sound.name} holds {held} bytes instead of {2 * size[0] * size[1]}")
    flat = np.memmap(sound, dtype=np.int16, mode="r", shape=(size[1], size[0]))
    return Pcm(flat.T, starts, ids, rate)


def write_cache(
    folder: str | Path,
    split: str,
    tracks: Iterator[tuple[str, np.ndarray]],
    channels: int,
    sample_rate_hz: int = 32_000,
) -> None:
    """Write tracks `(track_id, audio [C, N] float32)` as a split of the cache; whole or absent.

    Raises:
        UserError: other channels, or samples that are not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts, ids = [0], []
    scratch = folder / f"{split}.pcm16.partial"
    with scratch.open("wb") as file:
        for track_id, audio in tracks:
            if audio.ndim != 2 or audio.shape[0] != channels or not np.isfinite(audio).all():
                raise UserError(
                    f"track {track_id!r} has shape {list(audio.shape)} and "
                    f"{int((~np.isfinite(audio)).sum())} samples that are not finite; finite audio [{channels}, N] is "
                    "needed"
                )
            pcm = np.clip(np.rint(audio * 32_768), -32_768, 32_767).astype(np.int16)
            file.write(np.ascontiguousarray(pcm.T).tobytes())
            starts.append(starts[-1] + pcm.shape[1])
            ids.append(track_id)
    os.replace(scratch, folder / f"{split}.pcm16")
    about = json.dumps({"channels": channels, "sample_rate_hz": sample_rate_hz, "starts": starts, "track_ids": ids})
    (folder / f"{split}.json.partial").write_text(about)
    os.replace(folder / f"{split}.json.partial", folder / f"{split}.json")


def _make(chosen: sources.Selection, source: str, cache: Path, shape: CodecConfig, workers: int) -> None:
    """Decode what was chosen into the cache; see `prepare`."""
    known = _known_sounds(cache)
    barred = sources.sounds_taken_down(chosen, known, workers)
    for split, tracks in chosen.splits.items():
        decoded = sources.decode(tracks, shape, chosen.rejects, workers, split, barred, known)
        write_cache(cache, split, decoded, shape.channels, shape.sample_rate_hz)
        if not open_cache(cache, split, shape).track_ids:
            raise UserError(
                f"no track of split {split!r} in DATA {source!r} passed the checks; the last one: "
                f"{chosen.rejects[str(tracks[-1].row.track_id)]}"
            )
    _keep_sounds(cache, known)
    (cache / "rejects.json").write_text(json.dumps(chosen.rejects, indent=1, ensure_ascii=False))
    if chosen.rejects:
        print(f"{len(chosen.rejects)} tracks refused; the reasons are in {cache / 'rejects.json'}", flush=True)


def _known_sounds(cache: Path) -> dict[str, list[str]]:
    """Hashes of what was decoded into the cache before, by track id: what is taken down later is known by them."""
    try:
        found = json.loads((cache / SOUNDS).read_text())
        return {str(track_id): [str(sha256) for sha256 in hashes] for track_id, hashes in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{cache / SOUNDS} is damaged; delete {cache}, and the catalogue is read anew") from None


def _keep_sounds(cache: Path, known: dict[str, list[str]]) -> None:
    (cache / f"{SOUNDS}.partial").write_text(json.dumps(known, indent=0, sort_keys=True))
    os.replace(cache / f"{SOUNDS}.partial", cache / SOUNDS)


def prepare(source: str, cache: Path, shape: CodecConfig, splits: SplitConfig, workers: int = 2) -> Path:
    """The PCM cache of `source`: itself when it is one, else `cache`, made from a catalogue or from audio shards.

    A cache is made once, and anew when rows, rights, split, rate or channels have changed since. What was refused is
    counted and named in `cache/rejects.json`.

    Raises:
        UserError: no audio there, or none that is admissible in one of the splits.
    """
    if "://" not in source and (Path(source) / "train.json").is_file():
        return Path(source)
    chosen = sources.select(source, splits)
    digest, made_from = chosen.digest(shape, splits), cache / "made-from"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:  # several ranks: the first makes it, the others find it made
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not made_from.is_file() or made_from.read_text() != digest:
            made_from.unlink(missing_ok=True)
            _make(chosen, source, cache, shape, workers)
            made_from.write_text(digest)
    return cache


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
    """This rank's part of the batches of consecutive steps, from `first_step` on; its whole state is that number.

    `batch_size` counts the crops of all `world` ranks.
    """

    def __init__(
        self, pcm: Pcm, *, seed: int, batch_size: int, num_samples: int, rank: int = 0, world: int = 1
    ) -> None:
        self.pcm, self.seed, self.batch_size, self.num_samples = pcm, seed, batch_size, num_samples
        self.rank, self.world = rank, world
        self.first_step = 0

    def batch(self, step: int) -> Tensor:
        """This rank's crops of one step: `[B / world, C, num_samples]` float32."""
        return self._crops(step, self.rank, self.batch_size // self.world)

    def whole_batch(self, step: int) -> Tensor:
        """The crops of all ranks: `[B, C, num_samples]` float32."""
        return self._crops(step, 0, self.batch_size)

    def _crops(self, step: int, rank: int, count: int) -> Tensor:
        ask = {"seed": self.seed, "step": step, "rank": rank, "batch_size": count, "num_samples": self.num_samples}
        return torch.from_numpy(crops(self.pcm, **ask))

    def __iter__(self) -> Iterator[Tensor]:
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1
