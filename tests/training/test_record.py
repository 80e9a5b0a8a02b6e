"""The record outlives damage, and W&B's address can be anything."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import wandb_file
from training import record


def test_a_damaged_record_keeps_what_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(
        b'{"step": 1, "train/loss": 4.0}\n{"valid/loss": 1.0}\n[1]\n{"step": "x"}\n{"step": null}\n{"step": true}\n'
        b'{"step": 2, "note": "\xff"}\n\xff\xfe\n{"step": 3, "train/lo{"step": 3, "train/loss": 3.0}\n'
        b'{"step": 4, "train/loss": 2.0}\n{"step": 5, "train/loss": 1.0}\n{"step": 6, "tra'
    )
    assert [row["step"] for row in record.read_metrics(file)] == [1, 2, 3, 4, 5]
    with caplog.at_level(logging.WARNING):
        journal = record.MetricsFile(file, 4)
    assert "metrics.jsonl: damaged lines are left out (6)" in caplog.text
    journal.append(5, {"train/loss": 0.5})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row.get("train/loss")) for row in rows] == [(1, 4.0), (2, None), (3, 3.0), (4, 2.0), (5, 0.5)]
    assert record.read_metrics(tmp_path) == record.read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize("address", ["http://host:abc", "http://[::1", "http://a..b", "http://host:99999", "nonsense"])
@pytest.mark.parametrize("mode", ["", "online"])
def test_an_address_that_is_none_leaves_the_record_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str, mode: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert record.wandb_mode() == "offline"
    assert f"WANDB_BASE_URL={address!r} is no address" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert record.wandb_mode() == "disabled"


def test_a_run_is_recorded_offline_where_the_address_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://host:abc")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = record.wandb_logger(tmp_path, "abc", {"size": "demo"}, {"git": {}})
    journal = record.Record(tmp_path, 0, logger)
    journal.log(1, {"train/loss": 1.0})
    journal.finish()
    rows = wandb_file.history(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    assert [row["train/loss"] for row in rows] == [1.0]


def test_what_wandb_lost_with_a_killed_process_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = (
        "import os, signal, sys; from pathlib import Path; from training import record; folder = Path(sys.argv[1]); "
        "journal = record.Record(folder, 0, record.wandb_logger(folder, 'lost', {})); "
        "[journal.log(step, {'x': step / 2, 'y' * 500: 0.0}) for step in range(1, 71)]; "
        "os.killpg(0, signal.SIGKILL)"
    )
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # W&B's own process of these tests, which would live on
    subprocess.run([sys.executable, "-c", job, str(tmp_path)], start_new_session=True)
    [killed] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    first = wandb_file.history(killed, seconds=0)
    assert 0 < len(first) < 65 and len(record.read_metrics(tmp_path / "metrics.jsonl")) == 70
    for name, damage in (("empty", b""), ("other", b"{}" * 99), ("cut", killed.read_bytes()[:100] + b"\xff" * 99)):
        (tmp_path / "wandb" / f"run-{name}").mkdir()
        (tmp_path / "wandb" / f"run-{name}" / "run-lost.wandb").write_bytes(damage)
    time.sleep(1.1)  # W&B names its folders by the second
    journal = record.Record(tmp_path, 65, record.wandb_logger(tmp_path, "lost", {}))
    journal.log(66, {"x": 7.0})
    journal.finish()
    [again] = {*tmp_path.glob("wandb/offline-run-*/*.wandb")} - {killed}
    rows = [*first, *wandb_file.history(again)]
    assert [row[record.STEP] for row in rows] == [row["_step"] for row in rows] == [*range(1, 67)]
    assert [row["x"] for row in rows] == [step / 2 for step in range(1, 66)] + [7.0]
