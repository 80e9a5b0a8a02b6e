"""What a run reads: one data set or a mixture of several, on the local disk, each track checked when first read.

DATA names a set, or several with their shares: `DATA="s3://licensed/shards:0.7,data/own:0.3"`. A set on an object store
is fetched once per machine, before training: every shard is checked against the hash in dataset.json and appears under
its name only when it is whole. The processes of a machine share the copy and its fetching by file locks.

`Sources` reads as a single `ShardSet` does, rows of all sets counted through. What the catalogue of one set of a
mixture took down is left out of the others, which may be copies from before. A track's first reading compares its bytes
with the index, and again when its file is no longer the one that was opened, so that an altered, cut or withdrawn shard
stops a run in words, also in its middle, instead of training on it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from musicgen.errors import UserError
from pipelines import takedown
from pipelines.rights import PERPETUAL
from pipelines.shard import ShardSet, described, same
from pipelines.store import Place, atomic_local, clear_disk_errors

_WHO = ("artist", "work")  # by whom tracks are kept in one split
CACHE = "~/.cache/musicgen-pipeline/shards"
CHUNK_BYTES = 2**23
TRIES = 5
# A place whose last option is an endpoint without its port (`:9000`, or `%3A9000`): a name, or an address in brackets.
_HOST_LAST = re.compile(r"[?&]endpoint_override=(\w+://)?(\[[^]]*\]|((?!%3[Aa])[^:&])*)$")


def parse(spec: str) -> list[tuple[str, float]]:
    """`uri`, or `uri:share,uri:share,…`, as places and shares that add up to 1.

    A whole number right behind the host of a URI's `endpoint_override` is its port: `s3://a/b?endpoint_override=host:9000`
    has no share, `s3://a/b?endpoint_override=host:9000:0.3` has one. A folder of that very name has none either.

    Raises:
        UserError: a share that is not a positive number.
    """
    if os.path.isdir(spec) or ("," not in spec and not _share_of(spec)[1]):
        return [(spec, 1.0)]
    found = []
    for part in spec.split(","):
        place, share = _share_of(part.strip())
        if not place:
            raise UserError(f"DATA={spec!r} has an empty part; give places and shares, such as DATA='a:0.7,b:0.3'")
        if share is not None and not 0 < share < float("inf"):
            raise UserError(f"DATA={spec!r}: the share of {place!r} is {share:g}; it must be a number above 0")
        found.append((place, 1.0 if share is None else share))
    total = sum(share for _, share in found)
    return [(place, share / total) for place, share in found]


def _share_of(part: str) -> tuple[str, float | None]:
    place, colon, number = part.rpartition(":")
    if not colon or (number.isdecimal() and _HOST_LAST.search(place)) or os.path.isdir(part):
        return part, None
    try:
        return place, float(number)
    except ValueError:
        return part, None


class Sources:
    """Data sets read as one.

    Args:
        sets: the opened sets.
        shares: how much of the sampling mass each has; they add up to 1.

    Attributes:
        info: dataset.json of the first set, with the version of the whole.
        index: the rows of all sets, one after the other.
        source: int64 `[N]`, which set a row belongs to.
        taken_down: rows of a mixture, in no split, whose sound another of its sets' catalogues took down -> which one.
        silent: places of a mixture's sets that do not say what their catalogues took down.
        heard_elsewhere: int64, validation rows whose artist or work another set trains on; not validated on.

    Raises:
        UserError: the sets were made with different codecs, or one's sources.parquet is damaged.
    """

    def __init__(self, sets: Sequence[ShardSet], shares: Sequence[float] = (1.0,)) -> None:
        self.sets, self.shares = list(sets), np.asarray(shares, dtype=np.float64)
        codecs = [s.info["codec"] for s in sets]
        for other, made in zip(codecs[1:], sets[1:]):
            if other["identity"] != codecs[0]["identity"]:
                raise UserError(
                    f"DATA mixes codecs: {str(sets[0].root)!r} holds tokens of {codecs[0]['name']!r} (identity "
                    f"{codecs[0]['identity'][:12]}…), {str(made.root)!r} of {other['name']!r} (identity "
                    f"{other['identity'][:12]}…); the same number means other sounds. Ingest them with one codec"
                )
        self.index: pa.Table = pa.concat_tables([s.index for s in sets])
        self._first = np.cumsum([0, *(len(s) for s in sets)])
        self.source = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
        self.taken_down: dict[int, str] = {}
        self.silent: list[str] = []
        if len(sets) > 1:
            self._find_taken_down()
        self.info = {**sets[0].info, "dataset_version": self._version()}
        self._checked = np.zeros(len(self), dtype=bool)
        self._narrowed: dict[str, np.ndarray] | None = None
        self.heard_elsewhere = self._heard_elsewhere()

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def root(self) -> str:
        """The places, for messages."""
        return ", ".join(str(s.root) for s in self.sets)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers (int64) of a split over all sets; withdrawn tracks are left out."""
        if self._narrowed is not None:
            return self._narrowed[split]
        rows = self._rows(split)
        return np.setdiff1d(rows, self.heard_elsewhere) if split == "valid" else rows

    def _rows(self, split: str) -> np.ndarray:
        rows = self._all_rows(split)
        return np.setdiff1d(rows, [*self.taken_down]) if self.taken_down else rows

    def _all_rows(self, split: str) -> np.ndarray:
        return np.concatenate([first + s.rows(split) for first, s in zip(self._first, self.sets)])

    def _find_taken_down(self) -> None:
        """Find the rows of a mixture whose sound was taken down in the catalogue of another of its sets."""
        tables = [takedown.SourcesTable.of(s) for s in self.sets]
        self.silent = [str(s.root) for s, found in zip(self.sets, tables) if found.table is None]
        barred = [found.barred() for found in tables]
        for number, (one, first) in enumerate(zip(self.sets, self._first)):
            others = {sha256: other for other, found in enumerate(barred) if other != number for sha256 in found}
            gone = tables[number].tracks_with(others) if others else {}
            for row, name in enumerate(one.index.column("track_id").to_pylist() if gone else ()):
                if name in gone:
                    by = others[gone[name]]
                    self.taken_down[int(first) + row] = f"{barred[by][gone[name]]!r} of {self.sets[by].root}"

    def _version(self) -> str:
        """Version of what is read: the set's own, or of a mixture a hash over versions, shares and what is left out."""
        if len(self.sets) == 1:
            return self.sets[0].info["dataset_version"]
        text = "\n".join(f"{s.info['dataset_version']} {share:.9f}" for s, share in zip(self.sets, self.shares))
        used = np.concatenate([self._all_rows("train"), self._all_rows("valid")])
        left_out = np.intersect1d(used, [*self.taken_down]).tolist()
        text += "".join(f"\nwithout {self.source[row]} {self.index.column('key')[row].as_py()}" for row in left_out)
        return hashlib.sha256(text.encode()).hexdigest()

    def _heard_elsewhere(self) -> np.ndarray:
        """Validation rows of a mixture whose artist or work is trained on in another of its sets.

        Each set is split for itself, and who goes where may depend on its other rows.
        """
        heard: list[int] = []
        for column in _WHO if len(self.sets) > 1 else ():
            names = [same(name or "") for name in self.index.column(column).to_pylist()]
            trained = {names[row] for row in self._rows("train")} - {""}
            heard += [row for row in self._rows("valid") if names[row] in trained]
        return np.unique(np.asarray(heard, dtype=np.int64))

    def narrow(self, rows: dict[str, np.ndarray]) -> None:
        """From now on the splits have these rows (`training.selection`)."""
        self._narrowed = rows

    def _at(self, row: int) -> tuple[ShardSet, int]:
        number = int(self.source[row])
        return self.sets[number], row - int(self._first[number])

    def codes(self, row: int) -> np.ndarray:
        """Codes of a track, int16 `[K, T]`. Raises `UserError` when its bytes are not those of the index."""
        self._check(row)
        part, own = self._at(row)
        return part.codes(own)

    def chroma(self, row: int) -> np.ndarray:
        """Dominant chroma bin per chroma frame, uint8 `[T_c]`."""
        self._check(row)
        part, own = self._at(row)
        return part.chroma(own)

    def chromas(self, row: int) -> np.ndarray:
        """The track's chroma and its variants, uint8 `[1 + n, T_c]`."""
        self._check(row)
        part, own = self._at(row)
        return part.chromas(own)

    def meta(self, row: int) -> dict[str, Any]:
        """The track's metadata."""
        self._check(row)
        part, own = self._at(row)
        return part.meta(own)

    def _check(self, row: int) -> None:
        part, own = self._at(row)
        if part.forget_if_changed(own):
            self._checked[self._first[self.source[row]] + part.neighbours(own)] = False
        if self._checked[row]:
            return
        shard = part.index.column("shard")[own].as_py()
        todo = (
            f"Restore the data set from where it was made, or run the same `make ingest CATALOG=… OUT={part.root}` "
            "again, which rewrites what is not whole. Where music was withdrawn, go on from what a run has learned "
            "with the music that is left: INIT=<its run>/release and another RUN"
        )
        try:
            part.record(own)
        except FileNotFoundError as error:
            raise UserError(f"DATA: {part.root}/{shard} is gone (deleted or withdrawn). {todo}") from error
        except ValueError as error:
            raise UserError(
                f"DATA: {part.root}/{shard} was altered since it was made: {error}. Nothing was trained on what is "
                f"there now. {todo}"
            ) from error
        self._checked[row] = True


def check_terms(sets: Sequence[ShardSet], today: datetime.date) -> None:
    """Refuse to train on music whose term has ended since it was ingested.

    Raises:
        UserError: naming the set and what to do.
    """
    for one in sets:
        until = one.info.get("rights_until", PERPETUAL)  # a set of an earlier version does not say
        if until != PERPETUAL and str(until) < today.isoformat():
            raise UserError(
                f"DATA={str(one.root)!r} holds music whose term ended on {until} (ingested by the rights of "
                f"{one.info.get('rights_day', 'an unknown day')}). Run the same `make ingest CATALOG=… OUT={one.root}` "
                "again: it leaves out what has ended and takes a term that was renewed in the catalogue"
            )


def licences(shards: Sources) -> list[str]:
    """The licences of the tracks that are trained on, each once."""
    column = shards.index.column("licence").take(pa.array(shards.rows("train")))
    return sorted({str(licence or "not stated") for licence in column.unique().to_pylist()})


@lru_cache(maxsize=16)  # a comparison of runs asks for each of them
def frame_rate(spec: str) -> float:
    """Codec frames per second of the data that DATA names, by its first set's dataset.json alone.

    Raises:
        UserError: no finished data set there.
    """
    place = parse(spec)[0][0]
    return float(_tried(lambda: described(place), Place.at(place))["codec"]["frame_rate"])


def open_data(spec: str, cache: str = "", *, rank: int = 0) -> Sources:
    """The data that DATA names, fetched to this machine where it is not here.

    Args:
        spec: see `parse`.
        cache: folder of fetched sets; the user's cache folder when empty.
        rank: process on this machine, so that the processes begin at different shards.

    Raises:
        UserError: no finished data set, an altered shard, a store that does not answer, a full disk, a term that ended.
    """
    parts = parse(spec)
    places = [str(Place.at(place)).rstrip("/") for place, _ in parts]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"DATA={spec!r} names {twice!r} twice; name it once, with both shares added up")
    sets = [_open(place, cache or CACHE, rank) for place, _ in parts]
    check_terms(sets, datetime.datetime.now(datetime.UTC).date())
    return Sources(sets, [share for _, share in parts])


def _open(place: str, cache: str, rank: int) -> ShardSet:
    root = Place.at(place)
    if root.local:
        return ShardSet.open(place)
    folder = fetch(root, Path(cache).expanduser(), rank=rank)
    try:
        return ShardSet.open(str(folder))
    except UserError as error:
        raise UserError(f"{error}. This is a copy of {root}: delete {folder} and it is fetched again") from error


def fetch(root: Place, cache: Path, *, rank: int = 0) -> Path:
    """A local copy of the set at `root` below `cache`; what is already there stays.

    The shards lie under the version of the set, its tables beside them under what dataset.json says: what is taken down
    later changes the tables of a set whose tracks stay as they are.

    Raises:
        UserError: no set there, bytes that are not those that dataset.json names, a store that does not answer.
    """
    remote: ShardSet = _tried(lambda: ShardSet.open(root.uri), root)
    holds = cache / remote.info["dataset_version"][:32]
    folder = holds / hashlib.sha256(json.dumps(remote.info, sort_keys=True).encode()).hexdigest()[:16]
    if (folder / "dataset.json").is_file():
        return folder
    hashes: dict[str, str] = remote.info.get("shards", {})
    used = {s for s, gone in zip(*(remote.index.column(c).to_pylist() for c in ("shard", "withdrawn"))) if not gone}
    missing = sorted(used - hashes.keys())
    if missing:
        raise UserError(f"DATA={root}: dataset.json names no hash of {missing[0]}; ingest the catalogue again")
    with clear_disk_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    names = sorted(used)
    names = names[rank * 7 % max(len(names), 1) :] + names[: rank * 7 % max(len(names), 1)]
    for blocking in (False, True):  # first what nobody else is fetching, then wait for the others
        for name in names:
            _fetch_one(root / name, holds / name, hashes[name], blocking=blocking)
    with _locked(holds / ".lock", blocking=True):
        if not (folder / "dataset.json").is_file():
            wanted = ["index.parquet", "dataset.json"]  # which makes a copy of it, so last
            if _tried((root / takedown.SOURCES).is_file, root):
                wanted.insert(0, takedown.SOURCES)
            files = {name: _tried((root / name).read, root / name) for name in wanted}
            if _tried(lambda: ShardSet.open(root.uri), root).info != remote.info:
                raise UserError(
                    f"DATA={root} changed while it was fetched: ingest is writing there; wait and try again"
                )
            if not (folder / "shards").is_symlink():
                (folder / "shards").symlink_to(Path("..") / "shards")
            for name, data in files.items():
                Place.at(folder / name).write(data)
    return folder


@contextlib.contextmanager
def _locked(path: Path, *, blocking: bool) -> Iterator[bool]:
    """Hold the lock of a file against other processes of this machine; false when it is taken and not waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _fetch_one(source: Place, target: Path, sha256: str, *, blocking: bool) -> None:
    if target.is_file():
        return
    with _locked(target.with_name(f".lock-{target.name}"), blocking=blocking) as mine:
        if not mine or target.is_file():
            return
        with clear_disk_errors(str(target)), atomic_local(str(target)) as temporary:
            found = _tried(lambda: _copy(source, temporary), source)
            if found != sha256:
                raise UserError(
                    f"DATA: {source} is not the shard that dataset.json describes (sha256 {found[:12]}…, expected "
                    f"{sha256[:12]}…): altered, or ingest is writing there. Ingest again or restore it"
                )


def _copy(source: Place, target: str) -> str:
    digest = hashlib.sha256()
    with source.fs.open_input_stream(source.path) as stream, open(target, "wb") as out:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def _tried(work: Any, place: Place) -> Any:
    """The result of `work`, tried again for a while when the store does not answer."""
    for attempt in range(TRIES):
        try:
            return work()
        except FileNotFoundError as error:
            raise UserError(f"DATA: {place} is gone (deleted or withdrawn); ingest again or restore it") from error
        except OSError as error:
            if attempt == TRIES - 1 or error.errno in (28, 122, 27):  # the local disk is full: waiting does not help
                if error.errno in (28, 122, 27):
                    raise
                raise UserError(f"DATA: {place} could not be read after {TRIES} tries: {error}") from error
            time.sleep(0.5 * 2**attempt)
    raise AssertionError


def describe(data: Sources) -> str:
    """The sets with their shares where there are several."""
    if len(data.sets) == 1:
        return ""
    return ", ".join(f"{share:.0%} {os.path.basename(str(s.root))}" for s, share in zip(data.sets, data.shares))


def identities(data: Sources) -> list[dict[str, Any]]:
    """Place, version and share of each set, for the record of a run."""
    return [
        {"place": str(s.root), "dataset_version": s.info["dataset_version"], "share": round(float(share), 6)}
        for s, share in zip(data.sets, data.shares)
    ]
