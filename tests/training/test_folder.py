"""A run's folder: whose it is, what may differ at its next start, and what is said of one that is damaged."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from musicgen.errors import UserError
from training import finetune, folder, state
from training.config import read_config

SETTINGS = {"init": "base/release", "codec": "", "codebook_init": True, "seed": 1, "batch": {"size": 8, "workers": 0}}
IDENTITY: dict[str, Any] = {
    "settings": SETTINGS,
    "dataset_version": "d" * 64,
    "sources": [],
    "codec": {"name": "small", "identity": "c" * 64},
    "text_encoder": {"name": "hash", "identity": "e" * 64},
}
BEGAN = {"name": "base/release", "identity": "b" * 64, "licence": "CC0-1.0"}
ORIGIN = {"began_from": BEGAN, "inherited": [{"model": "base/release", "licence": "CC0-1.0"}]}


def wanted(identity: dict[str, Any] = IDENTITY, **given: Any) -> dict[str, Any]:
    """The same start with other settings."""
    return {**copy.deepcopy(identity), "settings": {**SETTINGS, **given}}


def resume(run: Path, start: dict[str, Any]) -> tuple[str | None, int]:
    return folder.find_run(str(run), start, {"batch": {"size": 4}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has made no step."""
    folder.make_run(str(tmp_path / "run"), IDENTITY)
    return tmp_path / "run"


def begun(run: Path) -> Path:
    """The same after three steps, as far as the check of its settings looks."""
    (run / "state" / "step-3").mkdir(parents=True)
    (run / "state" / "step-3" / "state.json").write_text("{}")
    return run


def test_a_run_is_found_again(run: Path) -> None:
    run_id, step = resume(run, IDENTITY)
    assert run_id and step == 0 and resume(begun(run), IDENTITY) == (run_id, 3)


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "no YAML": (b"settings: [", "it cannot be read: while parsing"),
    "binary": (b"\x80\x81\x00", "it cannot be read: .*invalid start byte"),
    "a bad date": (b"settings: 2026-99-99", "it cannot be read: month must be"),
    "deep": (b"[" * 5000, "it cannot be read: it is nested too deeply"),
    "a list": (b"- a\n", "it holds a list instead"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_config_that_is_no_runs_is_told_of_in_words(run: Path, kind: str) -> None:
    (run / "config.yaml").write_bytes(DAMAGE[kind][0])
    message = rf"RUN='.*run': config.yaml is damaged \({DAMAGE[kind][1]}.*give another RUN, or restore it"
    with pytest.raises(UserError, match=message):
        resume(run, IDENTITY)
    tuned = read_config(["--data", "x", "--run", str(run), "--init", "base/release"])
    with pytest.raises(UserError, match=message):
        finetune.origin_of(tuned, run)


@pytest.mark.parametrize("part", ["settings", "dataset_version", "codec", "text_encoder", "wandb_run_id"])
def test_a_part_of_config_that_is_missing_or_another_kind_is_named(run: Path, part: str) -> None:
    document = yaml.safe_load((run / "config.yaml").read_text())
    lost = {key: value for key, value in document.items() if key != part}
    for spoiled, said in ((lost, f"it has no {part}"), ({**document, part: 3}, f"{part} is of type int instead of")):
        (run / "config.yaml").write_text(yaml.safe_dump(spoiled))
        with pytest.raises(UserError, match=rf"config.yaml is damaged \({said}"):
            resume(run, IDENTITY)


def test_names_without_identities_and_settings_without_an_end_are_damage(run: Path) -> None:
    document = (run / "config.yaml").read_text()
    for more, said in (
        ("codec: {name: small}", "codec has no name and identity"),
        ("base: 3", "base has no name and identity"),
        ("origin: []", "origin is of type list"),
        ("origin: {began_from: {name: x}}", "origin.began_from has no name and identity"),
        ("settings: &a {batch: *a}", "its settings hold themselves"),
    ):
        (run / "config.yaml").write_text(f"{document}{more}\n")
        with pytest.raises(UserError, match=said):
            resume(run, IDENTITY)


def test_a_folder_or_a_pipe_for_a_config_is_damage(run: Path) -> None:
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        resume(run, IDENTITY)
    (run / "config.yaml").rmdir()
    os.mkfifo(run / "config.yaml")
    with pytest.raises(UserError, match="it is no file"):
        resume(run, IDENTITY)
    with pytest.raises(UserError, match="exists and is not a run"):
        resume(Path("/dev/null"), IDENTITY)
    with pytest.raises(UserError, match="File name too long; give another RUN"):
        folder.last_progress(Path("x" * 5000))


def test_config_is_on_the_disk_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, real=real, name=name: (done.append(name), real(*given))[1])
    folder.make_run(str(tmp_path / "run"), IDENTITY)
    assert done == ["fsync", "link"] and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_of_two_starts_of_a_new_run_the_second_changes_nothing(tmp_path: Path) -> None:
    """Both found no run; the first one has made it since, and trains."""
    run = str(tmp_path / "run")
    run_id = folder.make_run(run, wanted(seed=1))
    with pytest.raises(UserError, match="was begun by another process while this one started"):
        folder.make_run(run, wanted(seed=2))
    kept = folder.stored_config(Path(run))
    assert kept is not None and kept["wandb_run_id"] == run_id and kept["settings"]["seed"] == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "config.yaml"]


def test_without_links_a_run_is_made_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    run_id = folder.make_run(str(tmp_path / "run"), IDENTITY)
    kept = folder.stored_config(tmp_path / "run")
    assert kept is not None and kept["wandb_run_id"] == run_id
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "config.yaml"]


def test_a_run_follows_its_codec_and_keeps_the_rest(run: Path) -> None:
    resume(run, wanted(codec="/elsewhere/codec", codebook_init=False, batch={"size": 8, "workers": 4}))
    with pytest.raises(UserError, match=r"other settings:\n  seed: the run has 1, given 2\nGive"):
        resume(run, wanted(codec="/elsewhere/codec", seed=2))
    other = wanted(codec="/elsewhere/codec") | {"codec": {"name": "small", "identity": "f" * 64}}
    with pytest.raises(UserError, match="trained with codec 'small'"):
        resume(run, other)


def test_a_run_keeps_its_text_encoder(run: Path) -> None:
    resume(run, IDENTITY | {"text_encoder": {"name": "/moved/hash", "identity": "e" * 64}})
    with pytest.raises(UserError, match=r"trained with text encoder 'hash' \(identity eee.*now there is 'hash' \(iden"):
        resume(run, IDENTITY | {"text_encoder": {"name": "hash", "identity": "f" * 64}})


@pytest.mark.parametrize("name", ["steps", "optim.lr", "lm.dim", "batch.size", "seed"])
def test_what_changes_the_learning_is_fixed_and_what_does_not_is_free(run: Path, name: str) -> None:
    given: dict[str, Any] = {name.split(".")[-1]: 77}
    for part in reversed(name.split(".")[:-1]):
        given = {part: given}
    with pytest.raises(UserError, match=rf"other settings:\n  {name}: the run has .*, given 77\nGive"):
        resume(run, wanted(**given))
    resume(run, wanted(stop_at=5, licence="CC0-1.0", hardware={"devices": 2}, log={"every": 1}, ray={"cpus": 2}))


@pytest.mark.parametrize("known", [{"base": BEGAN}, {"origin": ORIGIN}])
def test_a_run_follows_the_model_that_it_began_from(tmp_path: Path, known: dict[str, Any]) -> None:
    run, moved = tmp_path / "run", {**BEGAN, "name": "moved/release"}
    folder.make_run(str(run), IDENTITY | known)
    there = {"base": moved} if "base" in known else {"origin": {**ORIGIN, "began_from": moved}}
    resume(run, wanted(init="moved/release") | there)
    resume(begun(run), wanted(init="moved/release") | there)
    other = {**moved, "identity": "0" * 64}
    there = {"base": other} if "base" in known else {"origin": {**ORIGIN, "began_from": other}}
    with pytest.raises(UserError, match=r"'base/release' \(identity bbb.*but INIT is now another one \(identity 000"):
        resume(run, wanted(init="moved/release") | there)
    with pytest.raises(UserError, match="but INIT is now no model at all"):
        resume(run, wanted(init=""))


def test_a_model_of_which_nothing_is_known_has_to_keep_its_name(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init: the run has 'base/release', given 'moved/release'"):
        resume(begun(run), wanted(init="moved/release"))
    old, unnamed = tmp_path / "old", {"origin": {"inherited": []}}  # an earlier version kept no identity
    folder.make_run(str(old), IDENTITY | unnamed)
    with pytest.raises(UserError, match=r"init: the run has"):  # before the first step its weights are read
        resume(old, wanted(init="moved/release") | unnamed)
    resume(begun(old), wanted(init="moved/release") | unnamed)


def test_other_data_is_refused_with_the_way_that_is_left(run: Path) -> None:
    with pytest.raises(UserError, match=r"data version dddd.*the data that is left: INIT=.*run/release RUN=<another>"):
        resume(run, IDENTITY | {"dataset_version": "a" * 64})


@pytest.mark.parametrize("name", ["step-020", "step--5", "step-1_0", "step-²", "step-3.bak"])
def test_what_is_no_state_among_the_states_is_named(run: Path, name: str) -> None:
    begun(run)
    shutil.copytree(run / "state" / "step-3", run / "state" / name)
    with pytest.raises(UserError, match=rf"state/ holds {name}, allowed are step-N"):
        folder.steps_of(run)
    assert not state.is_step(name) and state.is_step("step-0") and state.is_step("step-30")
