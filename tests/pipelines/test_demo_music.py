"""The demo music: notation, tunes, the split that names decide, and the committed catalogue.

Everything but one short piece, rendered twice, is plain Python; that one needs FluidSynth and FluidR3_GM
and says so when it is skipped.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pipelines import catalog
from pipelines.demo import catalogue
from pipelines.demo import render as rendering
from pipelines.demo.catalogue import lead_sheet, plan, score_of, tunes_of
from pipelines.demo.compose import DEGREES, compose, harmonise, key_name
from pipelines.demo.drums import DRUMS
from pipelines.demo.embedded import plan_embedded
from pipelines.demo.files import decoded, with_serial, write
from pipelines.demo.notation import Note, parse_tune
from pipelines.demo.patterns import PATTERNS
from pipelines.demo.rows import DEAL_FILE, key_in
from pipelines.demo.styles import BY_LABEL, INSTRUMENTS, STYLES, split_side
from pipelines.demo.tunes import TUNES, sheet
from pipelines.demo.words import INSTRUMENT_WORDS, LANGUAGES, STYLE_WORDS
from pipelines.rights import RightsConfig, admit

FOLDER = Path(__file__).parents[2] / "musicgen" / "assets" / "catalogue"
TODAY = datetime.date(2026, 12, 1)


@cache
def rows() -> list[dict[str, Any]]:
    """The committed catalogue's rows."""
    return [json.loads(line) for line in (FOLDER / "catalog.jsonl").read_text(encoding="utf-8").splitlines()]


@cache
def expected() -> dict[str, str]:
    """Track id -> reason code of the rows that must be refused."""
    return json.loads((FOLDER / "expected_rejects.json").read_text(encoding="utf-8"))


def admitted() -> list[dict[str, Any]]:
    return [row for row in rows() if row["track_id"] not in expected()]


# ------------------------------------------------------------------ notation and tunes


def test_notation_reads_lengths_signature_accidentals_and_ties():
    got = parse_tune("G2 | F/2 ^G3/2 G d- | d2 =F>G |", (4, 4), "D major", 4)
    assert [n.pitch for n in got.melody] == [67, 66, 68, 68, 74, 65, 67]
    assert got.melody[0] == Note(-2.0, 2.0, 67) and got.melody[4] == Note(3.0, 3.0, 74)
    assert [n.dur for n in got.melody[5:]] == [1.5, 0.5]
    assert got.bars == 2 and got.pickup == 2.0


def test_notation_refuses_a_bar_that_does_not_fill_its_meter():
    with pytest.raises(ValueError, match="wants 4"):
        parse_tune("c2c2c2c2 | c2c2c2 | c8", (4, 4), "C major")
    with pytest.raises(ValueError, match="not notation"):
        parse_tune("c2 h2", (4, 4), "C major")


@pytest.mark.parametrize("tune", TUNES, ids=lambda t: t.id)
def test_every_tune_fills_its_bars_and_stays_in_range(tune):
    got = sheet(tune.id)  # raises when a bar does not add up
    assert 8 <= got.bars <= 40
    pitches = [note.pitch for note in got.melody]
    assert min(pitches) >= 55 and max(pitches) <= 88 and len(pitches) >= 8
    for before, after in zip(got.melody, got.melody[1:]):
        assert before.start + before.dur <= after.start + 1e-9
    assert tune.style in BY_LABEL


@pytest.mark.parametrize("tune", TUNES, ids=lambda t: t.id)
def test_harmony_covers_every_tune_and_ends_at_home(tune):
    got = sheet(tune.id)
    chords = got.chords or harmonise(got)
    assert sum(c.dur for c in chords) == pytest.approx(got.bars * got.bar_len)
    if not got.chords and got.melody[-1].pitch % 12 in {(got.tonic + step) % 12 for step in (0, 7)}:
        assert chords[-1].root == got.tonic  # tunes that go round in circles end open


def test_there_are_several_dozen_tunes_and_each_belongs_to_one_artist():
    assert len(TUNES) >= 60 and len({t.id for t in TUNES}) == len({t.title for t in TUNES}) == len(TUNES)
    owners = Counter(tune for style in STYLES for artist in style.artists for tune in tunes_of(artist))
    assert set(owners.values()) == {1} and set(owners) == {t.id for t in TUNES}


# ------------------------------------------------------------------ styles, split, plan


def test_exactly_one_artist_of_each_style_is_on_the_validation_side():
    assert len(STYLES) >= 12
    names = [artist for style in STYLES for artist in style.artists]
    assert len(names) == len(set(names)) >= 48
    for style in STYLES:
        assert sorted(split_side(a) for a in style.artists) == ["train", "train", "train", "valid"], style.label


def test_styles_use_known_parts_and_words_cover_them():
    for style in STYLES:
        assert set(style.leads) <= set(INSTRUMENTS) and (not style.drums or style.drums in DRUMS)
        for part in style.parts:
            assert part.pattern in PATTERNS and set(part.instruments) <= set(INSTRUMENTS)
    for language in LANGUAGES:
        assert set(INSTRUMENT_WORDS[language]) == set(INSTRUMENTS) and set(STYLE_WORDS[language]) == set(BY_LABEL)
    assert key_in("A minor", "de") == "a-Moll" and key_in("G# minor", "zh") == "升G小调"


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.label)
def test_composed_pieces_are_whole_and_end_on_the_tonic(style):
    for seed in ("a", "b", "c"):
        got = compose(style, seed)
        assert got == compose(style, seed)
        assert sum(c.dur for c in got.chords) == pytest.approx(got.bars * got.bar_len)
        assert sum(n.dur for n in got.melody) == pytest.approx(got.bars * got.bar_len)
        assert got.melody[-1].pitch % 12 == got.tonic and got.mode in DEGREES


def test_plans_are_reproducible_interleaved_and_keep_works_with_one_artist():
    first = [track for track, _ in zip(plan("music", 1, (20.0, 40.0)), range(56))]
    assert first[:20] == [track for track, _ in zip(plan("music", 1, (20.0, 40.0)), range(20))]
    assert first[:20] != [track for track, _ in zip(plan("music", 2, (20.0, 40.0)), range(20))]
    for start in range(0, 56, len(STYLES)):
        assert len({t.style for t in first[start : start + len(STYLES)]}) == len(STYLES)
    owners = defaultdict(set)
    embedded = plan_embedded(1)
    for track in [*first, *embedded]:
        owners[track.work].add(track.artist)
    assert {len(artists) for artists in owners.values()} == {1}
    composed = {t.work for t in first if t.tune is None}
    assert not composed & {t.work for t in embedded if t.tune is None}


def test_scores_have_the_planned_key_tempo_and_length():
    for track, _ in zip(plan("music", 3, (20.0, 40.0)), range(28)):
        score = score_of(track)
        assert 20.0 <= score.seconds <= 40.0 and score.bpm == track.bpm
        assert score.key == key_name(track.tonic, lead_sheet(track).mode)
        assert set(score.instruments) == {v.instrument for v in score.voices}
        for voice in score.voices:
            spec = INSTRUMENTS[voice.instrument]
            assert voice.events and all(e.start >= 0 and e.dur > 0 and 1 <= e.velocity <= 127 for e in voice.events)
            assert voice.drum or all(spec.low <= e.pitch <= spec.high for e in voice.events)
        data = rendering.midi_bytes(score)
        micros = int.from_bytes(data[data.index(b"\xff\x51\x03") + 3 :][:3], "big")
        assert 60e6 / micros == pytest.approx(score.quarter_bpm, rel=1e-5)


# ------------------------------------------------------------------ sound


@pytest.mark.skipif(
    not rendering.available(), reason="fluidsynth or FluidR3_GM.sf2 is not installed: nothing to render with"
)
def test_a_piece_renders_to_the_same_stereo_samples_twice():
    track = next(t for t in plan("music", 5, (10.0, 12.0)) if t.style == "celtic")
    score = score_of(track)
    samples = rendering.render(score, 32000, -2.0)
    assert np.array_equal(samples, rendering.render(score, 32000, -2.0))
    assert samples.shape == (round(score.seconds * 32000), 2)
    assert np.abs(samples).max() == pytest.approx(10 ** (-2 / 20), rel=1e-4)
    assert not np.array_equal(samples[:, 0], samples[:, 1])
    assert np.abs(samples[-160:]).max() < 0.01  # faded, not cut
    frames = np.sqrt((samples[: len(samples) // 3200 * 3200] ** 2).mean(1).reshape(-1, 3200).mean(1))
    assert (frames > 1e-3).mean() > 0.85


@pytest.mark.skipif(
    not rendering.available(), reason="fluidsynth or FluidR3_GM.sf2 is not installed: nothing to render with"
)
def test_stems_add_up_to_the_piece_and_are_named_in_its_row(tmp_path, monkeypatch):
    tracks = [t for t in itertools.islice(plan("music", 5, (10.0, 12.0)), 14) if t.style == "blues rock"][:1]
    monkeypatch.setattr(catalogue, "plan_hours", lambda hours, seed, held_out: tracks)
    catalogue.main(["--out", str(tmp_path), "--hours", "0.01", "--stems", "--workers", "1"])
    (row,) = [json.loads(line) for line in (tmp_path / "catalog.jsonl").read_text().splitlines()]
    assert set(row["stems"]) == {"melody", "bass", "drums", "accompaniment"}
    assert not catalog.validate([row], "demo")[0].problems
    piece, rate = soundfile.read(tmp_path / row["uri"])
    stems = {name: soundfile.read(tmp_path / uri)[0] for name, uri in row["stems"].items()}
    assert all(stem.shape == piece.shape and np.abs(stem).max() > 0.01 for stem in stems.values())
    assert np.sqrt(np.mean((sum(stems.values()) - piece) ** 2)) < 0.01 * np.sqrt(np.mean(piece**2))
    low = {n: np.abs(np.fft.rfft(s[:, 0]))[: round(150 * len(s) / rate)].sum() for n, s in stems.items()}
    assert low["bass"] > 2 * low["melody"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    catalogue.main(["--out", str(tmp_path), "--hours", "0.01", "--stems", "--workers", "1"])
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}, "what is whole stays"


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"])
def test_files_are_the_same_twice_and_last_as_long_as_their_samples(tmp_path, suffix):
    rate = 48000 if suffix == ".opus" else 32000
    time = np.arange(3 * rate) / rate
    samples = np.stack([np.sin(2 * np.pi * f * time) * 0.3 for f in (330.0, 440.0)], 1).astype(np.float32)
    for name in ("a", "b"):
        write(tmp_path / (name + suffix), samples, rate)
    assert (tmp_path / ("a" + suffix)).read_bytes() == (tmp_path / ("b" + suffix)).read_bytes()
    got, got_rate = decoded(tmp_path / ("a" + suffix))
    assert got_rate == rate and got.shape[1] == 2 and abs(len(got) - len(samples)) <= 0.05 * rate
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [suffix, suffix]  # no temporary file is left


def test_only_ogg_pages_get_a_new_stream_number():
    with pytest.raises(ValueError, match="not Ogg"):
        with_serial(b"RIFF" + bytes(40), 1)
    with pytest.raises(ValueError, match="allowed"):
        write(Path("a.xyz"), np.zeros((10, 2), np.float32), 32000)


# ------------------------------------------------------------------ the committed catalogue


def test_the_catalogue_fits_the_schema_and_the_rights_gate():
    found = catalog.read(str(FOLDER / "catalog.jsonl"))
    assert [row.problems for row in found.rows if row.problems] == []
    refused = {r.track_id: reject.code for r in found.rows if (reject := admit(r.rights, RightsConfig(), TODAY))}
    assert refused == {i: c for i, c in expected().items() if c in ("no_licence", "expired", "not_granted")}
    assert set(expected().values()) == {
        "no_licence",
        "expired",
        "not_granted",
        "missing",
        "truncated",
        "not_audio",
        "silent",
        "duplicate",
        "too_short",
    }


def test_the_catalogue_holds_what_it_promises():
    good = admitted()
    assert len(good) >= 150
    assert len({r["genre"] for r in good}) >= 10 and len({r["artist"] for r in good}) >= 30
    assert len({i for r in good for i in r["instruments"]}) >= 12 and len({r["region"] for r in good}) >= 8
    titles = {t.title for t in TUNES}
    assert len({r["work"] for r in good} & titles) >= 36
    assert sum(r["work"] not in titles for r in good) >= 40
    foreign = [r for r in good if len({d["language"] for d in r["descriptions"]}) > 1]
    assert 0.2 <= len(foreign) / len(good) <= 0.5
    assert {r["descriptions"][0]["language"] for r in good} == {"en"}
    assert all(len({d["text"] for d in r["descriptions"]}) >= 3 for r in good)
    for row in good:
        first = row["descriptions"][0]["text"]
        assert row["key"] in first and f"{row['bpm']:g} BPM" in first
        assert all(name in first for name in row["instruments"])
    assert (FOLDER / DEAL_FILE).is_file() and (FOLDER / "LICENSE.md").is_file()


def test_the_files_fit_18_megabytes_and_last_40_minutes():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 18_000_000
    seconds, kinds = 0.0, defaultdict(set)
    for row in admitted():
        path = FOLDER / row["uri"]
        samples, rate = decoded(path)
        kinds[path.suffix].add(rate)
        seconds += len(samples) / rate
        assert samples.shape[1] == 2 and 10.0 <= len(samples) / rate <= 40.1, row["track_id"]
        assert 0.3 < np.abs(samples).max() <= 1.15 and np.abs(samples.mean(0)).max() < 0.02, row["track_id"]
    assert seconds >= 40 * 60
    assert kinds[".opus"] == {48000} and set(kinds) == {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"}
    assert set().union(*kinds.values()) == {32000, 44100, 48000}
    assert kinds[".mp3"] == kinds[".ogg"] == kinds[".m4a"] == {32000, 44100, 48000}


def test_the_faulty_files_have_their_fault():
    by_id = {row["track_id"]: FOLDER / row["uri"] for row in rows()}
    for track_id, code in expected().items():
        path = by_id[track_id]
        assert path.exists() == (code != "missing")
        if code == "silent":
            assert not decoded(path)[0].any()
        if code == "too_short":
            assert len(decoded(path)[0]) / 48000 < 1.1
        if code == "duplicate":
            title = _row(track_id)["title"].removesuffix(" (second delivery)")
            twins = [r for r in admitted() if r["title"] == title and Path(r["uri"]).suffix == path.suffix]
            same = [r for r in twins if np.array_equal(decoded(path)[0], decoded(FOLDER / r["uri"])[0])]
            assert len(same) == 1 and track_id > same[0]["track_id"]
        if code == "not_audio":
            with pytest.raises(soundfile.LibsndfileError):
                soundfile.info(path)


def _row(track_id: str) -> dict[str, Any]:
    return next(row for row in rows() if row["track_id"] == track_id)


def test_the_split_of_the_committed_catalogue_gives_every_style_both_sides():
    sides = defaultdict(Counter)
    for row in admitted():
        sides[row["genre"]][split_side(row["artist"])] += 1
    assert all(side["train"] > side["valid"] >= 1 for side in sides.values()), dict(sides)
