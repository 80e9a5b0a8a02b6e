"""The whole of ingest through a real Ray: conservation, idempotence, growth, kills, rejects, settings, S3."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from musicgen import codec as codecs
from musicgen import settings
from musicgen.attributes import AttributeConfig, of_record
from musicgen.chroma import chroma_bins
from musicgen.errors import UserError
from pipelines import assemble, shard, stages
from pipelines import ingest as command
from pipelines.assemble import SplitConfig
from pipelines.shard import ShardSet
from pipelines.store import Place
from tests.pipelines.conftest import TODAY, digests, rights, row, tone, wav, write_rows
from training import sources as training_sources

COMMON = [f"--run.{name}=1" for name in ("codec_actors", "workers")]
COMMON += ["--codec=tiny", "--analysis=builtin", "--buckets=2", f"--rights.today={TODAY}"]
COMMON += ["--splits.train=0.6", "--splits.valid=0.2", "--splits.test=0.2"]


def rejects(out: Path | str) -> dict[str | None, str]:
    table = pq.read_table(Path(out) / "rejects.parquet")
    return dict(zip(table.column("track_id").to_pylist(), table.column("code").to_pylist()))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str | None, str], int]:
    """A catalogue with eight good rows and every fault that a row can have; its expected rejects; its rows."""
    folder = tmp_path_factory.mktemp("faulty")
    audio = folder / "audio"
    audio.mkdir()
    sound = tone(50)
    whole = wav(sound)
    made = {
        "b_page": b"<html>not found</html>",
        "b_cut": whole[: len(whole) // 2],
        "b_silent": wav(sound * 0),
        "b_short": wav(sound[:4000]),
        "b_long": wav(tone(51, 6.0)),
        "b_clipped": wav(np.clip(sound * 40, -1, 1)),
        "b_dc": wav(sound + 0.2),
        "b_phase": wav(np.hstack([sound, -sound])),
        "b_flipped": _damaged(wav(tone(52, 4.0), kind="FLAC")),
    }
    for name, data in made.items():
        (audio / f"{name}.bin").write_bytes(data)
    rows = [row(i) for i in range(8)]
    expected: dict[str | None, str] = {}

    def bad(code: str, name: str, **changes: object) -> None:
        rows.append(row(100 + len(rows), track_id=name, artist="Artist 1", uri=f"audio/{name}.bin", **changes))
        expected[name] = code

    codes = "not_audio truncated silent too_short too_long clipped dc phase decode"
    for name, code in zip(made, codes.split(), strict=True):
        bad(code, name)
    bad("missing", "b_absent")
    bad("missing", "b_scheme")
    rows[-1]["uri"] = "s3://key:secret@bucket/x.wav"
    for code, changes in (
        ("no_licence", {"licence": None}), ("no_consent", {"consent_evidence": None}),
        ("no_rightsholder", {"rightsholders": []}), ("no_term", {"valid_until": None}), ("no_status", {"status": None}),
        ("not_granted", {"grants": ["redistribute_tokens"]}), ("not_yet_valid", {"valid_from": "2027-01-01"}),
        ("expired", {"valid_until": "2025-01-01"}), ("territory", {"territory": ["FR"]}),
        ("opt_out", {"opt_out_signals": ["noai"]}), ("withdrawn", {"status": "withdrawn"}),
    ):  # fmt: skip
        bad(code, f"r_{code}", rights=rights(**changes))
    bad("duplicate", "z_twin")
    (audio / "z_twin.bin").write_bytes(wav(tone(3), kind="FLAC"))  # the sound of t003 in another container
    bad("invalid_row", "b_bpm", bpm=-1.0)
    bare = {"genre": None, "moods": [], "instruments": [], "bpm": None, "key": None, "descriptions": []}
    bad("caption_empty", "b_mute", **bare)
    noise = np.random.default_rng(0).normal(size=(60_000, 1)).astype(np.float32) * 0.1
    (audio / "b_mute.bin").write_bytes(wav(noise))
    catalogue = write_rows(folder, rows)
    with open(catalogue, "a") as handle:
        handle.write("{broken\n")
    expected[None] = "invalid_row"
    return catalogue, expected, len(rows) + 1


def _damaged(data: bytes) -> bytes:
    """A file whole in its length whose middle has wrong bytes."""
    changed = bytearray(data)
    rng = np.random.default_rng(7)
    for at in range(len(data) // 3, len(data) * 2 // 3, 40):
        changed[at] ^= int(rng.integers(1, 255))
    return bytes(changed)


@pytest.fixture(scope="module")
def made(faulty: tuple, local_ray: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faulty catalogue, ingested once."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert run(faulty[0], out, "--checks.max_seconds", "5") == 0
    return out


def run(catalogue: str, out: Path | str, *more: str) -> int:
    """The command in this process, with a small random codec and one worker of each kind."""
    return command.main(["--catalog", catalogue, "--out", str(out), *COMMON, *more])


def test_every_fault_has_its_code_and_nothing_is_lost(faulty: tuple, made: Path) -> None:
    _, expected, rows = faulty
    assert rejects(made) == expected
    info = json.loads((made / "dataset.json").read_text())
    assert info["counts"]["rows"] == rows == info["counts"]["tracks"] + info["counts"]["rejects"]
    data = ShardSet.open(str(made))
    assert sorted(data.index.column("track_id").to_pylist()) == [f"t{i:03d}" for i in range(8)]
    table = pq.read_table(made / "rejects.parquet").to_pylist()
    assert [r["row"] for r in table] == sorted(r["row"] for r in table)
    assert {r["track_id"]: bool(r["source_sha256"]) for r in table}["b_cut"]
    assert not (made / ".work").exists()


def test_shards_hold_what_the_plain_functions_give(faulty: tuple, made: Path) -> None:
    data, codec = ShardSet.open(str(made)), codecs.tiny()
    for i in range(len(data)):
        meta = data.meta(i)
        from pipelines import audio

        decoded = audio.decode_bytes((Path(faulty[0]).parent / f"audio/{meta['track_id']}.wav").read_bytes(), 60)
        sound = audio.prepare(decoded.pcm, decoded.sample_rate_hz, 32_000, 1)
        assert np.array_equal(data.codes(i), codec.encode_track(sound))
        assert np.array_equal(data.chroma(i), chroma_bins(sound[0]))
        assert data.codes(i).shape == (4, meta["frames"]) and data.index.column("frames")[i].as_py() == meta["frames"]
        assert meta["frames"] == -(-sound.shape[1] // 640) and meta["duration_seconds"] == pytest.approx(2.5)
        assert meta["key"] == data.index.column("key")[i].as_py() and len(meta["captions"]) == 8
        assert meta["rights"]["licence"] == "CC-BY-4.0" and meta["analysis"]["backend"] == "builtin"
        assert meta["key_signature"] == "C major" and meta["descriptions"][1]["language"] == "de"
        heard = of_record([AttributeConfig("key")], meta, [True])
        assert np.array_equal(heard, AttributeConfig("key").weights("C major"))


def test_webdataset_reads_it(made: Path) -> None:
    samples = list(webdataset.WebDataset(sorted(map(str, (made / "shards").iterdir())), shardshuffle=False).decode())
    assert sorted(s["json"]["track_id"] for s in samples) == [f"t{i:03d}" for i in range(8)]
    assert all(s["codes.npy"].shape[0] == 4 for s in samples)


def test_the_card_is_whole_and_quiet(faulty: tuple, made: Path) -> None:
    from pipelines import report

    page = (made / "card/index.html").read_text()
    assert "<svg" in page and "<script" not in page and "http" not in page and "url(" not in page.replace("url(#", "")
    for word in (
        "waltz",
        "CC-BY-4.0",
        "Example Music",
        "b_phase",
        "Hours by tempo",
        "not_granted",
        codecs.tiny().identity,
    ):
        assert word in page
    fragment = report.card_fragment(str(made))
    assert fragment in page


def test_again_does_nothing_and_says_so(faulty: tuple, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in made.rglob("*") if p.is_file()}

    before = state()
    assert run(faulty[0], made, "--checks.max_seconds", "5") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert state() == before


def test_other_settings_are_refused_by_name(faulty: tuple, made: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(faulty[0], made, "--checks.max_seconds", "7", "--seed", "5", "--rights.purpose", '["train","sync"]')
    text = str(caught.value)
    assert "checks.max_seconds: 5.0 there, 7.0 now" in text and "seed: 0 there, 5 now" in text
    assert "purpose: ['train'] there, ['sync', 'train'] now" in text and "captions" not in text
    with pytest.raises(UserError, match=r"codec 'tiny' \(identity \w{12}…\) there, 'demo' \(identity \w{12}…\) now"):
        run(faulty[0], made, "--checks.max_seconds", "5", "--codec", "demo")


def test_growth_change_and_removal_give_the_set_made_at_once(
    local_ray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # ten rows; more artists and a shared work that joins two groups; a twin with a lower id than a track in the set
    rows = [row(i, artist=f"A{i}") for i in range(10)]
    joined = row(10, artist="A1", work="Work 2")
    changed = {**row(4, artist="A4"), "title": "Another title"}
    final = [*rows[:4], changed, *rows[5:9], joined, row(11, artist="B"), row(3, track_id="t0000", artist="A3")]
    final[-1]["uri"] = "audio/t003.wav"
    catalogue = write_rows(tmp_path / "grown", rows)
    assert run(catalogue, tmp_path / "grown/out") == 0
    write_rows(tmp_path / "grown", final)
    capsys.readouterr()
    assert run(catalogue, tmp_path / "grown/out") == 0
    assert "shards written" in capsys.readouterr().out
    shutil.copytree(tmp_path / "grown/audio", tmp_path / "once/audio")
    assert run(write_rows(tmp_path / "once", final), tmp_path / "once/out") == 0
    assert digests(tmp_path / "grown/out") == digests(tmp_path / "once/out")
    assert rejects(tmp_path / "grown/out") == {"t003": "duplicate"}
    a, b = (ShardSet.open(str(tmp_path / n / "out")) for n in ("grown", "once"))
    assert a.index.equals(b.index) and a.info["shards"] == b.info["shards"]

    # one changed title touches one bucket; nothing is decoded again
    final[5] = {**final[5], "title": "New"}
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "once/out/shards").iterdir()}
    capsys.readouterr()
    assert run(write_rows(tmp_path / "once", final), tmp_path / "once/out") == 0
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "once/out/shards").iterdir()}
    assert sum(before[n] != after[n] for n in before) == 1
    assert "starting Ray" not in capsys.readouterr().out

    # the twin with the lower id leaves: its double, a reject so far, takes its place
    assert run(write_rows(tmp_path / "once", final[:-1]), tmp_path / "once/out") == 0
    assert rejects(tmp_path / "once/out") == {}
    assert "t003" in ShardSet.open(str(tmp_path / "once/out")).index.column("track_id").to_pylist()

    # a shard that was damaged or lost is made again, also from an interrupted commit
    good = digests(tmp_path / "once/out")
    (tmp_path / "once/out/dataset.json").unlink()
    first = sorted((tmp_path / "once/out/shards").iterdir())[0]
    first.write_bytes(first.read_bytes()[:2000] + b"?" * 3000)
    sorted((tmp_path / "once/out/shards").iterdir())[1].unlink()
    assert run(write_rows(tmp_path / "once", final[:-1]), tmp_path / "once/out") == 0
    assert digests(tmp_path / "once/out") == good


def test_a_damaged_set_is_named_and_made_whole_again(
    local_ray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue, out = write_rows(tmp_path, [row(i, artist=f"A{i}") for i in range(4)]), tmp_path / "out"
    assert run(catalogue, out) == 0
    info = json.loads((out / "dataset.json").read_text())
    assert info["index_sha256"] == hashlib.sha256((out / "index.parquet").read_bytes()).hexdigest()
    good = {name: (out / name).read_bytes() for name in ("index.parquet", "rejects.parquet", "sources.parquet")}
    good["dataset.json"] = json.dumps({k: v for k, v in info.items() if k != "index_sha256"}).encode()
    shards = digests(out)
    other = pa.table({"track_id": ["t000"], "n": [1]})
    fewer = ShardSet.open(str(out)).index.slice(1)
    for name, data in (
        ("dataset.json", b"{"),
        ("dataset.json", json.dumps({**info, "counts": {"tracks": 4}}).encode()),
        ("dataset.json", json.dumps({k: v for k, v in info.items() if k != "settings"}).encode()),
        *((name, good[name][:100]) for name in good),
        *((name, shard.table_bytes(other)) for name in good if name != "dataset.json"),
        ("index.parquet", shard.table_bytes(fewer)),
        ("sources.parquet", good["sources.parquet"].replace(b"x", b"y", 1)[:-9]),
    ):
        (out / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"out/{name} is damaged: .*or delete this file and run `make ingest"):
            run(catalogue, out)
        (out / name).write_bytes(good[name])
    assert run(catalogue, out) == 0  # a set of before, whose dataset.json has no hash of the index
    for name in good:
        (out / name).unlink()
        assert run(catalogue, out) == 0
        assert digests(out) == shards and len(ShardSet.open(str(out))) == 4
        assert (out / name).is_file()
    capsys.readouterr()
    path = out / "shards" / sorted(shards)[0]
    whole = path.read_bytes()
    for data in (whole[:2000], b"", whole.replace(b"A quiet", b"A loud!", 1), b"?" + whole[1:]):
        path.write_bytes(data)
        assert run(catalogue, out) == 0
        said = capsys.readouterr().out
        assert f"made anew: shards/{path.name}" in said and "nothing to do" not in said
        assert digests(out) == shards
        assert ("starting Ray" in said) == (data[1:] != whole[1:])  # what is still good is not encoded again


def test_shards_of_others_are_never_touched(local_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(8)]
    one = [next(r for r in rows if assemble.split_of(r["artist"], SplitConfig(0.6, 0.2, 0.2)) == "train")]
    catalogue, out = write_rows(tmp_path, rows), tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    for name in ("other-dataset-000.tar", "train-00000.tar"):
        (out / "shards" / name).write_bytes(b"theirs")
        with pytest.raises(UserError, match=rf"out holds shards/{name}, which this command did not make"):
            run(catalogue, out)
        assert [p.name for p in out.rglob("*") if p.is_file()] == [name]
        (out / "shards" / name).unlink()
    assert run(catalogue, out) == 0
    shards = digests(out)
    assert len(shards) > 1

    # beside a set: left alone, unless a shard of ours could be written over it
    (out / "shards/other.tar").write_bytes(b"theirs")
    assert run(write_rows(tmp_path, one), out) == 0
    assert len(digests(out)) == 2 and (out / "shards/other.tar").read_bytes() == b"theirs"
    (out / "shards/valid-00007.tar").write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"holds shards/valid-00007\.tar, which this command did not make"):
        run(catalogue, out)
    (out / "shards/valid-00007.tar").unlink()

    # shards that only an interrupted commit made are removed by the next run, whatever its catalogue
    def full(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "write_tables", full)
    with pytest.raises(KeyboardInterrupt):
        run(write_rows(tmp_path, rows), out)
    monkeypatch.undo()
    assert digests(out).keys() == {*shards, "other.tar"} and not (out / "dataset.json").exists()
    assert run(write_rows(tmp_path, one), out) == 0
    assert len(digests(out)) == 2 and (out / "shards/other.tar").read_bytes() == b"theirs"


def test_a_second_run_is_refused_while_the_first_writes(local_ray: str, tmp_path: Path) -> None:
    catalogue, out = write_rows(tmp_path, [row(i, artist=f"A{i}") for i in range(4)]), tmp_path / "out"
    out.mkdir()
    (out / ".lock").write_text("process 1 on a machine that lost power\n")
    hold = "import sys; from pipelines.store import *\n"
    hold += "with alone(Place.at(sys.argv[1])): print('held', flush=True), input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"OUT=\S+ is being written by process {other.pid} on .*; wait for it"):
            run(catalogue, out)
        other.communicate("\n")
    assert not list(out.iterdir())
    assert run(catalogue, out) == 0 and not (out / ".lock").exists()


def test_a_set_that_changed_meanwhile_is_not_written(
    local_ray: str, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(4)]
    out = (Place.at(s3_root) / "set").uri

    def meanwhile(where: Any, step: str, others: list[dict]) -> None:
        """Let another run finish around a step of the next one."""
        original = getattr(where, step)

        def with_another_run(*args: object) -> object:
            monkeypatch.undo()
            done = original(*args) if where is not assemble else None
            assert run(write_rows(tmp_path, others), out) == 0
            return done or original(*args)

        monkeypatch.setattr(where, step, with_another_run)

    # there is no set yet, and the other one clears the work away that this one does
    meanwhile(command.cluster, "process", rows[:3])
    with pytest.raises(UserError, match="the set changed since this run began"):
        run(write_rows(tmp_path, rows), out)
    # a row was taken down while this run, which does not know it yet, was about to commit or had read its catalogue
    for where, step in ((assemble, "write_shards"), (command.catalog, "read")):
        meanwhile(where, step, rows[1:3])
        with pytest.raises(UserError, match="the set changed since this run began"):
            run(write_rows(tmp_path, [{**r, "title": "New"} for r in rows[:3]]), out)
        assert sorted(ShardSet.open(out).index.column("track_id").to_pylist()) == ["t001", "t002"]
        assert run(write_rows(tmp_path, rows[:3]), out) == 0
    assert run(write_rows(tmp_path, rows), out) == 0 and len(ShardSet.open(out)) == 4


def test_addresses_that_no_file_has_cost_their_row(local_ray: str, tmp_path: Path) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(3)]
    write_rows(tmp_path, rows)
    (tmp_path / "audio" / "empty.flac").write_bytes(b"")
    os.symlink("loop.flac", tmp_path / "audio" / "loop.flac")
    os.mkfifo(tmp_path / "audio" / "pipe.flac")
    odd = {
        "nul": "audio/a\x00b.flac", "half": "audio/a\udcff.flac", "long": f"audio/{'x' * 5000}.flac", "way": "foo://x/y.flac",
        "host": "http://[::1/y.flac", "bucket": "s3://", "loop": "audio/loop.flac", "pipe": "audio/pipe.flac",
        "device": "/dev/zero", "folder": "audio", "empty": "audio/empty.flac",
    }  # fmt: skip
    rows += [row(50 + at, track_id=name, uri=uri) for at, (name, uri) in enumerate(odd.items())]
    assert run(write_rows(tmp_path, rows), tmp_path / "out") == 0
    codes = {"nul": "invalid_row", "half": "invalid_row", "empty": "not_audio"}
    assert rejects(tmp_path / "out") == {name: codes.get(name, "missing") for name in odd}
    assert max(len(r["message"]) for r in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()) < 600


def test_damaged_work_of_an_unfinished_run_is_named(local_ray: str, tmp_path: Path) -> None:
    catalogue, out = write_rows(tmp_path, [row(i, artist=f"A{i}") for i in range(2)]), tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    for text in (b"{", b"[]", b"\xff"):
        (out / ".work" / "settings.json").write_bytes(text)
        with pytest.raises(UserError, match=r"settings.json is damaged .*Delete .*out/.work, .*run the same command"):
            run(catalogue, out)
    (out / ".work" / "x.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"x.npz is damaged .*Delete this file and run the same command again"):
        stages.load(Place.at(out / ".work"), "x")


def test_a_later_day_turns_a_track_off(local_ray: str, tmp_path: Path) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(4)]
    rows[2]["rights"]["valid_until"] = "2026-11-30"
    catalogue = write_rows(tmp_path, rows)
    assert run(catalogue, tmp_path / "out") == 0 and rejects(tmp_path / "out") == {}
    before = [ShardSet.open(str(tmp_path / "out"))]
    training_sources.check_terms(before, datetime.date(2026, 11, 30))
    with pytest.raises(UserError, match=r"holds music whose term ended on 2026-11-30 .*make ingest"):
        training_sources.check_terms(before, datetime.date(2026, 12, 1))
    assert run(catalogue, tmp_path / "out", "--rights.today", "2026-12-01") == 0
    training_sources.check_terms([ShardSet.open(str(tmp_path / "out"))], datetime.date(2026, 12, 1))
    assert rejects(tmp_path / "out") == {"t002": "expired"}
    assert b"Piece 2" not in b"".join(p.read_bytes() for p in (tmp_path / "out/shards").iterdir())


def test_what_was_taken_down_stays_out_under_other_rows(
    local_ray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(4)]
    rows += [row(2, track_id=n, artist="Again", uri=f"audio/{n}.flac") for n in ("twin_a", "twin_b")]
    write_rows(tmp_path, rows)
    for n in ("twin_a", "twin_b"):
        (tmp_path / f"audio/{n}.flac").write_bytes(wav(tone(2), kind="FLAC"))
    out, file = tmp_path / "out", tmp_path / "audio/t002.wav"
    data = file.read_bytes()

    def ingest(out: Path, **changes: Any) -> dict[str | None, str]:
        rows[2] = {**rows[2], "rights": rights(**changes)}
        assert run(write_rows(tmp_path, rows, audio=False), out) == 0
        return rejects(out)

    assert ingest(out) == {"twin_a": "duplicate", "twin_b": "duplicate"}
    shutil.copytree(out, copy := tmp_path / "copy")
    file.unlink()  # with the file gone it is known from when it was in the set
    withdrawn = {"t002": "withdrawn", "twin_a": "withdrawn", "twin_b": "withdrawn"}
    assert ingest(out, status="withdrawn") == withdrawn
    mixed = training_sources.open_data(f"{copy},{out}")  # trained on beside a copy from before
    left = sorted(
        mixed.index.column("track_id")[int(row)].as_py() for split in shard.SPLITS for row in mixed.rows(split)
    )
    assert left == sorted(2 * ["t000", "t001", "t003"])
    messages = pq.read_table(out / "rejects.parquet").column("message").to_pylist()
    assert "the same sound as track 't002', which is refused as withdrawn" in messages[1]
    capsys.readouterr()
    assert ingest(out, status="withdrawn") == withdrawn and "nothing to do" in capsys.readouterr().out
    rows[0]["title"] = "New"  # a set that is written again
    assert ingest(out, status="withdrawn") == withdrawn
    file.write_bytes(wav(tone(9)))  # what stands there now is another sound
    assert ingest(out, status="withdrawn") == withdrawn
    sources = {r["track_id"]: r["facts"] for r in pq.read_table(out / "sources.parquet").to_pylist()}
    assert len(json.loads(sources["t002"])["sounds"]) == 4  # file and sound, of before and of now
    file.write_bytes(data)

    # however the row is written that takes it down, and whatever else is wrong in it
    for changes in ({"status": "Withdrawn"}, {"status": "taken down"}, {"status": "withdrawn", "isrc": "?"}):
        found = ingest(out, **changes)
        assert found["t002"] in ("withdrawn", "invalid_row") and found["twin_a"] == found["twin_b"] == "withdrawn"
    assert ingest(out, status="withdrawn") == withdrawn

    # in a first run by the file; the sets are the same
    once = tmp_path / "once"
    assert ingest(once, opt_out_signals=["robots.txt"]) == dict.fromkeys(withdrawn, "opt_out")
    assert digests(once) == digests(out)
    capsys.readouterr()
    assert ingest(once, opt_out_signals=["robots.txt"]) and "nothing to do" in capsys.readouterr().out

    # a term that ended says nothing against another row's own rights; a row that is active again is a track again
    assert ingest(out, status="expired") == {"t002": "expired", "twin_b": "duplicate"}
    assert ingest(out) == {"twin_a": "duplicate", "twin_b": "duplicate"}
    assert len(ShardSet.open(str(out))) == 4


def test_what_was_taken_down_is_no_stem_and_an_unknown_sound_is_told(
    local_ray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(3)]
    write_rows(tmp_path, rows)
    for r in rows:  # each is its own lead
        lead = f"audio/lead-{r['track_id']}.wav"
        (tmp_path / lead).write_bytes((tmp_path / r["uri"]).read_bytes())
        r["stems"] = {"lead": lead}
    (tmp_path / "audio" / "lead.wav").write_bytes(wav(0.9 * tone(1)))
    rows[1]["stems"]["lead"] = "audio/lead.wav"
    rows += [row(7, track_id="gone", uri="audio/lead.wav", rights=rights(status="withdrawn"))]
    catalogue = write_rows(tmp_path, rows, audio=False)
    assert run(catalogue, out := tmp_path / "out", "--melody_stems", "true") == 0
    assert rejects(out) == {"gone": "withdrawn", "t001": "withdrawn"}
    (tmp_path / "audio" / "lead.wav").unlink()
    capsys.readouterr()
    for r in rows:
        r.pop("stems", None)
    assert run(write_rows(tmp_path, rows, audio=False), tmp_path / "new") == 0
    assert "the sound of gone is not known" in " ".join(capsys.readouterr().out.split())


def child(catalogue: str, out: Path, address: str) -> subprocess.Popen:
    """The command in a process of its own, on the session's Ray."""
    line = [sys.executable, "-m", "pipelines.ingest", "--catalog", catalogue, "--out", str(out), *COMMON]
    line += ["--run.address", address, "--run.batch", "1"]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(local_ray: str, tmp_path: Path) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(24)]
    catalogue = write_rows(tmp_path, rows)
    assert run(catalogue, tmp_path / "whole") == 0
    killed, work = tmp_path / "killed", tmp_path / "killed/.work"
    process = child(catalogue, killed, local_ray)
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if work.is_dir() and len(list(work.glob("*.npz"))) >= 4:
                break
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()[0]
    done = len(list(work.glob("*.npz")))
    assert 4 <= done < 24 and not (killed / "dataset.json").exists()
    with pytest.raises(UserError, match="no finished data set"):
        ShardSet.open(str(killed))
    with pytest.raises(UserError, match="made with other settings"):
        run(catalogue, killed, "--seed", "1")
    assert run(catalogue, killed) == 0  # the second half, in this process
    assert digests(killed) == digests(tmp_path / "whole")
    assert ShardSet.open(str(killed)).index.equals(ShardSet.open(str(tmp_path / "whole")).index)


def test_a_finished_result_is_not_made_again(local_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = write_rows(tmp_path, [row(i, artist=f"A{i}") for i in range(3)])
    made: list[int] = []
    original = command.cluster.process

    def stop_before_commit(*args: object) -> None:
        raise KeyboardInterrupt

    def count(jobs: list, *rest: object) -> object:
        made.append(len(jobs))
        return original(jobs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(command.cluster, "process", count)
    monkeypatch.setattr(command.Ingest, "_commit", stop_before_commit)
    with pytest.raises(KeyboardInterrupt):
        run(catalogue, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(command.cluster, "process", count)
    assert run(catalogue, tmp_path / "out") == 0
    assert made == [3]


def test_from_s3_to_s3(local_ray: str, s3_root: str, tmp_path: Path) -> None:
    rows = [row(i, artist=f"A{i}") for i in range(3)] + [row(9)]
    write_rows(tmp_path, rows)
    root = Place.at(s3_root)
    for path in tmp_path.rglob("*.*"):
        if path.stem != "t009":
            (root / str(path.relative_to(tmp_path))).write(path.read_bytes())
    out = (root / "set").uri
    assert run((root / "catalog.jsonl").uri, out) == 0
    data = ShardSet.open(out)
    assert len(data) == 3 and data.codes(0).shape[0] == 4 and data.meta(1)["schema_version"] == 1
    assert not (root / "set/.work").exists()
    (tmp_path / "audio/t009.wav").unlink()
    assert run(str(tmp_path / "catalog.jsonl"), tmp_path / "local") == 0
    names = (root / "set/shards").list()
    remote = {n: stages.hashlib.sha256((root / "set/shards" / n).read()).hexdigest() for n in names}
    assert remote == digests(tmp_path / "local")  # where it comes from and where it goes leave no trace
    assert run((root / "catalog.jsonl").uri, out) == 0


def test_a_full_disk_says_so_and_keeps_what_is_finished(local_ray: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        catalogue = write_rows(tmp_path, [row(i, artist=f"A{i}", uri=f"audio/t{i:03d}.wav") for i in range(12)])
        for i in range(12):
            (tmp_path / f"audio/t{i:03d}.wav").write_bytes(wav(tone(i, 8.0)))
        with pytest.raises(UserError, match="no room left while writing"):
            run(catalogue, small / "out")
        assert not (small / "out/dataset.json").exists()
        kept = stages.kept(Place.at(small / "out/.work"))
        assert kept and all(stages.load(Place.at(small / "out/.work"), k).codes is not None for k in kept)
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert run(catalogue, small / "out") == 0
        assert len(ShardSet.open(str(small / "out"))) == 12
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_set_without_training_tracks_is_not_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(i, rights=rights(licence=None)) for i in range(2)]
    catalogue = write_rows(tmp_path, rows, audio=False)
    assert run(catalogue, tmp_path / "out") == 1  # without ever starting Ray
    assert "not usable for training" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/dataset.json").read_text())["counts"]["rejects_by_code"] == {"no_licence": 2}
    assert run(catalogue, tmp_path / "out") == 1


def test_the_embedded_catalogue_rejects_what_it_says(local_ray: str, tmp_path: Path) -> None:
    """The demo's inadmissible rows, with the tracks that its duplicates copy, through the real command."""
    from pipelines import catalog

    folder = Path(codecs.__file__).parent / "assets" / "catalogue"
    expected = json.loads((folder / "expected_rejects.json").read_text())
    rows = [json.loads(line) for line in (folder / "catalog.jsonl").read_text().splitlines()]
    copied = {(r["artist"], r["work"]) for r in rows if expected.get(r["track_id"]) == "duplicate"}
    some = [r for r in rows if r["track_id"] in expected or (r["artist"], r["work"]) in copied]
    assert len(catalog.read(str(folder / "catalog.jsonl")).rows) == len(rows) > len(some)
    for r in some:
        r["uri"] = str(folder / r["uri"])
    assert run(write_rows(tmp_path, some, audio=False), tmp_path / "out", "--splits.train", "1", "--splits.valid", "0",
               "--splits.test", "0") == 0  # fmt: skip
    assert rejects(tmp_path / "out") == expected


def test_bad_settings(tmp_path: Path) -> None:
    catalogue = write_rows(tmp_path, [row(1)], audio=False)
    for more, words in (
        (["--catalog", ""], "catalog is missing"),
        (["--out", ""], "out is missing"),
        (["--catalog", str(tmp_path / "no.csv")], "does not exist"),
        (["--rights.today", "soon"], "expected YYYY-MM-DD"),
        (["--splits.train", "0.9"], "splits must add up to 1"),
        (["--run.retry", '["tooshort"]'], "unknown reject codes: tooshort"),
        (["--codec", str(tmp_path)], "config.json and model.safetensors"),
        (["--analysis", "librosa"], "allowed: auto"),
        (["--out", catalogue], "cannot write .*File exists. Choose an OUT folder"),
        (["--check.min_seconds", "3"], "did you mean 'checks.min_seconds'"),
    ):
        with pytest.raises((UserError, settings.SettingsError), match=words):
            run(catalogue, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_splits_are_disjoint_and_follow_the_rule() -> None:
    from pipelines import catalog

    rows = [row(i, artist=f"Artist {i % 40}", work=f"Work {i % 90}" if i % 3 else None) for i in range(300)]
    rows += [row(900, artist="ARTIST  7", work=None), row(901, artist="Zoe", work="work 8")]
    parsed = catalog.validate(rows, "test")
    groups = assemble.split_groups(parsed)
    shares = SplitConfig(0.6, 0.2, 0.2)
    for name in ("artist", "work"):
        where: dict[str, set[str]] = {}
        for r in parsed:
            if r.values[name]:
                word = " ".join(r.values[name].casefold().split())
                where.setdefault(word, set()).add(assemble.split_of(groups[str(r.track_id)], shares))
        assert all(len(splits) == 1 for splits in where.values())
    assert groups == assemble.split_groups(parsed[::-1])  # order does not matter
    lonely = [row(i, artist=f"Solo {i}", work=None) for i in range(2000)]
    drawn = [assemble.split_of(g, shares) for g in assemble.split_groups(catalog.validate(lonely, "t")).values()]
    assert drawn.count("valid") / 2000 == pytest.approx(0.2, abs=0.03) and drawn.count("test") > 300
    import hashlib

    draw = int(hashlib.sha256(b"musicgen-split:Anna").hexdigest()[:16], 16) / 2**64
    expected = "valid" if draw < 0.2 else "test" if draw < 0.4 else "train"
    assert assemble.split_of("Anna", shares) == expected
    pair = catalog.validate([row(1, artist="Bob", work="W"), row(2, artist="Anna", work="W")], "t")
    assert set(assemble.split_groups(pair).values()) == {"Anna"}


def test_default_yaml_says_what_the_code_says() -> None:
    config = settings.parse(command.IngestConfig, [], layers=[command.DEFAULTS])
    assert config == command.IngestConfig()
    demo = settings.parse(command.IngestConfig, ["--config", str(command.DEFAULTS.parent / "demo.yaml")])
    assert (demo.codec, demo.splits) == ("demo", SplitConfig(0.85, 0.15, 0.0))


def test_a_worker_that_dies_costs_one_track(local_ray: str, tmp_path: Path) -> None:
    """Three good tracks and one whose source kills the process that reads it."""
    from pipelines import cluster

    class Killing(Place):
        def read(self) -> bytes:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(wav(tone(i)))
    codec = codecs.tiny()
    what = stages.TrackSettings(
        command.CheckConfig(), command.DecodeConfig(), "builtin", "tiny", codec.identity, 32_000, 1
    )
    jobs = [stages.Job(str(i), Place.at(p), f"w{i}") for i, p in enumerate(paths)]
    jobs.insert(1, stages.Job("bad", Killing("file", "/x"), "bad"))
    work = Place.at(tmp_path / "work")
    seen = []
    cluster.process(jobs, what, work, cluster.RunConfig(codec_actors=1, workers=1), lambda n, s: seen.append(n))
    assert sum(seen) == 4 and stages.kept(work) == {"w0", "w1", "w2", "bad"}
    reject = stages.load(work, "bad").reject
    assert reject is not None and reject.code == "crash"
    assert all(stages.load(work, f"w{i}").codes is not None for i in range(3))


def test_an_error_is_a_message_and_no_traceback(tmp_path: Path) -> None:
    catalogue = write_rows(tmp_path, [row(1, rights=rights(licence=None))], audio=False)
    line = [
        sys.executable,
        "-m",
        "pipelines.ingest",
        "--catalog",
        catalogue,
        "--out",
        str(tmp_path / "o"),
        "--codec",
        "no/x/y",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: CODEC 'no/x/y'") and "Traceback" not in done.stderr


def test_lost_rows_are_an_error() -> None:
    index = pa.table({"split": ["train", "valid"], "duration_seconds": [3600.0, 1.0], "frames": [180_000, 50]})
    found = assemble.counts(3, index, [{"code": "silent"}])
    assert (found["rows"], found["tracks"], found["rejects"], found["rejects_by_code"]) == (3, 2, 1, {"silent": 1})
    for rows_in in (2, 4):
        with pytest.raises(RuntimeError, match="rows are lost"):
            assemble.counts(rows_in, index, [{"code": "silent"}])
