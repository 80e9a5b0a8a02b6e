"""Catalogue rows: reading jsonl, csv and parquet into one schema, with every problem of every row reported at once.

A row says where a track is, what it is, and on which terms it may be used. Two kinds of fault stop a run, because they
mean that the file as a whole is not what it should be: columns that do not exist or hold another type, and two rows
with one id; all of them are named together. Any other fault belongs to its row, which is then rejected as
`invalid_row` with all its problems in the message; two values for one thing are such a fault, whichever comes last.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import difflib
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from musicgen.errors import UserError
from pipelines.rights import PERPETUAL
from pipelines.store import Place, parquet

FORMATS = (".jsonl", ".ndjson", ".csv", ".parquet")

# name -> kind; one place for every column that exists
COLUMNS = {
    "track_id": "text",
    "uri": "text",
    "title": "text",
    "artist": "text",
    "work": "text",
    "genre": "text",
    "moods": "texts",
    "instruments": "texts",
    "bpm": "number",
    "key": "text",
    "language": "text",
    "region": "text",
    "era": "text",
    "descriptions": "descriptions",
    "stems": "addresses",
    "rights": "record",
}
RIGHTS = {
    "rightsholders": "records",
    "licence": "text",
    "licence_doc_sha256": "text",
    "grants": "texts",
    "territory": "texts",
    "valid_from": "date",
    "valid_until": "date",
    "consent_evidence": "text",
    "opt_out_signals": "list",
    "isrc": "text",
    "ai_contribution": "any",
    "status": "text",
}
_KIND_WORDS = {
    "text": "text",
    "texts": "a list of texts",
    "number": "a number",
    "descriptions": 'a list of {"text", "language"}',
    "record": "an object",
    "addresses": 'an object {"name": "address"}',
    "records": "a list of objects",
    "date": "a date YYYY-MM-DD",
    "list": "a list",
    "any": "anything",
}
STATUS = ("active", "expired", "withdrawn")
_ISRC = re.compile(r"[A-Z]{2}[A-Z0-9]{3}\d{7}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")


_LONGEST_MESSAGE = 500
_MOST_PROBLEMS = 100


class _Unreadable(str):
    """Why a line is no row."""


def short(message: str) -> str:
    """A message that quotes a catalogue, at a length that a person reads and a table takes."""
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " …"


class CatalogError(UserError):
    """Faults that stop a run; `problems` holds all of them, the message the first `_MOST_PROBLEMS`."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        more = [f"and {len(problems) - _MOST_PROBLEMS} more"] if len(problems) > _MOST_PROBLEMS else []
        lines = "\n".join(f"  - {short(p)}" for p in [*problems[:_MOST_PROBLEMS], *more])
        super().__init__(f"{where}: {len(problems)} problem(s) that stop the run:\n{lines}\nNothing was written.")


class _WrongType(Exception):
    def __init__(self, found: str) -> None:
        self.found = found


@dataclass(frozen=True)
class Row:
    """One catalogue row in the schema.

    Attributes:
        number: 1-based position among the data rows.
        values: every column of `COLUMNS`, absent ones as None or an empty list; `rights` likewise.
        problems: faults of this row; a row with problems is rejected as `invalid_row`.
    """

    number: int
    values: dict[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def track_id(self) -> str | None:
        """The catalogue's id of the track; None when the row lacks it."""
        return self.values.get("track_id")

    @property
    def rights(self) -> dict[str, Any]:
        """The rights record."""
        return self.values["rights"]

    @property
    def digest(self) -> str:
        """Hash of the content; changes when anything in the row does."""
        text = json.dumps(self.values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Catalog:
    """All rows of a catalogue and the folder that relative audio addresses start from."""

    rows: list[Row]
    folder: Place


def read(uri: str) -> Catalog:
    """Read and validate a catalogue.

    Raises:
        UserError: missing, empty, unreadable, or of an unknown format.
        CatalogError: unknown columns, wrong types, duplicate ids; all of them.
    """
    place = Place.at(uri)
    suffix = "." + place.name.rsplit(".", 1)[-1].lower()
    if suffix not in FORMATS:
        raise UserError(f"CATALOG={uri!r}: unknown format {suffix!r}; allowed: {', '.join(FORMATS)}")
    try:
        data = place.read()
    except (FileNotFoundError, IsADirectoryError):
        near = _neighbours(place)
        raise UserError(f"CATALOG={uri!r} does not exist" + (f"; in that folder: {near}" if near else "")) from None
    except OSError as error:
        raise UserError(f"CATALOG={uri!r} cannot be read: {error}") from error
    raw = _read_parquet(data, uri) if suffix == ".parquet" else _read_text(data, suffix, uri)
    if not raw:
        raise UserError(f"CATALOG={uri!r} has no rows")
    return Catalog(validate(raw, str(place), from_text=suffix == ".csv"), place.parent)


def _neighbours(place: Place) -> str:
    try:
        names = [n for n in place.parent.list() if n.endswith(FORMATS)]
    except OSError:
        return ""
    return ", ".join(names[:8])


def _read_parquet(data: bytes, uri: str) -> list[Any]:
    try:
        return parquet(data).to_pylist()
    except Exception as error:  # pyarrow raises many kinds on a file that is not parquet
        raise UserError(f"CATALOG={uri!r} is not a readable parquet file: {error}") from error


def _read_text(data: bytes, suffix: str, uri: str) -> list[Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"CATALOG={uri!r} is not UTF-8 text: {error}") from error
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="(cells beyond the header)")
        try:
            header = reader.fieldnames or []
        except csv.Error as error:
            raise UserError(f"CATALOG={uri!r} is not readable csv behind line {reader.line_num}: {error}") from error
        twice = sorted({h for h in header if header.count(h) > 1})
        if twice:
            raise UserError(f"CATALOG={uri!r}: the header names a column twice: {', '.join(twice)}")
        try:
            return list(reader)
        except csv.Error as error:
            raise UserError(f"CATALOG={uri!r} is not readable csv behind line {reader.line_num}: {error}") from error
    rows: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                rows.append(loads(line))
            except _Twice as error:
                rows.append(_Unreadable(str(error)))
            except (ValueError, RecursionError) as error:
                rows.append(_Unreadable(f"not JSON: {error}"))
    return rows


class _Twice(ValueError):
    """A name that one JSON object gives two values."""


def loads(text: str | bytes) -> Any:
    """JSON in which no object gives one name two values. Raises `ValueError` as `json.loads` does."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found and found[name] != value:
                raise _Twice(f"{name[:80]!r} is given twice in one object, as {_said(found[name])} and {_said(value)}")
            found[name] = value
        return found

    return json.loads(text, object_pairs_hook=object_of)


def validate(raw: list[Any], where: str, *, from_text: bool = False) -> list[Row]:
    """Raw rows to `Row`s.

    Args:
        raw: one item per data row; `_Unreadable` for a line that is none.
        where: name of the catalogue for messages.
        from_text: cells are text (csv): numbers are parsed, lists and objects are JSON, lists of texts may also be
            separated by commas.
    """
    rows: list[Row] = []
    wrong: dict[tuple[str, str], list[int]] = {}
    unknown: dict[str, list[int]] = {}
    twice: dict[int, list[str]] = {}
    for number, item in enumerate(raw, 1):
        if not isinstance(item, dict):
            reason = str(item) if isinstance(item, _Unreadable) else f"expected an object, got {_name(item)}"
            rows.append(Row(number, _empty(), (reason,)))
            continue
        values = _empty()
        gathered, twice[number] = _unflatten(item, from_text)
        for name, given in gathered.items():
            if name not in COLUMNS:
                unknown.setdefault(name, []).append(number)
                continue
            try:
                values[name] = _convert(given, COLUMNS[name], values[name], from_text)
            except _Twice as error:
                twice[number].append(f"{name}: {error}")
            except _WrongType as error:
                wrong.setdefault((name, error.found), []).append(number)
        record = values["rights"]
        values["rights"] = rights = _empty_rights()
        for name, given in record.items():
            if name not in RIGHTS:
                unknown.setdefault(f"rights.{name}", []).append(number)
                continue
            try:
                rights[name] = _convert(given, RIGHTS[name], rights[name], from_text)
            except _Twice as error:
                twice[number].append(f"rights.{name}: {error}")
            except _WrongType as error:
                wrong.setdefault((f"rights.{name}", error.found), []).append(number)
        rows.append(Row(number, values))
    problems = [_unknown_message(name, numbers) for name, numbers in unknown.items()]
    for (name, found), numbers in wrong.items():
        kind = COLUMNS.get(name) or RIGHTS[name.removeprefix("rights.")]
        problems.append(f"column {name!r} holds {found} where {_KIND_WORDS[kind]} is needed, in {_rows(numbers)}")
    ids: dict[str, list[int]] = {}
    for row in rows:
        if row.track_id:
            ids.setdefault(row.track_id, []).append(row.number)
    problems += [f"track_id {i!r} is given to {_rows(n)}" for i, n in ids.items() if len(n) > 1]
    if problems:
        raise CatalogError(where, problems)
    return [row if row.problems else _judged(row, twice[row.number]) for row in rows]


def _judged(row: Row, twice: list[str]) -> Row:
    """The row with its problems; texts that are no Unicode are mended, so that the reject can be written down.

    Args:
        twice: what its columns give two values.
    """
    problems = [short(problem) for problem in (*twice, *_value_problems(row.values))]
    text = json.dumps(row.values, ensure_ascii=False)
    try:
        text.encode()
        json.dumps(row.values, allow_nan=False)
    except UnicodeEncodeError:
        mended = json.loads(text.encode(errors="replace"))
        return Row(row.number, mended, (*problems, "a text holds half of a surrogate pair, which is no character"))
    except ValueError:
        problems.append("a number is not finite (NaN or Infinity)")
    return Row(row.number, row.values, tuple(problems))


def _empty() -> dict[str, Any]:
    values: dict[str, Any] = {n: [] if k in ("texts", "descriptions") else None for n, k in COLUMNS.items()}
    return values | {"rights": {}, "stems": {}}


def _empty_rights() -> dict[str, Any]:
    return {n: [] if k in ("texts", "records", "list") else None for n, k in RIGHTS.items()}


def _unflatten(item: dict[str, Any], from_text: bool) -> tuple[dict[str, Any], list[str]]:
    """`rights.licence` and friends gathered into `rights`, `stems.drums` into `stems`; absent values left out.

    Each may be a parquet map, a list of pairs. The second value says what is given twice and not alike.
    """
    result = {n: v for n, v in item.items() if not _absent(v)}
    problems: list[str] = []
    for column in ("rights", "stems"):
        flat = {n: result.pop(n) for n in list(result) if isinstance(n, str) and n.startswith(f"{column}.")}
        record = result.get(column, {})
        if isinstance(record, str) and (flat or from_text):
            with contextlib.suppress(_WrongType, _Twice):  # what it holds instead is told when it is converted
                record = _json(record)
        if isinstance(record, dict):
            record = list(record.items())
        if not isinstance(record, list) or not all(isinstance(pair, tuple) for pair in record):
            continue
        found: dict[str, Any] = {}
        for name, value in [*record, *((n.removeprefix(f"{column}."), v) for n, v in flat.items())]:
            name = str(name).strip() if column == "stems" else name
            kind = "text" if column == "stems" else RIGHTS.get(name, "any")
            if not _absent(value) and not _alike(found.setdefault(name, value), value, kind, from_text):
                problems.append(f"{column}.{name} is given twice, as {_said(found[name])} and {_said(value)}")
        if column in result or found:
            result[column] = found
    return result, problems


def _alike(one: Any, other: Any, kind: str, from_text: bool) -> bool:
    """Whether two cells of a column mean the same."""
    try:
        return one is other or _convert(one, kind, None, from_text) == _convert(other, kind, None, from_text)
    except (_WrongType, _Twice):
        return False


def _said(value: Any) -> str:
    return repr(value)[:80]


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _name(value: Any) -> str:
    if isinstance(value, bool):
        return "true/false"
    for kind, word in ((str, "text"), (int | float, "a number"), (dict, "an object"), (list, "a list")):
        if isinstance(value, kind):
            return word
    return type(value).__name__


def _json(text: str) -> Any:
    try:
        return loads(text)
    except _Twice:
        raise
    except (ValueError, RecursionError):
        raise _WrongType(f"text that is not JSON ({text[:40]!r})") from None


def _convert(value: Any, kind: str, default: Any, from_text: bool) -> Any:
    """A cell in the form of the schema. Raises `_WrongType` naming what was found."""
    if from_text and isinstance(value, str) and kind not in ("text", "date", "number"):
        if kind == "texts" and not value.lstrip().startswith("["):
            value = [part for part in value.split(",") if part.strip()]
        elif not (kind == "any" and not value.lstrip().startswith(("{", "["))):
            value = _json(value)
    if value is None:
        return default
    return _CONVERTERS[kind](value, from_text)


def _text(value: Any, from_text: bool) -> str:
    if not isinstance(value, str):
        raise _WrongType(_name(value))
    return value.strip()


def _number(value: Any, from_text: bool) -> float:
    if from_text and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise _WrongType(f"text ({value[:40]!r})") from None
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        raise _WrongType(_name(value) + (f" ({value[:40]!r})" if isinstance(value, str) else ""))
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _texts(value: Any, from_text: bool) -> list[str]:
    if not isinstance(value, list):
        raise _WrongType(_name(value))
    bad = [v for v in value if not isinstance(v, str)]
    if bad:
        raise _WrongType(f"a list with {_name(bad[0])} in it")
    return [v.strip() for v in value if v.strip()]


def _descriptions(value: Any, from_text: bool) -> list[dict[str, str]]:
    """Descriptions of a row; one without a letter or digit of any script ("...") says nothing and is left out."""
    if not isinstance(value, list):
        raise _WrongType(_name(value))
    result = []
    for item in value:
        if not isinstance(item, dict):
            raise _WrongType(f"a list with {_name(item)} in it")
        extra = sorted(set(item) - {"text", "language"})
        if extra:
            raise _WrongType(f"a description with the field {extra[0]!r}")
        text, language = item.get("text") or "", item.get("language") or "und"
        if not isinstance(text, str) or not isinstance(language, str):
            raise _WrongType("a description whose text or language is not text")
        if not text.strip() or any(c.isalnum() for c in text):
            result.append({"text": text.strip(), "language": language})
    return result


def _plain(value: Any) -> Any:
    """Nested values without nulls and without types that JSON lacks."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise _WrongType(f"a value of type {_name(value)} in it")


def _record(value: Any, from_text: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongType(_name(value))
    return {k: v for k, v in value.items() if not _absent(v)}


def _addresses(value: Any, from_text: bool) -> dict[str, str]:
    record = _record(value, from_text)
    if bad := [v for v in record.values() if not isinstance(v, str)]:
        raise _WrongType(f"an object with {_name(bad[0])} in it")
    return {name: uri.strip() for name, uri in record.items()}


def _records(value: Any, from_text: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _WrongType(_name(value))
    bad = [v for v in value if not isinstance(v, dict)]
    if bad:
        raise _WrongType(f"a list with {_name(bad[0])} in it")
    return _plain(value)


def _date(value: Any, from_text: bool) -> str:
    if isinstance(value, datetime.datetime):
        return value.date().isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    return _text(value, from_text)


def _list(value: Any, from_text: bool) -> list[Any]:
    if not isinstance(value, list):
        raise _WrongType(_name(value))
    return _plain(value)


_CONVERTERS: dict[str, Callable[[Any, bool], Any]] = {
    "text": _text,
    "number": _number,
    "texts": _texts,
    "descriptions": _descriptions,
    "record": _record,
    "addresses": _addresses,
    "records": _records,
    "date": _date,
    "list": _list,
    "any": lambda value, from_text: _plain(value),
}


def _value_problems(values: dict[str, Any]) -> Iterable[str]:
    """Faults of one row whose types are right. Normalises the ISRC in place."""
    for name in ("track_id", "uri", "artist"):
        if not values[name]:
            yield f"{name} is missing"
    if values["uri"] and any(ord(c) < 32 for c in values["uri"]):
        yield f"uri is {values['uri']!r}, with control characters"
    if values["track_id"] and (len(values["track_id"]) > 200 or not values["track_id"].isprintable()):
        yield "track_id is longer than 200 characters or holds control characters"
    for name, uri in values["stems"].items():
        if not name or len(name) > 100 or not name.isprintable():
            yield f"stems: the name {name[:100]!r} is empty, longer than 100 characters or holds control characters"
        if any(ord(c) < 32 for c in uri):
            yield f"stems.{name} is {uri!r}, with control characters"
    bpm = values["bpm"]
    if bpm is not None and not (math.isfinite(bpm) and 20 <= bpm <= 400):
        yield f"bpm is {bpm:g}; allowed: 20 to 400"
        values["bpm"] = None  # not-a-number is not JSON
    for name, language in [("language", values["language"])] + [
        (f"descriptions[{i}].language", d["language"]) for i, d in enumerate(values["descriptions"])
    ]:
        if language and not _LANGUAGE.fullmatch(language):
            yield f"{name} is {language!r}; expected a tag such as en, pt-BR, or und"
    for i, description in enumerate(values["descriptions"]):
        if not description["text"]:
            yield f"descriptions[{i}].text is empty"
    yield from _rights_problems(values["rights"])


def _rights_problems(rights: dict[str, Any]) -> Iterable[str]:
    dates = {}
    for name in ("valid_from", "valid_until"):
        given = rights[name]
        if given is None or (name == "valid_until" and given == PERPETUAL):
            continue
        try:
            dates[name] = datetime.date.fromisoformat(given)
        except ValueError:
            yield f"rights.{name} is {given!r}; expected YYYY-MM-DD"
    if len(dates) == 2 and dates["valid_from"] > dates["valid_until"]:
        yield f"rights.valid_from {rights['valid_from']} is after valid_until {rights['valid_until']}"
    if rights["isrc"] is not None:
        isrc = re.sub(r"^ISRC|[\s-]", "", rights["isrc"].upper())
        if _ISRC.fullmatch(isrc):
            rights["isrc"] = isrc
        else:
            yield f"rights.isrc is {rights['isrc']!r}; expected 12 characters such as GBABC2400001"
    if rights["status"] is not None and (status := rights["status"].strip().casefold()) in STATUS:
        rights["status"] = status
    elif rights["status"] is not None:
        yield f"rights.status is {rights['status']!r}; allowed: {', '.join(STATUS)}"
    digest = rights["licence_doc_sha256"]
    if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        yield "rights.licence_doc_sha256 is not 64 hexadecimal digits"
    total: dict[str, float] = {}
    for i, holder in enumerate(rights["rightsholders"]):
        if not isinstance(holder.get("party"), str) or not holder["party"].strip():
            yield f"rights.rightsholders[{i}].party is missing"
        share = holder.get("share")
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 100
        ):
            yield f"rights.rightsholders[{i}].share is {share!r}; expected a percentage above 0, at most 100"
        elif share is not None:
            role = str(holder.get("role") or "")
            total[role] = total.get(role, 0.0) + share
    yield from (
        f"rights.rightsholders: shares of {r or 'all'} add up to {t:g} %" for r, t in total.items() if t > 100.01
    )


def _rows(numbers: list[int]) -> str:
    """`row 3` or `rows 1-4, 9`."""
    spans: list[list[int]] = []
    for n in sorted(set(numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"row{'s' if len(set(numbers)) > 1 else ''} {text}"


def _unknown_message(name: str, numbers: list[int]) -> str:
    known = [*COLUMNS, *(f"rights.{n}" for n in RIGHTS)]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known columns: {', '.join(known)}"
    return f"unknown column {str(name)!r} in {_rows(numbers)}; {hint}"
