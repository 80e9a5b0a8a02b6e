"""Places by URI: whole or absent, on the local disk and on a real S3 protocol server; a full disk says so."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen import files
from musicgen.errors import UserError
from pipelines.store import DiskFull, Place, infos


def test_a_place_by_any_name(tmp_path: Path) -> None:
    plain, uri = Place.at(str(tmp_path / "a b")), Place.at((tmp_path / "a b").as_uri())
    assert plain == uri == Place.at(plain.uri) and plain.local and plain.parent == Place.at(tmp_path)
    assert plain.join("../x.wav") == Place.at(tmp_path / "x.wav")
    assert plain.join("/abs/x.wav").path == "/abs/x.wav"
    remote = Place.at("s3://bucket/some/set?endpoint_override=host:9")
    assert (remote / "x").uri == "s3://bucket/some/set/x?endpoint_override=host:9"
    assert remote.join("audio/t.wav").path == "bucket/some/set/audio/t.wav"
    for name in ("Symphony #5.flac", "Why?.flac", "50%20 [live]?#1.wav", "a=b?c d=e.wav", "Why? #", "Why?"):
        place = remote / name
        assert Place.at(place.uri) == place == remote.join(name), name
        assert Place.at(f"s3://bucket/{name}") == Place("s3", f"bucket/{name}")
        (tmp_path / name).write_bytes(name.encode())
        for address in (str(tmp_path / name), (tmp_path / name).as_uri(), Place.at(tmp_path).join(name).uri):
            assert Place.at(address).read() == files.read_bytes(address) == name.encode()
        assert Place.at(f"file://{tmp_path}/{name.replace('%', '%25')}").exists()
    assert Place.at("s3://bucket/set/?scheme=http&region=").query == "scheme=http&region="
    with pytest.raises(UserError, match="empty path"):
        Place.at(" ")
    with pytest.raises(UserError, match="must not hold keys"):
        Place.at("s3://key:secret@bucket/x")
    with pytest.raises(UserError, match="Allowed are local paths"):
        Place.at("gopher://x/y").exists()


@pytest.mark.parametrize("where", ["file", "s3"])
def test_the_same_on_disk_and_on_s3(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = Place.at(str(tmp_path) if where == "file" else request.getfixturevalue("s3_root"))
    place = root / "store" / "file.bin"
    assert not place.exists() and not place.is_file()
    with pytest.raises(FileNotFoundError):
        place.read()
    place.write(b"0123456789")
    place.write(b"abcdefghij")
    assert place.read() == b"abcdefghij" and place.read_range(2, 3) == b"cde"
    assert place.parent.list() == ["file.bin"] and place.parent.list(".txt") == []
    assert [i.size for i in infos([place, root / "nothing", place])] == [10, None, 10]
    local = tmp_path / "ready"
    local.write_bytes(b"done")
    (root / "store" / "put").put_file(str(local))
    assert (root / "store" / "put").read() == b"done"
    odd = root.join("Symphony #5?.flac")
    odd.write(b"5")
    assert odd.read() == Place.at(odd.uri).read() == b"5" and root.list() == [odd.name]
    place.parent.delete()
    assert not place.exists()
    place.delete()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_a_table_is_read_by_no_other_thread() -> None:
    """Those of Arrow abort a command that ends while they let go of what they read."""
    job = (
        "import io, os, sys, pyarrow as pa, pyarrow.parquet as pq; from pipelines.store import parquet; "
        "out = io.BytesIO(); pq.write_table(pa.table({c: [str(i) for i in range(999)] for c in 'abcdef'}), out); "
        "read = {'one': parquet, 'many': lambda data: pq.read_table(io.BytesIO(data))}[sys.argv[1]]; "
        "before = set(os.listdir('/proc/self/task')); assert read(out.getvalue()).num_rows == 999; "
        "print(len(set(os.listdir('/proc/self/task')) - before))"
    )
    said = [subprocess.run([sys.executable, "-c", job, how], capture_output=True, text=True) for how in ("one", "many")]
    assert said[0].stdout == "0\n" and int(said[1].stdout) > 0, said


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    place = Place.at(tmp_path / "x.bin")
    place.write(b"old")
    with pytest.raises(TypeError):
        place.write("not bytes")  # type: ignore[arg-type]
    assert place.read() == b"old" and os.listdir(tmp_path) == ["x.bin"]


def test_no_room_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    place = Place.at(tmp_path / "x.bin")
    place.write(b"old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"no room left while writing .*x\.bin.*free some space"):
            place.write(b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert place.read() == b"old" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        Place.at(tmp_path / "x").write(b"")


def test_killed_in_the_middle(tmp_path: Path) -> None:
    script = (
        "import os,sys;from pipelines.store import atomic_local\n"
        f"with atomic_local({str(tmp_path / 'x')!r}) as t:\n"
        "    open(t,'wb').write(b'half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not (tmp_path / "x").exists() and Place.at(tmp_path).list() == []
