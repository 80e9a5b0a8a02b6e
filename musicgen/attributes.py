"""Named attributes of music as conditions of their own: genre, mood, instrument, tempo, key, or any other.

Each is set independently of the free text and stands as one vector beside it. A label is a row of a table (several
labels, their mean); a number lies between two rows and takes a share of each, so that near tempi sound alike. In
training every attribute of every item is dropped on its own, so that any subset can be given afterwards.

The conditioner is ours; the released MusicGen merges attributes into the text (Copet et al. 2023, section 3.2).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from musicgen.errors import UserError

_ROOTS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
KEYS = tuple(f"{root} {mode}" for mode in ("major", "minor") for root in _ROOTS)
_KEY = re.compile(r"([A-G])([#♯]|[B♭]|[ -]?SHARP|[ -]?FLAT)?[ -]?(MAJOR|MAJ|MINOR|MIN|(?-i:m))?", re.IGNORECASE)
_STANDARD: dict[str, dict[str, Any]] = {
    "mood": {"field": "moods"},
    "instrument": {"field": "instruments"},
    "tempo": {"field": "bpm", "low": 40.0, "high": 240.0, "bins": 51},
    "key": {"field": "key_signature", "values": KEYS},
}


@dataclass(frozen=True)
class AttributeConfig:
    """One attribute; for `genre`, `mood`, `instrument`, `tempo` and `key` the name is enough.

    Args:
        name: what the user types.
        field: column of a track's record that holds it; when left out, the one that fits the name, or the name itself.
        values: the labels it can have; when left out, training takes those of its tracks.
        low, high, bins: a number instead, from low to high, with so many rows between which it lies.
        dropout: probability per item of training without it.
    """

    name: str
    field: str = ""
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    bins: int = 0
    dropout: float = 0.5

    def __post_init__(self) -> None:
        standard = {"field": self.name, **_STANDARD.get(self.name, {})}
        for key in ("field",) if self.values else tuple(standard):
            if not getattr(self, key):
                object.__setattr__(self, key, standard[key])
        object.__setattr__(self, "values", tuple(str(v) for v in self.values))
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"the dropout of attribute {self.name!r} is {self.dropout}; it must be in [0, 1]")
        if self.bins and not (self.bins >= 2 and self.high > self.low):
            raise ValueError(f"attribute {self.name!r} is a number and needs low < high and at least 2 bins")

    @property
    def size(self) -> int:
        """Rows of its table."""
        return self.bins or len(self.values)

    @cached_property
    def _rows(self) -> dict[str, int]:
        """The row of each label as it is compared, and of each key by its name in `KEYS`."""
        keys = {key: i for i, value in enumerate(self.values) if (key := _key(value))}
        return {**keys, **{_plain(value): i for i, value in enumerate(self.values)}}

    def weights(self, value: Any) -> np.ndarray:
        """Share `[size]` of each row in a value: a label, several in a list or with commas between, or a number.

        A text that is a label as it stands, such as "Folk, World, & Country", is that label.

        Raises:
            UserError: an unknown label, with the nearest known one; what is no label or number; a number out of range.
        """
        out = np.zeros(self.size, dtype=np.float32)
        if self.bins:
            place = (self._number(value) - self.low) / (self.high - self.low) * (self.bins - 1)
            below = min(int(place), self.bins - 2)
            out[below], out[below + 1] = below + 1 - place, place - below
            return out
        if not isinstance(value, Iterable):
            raise UserError(
                f"attribute {self.name!r} is {value!r}; give a label or several in a list. Known: "
                + ", ".join(self.values)
            )
        given = [value] if isinstance(value, str) and _plain(value) in self._rows else value
        labels = [v for v in (given.split(",") if isinstance(given, str) else given) if str(v).strip()]
        for label in labels:
            row = self._rows.get(_plain(label), self._rows.get(_key(label) or str(label)))
            if row is None:
                near = difflib.get_close_matches(_plain(label), [_plain(v) for v in self.values], n=1)
                hint = f"; did you mean {self.values[self._rows[near[0]]]!r}?" if near else "."
                raise UserError(
                    f"attribute {self.name!r} has no value {str(label).strip()!r}{hint} Known: {', '.join(self.values)}"
                )
            out[row] += 1.0 / len(labels)
        return out

    def _number(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not self.low <= number <= self.high:
            raise UserError(f"attribute {self.name!r} is {value!r}; give a number from {self.low:g} to {self.high:g}")
        return number


def _plain(label: Any) -> str:
    """A label as it is compared: case and blanks do not matter."""
    return " ".join(str(label).casefold().split())


def _key(label: Any) -> str | None:
    """A key by its name in `KEYS`, such as A# minor for Bbm, B♭ min or B-flat minor; None for what is no key.

    A capital letter alone is the major key; a small one is that to some and the minor key to others, so it is none.
    """
    found = _KEY.fullmatch(" ".join(str(label).split()))
    if found is None or not (found[3] or found[1].isupper()):
        return None
    step = {"": 0, "#": 1, "♯": 1, "sharp": 1}.get((found[2] or "").strip(" -").casefold(), -1)
    mode = "minor" if (found[3] or "").casefold() in ("m", "min", "minor") else "major"
    return f"{_ROOTS[(_ROOTS.index(found[1].upper()) + step) % 12]} {mode}"


def size(attributes: Sequence[AttributeConfig]) -> int:
    """N, rows of all tables together."""
    return sum(a.size for a in attributes)


def weights(attributes: Sequence[AttributeConfig], given: Mapping[str, Any]) -> np.ndarray:
    """Shares `[N]` of all rows for the attributes that are given; zeros for the others.

    Raises:
        UserError: a name that the model does not have, with the nearest one it has, or a value as in `weights`.
    """
    names = [a.name for a in attributes]
    for name in given:
        if name not in names:
            if not names:
                raise UserError(
                    f"attribute {name!r} was given, but this model has none; say it in the PROMPT, or give the MODEL "
                    "of a run with --config configs/train/attributes.yaml"
                )
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown attribute {name!r}; did you mean {near!r}? This model has {', '.join(names)}")
    parts = [a.weights(given[a.name]) if a.name in given else np.zeros(a.size, np.float32) for a in attributes]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def of_record(attributes: Sequence[AttributeConfig], record: Mapping[str, Any], keep: Sequence[bool]) -> np.ndarray:
    """Shares `[N]` of a track's record: its attributes that are kept, recorded, and known to the model."""
    given: dict[str, Any] = {}
    for attribute, kept in zip(attributes, keep):
        value = record.get(attribute.field)
        if not kept or value in (None, "", []):
            continue
        try:
            attribute.weights(value)
        except UserError:  # a value that came with later data or lies out of range: as if it were not recorded
            continue
        given[attribute.name] = value
    return weights(attributes, given)


def unheard(attributes: Sequence[AttributeConfig], records: Iterable[Mapping[str, Any]]) -> list[AttributeConfig]:
    """The attributes of which no record has a value that they know; reads as few records as it takes."""
    left = list(attributes)
    for record in records:
        left = [a for a in left if not of_record([a], record, [True]).any()]
        if not left:
            break
    return left


def kept(attributes: Sequence[AttributeConfig], seed: Sequence[int]) -> list[bool]:
    """Which attributes a training item keeps: each dropped on its own, addressed by `seed`."""
    draws = np.random.default_rng(tuple(seed)).random(len(attributes))
    return [bool(draw >= a.dropout) for draw, a in zip(draws, attributes)]


def learned(attributes: Sequence[AttributeConfig], records: Iterable[Mapping[str, Any]]) -> tuple[AttributeConfig, ...]:
    """The attributes with the labels found in records where none were named.

    Raises:
        UserError: no record has a value for one of them.
    """
    records = list(records)
    out = []
    for attribute in attributes:
        if not attribute.size:
            found: dict[str, str] = {}
            for record in records:
                value = record.get(attribute.field)
                for label in [value] if isinstance(value, str) else value or []:
                    found.setdefault(_plain(_key(label) or label), str(label).strip())
            if not found:
                raise UserError(
                    f"attribute {attribute.name!r} is in no track of the data (column {attribute.field!r}); name its "
                    "field or values, or leave it out of --lm.condition.attributes"
                )
            attribute = replace(attribute, values=tuple(found[k] for k in sorted(found)))
        out.append(attribute)
    return tuple(out)
