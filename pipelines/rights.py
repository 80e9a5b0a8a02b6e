"""The rights gate: licence terms in, admitted or rejected out. Unknown means rejected.

A row is admitted only when everything that must be known is known and allows the purpose, in the territory, today:
a recognisable licence, a rightsholder, evidence of consent, a grant for every purpose, a term that holds today, a
territory that covers ours, an active status and no opt-out signal. The gate never guesses and never repairs.
What was taken down (`takes_down`) is refused as a recording: ingest lets its sound in under no other row either.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.checks import Reject

PERPETUAL = "perpetual"

_EU = "AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK"
EU = frozenset(_EU.split())
WORLD = frozenset({"WORLD", "WORLDWIDE", "001"})

# As `_says_nothing` compares them: letters and digits alone.
_NOTHING = frozenset(
    {"", "none", "no", "noassertion", "unknown", "na", "notapplicable", "notavailable", "null", "tba", "tbd", "pending"}
)
_NO_LICENCE = _NOTHING | {"unlicensed", "allrightsreserved", "proprietary"}
_KNOWN_LICENCE = re.compile(
    r"(CC0-1\.0|CC-PDDC|CC-PDM-1\.0|CC-BY(-NC)?(-SA|-ND)?-(1\.0|2\.0|2\.5|3\.0|4\.0)(-[A-Z]{2,3})?|PDDL-1\.0|ODC-By-1\.0"
    r"|ODbL-1\.0|LAL-1\.[23]|MIT(-0)?|Apache-2\.0|BSD-[23]-Clause|Unlicense|0BSD|ISC|Zlib"
    r"|(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+)\+?",
    re.IGNORECASE,
)
_LICENSE_REF = re.compile(r"(?:.*:)?LicenseRef-(.*?)\+?", re.IGNORECASE)
# An entry of a list that takes something away from the others: this gate reads none of them, and admits nothing then.
_EXCEPTION = re.compile(
    r"\s*[-!~^\u2212\u2013]|.*\b(except\w*|exclud\w*|excl|without|minus|not|ohne|außer|ausser|sauf|salvo)\b",
    re.IGNORECASE | re.DOTALL,
)
_NOT_GRANTED = re.compile(r"\s*non?\b", re.IGNORECASE)  # of grants alone: NO is Norway
_REFUSED = re.compile(r"\b(refus|withdr|revok|den(y|ied)|declin|reject|disput|object)\w*", re.IGNORECASE)
_GONE = ("withdrawn", "withdrawal", "revoked", "removed", "deleted", "takendown", "takedown", "optedout", "optout")


@dataclass(frozen=True)
class RightsConfig:
    """What the data is for, where and when.

    Args:
        purpose: every one must be granted: `train`, `generate_commercially`, `redistribute_tokens` or the deal's word.
        territory: places (ISO 3166 two-letter codes, `EU`, or `WORLD`) that the rights must cover.
        today: the day of the decision as YYYY-MM-DD; empty means the day of the run.
    """

    purpose: list[str] = field(default_factory=lambda: ["train"])
    territory: list[str] = field(default_factory=lambda: ["WORLD"])
    today: str = ""

    def __post_init__(self) -> None:
        for name, example in (("purpose", "train"), ("territory", "WORLD")):
            given = getattr(self, name)
            if not given or not all(entry.strip() for entry in given):
                raise ValueError(
                    f"rights.{name} is {given!r}; give at least one, none of them empty, such as [{example}]"
                )

    def day(self) -> datetime.date:
        """The day of the decision. Raises `ValueError` when it is not a date."""
        return datetime.date.fromisoformat(self.today) if self.today else datetime.date.today()


def _says_nothing(text: str | None, words: frozenset[str] = _NOTHING) -> bool:
    """Whether a text leaves open what it should name: empty, a dash, `N/A`, `unknown` and their like."""
    return re.sub(r"[\W_]+", "", text or "").casefold() in words


def licence_problem(expression: str | None) -> str | None:
    """Why an SPDX licence expression cannot be recognised, or None when it can.

    >>> licence_problem("CC-BY-4.0 OR LicenseRef-acme-2025") is None
    True
    """
    if expression is None or _says_nothing(expression, _NO_LICENCE):
        return f"no licence given ({expression!r})" if expression else "no licence given"
    tokens = re.findall(r"[()]|[^\s()]+", expression)
    depth, expect_id = 0, True
    for token in tokens:
        if token == "(" and expect_id:
            depth += 1
        elif token == ")" and not expect_id and depth:
            depth -= 1
        elif token in ("AND", "OR") and not expect_id:
            expect_id = True
        elif expect_id and _KNOWN_LICENCE.fullmatch(token):
            own = _LICENSE_REF.fullmatch(token)
            if own and _says_nothing(own[1], _NO_LICENCE):
                return f"licence {token!r} names no deal"
            expect_id = False
        elif expect_id and token not in ("AND", "OR", "WITH", ")"):
            return f"licence {token!r} is not a known SPDX identifier; private deals are named LicenseRef-…"
        else:
            return f"licence expression {expression!r} cannot be read at {token!r}"
    if depth or expect_id:
        return f"licence expression {expression!r} is incomplete"
    return None


def covers(granted: Sequence[str], wanted: str) -> bool:
    """Does a list of granted territories cover one wanted place?"""
    have = {t.strip().upper() for t in granted}
    want = wanted.strip().upper()
    if have & WORLD:
        return True
    if want in WORLD:
        return False
    members = have | (EU if "EU" in have else frozenset())
    return want in members or (want == "EU" and members >= EU)


def takes_down(rights: dict[str, Any]) -> str | None:
    """The reject code of a record that takes its recording down, however the rest of its row is written; else None.

    A status that looks like one of those words counts: what is refused by mistake is mended in the catalogue, what is
    let in again under another row may never be noticed.
    """
    status = re.sub(r"[\W_]+", "", str(rights.get("status") or "")).casefold()
    if difflib.get_close_matches(status, _GONE, n=1, cutoff=0.75):
        return "withdrawn"
    return "opt_out" if rights.get("opt_out_signals") else None


def admit(rights: dict[str, Any], config: RightsConfig, today: datetime.date) -> Reject | None:
    """None when the rights record allows the use, else the `Reject`.

    Every fault is in the message; the code is that of the first one in this order: withdrawn, opt-out, licence,
    rightsholder, consent, grant, term, territory, status.
    """
    faults = list(_faults(rights, config, today))
    if not faults:
        return None
    return Reject("rights", faults[0][0], "; ".join(message for _, message in faults))


def _faults(rights: dict[str, Any], config: RightsConfig, today: datetime.date) -> Any:
    status = rights.get("status")
    if status == "withdrawn":
        yield "withdrawn", "status is withdrawn"
    signals = rights.get("opt_out_signals") or []
    if signals:
        yield "opt_out", f"{len(signals)} opt-out signal(s): {signals[0]!r}" + (" …" if len(signals) > 1 else "")
    problem = licence_problem(rights.get("licence"))
    if problem:
        yield "no_licence", problem
    parties = [str(holder.get("party") or "") for holder in rights.get("rightsholders") or []]
    if not parties:
        yield "no_rightsholder", "no rightsholder is named"
    if unnamed := [party for party in parties if _says_nothing(party)]:
        yield "no_rightsholder", f"a rightsholder is not named ({unnamed[0]!r})"
    consent = rights.get("consent_evidence")
    if _says_nothing(consent):
        yield "no_consent", "no evidence of consent is named" + (f" ({consent!r})" if consent else "")
    elif consent is not None and (said := _REFUSED.search(consent)):
        yield "no_consent", f"the evidence of consent speaks of its opposite ({said[0]!r} in {consent!r})"
    given = [str(g) for g in rights.get("grants") or []]
    if odd := [g for g in given if _EXCEPTION.match(g) or _NOT_GRANTED.match(g)]:
        yield "not_granted", f"the grants take something away ({odd[0]!r}); name what is granted alone"
    grants = {g.strip().lower() for g in given}
    lacking = [p for p in config.purpose if p.strip().lower() not in grants]
    if lacking:
        yield "not_granted", f"not granted: {', '.join(lacking)} (granted: {', '.join(sorted(grants)) or 'nothing'})"
    start, end = rights.get("valid_from"), rights.get("valid_until")
    if start is None or end is None:
        missing = " and ".join(n for n, v in (("valid_from", start), ("valid_until", end)) if v is None)
        yield "no_term", f"{missing} unknown (an open end is written {PERPETUAL!r})"
    if start is not None and datetime.date.fromisoformat(start) > today:
        yield "not_yet_valid", f"the term begins on {start}"
    if status == "expired" or (end not in (None, PERPETUAL) and datetime.date.fromisoformat(str(end)) < today):
        yield "expired", f"the term ended on {end}" if status != "expired" else "status is expired"
    territory = rights.get("territory") or []
    if odd := [t for t in territory if _EXCEPTION.match(t)]:
        yield "territory", f"the territory names an exception ({odd[0]!r}); list the places that are covered instead"
    outside = [t for t in config.territory if not covers(territory, t)]
    if outside:
        yield "territory", f"not covered: {', '.join(outside)} (granted: {', '.join(territory) or 'nowhere'})"
    if status is None:
        yield "no_status", "status unknown (active, expired or withdrawn)"
