"""The shard format: writer, reader and index together. This file is the contract between ingest and training.

    OUT/shards/<split>-<bucket>.tar   per track <key>.codes.npy (int16 [K, T]), <key>.chroma.npy (uint8 [T_c]) and
                                      <key>.json, in this order; chroma is [1 + n, T_c] in a set with n variants
    OUT/index.parquet                 one row per track, sorted by (shard, key), with byte offsets into the tars
    OUT/dataset.json                  codec identity, settings, version, hashes of index and shards; written last

The tars are plain WebDataset shards. Member times and owners are zero and order is by key, so equal tracks give equal
bytes. Training reads at random through the index: codes are memory-mapped when the set is on the local disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from musicgen.errors import UserError
from pipelines.store import Place, parquet

SCHEMA_VERSION = 1
SPLITS = ("train", "valid", "test")
PAYLOADS = ("codes", "chroma", "json")

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("track_id", pa.string()),
        ("shard", pa.string()),
        ("split", pa.string()),
        ("artist", pa.string()),
        ("work", pa.string()),
        ("genre", pa.string()),
        ("language", pa.string()),
        ("frames", pa.int32()),
        ("weight", pa.float32()),
        ("duration_seconds", pa.float64()),
        ("codes_offset", pa.int64()),
        ("codes_bytes", pa.int64()),
        ("chroma_offset", pa.int64()),
        ("chroma_bytes", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_bytes", pa.int64()),
        ("licence", pa.string()),
        ("withdrawn", pa.bool_()),
        ("sha256", pa.string()),
    ]
)
_MAY_BE_EMPTY = ("work", "genre", "language")
_SHARD_NAME = re.compile(r"shards/[^/\\]+\.tar")

# What dataset.json must hold to be read; what ingest writes besides, and reads when it runs again.
_INFO: dict[str, Any] = {
    "dataset_version": str,
    "codec": {
        "name": str,
        "identity": str,
        "frame_rate": float,
        "num_codebooks": int,
        "codebook_size": int,
        "sample_rate_hz": int,
    },
}
_WORDS = {str(str): "text", str(int): "a whole number", str(float): "a number"}
_INGESTED: dict[str, Any] = {
    "settings": dict,
    "shards": dict,
    "counts": {"tracks": int, "rejects": int, "hours": float, "tracks_by_split": {"train": int}},
}


@dataclass(frozen=True)
class Record:
    """One track on its way into a shard: three payloads as the bytes that the tar will hold."""

    key: str
    codes: bytes
    chroma: bytes
    json: bytes

    @property
    def sha256(self) -> str:
        """Hash of the three payloads, one after the other."""
        return hashlib.sha256(self.codes + self.chroma + self.json).hexdigest()


def same(name: str) -> str:
    """A name as it counts for linking: case, width and blanks do not matter."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file, C order."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def npy_array(buffer: Any) -> np.ndarray:
    """The array in a .npy buffer, without copying it. Raises `ValueError` on anything else."""
    head = io.BytesIO(bytes(buffer[:512]))
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("expected a version 1.0 .npy payload")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    if fortran or dtype.hasobject:
        raise ValueError("expected a plain C-order .npy payload")
    return np.frombuffer(buffer, dtype=dtype, offset=head.tell(), count=int(np.prod(shape))).reshape(shape)


def json_bytes(meta: dict[str, Any]) -> bytes:
    """Metadata as canonical JSON: sorted keys, UTF-8, nothing that differs between two runs."""
    return json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def make_record(codes: np.ndarray, chroma: np.ndarray, meta: dict[str, Any]) -> Record:
    """A track's record from codes [K, T] (any integer type), chroma [T_c] or [1 + n, T_c], metadata (with `key`)."""
    if codes.ndim != 2 or chroma.ndim not in (1, 2):
        raise ValueError(f"expected codes [K, T] and chroma [T_c] or [1 + n, T_c], got {codes.shape}, {chroma.shape}")
    as_int16 = npy_bytes(codes.astype(np.int16))
    return Record(meta["key"], as_int16, npy_bytes(chroma.astype(np.uint8)), json_bytes(meta))


def write_tar(path: str, records: Iterable[Record]) -> list[dict[str, int | str]]:
    """Write a shard to a local path; returns per track the offsets and sizes of its payloads and its hash.

    Records must come in ascending order of key. The file is not synced or renamed here; see `Place.put_file`.
    """
    rows: list[dict[str, int | str]] = []
    last = ""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            if record.key <= last:
                raise ValueError(f"records must ascend by key: {record.key} after {last}")
            last = record.key
            row: dict[str, int | str] = {"key": record.key, "sha256": record.sha256}
            for name, payload in zip(("codes.npy", "chroma.npy", "json"), (record.codes, record.chroma, record.json)):
                member = tarfile.TarInfo(f"{record.key}.{name}")
                member.size, member.mtime, member.mode = len(payload), 0, 0o644
                kind = name.split(".")[0]
                row[f"{kind}_offset"] = tar.offset + tarfile.BLOCKSIZE  # a ustar header with a short name is one block
                row[f"{kind}_bytes"] = len(payload)
                tar.addfile(member, io.BytesIO(payload))
            rows.append(row)
    return rows


def index_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """The index of a set: rows sorted by (shard, key), in the fixed schema."""
    ordered = sorted(rows, key=lambda r: (r["shard"], r["key"]))
    return pa.Table.from_pylist(ordered, schema=INDEX_SCHEMA)


def table_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a parquet file."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def dataset_version(index: pa.Table) -> str:
    """Hash of the index's content (not of its parquet bytes, which a library version may change)."""
    digest = hashlib.sha256()
    for row in index.to_pylist():
        digest.update(json_bytes(row) + b"\n")
    return digest.hexdigest()


class ShardSet:
    """A finished data set, opened for random access. Build with `ShardSet.open(uri)`.

    Attributes:
        info: contents of dataset.json.
        index: the index as a pyarrow table, one row per track.

    Pickles without its open files, so it can travel to data-loader workers.
    """

    def __init__(self, root: Place, info: dict[str, Any], index: pa.Table) -> None:
        self.root = root
        self.info = info
        self.index = index
        columns = index.select([f"{p}_{what}" for p in PAYLOADS for what in ("offset", "bytes")])
        self._extent = {name: column.to_numpy() for name, column in zip(columns.column_names, columns.columns)}
        self._shard = index.column("shard").to_pylist()
        self._maps: dict[str, tuple[mmap.mmap, tuple[int, ...]]] = {}

    @classmethod
    def open(cls, uri: str) -> ShardSet:
        """Open the set at a URI or path.

        Raises:
            UserError: there is no finished set, it was written by another version of the format, its dataset.json or
                index is damaged, or the index is not the one that dataset.json describes.
        """
        root, info = Place.at(uri), described(uri)
        return cls(root, info, read_index(root, info))

    def __len__(self) -> int:
        return self.index.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def rows(self, split: str) -> np.ndarray:
        """Row numbers (int64) of a split in index order; withdrawn tracks are left out."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        split_of, withdrawn = (self.index.column(c).to_pylist() for c in ("split", "withdrawn"))
        wanted = [s == split and not w for s, w in zip(split_of, withdrawn)]
        return np.flatnonzero(np.asarray(wanted, dtype=bool)).astype(np.int64)

    def codes(self, row: int) -> np.ndarray:
        """Codes of a track, int16 [K, T]; a read-only view of the mapped file when the set is local."""
        return npy_array(self._payload(row, "codes"))

    def chroma(self, row: int) -> np.ndarray:
        """Dominant chroma bin per chroma frame, uint8 [T_c]; 0-11, 255 = none."""
        return self.chromas(row)[0]

    def chromas(self, row: int) -> np.ndarray:
        """The track's chroma, then that of its degraded variants if the set has any: uint8 [1 + n, T_c]."""
        return np.atleast_2d(npy_array(self._payload(row, "chroma")))

    def meta(self, row: int) -> dict[str, Any]:
        """The track's metadata: descriptions, caption variants, rights, analysis, hashes."""
        return json.loads(bytes(self._payload(row, "json")))

    def record(self, row: int) -> Record:
        """The three payloads as bytes. Raises `ValueError` when they are not the ones that the index names."""
        record = Record(
            self.index.column("key")[row].as_py(), *(bytes(self._payload(row, payload)) for payload in PAYLOADS)
        )
        if record.sha256 != self.index.column("sha256")[row].as_py():
            raise ValueError(f"{self._shard[row]}: track {record.key} does not match the index")
        return record

    def _payload(self, row: int, payload: str) -> Any:
        offset, size = int(self._extent[f"{payload}_offset"][row]), int(self._extent[f"{payload}_bytes"][row])
        shard = self._shard[row]
        if not self.root.local:
            return (self.root / shard).read_range(offset, size)
        if shard not in self._maps:
            with open((self.root / shard).path, "rb") as handle:
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[shard] = mapped, _state_of(os.fstat(handle.fileno()))
        return memoryview(self._maps[shard][0])[offset : offset + size]

    def forget_if_changed(self, row: int) -> bool:
        """Close the shard of a row where it is another file, or changed, since it was opened; whether that was so.

        The next reading opens what is there then. A mapped file stays readable after it was deleted or replaced, and
        may change or end under its reader.
        """
        shard = self._shard[row]
        if shard not in self._maps:
            return False
        try:
            now = _state_of(os.stat((self.root / shard).path))
        except FileNotFoundError:
            now = ()
        if now == self._maps[shard][1]:
            return False
        del self._maps[shard]
        return True

    def neighbours(self, row: int) -> np.ndarray:
        """Row numbers (int64) of all tracks in the shard of a row."""
        return np.flatnonzero(np.asarray(self._shard) == self._shard[row]).astype(np.int64)


def _state_of(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def described(uri: str) -> dict[str, Any]:
    """dataset.json of the finished set at a URI or path. Raises `UserError` where there is none, and as `read_info`."""
    root = Place.at(uri)
    if not (root / "dataset.json").is_file():
        state = "exists but holds no finished data set" if root.exists() else "does not exist"
        raise UserError(f"DATA={uri!r} {state} (no dataset.json). Run `make ingest CATALOG=… OUT={uri}` first")
    return read_info(root)


def read_info(root: Place, *, ingested: bool = False) -> dict[str, Any]:
    """dataset.json of the set at `root`.

    Args:
        ingested: ask for what ingest needs when it runs again, not only for what training reads.

    Raises:
        UserError: it is not JSON, lacks something, holds it as another type, or has another schema version.
    """
    place = root / "dataset.json"
    try:
        info = json.loads(place.read())
    except (ValueError, RecursionError) as error:
        raise damaged(place, f"it is not JSON ({error})") from error
    if not isinstance(info, dict):
        raise damaged(place, f"it holds {type(info).__name__}, expected an object")
    if info.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{root}: data set of schema version {info.get('schema_version')}, this program reads "
            f"{SCHEMA_VERSION}; ingest the catalogue again into a new folder"
        )
    fault = _misfit(info, {**_INFO, **(_INGESTED if ingested else {})})
    if not fault and not re.fullmatch("[0-9a-f]{64}", info["dataset_version"]):
        fault = f"dataset_version is {info['dataset_version']!r}, expected 64 hexadecimal digits"
    numbers = {name: value for name, value in info["codec"].items() if name in _INFO["codec"]} if not fault else {}
    for name, value in numbers.items():
        if not fault and not isinstance(value, str) and not 0 < value < float("inf"):
            fault = f"codec.{name} is {value!r}, expected a number above 0"
    if not fault and "shards" in info and not _maps_texts(info["shards"]):
        fault = "shards is no object of names and hashes"
    if fault:
        raise damaged(place, fault)
    return info


def _misfit(tree: dict[str, Any], shape: dict[str, Any], prefix: str = "") -> str:
    """The first fault of a document against names and types, in words; empty where there is none."""
    for name, kind in shape.items():
        if name not in tree:
            return f"{prefix}{name} is missing"
        value: Any = tree[name]
        types = dict if isinstance(kind, dict) else (int, float) if kind is float else kind
        if not isinstance(value, types) or isinstance(value, bool):
            return f"{prefix}{name} is {str(value)[:60]!r}, expected {_WORDS.get(str(kind), 'an object')}"
        if isinstance(kind, dict) and (fault := _misfit(tree[name], kind, f"{prefix}{name}.")):
            return fault
    return ""


def _maps_texts(tree: Any) -> bool:
    return isinstance(tree, dict) and all(isinstance(value, str) for value in tree.values())


def damaged(place: Place, why: str) -> UserError:
    """The error of a file of a set that is not what ingest wrote."""
    return UserError(
        f"{place} is damaged: {why}. Restore it from where the set was made, or delete this file and run "
        f"`make ingest CATALOG=… OUT={place.parent}` again, which makes it anew and keeps what is whole"
    )


def read_table(place: Place, schema: pa.Schema, may_be_empty: Sequence[str]) -> tuple[pa.Table, str]:
    """A table of a set and the sha256 of its file. Raises `UserError` where it cannot be read or has another schema."""
    try:
        data = place.read()
    except FileNotFoundError as error:
        raise damaged(place, "it is missing") from error
    try:
        table = parquet(data)
        lacking = [name for name in schema.names if name not in table.column_names]
        table = table if lacking else table.select(schema.names).cast(schema)
    except Exception as error:  # pyarrow raises many kinds on a file that is not what it should be
        raise damaged(place, f"it is not the parquet file that ingest writes ({str(error)[:200]})") from error
    if lacking:
        raise damaged(place, f"columns are missing: {', '.join(lacking)}")
    empty = [name for name in schema.names if name not in may_be_empty and table.column(name).null_count]
    if empty:
        raise damaged(place, f"columns have empty cells: {', '.join(empty)}")
    return table, hashlib.sha256(data).hexdigest()


def read_index(root: Place, info: dict[str, Any]) -> pa.Table:
    """The index table of the set at `root`.

    Args:
        info: dataset.json, whose `index_sha256` the file must have, or `dataset_version` its content; empty while a
            commit is unfinished, when nothing says what the index was.

    Raises:
        UserError: it is damaged, or not the index that dataset.json describes.
    """
    place = root / "index.parquet"
    table, sha256 = read_table(place, INDEX_SCHEMA, _MAY_BE_EMPTY)
    if info and info.get("index_sha256") != sha256 and not _has_version(table, info["dataset_version"]):
        raise damaged(
            place, "it was changed since dataset.json was written (what is withdrawn is said in the catalogue)"
        )
    odd = next((name for name in table.column("shard").unique().to_pylist() if not _SHARD_NAME.fullmatch(name)), None)
    if odd is not None:
        raise damaged(place, f"it names the shard {odd!r}, expected shards/NAME.tar")
    return table


def _has_version(table: pa.Table, version: str) -> bool:
    try:
        return dataset_version(table) == version
    except ValueError:  # numbers that no index has
        return False
