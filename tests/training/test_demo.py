"""The demo from catalogue to page, with a real ingest and a real training, small; stopped, and gone on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from musicgen import wav
from musicgen.errors import UserError
from pipelines import catalog
from pipelines.shard import ShardSet
from tests.training import small_music
from training import demo, listening


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoConfig:
    root = tmp_path_factory.mktemp("demo")
    codec = small_music.make_codec(root / "codec")
    # A row that may not be used, and one whose file is gone: both end in the table of rejects.
    music = small_music.make_catalog(root / "music", 12)
    rows = [json.loads(line) for line in music.read_text().splitlines()]
    rows[2]["rights"]["grants"] = ["distribute"]
    (root / "music" / rows[4]["uri"]).unlink()
    music.write_text("".join(json.dumps(r) + "\n" for r in rows))
    splits = ("--splits.train", "0.7", "--splits.valid", "0.3")
    small = ["--lm.dim", "32", "--lm.num_layers", "1", "--lm.num_heads", "2", "--batch.size", "2"]
    small += ["--batch.crop_seconds", "2", "--log.clips", "0", "--log.valid_every", "2", "--log.every", "1"]
    return demo.DemoConfig(
        folder=str(root / "out"),
        catalog=str(music),
        limit=10,
        steps=4,
        shipped="",
        clips=2,
        seconds=2.0,
        ingest=("--codec", str(codec), "--analysis", "builtin", "--run.cores", "1", *splits),
        train=tuple(small),
    )


@pytest.mark.slow
def test_from_catalogue_to_page_after_a_stop(
    config: demo.DemoConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = Path(config.folder)
    # Stopped after ingest: the step's command fails, what was made stays.
    broken = dataclasses.replace(config, train=("--lm.dimm", "32"))
    with pytest.raises(UserError, match=r"step 'train' ended with exit code 2.*goes on from there"):
        demo.demo(broken)
    assert "did you mean 'lm.dim'" in capfd.readouterr().err
    stopped = json.loads((folder / "steps.json").read_text())
    assert [s["name"] for s in stopped] == ["ingest"]

    page = demo.demo(config)
    said = capfd.readouterr().out
    assert "nothing to do" in said and "ingest was already whole" in said
    data = ShardSet.open(str(folder / "data"))
    assert data.info["counts"]["rows"] == 10 and data.info["counts"]["rejects"] == 2
    assert "10 rows: 8 tracks" in json.loads((folder / "steps.json").read_text())[0]["text"]
    clips = listening.read_clips(folder / "clips")
    assert clips is not None and [c.kind for c in clips] == ["run", "codec", "original"] * 2
    sha = json.loads((folder / "run" / "release" / "config.json").read_text())["weights"]["sha256"]
    assert wav.read_marking(folder / "clips" / clips[0].file)["model"]["sha256"] == sha
    text = page.read_text(encoding="utf-8")
    assert "Data card" in text and "not_granted" in text and "missing" in text
    assert text.count("<audio ") == 6

    steps = json.loads((folder / "steps.json").read_text())
    assert [s["name"] for s in steps] == ["ingest", "train", "generate", "report"]
    assert steps[0] == stopped[0], "the time of the ingest that did something stands"


def test_part_of_a_catalogue_is_spread_evenly_and_finds_its_audio(tmp_path: Path) -> None:
    music = small_music.make_catalog(tmp_path / "music", 9, seconds=0.1)
    part = demo.part_of(str(music), 3, tmp_path / "elsewhere" / "catalog.jsonl")
    book = catalog.read(part)
    assert [row.track_id for row in book.rows] == ["t00", "t03", "t06"] and not any(r.problems for r in book.rows)
    assert all(book.folder.join(row.values["uri"]).is_file() for row in book.rows)
    before = Path(part).stat().st_mtime_ns
    demo.part_of(str(music), 3, Path(part))
    assert Path(part).stat().st_mtime_ns == before
    assert len(catalog.read(demo.part_of(str(music), 99, Path(part))).rows) == 9


def test_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from musicgen.settings import SettingsError

    with pytest.raises(SettingsError, match="steps is -1"):
        demo.main(["--steps", "-1"])
    with pytest.raises(SettingsError, match="did you mean 'limit'"):
        demo.main(["--limits", "3"])
    with pytest.raises(UserError, match="does not exist"):
        demo.main(["--folder", str(tmp_path), "--catalog", str(tmp_path / "no.jsonl"), "--limit", "3"])
