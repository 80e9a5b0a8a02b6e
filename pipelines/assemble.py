"""From results of single tracks to a data set: duplicates, splits, metadata, buckets, and the commit.

Decides what depends on more than one track. Splits are disjoint by artist and by work: rows that share either are one
group, and a hash of the group's name draws its split, so that order and size of the catalogue do not matter. A track's
shard is its split and a hash bucket; a set that grew is byte for byte the set made at once, and only buckets whose
tracks changed are written again.

The commit: shards first, then index, tables and card, `dataset.json` last. While shards of an existing set are being
replaced there is no `dataset.json`, so nobody reads a half-changed set; the next run finishes it. Only shards that
ingest made are ever removed: those of its names that dataset.json, the index or an unfinished run accounts for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from musicgen.errors import UserError
from pipelines import captions, shard, stages, takedown
from pipelines.captions import CaptionConfig
from pipelines.catalog import Row
from pipelines.checks import Reject
from pipelines.rights import PERPETUAL
from pipelines.shard import Record, ShardSet
from pipelines.store import Place, clear_disk_errors
from pipelines.takedown import SOURCES, SOURCES_SCHEMA

WORK = ".work"
READERS = 8  # shards that are compared at a time: an object store answers slowly and many at once
_OWN = re.compile(rf"({'|'.join(shard.SPLITS)})-\d{{5}}\.tar")

REJECTS_SCHEMA = pa.schema(
    [
        ("track_id", pa.string()),
        ("row", pa.int64()),
        ("stage", pa.string()),
        ("code", pa.string()),
        ("message", pa.string()),
        ("source_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the split groups; they add up to 1."""

    train: float = 0.9
    valid: float = 0.05
    test: float = 0.05

    def __post_init__(self) -> None:
        if min(self.train, self.valid, self.test) < 0 or abs(self.train + self.valid + self.test - 1) > 1e-9:
            raise ValueError(
                f"splits must add up to 1: train {self.train:g} + valid {self.valid:g} + test {self.test:g} "
                f"= {self.train + self.valid + self.test:g}"
            )


def split_groups(rows: Iterable[Row]) -> dict[str, str]:
    """Split group of every row (track_id -> group): the smallest artist name among all that share artist or work."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    members: dict[str, Row] = {}
    for row in rows:
        artist = "artist:" + shard.same(row.values["artist"])
        members[str(row.track_id)] = row
        root(artist)
        if row.values["work"]:
            parent[root("work:" + shard.same(row.values["work"]))] = root(artist)
    smallest: dict[str, str] = {}
    for row in members.values():
        group, name = root("artist:" + shard.same(row.values["artist"])), row.values["artist"]
        smallest[group] = min(name, smallest.get(group, name))
    return {track_id: smallest[root("artist:" + shard.same(r.values["artist"]))] for track_id, r in members.items()}


def split_of(group: str, shares: SplitConfig) -> str:
    """The split that a group's name draws."""
    draw = int(hashlib.sha256(f"musicgen-split:{group}".encode()).hexdigest()[:16], 16) / 2**64
    if draw < shares.valid:
        return "valid"
    return "test" if draw < shares.valid + shares.test else "train"


def bucket_of(track_id: str, buckets: int) -> int:
    """Hash bucket of a track; does not change when its audio does."""
    return int(hashlib.sha256(f"bucket:{track_id}".encode()).hexdigest()[:16], 16) % buckets


def key_of(track_id: str, source_sha256: str, settings_hash: str) -> str:
    """Key of a track: 32 hexadecimal digits from its id, its source and the settings."""
    return hashlib.sha256(f"{track_id}\n{source_sha256}\n{settings_hash}".encode()).hexdigest()[:32]


def duplicates(facts: dict[str, dict[str, Any]]) -> dict[str, Reject]:
    """Rejects for all tracks whose sound equals that of a lower track_id."""
    first: dict[str, str] = {}
    found: dict[str, Reject] = {}
    for track_id in sorted(facts):
        original = first.setdefault(facts[track_id]["pcm_sha256"], track_id)
        if original != track_id:
            found[track_id] = Reject("duplicate", "duplicate", f"the same sound as track {original!r}")
    return found


@dataclass(frozen=True)
class Entry:
    """A track that goes into the set: its metadata, where it goes, and which result holds its codes."""

    track_id: str
    work_id: str
    split: str
    shard: str
    meta: dict[str, Any]
    facts: dict[str, Any]
    json: bytes

    @property
    def key(self) -> str:
        """Key of the track."""
        return str(self.meta["key"])

    @property
    def json_sha256(self) -> str:
        """Hash of the metadata as it will stand in the shard."""
        return hashlib.sha256(self.json).hexdigest()


@dataclass(frozen=True)
class AssembleConfig:
    """What decides the shape of a set besides the tracks themselves."""

    settings_hash: str
    seed: int
    buckets: int
    splits: SplitConfig
    captions: CaptionConfig


def entry(row: Row, work_id: str, facts: dict[str, Any], group: str, config: AssembleConfig) -> Entry | Reject:
    """A track's entry; a reject when nothing can be said about it."""
    values, track_id = row.values, str(row.track_id)
    texts = captions.variants(values, facts["analysis"], config.captions, config.seed)
    if not texts:
        return Reject("caption", "caption_empty", "no description, no metadata and no confident measurement")
    split = split_of(group, config.splits)
    own = {n: values[n] for n in ("title", "artist", "work", "genre", "moods", "instruments", "bpm", "language")}
    meta = {
        "schema_version": shard.SCHEMA_VERSION,
        "key": key_of(track_id, facts["source_sha256"], config.settings_hash),
        "track_id": track_id,
        **own,
        "key_signature": values["key"],
        "region": values["region"],
        "era": values["era"],
        "descriptions": values["descriptions"],
        "captions": texts,
        "rights": values["rights"],
        "analysis": facts["analysis"],
        "source": facts["source"],
        "split": split,
        "split_group": group,
        "frames": facts["frames"],
        "duration_seconds": facts["duration_seconds"],
        "source_sha256": facts["source_sha256"],
        "pcm_sha256": facts["pcm_sha256"],
        **({"stems": facts["stems"]} if "stems" in facts else {}),
    }
    name = f"shards/{split}-{bucket_of(track_id, config.buckets):05d}.tar"
    return Entry(track_id, work_id, split, name, meta, facts, shard.json_bytes(meta))


def first_end(entries: Iterable[Entry]) -> str:
    """The day on which the first of the tracks' terms ends, or `perpetual`."""
    ends = {str(e.meta["rights"]["valid_until"]) for e in entries} - {PERPETUAL}
    return min(ends, default=PERPETUAL)


class Previous:
    """What stands in the output folder from earlier runs: tables, and codes that can be used again.

    Raises:
        UserError: dataset.json or a table is damaged, or is not what the other files say; shards/ is another's.
    """

    def __init__(self, root: Place) -> None:
        self.root = root
        self._began_with = self._stored()
        finished = self._began_with is not None
        self.info: dict[str, Any] = shard.read_info(root, ingested=True) if finished else {}
        self.sources = {r["track_id"]: r for r in _table(root / SOURCES, SOURCES_SCHEMA, ("json_sha256",))}
        self.rejects = _table(root / "rejects.parquet", REJECTS_SCHEMA, ("track_id", "source_sha256"))
        index = shard.read_index(root, self.info) if (root / "index.parquet").is_file() else None
        indexed = index.column("shard").to_pylist() if index is not None else []
        present = set((root / "shards").list(".tar"))
        self.own = self._own(present, {*indexed, *self.info.get("shards", ())})
        self.set = ShardSet(root, self.info, index) if index is not None and self.sources else None
        rows = self.set.index.to_pylist() if self.set is not None else []
        self.rows = {r["track_id"]: r for r in rows if r["shard"].removeprefix("shards/") in present}
        self._at = {r["track_id"]: i for i, r in enumerate(rows)}
        self.shards: dict[str, set[str]] = defaultdict(set)
        for r in self.rows.values():
            self.shards[r["shard"]].add(r["track_id"])
        self._broken: set[str] = set()
        self.altered: set[str] = set()
        tables = ("index.parquet", "rejects.parquet", SOURCES, "card/index.html")
        self.whole = finished and all((root / name).is_file() for name in tables)

    def _stored(self) -> bytes | None:
        try:
            return (self.root / "dataset.json").read()
        except FileNotFoundError:
            return None

    def refuse_change(self) -> None:
        """Raises `UserError` where another run has changed the set since it was read."""
        if self._stored() != self._began_with:
            raise UserError(
                f"OUT={self.root}: the set changed since this run began, because another one writes there or did. "
                "Nothing of this run went into it; when no other is writing, run the same command again"
            )

    def compare(self, compared: Callable[[], None]) -> None:
        """Find the shards of a finished set that are not what dataset.json says: they will be written again."""
        if not self.info:
            return
        with ThreadPoolExecutor(READERS) as pool:
            for name, found in zip(self.shards, pool.map(lambda name: _sha256(self.root / name), self.shards)):
                if found != self.info["shards"].get(name):
                    self.altered.add(name)
                compared()

    def _own(self, present: set[str], named: set[str]) -> set[str]:
        """Names of the tars that ingest made. Raises `UserError` where it would write over or among those of others."""
        unfinished = not self.info and (self.root / WORK).exists()
        own = {n for n in present if _OWN.fullmatch(n) and (unfinished or f"shards/{n}" in named)}
        ours = bool(self.info) or unfinished
        foreign = sorted(n for n in present - own if _OWN.fullmatch(n) or not ours)
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise UserError(
                f"OUT={self.root} holds {', '.join(f'shards/{n}' for n in foreign[:3])}{more}, which this command did "
                "not make; it writes and removes shards/(train|valid|test)-NNNNN.tar there. Give another OUT folder, "
                "new or made by `make ingest`, or move these files away"
            )
        return own

    def facts(self, track_id: str, work_id: str | None = None) -> dict[str, Any] | None:
        """Facts of a track, if a work id is given those from this source and these settings; else None."""
        source = self.sources.get(track_id)
        if not source or work_id not in (None, source["work_id"]):
            return None
        return takedown.facts_of(self.root / SOURCES, track_id, source["facts"])

    def has_codes(self, track_id: str, work_id: str) -> bool:
        """Do codes of this very result stand in a shard?"""
        source = self.sources.get(track_id)
        same = source is not None and source["work_id"] == work_id
        return same and track_id in self.rows and track_id not in self._broken

    def payloads(self, track_id: str) -> tuple[bytes, bytes] | None:
        """Codes and chroma of a track as they stand in the old shard; None when it is not what the index says."""
        assert self.set is not None
        try:
            record = self.set.record(self._at[track_id])
        except (ValueError, OSError):
            self._broken.add(track_id)
            return None
        return record.codes, record.chroma

    def unchanged(self, name: str, entries: Sequence[Entry]) -> bool:
        """Would writing this shard give the bytes that stand there? Never after an interrupted commit."""
        same_tracks = self.shards.get(name, set()) == {e.track_id for e in entries}
        if not self.info or name in self.altered or not same_tracks:
            return False
        return all(
            self.rows[e.track_id]["key"] == e.key
            and self.sources[e.track_id]["work_id"] == e.work_id
            and self.sources[e.track_id]["json_sha256"] == e.json_sha256
            and e.track_id not in self._broken
            for e in entries
        )


def _table(place: Place, schema: pa.Schema, may_be_empty: Sequence[str]) -> list[dict[str, Any]]:
    return shard.read_table(place, schema, may_be_empty)[0].to_pylist() if place.is_file() else []


class CodesMissing(Exception):
    """Tracks whose codes cannot be had from the old shards after all; they must be made again."""

    def __init__(self, track_ids: list[str]) -> None:
        self.track_ids = track_ids


def _records(entries: Sequence[Entry], root: Place, previous: Previous, kept: set[str]) -> list[Record]:
    records, missing = [], []
    for e in sorted(entries, key=lambda e: e.key):
        if e.work_id in kept:
            result = stages.load(root / WORK, e.work_id)
            assert result.codes is not None and result.chroma is not None
            payloads: tuple[bytes, bytes] | None = (shard.npy_bytes(result.codes), shard.npy_bytes(result.chroma))
        else:
            payloads = previous.payloads(e.track_id)
        if payloads is None:
            missing.append(e.track_id)
        else:
            records.append(Record(e.key, *payloads, e.json))
    if missing:
        raise CodesMissing(missing)
    return records


def _index_row(e: Entry, written: dict[str, Any]) -> dict[str, Any]:
    return {
        **written,
        "track_id": e.track_id,
        "shard": e.shard,
        "split": e.split,
        "artist": e.meta["artist"],
        "work": e.meta["work"],
        "genre": e.meta["genre"],
        "language": e.meta["language"],
        "frames": e.meta["frames"],
        "weight": 1.0,
        "duration_seconds": e.meta["duration_seconds"],
        "licence": e.meta["rights"]["licence"],
        "withdrawn": False,
    }


def write_shards(
    root: Place, entries: Sequence[Entry], previous: Previous, kept: set[str], wrote: Callable[[], None] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Write every shard that changed and remove our own that are empty now.

    Returns:
        index rows of the whole set, sha256 of every shard, names of the shards that were written.

    Raises:
        CodesMissing: an old shard is not what the index says; nothing has been replaced for these tracks.
        UserError: another run has changed the set since this one began; nothing has been replaced.
    """
    by_shard: dict[str, list[Entry]] = defaultdict(list)
    for e in entries:
        by_shard[e.shard].append(e)
    changed = sorted(n for n, members in by_shard.items() if not previous.unchanged(n, members))
    rows = [previous.rows[e.track_id] for n, members in by_shard.items() if n not in set(changed) for e in members]
    hashes = {n: previous.info["shards"][n] for n in by_shard if n not in set(changed)}
    stale = sorted(previous.own - {n.removeprefix("shards/") for n in by_shard})
    # Everything is written beside the set first: when the disk is full the old set is still whole.
    with tempfile.TemporaryDirectory(**_scratch(root)) as scratch, clear_disk_errors(root):
        fresh: dict[str, list[dict[str, Any]]] = {}
        for name in changed:
            records = _records(by_shard[name], root, previous, kept)
            path = os.path.join(scratch, name.removeprefix("shards/"))
            fresh[name] = shard.write_tar(path, records)
            hashes[name] = _sha256(Place.at(path))
            wrote()
        previous.refuse_change()
        if changed or stale:
            (root / "dataset.json").delete()
        for name in changed:
            (root / name).put_file(os.path.join(scratch, name.removeprefix("shards/")))
            of_key = {str(w["key"]): w for w in fresh[name]}
            rows += [_index_row(e, of_key[e.key]) for e in by_shard[name]]
    for name in stale:
        (root / "shards" / name).delete()
    return rows, dict(sorted(hashes.items())), changed


def _scratch(root: Place) -> dict[str, Any]:
    """Arguments of the temporary folder: beside the set on a local disk, so that a shard is moved, not copied."""
    if not root.local:
        return {}
    (root / WORK).make_folder()
    return {"dir": (root / WORK).path, "prefix": "shards-"}


def _sha256(place: Place) -> str:
    with place.fs.open_input_stream(place.path, compression=None) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def reject_rows(rejects: Sequence[tuple[Row, Reject, str | None]]) -> list[dict[str, Any]]:
    """Rows of the rejects table, in the catalogue's order."""
    return [
        {
            "track_id": row.track_id,
            "row": row.number,
            "stage": reject.stage,
            "code": reject.code,
            "message": reject.message,
            "source_sha256": sha256,
        }
        for row, reject, sha256 in sorted(rejects, key=lambda item: item[0].number)
    ]


def source_rows(entries: Sequence[Entry], facts: dict[str, tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What every source became, so that the next run does only what is missing."""
    json_of = {e.track_id: e.json_sha256 for e in entries}
    return [
        {
            "track_id": track_id,
            "work_id": work_id,
            "json_sha256": json_of.get(track_id),
            "facts": json.dumps(found, sort_keys=True),
        }
        for track_id, (work_id, found) in sorted(facts.items())
    ]


def counts(rows_in: int, index: pa.Table, rejects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a set. Raises `RuntimeError` when rows in are not tracks in shards plus rejects."""
    tracks = index.num_rows
    if tracks + len(rejects) != rows_in:
        raise RuntimeError(f"rows are lost: {rows_in} rows in, {tracks} tracks in shards + {len(rejects)} rejects")
    hours: dict[str, float] = dict.fromkeys(shard.SPLITS, 0.0)
    for split, seconds in zip(index.column("split").to_pylist(), index.column("duration_seconds").to_pylist()):
        hours[split] += seconds / 3600
    return {
        "rows": rows_in,
        "tracks": tracks,
        "rejects": len(rejects),
        "rejects_by_code": dict(sorted(Counter(r["code"] for r in rejects).items())),
        "tracks_by_split": {s: index.column("split").to_pylist().count(s) for s in shard.SPLITS},
        "hours_by_split": hours,
        "hours": sum(hours.values()),
        "frames": sum(index.column("frames").to_pylist()),
    }


def write_tables(
    root: Place, index: pa.Table, rejects: Sequence[dict[str, Any]], sources: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Index, rejects and sources; each whole or absent. Returns what dataset.json says of them."""
    tables = {
        "index": index,
        "rejects": pa.Table.from_pylist(list(rejects), schema=REJECTS_SCHEMA),
        "sources": pa.Table.from_pylist(list(sources), schema=SOURCES_SCHEMA),
    }
    data = {name: shard.table_bytes(table) for name, table in tables.items()}
    for name in data:
        (root / f"{name}.parquet").write(data[name])
    return {f"{name}_sha256": hashlib.sha256(data[name]).hexdigest() for name in ("index", "sources")}
