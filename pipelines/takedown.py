"""What was taken down stays out: under another row, as a stem, in another set of a mixture, in a codec's training.

A recording is known by the SHA-256 of its file, of its decoded sound and of its stems' files, where stems are read.
Ingest keeps those of every row of the catalogue that is withdrawn or opted out in `sources.parquet`. Whoever reads a
set opens that table (`SourcesTable`) and asks which sounds those are (`barred`), and which of the set's own tracks have
one of them (`tracks_with`).
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import shard
from pipelines.checks import Reject
from pipelines.rights import takes_down
from pipelines.store import Place

if TYPE_CHECKING:
    from pipelines.catalog import Row

SOURCES = "sources.parquet"
SOURCES_SCHEMA = pa.schema(
    [("track_id", pa.string()), ("work_id", pa.string()), ("json_sha256", pa.string()), ("facts", pa.string())]
)


def code_of(row: Row) -> str | None:
    """The reject code of a row that takes its recording down, whatever else is wrong with it; else None."""
    return takes_down(row.rights) if row.track_id and row.values["uri"] else None


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


class SourcesTable:
    """sources.parquet of a finished set; `table` is None where there is none, as in a copy of the shards alone."""

    def __init__(self, place: Place, table: pa.Table | None) -> None:
        self.place, self.table = place, table

    @classmethod
    def of(cls, shards: shard.ShardSet) -> SourcesTable:
        """Open the table of a set.

        Raises:
            UserError: it is damaged, or not the one that dataset.json describes (sets from before do not say which).
        """
        place = shards.root / SOURCES
        if not place.is_file():
            return cls(place, None)
        table, sha256 = shard.read_table(place, SOURCES_SCHEMA, ("json_sha256",))
        if shards.info.get("sources_sha256", sha256) != sha256:
            raise shard.damaged(place, "it was changed since dataset.json was written")
        return cls(place, table.select(["track_id", "facts"]))

    def barred(self) -> dict[str, str]:
        """Every sound that the set's catalogue has taken down: SHA-256 -> track id."""
        gone = [(track_id, facts) for track_id, facts in self._facts('"sounds"') if facts.keys() == {"sounds"}]
        return {sha256: track_id for track_id, facts in gone for sha256 in sounds(facts)}

    def tracks_with(self, wanted: Container[str]) -> dict[str, str]:
        """The set's tracks whose file, sound or stem is among `wanted` (SHA-256): track id -> the one that is."""
        found = {}
        for track_id, facts in self._facts('"pcm_sha256"'):
            if hit := next((sha256 for sha256 in sorted(sounds(facts)) if sha256 in wanted), None):
                found[track_id] = hit
        return found

    def _facts(self, holding: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ids and facts of the rows whose facts hold a text; the others of perhaps a million are not parsed."""
        if self.table is None:
            return
        rows = self.table.filter(pc.match_substring(self.table.column("facts"), holding))
        for batch in rows.to_batches(max_chunksize=10_000):
            for row in batch.to_pylist():
                yield row["track_id"], facts_of(self.place, row["track_id"], row["facts"])


def facts_of(place: Place, track_id: str, text: str) -> dict[str, Any]:
    """A row's facts. Raises `UserError` where they are not what ingest writes."""
    try:
        facts = json.loads(text)
        hashes = [facts.get(name) for name in ("source_sha256", "pcm_sha256")]
        hashes += [*facts.get("sounds", []), *facts.get("stems", {}).get("sha256", {}).values()]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise shard.damaged(place, f"facts of {track_id!r} are not those of a track") from error
    if not isinstance(facts.get("sounds", []), list) or not all(isinstance(h, str | None) for h in hashes):
        raise shard.damaged(place, f"hashes of {track_id!r} are no texts")
    return facts
