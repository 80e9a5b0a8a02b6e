"""Learning rate, averaged weights and saved states."""

from dataclasses import replace
from pathlib import Path

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


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": -1.0}, {"beta2": 1.0}, {"ema_every": 0}, {"clip": 0.0}])
def test_nonsense_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"optim.{next(iter(bad))}"):
        OptimConfig(**bad)


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


def test_state_continues_to_the_bit(tmp_path: Path) -> None:
    one, opt_one, ema_one = fresh()
    trained(9, one, opt_one, ema_one)
    two, opt_two, ema_two = fresh()
    trained(4, two, opt_two, ema_two)
    state.save(tmp_path, two, ema_two, opt_two, state.Progress(step=4, best_loss=1.5, best_step=2))
    three, opt_three, ema_three = fresh()
    progress, tensors = state.load(tmp_path, 4, three, ema_three)
    assert progress.step == 4 and progress.best_loss == 1.5
    state.restore_optimizer(opt_three, three, tensors)
    trained(5, three, opt_three, ema_three, start=4)
    for a, b in zip(one.parameters(), three.parameters()):
        assert torch.equal(a, b)
    for name, average in ema_one.shadow.items():
        assert torch.equal(average, ema_three.shadow[name])


def test_states_are_kept_and_whole(tmp_path: Path) -> None:
    model, optimizer, ema = fresh()
    trained(1, model, optimizer, ema)
    for step in (2, 4, 6, 8):
        state.save(tmp_path, model, ema, optimizer, state.Progress(step=step, best_loss=1.0, best_step=2))
    assert state.steps_in(tmp_path) == [2, 6, 8]  # the last two and the best
    (tmp_path / ".step-10.tmp").mkdir()  # a kill in the middle of writing
    (tmp_path / "step-12").mkdir()
    assert state.steps_in(tmp_path) == [2, 6, 8]
    weights = tmp_path / "step-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match="Delete this folder to go on from an earlier state"):
        state.load(tmp_path, 8, model, ema)
    assert state.load(tmp_path, 6, model, ema)[0].step == 6
