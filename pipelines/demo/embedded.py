"""The committed catalogue: about 40 minutes of admitted tracks in all formats, and rows that must be refused.

The four shortest tracks are WAV and FLAC, the others Opus, M4A, Ogg Vorbis and MP3 at 32, 44.1 and 48 kHz.
Eleven more rows each have one fault; what is expected of them stands in ``expected_rejects.json``, never
in the catalogue itself. ``LICENSE.md`` and the text of the deal lie beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from pipelines.demo.catalogue import Track, plan, render_all, row_of, score_of, summary, write_rows
from pipelines.demo.files import write
from pipelines.demo.render import render
from pipelines.demo.rows import DEAL_FILE, DEAL_TEXT

MINUTES = 40.4
SHORTEST, LONGEST = 10.0, 40.0
#: formats of the compressed tracks in turn: (suffix, rate in Hz)
CYCLE = (
    (".opus", 48000),
    (".m4a", 44100),
    (".opus", 48000),
    (".ogg", 32000),
    (".opus", 48000),
    (".mp3", 44100),
    (".opus", 48000),
    (".m4a", 32000),
    (".opus", 48000),
    (".ogg", 44100),
    (".opus", 48000),
    (".mp3", 32000),
    (".opus", 48000),
    (".m4a", 48000),
    (".opus", 48000),
    (".ogg", 48000),
    (".opus", 48000),
    (".mp3", 48000),
)
#: the shortest tracks
LOSSLESS = ((".wav", 32000), (".flac", 44100), (".flac", 32000))
DEAL_EVERY = 25
NOT_AUDIO = "This is a text file with the name of a recording. An ingest must say that it is not audio.\n"


def plan_embedded(seed: int) -> list[Track]:
    """The admitted tracks: 10–40 s, mostly short, at least ``MINUTES`` together, each with its format."""
    chosen: list[Track] = []
    seconds: dict[str, float] = {}
    for track in plan("demo", seed, (SHORTEST, LONGEST), tune_share=0.62, skew=5.0):
        chosen.append(track)
        seconds[track.track_id] = score_of(track).seconds
        if sum(seconds.values()) >= MINUTES * 60:
            break
    short = sorted(chosen, key=lambda t: (seconds[t.track_id], t.track_id))
    quiet = [t for t in short if t.style in ("music box", "classical piano", "koto", "ragtime")]
    special = dict(
        zip(
            [t.track_id for t in [short[0], *(t for t in quiet if t is not short[0])][: len(LOSSLESS)]],
            LOSSLESS,
            strict=True,
        )
    )
    out = []
    for number, track in enumerate(chosen):
        suffix, rate = special.get(track.track_id, CYCLE[number % len(CYCLE)])
        out.append(replace(track, suffix=suffix, rate=rate))
    return out


def build(out: Path, seed: int, workers: int) -> None:
    """Render everything and write the folder's files."""
    tracks = plan_embedded(seed)
    print(summary(tracks))
    render_all(tracks, out, workers)
    deal = hashlib.sha256(DEAL_TEXT.encode()).hexdigest()
    rows = [
        row_of(track, deal if number % DEAL_EVERY == DEAL_EVERY - 1 else None) for number, track in enumerate(tracks)
    ]
    refused, expected = refused_rows(tracks, rows, out, seed)
    write_rows([*rows, *refused], out / "catalog.jsonl")
    known = {str(row["uri"]) for row in [*rows, *refused]}
    for path in (out / "audio").iterdir():  # what an earlier plan left behind
        if f"audio/{path.name}" not in known:
            path.unlink()
    (out / DEAL_FILE).write_text(DEAL_TEXT, encoding="utf-8")
    (out / "expected_rejects.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
    (out / "LICENSE.md").write_text(LICENCE_TEXT, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{len(rows)} tracks, {len(refused)} refused rows, {size / 1e6:.2f} MB")


def refused_rows(
    tracks: list[Track], rows: list[dict[str, object]], out: Path, seed: int
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Rows with one fault each and their files: (rows, track id -> reason code)."""
    audio = out / "audio"
    refused: list[dict[str, object]] = []
    expected: dict[str, str] = {}
    spare: list[Track] = []
    for track in plan("spare", seed, (10.0, 12.0), tune_share=0.0):
        if len(spare) == 11:
            break
        name = f"demo-x{len(spare) + 1:02d}"
        spare.append(replace(track, track_id=name, suffix=".opus", rate=48000))

    def add(index: int, code: str, suffix: str = ".opus", **changes: object) -> Path:
        track = replace(spare[index], suffix=suffix, rate=48000 if suffix == ".opus" else 32000)
        row = row_of(track, None)
        record = row["rights"]
        assert isinstance(record, dict)
        record.update(changes)
        refused.append(row)
        expected[track.track_id] = code
        return audio / f"{track.track_id}{suffix}"

    def sound(index: int, rate: int) -> np.ndarray:
        return render(score_of(spare[index]), rate, -3.0)

    write(add(0, "no_licence", licence=None), sound(0, 48000), 48000)
    write(add(1, "expired", valid_from="2020-01-01", valid_until="2024-12-31"), sound(1, 48000), 48000)
    write(add(2, "not_granted", grants=["redistribute"]), sound(2, 48000), 48000)
    add(3, "missing")
    path = add(4, "truncated", ".m4a")
    write(path, sound(4, 32000), 32000)
    _cut(path)
    path = add(5, "truncated", ".flac")
    write(path, sound(5, 32000)[: 6 * 32000], 32000)
    _cut(path)
    add(6, "not_audio", ".mp3").write_text(NOT_AUDIO, encoding="utf-8")
    write(add(7, "silent", ".flac"), np.zeros((11 * 32000, 2), np.float32), 32000)
    _double(tracks, rows, ".opus", add(8, "duplicate"), refused, audio)
    _double(tracks, rows, ".flac", add(9, "duplicate", ".flac"), refused, audio)
    write(add(10, "too_short"), sound(10, 48000)[48000 : 2 * 48000], 48000)
    return refused, expected


def _cut(path: Path) -> None:
    """Keep the first half of a file, as an upload that broke off."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _double(
    tracks: list[Track],
    rows: list[dict[str, object]],
    suffix: str,
    path: Path,
    refused: list[dict[str, object]],
    audio: Path,
) -> None:
    """Make the newest refused row a second delivery of an admitted track: a copy, or (FLAC) encoded anew."""
    files = {i: audio / f"{t.track_id}{suffix}" for i, t in enumerate(tracks) if t.suffix == suffix}
    index = min(files, key=lambda i: (files[i].stat().st_size, i))
    source = files[index]
    if suffix == ".flac":
        samples, rate = soundfile.read(source, dtype="int16", always_2d=True)
        soundfile.write(path, samples, rate, format="FLAC", subtype="PCM_16", compression_level=0.4)
        if not np.array_equal(samples, soundfile.read(path, dtype="int16", always_2d=True)[0]):
            raise AssertionError(f"{path.name}: the second encoding must hold the samples of {source.name}")
    else:
        shutil.copyfile(source, path)
    row = dict(rows[index])
    row.update(track_id=path.stem, uri=f"audio/{path.name}", title=f"{row['title']} (second delivery)")
    refused[-1] = row


LICENCE_TEXT = """# The demo catalogue

Short pieces of instrumental music for trying the pipeline: recordings in `audio/`, one row each in
`catalog.jsonl`, and some rows that a pipeline must refuse (`expected_rejects.json` says why).

**Licence of recordings, arrangements, composed pieces and texts:** Creative Commons Attribution 4.0
International (CC-BY-4.0), by "The demo catalogue authors". A few tracks name `LicenseRef-demo-deal-2026`
instead, an example of a deal; its text is `demo-deal-2026.txt`, its hash stands in those rows. Training,
commercial generation and redistribution are granted for all admitted tracks, world-wide.

**Music.** The tunes are in the public domain (traditional, or by composers long dead). We wrote their notes
down ourselves, from memory and often simplified, in `pipelines/demo/tunes.py`; no score or encoding of
others was used. Their authors are named in the rows. All other pieces were composed by the program.
Harmonies, arrangements and performances are by the program too; no machine learning took part. The artists'
names are invented; a likeness to living people is chance.

**Sound.** Rendered with FluidSynth from the soundfont FluidR3_GM by Frank Wen (MIT licence).

**How it was made:** `python -m pipelines.demo.catalogue --out musicgen/assets/catalogue --embedded`. Hours
more of the same kind, as FLAC: `python -m pipelines.demo.catalogue --out DIR --hours 12`. Both follow from
a seed (default 1) and are restartable.
"""
