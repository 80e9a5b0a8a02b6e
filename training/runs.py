"""`make runs`: which runs there are, how they stand and what they came from, read from their folders alone.

    python -m training.runs [--folder runs] [--run runs/NAME]

Every folder below with a training's config.yaml is a run. The table has one line each; `--run` tells all about one:
every start with its code, ranks and plan, the data by source, and the chain of models it began from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from musicgen import settings
from musicgen.errors import UserError
from training import lineage, record, state

HEAD = ("run", "size", "state", "step", "best valid loss", "data", "from", "code", "starts", "last start")


@dataclass(frozen=True)
class RunsConfig:
    """Settings of `python -m training.runs`.

    Args:
        folder: where runs are looked for, at any depth.
        run: tell all about this one instead.
    """

    folder: str = "runs"
    run: str = ""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    folder: Path
    config: dict[str, Any]
    events: list[dict[str, Any]]
    step: int
    best: float | None

    @property
    def state(self) -> str:
        """One word; see `training.lineage.state_of`."""
        return lineage.state_of(self.events)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Its starts, oldest first."""
        return [event for event in self.events if event["event"] == "start"]


def read(folder: Path) -> Run | None:
    """The run in a folder; None where there is none that this program can read."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    if not isinstance(config, dict) or "settings" not in config or "dataset_version" not in config:
        return None
    lines = record.read_metrics(folder / "metrics.jsonl")
    losses = [line["valid/loss"] for line in lines if "valid/loss" in line]
    events = lineage.read(folder)
    steps = [int(line["step"]) for line in [*lines, *events]] + state.steps_in(folder / "state")
    return Run(folder, config, events, max(steps, default=0), min(losses, default=None))


def find(folder: Path) -> list[Run]:
    """All runs below, by the time of their last start, newest first."""
    runs = [run for path in sorted(folder.rglob("config.yaml")) if (run := read(path.parent)) is not None]
    return sorted(runs, key=lambda run: run.starts[-1]["at"] if run.starts else "", reverse=True)


def row(run: Run, below: Path) -> tuple[str, ...]:
    """The cells of `HEAD`."""
    chosen, last = run.config["settings"], run.starts[-1] if run.starts else {}
    return (
        str(run.folder.relative_to(below)) if run.folder.is_relative_to(below) else str(run.folder),
        str(chosen["size"]),
        run.state,
        f"{run.step} of {chosen['steps']}",
        "" if run.best is None else f"{run.best:.3f}",
        str(run.config["dataset_version"])[:12],
        str(chosen.get("init") or "new"),
        _code(last.get("git", {})),
        str(len(run.starts)),
        str(last.get("at", ""))[:16].replace("T", " "),
    )


def _code(git: dict[str, Any]) -> str:
    return (git["commit"][:10] + ("+" if git.get("changed") else "")) if git else "?"


def ancestors(source: str, depth: int = 8) -> list[str]:
    """What a run began from, and what that was trained on, as lines; as far back as the folders are here."""
    lines: list[str] = []
    while source and depth:
        depth -= 1
        folder = Path(source)
        if not (folder / "config.json").is_file():
            return [*lines, f"{source} (not a folder here)"]
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        training = about.get("training", {})
        version = str(training.get("data_version", ""))[:12] or "not stated"
        lines.append(f"{source}: {training.get('step', '?')} steps on data {version}, {about.get('licence', '?')}")
        source = training.get("init", "")
    return lines


def describe(run: Run) -> str:
    """All about one run."""
    config, chosen = run.config, run.config["settings"]
    out = [
        f"run       {run.folder}",
        f"state     {run.state} at step {run.step} of {chosen['steps']}"
        + (f", best validation loss {run.best:.4f}" if run.best is not None else ""),
        f"data      {chosen['data']}, version {config['dataset_version'][:12]}, codec {config['codec']['name']} "
        f"{config['codec']['identity'][:12]}",
        *(f"          {json.dumps(source, ensure_ascii=False)}" for source in config.get("sources", [])),
        f"text      {config['text_encoder']['name']} {config['text_encoder']['identity'][:12]}",
        f"W&B       {config['wandb_run_id']}",
    ]
    out += [f"from      {line}" for line in ancestors(str(chosen.get("init") or ""))] or ["from      new weights"]
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
    return "\n".join(out)


def main(argv: Sequence[str]) -> int:
    """Print the table, or all about one run."""
    from rich.console import Console
    from rich.table import Table

    config = settings.parse(RunsConfig, argv, prog="python -m training.runs")
    if config.run:
        run = read(Path(config.run))
        if run is None:
            raise UserError(f"RUN={config.run!r} holds no training run (no config.yaml of one); `make runs` lists them")
        print(describe(run))
        return 0
    folder = Path(config.folder)
    runs = find(folder) if folder.is_dir() else []
    if not runs:
        print(f"no runs in {folder}; `make train` makes one")
        return 0
    table = Table(*HEAD)
    for run in runs:
        table.add_row(*row(run, folder))
    Console().print(table)
    return 0


if __name__ == "__main__":
    settings.run(main)
