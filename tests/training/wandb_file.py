"""What W&B's own process has written of an offline run, once it has."""

import json
import time
from pathlib import Path
from typing import Any

from training import wandb_file


def records(path: Path, seconds: float = 60.0) -> list[Any]:
    """All records of a finished run's .wandb file; raises on a file that is not one.

    W&B's own process writes the last of them after `finish` has returned: so long is waited for the run's end in them.
    """
    until = time.monotonic() + seconds
    while True:
        found = [*wandb_file.records(path)]
        if any(r.WhichOneof("record_type") == "exit" for r in found) or time.monotonic() > until:
            return found
        time.sleep(0.1)


def history(path: Path, seconds: float = 60.0) -> list[dict[str, Any]]:
    """The logged rows, in order, values parsed from JSON."""
    rows = [r.history.item for r in records(path, seconds) if r.WhichOneof("record_type") == "history"]
    return [{wandb_file.name_of(i): json.loads(i.value_json) for i in items} for items in rows]


def run_id(path: Path) -> str:
    """Id of the run in the file."""
    return next(r.run.run_id for r in records(path) if r.WhichOneof("record_type") == "run")
