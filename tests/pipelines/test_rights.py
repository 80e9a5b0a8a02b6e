"""The rights gate: unknown means rejected."""

from __future__ import annotations

import datetime

import pytest

from musicgen import settings
from pipelines import catalog
from pipelines.ingest import IngestConfig
from pipelines.rights import RightsConfig, admit, covers, licence_problem, takes_down
from tests.pipelines.conftest import TODAY, rights, row

DAY = datetime.date.fromisoformat(TODAY)


def code(config: RightsConfig | None = None, **changes: object) -> str | None:
    (parsed,) = catalog.validate([row(1, rights=rights(**changes))], "test")
    assert not parsed.problems
    reject = admit(parsed.rights, config or RightsConfig(), DAY)
    return reject.code if reject else None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"valid_until": "perpetual"}, None),
        ({"valid_from": TODAY, "valid_until": TODAY}, None),
        ({"licence": None}, "no_licence"),
        ({"licence": "unknown"}, "no_licence"),
        ({"licence": "NOASSERTION"}, "no_licence"),
        ({"licence": "Free-For-All"}, "no_licence"),
        ({"licence": "CC-BY-4.0 AND"}, "no_licence"),
        ({"rightsholders": None}, "no_rightsholder"),
        ({"rightsholders": [{"party": "A"}, {"party": " Unknown"}]}, "no_rightsholder"),
        ({"rightsholders": [{"party": "n/a"}]}, "no_rightsholder"),
        ({"rightsholders": [{"party": "未知の人"}, {"party": "No Such Label"}]}, None),
        ({"consent_evidence": None}, "no_consent"),
        ({"consent_evidence": "none"}, "no_consent"),
        ({"consent_evidence": "N/A"}, "no_consent"),
        ({"consent_evidence": "unknown."}, "no_consent"),
        ({"consent_evidence": "--"}, "no_consent"),
        ({"licence": "all rights reserved"}, "no_licence"),
        ({"licence": "n.a."}, "no_licence"),
        ({"grants": None}, "not_granted"),
        ({"grants": ["redistribute_tokens"]}, "not_granted"),
        ({"valid_from": None}, "no_term"),
        ({"valid_until": None}, "no_term"),
        ({"valid_from": "2026-11-02"}, "not_yet_valid"),
        ({"valid_until": "2026-10-31"}, "expired"),
        ({"status": "expired"}, "expired"),
        ({"status": "withdrawn"}, "withdrawn"),
        ({"status": None}, "no_status"),
        ({"territory": None}, "territory"),
        ({"territory": ["DE", "FR"]}, "territory"),
        ({"opt_out_signals": [{"what": "noai", "where": "page"}]}, "opt_out"),
        ({"licence": None, "status": "withdrawn"}, "withdrawn"),
        ({"status": " Withdrawn"}, "withdrawn"),
        ({"status": "ACTIVE"}, None),
        ({"territory": ["WORLD", "-US"]}, "territory"),
        ({"territory": ["WORLD", "except US"]}, "territory"),
        ({"territory": ["WORLD", "NO"]}, None),  # Norway
        ({"grants": ["train", "-train"]}, "not_granted"),
        ({"grants": ["train", "no train"]}, "not_granted"),
        ({"grants": ["train", "not for training"]}, "not_granted"),
        ({"consent_evidence": "refused"}, "no_consent"),
        ({"consent_evidence": "consent withdrawn 2025-01-01"}, "no_consent"),
        ({"consent_evidence": "signed contract 12/2024"}, None),
    ],
)
def test_gate(changes: dict, expected: str | None) -> None:
    assert code(**changes) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"status": "withdrwan"}, "withdrawn"),
        ({"status": "taken down"}, "withdrawn"),
        ({"status": "opted-out"}, "withdrawn"),
        ({"status": "activ"}, None),
        ({"status": "expried"}, None),
        ({"status": None}, None),
        ({"opt_out_signals": ["noai"]}, "opt_out"),
    ],
)
def test_what_takes_a_recording_down_however_it_is_written(record: dict, expected: str | None) -> None:
    assert takes_down(record) == expected


def test_every_fault_is_in_the_message() -> None:
    (parsed,) = catalog.validate([row(1, rights={})], "test")
    reject = admit(parsed.rights, RightsConfig(), DAY)
    assert reject is not None and reject.code == "no_licence"
    for part in ("no licence", "no rightsholder", "consent", "not granted: train", "unknown", "not covered", "status"):
        assert part in reject.message


def test_purpose_territory_and_day_decide() -> None:
    assert code(RightsConfig(purpose=["train", "generate_commercially"])) is None
    assert code(RightsConfig(purpose=["train", "redistribute_tokens"])) == "not_granted"
    assert code(RightsConfig(territory=["DE"]), territory=["EU"]) is None
    assert code(RightsConfig(territory=["US"]), territory=["EU"]) == "territory"
    assert covers(["DE", "WORLD"], "JP") and not covers(["DE"], "EU")
    assert admit(rights(), RightsConfig(), datetime.date(2031, 1, 1)).code == "expired"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["purpose", "territory"])
@pytest.mark.parametrize("given", ["[]", '[""]', '["EU", " "]'])
def test_a_gate_without_purpose_or_territory_is_none(name: str, given: str) -> None:
    words = rf"rights.{name} is \[.*\]; give at least one, none of them empty, such as \[(train|WORLD)\]"
    with pytest.raises(settings.SettingsError, match=words):
        settings.parse(IngestConfig, [f"--rights.{name}", given])


@pytest.mark.parametrize(
    "licence", ["CC0-1.0", "cc-by-sa-3.0", "LicenseRef-deal-7", "(CC-BY-4.0 OR LicenseRef-x) AND MIT", "CC-BY-2.5-AU"]
)
def test_licences_that_are_recognised(licence: str) -> None:
    assert licence_problem(licence) is None


@pytest.mark.parametrize(
    "licence",
    [
        "",
        "CC-BY",
        "MIT Apache-2.0",
        "(MIT",
        "MIT)",
        "OR MIT",
        "LicenseRef-",
        "MIT AND OR MIT",
        "LicenseRef-NOASSERTION",
        "LicenseRef-none",
        "MIT AND LicenseRef-TBD",
        "DocumentRef-x:LicenseRef-unknown",
    ],
)
def test_licences_that_are_not(licence: str) -> None:
    assert licence_problem(licence)
