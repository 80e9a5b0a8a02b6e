"""The arranger: a lead sheet, a style and a seed become a score for several instruments.

It transposes to a key, lays out an introduction, as many passes of the tune as the wanted length
holds, and a cadence; gives every part its pattern bar by bar; plays the melody with dynamics, small
variations from pass to pass and human timing. Times are quarter notes; the tempo is exact and constant.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pipelines.demo import drums
from pipelines.demo.compose import harmonise, key_name
from pipelines.demo.layout import colour, count_bars, lay_melody, plan_bars
from pipelines.demo.notation import QUALITIES, SCALES, Chord, LeadSheet, Note, beat_length
from pipelines.demo.patterns import PATTERNS, Bar, Hit, near
from pipelines.demo.styles import INSTRUMENTS, Part, Style

LEAD_IN = 0.05
"""Seconds of silence before the first note."""
RING = 1.9
"""Seconds that the last chord rings on after it is let go."""


@dataclass(frozen=True)
class Event:
    """One sounding note: start and length in quarters (humanised), MIDI pitch, velocity 1–127."""

    start: float
    dur: float
    pitch: int
    velocity: int


@dataclass
class Voice:
    """One MIDI channel's music: instrument name, program, pan −1..1, reverb 0–1, notes."""

    instrument: str
    program: int
    pan: float
    reverb: float
    events: list[Event] = field(default_factory=list)
    drum: bool = False
    lead: bool = False


@dataclass
class Score:
    """An arrangement: voices, exact tempo, and what the catalogue says of it."""

    voices: list[Voice]
    bpm: float
    quarter_bpm: float
    meter: tuple[int, int]
    key: str
    seconds: float
    instruments: list[str]
    leads: list[str]


def swing_time(time: float, amount: float) -> float:
    """Move off-beat eighths late: ``amount`` 0.5 is straight, 0.67 triplets."""
    beat, inside = divmod(time, 1.0)
    if inside < 0.5:
        return beat + inside * 2 * amount
    return beat + amount + (inside - 0.5) * 2 * (1 - amount)


def _velocity(level: float, rng: random.Random) -> int:
    """Level 0–1 to a MIDI velocity with a little chance."""
    return max(12, min(124, round(28 + 88 * level + rng.gauss(0, 3.5))))


def _perform_melody(
    melody: list[tuple[Note, int]],
    sheet: LeadSheet,
    style: Style,
    leads: list[str],
    shift: list[int],
    shade: float,
    rng: random.Random,
    scale: set[int],
) -> list[tuple[int, Hit]]:
    """Melody hits as (index of the lead, hit): phrase dynamics, legato, ornaments."""
    beat = beat_length(sheet.meter)
    hits = []
    previous = 0
    for note, pass_no in melody:
        who = pass_no % len(leads)
        name = leads[who]
        instrument = INSTRUMENTS[name]
        pitch = note.pitch + shift[who]
        bar, inside = divmod(note.start, sheet.bar_len)
        arch = 0.09 * (1 - abs((bar % 4 + inside / sheet.bar_len) - 2) / 2)
        accent = 0.07 if inside < 1e-6 else 0.03 if abs((inside / beat) % 1) < 1e-6 else -0.03
        level = style.lead_level * (0.66 + arch + accent + 0.004 * (pitch - style.lead_centre)) * shade
        dur = note.dur * (0.98 if instrument.sustained else 0.92)
        start = note.start
        if style.ornaments and note.dur >= 0.5 and rng.random() < style.ornaments:
            above = next((p for p in range(pitch + 1, pitch + 5) if p % 12 in scale), pitch + 2)
            hits.append((who, Hit(start, 0.09, above, level * 0.9)))
            start, dur = start + 0.09, max(0.1, dur - 0.09)
        elif style.ornaments and note.dur >= 1.0 and rng.random() < style.ornaments and previous:
            hits.append((who, Hit(start, 0.45, pitch, level)))
            start, dur = start + 0.5, max(0.2, dur - 0.5)
        hits.append((who, Hit(start, dur, pitch, level)))
        previous = pitch
    return hits


def _choose_parts(style: Style, meter: tuple[int, int], rng: random.Random) -> list[tuple[Part, str]]:
    """Which of the style's parts play, and on which instruments."""
    chosen = []
    for part in style.parts:
        keep = rng.random() < part.chance
        name = rng.choice(part.instruments)
        if part.pattern in ("bossa", "bossa_bass", "comp", "stabs") and meter != (4, 4):
            part = Part(
                part.instruments,
                "block" if "bass" not in part.pattern else "root_fifth",
                part.centre,
                part.level,
                part.pan,
            )
        if keep:
            chosen.append((part, name))
    return chosen


def _shifts(leads: list[str], style: Style, pitches: list[int], transpose: int, rng: random.Random) -> list[int]:
    """Semitones to move the melody (sorted ``pitches``) for each lead, so that it lies well on it."""
    middle = pitches[len(pitches) // 2] + transpose
    shift = []
    for name in leads:
        spec = INSTRUMENTS[name]
        centre = min(max(style.lead_centre + rng.choice((0, 0, 0, -5, 5)), spec.low + 8), spec.high - 8)
        moved = transpose + 12 * round((centre - middle) / 12)
        while pitches[0] + moved < spec.low:
            moved += 12
        while pitches[-1] + moved > spec.high and pitches[0] + moved - 12 >= spec.low:
            moved -= 12
        shift.append(moved)
    return shift


@dataclass
class Frame:
    """What all accompanying parts share: the sheet, its chords bar by bar (transposed), the sounding melody."""

    sheet: LeadSheet
    bars: list[list[Chord]]
    melody: list[tuple[float, float, int]]
    intro: int
    bpm: float
    seed: str


def _play_part(part: Part, name: str, frame: Frame) -> list[Hit]:
    """All hits of one accompanying part on instrument ``name``."""
    spec, length = INSTRUMENTS[name], frame.sheet.bar_len
    rng = random.Random(f"{frame.seed}/{part.pattern}/{name}")
    memory: list[int] = []
    kind = rng.randrange(6)
    level = part.level * spec.gain * rng.uniform(0.92, 1.06)
    out: list[Hit] = []
    last = len(frame.bars) - 1
    for number, chords in enumerate(frame.bars):
        if part.pattern == "thirds" and number < frame.intro:
            continue
        begin = number * length
        inside = [(s - begin, d, p) for s, d, p in frame.melody if begin - 1e-6 <= s < begin + length - 1e-6]
        following = frame.bars[min(number + 1, last)][0].root
        bar = Bar(
            index=number - frame.intro, length=length, beat=beat_length(frame.sheet.meter), chords=chords,
            next_root=following, centre=part.centre, low=max(spec.low, 0), high=spec.high, rng=rng, last=memory,
            melody=inside, bpm=frame.bpm, fill=(number - frame.intro) % 4 == 3, style=kind,
        )  # fmt: skip
        found = _final_chord(bar, part.pattern) if number == last else PATTERNS[part.pattern](bar)
        out += [Hit(begin + h.start, h.dur, h.pitch, h.level * level) for h in found]
    return out


def _play_drums(name: str, frame: Frame) -> list[Hit]:
    """All hits of the drums in pattern ``name``."""
    rng = random.Random(f"{frame.seed}/drums")
    kind = rng.randrange(4)
    out: list[Hit] = []
    for number, chords in enumerate(frame.bars):
        begin = number * frame.sheet.bar_len
        bar = Bar(
            index=number - frame.intro, length=frame.sheet.bar_len, beat=beat_length(frame.sheet.meter), chords=chords,
            next_root=0, centre=0, low=0, high=127, rng=rng, last=[], melody=[], bpm=frame.bpm,
            fill=(number - frame.intro) % 4 == 3 or number == frame.intro - 1, style=kind,
        )  # fmt: skip
        found = drums.final(name) if number == len(frame.bars) - 1 else drums.DRUMS[name](bar)
        out += [Hit(begin + h.start, h.dur, h.pitch, h.level * drums.LOUDNESS[name]) for h in found]
    return out


def _humanise(
    voice: Voice, hits: list[Hit], loud: float, swing: float, drift: float, end: float, rng: random.Random
) -> None:
    """Turn hits into the voice's events: swing, timing that strays by ``drift`` quarters, velocities, range."""
    spec = INSTRUMENTS[voice.instrument]
    for hit in hits:
        start = swing_time(hit.start, swing)
        stop = swing_time(hit.start + hit.dur, swing)
        start = max(0.0, start + rng.gauss(0, drift))
        pitch = hit.pitch
        while pitch < spec.low:
            pitch += 12
        while pitch > spec.high:
            pitch -= 12
        stop = min(max(stop, start + 0.06), end)
        voice.events.append(Event(start, stop - start, pitch, _velocity(hit.level * loud, rng)))
    voice.events.sort(key=lambda e: (e.start, e.pitch))


def arrange(
    sheet: LeadSheet,
    style: Style,
    seed: str,
    tonic: int,
    bpm: float,
    seconds: float,
    tune: bool,
    shortest: float,
    longest: float,
) -> Score:
    """Arrange ``sheet`` in ``style`` with ``tonic`` (pitch class) at ``bpm`` felt beats a minute.

    The length comes as near to ``seconds`` as whole bars allow, inside [shortest, longest]; everything
    that is chosen follows from ``seed``. ``tune`` says that the sheet is a tune from the book, whose
    triads the blues style leaves alone.
    """
    rng = random.Random(seed)
    beat = beat_length(sheet.meter)
    quarter_bpm = bpm * beat
    bar_seconds = sheet.bar_len * 60.0 / quarter_bpm
    extra = LEAD_IN + RING
    total, intro = count_bars(sheet, bar_seconds, extra, seconds, shortest, longest, rng)
    chords = [colour(c, sheet.tonic, style, tune) for c in (sheet.chords or harmonise(sheet))]
    layout = plan_bars(sheet, chords, total, intro)
    bars = [
        [colour(c, sheet.tonic, style, tune) if c.quality in ("", "m") and style.colour != "plain" else c for c in bar]
        for bar in layout.chords
    ]
    melody = lay_melody(sheet, layout)
    transpose = (tonic - sheet.tonic) % 12
    leads = [rng.choice(style.leads)]
    if rng.random() < 0.45:
        leads.append(rng.choice(style.leads))
    pitches = sorted(n.pitch for n, _ in melody)
    shift = _shifts(leads, style, pitches, transpose, rng)
    scale = {(step + tonic) % 12 for step in SCALES[sheet.mode]}
    shade = rng.uniform(0.92, 1.06)
    hits = _perform_melody(melody, sheet, style, leads, shift, shade, rng, scale)
    chosen, leads = leads, leads[: max(who for who, _ in hits) + 1]
    raw: list[tuple[Voice, list[Hit]]] = []
    lead_pan = rng.uniform(-0.18, 0.18)
    for who, name in enumerate(leads):
        voice = Voice(name, INSTRUMENTS[name].program, -lead_pan if who else lead_pan, style.reverb, lead=True)
        raw.append((voice, [hit for index, hit in hits if index == who]))
    flip = rng.choice((-1, 1))
    middle = pitches[len(pitches) // 2] + transpose
    lift = transpose + 12 * round((style.lead_centre - middle) / 12)
    frame = Frame(
        sheet,
        [[Chord(c.start, c.dur, (c.root + transpose) % 12, c.quality) for c in bar] for bar in bars],
        [(n.start, n.dur, n.pitch + lift) for n, _ in melody], intro, bpm, seed,
    )  # fmt: skip
    for part, name in _choose_parts(style, sheet.meter, rng):
        out = _play_part(part, name, frame)
        if out:
            raw.append((Voice(name, INSTRUMENTS[name].program, flip * part.pan, style.reverb), out))
    if style.drums and (style.drums != "bodhran" or rng.random() < 0.75):
        voice = Voice("drums", style.drum_kit, 0.0, style.reverb * 0.7, drum=True)
        raw.append((voice, _play_drums(style.drums, frame)))
    if sum(not voice.drum for voice, _ in raw) > 15:
        raise ValueError(f"{len(raw)} voices, MIDI has 16 channels: drop parts from style {style.label!r}")
    drift = 0.006 * quarter_bpm / 60.0
    swing = style.swing if beat == 1.0 else 0.5
    for number, (voice, found) in enumerate(raw):
        loud = INSTRUMENTS[voice.instrument].gain if voice.instrument in chosen else 1.0
        jitter = random.Random(f"{seed}/{voice.instrument}/{number}")
        _humanise(voice, found, loud, swing, drift * (0.5 if voice.drum else 1.0), total * sheet.bar_len, jitter)
    voices = [voice for voice, _ in raw]
    names = list(dict.fromkeys(voice.instrument for voice in voices))
    return Score(
        voices,
        bpm,
        quarter_bpm,
        sheet.meter,
        key_name(tonic, sheet.mode),
        round(total * bar_seconds + extra, 4),
        names,
        list(dict.fromkeys(leads)),
    )


BASSES = ["oom", "root_fifth", "walking", "bass_walk8", "bass_shuffle", "octave8", "bossa_bass", "long", "organ_bass"]
ROLLED = ["strum", "boom_chick", "koto", "arp8", "roll"]


def _final_chord(bar: Bar, pattern: str) -> list[Hit]:
    """The closing chord of a part: its root in the bass, else the whole chord, held for the bar."""
    chord = bar.chords[0]
    steps = QUALITIES[chord.quality]

    def tone(step: int) -> int:
        return near(chord.root + step, bar.centre, bar.low, bar.high)

    if pattern in BASSES:
        return [Hit(0.0, bar.length, tone(0), 0.75)]
    if pattern == "thirds":
        return [Hit(0.0, bar.length, tone(steps[1]), 0.6)]
    roll = 0.03 if pattern in ROLLED else 0.0
    hits = [Hit(i * roll, bar.length, tone(step), 0.68) for i, step in enumerate(steps)]
    if pattern in ("alberti", "stride", "boom_chick", "strum"):
        hits.append(Hit(0.0, bar.length, max(bar.low, near(chord.root, 43)), 0.75))
    return hits
