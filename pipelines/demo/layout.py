"""The form of an arrangement: which bar of the tune sounds when, over which chords, up to the cadence.

A layout is an introduction over the tune's first chords, as many bars of the tune as fit (in passes), and
one bar of tonic. A tune that has to stop early gets a dominant bar and a melodic cadence of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from pipelines.demo.notation import Chord, LeadSheet, Note
from pipelines.demo.patterns import near
from pipelines.demo.styles import Style

COLOURS = {
    "jazz": {"": "maj7", "m": "m7", "dim": "m7b5", "7": "9"},
    "blues": {"": "7", "m": "m", "dim": "dim", "7": "7"},
    "open": {"": "add9", "m": "madd9", "dim": "dim", "7": "sus2"},
    "open5": {"": "5", "m": "5", "dim": "5", "7": "5"},
}


def colour(chord: Chord, tonic: int, style: Style, tune: bool) -> Chord:
    """The chord as the style voices it: sevenths in jazz, open fifths on the koto."""
    table = COLOURS.get(style.colour)
    quality = chord.quality
    if table and quality in table and not (tune and style.colour == "blues"):
        quality = table[quality]
        if style.colour == "jazz" and (chord.root - tonic) % 12 == 7 and chord.quality == "":
            quality = "7"
        if style.colour == "open" and (chord.root - tonic) % 12 in (4, 11) and chord.quality == "m":
            quality = "m7"
    return Chord(chord.start, chord.dur, chord.root, quality)


@dataclass
class Layout:
    """The piece bar by bar: source bar of the tune (None: no melody), its chords, start of each pass."""

    source: list[int | None]
    passes: list[int]
    chords: list[list[Chord]]


def plan_bars(sheet: LeadSheet, chords: list[Chord], total: int, intro: int) -> Layout:
    """Intro + as many tune bars as fit + one closing bar of tonic, ``total`` bars in all."""
    minor = sheet.mode in ("minor", "dorian")
    bar_len = sheet.bar_len

    def of_bar(index: int) -> list[Chord]:
        begin, end = index * bar_len, (index + 1) * bar_len
        found = [
            Chord(max(c.start, begin) - begin, min(c.start + c.dur, end) - max(c.start, begin), c.root, c.quality)
            for c in chords
            if c.start < end - 1e-6 and c.start + c.dur > begin + 1e-6
        ]
        return found or [Chord(0, bar_len, sheet.tonic, "m" if minor else "")]

    tonic = [Chord(0.0, bar_len, sheet.tonic, "m" if minor else "")]
    source: list[int | None] = []
    passes: list[int] = []
    frames: list[list[Chord]] = []
    for index in range(intro):
        source.append(None)
        passes.append(0)
        frames.append(of_bar(0) if index < intro - 1 or intro == 1 else of_bar(sheet.bars - 2))
    body = total - intro - 1
    for index in range(body):
        where, bar = divmod(index, sheet.bars)
        source.append(bar)
        passes.append(where)
        frames.append(of_bar(bar))
    if body % sheet.bars and body >= 2:
        dominant = {"major": (7, ""), "minor": (7, ""), "dorian": (10, ""), "mixolydian": (10, "")}[sheet.mode]
        frames[-1] = [Chord(0.0, bar_len, (sheet.tonic + dominant[0]) % 12, dominant[1])]
    source.append(-1)
    passes.append(passes[-1])
    frames.append(tonic)
    return Layout(source, passes, frames)


def lay_melody(sheet: LeadSheet, layout: Layout) -> list[tuple[Note, int]]:
    """The melody over the whole piece with the number of its pass, monophonic, cut where passes meet."""
    bar_len = sheet.bar_len
    placed: list[tuple[Note, int]] = []
    last = len(layout.source) - 1
    for number, source in enumerate(layout.source):
        begin = number * bar_len
        if source is None or source < 0:
            continue
        pass_no = layout.passes[number]
        if source == 0:
            for note in sheet.melody:
                if note.start < 0:
                    placed.append((Note(begin + note.start, note.dur, note.pitch), pass_no))
        for note in sheet.melody:
            if source * bar_len - 1e-6 <= note.start < (source + 1) * bar_len - 1e-6:
                placed.append((Note(begin + note.start - source * bar_len, note.dur, note.pitch), pass_no))
    placed.sort(key=lambda item: item[0].start)
    clean: list[tuple[Note, int]] = []
    end = last * bar_len
    for index, (note, pass_no) in enumerate(placed):
        stop = min(note.start + note.dur, end)
        if index + 1 < len(placed):
            stop = min(stop, placed[index + 1][0].start)
        if stop - note.start > 0.05:
            clean.append((Note(note.start, stop - note.start, note.pitch), pass_no))
    tonic_pitch = near(sheet.tonic, clean[-1][0].pitch if clean else 72)
    cadence = sheet.bars and layout.source[-2] is not None
    if cadence and clean and (layout.source[-2] or 0) != sheet.bars - 1:
        begin = (last - 1) * bar_len
        clean = [item for item in clean if item[0].start < begin - 1e-6]
        if clean:
            note, pass_no = clean[-1]
            clean[-1] = (Note(note.start, min(note.dur, begin - note.start), note.pitch), pass_no)
        step = near(sheet.tonic + 2, tonic_pitch)
        pass_no = layout.passes[-1]
        fifth = 7 if sheet.mode in ("major", "minor") else 5
        clean.append((Note(begin, bar_len / 2, near(sheet.tonic + fifth, step)), pass_no))
        clean.append((Note(begin + bar_len / 2, bar_len / 2, step), pass_no))
        if sheet.scale and 2 not in sheet.scale:
            clean = clean[:-1]
    clean.append((Note(end, bar_len, tonic_pitch), layout.passes[-1]))
    return clean


def count_bars(
    sheet: LeadSheet,
    bar_seconds: float,
    extra: float,
    seconds: float,
    shortest: float,
    longest: float,
    rng: random.Random,
) -> tuple[int, int]:
    """(bars in all, bars of introduction) for a piece of about ``seconds``, ``extra`` of it outside the bars."""
    total = max(4, round((seconds - extra) / bar_seconds))
    while total * bar_seconds + extra > longest and total > 3:
        total -= 1
    while total * bar_seconds + extra < shortest:
        total += 1
    intro = rng.choice((1, 2)) if total >= 9 else 1 if (sheet.pickup or total >= 7) else 0
    if not intro and sheet.pickup:
        intro = 1
    body = total - intro - 1
    spare = body % (4 if body > 6 else 2)
    if spare and body % sheet.bars and (total - spare) * bar_seconds + extra >= shortest:
        total -= spare
    elif spare and intro + spare <= 2:
        intro += spare
    return total, intro
