"""Catalogue rows: titles, honest descriptions in several wordings and languages, and the rights record.

Everything said comes from the score itself: the instruments that play, the exact tempo, the key. About a
third of the tracks also carry a sentence in another language. The music is the work of the demo
catalogue's authors, written by a program, and says so under ``ai_contribution``.
"""

from __future__ import annotations

import random

from pipelines.demo.arranger import Score
from pipelines.demo.notation import parse_key
from pipelines.demo.styles import Style
from pipelines.demo.tunes import Tune
from pipelines.demo.words import (
    AND,
    COMMA,
    ENGLISH_STYLES,
    G_SHARP,
    INSTRUMENT_WORDS,
    LANGUAGES,
    MODES,
    SENTENCES,
    STYLE_WORDS,
    TEMPI,
    TITLES,
    TONICS,
)

PARTY = "The demo catalogue authors"
DEAL = "LicenseRef-demo-deal-2026"
DEAL_FILE = "demo-deal-2026.txt"
DEAL_TEXT = """Demo deal 2026

The authors of the demo catalogue grant the holder of this catalogue, world-wide and from 1 January 2026
without end, the right to train models on the recordings that name this document, to generate music with
such models commercially, and to pass on the recordings and tokens made from them. Otherwise CC-BY-4.0.
"""
LANGUAGE_SHARE = 0.36


def piece_title(style: str, number: int, name: str, rng: random.Random) -> str:
    """A title such as 'Willow Étude No. 3'; numbers of the hours set start at 101, so no work is in both."""
    first, form = TITLES[style]
    count = number + (0 if name == "demo" else 100)
    return f"{rng.choice(first.split(','))} {rng.choice(form.split(','))} No. {count}"


def tempo_class(bpm: float) -> int:
    """0 slow (below 84 beats a minute), 1 moderate, 2 fast (from 126)."""
    return 0 if bpm < 84 else 1 if bpm < 126 else 2


def join(words: list[str], language: str = "en") -> str:
    """'a, b and c' in a language."""
    if len(words) == 1:
        return words[0]
    return COMMA.get(language, ", ").join(words[:-1]) + AND.get(language, " and ") + words[-1]


def key_in(key: str, language: str) -> str:
    """'A minor' as another language writes it: 'la menor', 'a-Moll', 'イ短調'."""
    tonic, mode = parse_key(key)
    name, word = TONICS[language][tonic], MODES[language][mode == "minor"]
    if key.startswith("G#"):
        name = G_SHARP[language]
    if language == "de":
        return f"{name.lower() if mode == 'minor' else name}-{word}"
    return name + word if language in ("ja", "zh") else f"{name} {word}"


def _article(word: str) -> str:
    """'A calm', 'An austere', 'A euphoric'."""
    return ("An " if word[0].lower() in "aeiou" and not word.startswith("eu") else "A ") + word


def _pace(score: Score, style: Style) -> int:
    """Tempo class as it is felt: ragtime written in 2/4 moves in eighths."""
    return tempo_class(score.bpm * (2 if style.label == "ragtime" and score.meter == (2, 4) else 1))


def _english(style: Style, score: Score, tune: Tune | None, moods: list[str], rng: random.Random) -> list[str]:
    """Four English wordings: a full sentence, who plays what, where the music comes from, bare tags."""
    names = join(score.instruments)
    pace = ("slow", "mid-tempo", "fast")[_pace(score, style)]
    rest = [name for name in score.instruments if name not in score.leads]
    bpm = f"{score.bpm:g}"
    adjective, noun = ENGLISH_STYLES[style.label]
    piece = rng.choice(("instrumental", "piece", "track"))
    first = f"{_article(moods[0])}, {pace} {adjective} {piece} with {names}, in {score.key} at {bpm} BPM."
    verb = "share the melody" if len(score.leads) > 1 else "plays the melody"
    if score.leads == ["bagpipes"]:
        verb = "play the melody"
    who = join(score.leads)
    second = f"{who[0].upper()}{who[1:]} {verb}" + (f" over {join(rest)}" if rest else "")
    second += f"; the mood is {join(moods)}."
    if tune:
        traditional = tune.origin.startswith("traditional")
        credit = f"the traditional tune “{tune.title}”" if traditional else f"“{tune.title}” ({tune.origin})"
        version = _article(adjective).lower() if adjective != "Celtic" else "a Celtic"
        third = f"{credit[0].upper()}{credit[1:]} in {version} version for {names}."
    else:
        meter = f"{score.meter[0]}/{score.meter[1]}"
        third = rng.choice(
            (
                f"Instrumental {noun}, {pace}, in {meter} time, played by {names}.",
                f"{noun[0].upper()}{noun[1:]} without vocals in {meter} time: {names}.",
            )
        )
    fourth = f"{style.label}, {', '.join(moods)}, {', '.join(score.instruments)}, {score.key}, {bpm} bpm"
    return [first, second, third, fourth]


def _foreign(language: str, style: Style, score: Score, rng: random.Random) -> str:
    """One sentence in another language."""
    label = STYLE_WORDS[language][style.label]
    names = join([INSTRUMENT_WORDS[language][name] for name in score.instruments], language)
    return rng.choice(SENTENCES[language]).format(
        s=label,
        S=label[0].upper() + label[1:],
        i=names,
        k=key_in(score.key, language),
        b=f"{score.bpm:g}",
        t=TEMPI[language][_pace(score, style)],
    )


def rights(track_id: str, rng: random.Random, deal_sha256: str | None = None) -> dict[str, object]:
    """A full rights record: ours, open or (with the hash of its document) under the demo deal."""
    return {
        "rightsholders": [
            {"party": PARTY, "share": 100, "role": "master"},
            {"party": PARTY, "share": 100, "role": "arrangement"},
        ],
        "licence": DEAL if deal_sha256 else "CC-BY-4.0",
        "licence_doc_sha256": deal_sha256,
        "grants": ["train", "generate_commercially", "redistribute_tokens", "redistribute"],
        "territory": ["WORLD"],
        "valid_from": "2026-01-01",
        "valid_until": "perpetual",
        "consent_evidence": "Made for this catalogue by its authors; statement in LICENSE.md beside catalog.jsonl",
        "opt_out_signals": [],
        "isrc": f"XXDMO26{int(track_id[-4:]):05d}" if deal_sha256 else None,
        "ai_contribution": {"composition": "algorithmic", "performance": "algorithmic", "machine_learning": "none"},
        "status": "active",
    }


def build_row(
    track_id: str,
    uri: str,
    title: str,
    artist: str,
    work: str,
    style: Style,
    score: Score,
    tune: Tune | None,
    seed: str,
    deal_sha256: str | None = None,
) -> dict[str, object]:
    """One row of ``catalog.jsonl``."""
    rng = random.Random(seed + "/words")
    moods = rng.sample(style.moods, rng.choice((1, 2)))
    texts = [{"text": text, "language": "en"} for text in _english(style, score, tune, moods, rng)]
    if rng.random() < LANGUAGE_SHARE:
        language = rng.choice(LANGUAGES)
        texts.append({"text": _foreign(language, style, score, rng), "language": language})
    record = rights(track_id, rng, deal_sha256)
    if tune:
        composition = f"{tune.origin}; public domain"
        record["ai_contribution"] = {
            "composition": "none: " + composition,
            "arrangement": "algorithmic",
            "performance": "algorithmic",
            "machine_learning": "none",
        }
    return {
        "track_id": track_id,
        "uri": uri,
        "title": title,
        "artist": artist,
        "work": work,
        "genre": style.label,
        "moods": moods,
        "instruments": score.instruments,
        "bpm": float(score.bpm),
        "key": score.key,
        "language": "en",
        "region": tune.region if tune else style.regions[style.artists.index(artist)],
        "era": tune.era if tune else "contemporary",
        "descriptions": texts,
        "rights": record,
    }
