"""Percussion patterns: what the drums play in one bar, for each style that has drums.

As in ``patterns.py`` a pattern is a function of a ``Bar``; pitches are keys of the General MIDI percussion
map. ``final`` is the stroke that ends a piece, ``LOUDNESS`` a trim of each kit.
"""

from __future__ import annotations

from collections.abc import Callable

from pipelines.demo.patterns import Bar, Hit

KICK, RIM, SNARE, CLAP, BRUSH, TOM_LOW, HAT, PEDAL, TOM_MIDDLE, OPEN = 36, 37, 38, 39, 40, 41, 42, 44, 45, 46
TOM_HIGH, CRASH, RIDE, SHAKER = 48, 49, 51, 70
#: how loud each kit is played
LOUDNESS = {"swing": 1.3, "bossa": 1.2, "four_floor": 0.68, "march": 0.9, "bodhran": 0.85, "rock_shuffle": 0.85}


def final(name: str) -> list[Hit]:
    """The stroke on the last chord: crash, ride or drum, with the kick."""
    stroke = {"swing": RIDE, "bossa": TOM_LOW, "bodhran": TOM_LOW}.get(name, CRASH)
    return [Hit(0, 1.0, stroke, 0.6), Hit(0, 0.3, KICK, 0.7)]


def drums_swing(bar: Bar) -> list[Hit]:
    """Ride with skips, hi-hat on two and four, light kick, brushed snare."""
    hits = [Hit(t, 0.3, RIDE, 0.6 if i % 2 else 0.5) for i, t in enumerate(bar.beats)]
    hits += [Hit(t + 0.5, 0.2, RIDE, 0.4) for t in bar.beats[1::2]]
    hits += [Hit(t, 0.2, PEDAL, 0.6) for t in bar.beats[1::2]]
    hits += [Hit(t, 0.3, BRUSH, 0.3) for t in bar.beats[1::2]] + [Hit(0, 0.3, KICK, 0.3)]
    if bar.fill or bar.rng.random() < 0.3:
        hits.append(Hit(bar.rng.choice((1.5, 2.5, 3.5)), 0.2, SNARE, 0.45))
    return hits


def drums_rock(bar: Bar) -> list[Hit]:
    """Kick, backbeat and hi-hat eighths (6/8: backbeat on the second beat), a fill at phrase ends."""
    if bar.beat == 1.5:
        hits = [Hit(t, 0.2, HAT, 0.6 if i % 3 == 0 else 0.42) for i, t in enumerate(bar.steps(0.5))]
        return [*hits, Hit(0, 0.3, KICK, 0.9), Hit(1.5, 0.3, SNARE, 0.8), Hit(2.5, 0.3, KICK, 0.6)]
    hits = [Hit(t, 0.2, HAT, 0.62 if i % 2 == 0 else 0.42) for i, t in enumerate(bar.steps(0.5))]
    hits += [Hit(t, 0.3, KICK, 0.9) for t in (0.0, 2.0, *((2.5,) if bar.style % 2 else (1.5,)))]
    if bar.fill:
        hits += [
            Hit(3 + i * 0.25, 0.2, p, 0.7 + 0.05 * i) for i, p in enumerate((SNARE, TOM_HIGH, TOM_MIDDLE, TOM_LOW))
        ]
        hits.append(Hit(1.0, 0.3, SNARE, 0.85))
    else:
        hits += [Hit(t, 0.3, SNARE, 0.85) for t in (1.0, 3.0)]
    if bar.index % 8 == 0:
        hits.append(Hit(0, 1.0, CRASH, 0.7))
    return hits


def drums_four(bar: Bar) -> list[Hit]:
    """Four on the floor: kick on every beat, clap on two and four, open hat between, sixteenth hats."""
    hits = [Hit(t, 0.3, KICK, 1.0) for t in bar.beats] + [Hit(t + 0.5, 0.3, OPEN, 0.6) for t in bar.beats]
    hits += [Hit(t, 0.3, CLAP, 0.75) for t in bar.beats[1::2]]
    hits += [Hit(t, 0.1, HAT, 0.4) for t in bar.steps(0.25)]
    if bar.fill:
        hits += [Hit(bar.length - 1 + i * 0.25, 0.2, SNARE, 0.5 + 0.12 * i) for i in range(4)]
    return hits


def drums_bossa(bar: Bar) -> list[Hit]:
    """Rim clave over two bars, soft kick, shaker eighths."""
    clave = (0.0, 1.5, 3.0) if bar.index % 2 == 0 else (1.0, 2.5)
    hits = [Hit(t, 0.2, RIM, 0.6) for t in clave if t < bar.length]
    hits += [Hit(t, 0.2, SHAKER, 0.5 if i % 2 == 0 else 0.36) for i, t in enumerate(bar.steps(0.5))]
    hits += [Hit(t, 0.3, KICK, 0.55) for t in (0.0, 1.5, 2.0, 3.5) if t < bar.length]
    return hits


def drums_march(bar: Bar) -> list[Hit]:
    """Bass drum on the strong beats, snare after them and in rolls at phrase ends, cymbals now and then."""
    if bar.beat == 1.5:
        hits = [Hit(0, 0.3, KICK, 0.8), Hit(1.5, 0.3, KICK, 0.6)]
        return hits + [Hit(t, 0.2, SNARE, 0.5) for t in (1.0, 2.5, 2.0)]
    hits = [Hit(t, 0.3, KICK, 0.8) for t in (bar.beats if len(bar.beats) == 2 else bar.beats[::2])]
    hits += [Hit(t + 0.5 * (len(bar.beats) == 2), 0.2, SNARE, 0.55) for t in bar.beats[len(bar.beats) != 2 :: 2]]
    hits += [Hit(t + 0.5, 0.2, SNARE, 0.38) for t in bar.beats[1::2]]
    if bar.fill:
        hits += [Hit(bar.length - 1 + i * 0.125, 0.1, SNARE, 0.35 + 0.04 * i) for i in range(8)]
    if bar.index % 4 == 0:
        hits.append(Hit(0, 1.0, CRASH, 0.5))
    return hits


def drums_bodhran(bar: Bar) -> list[Hit]:
    """A frame drum played on toms: deep on the beat, light between."""
    hits = []
    for number, time in enumerate(bar.steps(0.5)):
        on = any(abs(time - t) < 1e-6 for t in bar.beats)
        if on or bar.rng.random() < 0.75:
            hits.append(Hit(time, 0.2, TOM_LOW if on else TOM_MIDDLE, 0.62 if on else 0.3 + 0.1 * (number % 2)))
    return hits


DRUMS: dict[str, Callable[[Bar], list[Hit]]] = {
    "swing": drums_swing,
    "rock_shuffle": drums_rock,
    "four_floor": drums_four,
    "bossa": drums_bossa,
    "march": drums_march,
    "bodhran": drums_bodhran,
}
