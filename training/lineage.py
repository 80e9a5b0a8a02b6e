"""What a run came from, and what became of it: `runs/NAME/starts.jsonl`, a line per start and one per end.

A start tells the step, the state of the code, the machine and the plan; an end tells why. A run whose last start has no
end is still going on, where its process lives on this machine, or was killed. `runs/NAME/tracks.parquet` holds the
tracks that its crops are drawn from. `training.runs` reads both.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from musicgen import files
from pipelines import shard, store
from training import record

if TYPE_CHECKING:
    from training.sources import Sources

log = logging.getLogger(__name__)

FILE = "starts.jsonl"
TRACKS = "tracks.parquet"
HERE = Path(__file__).resolve().parent

# What a line must hold to count as a start or an end.
_SHAPE: dict[str, dict[str, type]] = {
    "start": {"at": str, "step": int, "ranks": int, "git": dict, "host": str, "pid": int, "plan": list},
    "end": {"at": str, "step": int, "how": str},
}


def git_state(folder: Path = HERE) -> dict[str, Any]:
    """Commit of the code and whether files differ from it; empty where the code is no git checkout."""

    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "changed": bool(ask("status", "--porcelain", "--untracked-files=no", "--", ".")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def keep_tracks(folder: Path, shards: Sources) -> None:
    """Write down, once, which tracks the crops of a run are drawn from: the data set itself changes with its catalogue.

    Raises:
        UserError: the disk does not take it.
    """
    place = folder / TRACKS
    if place.is_file():
        return
    rows = np.concatenate([shards.rows("train"), shards.rows("valid")])
    table = shards.index.select(("track_id", "key", "artist", "licence", "split")).take(pa.array(rows))
    sets = pa.array([str(shards.sets[number].root) for number in shards.source[rows]], pa.string())
    files.write_bytes(place, shard.table_bytes(table.append_column("set", sets)))


def kept_tracks(folder: Path) -> pa.Table | None:
    """What `keep_tracks` wrote; None where there is none. Raises `OSError` or `ValueError` where it is damaged."""
    try:
        return store.parquet((folder / TRACKS).read_bytes())
    except FileNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def began(folder: Path, *, step: int, steps: int, ranks: int, plan: Sequence[str], git: Mapping[str, Any]) -> None:
    """Add the line of a start at `step` of `steps`. Raises `UserError` where it cannot be written."""
    line = {"event": "start", "at": _now(), "step": step, "steps": steps, "ranks": ranks, "git": dict(git)}
    try:
        _add(folder, line | {"host": platform.node(), "pid": os.getpid(), "plan": list(plan)})
    except OSError as error:
        raise record.cannot_write(folder / FILE, error) from error


def ended(folder: Path, *, step: int, how: str, error: str = "") -> None:
    """Add the line of an end: `how` is done, paused (at stop_at), left (asked by a signal), interrupted (Ctrl-C)
    or failed.

    A disk that does not take it is told of and hides nothing of what ended the run.
    """
    try:
        _add(folder, {"event": "end", "at": _now(), "step": step, "how": how, **({"error": error} if error else {})})
    except OSError as problem:
        log.warning("%s cannot be written (%s); the end of the run is not in it", folder / FILE, problem.strerror)


def _add(folder: Path, line: Mapping[str, Any]) -> None:
    record.append_whole(folder / FILE, (json.dumps(line, ensure_ascii=False) + "\n").encode())


def read(folder: Path) -> list[dict[str, Any]]:
    """All starts and ends of a run, oldest first; lines that are none, such as one cut by a kill, are left out.

    Raises:
        OSError: as `record.lines_of`.
    """
    return read_counted(folder)[0]


def read_counted(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Starts and ends as `read` gives them, and how many whole lines are neither."""
    lines, odd = record.lines_of(folder / FILE, "event")
    events = [line for line in lines if _is_event(line)]
    return events, odd + len(lines) - len(events)


def _is_event(line: Mapping[str, Any]) -> bool:
    event = line["event"]
    shape = _SHAPE.get(event) if isinstance(event, str) else None
    return shape is not None and all(type(line.get(name)) is kind for name, kind in shape.items())


def state_of(events: Sequence[Mapping[str, Any]], *, held: bool | None = None) -> str:
    """How a run stands: as its last end says (see `ended`), else running or killed.

    It is unknown for a run without events, or on another machine.

    Args:
        held: whether a process keeps the run's folder (`folder.is_held`), since the number of one that was killed may
            be another's by now; None where that cannot be told.
    """
    if not events:
        return "unknown"
    last = events[-1]
    if last["event"] == "end":
        return str(last["how"])
    if last["host"] != platform.node():
        return "unknown"
    return "running" if held is not False and _lives(int(last["pid"])) else "killed"


def _lives(pid: int) -> bool:
    if pid <= 0:  # to `kill` a group of processes, or all of them
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
