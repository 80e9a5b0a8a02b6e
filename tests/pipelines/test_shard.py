"""The shard format: bytes, offsets, random access, and the webdataset library reading it as it is."""

from __future__ import annotations

import hashlib
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from musicgen.errors import UserError
from pipelines import shard
from pipelines.shard import ShardSet
from pipelines.store import Place


def make_set(folder: Path, tracks: int = 5) -> list[tuple[np.ndarray, np.ndarray, dict]]:
    """A small finished set with two shards; returns what went in, in index order."""
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir(parents=True)
    contents, rows = [], []
    for name, split in (("shards/train-00000.tar", "train"), ("shards/valid-00001.tar", "valid")):
        members = []
        for i in range(tracks):
            codes = rng.integers(0, 2048, (4, 50 + i)).astype(np.int16)
            chroma = rng.integers(0, 12, 8 + i).astype(np.uint8)
            meta = {"key": f"{split[0]}{i:031x}", "title": "Ä 曲", "split": split}
            members.append(shard.make_record(codes, chroma, meta))
            contents.append((codes, chroma, meta))
        for written in shard.write_tar(str(folder / name), members):
            more = {"track_id": written["key"][:4], "shard": name, "split": split, "artist": "a", "work": None}
            more |= {"frames": 50, "weight": 1.0, "duration_seconds": 1.0, "licence": "CC0-1.0"}
            rows.append({**written, **more, "genre": "folk", "language": "en", "withdrawn": written["key"][-1] == "1"})
    index = shard.index_table(rows[::-1])
    Place.at(folder / "index.parquet").write(shard.table_bytes(index))
    codec = {"name": "tiny", "identity": "0" * 64, "frame_rate": 50, "num_codebooks": 4, "codebook_size": 2048}
    info = {"schema_version": 1, "dataset_version": shard.dataset_version(index)}
    info["codec"] = {**codec, "sample_rate_hz": 32_000}
    Place.at(folder / "dataset.json").write(json.dumps(info).encode())
    return contents


def test_random_access_gives_back_what_went_in(tmp_path: Path) -> None:
    contents = make_set(tmp_path)
    data = ShardSet.open(tmp_path.as_uri())
    assert len(data) == 10
    for opened in (data, pickle.loads(pickle.dumps(data))):
        for i in (7, 0, 9, 3):
            codes, chroma, meta = contents[i]
            assert opened.codes(i).dtype == np.int16 and np.array_equal(opened.codes(i), codes)
            assert opened.chroma(i).dtype == np.uint8 and np.array_equal(opened.chroma(i), chroma)
            assert opened.meta(i) == meta
    assert data.codes(2).base is not None and not data.codes(2).flags.writeable  # a view of the mapped file
    assert data.rows("train").dtype == np.int64 and data.rows("train").tolist() == [0, 2, 3, 4]  # 1 is withdrawn
    assert data.rows("valid").tolist() == [5, 7, 8, 9] and data.rows("test").size == 0
    with pytest.raises(UserError, match="allowed: train, valid, test"):
        data.rows("dev")


def test_webdataset_reads_the_shards_as_they_are(tmp_path: Path) -> None:
    contents = make_set(tmp_path)
    urls = sorted(str(p) for p in (tmp_path / "shards").iterdir())
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 10
    for sample, (codes, chroma, meta) in zip(samples, contents):
        assert sample["__key__"] == meta["key"] and sample["json"] == meta
        assert np.array_equal(sample["codes.npy"], codes) and np.array_equal(sample["chroma.npy"], chroma)


def test_members_carry_no_time_and_no_owner(tmp_path: Path) -> None:
    make_set(tmp_path)
    with tarfile.open(tmp_path / "shards/train-00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_order_is_by_key(tmp_path: Path) -> None:
    records = [shard.make_record(np.zeros((4, 5)), np.zeros(2), {"key": key}) for key in ("b", "a")]
    with pytest.raises(ValueError, match="ascend"):
        shard.write_tar(str(tmp_path / "x.tar"), records)


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    make_set(tmp_path)
    data = ShardSet.open(str(tmp_path))
    data.record(0)
    path = tmp_path / "shards/train-00000.tar"
    raw = bytearray(path.read_bytes())
    raw[int(data.index.column("codes_offset")[0].as_py()) + 200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="does not match the index"):
        ShardSet.open(str(tmp_path)).record(0)


def test_version_follows_content_and_not_order(tmp_path: Path) -> None:
    make_set(tmp_path / "a")
    make_set(tmp_path / "b")
    make_set(tmp_path / "c", tracks=4)
    a, b, c = (ShardSet.open(str(tmp_path / n)).info["dataset_version"] for n in "abc")
    assert a == b != c


def test_sets_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ShardSet.open(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no finished data set"):
        ShardSet.open(str(tmp_path))
    make_set(tmp_path / "old")
    (tmp_path / "old/dataset.json").write_text('{"schema_version": 0}')
    with pytest.raises(UserError, match="schema version 0, this program reads 1"):
        ShardSet.open(str(tmp_path / "old"))


DAMAGE = {
    b"\xff\x00": "it is not JSON",
    b"{": "it is not JSON",
    b"[" * 100_000: "it is not JSON",
    b"[1]": "it holds list, expected an object",
    b'{"schema_version": 1}': "dataset_version is missing",
}
CHANGED = {
    "dataset_version": [(7, "dataset_version is '7', expected text"), ("../x", "expected 64 hexadecimal digits")],
    "codec": [([], r"codec is '\[\]', expected an object"), ({"name": "x"}, "codec.identity is missing")],
    "shards": [({"a": 1}, "shards is no object of names and hashes")],
}


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_description_is_said(tmp_path: Path, text: bytes) -> None:
    make_set(tmp_path)
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(
        UserError, match=rf"dataset.json is damaged: {DAMAGE[text]}.*delete this file and run `make ingest"
    ):
        ShardSet.open(str(tmp_path))


def test_a_description_of_other_types_is_said(tmp_path: Path) -> None:
    make_set(tmp_path)
    info = json.loads((tmp_path / "dataset.json").read_text())
    cases = [({name: value}, said) for name, values in CHANGED.items() for value, said in values]
    cases += [
        ({"codec": {**info["codec"], "frame_rate": value}}, "codec.frame_rate") for value in (0, "50", True, None)
    ]
    for change, said in cases:
        (tmp_path / "dataset.json").write_text(json.dumps(info | change))
        with pytest.raises(UserError, match=f"dataset.json is damaged: .*{said}"):
            ShardSet.open(str(tmp_path))


def test_a_damaged_index_is_said(tmp_path: Path) -> None:
    make_set(tmp_path)
    path = tmp_path / "index.parquet"
    whole, table = path.read_bytes(), shard.ShardSet.open(str(tmp_path)).index
    empty = table.set_column(0, "key", pa.array([None] * len(table), pa.string()))
    texts = table.set_column(8, "frames", pa.array(["many"] * len(table)))
    for data, said in (
        (whole[: len(whole) // 2], "not the parquet file that ingest writes"),
        (b"", "not the parquet file that ingest writes"),
        (shard.table_bytes(texts), "not the parquet file that ingest writes"),
        (shard.table_bytes(pa.table({"a": [1]})), "columns are missing: key, track_id"),
        (shard.table_bytes(empty), "columns have empty cells: key"),
    ):
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=f"index.parquet is damaged: .*{said}.*`make ingest CATALOG=… OUT={tmp_path}`"
        ):
            ShardSet.open(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=r"index.parquet is damaged: it is missing"):
        ShardSet.open(str(tmp_path))


@pytest.mark.parametrize("with_hash", [False, True])
def test_an_index_under_another_description_is_noticed(tmp_path: Path, with_hash: bool) -> None:
    make_set(tmp_path)
    path, description = tmp_path / "index.parquet", tmp_path / "dataset.json"
    if with_hash:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        description.write_text(json.dumps(json.loads(description.read_text()) | {"index_sha256": digest}))
    table = ShardSet.open(str(tmp_path)).index
    pq.write_table(table, path, compression="none")  # the same rows as other bytes: another library wrote it
    assert ShardSet.open(str(tmp_path)).index.equals(table)
    for changed in (table.slice(1), table.set_column(9, "weight", pa.array([float("nan")] * len(table), pa.float32()))):
        path.write_bytes(shard.table_bytes(changed))
        with pytest.raises(UserError, match=r"it was changed since dataset.json was written"):
            ShardSet.open(str(tmp_path))


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    make_set(tmp_path)
    table = ShardSet.open(str(tmp_path)).index
    away = table.set_column(2, "shard", pa.array(["shards/../../x.tar"] * len(table)))
    (tmp_path / "index.parquet").write_bytes(shard.table_bytes(away))
    info = json.loads((tmp_path / "dataset.json").read_text()) | {"dataset_version": shard.dataset_version(away)}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"it names the shard 'shards/../../x.tar', expected shards/NAME.tar"):
        ShardSet.open(str(tmp_path))
