"""Reads an offline W&B run back: the .wandb file is a LevelDB log of protobuf records (public format)."""

import json
import struct
import time
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(path: Path, seconds: float = 60.0) -> list[Any]:
    """All records of a finished run's .wandb file; raises on a file that is not one.

    W&B's own process writes the last of them after `finish` has returned: so long is waited for the run's end in them.
    """
    until = time.monotonic() + seconds
    while True:
        found = _records(path)
        if any(r.WhichOneof("record_type") == "exit" for r in found) or time.monotonic() > until:
            return found
        time.sleep(0.1)


def _records(path: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    ident, magic, _version = struct.unpack("<4sHB", data[:HEADER])
    assert (ident, magic) == (b":W&B", 0xBEE1)
    found, parts, at = [], [], HEADER
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _crc, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts.append(data[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            if len(data) < at:  # a record that is still being written
                break
            record.ParseFromString(b"".join(parts))
            found.append(record)
            parts = []
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, in order, values parsed from JSON."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
    return rows


def run_id(path: Path) -> str:
    """Id of the run in the file."""
    return next(r.run.run_id for r in records(path) if r.WhichOneof("record_type") == "run")
