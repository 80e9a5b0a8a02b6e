"""Harmony and composition: chords for a given tune, and new pieces from a style's habits.

``harmonise`` finds, by dynamic programming, the sequence of functional chords that best holds a melody's
notes while moving as tonal music moves (dominant to tonic, few changes inside a bar, tonic at the end).
``compose`` writes a new piece: the style's progression, a form of phrases (A A' B A'), and a melody made
from two-bar rhythmic motifs that sits on chord tones on strong beats and walks between them.
"""

from __future__ import annotations

import random

from pipelines.demo.notation import NAMES, QUALITIES, SCALES, Chord, LeadSheet, Note, beat_length
from pipelines.demo.styles import Style

#: mode -> roman name -> (semitones above the tonic, triad quality)
DEGREES: dict[str, dict[str, tuple[int, str]]] = {
    "major": {
        "I": (0, ""),
        "ii": (2, "m"),
        "iii": (4, "m"),
        "IV": (5, ""),
        "V": (7, ""),
        "vi": (9, "m"),
        "II": (2, "7"),
        "VI": (9, "7"),
        "iv": (5, "m"),
        "VII": (10, ""),
    },
    "minor": {
        "i": (0, "m"),
        "iv": (5, "m"),
        "V": (7, ""),
        "v": (7, "m"),
        "VI": (8, ""),
        "III": (3, ""),
        "VII": (10, ""),
        "I": (0, ""),
        "IV": (5, ""),
    },
    "dorian": {
        "i": (0, "m"),
        "IV": (5, ""),
        "VII": (10, ""),
        "v": (7, "m"),
        "III": (3, ""),
        "VI": (8, ""),
        "iv": (5, "m"),
        "V": (7, "m"),
        "I": (0, "m"),
    },
    "mixolydian": {
        "I": (0, ""),
        "IV": (5, ""),
        "VII": (10, ""),
        "v": (7, "m"),
        "V": (7, ""),
        "ii": (2, "m"),
        "vi": (9, "m"),
        "i": (0, ""),
        "iv": (5, "m"),
    },
}
#: chords that the harmoniser may use, with how much it likes each
PALETTE: dict[str, dict[str, float]] = {
    "major": {"I": 0.5, "IV": 0.25, "V": 0.4, "vi": 0.0, "ii": -0.05, "iii": -0.4},
    "minor": {"i": 0.5, "iv": 0.2, "V": 0.35, "VI": 0.05, "III": 0.0, "VII": 0.0},
    "dorian": {"i": 0.5, "VII": 0.3, "IV": 0.15, "v": 0.0, "III": 0.0},
    "mixolydian": {"I": 0.5, "VII": 0.25, "IV": 0.2, "v": 0.0, "V": 0.0},
}
#: liked successions (any mode)
MOVES = {
    ("V", "I"): 0.4,
    ("V", "i"): 0.4,
    ("IV", "V"): 0.2,
    ("iv", "V"): 0.2,
    ("ii", "V"): 0.35,
    ("vi", "ii"): 0.2,
    ("I", "IV"): 0.15,
    ("i", "iv"): 0.15,
    ("IV", "I"): 0.15,
    ("VII", "i"): 0.3,
    ("VII", "I"): 0.3,
    ("V", "vi"): 0.1,
    ("vi", "IV"): 0.15,
    ("VI", "VII"): 0.2,
    ("iii", "vi"): 0.2,
    ("VII", "III"): 0.2,
    ("V", "IV"): -0.4,
    ("V", "ii"): -0.4,
    ("V", "iv"): -0.3,
}


def key_name(tonic: int, mode: str) -> str:
    """(9, 'minor') -> 'A minor'. Dorian pieces are called minor, mixolydian ones major, as listeners do."""
    name = NAMES[tonic % 12]
    minor = mode in ("minor", "dorian")
    if minor:
        name = {"Db": "C#", "Ab": "G#"}.get(name, name)
    elif name == "C#":
        name = "Db"
    return f"{name} {'minor' if minor else 'major'}"


def _segments(sheet: LeadSheet) -> list[tuple[float, float]]:
    """Time spans (start, length in quarters) that get one chord each: half bars in 4/4, else bars or beats."""
    num, den = sheet.meter
    if (num, den) == (9, 8):
        step = 1.5
    elif (num, den) == (4, 4):
        step = 2.0
    else:
        step = sheet.bar_len
    count = round(sheet.bars * sheet.bar_len / step)
    return [(index * step, step) for index in range(count)]


def harmonise(sheet: LeadSheet) -> list[Chord]:
    """Chords for a melody without any, by Viterbi search over the palette of its mode."""
    palette = PALETTE[sheet.mode]
    names = list(palette)
    table = DEGREES[sheet.mode]
    beat = beat_length(sheet.meter)
    spans = _segments(sheet)
    scores: list[dict[str, float]] = []
    for start, dur in spans:
        weights = [0.0] * 12
        for note in sheet.melody:
            overlap = min(note.start + note.dur, start + dur) - max(note.start, start)
            if overlap > 0:
                strong = 1.6 if abs((note.start / beat) % 1) < 1e-6 else 1.0
                if abs((note.start / sheet.bar_len) % 1) < 1e-6:
                    strong = 2.2
                weights[note.pitch % 12] += overlap * strong
        total = sum(weights) or 1.0
        row = {}
        for name in names:
            shift, quality = table[name]
            tones = {(sheet.tonic + shift + step) % 12 for step in QUALITIES[quality]}
            row[name] = 3.2 * sum(w for pc, w in enumerate(weights) if pc in tones) / total + palette[name]
        scores.append(row)
    best: list[dict[str, tuple[float, str]]] = []
    for index, row in enumerate(scores):
        inside = abs((spans[index][0] / sheet.bar_len) % 1) > 1e-6
        column: dict[str, tuple[float, str]] = {}
        for name in names:
            if index == 0:
                column[name] = (row[name] + (0.6 if name in ("I", "i") else 0.0), "")
                continue
            options = []
            for prev in names:
                change = 0.0 if prev == name else (-0.75 if inside else 0.12) + MOVES.get((prev, name), 0.0)
                options.append((best[-1][prev][0] + change, prev))
            value, prev = max(options)
            bonus = 2.0 if index == len(scores) - 1 and name in ("I", "i") else 0.0
            column[name] = (value + row[name] + bonus, prev)
        best.append(column)
    name = max(names, key=lambda n: best[-1][n][0])
    path = [name]
    for column in reversed(best[1:]):
        name = column[name][1]
        path.append(name)
    path.reverse()
    chords: list[Chord] = []
    for (start, dur), name in zip(spans, path, strict=True):
        shift, quality = table[name]
        root = (sheet.tonic + shift) % 12
        same = chords and (chords[-1].root, chords[-1].quality) == (root, quality)
        if same and abs((start / sheet.bar_len) % 1) > 1e-6:
            chords[-1] = Chord(chords[-1].start, chords[-1].dur + dur, root, quality)
        else:
            chords.append(Chord(start, dur, root, quality))
    return chords


def _cells(style: Style, rng: random.Random, bar_len: float) -> tuple[list[float], list[float]]:
    """A motif's two bars of rhythm (lengths in quarters), fitted to the meter."""
    pair = rng.choice(style.rhythms).split("|")
    fitted = []
    for text in pair:
        cell = [float(value) for value in text.split()]
        while sum(cell) > bar_len + 1e-9:
            extra = sum(cell) - bar_len
            if cell[-1] > extra + 0.2:
                cell[-1] -= extra
            else:
                cell.pop()
        if sum(cell) < bar_len - 1e-9:
            cell.append(bar_len - sum(cell))
        fitted.append(cell)
    return fitted[0], fitted[1]


def _jig_cells(rng: random.Random) -> tuple[list[float], list[float]]:
    """Two bars of 6/8 rhythm in quarters."""
    groups = ([0.5, 0.5, 0.5], [1.0, 0.5], [0.5, 0.5, 0.5], [0.75, 0.25, 0.5])
    first = rng.choice(groups) + rng.choice(groups)
    return first, [*rng.choice(groups), 1.5]


def _melody_bar(
    rng: random.Random,
    cell: list[float],
    start: float,
    chord_at: list[tuple[float, set[int]]],
    scale: set[int],
    at: int,
    low: int,
    high: int,
    drift: int,
) -> tuple[list[Note], int]:
    """One bar of melody from rhythm ``cell``; ``at`` is the last pitch, ``drift`` the direction −1, 0, 1."""
    notes = []
    time = start
    ladder = [p for p in range(low, high + 1) if p % 12 in scale]
    for index, dur in enumerate(cell):
        tones = max((c for c in chord_at if c[0] <= time + 1e-6), key=lambda c: c[0])[1]
        tones = (tones & scale) or tones
        strong = index == 0 or dur >= 1.0 or (abs(time - round(time)) < 1e-6 and rng.random() < 0.35)
        if strong:
            options = [p for p in range(low, high + 1) if p % 12 in tones and abs(p - at) <= 9] or ladder
            ranked = sorted(
                options,
                key=lambda p: (
                    abs(p - (at + 2 * drift))
                    + 3.2 * rng.random()
                    + (1.5 if p == at else 0.0)
                    + (0.6 if abs(p - at) > 5 else 0.0)
                ),
            )
            at = ranked[0]
        else:
            place = min(range(len(ladder)), key=lambda i: abs(ladder[i] - at))
            move = rng.choice((-1, -1, 1, 1, drift or 1, 2 * (drift or -1)))
            place = max(0, min(len(ladder) - 1, place + move))
            at = ladder[place]
        notes.append(Note(time, dur, at))
        time += dur
    return notes, at


def compose(style: Style, seed: str) -> LeadSheet:
    """A new piece in ``style``: tonic C (pitch class 0), 12 or 16 bars, melody around middle C + 12."""
    rng = random.Random(seed)
    meter = rng.choice(style.meters)
    mode = rng.choice(style.modes)
    minor = mode in ("minor", "dorian")
    source = style.minor_progressions if minor else style.progressions
    phrases = [line.split() for line in rng.choice(source).split("|")]
    plan = [0, 1, 2 % len(phrases), len(phrases) - 1] if len(phrases) == 4 else list(range(len(phrases)))
    if len(phrases) == 4:
        plan = rng.choice(([0, 1, 2, 3], [0, 3, 2, 3], [0, 1, 0, 3]))
    elif len(phrases) == 2:
        plan = [0, 1, 0, 1]
    table = DEGREES[mode]
    bar_len = meter[0] * 4.0 / meter[1]
    sheet = LeadSheet(meter, 0, mode, len(plan) * 4, [], scale=style.scale)
    for phrase, which in enumerate(plan):
        for bar, name in enumerate(phrases[which]):
            shift, quality = table.get(name) or DEGREES["major"].get(name) or DEGREES["minor"][name]
            sheet.chords.append(Chord((phrase * 4 + bar) * bar_len, bar_len, shift % 12, quality))
    scale = set(style.scale or SCALES[mode])
    low, high = 60 + rng.choice((-3, 0, 2)), 79 + rng.choice((-2, 0, 3))
    motifs = [(_jig_cells(rng) if meter == (6, 8) else _cells(style, rng, bar_len)) for _ in range(2)]
    letters = rng.choice(("AABA", "ABAB", "AABB", "ABBA", "AAAB"))
    at = rng.choice([p for p in range(64, 75) if p % 12 in (0, 4, 7) or p % 12 in scale])
    memory: dict[tuple[int, int, str], tuple[int, list[int]]] = {}
    for bar in range(sheet.bars):
        phrase, inside = divmod(bar, 4)
        letter = letters[phrase % 4]
        cell = motifs["AB".index(letter)][inside % 2]
        start = bar * bar_len
        chords = [
            (c.start, {(c.root + s) % 12 for s in QUALITIES[c.quality]})
            for c in sheet.chords
            if c.start < start + bar_len - 1e-6 and c.start + c.dur > start + 1e-6
        ]
        last_of_phrase = inside == 3
        if last_of_phrase:
            long_end = rng.random() < 0.5 or bar == sheet.bars - 1 or bar_len <= 2
            cell = [bar_len] if long_end else [bar_len - 1, 1]
        chord = sheet.chords[bar]
        memo = memory.get((chord.root, inside, letter))
        if memo and not last_of_phrase and rng.random() < 0.75:
            time = start
            for dur, pitch in zip(cell, memo[1], strict=True):
                sheet.melody.append(Note(time, dur, pitch))
                time += dur
            at = memo[1][-1]
            continue
        drift = (1, 0, -1, 0)[inside] if letter == "A" else (-1, 1, 0, -1)[inside]
        if bar == sheet.bars - 1:
            options = [p for p in range(low, high + 1) if p % 12 == 0]
            at = min(options, key=lambda p: abs(p - at))
            sheet.melody.append(Note(start, bar_len, at))
            continue
        notes, at = _melody_bar(rng, cell, start, chords, scale, at, low, high, drift)
        memory[(chord.root, inside, letter)] = (at, [n.pitch for n in notes])
        sheet.melody.extend(notes)
    return sheet
