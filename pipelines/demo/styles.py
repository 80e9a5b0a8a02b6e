"""Styles, instruments and artists of the demo catalogue, as data.

A style says who may play the melody, which parts accompany it with which pattern, how it swings, how
fast it goes and from which progressions and rhythms the composer draws. Every artist has one style;
their names are invented. The names also decide the split: ``split_side`` is the rule of the pipeline
(hash of the artist, since every work here has one artist), and exactly one of a style's four artists
falls on the validation side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

VALID_SHARE = 0.15


def split_side(artist: str) -> str:
    """'train' or 'valid' for a group whose smallest artist name is ``artist`` (demo settings)."""
    digest = hashlib.sha256(("musicgen-split:" + artist).encode()).hexdigest()[:16]
    return "valid" if int(digest, 16) / 2**64 < VALID_SHARE else "train"


@dataclass(frozen=True)
class Instrument:
    """A General MIDI voice: program 0–127, usable range as MIDI numbers, whether it sustains, loudness trim."""

    program: int
    low: int
    high: int
    sustained: bool = False
    gain: float = 1.0


# fmt: off
INSTRUMENTS: dict[str, Instrument] = {
    "piano": Instrument(0, 28, 100),
    "honky-tonk piano": Instrument(3, 33, 96),
    "electric piano": Instrument(4, 36, 90),
    "harpsichord": Instrument(6, 36, 86, gain=0.9),
    "celesta": Instrument(8, 60, 103),
    "glockenspiel": Instrument(9, 72, 105, gain=0.85),
    "music box": Instrument(10, 60, 100),
    "vibraphone": Instrument(11, 53, 89),
    "church organ": Instrument(19, 36, 93, True, 0.9),
    "pipe organ flutes": Instrument(20, 48, 93, True),
    "accordion": Instrument(21, 53, 88, True, 0.85),
    "nylon guitar": Instrument(24, 40, 83),
    "steel guitar": Instrument(25, 40, 84),
    "jazz guitar": Instrument(26, 40, 84),
    "overdriven guitar": Instrument(29, 40, 86, True, 0.8),
    "distortion guitar": Instrument(30, 40, 86, True, 0.75),
    "double bass": Instrument(32, 28, 55),
    "bass guitar": Instrument(33, 28, 55),
    "synth bass": Instrument(38, 28, 55),
    "violin": Instrument(40, 55, 96, True),
    "viola": Instrument(41, 48, 84, True),
    "cello": Instrument(42, 36, 72, True),
    "harp": Instrument(46, 36, 96),
    "string section": Instrument(48, 40, 90, True, 0.85),
    "synth strings": Instrument(50, 40, 90, True, 0.85),
    "choir": Instrument(52, 48, 80, True, 0.9),
    "trumpet": Instrument(56, 55, 84, True),
    "trombone": Instrument(57, 40, 72, True),
    "tuba": Instrument(58, 29, 55, True),
    "French horn": Instrument(60, 41, 77, True),
    "brass section": Instrument(61, 48, 82, True, 0.9),
    "alto saxophone": Instrument(65, 53, 82, True),
    "tenor saxophone": Instrument(66, 46, 76, True),
    "clarinet": Instrument(71, 52, 89, True),
    "piccolo": Instrument(72, 74, 102, True, 0.8),
    "flute": Instrument(73, 60, 94, True),
    "shakuhachi": Instrument(77, 57, 88, True),
    "tin whistle": Instrument(78, 67, 96, True, 0.85),
    "square lead": Instrument(80, 48, 92, True, 0.9),
    "saw lead": Instrument(81, 48, 92, True, 1.05),
    "new-age pad": Instrument(88, 40, 90, True),
    "warm pad": Instrument(89, 40, 88, True),
    "halo pad": Instrument(94, 40, 88, True),
    "sweep pad": Instrument(95, 40, 88, True),
    "shamisen": Instrument(106, 50, 86),
    "banjo": Instrument(105, 48, 86),
    "koto": Instrument(107, 43, 88),
    "bagpipes": Instrument(109, 60, 84, True, 0.75),
    "fiddle": Instrument(110, 55, 93, True, 0.9),
    "drums": Instrument(-1, 0, 127),
}


# fmt: on
@dataclass(frozen=True)
class Part:
    """An accompanying part: its possible instruments, its pattern, centre pitch, level 0–1, pan −1..1."""

    instruments: tuple[str, ...]
    pattern: str
    centre: int
    level: float
    pan: float = 0.0
    chance: float = 1.0


@dataclass(frozen=True)
class Style:
    """A style; tempi in felt beats a minute, reverb 0–1, swing 0.5 (straight) to 0.67 (triplets)."""

    label: str
    leads: tuple[str, ...]
    parts: tuple[Part, ...]
    artists: tuple[str, ...]
    regions: tuple[str, ...]
    era: str
    moods: tuple[str, ...]
    bpm: tuple[int, int]
    meters: tuple[tuple[int, int], ...]
    modes: tuple[str, ...]
    progressions: tuple[str, ...]
    minor_progressions: tuple[str, ...]
    rhythms: tuple[str, ...]
    drums: str = ""
    drum_kit: int = 0
    reverb: float = 0.4
    swing: float = 0.5
    colour: str = "plain"
    ornaments: float = 0.0
    scale: tuple[int, ...] | None = None
    lead_centre: int = 74
    lead_level: float = 1.0
    keys: tuple[int, ...] = (0, 2, 4, 5, 7, 9, 10)


# fmt: off
FOLK = ("I I IV I|I I V V|I I IV I|I V I I", "I V vi IV|I IV V V|I V vi IV|I V I I",
        "I IV I V|I IV V I|IV I IV V|I IV V I", "I I V V|V V I I|IV IV I I|V V I I")
MINOR = ("i i iv i|i VI V V|i i iv i|iv V i i", "i VII VI V|i VII VI V|iv i iv V|i VI V i",
         "i iv VII III|VI iv V V|i iv VII III|iv V i i")
JAZZ = ("I vi ii V|I vi ii V|iii vi ii V|ii V I I", "ii V I I|ii V I vi|IV IV iii vi|ii V I I",
        "I I ii V|iii vi ii V|IV V iii vi|ii V I I")
JAZZ_MINOR = ("i i iv V|i VI iv V|iv VII III VI|iv V i i", "i VI iv V|i VI iv V|iv iv i VI|iv V i i")
MODAL = ("i VII i VII|i VII v i|III VII i VII|VI VII i i", "i i VII VII|VI VII i i|III VII VI VII|VI VII i i")
POP_MINOR = ("i VI III VII|i VI III VII|VI VII i i|VI VII i i", "i iv VI VII|i iv VI VII|VI III VII i|VI VII i i")

STYLES: tuple[Style, ...] = (
    Style("classical piano", ("piano",), (Part(("piano",), "alberti", 54, 0.4, -0.1),),
          ("Ilse Ristova", "Teodora Vorland", "Jonas Kaldenbach", "Annelise Bergqvist"),
          ("Germany", "Austria", "Czechia", "Sweden"), "19th century", ("lyrical", "elegant", "intimate"),
          (84, 138), ((4, 4), (3, 4)), ("major", "minor"),
          ("I V I V|vi ii V I|IV I ii V|I IV V I", "I IV I V|I vi ii V|V I V I|IV ii V I", *FOLK[:1]), MINOR,
          ("2 1 1|1 1 2", "1.5 .5 1 1|2 2", "1 .5 .5 1 1|3 1", ".5 .5 .5 .5 1 1|2 2"), reverb=0.45, lead_centre=76,
          lead_level=1.15),
    Style("baroque strings", ("violin",),
          (Part(("viola",), "inner", 62, 0.6, -0.25), Part(("cello",), "bass_walk8", 45, 0.8, 0.35),
           Part(("harpsichord",), "block", 58, 0.95, 0.1), Part(("violin",), "thirds", 69, 0.6, -0.45, 0.7)),
          ("Ensemble Aldermoor", "Sankt-Brunn Quartett", "Accademia Valdicera", "Consort Lindenhof"),
          ("England", "Austria", "Italy", "Germany"), "baroque", ("stately", "bright", "graceful"),
          (84, 126), ((4, 4), (3, 4)), ("major", "minor"),
          ("I V vi iii|IV I IV V|I vi ii V|I IV V I", "I IV ii V|I vi IV V|vi iii IV I|ii V I I"),
          ("i iv VII III|VI iv V i|i iv VII III|iv V i i", "i V i iv|VII III iv V|i VI iv V|i V i i"),
          (".5 .5 .5 .5 .5 .5 .5 .5|1 1 1 1", "1 .5 .5 1 1|.5 .5 .5 .5 1 1", "1 .25 .25 .5 1 1|1 1 2"),
          reverb=0.55, lead_centre=76),
    Style("ragtime", ("honky-tonk piano",), (Part(("honky-tonk piano",), "stride", 52, 0.52, -0.1),
                                            Part(("tuba",), "oom", 36, 0.5, 0.2, 0.4),
                                            Part(("banjo",), "offbeats", 62, 0.6, 0.4, 0.3)),
          ("Winifred Crowfoot-Jones", "Odette Tillery", "Lucius Lattimer", "Clement Merriweather"),
          ("United States", "United States", "Cuba", "England"), "early 20th century",
          ("jaunty", "playful", "cheerful"), (140, 176), ((4, 4),), ("major",),
          ("I I V V|V V I I|I I IV iv|I V I I", "I VI II V|I VI II V|IV iv I VI|II V I I",
           "I I IV I|II II V V|I I IV iv|I V I I"), MINOR,
          (".5 1 .5 1 .5 .5|1 .5 1 .5 1", ".5 .5 1 .5 1 .5|1.5 .5 2", ".5 1 .5 .5 1 .5|.5 1 .5 2"),
          reverb=0.25, lead_centre=76, keys=(0, 5, 7, 8, 10, 3)),
    Style("bluegrass", ("fiddle", "banjo", "fiddle"),
          (Part(("banjo",), "roll", 62, 0.62, 0.35), Part(("steel guitar",), "boom_chick", 55, 0.5, -0.35),
           Part(("double bass",), "root_fifth", 36, 0.9)),
          ("June Pickard", "Wendell Rainsford", "Loretta Holloway-Creek", "Hattie Stubblefield"),
          ("United States", "United States", "Canada", "United States"), "traditional", ("lively", "sunny", "rustic"),
          (150, 200), ((4, 4),), ("major", "mixolydian"), FOLK, ("i VII i VII|i VII v i|i VII i VII|VII VII i i",),
          ("1 .5 .5 1 1|1 .5 .5 2", ".5 .5 .5 .5 1 1|.5 .5 .5 .5 2", "1 1 .5 .5 1|1 1 2"),
          reverb=0.2, lead_centre=74, ornaments=0.08, keys=(7, 9, 2, 0)),
    Style("celtic", ("tin whistle", "fiddle", "bagpipes", "flute"),
          (Part(("harp", "steel guitar"), "arp8", 58, 0.6, -0.3),
           Part(("bagpipes", "accordion"), "drone", 50, 0.4, 0.2),
           Part(("steel guitar",), "strum", 57, 0.45, 0.35, 0.6)),
          ("Eilidh Kilbracken", "Mairead Ni-Dhunlaing", "Ruairi Corrigall", "Fearghal MacAskerry"),
          ("Scotland", "Ireland", "Ireland", "Scotland"), "traditional", ("dancing", "wistful", "pastoral"),
          (96, 124), ((6, 8), (4, 4)), ("major", "minor", "mixolydian"), FOLK, MODAL,
          (".5 .5 .5 .5 .5 .5 .5 .5|.5 .5 .5 .5 1 1", "1 .5 .5 .5 .5 1|1 1 2", "1.5 .5 1 1|1 .5 .5 2"),
          drums="bodhran", reverb=0.4, lead_centre=79, ornaments=0.22, keys=(2, 7, 9, 4, 0)),
    Style("swing", ("tenor saxophone", "trumpet", "vibraphone", "clarinet"),
          (Part(("piano", "jazz guitar"), "comp", 60, 0.62, -0.3), Part(("double bass",), "walking", 40, 0.95, 0.1)),
          ("Clyde Fairbanks-Lowe", "Roscoe Duquesne", "Marguerite Vantreese", "Ottilie Pettibone"),
          ("United States", "France", "United States", "United States"), "mid 20th century",
          ("swinging", "relaxed", "urbane"), (112, 168), ((4, 4),), ("major", "minor"), JAZZ, JAZZ_MINOR,
          (".5 .5 1 .5 .5 1|1 .5 1.5 1", "1 .5 .5 1.5 .5|2 1 1", "1.5 .5 .5 .5 1|1 1 2"),
          drums="swing", drum_kit=40, reverb=0.3, swing=0.65, colour="jazz", lead_centre=69,
          keys=(5, 10, 3, 0, 8, 7)),
    Style("blues rock", ("overdriven guitar", "distortion guitar"),
          (Part(("overdriven guitar",), "shuffle", 47, 0.55, -0.5), Part(("bass guitar",), "bass_shuffle", 36, 0.95),
           Part(("church organ",), "block", 62, 0.36, 0.5, 0.4)),
          ("Hank Stonewater", "Earl Calloway-Pike", "Mojo Thornbush", "Delphine Maddox-Ray"),
          ("United States", "England", "United States", "Australia"), "late 20th century",
          ("gritty", "driving", "rebellious"), (92, 138), ((4, 4),), ("mixolydian", "minor"),
          ("I I I I|IV IV I I|V IV I V", "I IV I I|IV IV I I|V IV I I"),
          ("i i i i|iv iv i i|V iv i i", "i i iv i|iv iv i i|VI V i i"),
          ("1 .5 .5 1.5 .5|2 2", ".5 .5 1 .5 .5 1|3 1", "1.5 .5 1 1|1 1 2"),
          drums="rock_shuffle", reverb=0.25, swing=0.64, colour="blues", lead_centre=69,
          scale=(0, 3, 5, 6, 7, 10), keys=(4, 9, 7, 2)),
    Style("electronic dance", ("saw lead", "square lead"),
          (Part(("saw lead", "synth strings"), "stabs", 62, 0.55, -0.35),
           Part(("synth bass",), "octave8", 36, 1.0), Part(("square lead",), "arp16", 70, 0.5, 0.4, 0.8),
           Part(("sweep pad", "synth strings"), "block", 62, 0.4)),
          ("Taavi Pulsar", "Vera Oktava", "Lumi Strobe", "Neon Wexler"),
          ("Estonia", "Russia", "Finland", "Germany"), "21st century", ("energetic", "euphoric", "hypnotic"),
          (118, 140), ((4, 4),), ("minor", "major"),
          ("I V vi IV|I V vi IV|vi IV I V|vi IV V I", "I iii vi IV|I iii vi IV|IV V vi vi|IV V I I"), POP_MINOR,
          (".75 .75 .5 .75 .75 .5|1 1 2", ".5 .5 .5 .5 .5 .5 1|1 .5 .5 2", ".75 .75 .5 1 1|.75 .75 .5 2"),
          drums="four_floor", drum_kit=25, reverb=0.25, lead_centre=76, keys=(9, 4, 2, 0, 7, 5)),
    Style("ambient", ("flute", "halo pad", "choir", "electric piano"),
          (Part(("warm pad", "new-age pad", "halo pad"), "pad", 57, 0.55, -0.2),
           Part(("sweep pad", "choir"), "pad", 67, 0.42, 0.3), Part(("synth strings", "cello"), "long", 43, 0.45),
           Part(("electric piano", "vibraphone", "harp"), "sparse", 72, 0.75, 0.4, 0.8)),
          ("Eero Mistlake", "Ines Tindfjord", "Nadia Korhola", "Haruto Stillwell"),
          ("Finland", "Norway", "Finland", "Japan"), "21st century", ("calm", "dreamy", "spacious"),
          (56, 76), ((4, 4), (3, 4)), ("major", "minor"),
          ("I IV I IV|vi IV I V|I IV I IV|vi IV I I", "I iii IV I|I iii IV V|vi iii IV I|IV IV I I"),
          ("i VII i VII|III VII i i|i VII VI VII|i VII i i",),
          ("3 1|4", "2 2|4", "4|2 1 1", "1 3|4"), reverb=0.9, colour="open", lead_centre=74, lead_level=1.0,
          keys=(0, 2, 4, 5, 7, 9)),
    Style("bossa nova", ("flute", "nylon guitar", "alto saxophone"),
          (Part(("nylon guitar",), "bossa", 57, 0.7, -0.3), Part(("bass guitar", "double bass"), "bossa_bass", 38, 0.9),
           Part(("electric piano",), "block", 62, 0.45, 0.4, 0.5)),
          ("Leandra Cordeira", "Caetana Ventura-Reis", "Marisol Sampaio", "Thiago Albuquerque-Luz"),
          ("Brazil", "Brazil", "Mexico", "Brazil"), "mid 20th century", ("mellow", "warm", "sensual"),
          (116, 148), ((4, 4),), ("major", "minor"), JAZZ, JAZZ_MINOR,
          ("1.5 1 1.5|.5 1 1 1.5", "1 .5 1 .5 1|2.5 1.5", ".5 1 .5 1 1|1.5 .5 2"),
          drums="bossa", reverb=0.35, colour="jazz", lead_centre=72, keys=(0, 2, 5, 7, 9, 10)),
    Style("music box", ("music box", "celesta", "glockenspiel"),
          (Part(("music box", "celesta"), "arp8", 70, 0.42, -0.25), Part(("celesta", "harp"), "long", 62, 0.9, 0.25)),
          ("Odile Tinkerby", "Pelle Nachtigal", "Mirabel Petitjean", "Anton Spieldose"),
          ("France", "Sweden", "France", "Germany"), "19th century", ("tender", "sleepy", "innocent"),
          (72, 108), ((3, 4), (4, 4)), ("major",), FOLK, MINOR,
          ("2 1 1|2 2", "1 1 1 1|3 1", "1.5 .5 1 1|2 2", "1 1 2|4"), reverb=0.5, lead_centre=84,
          keys=(0, 2, 5, 7, 9)),
    Style("brass march", ("trumpet", "brass section", "piccolo"),
          (Part(("trombone",), "offbeats", 56, 0.62, 0.35), Part(("tuba",), "oom", 36, 0.95, 0.1),
           Part(("French horn",), "inner", 60, 0.6, -0.35), Part(("clarinet",), "thirds", 72, 0.55, -0.2, 0.5)),
          ("Penhallick Silver Band", "Harmonie Montreval", "Stadtkapelle Oberwald", "Banda Ribalonga"),
          ("England", "France", "Austria", "Portugal"), "19th century", ("triumphant", "festive", "proud"),
          (104, 132), ((4, 4), (6, 8)), ("major",),
          ("I I V V|V V I I|IV I II V|I IV V I", "I V I IV|I VI II V|I V I IV|I V I I"), MINOR,
          ("1.5 .5 1 1|1 1 2", "1 .5 .5 1 1|2 2", "1 1 .75 .25 1|1.5 .5 2"),
          drums="march", drum_kit=48, reverb=0.4, lead_centre=74, keys=(10, 3, 5, 8, 0)),
    Style("koto", ("shakuhachi", "koto", "shamisen"),
          (Part(("koto",), "koto", 60, 0.85, -0.3), Part(("shamisen", "koto"), "plucks", 64, 0.95, 0.4),
           Part(("koto",), "long", 48, 0.85, 0.1, 0.6)),
          ("Sorawa Shiranui", "Fumiko Hanamura", "Meilin Yeowon", "Kiyomi Tsukihashi"),
          ("Japan", "Japan", "Korea", "Japan"), "traditional", ("contemplative", "delicate", "austere"),
          (66, 96), ((4, 4),), ("minor",), FOLK,
          ("i i VI i|i iv v v|VI VI iv i|iv v i i", "i VI i VI|iv iv i v|i VI iv i|VI v i i"),
          ("2 1 1|4", "1 1 2|1 .5 .5 2", "1.5 .5 2|3 1", "1 .5 .5 1 1|2 2"), reverb=0.6, ornaments=0.12,
          colour="open5", scale=(0, 1, 5, 7, 8), lead_centre=74, keys=(9, 4, 2, 7)),
    Style("organ hymn", ("church organ", "pipe organ flutes"),
          (Part(("church organ",), "chorale", 62, 0.52), Part(("church organ",), "organ_bass", 40, 0.75),
           Part(("choir",), "block", 62, 0.45, 0.0, 0.45)),
          ("Amara Wetherall", "Benedikt Marchbank", "Gottfried Eastleigh", "Cuthbert Osei-Tutuola"),
          ("Ghana", "Germany", "Germany", "England"), "19th century", ("solemn", "majestic", "reverent"),
          (72, 108), ((4, 4), (3, 4)), ("major",),
          ("I IV I V|I vi ii V|IV I V vi|IV V I I", "I V vi IV|I IV ii V|vi iii IV I|ii V I I"), MINOR,
          ("1 1 1 1|2 2", "1 1 1 1|3 1", "2 1 1|1 1 2"), reverb=0.85, lead_centre=71, keys=(0, 2, 5, 7, 10, 3)),
)
# fmt: on

BY_LABEL: dict[str, Style] = {style.label: style for style in STYLES}
