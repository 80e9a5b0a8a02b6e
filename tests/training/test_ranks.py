"""Two real processes over gloo: copies and shards train as one process does, and a run moves between them."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musicgen import weights
from tests.training.ranks import together, wait_for
from tests.training.synthetic import small_codec, write_dataset
from tests.training.tiny_run import curves as metrics
from training import lineage, record, state, train

SMALL = shlex.split(
    "--size demo --codebook_init false --lm.dim 32 --lm.num_layers 2 --lm.num_heads 2 --lm.codebook_size 64 "
    "--batch.crop_seconds 2.56 --batch.size 8 --batch.valid_batch 2 --optim.lr 1e-2 --optim.warmup_steps 5 "
    "--hardware.precision float32 --hardware.accelerator cpu "
    "--lm.condition.style.dim 8 --lm.condition.style.width 16 --lm.condition.style.min_seconds 0.4 "
    "--lm.condition.style.max_seconds 0.8 "
    "--log.every 1 --log.valid_every 2 --log.state_every 2 --log.clips 0 --steps 4"
)
TWO = ["--hardware.devices", "2"]
BF16 = ["--hardware.precision", "bf16"]
LORA = shlex.split("--lora.rank 4 --optim.ema_every 1 --hardware.checkpointing selective")


def tensors(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return state.tensors(run / "state" / f"step-{step}")


def alike(run: Path, other: Path, lines: int = 6) -> None:
    """The same curves and, within rounding, the same state."""
    rows, others = metrics(run), metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] and len(rows) == lines
    for a, b in zip(rows, others):
        assert a == pytest.approx(b, rel=2e-3), (a, b)
    one, two = tensors(run), tensors(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=5e-4, rtol=2e-3, msg=lambda m, name=name: f"{name}: {m}")


def moved(run: Path, to: Path) -> Path:
    """A run as it stood after step 2."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "state" / "step-4")
    return to


@pytest.mark.parametrize("other, code", [("raise SystemExit(3)", 3), ("time.sleep(60)", "stuck")])
def test_a_rank_that_waits_in_vain_says_where(other: str, code: int | str, tmp_path: Path) -> None:
    begin = "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR2, all_threads=True); "
    with (tmp_path / "log").open("w") as log:
        children = [
            subprocess.Popen([sys.executable, "-c", begin + rest], stderr=log) for rest in ("time.sleep(60)", other)
        ]
    try:
        assert wait_for(children, timeout=60 if code == 3 else 4, grace=2) == ["stuck", code]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert (tmp_path / "log").read_text().count("most recent call first") == (1 if code == 3 else 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two ranks do here, done by one pair of processes, beside the same on one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    codec = small_codec(folder / "codec")
    write_dataset(folder / "data", size=64, valid=5, codec={"name": codec.name, "identity": codec.identity})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train.main([*SMALL, "--data", str(folder / "data"), "--run", str(folder / "one")])
        adapter = [*LORA, "--init", str(folder / "one" / "release")]
        train.main([*SMALL, *adapter, "--data", str(folder / "data"), "--run", str(folder / "one-lora")])

    def job(run: str, *more: str, **rest: Any) -> dict[str, Any]:
        return {"argv": [*SMALL, *TWO, "--data", str(folder / "data"), "--run", str(folder / run), *more], **rest}

    clips = shlex.split("--log.clips 1 --log.clip_seconds 0.3")
    shards = ["--hardware.strategy", "fsdp"]
    shutil.copytree(folder / "data", folder / "lent")
    gone = folder / "lent" / "shards" / "train-00000.tar"
    lent = ["--data", str(folder / "lent"), "--steps", "60", "--log.valid_every", "60", "--log.state_every", "0"]
    first = together(
        [
            job("ddp"),
            job("fsdp", *shards, *clips),
            job("full", *shards, "--hardware.checkpointing", "full", "--batch.accumulate", "2"),
            job("selective", "--hardware.checkpointing", "selective"),
            job("lora", *LORA, "--init", str(folder / "one" / "release")),
            job(
                "asked", *shards, "--steps", "200", signal=[1, signal.SIGUSR1, str(folder / "asked" / "metrics.jsonl")]
            ),
            job("bf16", *shards, *BF16),
            job("withdrawn", *lent, withdraw=[0, str(gone), str(folder / "withdrawn" / "metrics.jsonl")]),
            job("copies", *BF16, "--batch.accumulate", "2"),
            job("casts", *BF16, "--batch.accumulate", "2", casts=True),
            *(job(f"no-room-{how}", "--log.state_background", how, full=[1, 20_000]) for how in ("on", "off")),
        ],
        folder / "first",
    )
    shutil.copy(folder / "data" / "shards" / gone.name, gone)
    for run in ("ddp", "fsdp"):
        moved(folder / run, folder / f"from-{run}")
        moved(folder / run, folder / f"alone-{run}")
    for run in ("ddp", "fsdp", "bf16"):
        moved(folder / run, folder / f"again-{run}")
    spoiled = moved(folder / "fsdp", folder / "spoiled")
    for file in (spoiled / "state" / "step-2").glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            about = stored.metadata()
        broken = load_file(file)
        broken["model/out_norm.weight"][-1] = torch.inf
        save_file(broken, file, about)
    second = together(
        [
            job("from-ddp", *shards),
            job("from-fsdp"),
            job("spoiled", *shards),
            job("again-ddp"),
            job("again-fsdp", *shards, *clips),
            job("again-bf16", *shards, *BF16),
            job("withdrawn", *lent),
        ],
        folder / "second",
    )
    done = [*first[:5], first[6], *first[8:10], *second[:2], *second[3:]]
    assert done == [["ok", "ok"]] * 14
    (folder / "withdrawn" / "became").write_text("\n".join(first[7]))
    (folder / "asked" / "became").write_text("\n".join(first[5]))
    for run, became in zip(("no-room-on", "no-room-off"), first[10:], strict=True):
        (folder / run / "became").write_text("\n".join(became))
    (folder / "spoiled" / "became").write_text("\n".join(second[2]))
    return folder


@pytest.mark.parametrize("run", ["ddp", "fsdp", "full"])
def test_seconds_of_communication_are_part_of_the_step(place: Path, run: str) -> None:
    rows = [row for row in record.read_metrics(place / run / "metrics.jsonl") if "seconds/step" in row]
    for row in rows[1:]:  # copies have no account before their first step
        shown, total = (row[name] for name in record.NAMES if name.startswith("seconds/communication"))
        assert 0 <= shown <= total and total > 0, row
        if run != "ddp":  # whose figures may be those of the step before
            assert shown > 0 and total < row["seconds/forward"] + row["seconds/backward"], row


@pytest.mark.parametrize("run", ["ddp", "fsdp", "full", "selective"])
def test_two_ranks_make_the_steps_of_one(place: Path, run: str) -> None:
    alike(place / run, place / "one")


@pytest.mark.parametrize("run", ["ddp", "fsdp", "bf16"])
def test_two_ranks_go_on_to_the_bit(place: Path, run: str) -> None:
    """Resumed on the same ranks: the losses and every tensor of the state are those of the run made in one go."""
    once, again = tensors(place / run), tensors(place / f"again-{run}")
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    assert metrics(place / run) == metrics(place / f"again-{run}")


def test_copies_of_two_ranks_whose_parts_share_a_cast_train_as_with_a_cast_each(place: Path) -> None:
    shared, each = tensors(place / "copies"), tensors(place / "casts")
    assert shared.keys() == each.keys() and all(torch.equal(shared[name], each[name]) for name in each)
    assert metrics(place / "copies") == metrics(place / "casts")


def test_two_ranks_train_the_adapter_of_one(place: Path) -> None:
    alike(place / "lora", place / "one-lora", lines=7)  # a validation before the first step
    assert all(".lora_" in name for name in tensors(place / "lora"))


def test_sharded_ranks_write_their_parts_and_release_the_whole(place: Path) -> None:
    for run, step in (("fsdp", 2), ("fsdp", 4)):
        files = sorted((place / run / "state" / f"step-{step}").glob("shard-*.safetensors"))
        sizes = [file.stat().st_size for file in files]
        assert len(files) == 2 and max(sizes) < 1.5 * min(sizes)
    lm, info = weights.load_release(place / "fsdp" / "release")
    averaged = tensors(place / "fsdp", info["training"]["step"])
    for name, tensor in lm.state_dict().items():
        assert torch.equal(tensor, averaged[f"ema/{name}"].half().float())
    names = [f.name for f in sorted((place / "fsdp" / "samples").iterdir())]
    assert names == ["ceiling-0.wav", "step-0000004-0.json", "step-0000004-0.wav"]


@pytest.mark.parametrize("run", ["from-ddp", "from-fsdp"])
def test_a_run_goes_on_under_the_other_strategy(place: Path, run: str) -> None:
    alike(place / run, place / "one")


@pytest.mark.parametrize("run", ["alone-ddp", "alone-fsdp"])
def test_a_run_of_two_ranks_goes_on_alone(place: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train.main([*SMALL, "--data", str(place / "data"), "--run", str(place / run)])
    alike(place / run, place / "one")


def test_a_signal_to_one_rank_saves_on_all_and_asks_to_be_run_again(place: Path) -> None:
    became = (place / "asked" / "became").read_text().splitlines()
    assert became == [f"exit {train.EXIT_REQUEUE}", "ok"]  # rank 0 speaks for all
    rows = [row["step"] for row in metrics(place / "asked") if "train/loss" in row]
    assert state.steps_in(place / "asked" / "state")[-1] == rows[-1] < 200


def test_music_withdrawn_in_mid_run_stops_all_ranks_with_their_state_saved(place: Path) -> None:
    became = (place / "withdrawn" / "became").read_text().splitlines()
    assert "train-00000.tar is gone (deleted or withdrawn)" in became[0] and became[1:] == ["ok"]
    start, failed, again, done = lineage.read(place / "withdrawn")
    step = failed["step"]
    assert failed["how"] == "failed" and f"saved its state of step {step}" in became[0] and 1 < step < 60
    assert again["step"] == step and done["how"] == "done" and start["step"] == 0
    rows = [row["step"] for row in metrics(place / "withdrawn") if "train/loss" in row]
    assert rows == [*range(1, 61)]


def test_a_loss_that_is_not_finite_stops_all_ranks(place: Path) -> None:
    became = (place / "spoiled" / "became").read_text().splitlines()
    assert became[1:] == ["ok"] and became[0].startswith("NonFiniteLoss: the loss is not finite at step 3 (tracks 0")
    assert state.steps_in(place / "spoiled" / "state") == [2]


@pytest.mark.parametrize("background", ["on", "off"])
def test_a_last_state_that_one_rank_cannot_write_ends_all_in_words(place: Path, background: str) -> None:
    run = place / f"no-room-{background}"
    became = (run / "became").read_text().splitlines()
    said = r"SharedError: the state of step 4 could not be written to .*: File too large\. The last whole state is none"
    assert re.match(said, became[0]) and became[1:] == ["ok"]
    assert lineage.read(run)[-1]["how"] == "failed" and list((run / "state").iterdir()) == []


@pytest.mark.slow
def test_hybrid_sharding_over_two_groups_of_two(place: Path, tmp_path: Path) -> None:
    hybrid = shlex.split("--hardware.devices 4 --hardware.strategy hybrid --hardware.shard_group 2")
    argv = [*SMALL, *hybrid, "--data", str(place / "data"), "--run"]
    jobs = [{"argv": [*argv, str(tmp_path / f"{parts}"), "--batch.accumulate", f"{parts}"]} for parts in (1, 2)]
    assert together(jobs, tmp_path / "work", ranks=4) == [["ok"] * 4] * 2
    for parts in (1, 2):  # with two the mirrors sum once what both left
        alike(tmp_path / f"{parts}", place / "one")
