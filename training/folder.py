"""A run's folder: whose it is, what it was started with, and from which step it goes on.

config.yaml holds settings, data version, codec and text encoder. A run goes on only with the same of them; settings
that do not change what is learned (`_FREE`) may differ between two starts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import yaml

from musicgen import about
from musicgen.errors import UserError
from training import record, state

# Settings that may change between two starts of one run: none of them changes what is learned.
_FREE = ("run", "data", "cache", "stop_at", "hardware", "ray", "log", "licence", "batch.workers", "batch.accumulate")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def plain(tree: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def check_same_run(folder: Path, stored: dict[str, Any], wanted: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse to go on with a run under other settings, another data set, codec or text encoder.

    Args:
        stored: config.yaml of the run.
        wanted: the same of this start.
        defaults: every setting's default.

    Raises:
        UserError: naming every difference.
    """
    for part, word in (("codec", "codec"), ("text_encoder", "text encoder")):
        if stored[part]["identity"] != wanted[part]["identity"]:
            raise UserError(
                f"RUN={str(folder)!r} was trained with {word} {stored[part]['name']!r} (identity "
                f"{stored[part]['identity'][:12]}…), but now there is {wanted[part]['name']!r} (identity "
                f"{wanted[part]['identity'][:12]}…), whose numbers mean other things. Use the one of the run, or "
                "give another RUN to start anew"
            )
    if stored.get("base") != wanted.get("base") and stored.get("base"):
        raise UserError(
            f"RUN={str(folder)!r} trains an adapter of the model {stored['base']['name']!r} (identity "
            f"{stored['base']['identity'][:12]}…), but INIT is now "
            + (f"another one (identity {wanted['base']['identity'][:12]}…)" if wanted.get("base") else "no base at all")
            + ". Give the model it began with, or another RUN to start anew"
        )
    if stored["dataset_version"] != wanted["dataset_version"]:
        raise UserError(
            f"RUN={str(folder)!r} was trained on data version {stored['dataset_version'][:12]}…, DATA now has version "
            f"{wanted['dataset_version'][:12]}…; a run goes on with the data it began with. Give that data set, or "
            "another RUN to start anew"
        )
    # A setting that did not exist when the run began has its default, which is what the run did then.
    before = flat(defaults) | flat(stored["settings"])
    now = flat(wanted["settings"])
    differing = [
        f"{name}: the run has {before.get(name, '(absent)')!r}, given {now.get(name, '(absent)')!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and not any(name == f or name.startswith(f"{f}.") for f in _FREE)
    ]
    if differing:
        raise UserError(
            f"RUN={str(folder)!r} was started with other settings:\n  " + "\n  ".join(differing) + "\n"
            "Give the same settings to go on, or another RUN to start anew"
        )


def find_run(run: str, wanted: dict[str, Any], defaults: dict[str, Any]) -> tuple[str | None, int]:
    """The W&B id of the run in the folder and the step to go on from; None and 0 where there is no run yet.

    Raises:
        UserError: a run of other settings, or a folder of something else.
    """
    folder = Path(run)
    file = folder / "config.yaml"
    if file.is_file():
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
        check_same_run(folder, stored, wanted, defaults)
        steps = steps_of(folder)
        return stored["wandb_run_id"], steps[-1] if steps else 0
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"RUN={run!r} exists and is not a run of this program (no config.yaml); give a new or empty folder"
        )
    return None, 0


def refused_by_disk(error: Exception) -> str:
    """What the disk said when it took no file: full, over its quota, read-only, broken. Raises any other error."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError):
        raise error
    return cause.strerror or str(cause)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing into a run's folder; a release that it had moved aside comes back."""
    for aside in folder.glob(".release.*.old"):
        if not (folder / "release").exists():
            os.rename(aside, folder / "release")
        shutil.rmtree(aside, ignore_errors=True)
    for left in folder.glob(".release.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for left in (*folder.glob(".metrics.jsonl.tmp"), *(folder / "samples").glob(".*.tmp")):
        left.unlink(missing_ok=True)


_held: dict[Path, Any] = {}


def hold(folder: Path) -> None:
    """Keep a run's folder for this process as long as it lives: two trainings would spoil each other's record.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    path = folder.resolve() / ".lock"
    if path in _held:
        return
    try:
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"RUN={str(folder)!r} cannot be written: {error.strerror or error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        file.seek(0)
        raise UserError(
            f"RUN={str(folder)!r} is being trained by {file.read().strip() or 'another process'}; wait for it, end it, "
            "or give another RUN"
        ) from None
    _held[path] = file
    with contextlib.suppress(OSError):  # a full disk: the lock is held, and only its owner's name is missing
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def make_run(run: str, wanted: dict[str, Any]) -> str:
    """Make the run's folder with its config.yaml; returns the new W&B id."""
    folder, run_id = Path(run), record.new_run_id()
    document = {**wanted, "wandb_run_id": run_id, "made_by": about.software()}
    temporary = folder.with_name(f".{folder.name}.config.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, folder / "config.yaml")
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            folder.rmdir()
        raise UserError(
            f"RUN={run!r} cannot be written: {error.strerror or error}. Free some room or make it writable and run the "
            "same command again, or give another RUN"
        ) from error
    return run_id


def steps_of(folder: Path) -> list[int]:
    """Steps of a run's whole states, ascending.

    Raises:
        UserError: a folder among them whose name is no step, such as a copy `step-20.bak`.
    """
    try:
        return state.steps_in(folder / "state")
    except ValueError:
        odd = [p.name for p in (folder / "state").glob("step-*") if not p.name.removeprefix("step-").isdecimal()]
        raise UserError(
            f"RUN={str(folder)!r}: state/ holds {', '.join(sorted(odd))}, allowed are step-N folders alone; move what "
            "else there is out of state/"
        ) from None


def last_progress(folder: Path) -> state.Progress | None:
    """What the newest state of a run knows; None where there is none. Raises `UserError` where it is damaged."""
    steps = steps_of(folder)
    if not steps:
        return None
    try:
        progress = state.read_progress(folder / "state", steps[-1])
    except (TypeError, AttributeError):  # JSON, but not what a state writes
        progress = None
    if progress is None or not isinstance(progress.step, int):
        raise UserError(
            f"{folder / 'state' / f'step-{steps[-1]}'}: state.json does not hold what this program writes there. "
            "Delete this folder to go on from an earlier state, or give another RUN to start anew"
        )
    return progress
