"""Mixtures, sets fetched from an object store, and shards that are not what they were."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from musicgen import weights
from musicgen.errors import UserError
from pipelines import takedown
from pipelines.shard import ShardSet, dataset_version, index_table, table_bytes
from pipelines.store import Place
from tests.training.synthetic import write_dataset
from training import data, plan, sources, words
from training.data import BatchConfig


def with_hashes(folder: Path) -> Path:
    """The set with its shards' hashes in dataset.json, as ingest writes them."""
    info = json.loads((folder / "dataset.json").read_text())
    info["shards"] = {
        f"shards/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "shards").glob("*.tar")
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sets")
    a = write_dataset(folder / "a", size=64, tracks=40)
    return with_hashes(a), with_hashes(write_dataset(folder / "b", size=64, tracks=10, seed=5))


@pytest.mark.parametrize("sample_by", ["tracks", "seconds"])
def test_a_mixture_draws_by_its_shares(two: tuple[Path, Path], sample_by: str) -> None:
    mixed = sources.open_data(f"{two[0]}:3,{two[1]}:7")
    assert len(mixed) == 50 and mixed.shares.tolist() == [0.3, 0.7]
    rule = plan.CropRule(100, sample_by=sample_by)  # type: ignore[arg-type]
    tracks = data.tracks_of(mixed, "train")
    drawn = [item for step in range(40) for item in plan.batch(step, 1, tracks, rule, size=64)[0]]
    of_b = np.mean([mixed.source[item.row] == 1 for item in drawn])
    assert of_b == pytest.approx(0.7, abs=0.03)
    item = next(item for item in drawn if mixed.source[item.row] == 1)
    single = ShardSet.open(str(two[1]))
    assert np.array_equal(mixed.codes(item.row), single.codes(item.row - 40))
    assert mixed.meta(item.row) == single.meta(item.row - 40)


def test_a_set_without_training_tracks_can_have_no_share(two: tuple[Path, Path], tmp_path: Path) -> None:
    held_out = with_hashes(write_dataset(tmp_path / "held-out", size=64, tracks=4, valid=4))
    mixed = sources.open_data(f"{two[0]}:3,{held_out}:7")
    with pytest.raises(UserError, match=r"of which '.*held-out' has no training tracks"):
        data.check(mixed, BatchConfig(size=4), world=1, num_codebooks=4, codebook_size=64)
    data.check(sources.open_data(f"{two[0]},{two[1]}"), BatchConfig(size=4), world=1, num_codebooks=4, codebook_size=64)


def test_sampling_by_weight_and_by_duration(two: tuple[Path, Path]) -> None:
    frames = np.array([100, 300, 600])
    tracks = plan.Tracks(np.arange(3), frames, np.array([1.0, 1.0, 2.0]))
    for sample_by, mass in (("tracks", [1, 1, 2]), ("seconds", [100, 300, 1200])):
        rule = plan.CropRule(50, sample_by=sample_by)  # type: ignore[arg-type]
        drawn = [item.row for step in range(50) for item in plan.batch(step, 1, tracks, rule, size=64)[0]]
        assert np.bincount(drawn, minlength=3) / len(drawn) == pytest.approx(np.array(mass) / sum(mass), abs=0.03)


def test_one_set_keeps_its_version_and_a_mixture_has_its_own(two: tuple[Path, Path]) -> None:
    alone = sources.open_data(str(two[0]))
    assert alone.info["dataset_version"] == ShardSet.open(str(two[0])).info["dataset_version"]
    versions = {sources.open_data(f"{two[0]}:{x},{two[1]}:1").info["dataset_version"] for x in (1, 2)}
    assert len(versions | {alone.info["dataset_version"]}) == 3
    assert sources.parse("s3://bucket/a,b:3") == [("s3://bucket/a", 0.25), ("b", 0.75)]
    assert sources.parse("s3://bucket/a") == [("s3://bucket/a", 1.0)]
    for bad in ("a:0,b:1", "a:1,:2", "a:nan,b:1"):
        with pytest.raises(UserError, match="DATA="):
            sources.parse(bad)


def test_who_is_trained_on_in_one_set_is_not_validated_on_in_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_dataset(tmp_path / name, tracks=6, valid=v, size=64) for name, v in (("one", 2), ("two", 1)))
    alone = ShardSet.open(str(one))
    artists = alone.index.column("artist").to_pylist()
    mixed = sources.open_data(f"{one},{two}")
    trained = {
        name for s in mixed.sets for name in s.index.column("artist").take(pa.array(s.rows("train"))).to_pylist()
    }
    left = [row for row in alone.rows("valid") if artists[row] not in trained]
    valid = mixed.rows("valid")
    assert len(valid) + len(mixed.heard_elsewhere) == 3 and len(mixed.heard_elsewhere) >= 1
    assert [row for row in valid if row < len(alone)] == left
    assert not {mixed.index.column("artist")[int(row)].as_py() for row in valid} & trained
    with pytest.raises(UserError, match=r"names .*one' twice; name it once"):
        sources.open_data(f"{one}:0.5,{one}/:0.5")


def with_sources(folder: Path, facts: dict[str, dict[str, Any]]) -> Path:
    """The set with what its sources became, as ingest keeps it."""
    rows = [{"track_id": t, "work_id": "", "json_sha256": None, "facts": json.dumps(f)} for t, f in facts.items()]
    table = pa.Table.from_pylist(rows, schema=takedown.SOURCES_SCHEMA)
    (folder / takedown.SOURCES).write_bytes(table_bytes(table))
    return folder


def test_what_one_set_took_down_is_left_out_of_the_others(tmp_path: Path) -> None:
    a, b, c = (write_dataset(tmp_path / name, tracks=4, valid=1, size=64) for name in "abc")
    facts = {f"track-{n}": {"pcm_sha256": f"{n}" * 64, "source_sha256": f"{n}a" * 32} for n in range(4)}
    before = sources.open_data(f"{a},{b},{c}")
    assert not before.taken_down and len(before.silent) == 3  # nothing says which sounds they are
    with_sources(a, facts)
    gone = {"gone": takedown.remembered({"0" * 64, "3a" * 32}), "odd": {"reject": {}, "source_sha256": "1a" * 32}}
    with_sources(b, facts | gone)
    mixed = sources.open_data(f"{a},{b},{c}")
    assert [*mixed.taken_down] == [0, 3]  # by its sound, by its file; b's own tracks are ingest's to judge
    assert [mixed.rows(split).tolist() for split in ("train", "valid")] == [[1, 2, 4, 5, 6, 8, 9, 10], [7, 11]]
    assert mixed.info["dataset_version"] != before.info["dataset_version"]
    told = words._left_out(mixed)
    assert told[0].startswith("withdrawn 2 tracks are left out") and f"'track-0' of {a} as 'gone' of {b}" in told[0]
    assert any(f"{c}: no sources.parquet there" in line for line in told)
    assert not sources.open_data(str(a)).taken_down


def test_what_is_left_out_of_no_split_changes_no_version(tmp_path: Path) -> None:
    a, b = (write_dataset(tmp_path / name, tracks=4, valid=1, size=64) for name in "ab")
    rows = [
        row | {"split": "test"} if row["track_id"] == "track-0" else row
        for row in ShardSet.open(str(a)).index.to_pylist()
    ]
    (a / "index.parquet").write_bytes(table_bytes(table := index_table(rows)))
    info = json.loads((a / "dataset.json").read_text()) | {"dataset_version": dataset_version(table)}
    (a / "dataset.json").write_text(json.dumps(info))
    version = sources.open_data(f"{a},{b}").info["dataset_version"]
    for number, same in ((0, True), (1, False)):
        with_sources(a, {f"track-{number}": {"pcm_sha256": "1" * 64}})
        with_sources(b, {"gone": takedown.remembered({"1" * 64})})
        mixed = sources.open_data(f"{a},{b}")
        assert len(mixed.taken_down) == 1 and (mixed.info["dataset_version"] == version) is same


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"sounds": None}, "not those of a track"),
        ({"sounds": 5}, "not those of a track"),
        ({"sounds": "abc"}, "no texts"),
        ({"sounds": [["a"]]}, "no texts"),
        ({"pcm_sha256": ["a"]}, "no texts"),
        ({"pcm_sha256": "a", "stems": None}, "not those of a track"),
        ({"pcm_sha256": "a", "stems": {"sha256": []}}, "not those of a track"),
    ],
)
def test_damaged_facts_are_said(two: tuple[Path, Path], tmp_path: Path, facts: Any, why: str) -> None:
    other = write_dataset(tmp_path / "other", tracks=2, valid=0, size=64)
    with_sources(other, {"gone": takedown.remembered({"1" * 64})})
    for name in ("a", "b"):
        shutil.copytree(two[1], tmp_path / name)
    with_sources(tmp_path / "a", {"odd": facts})
    with pytest.raises(UserError, match=f"sources.parquet is damaged: (facts|hashes) of 'odd' are {why}"):
        sources.open_data(f"{tmp_path / 'a'},{other}")


def test_another_table_of_sources_than_the_set_says_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(two[1], folder := tmp_path / "set")
    data = (with_sources(folder, {"t": {"pcm_sha256": "1" * 64}}) / takedown.SOURCES).read_bytes()
    info = json.loads((folder / "dataset.json").read_text()) | {"sources_sha256": hashlib.sha256(data).hexdigest()}
    (folder / "dataset.json").write_text(json.dumps(info))
    sources.open_data(f"{folder},{two[0]}")
    with_sources(folder, {})
    with pytest.raises(UserError, match=r"sources.parquet is damaged: it was changed since dataset.json"):
        sources.open_data(f"{folder},{two[0]}")
    (folder / takedown.SOURCES).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"sources.parquet is damaged"):
        sources.open_data(f"{folder},{two[0]}")


def test_music_that_may_not_be_sold_is_told_at_the_start_and_with_the_release(two: tuple[Path, Path]) -> None:
    shards = sources.open_data(str(two[1]))
    assert words._licences(shards, "MIT") == ["licences  CC0-1.0 (the music); MIT (the releases, --licence)"]
    names = [f"CC-BY-NC-{n}.0" for n in range(1, 8)] + ["CC0-1.0"] * (len(shards) - 7)
    shards.index = shards.index.set_column(shards.index.schema.get_field_index("licence"), "licence", pa.array(names))
    trained = sources.licences(shards)
    first, warning = words._licences(shards, "MIT")
    assert ("more (the music)" in first) is (len(trained) > 6)
    assert "CC-BY-NC-1.0" in warning and "CC0" not in warning and "releases are called MIT" in warning
    assert len(words._licences(shards, "cc-by-nc-4.0")) == len(words._licences(shards, "not stated")) == 1
    child = {"inherited": [weights.ancestor("base", "MIT", {"data_licences": trained})]}
    assert "derive from base: MIT\nlicence   these weights learned from music under CC-BY-NC-1.0" in weights.notice(
        child
    )
    odd = weights.notice({"training": {"data_licences": [f"CC-BY-NC-{n}\x1b[2J" for n in range(100)]}})
    assert odd.isprintable() and "and 94 more" in odd and not weights.notice({"training": {"data_licences": 5}})
    for free in ("LicenseRef-NCsoft", "LicenseRef-NC", "CC-BY-4.0 OR CC-BY-NC-4.0", None):
        assert not weights.non_commercial(free)
    assert weights.non_commercial("cc-by-nc") and weights.non_commercial("CC-BY-NC-4.0 OR CC-BY-NC-SA-4.0")
    told = weights.notice({"training": {"data_licences": trained}})
    assert told.startswith("licence   these weights learned from music under CC-BY-NC-1.0") and "CC0" not in told
    assert not weights.notice({"training": {"data_licences": ["CC0-1.0"]}}) and not weights.notice({})


def test_a_folder_may_be_named_like_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("takes:3", "a,b:2", "c"):
        (tmp_path / name).mkdir()
    assert sources.parse("takes:3") == [("takes:3", 1.0)] and sources.parse("a,b:2") == [("a,b:2", 1.0)]
    assert sources.parse("takes:3,c") == [("takes:3", 0.5), ("c", 0.5)]
    assert sources.parse("takes:3:1,c:3") == [("takes:3", 0.25), ("c", 0.75)]


@pytest.mark.parametrize(
    ("spec", "places"),
    [
        ("s3://m/a?endpoint_override=host:9000", [("s3://m/a?endpoint_override=host:9000", 1.0)]),
        ("s3://m/a?x=y&endpoint_override=[::1]:9000", [("s3://m/a?x=y&endpoint_override=[::1]:9000", 1.0)]),
        ("s3://m/a?endpoint_override=http://h:9", [("s3://m/a?endpoint_override=http://h:9", 1.0)]),
        ("s3://m/a?endpoint_override=h:9000:3,b:1", [("s3://m/a?endpoint_override=h:9000", 0.75), ("b", 0.25)]),
        ("s3://m/a?endpoint_override=h%3A9000:3,b:1", [("s3://m/a?endpoint_override=h%3A9000", 0.75), ("b", 0.25)]),
        ("s3://m/a?endpoint_override=h:9000,b", [("s3://m/a?endpoint_override=h:9000", 0.5), ("b", 0.5)]),
        ("s3://m/a?endpoint_override=h:0.5,b:0.5", [("s3://m/a?endpoint_override=h", 0.5), ("b", 0.5)]),
        ("s3://m/a?endpoint_override=h:9000&scheme=http:3,b:1", [
            ("s3://m/a?endpoint_override=h:9000&scheme=http", 0.75), ("b", 0.25)]),
    ],
)  # fmt: skip
def test_a_port_is_no_share(spec: str, places: list[tuple[str, float]]) -> None:
    assert sources.parse(spec) == places


def test_a_store_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "TRIES", 1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"^DATA: s3://m/a could not be read after 1 tries: "):
        sources.open_data("s3://m/a?scheme=http&endpoint_override=127.0.0.1:9", str(tmp_path))


@pytest.mark.parametrize("failures", [4, 5])
def test_a_store_that_fails_for_a_while_is_asked_again(
    failures: int, two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, waited = sources._copy, []
    left = [failures]

    def flaky(*place: Any) -> str:
        if left[0]:
            left[0] -= 1
            raise OSError("connection reset")
        return copy(*place)

    monkeypatch.setattr(sources, "_copy", flaky)
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=waited.append))
    if failures < 5:
        folder = sources.fetch(Place.at(str(two[0])), tmp_path)
        assert len(sources.open_data(str(folder))) == 40
    else:
        with pytest.raises(UserError, match=r"-00000.tar could not be read after 5 tries: connection reset"):
            sources.fetch(Place.at(str(two[0])), tmp_path)
    assert waited == [0.5, 1, 2, 4]  # seconds, longer each time


def test_a_full_local_disk_is_not_waited_for() -> None:
    tried: list[int] = []

    def full() -> None:
        tried.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        sources._tried(full, Place.at("s3://music/set"))
    assert len(tried) == 1


def test_codecs_do_not_mix(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "c", size=64, codec={"name": "other", "identity": "f" * 64})
    with pytest.raises(UserError, match=r"DATA mixes codecs.*'tiny' \(identity 0000.*'other' \(identity ffff"):
        sources.open_data(f"{two[0]},{other}")


def first_batch(folder: Path, workers: int) -> data.Batch:
    config = BatchConfig(crop_seconds=2.0, size=32, workers=workers)
    return next(iter(data.training_loader(data.Stream(sources.open_data(str(folder)), config, seed=1))))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_altered_shard_is_not_trained_on(two: tuple[Path, Path], tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "set"
    shutil.copytree(two[0], folder)
    assert len(first_batch(folder, workers).keys) == 32
    shard = folder / "shards" / "train-00000.tar"
    whole = shard.read_bytes()
    index = ShardSet.open(str(folder)).index.to_pylist()
    altered = bytearray(whole)
    for row in index:
        if row["split"] == "train":
            altered[row["codes_offset"] + 200] ^= 1
    shard.write_bytes(altered)
    with pytest.raises(
        UserError, match=r"^DATA: .*train-00000.tar was altered since it was made.*Nothing was trained on what"
    ):
        first_batch(folder, workers)
    shard.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UserError, match="was altered since it was made"):
        first_batch(folder, workers)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000.tar is gone \(deleted or withdrawn\)"):
        first_batch(folder, workers)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """A real S3 protocol server; yields a URI with a set in it."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="music")
        yield f"s3://music/SET?scheme=http&endpoint_override={host}:{port}"
    server.stop()


def upload(folder: Path, uri: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (Place.at(uri) / str(file.relative_to(folder))).write(file.read_bytes())


def test_a_remote_set_is_fetched_once_and_checked(two: tuple[Path, Path], store: str, tmp_path: Path) -> None:
    uri = store.replace("SET", "good")
    upload(two[0], uri)
    folder = sources.fetch(Place.at(uri), tmp_path)
    for name in ("shards/train-00000.tar", "shards/valid-00000.tar", "dataset.json", "index.parquet"):
        assert (folder / name).read_bytes() == (two[0] / name).read_bytes()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("[tv]*.tar")}
    assert len(times) == 2
    read = sources.open_data(f"{uri}:1,{two[1]}:1", str(tmp_path))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("[tv]*.tar")} == times and len(read) == 50
    row = int(read.rows("train")[0])
    assert np.array_equal(read.codes(row), ShardSet.open(str(two[0])).codes(row))
    barred = with_sources(tmp_path, {"t": takedown.remembered({"0" * 64})}) / takedown.SOURCES
    (Place.at(uri) / takedown.SOURCES).write(barred.read_bytes())  # taken down since, and it was never in the set
    info = json.loads((two[0] / "dataset.json").read_text()) | {"counts": {"rejects": 1}}
    (Place.at(uri) / "dataset.json").write(json.dumps(info).encode())
    renewed = ShardSet.open(str(sources.fetch(Place.at(uri), tmp_path)))
    assert takedown.SourcesTable.of(renewed).barred() == {"0" * 64: "t"}
    assert {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob("[tv]*.tar")
    } == times  # the shards are those that were there
    assert np.array_equal(renewed.codes(0), ShardSet.open(str(two[0])).codes(0))
    altered = bytearray((two[1] / "shards/train-00000.tar").read_bytes())
    altered[600] ^= 1
    bad = store.replace("SET", "bad")
    upload(two[1], bad)
    (Place.at(bad) / "shards/train-00000.tar").write(bytes(altered))
    with pytest.raises(UserError, match=r"train-00000.tar is not the shard that dataset.json describes"):
        sources.fetch(Place.at(bad), tmp_path)
    version = ShardSet.open(str(two[1])).info["dataset_version"][:32]
    left = [p.name for p in (tmp_path / version / "shards").iterdir() if not p.name.startswith(".lock")]
    assert left in ([], ["valid-00000.tar"])  # whole or absent
    (Place.at(bad) / "shards/train-00000.tar").delete()
    with pytest.raises(UserError, match="is gone"):
        sources.fetch(Place.at(bad), tmp_path)


def test_a_set_that_changes_while_it_is_fetched_is_refused(
    two: tuple[Path, Path], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, fetch_one = store.replace("SET", "changing"), sources._fetch_one
    upload(two[0], uri)

    def meanwhile(*given: Any, **more: Any) -> None:
        for name in ("index.parquet", "dataset.json"):
            (Place.at(uri) / name).write((two[1] / name).read_bytes())
        fetch_one(*given, **more)

    monkeypatch.setattr(sources, "_fetch_one", meanwhile)
    with pytest.raises(UserError, match="changed while it was fetched"):
        sources.fetch(Place.at(uri), tmp_path)
    assert not list(tmp_path.rglob("dataset.json"))  # nobody takes the copy for a whole one


def test_a_shard_whose_music_was_all_withdrawn_is_not_fetched(
    two: tuple[Path, Path], store: str, tmp_path: Path
) -> None:
    folder, uri = tmp_path / "set", store.replace("SET", "withdrawn")
    shutil.copytree(two[1], folder)
    rows = ShardSet.open(str(folder)).index.to_pylist()
    table = index_table([row | {"withdrawn": row["split"] == "valid"} for row in rows])
    (folder / "index.parquet").write_bytes(table_bytes(table))
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"dataset_version": dataset_version(table)}))
    (folder / "shards" / "valid-00000.tar").unlink()
    upload(with_hashes(folder), uri)
    read = sources.open_data(uri, str(tmp_path / "cache"))
    assert not len(read.rows("valid")) and read.codes(int(read.rows("train")[0])).shape[0] == 4


def test_a_damaged_copy_says_that_it_is_one(two: tuple[Path, Path], store: str, tmp_path: Path) -> None:
    uri = store.replace("SET", "copied")
    upload(two[0], uri)
    folder = sources.fetch(Place.at(uri), tmp_path)
    (folder / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=rf"index.parquet is damaged.*copy of s3://music/copied: delete {folder} and"):
        sources.open_data(uri, str(tmp_path))
    shutil.rmtree(folder)
    assert len(sources.open_data(uri, str(tmp_path))) == 40


def _fetch(uri: str, cache: str, rank: int, out: str, together: Any) -> None:
    copy = sources._copy

    def slowly(*place: Any) -> str:  # so that whoever does not wait for the other fetches the same
        time.sleep(0.5)
        return copy(*place)

    sources._copy = slowly
    together.wait()
    Path(out).write_text(str(sources.fetch(Place.at(uri), Path(cache), rank=rank)))


def test_processes_of_a_machine_share_the_copy(
    two: tuple[Path, Path], store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = store.replace("SET", "shared")
    upload(two[0], uri)
    caplog.set_level(logging.INFO, "werkzeug")  # the server's own record of what it was asked for
    context = multiprocessing.get_context("spawn")
    cache, together = str(tmp_path / "cache"), context.Barrier(2, timeout=100)
    workers = [
        context.Process(target=_fetch, args=(uri, cache, rank, str(tmp_path / f"{rank}"), together))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    places = {(tmp_path / f"{r}").read_text() for r in range(2)}
    assert len(places) == 1
    assert len(sources.open_data(places.pop())) == 40
    assert len(os.listdir(tmp_path / "cache")) == 1
    asked = [r.getMessage() for r in caplog.records if r.name == "werkzeug"]
    for shard in ("train-00000.tar", "valid-00000.tar"):
        assert sum("GET /music/shared/shards/" in line and shard in line for line in asked) == 1, shard
