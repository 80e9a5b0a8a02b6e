"""The LightningModule: a thin caller of the language model, the loss and the optimiser.

It holds what a step needs and nothing that decides which step it is: `step` counts completed steps of the run, over
every resume. The frozen text encoder runs inside the step, without gradient, and is no part of the module's state.
Under sharding every method here that touches weights is called on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from musicgen import patterns
from musicgen.conditioning import TextEncoder, padded
from musicgen.lm import MusicLM
from musicgen.style import Latents
from training import loss, optim, plan, state, strategy
from training.copies import WorkingCopies
from training.data import Batch
from training.launch import SharedError
from training.traffic import Traffic
from training.watch import Phases


class NonFiniteLoss(SharedError):
    """The loss or the gradient is not a number; the step's update was not made."""


def _beside(numbers: Tensor, like: Tensor) -> Tensor:
    """Some numbers of the host in the type and place of `like`; nobody waits until a GPU has got to them."""
    numbers = numbers.to(like.dtype)
    if like.device.type == "cuda":
        return numbers.pin_memory().to(like.device, non_blocking=True)
    return numbers.to(like.device)


class MusicLMModule(pl.LightningModule):
    """Training of a `MusicLM`.

    Args:
        lm: the model.
        encoder: the frozen text encoder.
        config: how the weights move.
        total_steps: length of the schedule.
        crop_frames: T of every batch.
        accumulate: parts per step.
        frame_rate: codec frames per second.
        seed: of the residual dropout, where the model has any.
        prepare: (model, device, traffic) recomputes, compiles and shards the model once processes talk to each other.
        resume: the run's `state/` to go on from at `progress.step`; None starts anew.
        latents: the codec's frozen codebooks, for a model with a style.
        compiled: whether `prepare` compiles blocks: captions are then padded to a few lengths, and on a GPU the
            loss is compiled too.
        shares_casts: autocast's copies of the blocks' matrices are made once per step, for all of its parts; not for
            a sharded model.
    """

    def __init__(
        self,
        lm: MusicLM,
        encoder: TextEncoder,
        config: optim.OptimConfig,
        *,
        total_steps: int,
        crop_frames: int,
        accumulate: int = 1,
        frame_rate: float = 50.0,
        seed: int = 0,
        prepare: Callable[[nn.Module, torch.device, Traffic], None] | None = None,
        resume: Path | None = None,
        latents: Latents | None = None,
        compiled: bool = False,
        shares_casts: bool = False,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.optim_config, self.total_steps = config, total_steps
        self.crop_frames, self.accumulate, self.frame_rate = crop_frames, accumulate, frame_rate
        self.seed, self.compiled, self.shares_casts = seed, compiled, shares_casts
        self.copies: WorkingCopies | None = None
        self.draws = lm.config.dropout > 0 or any(isinstance(m, nn.Dropout) and m.p > 0 for m in lm.modules())
        self._prepare, self.resume = prepare, resume
        self.progress = state.Progress(accumulate=accumulate)
        self.phases, self.traffic = Phases(), Traffic()
        self.sums = torch.zeros(lm.config.num_codebooks)
        self.counts = torch.zeros(lm.config.num_codebooks)
        self.grad_norm = torch.zeros(())
        # In a tuple, so that torch does not take the encoder for a part of this module.
        self._encoder = (encoder,)
        self._latents = latents

    @property
    def encoder(self) -> TextEncoder:
        """The frozen text encoder."""
        return self._encoder[0]

    def configure_model(self) -> None:
        """Shard, compile and so on, once (Lightning calls this as soon as the processes are connected)."""
        if self._prepare is not None:
            prepare, self._prepare = self._prepare, None
            prepare(self.lm, self.trainer.strategy.root_device, self.traffic)

    def on_train_start(self) -> None:
        """Bring all that Lightning does not know to its device; start the average; restore a resumed run."""
        self.encoder.to(self.device)
        if self._latents is not None:
            self._latents.to(self.device)
        self.ema = optim.EMA(self.lm, self.optim_config.ema_decay)
        self.sums, self.counts = self.sums.to(self.device), self.counts.to(self.device)
        self.progress.ranks = self.trainer.world_size
        if self.resume is not None:
            state.load(self.resume, self.progress.step, self.lm, self.ema, self.trainer.optimizers[0])
        if self.shares_casts:
            self.copies = WorkingCopies(self.lm.transformer.layers, torch.bfloat16)

    def score(self, batch: Batch, text: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy sums `[K]` of this rank's items and target counts `[K]` of the batch's `valid_frames`."""
        config = self.lm.config
        hidden, mask = text if text is not None else self.encoder.encode(batch.tokens or batch.texts)
        if text is None:
            self.phases.mark("text")
        if self.compiled:
            hidden, mask = padded(hidden, mask, strategy.TEXT_MULTIPLE)
        inputs, targets, scored = patterns.training_columns(
            batch.codes.long(), config.special_id, valid=batch.valid, pattern=config.pattern, tail=config.tail
        )
        heads: list[Any] = list(self.lm.linears)
        style = None if batch.style is None or self._latents is None else self._latents(batch.style)
        self.traffic.stand()  # until the weights outside the blocks are there, and those of the first
        heard = self.lm.hidden(inputs, hidden, mask, chroma=batch.chroma, attributes=batch.attributes, style=style)
        sums = loss.cross_entropy_sums(heard, heads, targets, scored, compiled=self.compiled)
        limits = patterns.scored_frames(
            self.crop_frames, config.num_codebooks, pattern=config.pattern, tail=config.tail
        )
        counts = plan.num_targets(batch.valid_frames, limits)
        return sums, _beside(torch.from_numpy(counts), sums)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one part of a step, scaled so that all parts of all ranks add up to the global batch's mean."""
        if self.draws:  # the only thing a step draws from torch's generators: address it too
            torch.manual_seed(hash((self.seed, batch.step, batch_index % self.accumulate, self.global_rank)))
        first, last = batch_index % self.accumulate == 0, (batch_index + 1) % self.accumulate == 0
        if first:
            self.phases.begin(self.device)
            self.traffic.begin(self.device)
        if self.accumulate > 1:
            strategy.sum_mirrors(self.lm, now=last)
        self.phases.mark("")  # what lies between two parts is no part of the model
        if self.copies is not None:
            if first:
                self.copies.refresh()
                self.phases.mark("forward")
            if not last or self.trainer.world_size == 1:
                self.copies.put_in()
            else:  # DDP sums the gradients of this part, and sees those of no copy
                self.copies.free()
        sums, counts = self.score(batch)
        if first:
            self.sums.zero_()
            self._parts: list[tuple[Batch, Tensor]] = []
            self.progress.audio_seconds_seen += float(batch.valid_frames.sum()) / self.frame_rate
        self.sums += sums.detach()
        self.counts = counts
        self._parts.append((batch, sums.detach()))
        # Gradients are averaged over ranks and Lightning divides by the parts: undo both, for the counts are global.
        value = loss.mean_over_codebooks(sums, counts) * (self.trainer.world_size * self.accumulate)
        self.phases.mark("forward")
        return value

    def on_after_backward(self) -> None:
        """The gradients of this part are made."""
        if self.copies is not None:
            self.copies.put_back()
        self.traffic.go()
        self.phases.mark("backward")

    def _stop_at_non_finite(self) -> None:
        """Raise `NonFiniteLoss` on every rank, naming the tracks whose loss is not finite, else all of the batch's.

        Called once the gradients of all ranks are together: a loss that is not finite anywhere makes their norm so
        everywhere, so nobody waits for a rank that has stopped, and a good step costs no exchange.
        """
        bad = [key for batch, sums in self._parts if not bool(torch.isfinite(sums).all()) for key in batch.keys]
        every = [key for batch, _ in self._parts for key in batch.keys]
        step = self._parts[0][0].step
        gathered: list[Any] = [(bad, every)]
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size
            dist.all_gather_object(gathered, (bad, every))
        bad = [key for rank in gathered for key in rank[0]]
        tracks = dict.fromkeys(bad or [key for rank in gathered for key in rank[1]])
        shown = ", ".join([*tracks][:20]) + (f" and {len(tracks) - 20} more" if len(tracks) > 20 else "")
        raise NonFiniteLoss(
            f"the {'loss' if bad else 'gradient'} is not finite at step {step + 1} (tracks {shown}); no update was "
            "made. Lower --optim.lr, raise --optim.warmup_steps or use --hardware.precision float32, "
            "and run again: it resumes from the last state"
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser over what is trained of the language model."""
        return optim.build_optimizer(optim.trained(self.lm).values(), self.optim_config)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Set the learning rate of this step."""
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate

    @property
    def learning_rate(self) -> float:
        """Learning rate of the step that is being made."""
        return optim.learning_rate(self.progress.step, self.total_steps, self.optim_config)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip, keep the norm for the record, and stop before an update that would spoil the weights."""
        norm = torch.nn.utils.clip_grad_norm_(self.lm.parameters(), self.optim_config.clip)
        self.grad_norm = strategy.number(norm)
        if not bool(torch.isfinite(self.grad_norm)):
            self._stop_at_non_finite()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights; the step is then complete and the average follows."""
        self.used_learning_rate = self.learning_rate
        super().optimizer_step(*args, **kwargs)
        # Lightning drops gradients only after the next forward pass, whose activations would lie beside the old ones.
        # DDP's are views of its buckets, which stay: dropped, those of the next parts would lie beside them.
        self.trainer.optimizers[0].zero_grad(set_to_none=not self._has_buckets)
        self.progress.step += 1
        if self.progress.step % self.optim_config.ema_every == 0:
            self.ema.update(self.lm)
        elif not self.ema.count:
            self.ema.follow(self.lm)
        self.phases.mark("optimizer")

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: `optimizer_step` has done it."""

    @property
    def _has_buckets(self) -> bool:
        return isinstance(self.trainer.strategy, pl.strategies.DDPStrategy)

    def step_metrics(self) -> dict[str, float]:
        """Losses of the last step over the global batch, learning rate and gradient norm."""
        sums = self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        return {
            **loss.metrics(sums.tolist(), self.counts.tolist(), "train"),  # type: ignore[union-attr]
            "train/lr": self.used_learning_rate,
            "train/grad_norm": float(self.grad_norm),
            **optim.found_rate(self.trainer.optimizers[0]),
        }

    @torch.no_grad()
    def validate(self, batches: list[Batch], texts: dict[int, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Validation losses with the averaged weights.

        Args:
            batches: this rank's fixed batches.
            texts: encoded captions by batch, filled on first use.
        """
        sums, counts = torch.zeros_like(self.sums), torch.zeros_like(self.sums)
        self.lm.eval()
        with self._averaged(), self.trainer.precision_plugin.val_step_context():
            for number, batch in enumerate(batches):
                if number not in texts:
                    texts[number] = self.encoder.encode(batch.texts)
                batch_sums, batch_counts = self.score(batch.to(self.device), texts[number])
                sums += batch_sums
                counts += batch_counts
        self.lm.train()
        both = self.trainer.strategy.reduce(torch.stack([sums, counts]), reduce_op="sum")
        return loss.metrics(both[0].tolist(), both[1].tolist(), "valid")  # type: ignore[index]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model, on every rank, sharded as it is."""
        with self.ema.swapped(self.lm):
            try:
                yield
            finally:  # a forward pass leaves the root gathered, with values that are about to change
                strategy.forget_gathered(self.lm)

    @contextmanager
    def averaged(self) -> Iterator[MusicLM | None]:
        """A model that holds the averaged weights, to generate with or to release: on rank 0, None on the others.

        The model itself while it is whole, with its adapter where it has one; where it is sharded, a copy on the CPU
        put together from all ranks.
        """
        if strategy.is_sharded(self.lm):
            whole = {}
            for name, part in self.ema.shadow.items():
                tensor = strategy.number(part)
                if not self.global_rank:
                    whole[name] = tensor.cpu()
            if self.global_rank:
                yield None
                return
            with torch.device("meta"):
                copy = MusicLM(self.lm.config)
            copy.load_state_dict(whole, assign=True)
            yield copy.eval()
        elif self.global_rank:
            yield None
        else:
            self.lm.eval()
            try:
                with self.ema.swapped(self.lm):
                    yield self.lm
            finally:
                self.lm.train()
