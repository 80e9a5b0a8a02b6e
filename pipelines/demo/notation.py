"""Tunes as text: a small letter notation, read into a lead sheet (melody, bars, chords).

A tune is written by hand in letters, much as fiddlers do: ``C D E`` is the octave from middle C,
``c d e`` the one above, ``c'`` and ``C,`` one octave further; ``^ _ =`` sharpen, flatten and cancel
until the bar line; a number is a length in units of the tune (``d3``, ``d/2``, ``d3/2``); ``z`` rests;
``-`` ties; ``a>b`` is long-short; ``"Am"`` sets the chord from here on. The key signature applies.
All times in this package are in quarter notes; pitches are MIDI numbers (60 = middle C).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

PC = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
SHARPS = "FCGDAEB"
NAMES = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
#: mode -> semitones above the tonic of the relative major's tonic
RELATIVE = {"major": 0, "minor": 3, "dorian": 10, "mixolydian": 5}
#: major tonic pitch class -> sharps (+) or flats (-) in its signature
SIGNATURE = {0: 0, 7: 1, 2: 2, 9: 3, 4: 4, 11: 5, 6: 6, 5: -1, 10: -2, 3: -3, 8: -4, 1: -5}
SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
QUALITIES = {
    "": (0, 4, 7),
    "m": (0, 3, 7),
    "dim": (0, 3, 6),
    "7": (0, 4, 7, 10),
    "maj7": (0, 4, 7, 11),
    "m7": (0, 3, 7, 10),
    "m7b5": (0, 3, 6, 10),
    "6": (0, 4, 7, 9),
    "9": (0, 4, 10, 14),
    "m9": (0, 3, 10, 14),
    "maj9": (0, 4, 11, 14),
    "add9": (0, 2, 4, 7),
    "madd9": (0, 2, 3, 7),
    "sus2": (0, 2, 7),
    "5": (0, 7),
}

_TOKEN = re.compile(
    r"""(?P<bar>\|)|"(?P<chord>[^"]*)"|(?P<acc>[\^_=])?(?P<let>[A-Ga-gz])(?P<oct>[',]*)"""
    r"""(?P<len>\d*(?:/\d*)?)(?P<tie>-)?(?P<dot>>)?|(?P<space>\s+)"""
)


@dataclass(frozen=True)
class Note:
    """One note: start and length in quarter notes, pitch as a MIDI number."""

    start: float
    dur: float
    pitch: int


@dataclass(frozen=True)
class Chord:
    """One chord: start and length in quarter notes, root pitch class 0–11, quality (a key of QUALITIES)."""

    start: float
    dur: float
    root: int
    quality: str


@dataclass
class LeadSheet:
    """A melody with its frame. Bar 0 starts at time 0; an upbeat has negative times."""

    meter: tuple[int, int]
    tonic: int
    mode: str
    bars: int
    melody: list[Note]
    chords: list[Chord] = field(default_factory=list)
    scale: tuple[int, ...] | None = None

    @property
    def bar_len(self) -> float:
        """Length of a bar in quarter notes."""
        return self.meter[0] * 4.0 / self.meter[1]

    @property
    def pickup(self) -> float:
        """Length of the upbeat in quarter notes."""
        return max(0.0, -min((n.start for n in self.melody), default=0.0))


def beat_length(meter: tuple[int, int]) -> float:
    """The felt beat in quarter notes: 1.5 in 6/8, 9/8 and 12/8, else the meter's own unit."""
    num, den = meter
    return 1.5 if den == 8 and num % 3 == 0 else 4.0 / den


def signature(tonic: int, mode: str) -> dict[str, int]:
    """Letter -> semitone shift for the key signature of (tonic pitch class, mode)."""
    count = SIGNATURE[(tonic + RELATIVE[mode]) % 12]
    letters = SHARPS[:count] if count > 0 else SHARPS[::-1][:-count]
    return dict.fromkeys(letters, 1 if count > 0 else -1)


def parse_key(key: str) -> tuple[int, str]:
    """'A minor' -> (9, 'minor'). Allowed: C, C#, Db … B with major, minor, dorian or mixolydian."""
    name, _, mode = key.partition(" ")
    if not name or name[0] not in PC or mode not in RELATIVE:
        raise ValueError(f"key {key!r}: write a note name, a space and one of {sorted(RELATIVE)}")
    return (PC[name[0]] + name.count("#") - name[1:].count("b")) % 12, mode


def parse_chord(text: str) -> tuple[int, str]:
    """'F#m7' -> (6, 'm7')."""
    match = re.fullmatch(r"([A-G])([#b]?)(.*)", text)
    if not match or match[3] not in QUALITIES:
        raise ValueError(f"chord {text!r}: write a root A–G with # or b, then one of {sorted(QUALITIES)}")
    return (PC[match[1]] + {"#": 1, "b": -1, "": 0}[match[2]]) % 12, match[3]


def length(text: str) -> Fraction:
    """'3' -> 3, '/2' and '/' -> 1/2, '3/2' -> 3/2, '' -> 1."""
    if "/" not in text:
        return Fraction(int(text or 1))
    top, _, bottom = text.partition("/")
    return Fraction(int(top or 1), int(bottom or 2))


def parse_tune(text: str, meter: tuple[int, int], key: str, unit: int = 8) -> LeadSheet:
    """Read a tune written in the notation above; ``unit`` 8 means that a bare letter is an eighth note.

    The first bar may be short (an upbeat), the last too; every other must fill the meter.
    """
    tonic, mode = parse_key(key)
    sig = signature(tonic, mode)
    bar_len = Fraction(meter[0] * 4, meter[1])
    scale = Fraction(4, unit)
    bars: list[list[tuple[Fraction, Fraction, int | None, bool]]] = [[]]
    chords: list[tuple[int, Fraction, int, str]] = []
    at, local, pending_short, position = Fraction(0), dict(sig), False, 0
    marks: dict[str, int] = {}
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise ValueError(f"tune text {text[position : position + 12]!r} is not notation (see this file's head)")
        position = match.end()
        if match["space"]:
            continue
        if match["bar"]:
            if bars[-1]:
                bars.append([])
            at, marks = Fraction(0), {}
            continue
        if match["chord"] is not None:
            chords.append((len(bars) - 1, at, *parse_chord(match["chord"])))
            continue
        dur = length(match["len"]) * scale
        if pending_short:
            dur, pending_short = dur / 2, False
        elif match["dot"]:
            dur, pending_short = dur * 3 / 2, True
        pitch: int | None = None
        if match["let"] != "z":
            letter = match["let"].upper()
            octave = 60 + (12 if match["let"].islower() else 0)
            octave += 12 * (match["oct"].count("'") - match["oct"].count(","))
            mark = letter + str(octave)
            if match["acc"]:
                marks[mark] = {"^": 1, "_": -1, "=": 0}[match["acc"]]
            pitch = octave + PC[letter] + marks.get(mark, local.get(letter, 0))
        bars[-1].append((at, dur, pitch, bool(match["tie"])))
        at += dur
    if not bars[-1]:
        bars.pop()
    sums = [sum((n[1] for n in bar), Fraction(0)) for bar in bars]
    pickup = sums[0] if sums[0] < bar_len and len(bars) > 1 else Fraction(0)
    for number, total in enumerate(sums):
        last = number == len(bars) - 1
        if total != bar_len and not (number == 0 and pickup) and not (last and total < bar_len):
            raise ValueError(f"bar {number} holds {total} quarters, the meter {meter[0]}/{meter[1]} wants {bar_len}")
    first = -1 if pickup else 0
    notes: list[Note] = []
    tied = False
    for number, bar in enumerate(bars):
        origin = -pickup if (number == 0 and pickup) else (number + first) * bar_len
        for start, dur, pitch, tie in bar:
            if pitch is None:
                tied = False
            elif tied and notes and notes[-1].pitch == pitch:
                notes[-1] = Note(notes[-1].start, notes[-1].dur + float(dur), pitch)
                tied = tie
            else:
                notes.append(Note(float(origin + start), float(dur), pitch))
                tied = tie
    count = len(bars) + first
    sheet = LeadSheet(meter, tonic, mode, count, notes)
    starts = [float((bar + first) * bar_len + at) for bar, at, _, _ in chords]
    for index, (_, _, root, quality) in enumerate(chords):
        end = starts[index + 1] if index + 1 < len(chords) else count * float(bar_len)
        sheet.chords.append(Chord(starts[index], end - starts[index], root, quality))
    return sheet
