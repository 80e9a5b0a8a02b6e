"""A run's folder: whose it is, what it was started with, and from which step it goes on.

config.yaml holds settings, data version, codec and text encoder. A run goes on only with the same of them; settings
that do not change what is learned (`_FREE`) may differ between two starts. What is known by its contents, the codec
and the model that the run began from, may have moved to another place. Folders outlive crashes, full disks and hands:
`config_in` is how all read config.yaml, and says what is wrong with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import yaml

from musicgen import about, files, settings
from musicgen.errors import UserError
from training import record, state

# Settings that may change between two starts of one run: none of them changes what is learned. DATA and the codec are
# known by version and identity; a start from the codebooks matters before the first step alone.
_FREE = (
    "run", "data", "cache", "codec", "codebook_init", "stop_at", "hardware", "ray", "log", "licence", "batch.workers",
    "batch.accumulate", "batch.valid_batch", "release_dtype",
)  # fmt: skip
# What config.yaml of a run holds; of those that are named, name and identity are read.
_PARTS = {"settings": dict, "dataset_version": str, "codec": dict, "text_encoder": dict, "wandb_run_id": str}
_NAMED = ("codec", "text_encoder", "base")
_NONE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # no file can stand there


def plain(tree: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def config_in(folder: Path) -> tuple[Any, str]:
    """What config.yaml of a folder holds (None where it cannot be read), and what is wrong with it as that of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    file = folder / "config.yaml"
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            return None, f"it cannot be read: it is {'a folder' if file.is_dir() else 'no file'}"
        config = yaml.safe_load(file.read_bytes())
    except OSError as error:
        if error.errno in _NONE:
            raise FileNotFoundError(error.errno, error.strerror, str(file)) from None
        return None, f"it cannot be read: {error.strerror or error}"
    except RecursionError:
        return None, "it cannot be read: it is nested too deeply"
    except (ValueError, yaml.YAMLError) as error:
        return None, f"it cannot be read: {' '.join(str(error).split())}"
    return ({}, "it is empty") if config is None else (config, _wrong_in(config))


def _wrong_in(config: Any) -> str:
    """What keeps a document from being the config.yaml of a run; empty where nothing does."""
    if not isinstance(config, dict):
        return f"it holds a {type(config).__name__} instead of a run's settings"
    for part, kind in _PARTS.items():
        if part not in config:
            return f"it has no {part}"
        if not isinstance(config[part], kind):
            return f"{part} is {_kind(config[part])} instead of {'a mapping' if kind is dict else 'text'}"
    origin = config.get("origin", {})
    if not isinstance(origin, dict):
        return f"origin is {_kind(origin)} instead of a mapping"
    named = {part: config[part] for part in _NAMED if part in config}
    named |= {"origin.began_from": origin["began_from"]} if "began_from" in origin else {}
    for part, names in named.items():
        if not isinstance(names, dict) or not all(isinstance(names.get(key), str) for key in ("name", "identity")):
            return f"{part} has no name and identity"
    return ""


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"


def stored_config(folder: Path) -> dict[str, Any] | None:
    """config.yaml of a run's folder; None where there is none. Raises `UserError` where it is damaged."""
    try:
        config, wrong = config_in(folder)
        if not wrong:
            settings.flat(config["settings"])
    except FileNotFoundError:
        return None
    except RecursionError:
        wrong = "its settings hold themselves"
    if wrong:
        raise UserError(
            f"RUN={str(folder)!r}: config.yaml is damaged ({wrong}); give another RUN, or restore it from a copy"
        )
    return config


def check_same_run(
    folder: Path, stored: dict[str, Any], wanted: dict[str, Any], defaults: dict[str, Any], *, begun: bool = True
) -> None:
    """Refuse to go on with a run under other settings, another data set, codec, text encoder or beginning.

    Args:
        stored: config.yaml of the run, as `stored_config` gives it.
        wanted: the same of this start.
        defaults: every setting's default.
        begun: the run has made steps, so that its INIT is not read any more unless it is an adapter's base.

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
    free = (*_FREE, "init") if _same_beginning(folder, stored, wanted, begun) else _FREE
    if stored["dataset_version"] != wanted["dataset_version"]:
        raise UserError(
            f"RUN={str(folder)!r} was trained on data version {stored['dataset_version'][:12]}…, DATA now has version "
            f"{wanted['dataset_version'][:12]}…; a run goes on with the data it began with. Give that data set, or "
            "another RUN to start anew, or go on from what this run has learned with the data that is left: "
            f"INIT={folder / 'release'} RUN=<another>"
        )
    # A setting that did not exist when the run began has its default, which is what the run did then.
    before = settings.flat(defaults) | settings.flat(stored["settings"])
    now = settings.flat(wanted["settings"])
    differing = [
        f"{name}: the run has {before.get(name, '(absent)')!r}, given {now.get(name, '(absent)')!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and not any(name == f or name.startswith(f"{f}.") for f in free)
    ]
    if differing:
        raise UserError(
            f"RUN={str(folder)!r} was started with other settings:\n  " + "\n  ".join(differing) + "\n"
            "Give the same settings to go on, or another RUN to start anew"
        )


def _same_beginning(folder: Path, stored: dict[str, Any], wanted: dict[str, Any], begun: bool) -> bool:
    """Whether INIT is, wherever it stands now, the model that the run began from; else its name has to be the same.

    Raises:
        UserError: it is another one.
    """
    ways = (
        ("trains an adapter of the model", stored.get("base"), wanted.get("base")),
        ("began from the model", *(of.get("origin", {}).get("began_from") for of in (stored, wanted))),
    )
    for does, before, now in ways:
        if before and before["identity"] != (now or {}).get("identity"):
            raise UserError(
                f"RUN={str(folder)!r} {does} {before['name']!r} (identity {before['identity'][:12]}…), but INIT is now "
                + (f"another one (identity {now['identity'][:12]}…)" if now else "no model at all")
                + ". Give the model it began with, or another RUN to start anew"
            )
        if before:
            return True
    # A run of an earlier version knows no identity; what its releases say of INIT is kept in its config.yaml.
    return begun and bool(stored.get("origin") and wanted.get("origin"))


def find_run(run: str, wanted: dict[str, Any], defaults: dict[str, Any]) -> tuple[str | None, int]:
    """The W&B id of the run in the folder and the step to go on from; None and 0 where there is no run yet.

    Raises:
        UserError: a run of other settings or with a damaged config.yaml, or a folder of something else.
    """
    folder = Path(run)
    stored = stored_config(folder)
    if stored is not None:
        steps = steps_of(folder)
        check_same_run(folder, stored, wanted, defaults, begun=bool(steps))
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
    taken = files.take_lock(file)
    if taken is False:
        time.sleep(0.2)  # it may be `is_held` that looks
        taken = files.take_lock(file)
    if taken is False:
        raise UserError(
            f"RUN={str(folder)!r} is being trained by {files.lock_owner(file)}; wait for it, end it, or give another "
            "RUN"
        )
    if taken:
        _held[path] = file
        files.sign_lock(file)


def is_held(folder: Path) -> bool | None:
    """Whether a process on this machine trains in a run's folder; None where that cannot be told."""
    path = folder.resolve() / ".lock"
    if path in _held:  # a second file on it, closed, would let go of the first one's lock
        return True
    try:
        file = path.open("r+")
    except OSError:
        return None
    with file:
        free = files.take_lock(file)
    return None if free is None else not free


def make_run(run: str, wanted: dict[str, Any]) -> str:
    """Make the run's folder with its config.yaml; returns the new W&B id.

    Raises:
        UserError: another start has made it in the meantime, or the disk does not take it.
    """
    folder, run_id = Path(os.path.abspath(run)), record.new_run_id()  # `.` has no name
    document = {**wanted, "wandb_run_id": run_id, "made_by": about.software()}
    temporary = folder.with_name(f".{folder.name}.config.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state.write_synced(temporary, yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode())
        try:
            os.link(temporary, folder / "config.yaml")  # fails where there is one, which a replacement would not
            temporary.unlink()
        except FileExistsError:
            temporary.unlink()
            raise UserError(
                f"RUN={run!r} was begun by another process while this one started; give another RUN, or run the same "
                "command again once that one has ended"
            ) from None
        except OSError:  # a file system without links
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
    except OSError as error:
        raise UserError(f"RUN={str(folder)!r} cannot be read: {error.strerror or error}; give another RUN") from None
    except ValueError:
        odd = [p.name for p in (folder / "state").glob("step-*") if not state.is_step(p.name)]
        raise UserError(
            f"RUN={str(folder)!r}: state/ holds {', '.join(sorted(odd))}, allowed are step-N folders alone; move what "
            "else there is out of state/"
        ) from None


def last_progress(folder: Path) -> state.Progress | None:
    """What the newest state of a run knows; None where there is none. Raises `UserError` where it is damaged."""
    steps = steps_of(folder)
    return state.read_progress(folder / "state", steps[-1]) if steps else None
