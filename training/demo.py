"""The demo: a licensed catalogue becomes tokens, a model learns from them, and a page plays what it makes.

    python -m training.demo            (make demo)

Four steps, each the same command or function that works alone: ingest, train, clips, report. Each leaves whole
results and finds its own earlier ones, so the demo can be stopped at any time and started again: it goes on where it
was. `steps.json` in the folder keeps how long each step took when it last did something.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from musicgen import files, settings, weights
from musicgen.errors import UserError
from musicgen.sampling import SamplingConfig
from pipelines import catalog
from pipelines.shard import ShardSet
from training import report

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class DemoConfig:
    """How large the demo is and where it goes.

    Args:
        folder: everything the demo makes: data, run, clips, report.
        catalog: the catalogue to start from.
        limit: use that many rows of the catalogue, spread evenly over it; 0 uses all.
        size: the model's size name.
        steps: training steps; 0 takes the number that configs/train/<size>.yaml gives.
        shipped: the model to compare with; empty for none.
        clips: prompts that are played in the report.
        seconds: length of each clip.
        seed: seed of the training and of the clips.
        ingest: further settings of ingest, as words: `--ingest '["--run.workers", "2"]'`.
        train: further settings of training, as words.
        sampling: as in generation.
    """

    folder: str = "runs/demo"
    catalog: str = "musicgen/assets/catalogue/catalog.jsonl"
    limit: int = 0
    size: str = "demo"
    steps: int = 0
    shipped: str = "demo"
    clips: int = 6
    seconds: float = 10.0
    seed: int = 2036
    ingest: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for name in ("limit", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (all) or a number")


def part_of(catalog_uri: str, limit: int, target: Path) -> str:
    """A catalogue with `limit` rows spread evenly over the given one, audio addresses made absolute; its path."""
    book = catalog.read(catalog_uri)
    count = min(limit, len(book.rows))
    chosen = [book.rows[i * len(book.rows) // count] for i in range(count)]
    lines = []
    for row in chosen:
        values = dict(row.values)
        if values.get("uri"):
            values["uri"] = book.folder.join(values["uri"]).uri
        lines.append(json.dumps(values, ensure_ascii=False))
    content = ("\n".join(lines) + "\n").encode("utf-8")
    if not target.is_file() or target.read_bytes() != content:
        files.write_bytes(target, content)
    return str(target)


class Steps:
    """The record of the demo's steps: each is announced, timed, and kept in steps.json with what it made.

    Args:
        path: steps.json.
        total: number of steps, for the announcements.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path, total
        self.done: list[dict[str, Any]] = []
        try:
            self.before = {s["name"]: s for s in json.loads(path.read_text(encoding="utf-8"))}
        except (FileNotFoundError, ValueError):
            self.before = {}

    def run(self, name: str, what: str, act: Callable[[], None], made: Callable[[], tuple[str, str]]) -> None:
        """Do a step.

        Args:
            name: of the step.
            what: for the announcement.
            act: does it, or finds that it is done.
            made: afterwards: an identity of the result, and a sentence about it. When the identity is the one
                recorded earlier, nothing was done and the earlier time stands.
        """
        print(f"\n[{len(self.done) + 1}/{self.total}] {name}: {what}", flush=True)
        began = time.monotonic()
        act()
        seconds = time.monotonic() - began
        identity, text = made()
        earlier = self.before.get(name)
        if earlier and earlier["made"] == identity:
            seconds = earlier["seconds"]
            print(f"      {name} was already whole", flush=True)
        self.done.append({"name": name, "seconds": round(seconds, 1), "text": text, "made": identity})
        content = json.dumps(self.done, indent=2, ensure_ascii=False) + "\n"
        files.write_bytes(self.path, content.encode("utf-8"))


def command(name: str, module: str, arguments: Sequence[str]) -> None:
    """Run one of our commands as its own process, its output shown as it comes.

    Raises:
        UserError: it did not end well.
    """
    ended = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if ended.returncode:
        raise UserError(
            f"the step {name!r} ended with exit code {ended.returncode}, its message is above "
            f"(python -m {module} {' '.join(arguments)}); mend that and run the demo again: it goes on from there"
        )


def demo(config: DemoConfig) -> Path:
    """Run what is missing of the four steps; returns the report's path.

    Raises:
        UserError: a step failed; what was done before it stays.
    """
    from rich.progress import Progress

    folder = Path(config.folder)
    data, run = folder / "data", folder / "run"
    steps = Steps(folder / "steps.json", total=4)
    source = part_of(config.catalog, config.limit, folder / "catalog.jsonl") if config.limit else config.catalog

    ingest = ["--config", str(CONFIGS / "ingest" / "demo.yaml"), "--catalog", source, "--out", str(data)]
    steps.run(
        "ingest",
        f"{source} to {data}",
        lambda: command("ingest", "pipelines.ingest", [*ingest, *config.ingest]),
        lambda: _describe_data(str(data)),
    )
    train = ["--size", config.size, "--data", str(data), "--run", str(run), "--seed", str(config.seed)]
    train += ["--steps", str(config.steps)] if config.steps else []
    steps.run(
        "train",
        f"size {config.size} in {run}",
        lambda: command("train", "training.train", [*train, *config.train]),
        lambda: _describe_run(run),
    )
    plan = report.ReportConfig(
        folder=config.folder,
        catalog=source,
        shipped=config.shipped,
        clips=config.clips,
        seconds=config.seconds,
        seed=config.seed,
        sampling=config.sampling,
    )

    def clips() -> None:
        with Progress(transient=True) as bar:
            task = bar.add_task("      clips", total=None)
            report.make_clips(plan, lambda done, total: bar.update(task, completed=done, total=total))

    steps.run("generate", f"{config.clips} prompts to {folder / 'clips'}", clips, lambda: _describe_clips(folder))
    target = folder / "report" / "index.html"

    def write_report() -> None:
        report.build(plan, steps.done)

    steps.run("report", str(target), write_report, lambda: ("", "one page, everything inside"))
    return target


def _describe_data(data: str) -> tuple[str, str]:
    found = ShardSet.open(data)
    counts = found.info["counts"]
    text = f"{counts['rows']} rows: {counts['tracks']} tracks ({60 * counts['hours']:.0f} min) in shards, "
    return found.info["dataset_version"], f"{text}{counts['rejects']} rejected with a reason"


def _describe_run(run: Path) -> tuple[str, str]:
    info = weights.read_info(run / "release")
    training = info["training"]
    seen = training["audio_seconds_seen"] / 3600
    text = f"{info['weights']['parameters']:,} parameters; best at step {training['step']}, {seen:.2f} h of audio seen"
    if training.get("valid_loss") is not None:
        text += f", validation loss {training['valid_loss']:.3f} nats"
    return info["weights"]["sha256"], text


def _describe_clips(folder: Path) -> tuple[str, str]:
    raw = (folder / "clips" / "clips.json").read_text(encoding="utf-8")
    clips = json.loads(raw)["clips"]
    made = sum(c["seed"] is not None for c in clips)
    return hashlib.sha256(
        raw.encode()
    ).hexdigest(), f"{made} generated clips, {len(clips) - made} of the codec and the originals"


def main(argv: Sequence[str]) -> int:
    """`python -m training.demo`: see `DemoConfig`."""
    config = settings.parse(
        DemoConfig, argv, layers=[CONFIGS / "demo" / "default.yaml"], prog="python -m training.demo"
    )
    began = time.monotonic()
    target = demo(config)
    print(f"\nthe demo took {report.duration_text(time.monotonic() - began)}; open {target.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    settings.run(main)
