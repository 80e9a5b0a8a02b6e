"""The tracks of a data set as an old tape would have them: music with a sound that the model has not heard.

The demo's artists share their styles' instruments, so a model that knows the styles has little to learn from one more
artist. A sound of one's own is what people fine-tune on: here the tokens are decoded, slowed by a semitone (32 kHz read
as 30.2 kHz) and band-limited to 3 kHz, and encoded again.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soxr
import torch

from pipelines import shard
from pipelines.store import Place

if TYPE_CHECKING:
    from musicgen.codec import Codec
    from training.sources import Sources

SEMITONE = 2 ** (1 / 12)
BAND_HZ = 6000  # sampled at twice 3 kHz on the way


def old_tape(audio: np.ndarray, rate: int) -> np.ndarray:
    """`[C, N]` at `rate` Hz to `[C, 1.06 N]` at the same rate: a semitone lower and slower, nothing above 3 kHz."""
    low = soxr.resample(audio.T, round(rate / SEMITONE), BAND_HZ)
    return np.ascontiguousarray(soxr.resample(low, BAND_HZ, rate).T, dtype=np.float32)


@torch.no_grad()
def write(shards: Sources, rows: list[int], codec: Codec, folder: Path) -> Path:
    """A data set of these rows as from an old tape, all in the split `train`; returns its folder.

    Captions, works, artists and licences are those of the originals; the melody is not carried over. A folder made of
    the same tracks stays as it is, one of others is made anew. Tracks that two sets of a mixture share are taken once.
    """
    keys = shards.index.column("key")
    once = {keys[row].as_py(): row for row in reversed(rows)}
    made_from = hashlib.sha256("\n".join([codec.identity, *sorted(once)]).encode()).hexdigest()
    described = Place.at(str(folder)) / "dataset.json"
    if described.is_file():
        if shard.read_info(described.parent).get("made_from") == made_from:
            return folder
        shutil.rmtree(folder)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    records: list[shard.Record] = []
    index: dict[str, dict[str, Any]] = {}
    for _, row in sorted(once.items()):
        audio = codec.decode(torch.from_numpy(shards.codes(row).astype(np.int64))[None])[0].cpu().numpy()
        codes = codec.encode_track(old_tape(audio, codec.sample_rate))
        records.append(shard.make_record(codes, np.full(-(-codes.shape[1] // 6), 255), shards.meta(row)))
        entry = shards.index.slice(row, 1).to_pylist()[0]
        seconds = codes.shape[1] / shards.info["codec"]["frame_rate"]
        changed = {"shard": "shards/train-00000.tar", "split": "train", "frames": codes.shape[1]}
        index[entry["key"]] = {**entry, **changed, "duration_seconds": seconds}
    for extent in shard.write_tar(str(folder / "shards" / "train-00000.tar"), records):
        index[str(extent["key"])] |= extent
    table = shard.index_table(list(index.values()))
    (folder / "index.parquet").write_bytes(shard.table_bytes(table))
    info = {"schema_version": shard.SCHEMA_VERSION, "codec": shards.info["codec"]}
    document = {**info, "dataset_version": shard.dataset_version(table), "made_from": made_from}
    described.write(shard.json_bytes(document))
    return folder
