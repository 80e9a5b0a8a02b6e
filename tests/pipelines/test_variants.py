"""A track's chroma: of degraded versions beside its own, by its sound alone, and of stems by name or by Demucs."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from musicgen import codec as codecs
from musicgen import settings
from musicgen.chroma import chroma_bins
from musicgen.errors import UserError
from pipelines import audio, catalog, shard, stages
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
        with pytest.raises(
            (UserError, settings.SettingsError),
            match=r"(?s)chroma_stems needs the package demucs.*names no stems .* of t001",
        ):
            command.main([*argv, "--chroma_variants", "1", "--chroma_stems", "true"])


@pytest.mark.parametrize("name", ["WINDOW_FRAMES", "CONTEXT_FRAMES"])
def test_other_windows_of_the_codec_make_another_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = command.settings_hash(command.identity(command.IngestConfig(), codecs.tiny()))
    monkeypatch.setattr(codecs, name, 123)
    assert command.settings_hash(command.identity(command.IngestConfig(), codecs.tiny())) != before


def with_stems(folder: Path, name: str, parts: dict[str, np.ndarray]) -> tuple[tuple[str, Place], ...]:
    """A track that is the sum of its parts, written beside them; the stems as a job names them."""
    (folder / name).write_bytes(wav(np.sum([*parts.values()], axis=0)))
    for part, sound in parts.items():
        (folder / f"{part}-{name}").write_bytes(wav(sound))
    return tuple((part, Place.at(folder / f"{part}-{name}")) for part in parts)


def two_notes(seconds: float = 6.0) -> dict[str, np.ndarray]:
    """A loud low A of a bass and a softer C of a voice, each [N, 2]."""
    times = np.arange(round(16_000 * seconds)) / 16_000
    notes = {"bass": 0.5 * np.sin(2 * np.pi * 110 * times), "voice": 0.1 * np.sin(2 * np.pi * 523.25 * times)}
    return {name: np.stack([note, note], axis=1).astype(np.float32) for name, note in notes.items()}


def test_the_catalogues_stems_make_melody_and_other_mixes(tmp_path: Path) -> None:
    named = with_stems(tmp_path, "a.wav", two_notes())
    decoder = audio.Decoder(SETTINGS.decode, SETTINGS.checks.max_seconds)

    def made(**more: object) -> stages.Prepared:
        found = stages.prepare(
            stages.Job("t", Place.at(tmp_path / "a.wav"), "w", 0, named), replace(SETTINGS, **more), decoder
        )
        assert isinstance(found, stages.Prepared)
        return found

    A, C = 9, 0
    whole = made()
    assert (whole.chroma == A).mean() > 0.9 and "stems" not in whole.facts, "stems are left alone unless asked for"
    melody = made(melody_stems=True)
    assert (melody.chroma == C).mean() > 0.9, "without the bass"
    assert np.array_equal(melody.audio, whole.audio), "what is encoded is the track"
    assert melody.facts["stems"]["from"] == "catalogue" and set(melody.facts["stems"]["sha256"]) == {"bass", "voice"}
    # 18 dB softer to 6 dB louder: in some mixes the voice is louder than the bass, without stems in none
    mixes = made(chroma_stems=True, chroma_variants=12)
    plain = made(chroma_variants=12)
    heard = [(variant == C).mean() for variant in mixes.chroma[1:]]
    assert (mixes.chroma[0] == A).mean() > 0.9 and max(heard) > 0.8 and min(heard) < 0.2
    assert sum(h > 0.5 for h in heard) > sum((v == C).mean() > 0.5 for v in plain.chroma[1:])
    both = made(melody_stems=True, chroma_variants=3)
    assert (both.chroma == C).mean() > 0.8, "variants are of the melody too"
    mixed = made(melody_stems=True, chroma_variants=3, chroma_stems=True)
    assert (mixed.chroma == C).mean() > 0.8 and mixed.chroma.shape == both.chroma.shape
    only = with_stems(tmp_path, "b.wav", {"Bass": two_notes()["bass"]})
    job = stages.Job("t", Place.at(tmp_path / "b.wav"), "w", 0, only)
    silent = stages.prepare(job, replace(SETTINGS, melody_stems=True), decoder)
    assert isinstance(silent, stages.Result) and silent.reject is not None and silent.reject.code == "no_melody"
    assert silent.reject.message.startswith("the stems Bass are drums and bass, by their names")
    mixed = stages.prepare(job, replace(SETTINGS, chroma_stems=True, chroma_variants=1), decoder)
    assert isinstance(mixed, stages.Prepared), "other mixes need no melody"


def test_stems_that_do_not_fit_are_a_reject(tmp_path: Path) -> None:
    decoder = audio.Decoder(SETTINGS.decode, SETTINGS.checks.max_seconds)
    named = dict(with_stems(tmp_path, "a.wav", two_notes()))
    (tmp_path / "short.wav").write_bytes(wav(two_notes(5.0)["voice"]))
    (tmp_path / "torn.wav").write_bytes(b"RIFF no sound at all")
    times = np.arange(96_000) / 16_000
    another = 0.3 * np.sin(2 * np.pi * 330 * times * (1 + 0.1 * times))
    (tmp_path / "other.wav").write_bytes(wav(np.stack([another, another], axis=1)))
    found = stages.prepare(
        stages.Job("t", Place.at(tmp_path / "a.wav"), "w", 0, (("voice", Place.at(tmp_path / "other.wav")),)),
        replace(SETTINGS, melody_stems=True),
        decoder,
    )
    assert isinstance(found, stages.Result) and found.reject is not None
    assert "the stems are not of this track: their sum correlates with it by 0.0" in found.reject.message
    for place, code, words in (
        (Place.at(tmp_path / "short.wav"), "stem_mismatch", "stem 'voice' lasts 5.00 s, the track 6.00 s"),
        (Place.at(tmp_path / "torn.wav"), "not_audio", "stem 'voice': "),
        (Place.at(tmp_path / "gone.wav"), "missing", "stem 'voice' at .*gone.wav cannot be read"),
    ):
        job = stages.Job("t", Place.at(tmp_path / "a.wav"), "w", 0, (*{**named, "voice": place}.items(),))
        found = stages.prepare(job, replace(SETTINGS, melody_stems=True), decoder)
        assert isinstance(found, stages.Result) and found.reject is not None
        assert found.reject.code == code and re.match(words, found.reject.message), found.reject


def test_ingest_hears_the_stems_that_the_catalogue_names(local_ray: str, tmp_path: Path) -> None:
    sounds = two_notes()
    with_stems(tmp_path, "a.wav", sounds)
    rows = [{**row(0), "uri": "a.wav", "stems": {"bass": "bass-a.wav", "voice": "voice-a.wav"}}]
    rows += [{**row(1), "stems": {"bass": "gone.wav"}}]
    catalogue = write_rows(tmp_path, rows)
    argv = ["--catalog", catalogue, "--out", str(tmp_path / "out"), "--codec=tiny", "--analysis=builtin"]
    argv += ["--buckets=1", "--run.codec_actors=1", "--run.workers=1", f"--rights.today={TODAY}"]
    argv += ["--splits.train=1", "--splits.valid=0", "--splits.test=0", "--melody_stems", "true"]
    assert command.main(argv) == 0
    data = ShardSet.open(str(tmp_path / "out"))
    assert len(data) == 1 and (data.chroma(0) == 0).mean() > 0.9
    hashes = {n: hashlib.sha256((tmp_path / f"{n}-a.wav").read_bytes()).hexdigest() for n in sounds}
    assert data.meta(0)["stems"] == {"from": "catalogue", "sha256": hashes}
    (reject,) = shard.pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert reject["code"] == "missing" and "stem 'bass': no file at 'gone.wav'" in reject["message"]
    before = data.meta(0)["key"]
    (tmp_path / "voice-a.wav").write_bytes(wav(sounds["voice"] * 0.5))
    assert command.main(argv) == 0, "another stem makes the track anew"
    again = ShardSet.open(str(tmp_path / "out"))
    assert again.meta(0)["stems"]["sha256"]["voice"] != hashes["voice"] and again.meta(0)["key"] == before


def test_stems_in_every_form_of_a_catalogue(tmp_path: Path) -> None:
    wanted = {"drums": "d.wav", "voice": "v.wav"}
    base = {"track_id": "t", "uri": "a.wav", "artist": "x"}
    rows = {
        "nested": catalog.validate([{**base, "stems": wanted}], "c"),
        "flat": catalog.validate([{**base, "stems.drums": "d.wav", "stems.voice": " v.wav", "stems.bass": ""}], "c"),
        "json": catalog.validate([{**base, "stems": json.dumps(wanted)}], "c", from_text=True),
        "parquet": catalog.validate([{**base, "stems": {**wanted, "bass": None}}], "c"),
    }
    for name, (read,) in rows.items():
        assert read.values["stems"] == wanted and not read.problems, name
    assert catalog.validate([base], "c")[0].values["stems"] == {}
    with pytest.raises(UserError, match="column 'stems' holds an object with a number in it where an object"):
        catalog.validate([{**base, "stems": {"drums": 3}}], "c")
    (odd,) = catalog.validate([{**base, "stems": {"a\nb": "x.wav"}}], "c")
    assert "holds control characters" in odd.problems[0]
