"""Learning rate, averaged weights and saved states."""

import contextlib
import math
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen.errors import UserError
from training import optim, state
from training.optim import EMA, OptimConfig, learning_rate


def test_learning_rate() -> None:
    config = OptimConfig(lr=1e-3, warmup_steps=10, lr_min_ratio=0.1)
    assert learning_rate(0, 110, config) == pytest.approx(1e-4)
    assert learning_rate(9, 110, config) == pytest.approx(1e-3)
    assert learning_rate(10, 110, config) == pytest.approx(1e-3)
    assert learning_rate(60, 110, config) == pytest.approx(1e-3 * 0.55)
    assert learning_rate(110, 110, config) == pytest.approx(1e-4)
    rates = [learning_rate(s, 110, config) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(0, 5, replace(config, warmup_steps=0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0}, {"lr": -1.0}, {"beta2": 1.0}, {"ema_every": 0}, {"clip": 0.0},
        *({name: value} for name in ("lr", "weight_decay", "clip", "eps") for value in (math.nan, math.inf)),
    ],
)  # fmt: skip
def test_nonsense_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"optim.{next(iter(bad))}"):
        OptimConfig(**bad)


def test_adamw_updates_all_tensors_in_one_kernel() -> None:
    _, optimizer, _ = fresh()
    assert type(optimizer) is torch.optim.AdamW and [group["fused"] for group in optimizer.param_groups] == [True]


@pytest.mark.parametrize("name", ["adamw", "dadapt", "prodigy"])
def test_the_optimiser_is_that_of_the_settings(name: Any) -> None:
    config = OptimConfig(name=name, lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3)
    [group] = optim.build_optimizer(torch.nn.Linear(2, 2).parameters(), config).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.7), 1e-3, 0.3)
    assert name == "adamw" or group["decouple"]
    assert name != "prodigy" or group["safeguard_warmup"]  # else the warm-up would make the found rate too large


def test_average_is_bias_corrected() -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    seen = []
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
        seen.append(value)
        ema.update(model)
    weights = [0.9**2, 0.9, 1.0]
    expected = sum(w * v for w, v in zip(weights, seen)) / sum(weights)
    torch.testing.assert_close(ema.shadow["weight"], torch.full((2, 3), expected))


def test_swap_gives_back_the_weights_even_after_an_error() -> None:
    model = torch.nn.Linear(3, 2)
    own = model.weight.detach().clone()
    ema = EMA(model, 0.9)
    ema.shadow["weight"].zero_()
    with pytest.raises(RuntimeError), ema.swapped(model):
        assert (model.weight == 0).all()
        raise RuntimeError
    assert torch.equal(model.weight, own)


def trained(steps: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)


def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer, EMA]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return model, optim.build_optimizer(model.parameters(), OptimConfig(lr=1e-2)), EMA(model, 0.9)


@pytest.mark.parametrize("background", [True, False])
def test_state_continues_to_the_bit(tmp_path: Path, background: bool) -> None:
    one, opt_one, ema_one = fresh()
    trained(9, one, opt_one, ema_one)
    two, opt_two, ema_two = fresh()
    trained(4, two, opt_two, ema_two)
    saver = state.Saver(tmp_path, background=background)
    saver.save(two, ema_two, opt_two, state.Progress(step=4, best_loss=1.5, best_step=2))
    trained(5, two, opt_two, ema_two, start=4)  # what follows does not change what is being written
    assert saver.ended() is None
    three, opt_three, ema_three = fresh()
    progress = state.read_progress(tmp_path, 4)
    assert progress.step == 4 and progress.best_loss == 1.5
    state.load(tmp_path, 4, three, ema_three, opt_three)
    trained(5, three, opt_three, ema_three, start=4)
    for a, b in zip(one.parameters(), three.parameters()):
        assert torch.equal(a, b)
    for name, average in ema_one.shadow.items():
        assert torch.equal(average, ema_three.shadow[name])
    assert ema_one.count == ema_three.count


@pytest.mark.parametrize("name", ["dadapt", "prodigy"])
def test_adaptive_optimisers_find_a_rate_and_continue_to_the_bit(tmp_path: Path, name: Any) -> None:
    pytest.importorskip({"dadapt": "dadaptation", "prodigy": "prodigyopt"}[name])

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer, EMA]:
        model, _, ema = fresh()
        with torch.no_grad():
            next(model.parameters()).zero_()  # as an adapter's and a style's weights start
        return model, optim.build_optimizer(model.parameters(), OptimConfig(name=name, lr=1.0)), ema

    one, opt_one, ema_one = made()
    trained(30, one, opt_one, ema_one)
    assert optim.found_rate(opt_one)["train/d"] > 1e-6  # where it starts
    two, opt_two, ema_two = made()
    trained(17, two, opt_two, ema_two)
    saver = state.Saver(tmp_path)
    saver.save(two, ema_two, opt_two, state.Progress(step=17))
    assert saver.ended() is None
    three, opt_three, ema_three = made()
    state.load(tmp_path, 17, three, ema_three, opt_three)
    trained(13, three, opt_three, ema_three, start=17)
    for a, b in zip(one.parameters(), three.parameters()):
        assert torch.equal(a, b)
    assert optim.found_rate(opt_one) == optim.found_rate(opt_three)


def test_adaptive_optimisers_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match=r"optim.name prodigy needs the package prodigyopt.*adamw"):
        optim.build_optimizer(torch.nn.Linear(2, 2).parameters(), OptimConfig(name="prodigy"))


def test_states_are_kept_and_whole(tmp_path: Path) -> None:
    model, optimizer, ema = fresh()
    trained(1, model, optimizer, ema)
    (tmp_path / ".step-10.tmp").mkdir()  # a kill in the middle of writing
    saver = state.Saver(tmp_path, keep_every=5)
    assert not (tmp_path / ".step-10.tmp").exists()
    for step in (2, 4, 5, 6, 8):
        saver.save(model, ema, optimizer, state.Progress(step=step, best_loss=1.0, best_step=2))
    assert saver.ended() is None
    assert state.steps_in(tmp_path) == [2, 5, 6, 8]  # the last two, the best and every fifth
    (tmp_path / "step-12").mkdir()
    assert state.steps_in(tmp_path) == [2, 5, 6, 8]
    [weights] = (tmp_path / "step-8").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match="Delete this folder to go on from an earlier state"):
        state.load(tmp_path, 8, model, ema)
    state.load(tmp_path, 6, model, ema)
    other = torch.nn.Sequential(torch.nn.Linear(5, 4))
    with pytest.raises(UserError, match="cannot be read"):  # a state of another shape
        state.load(tmp_path, 6, other, EMA(other, 0.9))


def test_a_state_takes_the_place_of_what_is_left_of_an_old_one(tmp_path: Path) -> None:
    model, optimizer, ema = fresh()
    trained(3, model, optimizer, ema)
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "shard.safetensors").write_bytes(b"without a state.json")
    saver = state.Saver(tmp_path)
    saver.save(model, ema, optimizer, state.Progress(step=3))
    assert saver.ended() is None and state.steps_in(tmp_path) == [3]
    state.load(tmp_path, 3, model, ema)


@pytest.mark.parametrize("background", [True, False])
def test_a_copy_of_a_state_beside_the_others_is_left_alone(tmp_path: Path, background: bool) -> None:
    model, optimizer, ema = fresh()
    trained(1, model, optimizer, ema)
    saver = state.Saver(tmp_path, background=background)
    for step in (1, 2, 3):
        saver.save(model, ema, optimizer, state.Progress(step=step))
        assert saver.ended() is None
        if step == 1:
            shutil.copytree(tmp_path / "step-1", tmp_path / "step-1.bak")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1.bak", "step-2", "step-3"]


@pytest.mark.parametrize("background", [True, False])
def test_an_end_that_fails_keeps_nobody_waiting(
    tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, ema = fresh()
    trained(1, model, optimizer, ema)
    saver = state.Saver(tmp_path, background=background)

    def gone(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saver, "_files_of", gone)
    monkeypatch.setattr(saver, "_sorry", gone)
    with contextlib.suppress(OSError):
        saver.save(model, ema, optimizer, state.Progress(step=1))
    assert saver._written.wait(timeout=60)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_leaves_the_last_state_whole(tmp_path: Path, background: bool) -> None:
    model = torch.nn.Linear(200, 200)
    optimizer, ema = optim.build_optimizer(model.parameters(), OptimConfig()), EMA(model, 0.9)
    saver = state.Saver(tmp_path, background=background)
    saver.save(model, ema, optimizer, state.Progress(step=1))
    assert saver.ended() is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # files end here, as they do on a full disk
    try:
        saver.save(model, ema, optimizer, state.Progress(step=2))
        said = str(saver.ended())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"state of step 2 could not be written.*: File too large. The last whole state is step 1", said)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    saver.save(model, ema, optimizer, state.Progress(step=3))  # there is room again
    assert saver.ended() is None
    assert state.steps_in(tmp_path) == [1, 3]
