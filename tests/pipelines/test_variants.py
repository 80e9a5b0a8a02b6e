"""Chroma of degraded versions beside a track's own: by its sound alone, and nothing of it where not asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from musicgen import codec as codecs
from musicgen import settings
from musicgen.chroma import chroma_bins
from musicgen.errors import UserError
from pipelines import audio, shard, stages
from pipelines import ingest as command
from pipelines.shard import ShardSet
from pipelines.store import Place
from tests.pipelines.conftest import TODAY, row, tone, wav, write_rows

SETTINGS = stages.TrackSettings(
    command.CheckConfig(), command.DecodeConfig(), "builtin", "tiny", codecs.tiny().identity, 32_000, 1
)


def prepared(folder: Path, name: str, what: stages.TrackSettings) -> stages.Prepared:
    decoder = audio.Decoder(what.decode, what.checks.max_seconds)
    made = stages.prepare(stages.Job("t", Place.at(folder / name), name), what, decoder)
    assert isinstance(made, stages.Prepared)
    return made


def test_variants_follow_from_the_sound(tmp_path: Path) -> None:
    for name, seed in (("a.wav", 1), ("again.wav", 1), ("b.wav", 2)):
        (tmp_path / name).write_bytes(wav(tone(seed, 6.0)))
    three = replace(SETTINGS, chroma_variants=3)
    a, again, b = (prepared(tmp_path, name, three) for name in ("a.wav", "again.wav", "b.wav"))
    assert a.chroma.shape == (4, len(chroma_bins(a.audio[0]))) and a.chroma.dtype == np.uint8
    assert np.array_equal(a.chroma, again.chroma) and not np.array_equal(a.chroma, b.chroma)
    assert np.array_equal(a.chroma[0], chroma_bins(a.audio[0])), "its own first"
    changed = [(variant != a.chroma[0]).mean() for variant in a.chroma[1:]]
    assert max(changed) > 0 and min(changed) < 0.7 and len({v.tobytes() for v in a.chroma}) > 2
    plain = prepared(tmp_path, "a.wav", SETTINGS)
    assert plain.chroma.ndim == 1 and np.array_equal(plain.chroma, a.chroma[0])
    records = [shard.make_record(np.zeros((4, 5)), made.chroma, {"key": "k"}) for made in (plain, a)]
    assert shard.npy_array(records[0].chroma).ndim == 1 and shard.npy_array(records[1].chroma).shape == a.chroma.shape


def test_ingest_keeps_them_and_says_so(local_ray: str, tmp_path: Path) -> None:
    catalogue = write_rows(tmp_path, [row(i) for i in range(2)])
    argv = ["--catalog", catalogue, "--out", str(tmp_path / "out"), "--codec=tiny", "--analysis=builtin"]
    argv += ["--buckets=1", "--run.codec_actors=1", "--run.workers=1", f"--rights.today={TODAY}"]
    argv += ["--splits.train=1", "--splits.valid=0", "--splits.test=0"]
    assert command.main([*argv, "--chroma_variants", "2"]) == 0
    data = ShardSet.open(str(tmp_path / "out"))
    assert all(data.chromas(i).shape == (3, len(data.chroma(i))) for i in range(2))
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["settings"]["chroma_variants"] == 2
    with pytest.raises(UserError, match=r"chroma_variants: 2 there, 'absent' now"):
        command.main(argv)


def test_a_set_without_them_is_described_as_before(tmp_path: Path) -> None:
    described = command.identity(command.IngestConfig(), codecs.tiny())
    assert not any("chroma" in name for name in described)
    with pytest.raises(ValueError, match="chroma_stems says how chroma_variants are made"):
        command.IngestConfig(chroma_stems=True)


def test_stems_that_cannot_be_had_are_said_before_the_work(tmp_path: Path) -> None:
    try:
        import demucs  # noqa: F401
    except ImportError:
        catalogue = write_rows(tmp_path, [row(1)])
        argv = ["--catalog", catalogue, "--out", str(tmp_path / "out"), "--codec=tiny", f"--rights.today={TODAY}"]
        with pytest.raises((UserError, settings.SettingsError), match="chroma_stems needs the package demucs"):
            command.main([*argv, "--chroma_variants", "1", "--chroma_stems", "true"])


@pytest.mark.parametrize("name", ["WINDOW_FRAMES", "CONTEXT_FRAMES"])
def test_other_windows_of_the_codec_make_another_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = command.settings_hash(command.identity(command.IngestConfig(), codecs.tiny()))
    monkeypatch.setattr(codecs, name, 123)
    assert command.settings_hash(command.identity(command.IngestConfig(), codecs.tiny())) != before
