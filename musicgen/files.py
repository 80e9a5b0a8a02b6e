"""Bytes in and out of a place named by a path or a URI (`file://`, `s3://` …), whole or absent.

A local file is written under a temporary name and renamed; an object store commits a single PUT by itself. So a
reader never sees half a file and a killed writer leaves nothing under the final name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from urllib.parse import unquote, urlsplit

from musicgen.errors import UserError

# Containers that FFmpeg may open for a user's sound: what holds sound itself; no list that points at other files.
AUDIO_CONTAINERS = (
    "wav,w64,rf64,aiff,caf,au,flac,mp3,ogg,mov,mp4,m4a,matroska,webm,aac,asf,ape,wv,tta,mpc,mpc8,ac3,eac3,"
    "avi,flv,mpegts,mpeg,amr,voc,rm,sbc,dts,gsm,oma"
)


def path_of_uri(uri: str) -> str:
    """The path of a `file:` URI: % signs decoded, `#` and `?` part of its names."""
    return unquote(urlsplit(uri.replace("#", "%23").replace("?", "%3F")).path)


def local_path(uri: str | os.PathLike[str]) -> Path | None:
    """The local path of a path or `file://` URI; None for another scheme."""
    text = os.fspath(uri)
    if "://" not in text:
        return Path(text)
    if text.startswith("file://"):
        return Path(path_of_uri(text))
    return None


def _remote(uri: str) -> tuple[Any, str]:
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{uri!r} is not a place this program can reach ({error}); give a path, file:// or s3://"
        ) from None


def join(folder: str | os.PathLike[str], name: str) -> str:
    """`folder/name` for a path or a URI."""
    place, _, query = os.fspath(folder).partition("?") if "://" in os.fspath(folder) else (os.fspath(folder), "", "")
    return f"{place.rstrip('/')}/{name}" + (f"?{query}" if query else "")


def exists(uri: str | os.PathLike[str]) -> bool:
    """Whether something (file or folder) stands there."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    from pyarrow import fs

    filesystem, inner = _remote(os.fspath(uri))
    return filesystem.get_file_info(inner).type != fs.FileType.NotFound


def model_type(folder: str | os.PathLike[str]) -> str | None:
    """What config.json of a folder in transformers' form says that it holds; None where it cannot be read."""
    try:
        about = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return about.get("model_type") if isinstance(about, dict) else None


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """The whole file; raises `FileNotFoundError` when it is not there."""
    path = local_path(uri)
    if path is not None:
        return path.read_bytes()
    filesystem, inner = _remote(os.fspath(uri))
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def _beside(target: Path) -> Path:
    """A name of its own in the same folder, no longer than names may be."""
    return target.with_name(f".{target.name[:80]}.{uuid.uuid4().hex}.tmp")


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # what could not be made need not be removed
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """A file to write piece by piece: a local path, there once it is whole, or `-` for standard output.

    Raises:
        UserError: the place cannot be written, or whoever reads the output has gone.
    """
    if path == "-":
        try:
            yield sys.stdout.buffer
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
            raise UserError("the program that read the output ended before the sound did") from None
        return
    target = local_path(path)
    if target is None:
        raise UserError(f"{path!r} takes whole files only; give a local file")
    temporary = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; free the place or give another one"
        ) from error
    finally:
        _remove(temporary)


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all; folders on the way are made.

    Raises:
        UserError: the place cannot be written (missing rights, full disk), in words.
    """
    path = local_path(uri)
    if path is None:
        try:
            filesystem, inner = _remote(os.fspath(uri))
            with filesystem.open_output_stream(inner) as stream:
                stream.write(data)
        except OSError as error:
            raise UserError(f"cannot write {os.fspath(uri)}: {str(error).splitlines()[0]}") from error
        return
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free the place or give another one"
        ) from error


def take_lock(file: TextIO) -> bool | None:
    """Take the lock of an open file without waiting, until it is closed; False where another process has it, None on a
    file system without locks."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def sign_lock(file: TextIO) -> None:
    """Write into a lock's file which process has it; a full disk leaves the name out, and the lock is held."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def lock_owner(file: TextIO) -> str:
    """Which process a lock's file names."""
    file.seek(0)
    return file.read().strip() or "another process"
