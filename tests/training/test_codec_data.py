"""Audio for codec training: catalogue and audio shards pass the gates of ingest; what does not fit is said in words."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from musicgen.codec import CodecConfig
from musicgen.errors import UserError
from pipelines.assemble import SplitConfig
from pipelines.store import Place
from tests.training.small_music import RATE, make_catalog, melody
from training.codec import data, sources

SHAPE, SPLITS = CodecConfig(), SplitConfig(0.7, 0.3, 0.0)
TRACKS = 10


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten tracks of three seconds."""
    return make_catalog(tmp_path_factory.mktemp("catalog"), TRACKS, seconds=3.0)


def rows_of(catalog: Path) -> list[dict]:
    """The catalogue's rows."""
    return [json.loads(line) for line in catalog.read_text().splitlines()]


def write_shards(folder: Path, samples: list[dict]) -> Path:
    """Audio shards, written by the webdataset library, five tracks each."""
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, len(samples), 5)):
        with webdataset.TarWriter(str(folder / f"audio-{number:03d}.tar")) as tar:
            for sample in samples[first : first + 5]:
                tar.write(sample)
    return folder


def flac(sound: np.ndarray, rate: int = RATE) -> bytes:
    """Sound [N] as the bytes of a FLAC file."""
    out = io.BytesIO()
    soundfile.write(out, sound, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def test_shards_of_audio_are_the_catalogue(catalog: Path, tmp_path: Path) -> None:
    rows = rows_of(catalog)
    samples = [
        {"__key__": f"part/{r['track_id']}", "flac": flac(melody(i, 3.0)), "json": {k: r[k] for k in r if k != "uri"}}
        for i, r in enumerate(rows)
    ]
    samples.insert(2, {"__key__": "part/nobodys", "flac": flac(melody(50, 3.0))})
    samples.append({"__key__": "part/soundless", "json": rows[0]})
    samples[0]["json"]["rights"] = {**rows[0]["rights"], "grants": ["distribute"]}
    shards = write_shards(tmp_path / "shards", samples)
    made = data.prepare(str(shards), tmp_path / "a", SHAPE, SPLITS)
    refused = json.loads((made / "rejects.json").read_text())
    assert refused.keys() == {"t00", "audio-000.tar/part/nobodys", "audio-002.tar/part/soundless"}
    assert "no rights" in refused["audio-000.tar/part/nobodys"] and "grant" in refused["t00"]
    found: dict[str, np.ndarray] = {}
    for split in ("train", "valid"):
        pcm = data.open_cache(made, split, SHAPE)
        found |= {name: pcm.track(i) for i, name in enumerate(pcm.track_ids)}
    assert sorted(found) == [f"t{i:02d}" for i in range(1, TRACKS)]
    assert all(np.abs(found[f"t{i:02d}"][0] - melody(i, 3.0)).max() < 2 / 32_768 for i in range(1, TRACKS))

    plain = data.prepare(str(catalog), tmp_path / "b", SHAPE, SPLITS)
    shared = set(data.open_cache(plain, "train").track_ids) & found.keys()
    assert shared == set(data.open_cache(made, "train").track_ids), "the split is that of the catalogue"


def test_codec_eval_measures_shards_of_audio(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's DATA may be what the training's was; the same tracks give the same figures as the catalogue's."""
    from training.codec import evaluate

    rows = rows_of(catalog)
    samples = [
        {"__key__": r["track_id"], "flac": flac(melody(i, 3.0)), "json": {k: r[k] for k in r if k != "uri"}}
        for i, r in enumerate(rows)
    ]
    shards, said = write_shards(tmp_path / "shards", samples), []
    words = ["--opus", "[]", "--max_seconds", "1", "--cache", str(tmp_path / "pcm")]
    words += ["--splits.train", "0.7", "--splits.valid", "0.3", "--splits.test", "0"]
    for source in (shards, catalog):
        assert evaluate.main([*words, "--data", str(source)]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "entries in use" in line])
    assert len(said[0]) == 4 and said[0] == said[1]


def test_a_cache_follows_its_rows(catalog: Path, tmp_path: Path) -> None:
    made = data.prepare(str(catalog), tmp_path / "pcm", SHAPE, SPLITS)
    before = (made / "train.pcm16").stat().st_mtime_ns
    data.prepare(str(catalog), tmp_path / "pcm", SHAPE, SPLITS)
    assert (made / "train.pcm16").stat().st_mtime_ns == before, "nothing is decoded twice"
    gone = data.open_cache(made, "train").track_ids[0]
    rows = [r for r in rows_of(catalog) if r["track_id"] != gone]
    less = catalog.with_name("less.jsonl")
    less.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data.prepare(str(less), tmp_path / "pcm", SHAPE, SPLITS)
    assert gone not in data.open_cache(made, "train").track_ids


def test_what_was_taken_down_trains_no_codec_under_another_row(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = data.prepare(str(catalog), tmp_path / "pcm", SHAPE, SPLITS)
    twin, other = data.open_cache(made, "train").track_ids[:2]
    rows = {r["track_id"]: r for r in rows_of(catalog)}
    (catalog.parent / "again.flac").write_bytes(flac(soundfile.read(catalog.parent / rows[twin]["uri"])[0]))
    gone = rows[twin] | {"track_id": "gone", "uri": "again.flac", "rights": {"status": "Withdrawn"}}
    lost = gone | {"track_id": "lost", "uri": "nowhere.flac"}
    same_file = rows[other] | {
        "track_id": "gone too",
        "rights": rows[other]["rights"] | {"opt_out_signals": ["ai.txt"]},
    }
    more = catalog.with_name("more.jsonl")
    more.write_text("".join(json.dumps(r) + "\n" for r in [*rows.values(), gone, lost, same_file]))
    data.prepare(str(more), tmp_path / "pcm", SHAPE, SPLITS)
    held = {name for split in ("train", "valid") for name in data.open_cache(made, split).track_ids}
    assert held == rows.keys() - {twin, other}
    refused = json.loads((made / "rejects.json").read_text())
    assert refused[twin] == "the same sound as track 'gone', which is refused as withdrawn"
    assert refused[other] == "the same sound as track 'gone too', which is refused as opt_out"
    (catalog.parent / "again.flac").unlink()  # it is known from when it was there
    rows |= {"gone": gone, "lost": lost, "gone too": same_file}
    more.write_text("".join(json.dumps(r) + "\n" for r in [*rows.values(), lost | {"track_id": "lost too"}]))
    capsys.readouterr()
    data.prepare(str(more), tmp_path / "pcm", SHAPE, SPLITS)
    assert json.loads((made / "rejects.json").read_text())[twin] == refused[twin]
    assert "the sound of lost, lost too is not known" in capsys.readouterr().out


def test_what_was_taken_down_and_cannot_be_read_now_stops(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Place.read

    def unavailable(place: Place) -> bytes:
        if place.name == "away.flac":
            raise OSError(503, "slow down")
        return read(place)

    rows = rows_of(catalog)
    gone = rows[0] | {"track_id": "gone", "uri": "away.flac", "rights": {"status": "withdrawn"}}
    catalog.with_name("away.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, gone]))
    monkeypatch.setattr(Place, "read", unavailable)
    monkeypatch.setattr(sources.stages.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"track 'gone' was taken down and its file cannot be read \(.*slow down"):
        data.prepare(str(catalog.with_name("away.jsonl")), tmp_path / "pcm", SHAPE, SPLITS)


def test_ranks_that_start_at_once_make_one_cache(catalog: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.training import test_codec_data as t\n"
        "real = t.data.write_cache\n"
        "def told(*args): print('made', flush=True); return real(*args)\n"
        "t.data.write_cache = told; t.data.prepare(sys.argv[1], Path(sys.argv[2]), t.SHAPE, t.SPLITS)"
    )
    command = [sys.executable, "-c", program, str(catalog), str(tmp_path / "pcm")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(rank.communicate(timeout=120)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert said.count("made") == 2, "train and valid, once"


def test_audio_that_cannot_train_is_refused(catalog: Path, tmp_path: Path) -> None:
    """NaN samples, silence, too short a file: named in rejects.json; all of a split: an error."""
    rows = rows_of(catalog)
    broken = {0: np.full(3 * RATE, np.nan), 1: np.zeros(3 * RATE), 2: np.zeros(100)}
    samples = []
    for i, row in enumerate(rows):
        out = io.BytesIO()
        soundfile.write(out, broken.get(i, melody(i, 3.0)), RATE, format="WAV", subtype="FLOAT")
        samples.append({"__key__": row["track_id"], "wav": out.getvalue(), "json": row})
    shards = write_shards(tmp_path / "shards", samples)
    made = data.prepare(str(shards), tmp_path / "pcm", SHAPE, SPLITS)
    refused = json.loads((made / "rejects.json").read_text())
    assert refused.keys() == {"t00", "t01", "t02"}
    assert "times full scale" in refused["t00"] and "dBFS" in refused["t01"]
    silent = [{**s, "wav": samples[1]["wav"]} for s in samples]
    with pytest.raises(
        UserError, match=r"no track of split 'train' .* passed the checks; the last one: 100% of the time"
    ):
        data.prepare(str(write_shards(tmp_path / "silent", silent)), tmp_path / "none", SHAPE, SPLITS)
    with pytest.raises(UserError, match=r"'x' .* 2 samples that are not finite"):
        data.write_cache(tmp_path / "c", "train", iter([("x", np.array([[0, np.nan, np.inf]], np.float32))]), 1)


def test_data_of_another_kind_is_refused_by_name(catalog: Path, tmp_path: Path) -> None:
    for folder, file, words in (
        ("tokens", "dataset.json", "holds tokens"),
        ("notes", "notes.txt", "neither a catalogue"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
        with pytest.raises(UserError, match=words):
            data.prepare(str(tmp_path / folder), tmp_path / "pcm", SHAPE, SPLITS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"a\.tar cannot be read"):
        sources.select(str(tmp_path / "broken"), SPLITS)
    with pytest.raises(UserError, match="no admissible track in split 'valid'"):
        sources.select(str(catalog), SplitConfig(1.0, 0.0, 0.0))
    data.write_cache(tmp_path / "24k", "train", iter([("a", np.zeros((1, 24_000), np.float32))]), 1, 24_000)
    with pytest.raises(UserError, match=r"PCM of 24000 Hz and 1 channel.*takes 32000 Hz and 1"):
        data.open_cache(tmp_path / "24k", "train", SHAPE)
    with pytest.raises(UserError, match="takes 24000 Hz and 2"):
        data.open_cache(tmp_path / "24k", "train", CodecConfig(sample_rate_hz=24_000, channels=2))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train.json", '{"channels": 1, "sta', "cut short"),
        ("train.json", "[]", "none of ours"),
        ("train.json", '{"channels": 1, "starts": [0, 9, 3], "track_ids": ["a", "b"]}', "places no tracks"),
        ("train.json", '{"channels": 1, "starts": [], "track_ids": []}', "places no tracks"),
        ("train.pcm16", "half", "holds 4 bytes instead of 4000"),
        ("train.pcm16", None, "holds 0 bytes instead of 4000"),
    ],
)
def test_a_damaged_cache_is_named(file: str, content: str | None, words: str, tmp_path: Path) -> None:
    data.write_cache(tmp_path, "train", iter([("a", np.zeros((1, 2000), np.float32))]), 1)
    (tmp_path / file).write_text(content) if content is not None else (tmp_path / file).unlink()
    with pytest.raises(UserError, match=rf"the PCM of split 'train' in .* is damaged \(.*{words}"):
        data.open_cache(tmp_path, "train", SHAPE)


def test_every_rank_has_its_part_of_the_same_batch(tmp_path: Path) -> None:
    data.write_cache(tmp_path, "train", ((f"t{i}", melody(i, 1.0)[None]) for i in range(4)), 1)
    pcm = data.open_cache(tmp_path, "train")
    ask = {"seed": 3, "batch_size": 4, "num_samples": 640}
    alone = data.CropStream(pcm, **ask)
    pair = [data.CropStream(pcm, **ask, rank=rank, world=2) for rank in (0, 1)]
    whole = alone.batch(5).numpy()
    assert np.array_equal(whole, np.concatenate([part.batch(5).numpy() for part in pair]))
    assert all(np.array_equal(part.whole_batch(5).numpy(), whole) for part in pair)
    assert not np.array_equal(pair[0].batch(5).numpy(), pair[1].batch(5).numpy())
