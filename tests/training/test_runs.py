"""`make runs` over folders that are not what a training leaves: damaged, cut, copied by hand, oddly named."""

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from musicgen import weights
from musicgen.errors import UserError
from pipelines.shard import ShardSet
from tests.training.synthetic import write_dataset
from training import folder as run_folder
from training import lineage, runs

PLAN = {
    "ranks": 1,
    "git": {"commit": "c" * 40, "changed": True},
    "host": "elsewhere",
    "pid": 7,
    "plan": ["memory 1 GB"],
}
START = {"event": "start", "at": "2026-01-02T03:04:05+00:00", "step": 0, "steps": 9, **PLAN}
END = {"event": "end", "at": "2026-01-02T04:04:05+00:00", "step": 4, "how": "paused"}
STATE = {
    "step": 4, "audio_seconds_seen": 1.0, "best_loss": 2.5, "best_step": 4, "ema_count": 1.0, "ranks": 1,
    "accumulate": 1, "files": {"a.safetensors": 9},
    "optimizer": {"numbers": {"w/n": {"value": 4, "tensor": False}}, "groups": [{"eps": 1.0}], "moments": ["w/n"]},
}  # fmt: skip


def make(folder: Path, **changes: Any) -> Path:
    """A run's folder as far as `make runs` reads it."""
    config = {
        "settings": {"size": "demo", "steps": 9, "data": "data/demo", "init": ""},
        "dataset_version": "d" * 64,
        "codec": {"name": "tiny", "identity": "0" * 64},
        "text_encoder": {"name": "hash", "identity": "1" * 64},
        "wandb_run_id": "abc",
        **changes,
    }
    (folder / "state" / "step-4").mkdir(parents=True)
    (folder / "state" / "step-4" / "state.json").write_text(json.dumps(STATE))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text('{"step": 2, "train/loss": 3.0}\n{"step": 4, "valid/loss": 2.5}\n')
    (folder / lineage.FILE).write_text(json.dumps(START) + "\n" + json.dumps(END) + "\n")
    return folder


def listed(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "250")
    assert runs.main(["--folder", str(folder)]) == 0
    return capsys.readouterr().out


def damage(run: Path, kind: str) -> None:
    """One of the things that happen to folders."""
    config, metrics, starts = run / "config.yaml", run / "metrics.jsonl", run / lineage.FILE
    state = run / "state" / "step-4" / "state.json"
    match kind:
        case "binary config":
            config.write_bytes(b"\x80\x81\x00settings")
        case "config is not YAML":
            config.write_text("settings: [")
        case "config is a bad date":
            config.write_text("settings: 2026-99-99")
        case "nested config":
            config.write_text("[" * 5000)
        case "empty config":
            config.write_text("")
        case "config without settings":
            config.write_text("settings: 3\ndataset_version: [1]\n")
        case "config is a folder":
            config.unlink()
            config.mkdir()
        case "config is a pipe":
            config.unlink()
            os.mkfifo(config)
        case "config without a codec":
            config.write_text(config.read_text().replace("codec:", "codek:"))
        case "metrics are a folder":
            metrics.unlink()
            metrics.mkdir()
        case "starts are a pipe":
            starts.unlink()
            os.mkfifo(starts)
        case "odd metrics":
            odd = b'[1]\n3\n\xff\x00\n{"valid/loss": 1}\n{"step": true}\n{"step": 5, "valid/loss'
            metrics.write_bytes(metrics.read_bytes() + odd)
        case "odd starts":
            lines = [[], {"event": "start"}, {"event": 3}, {"event": []}, {**END, "step": "x"}, {**START, "pid": None}]
            starts.write_text(starts.read_text() + "".join(json.dumps(line) + "\n" for line in lines))
        case "no state.json":
            state.write_bytes(b"\xff\xfe")
        case "state.json of something else":
            state.write_text('["optimizer"]')
        case "state.json with more":
            state.write_text(json.dumps(STATE | {"colour": "red"}))
        case "state copied by hand":
            shutil.copytree(state.parent, run / "state" / "step-20.bak")


KINDS = {
    "binary config": "config.yaml is damaged: it cannot be read",
    "config is not YAML": "config.yaml is damaged: it cannot be read",
    "config is a bad date": "config.yaml is damaged: it cannot be read",
    "nested config": "config.yaml is damaged: it cannot be read: it is nested too deeply",
    "empty config": "config.yaml is damaged: it is empty",
    "config without settings": "config.yaml is damaged: settings is of type int instead of a mapping",
    "config is a folder": "config.yaml is damaged: it cannot be read: it is a folder",
    "config is a pipe": "config.yaml is damaged: it cannot be read: it is no file",
    "config without a codec": "config.yaml is damaged: it has no codec",
    "metrics are a folder": "metrics.jsonl cannot be read: Is a directory",
    "starts are a pipe": "starts.jsonl cannot be read: it is not a file",
    "odd metrics": "metrics.jsonl has 5 damaged lines",
    "odd starts": "starts.jsonl has 6 damaged lines",
    "no state.json": "step-4 cannot be read",
    "state.json of something else": "state.json does not hold what this program writes",
    "state.json with more": "state.json does not hold what this program writes",
    "state copied by hand": "state/ holds step-20.bak",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_folder_is_shown_as_odd_beside_the_others(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "good")
    damage(make(tmp_path / "bad"), kind)
    table = listed(tmp_path, capsys, monkeypatch).splitlines()
    good = next(line for line in table if " good " in line)
    assert "paused" in good and "4 of 9" in good and "2.500" in good
    lost = "config" in kind and kind != "config without a codec"
    assert any(" bad " in line and ("odd" in line) == lost for line in table if "│" in line)
    assert sum("odd: bad: " in line for line in table) == 1
    assert KINDS[kind] in next(line for line in table if "odd: bad: " in line)
    assert runs.main(["--run", str(tmp_path / "bad")]) == 0
    told = capsys.readouterr().out
    assert "odd       " in told and ("start     2026-01-02" in told) == (kind != "starts are a pipe")


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_shows_whole_cells_of_fewer_columns(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "koto" / "calm", settings={"size": "300m", "steps": 1_000_000, "init": "demo"})
    monkeypatch.setenv("COLUMNS", str(width))
    assert runs.main(["--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "…" not in told.splitlines()[3] and all(cell in told for cell in ("koto/calm", "4 of 1000000", "2.500"))
    assert "no room here for: starts" in told and " starts " not in told
    monkeypatch.delenv("COLUMNS")  # into a pipe: all of it
    assert runs.main(["--folder", str(tmp_path)]) == 0
    assert "no room" not in (told := capsys.readouterr().out) and "2026-01-02 03:04" in told


def test_the_shipped_model_is_found_as_what_a_run_began_from() -> None:
    about = json.loads((weights.DEMO / "config.json").read_text())
    version = about["training"]["data_version"][:12]
    assert runs.ancestors("demo")[0] == f"demo: {about['training']['step']} steps on data {version}, {about['licence']}"


def test_which_runs_may_have_learned_from_a_track(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.small_run import go

    monkeypatch.setenv("WANDB_MODE", "disabled")
    data = write_dataset(tmp_path / "data", size=64, valid=2)
    index = ShardSet.open(str(data)).index.to_pylist()
    seen = {split: next(r["track_id"] for r in index if r["split"] == split) for split in ("train", "valid")}
    first = go(data, tmp_path / "runs" / "first", "--steps", "2")
    other = next(r["artist"] for r in reversed(index) if r["split"] == "train")
    short = tmp_path / "runs" / "short"
    go(data, short, "--steps", "2", "--select.artists", json.dumps([other]))
    heir = go(data, tmp_path / "runs" / "heir", "--steps", "2", "--init", str(first / "release"))
    (heir / lineage.TRACKS).unlink()  # as one of an earlier version
    make(tmp_path / "runs" / "damaged")
    (tmp_path / "runs" / "damaged" / lineage.TRACKS).write_bytes(b"PAR1")
    release = json.loads((first / "release" / "config.json").read_text())
    assert release["training"]["data_licences"] == sorted({str(row["licence"]) for row in index})
    inherited = json.loads((heir / "release" / "config.json").read_text())["inherited"]
    assert inherited[0]["data_version"] == release["training"]["data_version"]

    def told(track: str) -> str:
        capsys.readouterr()
        assert runs.main(["--folder", str(tmp_path / "runs"), "--track", track]) == 0
        return capsys.readouterr().out

    about = told(seen["train"])
    assert (
        f"{first}: trained on it (" in about
        and f"from {data}, data {release['training']['data_version'][:12]}" in about
    )
    assert f"{heir}: began from {first}" in about and f"unknown   {heir}: keeps no list" in about
    assert "damaged: tracks.parquet cannot be read" in about
    assert f"{first}: was validated on it" in told(seen["valid"])
    assert f"{first}:" not in told("nobody's")
    (first / "release").rename(tmp_path / "moved")  # then by its weights
    again = go(data, tmp_path / "runs" / "again", "--steps", "2", "--init", str(tmp_path / "moved"))
    (again / lineage.TRACKS).unlink()
    (tmp_path / "moved").rename(first / "release")
    assert f"{again}: began from {first}" in told(seen["train"])


def test_another_model_where_a_run_began_is_not_taken_for_it(tmp_path: Path) -> None:
    about = json.loads((weights.DEMO / "config.json").read_text())
    assert runs.ancestors("demo", about["weights"]["sha256"])[0].startswith("demo: ")
    assert runs.ancestors("demo", "0" * 64) == [
        f"demo (there is another model now: {about['weights']['sha256'][:12]}, it was {'0' * 12})"
    ]


def test_a_start_behind_a_cut_line_is_not_swallowed(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    later = {**START, "at": "2026-02-02T03:04:05+00:00", "step": 4}
    (run / lineage.FILE).write_text(json.dumps(START) + "\n" + json.dumps(END)[:40] + json.dumps(later) + "\n")
    assert lineage.read_counted(run) == ([START, later], 0)
    (run / lineage.FILE).write_text(json.dumps({**END, "error": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert [e["error"] for e in lineage.read(run)] == ["a\u2028b"]


@pytest.mark.parametrize("pid", [2**70, 0, -1])
def test_a_process_number_that_none_can_have_is_gone(pid: int) -> None:
    assert lineage.state_of([START | {"host": platform.node(), "pid": pid}]) == "killed"


def test_a_loss_beyond_all_numbers_is_not_the_best(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (run / "metrics.jsonl").write_text(
        f'{{"step": 1, "valid/loss": 1{"0" * 400}}}\n{{"step": 2, "valid/loss": -Infinity}}\n'
        '{"step": 3, "valid/loss": true}\n{"step": 4, "valid/loss": 2.5}\n'
    )
    found = runs.read(run)
    assert found is not None and found.best == 2.5 and not found.odd


def test_a_run_behind_a_link_is_listed_and_links_have_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(run)
    (run / "back").symlink_to(tmp_path / "runs")
    assert [found.folder for found in runs.find(tmp_path / "runs")] == [tmp_path / "runs" / "linked"]
    assert " linked " in listed(tmp_path / "runs", capsys, monkeypatch)
    assert runs.main(["--folder", "x" * 5000]) == 0
    assert "no runs in xxx" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no training run"):
        runs.main(["--run", "x" * 5000])


def test_names_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "[red]loud[", settings={"size": "[bold]demo", "steps": 9})
    make(tmp_path / "b[/red]")
    make(tmp_path / "c\x1b[31m\nd\udcff")
    table = listed(tmp_path, capsys, monkeypatch)
    assert "[red]loud[" in table and "[bold]demo" in table and "b[/red]" in table
    assert "c\\x1b[31m\\nd\\udcff" in table and "\x1b" not in table


def test_what_a_run_came_from_may_be_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, said in (
        ("a", b"\xff", "its config.json cannot be read"),
        ("b", b"[]", "? steps on data not stated"),
        ("c", b'{"training": 3, "licence": "CC0-1.0"}', "not stated, CC0-1.0"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(text)
        assert said in "\n".join(runs.ancestors(str(tmp_path / name)))
    make(tmp_path / "bare", codec=None, text_encoder=[], sources=3, settings={})
    assert runs.main(["--run", str(tmp_path / "bare")]) == 0
    assert "codec ? ?" in capsys.readouterr().out


def test_a_training_says_what_is_odd_about_its_states(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert run_folder.last_progress(run) is not None
    damage(run, "state.json of something else")
    with pytest.raises(UserError, match=r"step-4 is damaged: state.json does not hold .* Delete this folder to go on"):
        run_folder.last_progress(run)
    damage(run, "state copied by hand")
    with pytest.raises(UserError, match=r"state/ holds step-20.bak, .*move what else there is out of state/"):
        run_folder.last_progress(run)


def test_the_latest_start_comes_first_and_the_least_loss_is_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = START | {"at": "2026-03-02T03:04:05+00:00", "step": 4, "git": {"commit": "e" * 40, "changed": False}}
    for name, starts in (("a", [START | {"at": "2026-02-02T03:04:05+00:00"}]), ("b", [START, again]), ("c", [START])):
        make(tmp_path / name)
        (tmp_path / name / lineage.FILE).write_text("".join(json.dumps(line) + "\n" for line in starts))
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "valid/loss": 2.25}\n{"step": 4, "valid/loss": 4.75}\n')
    rows = [line for line in listed(tmp_path, capsys, monkeypatch).splitlines() if "demo" in line]
    assert ["bac".index(row.split()[1]) for row in rows] == [0, 1, 2]
    assert "2.250" in rows[0] and "eeeeeeeeee " in rows[0] and "cccccccccc+" in rows[1]
