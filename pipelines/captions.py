"""Metadata to caption variants, each claim with the field it comes from.

The recipe is the reference's (Copet et al. 2023, section 3.2; `merge_text_p` 0.25, `drop_desc_p` 0.5, `drop_other_p`
0.5): in a quarter of the variants the parsed fields are dropped one by one, the rest is shuffled into
`name: value. name: value` and joined to the description, which itself may be dropped. The reference *keeps* a field
with probability `drop_other_p`; here the name tells the truth (at 0.5 both are the same).

Captions are drawn here, once and seeded per (track, variant). Word dropout belongs to training and is not done here;
validation uses the raw descriptions, which travel beside the variants. What analysis measured may only fill a gap in
the catalogue, only above a confidence, and is marked as `analysis.<field>`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

_END = ".!?…。！？।۔"


@dataclass(frozen=True)
class CaptionConfig:
    """How captions are made.

    Args:
        variants: training captions per track.
        merge_text_p: share of variants that carry parsed fields.
        drop_desc_p: chance that a merged variant loses its description.
        drop_other_p: chance that a merged variant loses a given field.
        min_key_confidence: an analysed key below this is not claimed.
        min_tempo_confidence: an analysed tempo below this is not claimed.
    """

    variants: int = 8
    merge_text_p: float = 0.25
    drop_desc_p: float = 0.5
    drop_other_p: float = 0.5
    min_key_confidence: float = 0.7
    min_tempo_confidence: float = 0.3

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise ValueError(f"captions.variants is {self.variants}; give at least 1, or no track has a caption")


@dataclass(frozen=True)
class Claim:
    """One parsed field: `name: value`, and where it was read."""

    name: str
    value: str
    source: str


def parse_key(key: str | None) -> str | None:
    """A key as captions say it: lower case; None for a list of keys or an empty one."""
    text = (key or "").strip().lower()
    return None if not text or text == "none" or "," in text else text


def claims(row: dict[str, Any], analysis: dict[str, Any], config: CaptionConfig) -> list[Claim]:
    """The parsed fields of a track, catalogue first, confident measurements where the catalogue is silent."""
    found: list[Claim] = []
    key, bpm = parse_key(row.get("key")), row.get("bpm")
    if key:
        found.append(Claim("key", key, "catalogue.key"))
    elif analysis.get("key") and analysis["key_confidence"] >= config.min_key_confidence:
        found.append(Claim("key", analysis["key"].lower(), "analysis.key"))
    if bpm is not None:
        found.append(Claim("bpm", str(float(bpm)), "catalogue.bpm"))
    elif analysis.get("tempo_bpm") and analysis["tempo_confidence"] >= config.min_tempo_confidence:
        found.append(Claim("bpm", str(float(round(analysis["tempo_bpm"]))), "analysis.tempo_bpm"))
    if row.get("genre"):
        found.append(Claim("genre", row["genre"].strip().lower(), "catalogue.genre"))
    for name, column in (("moods", "moods"), ("instrument", "instruments")):
        values = [v.strip().lower() for v in row.get(column) or [] if v.strip()]
        if values:
            found.append(Claim(name, ", ".join(values), f"catalogue.{column}"))
    return found


def _draws(seed: int, track_id: str, variant: int) -> random.Random:
    """Random numbers of one variant, addressed by what it is; only `random()` is used, whose stream is guaranteed."""
    digest = hashlib.sha256(f"caption:{seed}:{track_id}:{variant}".encode()).hexdigest()
    return random.Random(int(digest[:16], 16))


def finish(text: str) -> str:
    """A caption that ends with exactly one full stop (or another mark that ends a sentence)."""
    text = text.strip().rstrip(".").rstrip()
    return text if not text or text[-1] in _END else text + "."


def variant(
    row: dict[str, Any], found: list[Claim], config: CaptionConfig, seed: int, number: int
) -> dict[str, Any] | None:
    """Training caption `number` of a track: text, language, sources; None when there is nothing to say.

    When everything happened to be dropped, the description (or one field) is kept: a caption is never empty, and
    unconditional items come from condition dropout in training alone.
    """
    draw = _draws(seed, row["track_id"], number)
    descriptions = row.get("descriptions") or []
    at = int(draw.random() * len(descriptions)) if descriptions else -1
    merged: list[Claim] = []
    with_description = at >= 0
    if draw.random() < config.merge_text_p or not descriptions:
        order = [(draw.random(), draw.random() >= config.drop_other_p, claim) for claim in found]
        with_description = at >= 0 and draw.random() >= config.drop_desc_p
        merged = [claim for _, keep, claim in sorted(order, key=lambda o: o[0]) if keep]
        if not merged and not with_description:
            with_description = at >= 0
            merged = [] if with_description else [claim for _, _, claim in order[:1]]
    parts, sources, language = [], [], "en"
    if with_description:
        parts.append(finish(descriptions[at]["text"]))
        sources.append(f"catalogue.descriptions[{at}]")
        language = descriptions[at]["language"]
    if merged:
        parts.append(finish(". ".join(f"{c.name}: {c.value}" for c in merged)))
        sources += [c.source for c in merged]
    if not parts:
        return None
    return {"text": " ".join(parts), "language": language, "sources": sources}


def variants(row: dict[str, Any], analysis: dict[str, Any], config: CaptionConfig, seed: int) -> list[dict[str, Any]]:
    """All training captions of a track; empty when neither the catalogue nor the analysis says anything about it."""
    found = claims(row, analysis, config)
    made = (variant(row, found, config, seed, number) for number in range(config.variants))
    return [caption for caption in made if caption is not None]
