"""`make runs`: which runs there are, how they stand and what they came from, read from their folders alone.

    python -m training.runs [--folder runs] [--run runs/NAME] [--track ID]

Every folder below with a training's config.yaml is a run. The table has one line each; `--run` tells all about one:
every start with its code, ranks and plan, the data by source, and the chain of models it began from. `--track` tells
which runs may have learned from a track, by themselves or through what they began from.

Folders outlive crashes, full disks and hands: whatever cannot be read of one is said, and the others are listed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from musicgen import settings, weights
from musicgen.errors import UserError
from training import folder as run_folder
from training import lineage, record

if TYPE_CHECKING:
    from rich.table import Table

NO_TERMINAL = 1000  # characters of a line in a file or a pipe
HEAD = ("run", "size", "state", "step", "best valid loss", "data", "from", "code", "starts", "last start")
LEAST_TOLD = ("starts", "code", "data", "from", "last start", "size")  # left out in this order where there is no room


@dataclass(frozen=True)
class RunsConfig:
    """Settings of `python -m training.runs`.

    Args:
        folder: where runs are looked for, at any depth.
        run: tell all about this one instead.
        track: tell which of them may have learned from this track of the catalogue, by its id.
    """

    folder: str = "runs"
    run: str = ""
    track: str = ""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it; `odd` holds what of it cannot be read, in words."""

    folder: Path
    config: dict[str, Any]
    events: list[dict[str, Any]]
    step: int
    best: float | None
    odd: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """One word; see `training.lineage.state_of`. A folder whose config.yaml is damaged is `odd`."""
        return lineage.state_of(self.events, held=run_folder.is_held(self.folder)) if self.config else "odd"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it was started with."""
        return self.config.get("settings", {})

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Its starts, oldest first."""
        return [event for event in self.events if event["event"] == "start"]


def read(folder: Path) -> Run | None:
    """The run in a folder, with what is odd about it; None where there is none."""
    try:
        config, wrong = run_folder.config_in(folder)
    except FileNotFoundError:
        return None
    if wrong and not _tells_enough(config):
        # What is readable and tells of no start is not ours; what is not readable may be W&B's own.
        if "wandb" in folder.parts if config is None else not (folder / lineage.FILE).exists():
            return None
        config = {}
    odd = [f"config.yaml is damaged: {wrong}"] if wrong else []
    metrics = _told(odd, "metrics.jsonl", lambda: record.metrics_of(folder / "metrics.jsonl"))
    losses = [loss for line in metrics if (loss := _finite(line.get("valid/loss"))) is not None]
    events = _told(odd, lineage.FILE, lambda: lineage.read_counted(folder))
    steps = [line["step"] for line in [*metrics, *events]] + _states(folder, odd)
    return Run(folder, config, events, max(steps, default=0), min(losses, default=None), tuple(odd))


def _tells_enough(config: Any) -> bool:
    """Whether it is a run's and can be shown, though a training may miss something in it."""
    return (
        isinstance(config, dict)
        and isinstance(config.get("settings"), dict)
        and isinstance(config.get("dataset_version"), str)
    )


def _finite(value: Any) -> float | None:
    """A number as one that can be shown and compared; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def _told(odd: list[str], name: str, reading: Callable[[], tuple[list[dict[str, Any]], int]]) -> list[dict[str, Any]]:
    """The lines of a file; what cannot be read of it is added to `odd`."""
    try:
        lines, damaged = reading()
    except OSError as error:
        odd.append(f"{name} cannot be read: {error.strerror or _first_line(error)}")
        return []
    if damaged:
        odd.append(f"{name} has {damaged} damaged line{'s' if damaged > 1 else ''}")
    return lines


def _states(folder: Path, odd: list[str]) -> list[int]:
    """Steps of the states; what stands among them or is damaged is added to `odd`."""
    try:
        steps = run_folder.steps_of(folder)
        if steps:
            run_folder.last_progress(folder)
    except UserError as error:
        odd.append(str(error))
        return []
    except OSError as error:
        odd.append(f"state/ cannot be read: {_first_line(error)}")
        return []
    return steps


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def find(folder: Path) -> list[Run]:
    """All runs below, by the time of their last start, newest first."""
    runs = [run for path in sorted(_folders(folder, ())) if (run := read(path)) is not None]
    return sorted(runs, key=lambda run: run.starts[-1]["at"] if run.starts else "", reverse=True)


def _folders(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Folders with a config.yaml, links to folders among them; one that leads back to a folder `above` is not followed.

    What cannot be listed has no runs to show.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        inside = list(os.scandir(folder))
    except OSError:
        return
    if any(entry.name == "config.yaml" for entry in inside):
        yield folder
    for entry in inside:
        if os.path.isdir(entry):
            yield from _folders(folder / entry.name, (*above, here))


def row(run: Run, below: Path) -> tuple[str, ...]:
    """The cells of `HEAD`."""
    last = run.starts[-1] if run.starts else {}
    cells = (
        _name(run, below),
        str(run.settings.get("size", "?")),
        run.state,
        f"{run.step} of {run.settings.get('steps', '?')}",
        "" if run.best is None else f"{run.best:.3f}",
        str(run.config.get("dataset_version", "?"))[:12],
        str(run.settings.get("init") or "new") if run.config else "?",
        _code(last.get("git", {})),
        str(len(run.starts)),
        str(last.get("at", ""))[:16].replace("T", " "),
    )
    return tuple(_shown(cell) for cell in cells)


def _name(run: Run, below: Path) -> str:
    return str(run.folder.relative_to(below)) if run.folder.is_relative_to(below) else str(run.folder)


def _shown(text: str) -> str:
    """A text out of a file or a file's name as a terminal may have it: on one line, without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _code(git: dict[str, Any]) -> str:
    return (str(git["commit"])[:10] + ("+" if git.get("changed") else "")) if git.get("commit") else "?"


def ancestors(source: str, identity: str = "", depth: int = 8) -> list[str]:
    """What a run began from, and what that was trained on, as lines; as far back as the folders are here.

    Args:
        identity: SHA-256 of the weights that it began from, where that is known: another model may stand there now.
    """
    lines: list[str] = []
    while source and depth:
        depth -= 1
        file = (weights.DEMO if source == "demo" else Path(source)) / "config.json"
        try:
            if not file.is_file():
                return [*lines, f"{source} (not a folder here)"]
            about = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return [*lines, f"{source} (its config.json cannot be read: {_first_line(error)})"]
        training, there = _part(about, "training"), str(_part(about, "weights").get("sha256"))
        if identity and identity != there:
            return [*lines, f"{source} (there is another model now: {there[:12]}, it was {identity[:12]})"]
        version = str(training.get("data_version", ""))[:12] or "not stated"
        licence = about.get("licence", "?") if isinstance(about, dict) else "?"
        lines.append(f"{source}: {training.get('step', '?')} steps on data {version}, {licence}")
        source = str(training.get("init") or "")
        identity = _began(about)
    return lines


def _part(tree: Any, name: str) -> dict[str, Any]:
    """A part of a document that is a mapping; empty where it is none."""
    part = tree.get(name) if isinstance(tree, dict) else None
    return part if isinstance(part, dict) else {}


def _identity(config: dict[str, Any], name: str) -> str:
    part = _part(config, name)
    return f"{part.get('name', '?')} {str(part.get('identity', '?'))[:12]}"


def describe(run: Run) -> str:
    """All about one run."""
    config, chosen = run.config, run.settings
    sources = config.get("sources")
    out = [
        f"run       {run.folder}",
        *(f"odd       {what}" for what in run.odd),
        f"state     {run.state} at step {run.step} of {chosen.get('steps', '?')}"
        + (f", best validation loss {run.best:.4f}" if run.best is not None else ""),
    ]
    if config:
        out += [
            f"data      {chosen.get('data', '?')}, version {config['dataset_version'][:12]}, codec "
            f"{_identity(config, 'codec')}",
            *(f"          {source}" for source in map(_json, sources if isinstance(sources, list) else [])),
            f"text      {_identity(config, 'text_encoder')}",
            f"W&B       {config.get('wandb_run_id', '?')}",
        ]
        out += [f"from      {line}" for line in ancestors(str(chosen.get("init") or ""), _began(config))] or [
            "from      new weights"
        ]
    for event in run.events:
        if event["event"] == "start":
            out.append(
                f"start     {event['at']} at step {event['step']}, {event['ranks']} ranks on {event['host']}, "
                f"code {_code(event['git'])}"
            )
            out += [f"            {line}" for line in event["plan"]]
        else:
            out.append(
                f"end       {event['at']} at step {event['step']}: {event['how']} {event.get('error', '')}".rstrip()
            )
    return "\n".join(_shown(line) for part in out for line in part.split("\n"))


def _began(about: Any) -> str:
    """SHA-256 of the weights that a run (config.yaml) or a release (config.json) began from; empty if it is silent."""
    told = _part(about, "base") or _part(about, "began_from") or _part(_part(about, "origin"), "began_from")
    return str(told.get("identity") or "")


def _json(source: Any) -> str:
    return json.dumps(source, ensure_ascii=False, default=str)


def table(rows: Sequence[tuple[str, ...]], width: int) -> tuple[Table, list[str]]:
    """The cells of `HEAD` as a table of at most `width` characters a line, and the columns that had no room."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    left_out: list[str] = []
    for dropped in (None, *LEAST_TOLD):
        left_out += [dropped] if dropped else []
        kept = [i for i, name in enumerate(HEAD) if name not in left_out]
        drawn = Table(*(HEAD[i] for i in kept))
        for cells in rows:
            drawn.add_row(*(Text(cells[i]) for i in kept))
        if Console(width=NO_TERMINAL).measure(drawn).maximum <= width:
            break
    return drawn, left_out


def learned_from(track: str, runs: Sequence[Run]) -> list[str]:
    """Which runs may have learned from a track, as lines: those that draw from it, and those that began from these.

    A run that began from a release which has been replaced or moved since is found by its path alone.
    """
    told, own = dict[Path, str](), list[str]()
    for run in runs:
        try:
            table = lineage.kept_tracks(run.folder)
            found = None if table is None else table.filter(pc.equal(table["track_id"], track)).to_pylist()
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of these kinds
            own.append(f"unknown   {run.folder}: {lineage.TRACKS} cannot be read: {_first_line(error)}")
            continue
        if found is None:
            own.append(f"unknown   {run.folder}: keeps no list of its tracks; it began with an earlier version")
        for row in found or []:
            how = "trained on it" if row["split"] == "train" else "was validated on it"
            about = f"{row['licence']}, from {row['set']}, data {str(run.config.get('dataset_version'))[:12]}"
            told[run.folder] = f"{how} ({about}), {run.state} at step {run.step}"
    while True:
        heirs = {r.folder: found for r in runs if r.folder not in told and (found := _parent(r, told))}
        if not heirs:
            break
        told |= {folder: f"began from {parent}" for folder, parent in heirs.items()}
    return [f"run       {folder}: {how}" for folder, how in told.items()] + own


def _parent(run: Run, among: Iterable[Path]) -> Path | None:
    """The run that a run began from, by its weights or, where those are not there, by its path."""
    init, identity = str(run.settings.get("init") or ""), _began(run.config)
    for folder in among if init else ():
        release = folder / "release"
        if os.path.realpath(init) == os.path.realpath(release):
            return folder
        with contextlib.suppress(OSError, ValueError, RecursionError):
            about = json.loads((release / "config.json").read_bytes())
            if identity and _part(about, "weights").get("sha256") == identity:
                return folder
    return None


def main(argv: Sequence[str]) -> int:
    """Print the table, or all about one run."""
    from rich.console import Console

    config = settings.parse(RunsConfig, argv, prog="python -m training.runs")
    if config.run:
        run = read(Path(config.run))
        if run is None:
            raise UserError(f"RUN={config.run!r} holds no training run (no config.yaml of one); `make runs` lists them")
        print(describe(run))
        return 0
    folder = Path(config.folder)
    runs = find(folder) if os.path.isdir(folder) else []
    if config.track and runs:
        told = learned_from(config.track, runs)
        print("\n".join(_shown(line) for line in told) if told else f"no run in {folder} draws from {config.track!r}")
        return 0
    if not runs:
        print(f"no runs in {folder}; `make train` makes one")
        return 0
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=NO_TERMINAL)
    drawn, left_out = table([row(run, folder) for run in runs], console.width)
    console.print(drawn)
    if left_out:
        print(f"no room here for: {', '.join(left_out)}; RUN=… tells all about one run")
    for run in runs:
        for what in run.odd:
            print(_shown(f"odd: {_name(run, folder)}: {what}"))
    return 0


if __name__ == "__main__":
    settings.run(main)
