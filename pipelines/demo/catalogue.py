"""The demo catalogue's program: plan the tracks, render them, write ``catalog.jsonl``.

    python -m pipelines.demo.catalogue --out DIR --embedded          # the committed set, ~41 minutes
    python -m pipelines.demo.catalogue --out DIR --hours 12          # the same kind, FLAC 32 kHz stereo
    python -m pipelines.demo.catalogue --out DIR --hours 4 --stems   # and each track's stems beside it
    python -m pipelines.demo.catalogue --out DIR --hours 0.5 --held-out   # of the validation side's artists alone

A plan follows from the seed alone: tracks go through the styles in turn, each style through its artists
(the one on the validation side has the smallest discography), each artist alternates between his
public-domain tunes, newly arranged, and new pieces. Rendering is restartable: finished files stay.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile

from pipelines.demo.arranger import Score, arrange
from pipelines.demo.compose import compose
from pipelines.demo.files import write
from pipelines.demo.notation import LeadSheet
from pipelines.demo.render import part_of, render, render_stems
from pipelines.demo.rows import build_row, piece_title
from pipelines.demo.styles import BY_LABEL, STYLES, Style, split_side
from pipelines.demo.tunes import BY_ID, TUNES, sheet

#: shares of a style's tracks: the validation artist, then the three others
ARTIST_SHARES = {"valid": 0.12, "train": 0.88 / 3}
TUNE_SHARE = 0.4


@dataclass(frozen=True)
class Track:
    """One planned track. ``tune`` names a public-domain tune, None a composed piece; ``tonic`` is a pitch class."""

    track_id: str
    style: str
    artist: str
    number: int
    title: str
    work: str
    tune: str | None
    seed: str
    tonic: int
    bpm: int
    seconds: float
    shortest: float
    longest: float
    suffix: str
    rate: int
    peak_db: float


def tunes_of(artist: str) -> list[str]:
    """The tunes that belong to an artist: a style's tunes go to its artists in turn, train artists first."""
    for style in STYLES:
        if artist in style.artists:
            order = sorted(style.artists, key=lambda a: split_side(a) == "valid")
            mine = order.index(artist)
            return [t.id for i, t in enumerate(t for t in TUNES if t.style == style.label) if i % 4 == mine]
    raise KeyError(f"no artist {artist!r}; the artists are listed in styles.py")


def lead_sheet(track: Track) -> LeadSheet:
    """The tune or the composed piece of a track."""
    return sheet(track.tune) if track.tune else compose(BY_LABEL[track.style], track.seed + "/piece")


def score_of(track: Track) -> Score:
    """The arrangement of a track."""
    style = BY_LABEL[track.style]
    return arrange(
        lead_sheet(track),
        style,
        track.seed,
        track.tonic,
        track.bpm,
        track.seconds,
        track.tune is not None,
        track.shortest,
        track.longest,
    )


def plan(
    name: str, seed: int, seconds: tuple[float, float], tune_share: float = TUNE_SHARE, skew: float = 1.0
) -> Iterator[Track]:
    """Endless plan of tracks called ``name``-0001 and so on, styles interleaved.

    ``seconds`` bounds the lengths, ``skew`` above 1 makes short ones commoner, ``tune_share`` is the share
    of public-domain tunes among the tracks of an artist who has some.
    """
    counts: dict[str, int] = {}
    tune_turn: dict[str, int] = {}
    debt: dict[str, dict[str, float]] = {s.label: dict.fromkeys(s.artists, 0.0) for s in STYLES}
    due: dict[str, float] = {}
    number = 0
    shortest, longest = seconds[0] + 1.0, seconds[1] - 1.0
    while True:
        order = list(STYLES)
        random.Random(f"{name}/{seed}/order/{number}").shuffle(order)
        for style in order:
            number += 1
            key = f"{name}/{seed}/{number}"
            rng = random.Random(key)
            purse = debt[style.label]
            for artist in purse:
                purse[artist] += ARTIST_SHARES[split_side(artist)]
            artist = max(purse, key=lambda a: purse[a])
            purse[artist] -= 1.0
            counts[artist] = counts.get(artist, 0) + 1
            mine = tunes_of(artist)
            due[artist] = due.get(artist, rng.uniform(0.3, 1.0)) + (tune_share if mine else 0.0)
            tune = None
            if mine and due[artist] >= 1.0:
                due[artist] -= 1.0
                turn = tune_turn.get(artist, 0)
                tune_turn[artist] = turn + 1
                tune = mine[turn % len(mine)]
            tonic = rng.choice(style.keys)
            if tune:
                base = BY_ID[tune].bpm
                bpm = round(base * rng.uniform(0.88, 1.14))
                title, work = BY_ID[tune].title, BY_ID[tune].title
            else:
                meter = compose(style, key + "/piece").meter
                scale = 1.0 if meter != (6, 8) else 0.85
                bpm = round(rng.uniform(*style.bpm) * scale)
                title = piece_title(style.label, counts[artist], name, random.Random(key + "/title"))
                work = f"{title} ({artist})"
            yield Track(
                f"{name}-{number:04d}",
                style.label,
                artist,
                counts[artist],
                title,
                work,
                tune,
                key,
                tonic,
                bpm,
                shortest + (longest - shortest) * rng.random() ** skew,
                seconds[0],
                seconds[1],
                ".flac",
                32000,
                -1.5 - 3.0 * rng.random(),
            )


def plan_hours(hours: float, seed: int, held_out: bool = False) -> list[Track]:
    """Tracks of 20–40 s until they last ``hours`` together; ``held_out``: by artists of the validation side alone."""
    chosen: list[Track] = []
    total = 0.0
    for track in plan("music", seed, (20.0, 40.0)):
        if total >= hours * 3600:
            return chosen
        if held_out and split_side(track.artist) != "valid":
            continue
        chosen.append(track)
        total += score_of(track).seconds
    raise AssertionError("the plan never ends")


def stems_of(track: Track) -> dict[str, str]:
    """Addresses of a track's stems by name, as its row names them."""
    score = score_of(track)
    names = dict.fromkeys(part_of(voice) for voice in score.voices)
    return {name: f"stems/{track.track_id}/{name}.flac" for name in names}


def _render_one(job: tuple[Track, str, bool]) -> tuple[str, float]:
    """Render one track (and its stems) into a folder unless whole files are there; (track id, seconds)."""
    track, folder, with_stems = job
    target = Path(folder, "audio", track.track_id + track.suffix)
    score = score_of(track)
    if not (target.is_file() and _whole(target, score.seconds)):
        write(target, render(score, track.rate, track.peak_db), track.rate)
    files = {name: Path(folder, uri) for name, uri in stems_of(track).items()} if with_stems else {}
    if not all(file.is_file() and _whole(file, score.seconds) for file in files.values()):
        for name, sound in render_stems(score, track.rate, track.peak_db).items():
            files[name].parent.mkdir(parents=True, exist_ok=True)
            write(files[name], sound, track.rate)
    return track.track_id, score.seconds


def _whole(path: Path, seconds: float) -> bool:
    """Whether a FLAC on disk has the length it should have (others: whether it is there; renames are atomic)."""
    if path.suffix != ".flac":
        return path.stat().st_size > 0
    try:
        return abs(soundfile.info(path).duration - seconds) < 0.01
    except (soundfile.LibsndfileError, OSError):
        return False


def render_all(tracks: list[Track], out: Path, workers: int, stems: bool = False) -> None:
    """Render every track, with its stems if asked for, with ``workers`` processes and a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    (out / "audio").mkdir(parents=True, exist_ok=True)
    jobs = [(track, str(out), stems) for track in tracks]
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar, ProcessPoolExecutor(workers) as pool:
        task = bar.add_task("render", total=len(jobs))
        for _ in pool.map(_render_one, jobs):
            bar.advance(task)


def row_of(track: Track, deal_sha256: str | None = None, stems: bool = False) -> dict[str, object]:
    """The catalogue row of a planned track; with ``deal_sha256`` under the demo deal instead of CC-BY-4.0."""
    style: Style = BY_LABEL[track.style]
    score = score_of(track)
    row = build_row(
        track.track_id,
        f"audio/{track.track_id}{track.suffix}",
        track.title,
        track.artist,
        track.work,
        style,
        score,
        BY_ID[track.tune] if track.tune else None,
        track.seed,
        deal_sha256,
    )
    return {**row, "stems": stems_of(track)} if stems else row


def write_rows(rows: list[dict[str, object]], path: Path) -> None:
    """Write rows as JSON lines, in one step."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def summary(tracks: list[Track]) -> str:
    """One line of figures about a plan."""
    seconds = {t.track_id: score_of(t).seconds for t in tracks}
    train = sum(seconds[t.track_id] for t in tracks if split_side(t.artist) == "train")
    total = sum(seconds.values())
    counts = {
        "styles": len({t.style for t in tracks}),
        "artists": len({t.artist for t in tracks}),
        "works": len({t.work for t in tracks}),
        "public-domain tunes": len({t.tune for t in tracks if t.tune}),
        "tonics": len({t.tonic for t in tracks}),
    }
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{len(tracks)} tracks, {total / 3600:.2f} h (train {train / 3600:.2f} h), {words}"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Render the demo catalogue or hours more of the same kind.")
    parser.add_argument("--out", type=Path, required=True, help="folder for catalog.jsonl and audio/")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--hours", type=float, help="hours of FLAC to render")
    what.add_argument("--embedded", action="store_true", help="the committed catalogue, with its inadmissible rows")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives another set (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--rows-only", action="store_true", help="write catalog.jsonl, render nothing")
    parser.add_argument("--stems", action="store_true", help="render each track's stems too; with --hours")
    parser.add_argument("--held-out", action="store_true", help="artists of the validation side alone; with --hours")
    args = parser.parse_args(argv)
    if args.stems and args.hours is None:
        parser.error("--stems goes with --hours: the committed catalogue has none")
    if args.held_out and args.hours is None:
        parser.error("--held-out goes with --hours: the committed catalogue has both sides")
    if args.hours is not None and args.hours <= 0:
        parser.error(f"--hours {args.hours}: give a positive number of hours")
    if args.embedded:
        from pipelines.demo.embedded import build

        build(args.out, args.seed, args.workers)
        return
    tracks = plan_hours(args.hours, args.seed, args.held_out)
    print(summary(tracks))
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows([row_of(track, stems=args.stems) for track in tracks], args.out / "catalog.jsonl")
    if not args.rows_only:
        render_all(tracks, args.out, args.workers, args.stems)


if __name__ == "__main__":
    main()
