"""The comparison of patterns: equal updates, equal compute, the paper beside it; a second start trains nothing."""

import json
import math
import shlex
from pathlib import Path

import pytest

from musicgen import patterns
from tests.training.synthetic import write_dataset
from training import ablate, record
from training.config import task_of

SMALL = shlex.split(
    "--size demo --lm.dim 32 --lm.num_layers 1 --lm.num_heads 2 --lm.codebook_size 64 --batch.crop_seconds 1.28 "
    "--batch.size 4 --hardware.precision float32 --hardware.accelerator cpu --codebook_init false --steps 8 "
    "--optim.warmup_steps 2 --log.valid_every 8 --log.state_every 4 --log.every 4"
)


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_two_patterns_are_compared_and_the_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", size=64, tracks=10, valid=3)
    argv = [*SMALL, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    argv += ["--patterns", "[flattening, parallel]"]
    assert ablate.main([*argv, "--batch.word_dropout", "0.1"]) == 0  # a setting of training passes through
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    rows = {row["pattern"]: row for row in found["updates"]}
    assert [row["columns_per_second"] for row in found["updates"]] == [200, 50]
    assert rows["flattening"]["steps"] == rows["parallel"]["steps"] == 8
    assert rows["flattening"]["audio_seconds"] == rows["parallel"]["audio_seconds"] > 30  # the same crops
    for row in found["updates"]:
        last = record.read_metrics(tmp_path / "out" / row["pattern"] / "metrics.jsonl")[-1]
        assert row["loss"] == last["valid/loss"] and row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    # Flattening leads, so parallel, which costs less, gets more steps for the same compute.
    again = {row["pattern"]: row for row in found["compute"]}
    assert again["flattening"] == rows["flattening"] and again["parallel"]["steps"] > 8
    assert again["parallel"]["flop"] == pytest.approx(rows["flattening"]["flop"], rel=0.05)
    table = [line for line in said.splitlines() if line.startswith("| flattening")]
    assert table[0].endswith("| 6000 | 0.86 | 0.51 | 0.37 | 79.71 | 82.03 |")
    assert "OVL (unverified) | REL (unverified)" in said
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")}
    assert ablate.main([*argv, "--batch.word_dropout", "0.1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--out", ""], "out is empty; give a folder"),
        (["--stop_at", "1"], "--stop_at 1 cannot be given .* give fewer as STEPS"),
        (["--lm.pattern=delay"], "--lm.pattern delay cannot be given .* as --patterns"),
        (["--run", "elsewhere"], "--run elsewhere cannot be given .* as OUT"),
        (["--patterns", "delay"], r"""patterns is 'delay'; it must be a list: --patterns '\["delay"\]'"""),
    ],
)
def test_what_the_comparison_sets_itself_is_refused(
    argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=told):
        ablate.main([*SMALL, "--data", str(tmp_path / "none"), "--out", "out", *argv])
    (tmp_path / "mine.yaml").write_text("lm:\n  pattern: delay\n")
    with pytest.raises(ValueError, match=r"--lm.pattern delay cannot be given"):
        ablate.main(["--config", "mine.yaml", "--data", str(tmp_path / "none"), "--out", "out"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_equal_compute_is_equal() -> None:
    assert ablate.equal_steps(300, flop=4.0, reference=1.0) == 75
    assert ablate.equal_steps(300, flop=1.5, reference=1.5) == 300


def test_the_verdict_reads_the_order_and_says_when_it_does_not_show() -> None:
    def rows(**losses: float) -> list[dict]:
        return [{"pattern": name, "loss": loss, "codebooks": [loss] * 4} for name, loss in losses.items()]

    good = ablate.verdict(rows(flattening=6.9, delay=6.92, parallel=7.0))
    assert [": shows, " in line and "less than" not in line for line in good] == [True, True]
    close = ablate.verdict(rows(flattening=6.9, delay=6.9, parallel=6.905))
    assert ["shows, but by less than one run can tell" in line for line in close] == [True, True]
    bad = ablate.verdict(rows(flattening=7.0, delay=6.9, parallel=6.9))
    assert ["DOES NOT SHOW" in line for line in bad] == [True, True]
    assert "delay is -0.100 nats from flattening" in bad[0] and ablate.verdict(rows(delay=1.0)) == []


def test_the_papers_rows_are_patterns_of_ours() -> None:
    assert set(ablate.PAPER) < set(patterns.PATTERNS)
    for name, row in ablate.PAPER.items():
        columns = patterns.num_columns(1500, 4, pattern=name)
        assert abs(columns - row[0]) <= 4, name
    with pytest.raises(ValueError, match="unknown pattern 'diagonal'"):
        ablate.AblateConfig(patterns=("diagonal",))


def test_a_shorter_training_for_equal_compute_is_not_all_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "_train", lambda config: {"pattern": config.lm.pattern, "config": config})
    chosen = ablate.AblateConfig(patterns=("delay", "flattening"))
    data = str(write_dataset(tmp_path / "data", codec={"frame_rate": 75}))
    found = ablate.run_all(chosen, ["--data", data, "--steps", "1000", "--optim.warmup_steps", "400"])
    whole, shorter = (found[table][1]["config"] for table in ("updates", "compute"))
    assert (whole.steps, whole.optim.warmup_steps) == (1000, 400)
    assert shorter.steps < 400 and shorter.optim.warmup_steps == shorter.steps // 10
    assert task_of(whole).frames == whole.batch.crop_seconds * 75
