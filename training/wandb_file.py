"""Reads what W&B keeps of a run on this disk: a .wandb file is a LevelDB log of protobuf records (its public format).

A process that is killed takes with it what W&B's own process had not written yet, some 30 KB of curves. The next start
reads here how far they came and sends the rest again from metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
WHOLE, LAST = 1, 4  # kinds of pieces that end a record


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, in order, up to one that a kill has cut short.

    Raises:
        ValueError: it is no such file.
    """
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2  # made when it is imported, so that types know nothing of it

    data = path.read_bytes()
    if len(data) < HEADER or struct.unpack("<4sH", data[:6]) != (b":W&B", 0xBEE1):
        raise ValueError(f"{path} is no file of W&B")
    parts, at = [], HEADER
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _crc, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER
        if kind == 0 or at + length > len(data):  # not written any more
            return
        parts.append(data[at : at + length])
        at += length
        if kind in (WHOLE, LAST):
            record = proto.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def name_of(item: Any) -> str:
    """What a value of a logged row is called."""
    return item.key or "/".join(item.nested_key)


def last_value(folder: Path, key: str) -> int | None:
    """The highest `key` of all rows below `folder` (a run's own), None where no file that can be read holds one."""
    found: list[int] = []
    for path in folder.glob("wandb/*run-*/run-*.wandb"):
        with contextlib.suppress(Exception):  # anything may stand there, and the newest is only being made
            rows = [r.history.item for r in records(path) if r.WhichOneof("record_type") == "history"]
            found += [int(i.value_json) for items in rows for i in items if name_of(i) == key]
    return max(found, default=None)
