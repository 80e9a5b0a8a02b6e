"""Reading catalogues: three formats, one schema, every problem at once."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from musicgen.errors import UserError
from pipelines import catalog
from tests.pipelines.conftest import rights, row


def write(folder: Path, rows: list, name: str = "c.jsonl") -> str:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    rows = [row(i, bpm=None if i == 1 else 100.5) for i in range(3)]
    rows[2]["rights"]["ai_contribution"] = {"vocals": False}
    rows[2]["rights"]["opt_out_signals"] = ["noai"]
    reference = catalog.read(write(tmp_path, rows)).rows
    assert reference[0].values["bpm"] == 100.5 and reference[1].values["bpm"] is None
    assert not any(r.problems for r in reference)

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert catalog.read(str(tmp_path / "c.parquet")).rows == reference

    nested = {"descriptions", "rights", "moods", "instruments"}
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows({n: json.dumps(v) if n in nested else v for n, v in r.items()} for r in rows)
    assert catalog.read((tmp_path / "c.csv").as_uri()).rows == reference

    flat = [
        {n: v for n, v in r.items() if n != "rights"} | {f"rights.{n}": v for n, v in r["rights"].items()} for r in rows
    ]
    names = list(dict.fromkeys(n for r in flat for n in r))
    with open(tmp_path / "flat.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        for r in flat:
            cells = {n: json.dumps(v) if isinstance(v, list | dict) else v for n, v in r.items()}
            writer.writerow({**cells, "moods": ", ".join(r["moods"]), "rights.grants": ",".join(r["rights.grants"])})
    assert catalog.read(str(tmp_path / "flat.csv")).rows == reference


def test_parquet_dates_are_dates(tmp_path: Path) -> None:
    item = row(1, rights=rights(valid_until=datetime.date(2030, 12, 31)))
    pq.write_table(pa.Table.from_pylist([item]), tmp_path / "c.parquet")
    assert catalog.read(str(tmp_path / "c.parquet")).rows[0].rights["valid_until"] == "2030-12-31"


def test_everything_that_stops_a_run_is_named_at_once(tmp_path: Path) -> None:
    rows = [row(1), row(1), row(2, bpm="fast"), row(3, bpm="slow"), row(4, moods="calm"), row(5, genere="folk")]
    rows += [row(6, rights=rights(licens="x")), row(7, rights=rights(grants="train")), row(7, rights="none")]
    with pytest.raises(catalog.CatalogError) as caught:
        catalog.read(write(tmp_path, rows))
    text = str(caught.value)
    assert "track_id 't001' is given to rows 1-2" in text and "'t007' is given to rows 8-9" in text
    assert "'bpm' holds text ('fast') where a number is needed, in row 3" in text and "'slow'" in text
    assert "'moods' holds text where a list of texts is needed, in row 5" in text
    assert "unknown column 'genere' in row 6; did you mean 'genre'?" in text
    assert "unknown column 'rights.licens' in row 7; did you mean 'rights.licence'?" in text
    assert "'rights.grants' holds text" in text and "'rights' holds text where an object is needed, in row 9" in text
    assert len(caught.value.problems) == 9


def test_other_faults_belong_to_their_row(tmp_path: Path) -> None:
    bad = row(
        2, artist=None, bpm=999.0, language="English (UK)", descriptions=[{"text": " ", "language": "en"}],
        rights=rights(valid_from="2031-01-01", isrc="123", status="maybe", licence_doc_sha256="xyz",
                      rightsholders=[{"party": "A", "share": 70.0}, {"party": "", "share": 40.0}]),
    )  # fmt: skip
    rows = catalog.read(
        write(tmp_path, [row(1), bad, "{not json", "[1]", row(3, rights=rights(valid_until="soon"))])
    ).rows
    assert [bool(r.problems) for r in rows] == [False, True, True, True, True]
    text = "; ".join(rows[1].problems)
    for part in ("artist is missing", "bpm is 999", "language is 'English (UK)'", "descriptions[0].text is empty",
                 "valid_from 2031-01-01 is after", "isrc is '123'", "status is 'maybe'", "not 64 hexadecimal",
                 "rightsholders[1].party is missing", "add up to 110 %"):  # fmt: skip
        assert part in text, part
    assert "not JSON" in rows[2].problems[0] and "expected an object, got a list" in rows[3].problems[0]


def test_isrc_is_normalised(tmp_path: Path) -> None:
    rows = catalog.read(write(tmp_path, [row(1, rights=rights(isrc="ISRC gb-abc-24-00001"))])).rows
    assert rows[0].rights["isrc"] == "GBABC2400001" and not rows[0].problems


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rights": rights(status="withdrawn"), "rights.status": "active"},
         "rights.status is given twice, as 'withdrawn' and 'active'"),
        ({"rights.licence": "MIT", "rights": rights()}, "rights.licence is given twice, as 'CC-BY-4.0' and 'MIT'"),
        ({"stems": {"voice": "a.wav"}, "stems.voice": "b.wav"}, "stems.voice is given twice, as 'a.wav' and 'b.wav'"),
        ({"stems": {"voice": "a.wav", " voice ": "b.wav"}}, "stems.voice is given twice, as 'a.wav' and 'b.wav'"),
        ({"stems.voice": "a.wav", "stems. voice": "b.wav"}, "stems.voice is given twice, as 'a.wav' and 'b.wav'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_two_values_for_one_thing_are_a_fault_of_the_row(given: dict, words: str, kind: str, tmp_path: Path) -> None:
    item, path = {**row(1), **given}, tmp_path / f"c.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(item))
            writer.writeheader()
            writer.writerow({n: json.dumps(v) if isinstance(v, list | dict) else v for n, v in item.items()})
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([item]), path)
    else:
        path.write_text(json.dumps(item))
    (found,) = catalog.read(str(path)).rows
    assert found.problems == (words,)


def test_the_same_value_twice_is_no_fault(tmp_path: Path) -> None:
    item = {**row(1, rights=rights(status="active ", opt_out_signals=None)), "rights.status": "active"}
    item |= {"rights.opt_out_signals": [], "stems": {"voice": "a.wav", "voice ": " a.wav", "drums": None}}
    (found,) = catalog.read(write(tmp_path, [{**item, "stems.drums": "d.wav"}])).rows
    assert not found.problems and found.values["stems"] == {"voice": "a.wav", "drums": "d.wav"}
    cell = json.dumps(row(1)["rights"])
    item = {
        "track_id": "t",
        "uri": "a.wav",
        "artist": "a",
        "rights": cell,
        "rights.grants": "train,generate_commercially",
    }
    assert not catalog.validate([item], "c", from_text=True)[0].problems


def test_a_name_twice_in_one_object(tmp_path: Path) -> None:
    twice = json.dumps(row(1)).replace('"status": "active"', '"status": "withdrawn", "status": "active"')
    words = "'status' is given twice in one object, as 'withdrawn' and 'active'"
    assert catalog.read(write(tmp_path, [twice])).rows[0].problems == (words,)
    cell = json.dumps(rights())[:-1] + ', "status": "withdrawn"}'
    item = {"track_id": "t", "uri": "a.wav", "artist": "a", "rights": cell}
    for more in ({}, {"rights.licence": "CC-BY-4.0"}):
        (found,) = catalog.validate([{**item, **more}], "c", from_text=True)
        assert found.problems == ("rights: 'status' is given twice in one object, as 'active' and 'withdrawn'",)


def test_parquets_own_types(tmp_path: Path) -> None:
    """A map is a list of pairs, a price-like number a decimal."""
    item = row(1, rights=rights(rightsholders=[{"party": "A", "share": decimal.Decimal("62.5")}]))
    item["bpm"] = decimal.Decimal("91.50")
    table = pa.Table.from_pylist([item])
    stems = pa.array([[("drums", "d.wav"), ("voice", " v.wav"), ("bass", None)]], pa.map_(pa.string(), pa.string()))
    pq.write_table(table.append_column("stems", stems), tmp_path / "c.parquet")
    (found,) = catalog.read(str(tmp_path / "c.parquet")).rows
    assert not found.problems and found.values["bpm"] == 91.5 and found.rights["rightsholders"][0]["share"] == 62.5
    assert found.values["stems"] == {"drums": "d.wav", "voice": "v.wav"} and found.digest


def test_bad_catalogues(tmp_path: Path) -> None:
    write(tmp_path, [row(1)], "there.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "latin.csv").write_bytes("track_id\nä".encode("latin1"))
    for name, words in (
        ("absent.jsonl", "does not exist; in that folder: .*there.jsonl"),
        ("c.xlsx", "unknown format '.xlsx'; allowed: .jsonl"),
        ("empty.jsonl", "has no rows"),
        ("broken.parquet", "not a readable parquet"),
        ("latin.csv", "not UTF-8"),
    ):
        with pytest.raises(UserError, match=words):
            catalog.read(str(tmp_path / name))


def test_lines_and_cells_that_no_catalogue_should_hold(tmp_path: Path) -> None:
    good = json.dumps(row(1))
    said = {
        "[" * 100_000: "not JSON: maximum recursion depth exceeded",
        '{"bpm": ' + "9" * 5000 + "}": "not JSON: Exceeds the limit",
        "\x00": "not JSON",
        '"a text"': "expected an object, got text",
        json.dumps(row(2, bpm=10**400)): "bpm is inf; allowed: 20 to 400",
        json.dumps(row(3, title="a\udcff")): "a text holds half of a surrogate pair",
        json.dumps(row(4, track_id="b\udcff")): "a text holds half of a surrogate pair",
        json.dumps(row(5, uri="audio/a\x00b.wav")): r"uri is 'audio/a\x00b.wav', with control characters",
        json.dumps(row(6, rights=rights(ai_contribution=float("nan")))): "a number is not finite",
        json.dumps(row(7, language="x" * 1_000_000)): "language is 'xxx",
    }
    path = tmp_path / "catalog.jsonl"
    path.write_text("\n".join([good, *said]))
    first, *others = catalog.read(str(path)).rows
    assert not first.problems
    for found, reason in zip(others, said.values(), strict=True):
        assert any(reason in problem for problem in found.problems), (found.problems, reason)
        assert all(len(problem) < 600 for problem in found.problems)
        json.dumps(found.values, ensure_ascii=False).encode()  # can be written down


def test_files_that_stop_a_run_say_why(tmp_path: Path) -> None:
    binary = {"track_id": ["a"], "rights": pa.array([{"ai_contribution": b"\xff"}])}
    pq.write_table(pa.table(binary), tmp_path / "binary.parquet")
    head = "track_id,uri,artist,rights\n"
    rows = [json.dumps({**row(1), "rights": "no JSON", "rights.licence": "MIT"})]
    rows += [json.dumps({f"{'c' * 100_000}{i}": 1}) for i in range(150)]
    for name, text, reason in (
        ("binary.parquet", None, "'rights.ai_contribution' holds a value of type bytes in it"),
        ("big.csv", head + f'a,b,"{"x" * 200_000}",{{}}\n', "is not readable csv behind line 1: field larger"),
        ("head.csv", f'"{"x" * 200_000}",uri\na,b\n', "is not readable csv behind line 0: field larger"),
        ("deep.csv", head + f'a,b,c,"{"[" * 100_000}"\n', "column 'rights' holds text that is not JSON"),
        ("many.jsonl", "\n".join(rows), "and 51 more"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as caught:
            catalog.read(str(tmp_path / name))
        assert reason in str(caught.value) and len(str(caught.value)) < 100_000
