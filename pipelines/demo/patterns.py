"""Accompaniment patterns: what one part plays in one bar, for each kind of part.

A pattern is a function of a ``Bar`` (its length, meter, chords, the part's own memory of its last
voicing, a seeded generator) and returns ``Hit``s: start and length in quarters from the bar line, a
pitch, and a level 0–1. ``PATTERNS`` names them; percussion is in ``drums.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.demo.notation import QUALITIES, Chord


@dataclass(frozen=True)
class Hit:
    """One note of a pattern: start and length in quarters from the bar line, MIDI pitch, level 0–1."""

    start: float
    dur: float
    pitch: int
    level: float


@dataclass
class Bar:
    """What a pattern may look at. ``chords`` start relative to the bar line; ``last`` is the part's last voicing."""

    index: int
    length: float
    beat: float
    chords: list[Chord]
    next_root: int
    centre: int
    low: int
    high: int
    rng: random.Random
    last: list[int]
    melody: list[tuple[float, float, int]]
    bpm: float
    fill: bool = False
    style: int = 0

    def chord(self, time: float) -> Chord:
        """The chord that sounds at ``time`` in the bar."""
        sounding = [c for c in self.chords if c.start <= time + 1e-6]
        return sounding[-1] if sounding else self.chords[0]

    @property
    def beats(self) -> list[float]:
        """Starts of the felt beats, in quarters."""
        return [index * self.beat for index in range(round(self.length / self.beat))]

    def steps(self, size: float) -> list[float]:
        """Starts of a grid of ``size`` quarters."""
        return [index * size for index in range(round(self.length / size))]


def near(pc: int, centre: int, low: int = 0, high: int = 127) -> int:
    """The pitch of class ``pc`` nearest to ``centre`` inside [low, high] if there is one."""
    base = centre + ((pc - centre) % 12)
    pitch = base - 12 if base - centre > 6 else base
    while pitch < low:
        pitch += 12
    while pitch > high:
        pitch -= 12
    return pitch


def voice(bar: Bar, chord: Chord, count: int = 4) -> list[int]:
    """A close voicing of ``chord`` (ascending MIDI pitches) that moves little from the part's last one."""
    tones = [(chord.root + step) % 12 for step in QUALITIES[chord.quality]]
    if len(tones) > count:
        tones = tones[1:] if count <= 3 and len(tones) == 4 else tones[:count]
    best: list[int] = []
    best_cost = 1e9
    for turn in range(len(tones)):
        order = tones[turn:] + tones[:turn]
        for origin in (-12, 0):
            pitch = near(order[0], bar.centre - 4) + origin
            pitches = [pitch]
            for pc in order[1:]:
                pitches.append(pitches[-1] + ((pc - pitches[-1]) % 12 or 12))
            mean = sum(pitches) / len(pitches)
            cost = 1.0 * abs(mean - bar.centre)
            if bar.last:
                cost += sum(min(abs(p - q) for q in bar.last) for p in pitches)
            if pitches[0] < bar.low or pitches[-1] > bar.high:
                cost += 50
            if cost < best_cost:
                best, best_cost = pitches, cost
    bar.last[:] = best
    return best


def spans(bar: Bar) -> list[tuple[float, float, Chord]]:
    """The bar's chords as (start, length, chord)."""
    return [(max(0.0, c.start), min(bar.length, c.start + c.dur) - max(0.0, c.start), c) for c in bar.chords]


def block(bar: Bar) -> list[Hit]:
    """Sustained chords, restruck with every change."""
    return [Hit(s, d * 0.97, p, 0.7) for s, d, c in spans(bar) for p in voice(bar, c)]


def pad(bar: Bar) -> list[Hit]:
    """Sustained chords, overlapping a little."""
    return [Hit(s, d * 1.08, p, 0.6) for s, d, c in spans(bar) for p in voice(bar, c)]


def long(bar: Bar) -> list[Hit]:
    """The root alone, held."""
    return [Hit(s, d * 0.98, near(c.root, bar.centre, bar.low, bar.high), 0.75) for s, d, c in spans(bar)]


def chorale(bar: Bar) -> list[Hit]:
    """Inner voices struck with every beat of the melody, as hymns are."""
    hits = []
    for time in bar.beats:
        for pitch in voice(bar, bar.chord(time), 3):
            hits.append(Hit(time, bar.beat * 0.93, pitch, 0.7))
    return hits


def organ_bass(bar: Bar) -> list[Hit]:
    """Pedal line: root on strong beats, third or fifth between."""
    hits = []
    for index, time in enumerate(bar.beats):
        chord = bar.chord(time)
        step = 0 if index % 2 == 0 or bar.rng.random() < 0.5 else bar.rng.choice(QUALITIES[chord.quality][1:3] or (7,))
        hits.append(Hit(time, bar.beat * 0.95, near(chord.root + step, bar.centre, bar.low, bar.high), 0.75))
    return hits


def inner(bar: Bar) -> list[Hit]:
    """One or two inner voices in half notes or quarters."""
    size = bar.beat * (2 if len(bar.beats) % 2 == 0 else 1)
    if bar.style % 3 == 1:
        size = bar.beat
    hits = []
    for time in bar.steps(size):
        pitches = voice(bar, bar.chord(time), 3)
        for pitch in pitches[:2]:
            hits.append(Hit(time, size * 0.95, pitch, 0.65))
    return hits


def thirds(bar: Bar) -> list[Hit]:
    """A second voice under the melody, a third or sixth below, on chord tones."""
    hits = []
    for start, dur, pitch in bar.melody:
        tones = {(bar.chord(start).root + step) % 12 for step in QUALITIES[bar.chord(start).quality]}
        below = next((p for p in range(pitch - 3, pitch - 10, -1) if p % 12 in tones), pitch - 12)
        hits.append(Hit(start, dur * 0.92, below, 0.6))
    return hits


def alberti(bar: Bar) -> list[Hit]:
    """Low-high-middle-high broken chords in eighths, with a held root."""
    hits = []
    size = 0.5
    for number, time in enumerate(bar.steps(size)):
        chord = bar.chord(time)
        pitches = voice(bar, chord, 3)
        low, mid, high = pitches[0], pitches[len(pitches) // 2], pitches[-1]
        if bar.style % 3 == 1:
            order = (low, mid, high, mid)
        elif bar.style % 3 == 2:
            order = (low - 12, low, mid, high)
        else:
            order = (low, high, mid, high)
        wheel = (len(bar.steps(size)) % 4 and 6) or 4
        slot = number % wheel
        pitch = order[slot] if slot < 4 else (high, mid)[slot - 4]
        hits.append(Hit(time, size * 1.4, pitch, 0.62 if slot else 0.74))
    return hits


def arp8(bar: Bar) -> list[Hit]:
    """Chord tones up and down in eighths."""
    hits = []
    for number, time in enumerate(bar.steps(0.5)):
        pitches = voice(bar, bar.chord(time), 4)
        ladder = [*pitches, pitches[0] + 12]
        wheel = ladder + ladder[-2:0:-1]
        hits.append(Hit(time, 0.9, wheel[number % len(wheel)], 0.7 if number == 0 else 0.58))
    return hits


def arp16(bar: Bar) -> list[Hit]:
    """A sequencer: chord tones in sixteenths, an accent pattern of three."""
    hits = []
    for number, time in enumerate(bar.steps(0.25)):
        pitches = voice(bar, bar.chord(time), 3)
        ladder = [*pitches, pitches[0] + 12]
        order = (0, 2, 1, 3) if bar.style % 2 else (0, 1, 2, 3)
        hits.append(Hit(time, 0.2, ladder[order[number % 4] % len(ladder)], 0.8 if number % 3 == 0 else 0.55))
    return hits


def sparse(bar: Bar) -> list[Hit]:
    """A few single chord tones, far apart."""
    hits = []
    for time in bar.beats:
        if bar.rng.random() < 0.45:
            start = time + bar.rng.choice((0.0, 0.5))
            hits.append(Hit(start, 2.0, bar.rng.choice(voice(bar, bar.chord(time), 4)), 0.55))
    return hits


def offbeats(bar: Bar) -> list[Hit]:
    """Short chords between the bass notes: beats 2 and 4, 2 and 3 of a waltz, the last eighth of a jig's beat."""
    if bar.beat == 1.5:
        times = [t + 1.0 for t in bar.beats]
    elif len(bar.beats) == 3:
        times = bar.beats[1:]
    elif len(bar.beats) == 2:
        times = [0.5, 1.5]
    else:
        times = [0.5, 1.5, 2.5, 3.5] if bar.style % 2 and bar.bpm < 130 else bar.beats[1::2]
    return [Hit(t, 0.35, p, 0.7) for t in times for p in voice(bar, bar.chord(t), 3)]


def oom(bar: Bar) -> list[Hit]:
    """Bass notes on the strong beats, root and fifth in turn."""
    beats = bar.beats
    if len(beats) == 3:
        times = [beats[0]]
    elif len(beats) == 2:
        times = beats
    else:
        times = beats[::2]
    hits = []
    for index, time in enumerate(times):
        chord = bar.chord(time)
        step = 7 if (index or (len(times) == 1 and bar.index % 2)) and chord.quality != "dim" else 0
        pitch = near(chord.root, bar.centre, bar.low, bar.high)
        pitch = near(chord.root + step, pitch - 3, bar.low, bar.high) if step else pitch
        hits.append(Hit(time, bar.beat * 0.85, pitch, 0.8))
    return hits


def stride(bar: Bar) -> list[Hit]:
    """Left hand of ragtime: low octaves on the beat, chords after it."""
    low = [Hit(h.start, 0.45, h.pitch, 0.85) for h in _at_centre(bar, oom, 43)]
    low += [Hit(h.start, 0.45, h.pitch - 12, 0.6) for h in low]
    style, bar.style = bar.style, 0
    chords = _at_centre(bar, offbeats, bar.centre + 6)
    bar.style = style
    return low + chords


def strum(bar: Bar) -> list[Hit]:
    """Guitar strums: down on the beats, up between some; strings follow each other by milliseconds."""
    hits = []
    strokes = [(t, True) for t in bar.beats]
    if bar.beat == 1.5:
        strokes += [(t + 1.0, False) for t in bar.beats]
    else:
        strokes += [(t + 0.5, False) for t in bar.beats[1:] if t != 2.0 or bar.style % 2]
    for time, down in strokes:
        pitches = voice(bar, bar.chord(time), 4)
        pitches = [pitches[0] - 12, *pitches] if down else pitches[1:][::-1]
        for number, pitch in enumerate(pitches):
            hits.append(Hit(time + number * 0.022, 0.6, max(pitch, bar.low), (0.75 if down else 0.5) - 0.02 * number))
    return hits


def boom_chick(bar: Bar) -> list[Hit]:
    """Bass string, then a strum."""
    hits = [Hit(h.start, 0.8, h.pitch, 0.8) for h in _at_centre(bar, oom, 45)]
    beats = bar.beats[1:] if len(bar.beats) == 3 else bar.beats[1::2]
    for time in beats:
        for number, pitch in enumerate(voice(bar, bar.chord(time), 4)):
            hits.append(Hit(time + number * 0.02, 0.5, pitch, 0.7))
    return hits


def _at_centre(bar: Bar, pattern: Callable[[Bar], list[Hit]], centre: int) -> list[Hit]:
    """Run ``pattern`` around another centre pitch."""
    old, bar.centre = bar.centre, centre
    hits = pattern(bar)
    bar.centre = old
    return hits


def roll(bar: Bar) -> list[Hit]:
    """Banjo rolls in eighths over the chord, a drone string on top."""
    hits = []
    forward = ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3))[bar.style % 3]
    for number, time in enumerate(bar.steps(0.5)):
        pitches = voice(bar, bar.chord(time), 3)
        ladder = [*pitches, pitches[0] + 12]
        hits.append(Hit(time, 0.48, ladder[forward[number % 4] % len(ladder)], 0.8 if number % 3 == 0 else 0.6))
    return hits


def drone(bar: Bar) -> list[Hit]:
    """Root and fifth, held."""
    hits = []
    for start, dur, chord in spans(bar):
        root = near(chord.root, bar.centre, bar.low, bar.high)
        hits += [Hit(start, dur, root, 0.5), Hit(start, dur, root + 7, 0.45)]
    return hits


def comp(bar: Bar) -> list[Hit]:
    """Jazz comping: short chords at changing places."""
    times = bar.rng.choice(((0.0, 1.5), (1.0, 2.5), (0.5, 2.0), (1.5, 3.0), (0.0, 2.5, 3.5), (1.0, 3.0)))
    hits = []
    for time in times:
        if time < bar.length:
            dur = bar.rng.choice((0.35, 0.8))
            hits += [Hit(time, dur, p, 0.6 + 0.15 * bar.rng.random()) for p in voice(bar, bar.chord(time), 4)]
    return hits


def bossa(bar: Bar) -> list[Hit]:
    """Syncopated guitar chords over two bars."""
    times = (0.0, 1.0, 2.5, 3.5) if bar.index % 2 == 0 else (0.5, 1.5, 2.0, 3.0)
    hits = []
    for time in times:
        if time < bar.length:
            hits += [Hit(time, 0.6, p, 0.7) for p in voice(bar, bar.chord(time), 4)]
    return hits


def shuffle(bar: Bar) -> list[Hit]:
    """Blues rhythm guitar: root with fifth and sixth in eighths, or held power chords."""
    hits = []
    for number, time in enumerate(bar.steps(0.5)):
        chord = bar.chord(time)
        root = near(chord.root, bar.centre - 2, bar.low, bar.high)
        upper = 9 if (number // 2) % 2 and bar.style % 2 == 0 and "m" not in chord.quality else 7
        level = 0.8 if number % 2 == 0 else 0.6
        hits += [Hit(time, 0.42, root, level), Hit(time, 0.42, root + upper, level)]
    return hits


def stabs(bar: Bar) -> list[Hit]:
    """Synth chords off the beat."""
    times = ((0.5, 1.5, 2.5, 3.5), (0.0, 0.75, 1.5, 2.5, 3.25), (0.0, 1.5, 3.0))[bar.style % 3]
    return [Hit(t, 0.3, p, 0.7) for t in times if t < bar.length for p in voice(bar, bar.chord(t), 3)]


def koto(bar: Bar) -> list[Hit]:
    """Zither: root and fifth, an open arpeggio, now and then a fast run."""
    hits = []
    for start, dur, chord in spans(bar):
        root = near(chord.root, bar.centre - 8, bar.low, bar.high)
        figure = (0, 7, 12, 19, 12, 7) if bar.style % 2 else (0, 7, 12, 7, 19, 12)
        for number in range(int(dur / 0.5)):
            if number < 3 or bar.rng.random() < 0.5:
                hits.append(Hit(start + number * 0.5, 1.4, root + figure[number % 6], 0.75 - 0.03 * number))
    if bar.fill:
        root = near(bar.chord(0).root, bar.centre, bar.low, bar.high)
        hits += [Hit(bar.length - 1 + i * 0.125, 0.8, root + (0, 5, 7, 12, 17, 19)[i], 0.6) for i in range(6)]
    return hits


def plucks(bar: Bar) -> list[Hit]:
    """Single plucked fifths and octaves on some beats."""
    hits = []
    for index, time in enumerate(bar.beats):
        if index in (1, 3) or bar.rng.random() < 0.3:
            root = near(bar.chord(time).root, bar.centre, bar.low, bar.high)
            hits.append(Hit(time, 0.7, root + bar.rng.choice((0, 7)), 0.65))
    return hits


def root_fifth(bar: Bar) -> list[Hit]:
    """Country bass: root, fifth, and now and then a walk-up to the next root."""
    hits = oom(bar)
    if bar.fill and len(bar.beats) == 4:
        target = near(bar.next_root, bar.centre, bar.low, bar.high)
        hits = [h for h in hits if h.start < 2] + [Hit(2, 0.8, target - 3, 0.75), Hit(3, 0.8, target - 1, 0.75)]
    return hits


def walking(bar: Bar) -> list[Hit]:
    """A quarter-note line: root, chord tones, and a step into the next root."""
    hits = []
    at = bar.last[0] if bar.last else bar.centre
    beats = bar.beats
    for index, time in enumerate(beats):
        chord = bar.chord(time)
        fresh = any(abs(c.start - time) < 1e-6 for c in bar.chords)
        if index == 0 or fresh:
            pitch = near(chord.root, round(0.6 * at + 0.4 * bar.centre), bar.low, bar.high)
        elif index == len(beats) - 1:
            target = near(bar.next_root, at, bar.low, bar.high)
            pitch = target + bar.rng.choice((-1, 1, -2, 2))
        else:
            step = bar.rng.choice(QUALITIES[chord.quality][1:3] or (7,))
            pitch = near(chord.root + step, at, bar.low, bar.high)
        at = max(bar.low, min(bar.high, pitch))
        hits.append(Hit(time, bar.beat * 0.92, at, 0.78))
        if index == 1 and bar.rng.random() < 0.15:
            hits.append(Hit(time + 0.5 * bar.beat, 0.4 * bar.beat, at, 0.5))
    bar.last[:] = [at]
    return hits


def bass_walk8(bar: Bar) -> list[Hit]:
    """Continuo bass: quarters through chord tones, passing eighths before a change."""
    hits = []
    at = bar.last[0] if bar.last else bar.centre
    third = bar.beat / 3 if bar.beat == 1.5 else bar.beat
    for time in bar.steps(third if bar.beat == 1.5 else bar.beat):
        chord = bar.chord(time)
        strong = any(abs(c.start - time) < 1e-6 for c in bar.chords) or time == 0
        if bar.beat == 1.5 and time not in bar.beats:
            continue
        step = 0 if strong else bar.rng.choice((0, *QUALITIES[chord.quality][1:3]))
        at = near(chord.root + step, round(0.5 * at + 0.5 * bar.centre), bar.low, bar.high)
        hits.append(Hit(time, bar.beat * 0.9, at, 0.72))
        if bar.fill and time == bar.beats[-1]:
            hits[-1] = Hit(time, bar.beat * 0.45, at, 0.72)
            hits.append(Hit(time + bar.beat / 2, bar.beat * 0.45, near(bar.next_root - 2, at, bar.low, bar.high), 0.65))
    bar.last[:] = [at]
    return hits


def bass_shuffle(bar: Bar) -> list[Hit]:
    """Boogie bass: 1 1 3 3 5 5 6 5 in eighths, or root eighths."""
    line = (0, 0, 4, 4, 7, 7, 9, 7) if bar.style % 2 else (0, 0, 0, 0, 7, 7, 0, 0)
    hits = []
    for number, time in enumerate(bar.steps(0.5)):
        chord = bar.chord(time)
        step = line[number % 8]
        if "m" in chord.quality:
            step = {4: 3, 9: 10}.get(step, step)
        pitch = near(chord.root, bar.centre, bar.low, bar.high) + step
        hits.append(Hit(time, 0.45, min(pitch, bar.high), 0.85 if number % 2 == 0 else 0.65))
    return hits


def octave8(bar: Bar) -> list[Hit]:
    """Dance bass: root on the beat, octave off it, or driving offbeats."""
    hits = []
    for number, time in enumerate(bar.steps(0.5)):
        root = near(bar.chord(time).root, bar.centre - 2, bar.low, bar.high)
        if bar.style % 2 == 0:
            hits.append(Hit(time, 0.4, root + 12 * (number % 2), 0.85))
        elif number % 2:
            hits += [Hit(time, 0.2, root, 0.9), Hit(time + 0.25, 0.2, root, 0.75)]
    return hits


def bossa_bass(bar: Bar) -> list[Hit]:
    """Root, dotted, then fifth."""
    chord, late = bar.chord(0.0), bar.chord(2.0)
    root = near(chord.root, bar.centre, bar.low, bar.high)
    fifth = near(late.root + (7 if late.quality != "dim" else 6), root, bar.low, bar.high)
    hits = [Hit(0.0, 1.4, root, 0.85), Hit(1.5, 0.45, root if late == chord else fifth, 0.6)]
    if bar.length > 2:
        hits += [Hit(2.0, 1.4, fifth, 0.8), Hit(3.5, 0.45, near(bar.next_root, fifth, bar.low, bar.high), 0.55)]
    return hits


# fmt: off
PATTERNS: dict[str, Callable[[Bar], list[Hit]]] = {
    "block": block, "pad": pad, "long": long, "chorale": chorale, "organ_bass": organ_bass, "inner": inner,
    "thirds": thirds, "alberti": alberti, "arp8": arp8, "arp16": arp16, "sparse": sparse, "offbeats": offbeats,
    "oom": oom, "stride": stride, "strum": strum, "boom_chick": boom_chick, "roll": roll, "drone": drone,
    "comp": comp, "bossa": bossa, "shuffle": shuffle, "stabs": stabs, "koto": koto, "plucks": plucks,
    "root_fifth": root_fifth, "walking": walking, "bass_walk8": bass_walk8, "bass_shuffle": bass_shuffle,
    "octave8": octave8, "bossa_bass": bossa_bass,
}
# fmt: on
