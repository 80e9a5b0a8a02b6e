"""A gradient that is not finite, under a loss that is: the training stops before the update and names the tracks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import tiny_run
from training import lineage, module, state, train
from training.data import Batch
from training.module import MusicLMModule, NonFiniteLoss


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    data, run = tiny_run.dataset(tmp_path / "set"), tmp_path / "run"
    seen: list[Batch] = []
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    backward, stop = MusicLMModule.on_after_backward, MusicLMModule._stop_at_non_finite
    forward = MusicLMModule.training_step

    def training_step(self: MusicLMModule, batch: Batch, index: int) -> Any:
        if self.progress.step == 2:
            seen.append(batch)
        return forward(self, batch, index)

    def on_after_backward(self: MusicLMModule) -> None:
        backward(self)
        if len(seen) == 1:  # in the first of two parts; the loss of both is finite
            before.update({name: p.detach().clone() for name, p in self.lm.named_parameters()})
            gradient = self.lm.transformer.layers[1].linear1.weight.grad
            assert isinstance(gradient, torch.Tensor)
            gradient[0, 0] = value

    def stop_at(self: MusicLMModule) -> None:
        after.update({name: p.detach().clone() for name, p in self.lm.named_parameters()})
        assert all(bool(torch.isfinite(sums).all()) for _, sums in self._parts)
        stop(self)

    monkeypatch.setattr(module.MusicLMModule, "training_step", training_step)
    monkeypatch.setattr(module.MusicLMModule, "on_after_backward", on_after_backward)
    monkeypatch.setattr(module.MusicLMModule, "_stop_at_non_finite", stop_at)
    argv = [*tiny_run.ARGS, "--data", str(data), "--run", str(run), "--batch.accumulate", "2", "--log.state_every", "2"]
    with pytest.raises(NonFiniteLoss, match=r"^the gradient is not finite at step 3 \(tracks .*no update was") as told:
        train.main(argv)
    assert len(seen) == 2 and sum(len(batch.keys) for batch in seen) == 8
    named = str(told.value).split("(tracks ")[1].split(")")[0].split(", ")
    assert set(named) == {key for batch in seen for key in batch.keys}, "those of the whole batch, and no others"
    assert before and all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert state.steps_in(run / "state") == [2] and lineage.read(run)[-1]["how"] == "failed"
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert train.main([*argv, "--stop_at", "4"]) == 0  # as the message says: it resumes from the last state
    assert state.steps_in(run / "state")[-1] == 4
