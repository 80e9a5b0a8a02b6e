"""Places named by URI: local folders and object stores behind one small class.

Every path of the pipeline is a URI (`file://`, `s3://`; a plain path means the local disk) and goes through
`pyarrow.fs`. A write is whole or absent: on a local disk a temporary name is synced and renamed, on an object store
the object is put in one go and appears when it is complete. Bytes that cannot be written because the disk is full
become a `DiskFull` that says where and what to do; nothing half-written stays behind. `alone` keeps a local folder for
one process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from musicgen.errors import UserError
from musicgen.files import lock_owner, path_of_uri, sign_lock, take_lock

TEMPORARY = ".tmp-"
_OPTIONS = re.compile(r"\?([\w.-]+=[^&?]*(?:&[\w.-]+=[^&?]*)*)$")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(UserError):
    """The place written to has no room left; what was finished before stays whole."""

    def __reduce__(self) -> Any:  # travels from Ray workers to the driver
        return (type(self), self.args)


def parquet(data: bytes) -> pa.Table:
    """The table of a parquet file, read by this thread alone.

    Arrow's own threads may still let go of `data`, for which they need Python, when a short command ends; the process
    then aborts with code 134 whatever its own was.
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


@lru_cache(maxsize=64)
def _filesystem(root: str) -> pafs.FileSystem:
    """One client per endpoint and process; pyarrow's clients survive forked data-loader workers."""
    try:
        return pafs.FileSystem.from_uri(root)[0]
    except Exception as error:
        raise UserError(
            f"cannot open {root!r}: {error}. Allowed are local paths, file:// and s3:// URIs "
            "(s3 keys and endpoint come from the AWS_* environment variables)"
        ) from error


@dataclass(frozen=True)
class Place:
    """A file or folder by URI. Build with `Place.at(uri)`; go down with `place / "name"`.

    Attributes:
        scheme: `file`, `s3`, or another scheme that pyarrow knows.
        path: path inside the file system (for s3: bucket/key).
        query: options of the URI, such as `endpoint_override=…`, kept for every child.
    """

    scheme: str
    path: str
    query: str = ""

    @classmethod
    def at(cls, uri: str | os.PathLike[str]) -> Place:
        """The place that a URI or a local path names.

        Names are taken as they are, also with `#` and `?`; only `name=value` behind the last `?` of a URI are its
        options, and only a file:// URI has its % signs decoded.

        Raises:
            UserError: an empty one, one that is no URI, or one with keys.
        """
        text = os.fspath(uri)
        if not text.strip():
            raise UserError("an empty path was given; give a local path or a file:// or s3:// URI")
        try:
            parts = urllib.parse.urlsplit(text)
        except ValueError as error:
            raise UserError(f"{text!r} is no URI ({error}); give a local path or a file:// or s3:// URI") from error
        if parts.scheme == "file":
            return cls("file", os.path.abspath(path_of_uri(text)))
        if "@" in parts.netloc:
            raise UserError("a URI must not hold keys (they would be written into tables); use the AWS_* variables")
        if parts.scheme and "://" in text:
            options = _OPTIONS.search(text)
            path = (text[: options.start()] if options else text).partition("://")[2]
            return cls(parts.scheme, path.rstrip("/"), options[1] if options else "")
        return cls("file", os.path.abspath(os.path.expanduser(text)))

    @property
    def local(self) -> bool:
        """True on the local disk, where files can be memory-mapped."""
        return self.scheme == "file"

    @property
    def uri(self) -> str:
        """The URI as it can be given back to `Place.at`."""
        if self.local:
            return "file://" + urllib.parse.quote(self.path)
        return f"{self.scheme}://{self.path}" + (f"?{self.query}" if self.query else "")

    def __str__(self) -> str:
        return self.path if self.local else f"{self.scheme}://{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Place:
        """The folder that holds this place."""
        return Place(self.scheme, self.path.rsplit("/", 1)[0] or "/", self.query)

    def __truediv__(self, name: str) -> Place:
        return Place(self.scheme, f"{self.path.rstrip('/')}/{name}", self.query)

    def join(self, reference: str) -> Place:
        """A URI or path as seen from this folder: absolute ones stay, relative ones are below it."""
        if "://" in reference or os.path.isabs(reference):
            return Place.at(reference)
        if self.local:
            return Place("file", os.path.normpath(os.path.join(self.path, reference)))
        return self / reference.removeprefix("./")

    @property
    def fs(self) -> pafs.FileSystem:
        """The pyarrow file system of this place."""
        if self.local:
            return _filesystem("file:///")
        bucket = self.path.split("/", 1)[0]
        return _filesystem(f"{self.scheme}://{bucket}" + (f"?{self.query}" if self.query else ""))

    def info(self) -> pafs.FileInfo:
        """Type, size and time; `FileType.NotFound` when there is nothing."""
        return self.fs.get_file_info(self.path)

    def exists(self) -> bool:
        """True for a file or a folder."""
        return self.info().type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        """True for a file or object."""
        return self.info().type == pafs.FileType.File

    def read(self) -> bytes:
        """All bytes; `FileNotFoundError` when missing."""
        if self.local:
            return Path(self.path).read_bytes()
        with self.fs.open_input_file(self.path) as stream:
            return stream.read()

    def read_range(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        with self.fs.open_input_file(self.path) as stream:
            return stream.read_at(size, offset)

    def write(self, data: bytes) -> None:
        """Put `data` here, whole or not at all. Raises `DiskFull` when there is no room."""
        with clear_disk_errors(self):
            if self.local:
                with atomic_local(self.path) as temporary:
                    Path(temporary).write_bytes(data)
            else:
                with self.fs.open_output_stream(self.path) as stream:
                    stream.write(data)

    def put_file(self, source: str) -> None:
        """Put a finished local file here, whole or not at all (moved when it is on the same disk)."""
        with clear_disk_errors(self):
            if self.local:
                with atomic_local(self.path) as temporary:
                    try:
                        os.replace(source, temporary)
                    except OSError as error:
                        if error.errno != errno.EXDEV:
                            raise
                        Path(temporary).write_bytes(Path(source).read_bytes())
            else:
                self.write(Path(source).read_bytes())

    def list(self, suffix: str = "") -> list[str]:
        """Names of the files directly below, sorted; temporary names are left out."""
        found = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        names = [i.base_name for i in found if i.type == pafs.FileType.File]
        return sorted(n for n in names if n.endswith(suffix) and TEMPORARY not in n)

    def make_folder(self) -> None:
        """Create the folder (object stores need none)."""
        if self.local:
            with clear_disk_errors(self):
                os.makedirs(self.path, exist_ok=True)

    def delete(self) -> None:
        """Remove this file or folder with everything below, if it is there."""
        kind = self.info().type
        if kind == pafs.FileType.File:
            self.fs.delete_file(self.path)
        elif kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path)


def found(places: Sequence[Place]) -> list[pafs.FileInfo | str]:
    """File infos of many places, or the reason why one cannot be asked for: a name too long, an unknown scheme.

    Raises:
        UserError: a store that does not answer, which says nothing about what it holds.
    """
    try:
        return list(infos(places))
    except (UserError, OSError, ValueError):
        return [_found(place) for place in places]


def _found(place: Place) -> pafs.FileInfo | str:
    try:
        return place.info()
    except (UserError, ValueError) as error:
        return str(error)
    except OSError as error:
        if place.local:
            return error.strerror or str(error)
        raise UserError(f"{place} cannot be asked for: {error}. Run the same command when the store answers") from error


def infos(places: Sequence[Place]) -> list[pafs.FileInfo]:
    """File infos of many places, asked in one call per file system (parallel on object stores)."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, place in enumerate(places):
        root = "" if place.local else place.path.split("/", 1)[0]
        groups.setdefault((place.scheme, root, place.query), []).append(i)
    result: list[Any] = [None] * len(places)
    for members in groups.values():
        found = places[members[0]].fs.get_file_info([places[i].path for i in members])
        for i, info in zip(members, found):
            result[i] = info
    return result


@contextlib.contextmanager
def atomic_local(path: str) -> Iterator[str]:
    """A temporary name beside `path`; synced and renamed when the block ends well, removed when it does not."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    digest = hashlib.sha256(os.path.basename(path).encode()).hexdigest()[:12]
    temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY}{digest}-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def clear_disk_errors(place: Place | str) -> Iterator[None]:
    """Turn a full disk, a quota or a read-only folder into a message for the person at the keyboard."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"no room left while writing {place} ({os.strerror(error.errno or 0)}). Nothing half-written was left; "
                "free some space or choose another OUT, then run the same command again: finished tracks are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"cannot write {place}: {os.strerror(error.errno or 0)}. Choose an OUT folder that you may write to"
            ) from error
        raise


@contextlib.contextmanager
def alone(place: Place) -> Iterator[None]:
    """Keep a local folder for this process: two commands would undo each other's work. Object stores have no locks.

    Raises:
        UserError: another process keeps it, or it cannot be written.
    """
    if not place.local:
        yield
        return
    made = not place.exists()
    place.make_folder()
    path = Path((place / ".lock").path)
    with _locked(place, path) as file:
        sign_lock(file)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made and not any(path.parent.iterdir()):
                path.parent.rmdir()


def _locked(place: Place, path: Path) -> TextIO:
    while True:
        with clear_disk_errors(place):
            file = path.open("a+")
        taken = take_lock(file)
        if taken is None:
            return file
        if not taken:
            with file:
                owner = lock_owner(file)
            raise UserError(f"OUT={place} is being written by {owner}; wait for it, end it, or give another OUT")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its last owner has just removed it
