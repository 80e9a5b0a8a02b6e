"""A part of a data set to train on: one artist, one style, some minutes of it.

A set is split by artist, so all music of one artist lies in one split: whoever fine-tunes on one artist holds some of
its works out here (`hold_out`), whatever the set's own split says of them.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass

import numpy as np

from musicgen.errors import UserError
from training.sources import Sources

COLUMNS = ("artists", "genres")


@dataclass(frozen=True)
class Selection:
    """Which tracks of DATA a run reads; all when nothing is set.

    Args:
        artists: only theirs.
        genres: only of these styles.
        minutes: at most so much music in the training tracks; 0 takes all.
        hold_out: share of the music, by whole works, to validate on, drawn from all that is selected; the set's own
            split is then not read. 0 keeps the set's split.
    """

    artists: tuple[str, ...] = ()
    genres: tuple[str, ...] = ()
    minutes: float = 0.0
    hold_out: float = 0.0

    def __post_init__(self) -> None:
        if self.minutes < 0 or not 0 <= self.hold_out < 1:
            raise ValueError(
                f"select.minutes is {self.minutes} and select.hold_out {self.hold_out}; minutes must be at least 0 and "
                "hold_out in [0, 1)"
            )

    def __bool__(self) -> bool:
        return bool(self.artists or self.genres or self.minutes or self.hold_out)


def apply(shards: Sources, selection: Selection) -> None:
    """Narrow the splits of `shards` to the selection, in place.

    Raises:
        UserError: no such artist or style, or nothing left to train on.
    """
    if not selection:
        return
    wanted = np.ones(len(shards), dtype=bool)
    for column in COLUMNS:
        if names := getattr(selection, column):
            wanted &= np.any([_equal(shards, column.removesuffix("s"), name) for name in names], axis=0)
    rows = {split: [int(r) for r in shards.rows(split) if wanted[r]] for split in ("train", "valid", "test")}
    if selection.hold_out:
        rows = _held_out(shards, sorted(r for part in rows.values() for r in part), selection.hold_out)
    if selection.minutes:
        rows["train"] = _first(shards, rows["train"], 60 * selection.minutes)
    if not rows["train"]:
        split = {name: len(part) for name, part in rows.items() if part}
        raise UserError(
            f"{selection} leaves no training tracks of DATA (selected: {split or 'none'}). A set is split by artist: "
            "give --select.hold_out 0.2 to validate on a fifth of what is selected, or select more"
        )
    shards.narrow({split: np.array(part, dtype=np.int64) for split, part in rows.items()})


def _equal(shards: Sources, column: str, name: str) -> np.ndarray:
    values = [str(v or "") for v in shards.index.column(column).to_pylist()]
    found = np.array([v.casefold() == name.casefold() for v in values])
    if not found.any():
        known = sorted({v for v in values if v})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]
        raise UserError(f"DATA has no track whose {column} is {name!r}; it has {len(known)}, such as {', '.join(near)}")
    return found


def _seconds(shards: Sources, row: int) -> float:
    return shards.index.column("frames")[row].as_py() / shards.info["codec"]["frame_rate"]


def _hash(text: str) -> str:
    return hashlib.sha256(f"musicgen-selection:{text}".encode()).hexdigest()


def _held_out(shards: Sources, rows: list[int], share: float) -> dict[str, list[int]]:
    """Whole works, in the order of their names' hashes, for validation until they make up the share."""
    works: dict[str, list[int]] = {}
    for row in rows:
        works.setdefault(shards.index.column("work")[row].as_py() or f"row {row}", []).append(row)
    total, held, valid = sum(_seconds(shards, r) for r in rows), 0.0, set[int]()
    for work in sorted(works, key=_hash)[:-1]:  # one at least is left to train on
        if held >= share * total:
            break
        valid |= set(works[work])
        held += sum(_seconds(shards, r) for r in works[work])
    return {"train": [r for r in rows if r not in valid], "valid": sorted(valid), "test": []}


def _first(shards: Sources, rows: list[int], seconds: float) -> list[int]:
    """Tracks that together last at most so long, in the order of their keys' hashes."""
    keys, chosen, total = shards.index.column("key"), [], 0.0
    for row in sorted(rows, key=lambda r: _hash(keys[r].as_py())):
        length = _seconds(shards, row)
        if total + length <= seconds:
            chosen.append(row)
            total += length
    return sorted(chosen)
