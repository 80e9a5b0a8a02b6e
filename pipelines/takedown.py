"""What was taken down stays out: under another row, as a stem, in another set of a mixture, in a codec's training.

A recording is known by the SHA-256 of its file, of its decoded sound and of its stems' files. Ingest keeps those of
every row of the catalogue that is withdrawn or opted out in `sources.parquet`; whoever reads a set can ask it which
sounds those are (`barred`), and which of its own tracks have one of them (`tracks_with`).
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipelines import shard
from pipelines.checks import Reject
from pipelines.store import Place

SOURCES = "sources.parquet"
SOURCES_SCHEMA = pa.schema(
    [("track_id", pa.string()), ("work_id", pa.string()), ("json_sha256", pa.string()), ("facts", pa.string())]
)


def sounds(facts: dict[str, Any]) -> set[str]:
    """SHA-256 of a recording's file, of its decoded sound and of its stems' files, as far as they are known."""
    stems = facts.get("stems", {}).get("sha256", {}).values()
    return {*facts.get("sounds", ()), *stems, facts.get("source_sha256"), facts.get("pcm_sha256")} - {None}


def remembered(known: set[str]) -> dict[str, Any]:
    """The facts of a recording that was taken down: nothing but how to know it again."""
    return {"sounds": sorted(known)}


def refused(codes: dict[str, str], facts: dict[str, dict[str, Any]], tracks: Iterable[str]) -> dict[str, Reject]:
    """Rejects for all tracks whose sound is that of a row that was taken down.

    Args:
        codes: of the rows that were taken down, track_id -> reject code.
        facts: of these rows and of the tracks.
    """
    out: dict[str, str] = {}
    for track_id in sorted(codes):
        out |= {sha256: track_id for sha256 in sounds(facts.get(track_id, {})) if sha256 not in out}
    found: dict[str, Reject] = {}
    for track_id in tracks:
        other = next((out[sha256] for sha256 in sorted(sounds(facts[track_id])) if sha256 in out), None)
        if other is not None:
            own = {facts[track_id].get("source_sha256"), facts[track_id].get("pcm_sha256")}
            same = "the same sound as" if own & out.keys() else "one of its stems is"
            why = f"{same} track {other!r}, which is refused as {codes[other]}"
            found[track_id] = Reject("duplicate", codes[other], f"{why}; if that is wrong, mend the row of {other!r}")
    return found


def barred(root: Place) -> set[str]:
    """SHA-256 of every sound that the catalogue of a finished set has taken down; empty where the set does not say.

    Raises:
        UserError: sources.parquet is damaged.
    """
    return {sha256 for _, facts in _facts(root, '"sounds"') if facts.keys() == {"sounds"} for sha256 in sounds(facts)}


def tracks_with(root: Place, wanted: Container[str]) -> set[str]:
    """The ids of a set's tracks whose file, sound or stem is among `wanted` (SHA-256).

    Raises:
        UserError: sources.parquet is damaged.
    """
    found = _facts(root, '"pcm_sha256"')
    return {track_id for track_id, facts in found if any(sha256 in wanted for sha256 in sounds(facts))}


def _facts(root: Place, holding: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and facts of what a set's sources became, of those whose facts hold a text: only these are parsed."""
    place = root / SOURCES
    if not place.is_file():  # a copy of the shards alone
        return
    table, _ = shard.read_table(place, SOURCES_SCHEMA, ("json_sha256",))
    for track_id, text in zip(*(table.column(name).to_pylist() for name in ("track_id", "facts"))):
        if holding in text:
            yield track_id, facts_of(place, track_id, text)


def facts_of(place: Place, track_id: str, text: str) -> dict[str, Any]:
    """A row's facts. Raises `UserError` where they are no JSON object."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise shard.damaged(place, f"facts of {track_id!r} are not JSON") from error
    if not isinstance(facts, dict):
        raise shard.damaged(place, f"facts of {track_id!r} are no JSON object")
    return facts
