"""state.json out of the hands of users: what is wrong with it is found once, when it is read, and said in words."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from musicgen.errors import UserError
from tests.training.test_optim import fresh, trained
from training import folder, state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with one state, of step 4."""
    write(tmp_path, best_loss=1.5, best_step=2)
    return tmp_path


def write(run: Path, **known: Any) -> None:
    model, optimizer, ema = fresh()
    trained(4, model, optimizer, ema)
    saver = state.Saver(run / "state", background=False)
    saver.save(model, ema, optimizer, state.Progress(step=4, audio_seconds_seen=9.5, **known))
    assert saver.ended() is None


def refused(run: Path, said: str, step: int = 4) -> None:
    """Both readers of a state say the same."""
    model, optimizer, ema = fresh()
    readers: list[Callable[[], Any]] = [
        lambda: folder.last_progress(run),
        lambda: state.load(run / "state", step, model, ema, optimizer),
    ]
    for read in readers:
        with pytest.raises(UserError, match=rf"state/step-{step} .*state\.json.*{said}.*Delete this folder to go on"):
            read()


def test_a_state_that_was_written_is_read(run: Path) -> None:
    progress = folder.last_progress(run)
    assert progress == state.Progress(4, 9.5, 1.5, 2, progress.ema_count if progress else 0.0)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "Expecting value"),
        (b"\0" * 50, "can't decode"),
        (b"\xff\xfe{", "can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "it is no mapping"),
        (b'["optimizer"]', "it is no mapping"),
        (b"null", "it is no mapping"),
        (b"{}", "it has no step"),
    ],
)
def test_what_is_no_document_of_a_state(run: Path, raw: bytes, said: str) -> None:
    (run / "state" / "step-4" / "state.json").write_bytes(raw)
    refused(run, said)


PARTS = ["step", "audio_seconds_seen", "best_loss", "best_step", "ema_count", "ranks", "accumulate", "optimizer"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing(run: Path, part: str) -> None:
    change(run, lambda document: document.pop(part))
    refused(run, f"it has no {part}")


def change(run: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    file = run / "state" / "step-4" / "state.json"
    document = json.loads(file.read_bytes())
    how(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *((part, value) for part in PARTS for value in ("x", [], -1)),
        *((part, value) for part in ("step", "audio_seconds_seen", "ema_count", "ranks") for value in (None, True)),
        ("step", 4.0), ("best_loss", math.nan), ("best_loss", math.inf), ("audio_seconds_seen", 10**400),
        ("ranks", 0), ("accumulate", 0), ("accumulate", "2"),
        ("files", []), ("files", {}), ("files", {"a": "b"}), ("files", None),
    ],
)  # fmt: skip
def test_a_part_of_another_kind(run: Path, part: str, value: Any) -> None:
    if (part, value) == ("best_loss", -1):
        value = {}
    change(run, lambda document: document.update({part: value}))
    refused(run, f"{part} is ")


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("numbers", {}, "optimizer.numbers is empty"),
        ("moments", [], "optimizer.moments is empty"),
        ("groups", [], "optimizer.groups is not a list of settings"),
        ("groups", [3], "optimizer.groups is not a list of settings"),
        ("groups", [{"eps": "x"}], "optimizer.groups is not a list of settings"),
        ("numbers", {"optimizer/0.weight/step": 4}, "optimizer.numbers is not a mapping"),
        ("numbers", None, "optimizer.numbers is not a mapping"),
        ("moments", [3], "optimizer.moments is not a list of names"),
        (
            "numbers",
            {"optimizer/0.weight/step": {"value": 4, "tensor": False}},
            "the optimiser's state of .* not whole",
        ),
    ],
)
def test_an_optimiser_that_lost_something(run: Path, part: str, value: Any, said: str) -> None:
    change(run, lambda document: document["optimizer"].update({part: value}))
    refused(run, said)


def test_a_state_of_more_groups_than_the_optimiser_has(run: Path) -> None:
    change(run, lambda document: document["optimizer"]["groups"].append({}))
    model, optimizer, ema = fresh()
    with pytest.raises(UserError, match="step-4 cannot be read"):
        state.load(run / "state", 4, model, ema, optimizer)


def test_a_state_under_the_name_of_another_step(run: Path) -> None:
    (run / "state" / "step-4").rename(run / "state" / "step-25")
    refused(run, "it is the state of step 4 and its folder is named step-25", step=25)


def test_a_state_that_does_not_name_its_files_is_of_an_earlier_version(run: Path) -> None:
    change(run, lambda document: document.pop("files"))
    model, optimizer, ema = fresh()
    for read in (lambda: folder.last_progress(run), lambda: state.load(run / "state", 4, model, ema, optimizer)):
        with pytest.raises(UserError, match=r"step-4 was written by an earlier version .*INIT=<run>/release"):
            read()


def test_a_loss_that_none_can_be_below_is_not_kept_as_the_best(tmp_path: Path) -> None:
    write(tmp_path, best_loss=math.nan, best_step=4)
    progress = folder.last_progress(tmp_path)
    assert progress is not None and progress.best_loss is None


def test_a_state_of_which_a_rank_wrote_nothing_here_is_none(tmp_path: Path) -> None:
    """As where the machines of a run do not see the same disk: each writes, and nobody meets an error."""
    saver = state.Saver(tmp_path)
    saver.several = True
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        for rank in (1, 2):
            files = {f"shard-0000{one}-model-00001-of-00001.safetensors": 1 for one in range(1, rank + 1)}
            for name in files:
                (tmp_path / name).write_bytes(b"x")
            if rank == 1:
                with pytest.raises(OSError, match="1 of 2 ranks wrote nothing"):
                    saver._files_of(tmp_path)
            else:
                assert saver._files_of(tmp_path) == files
    finally:
        dist.destroy_process_group()
