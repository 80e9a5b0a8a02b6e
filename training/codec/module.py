"""The Lightning module of the codec: encode, quantise, decode, compare; thin on purpose.

For the first `warmup_steps` the quantiser is left out, so that the codebooks start by k-means from an encoder that
already says something. From `adversarial_start` on a discriminator listens too. The learning rate is constant and falls
linearly to zero over the last `cooldown_steps`; a run can be lengthened by resuming with more steps. The weights that
are validated and exported are an EMA.

Every loss is differentiated at the decoder's output, where the gradients are weighed, and only their sum goes through
the codec: that is one pass through the network, and says what each loss contributes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from musicgen import codec as codecs
from musicgen.metrics.audio import chroma_agreement, log_mel_distance
from pipelines.assemble import SplitConfig
from training.codec import discriminator as adversary
from training.codec import initial, quantiser
from training.codec.balancer import Balancer, BalancerConfig
from training.codec.discriminator import Discriminator, DiscriminatorConfig
from training.codec.losses import LossConfig, reconstruction_losses
from training.codec.quantiser import QuantiserConfig


@dataclass(frozen=True)
class CodecTrainConfig:
    """Settings of `python -m training.codec.train`.

    Args:
        size: `demo` or `32khz` (see `musicgen.codec.CODEC_SIZES`).
        data: catalogue URI, or a folder holding a PCM cache.
        run: run folder; the same one resumes.
        init: start from the weights of a codec folder, of another run, or of a run's state/last.ckpt; empty for none.
        steps: optimiser steps in all.
        cooldown_steps: last steps, over which the learning rate falls to zero.
        warmup_steps: first steps, without quantisation.
        adversarial_start: first step with the discriminator; null for none.
        adversarial_ramp: steps over which the weights of its two losses rise from zero, while it learns to hear.
        batch_size: crops per step and rank.
        crop_seconds: length of a crop.
        lr: Adam learning rate.
        betas: Adam betas.
        clip: gradient norm limit.
        ema_decay: decay of the averaged weights per step.
        validate_every: steps between validations, which also write a checkpoint.
        validation_tracks: tracks looked at in a validation.
        seed: addresses every random choice.
        threads: CPU threads, 0 for all.
        loss: weights of the losses.
        warmup_loss: weights during the warm-up, where the waveform leads.
        adversarial_loss: weights from `adversarial_start` on.
        balancer: how gradients are balanced, where the weights in force ask for it.
        discriminator: its shape and training.
        splits: shares of the split groups (artist and work), as in the ingest of the same music.
    """

    size: str = "demo"
    data: str = ""
    run: str = "runs/codec"
    init: str = ""
    steps: int = 8000
    cooldown_steps: int = 1500
    warmup_steps: int = 1200
    adversarial_start: int | None = None
    adversarial_ramp: int = 200
    batch_size: int = 4
    crop_seconds: float = 1.0
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 10.0
    ema_decay: float = 0.995
    validate_every: int = 500
    validation_tracks: int = 16
    seed: int = 2036
    threads: int = 0
    splits: SplitConfig = field(default_factory=lambda: SplitConfig(0.85, 0.15, 0.0))
    loss: LossConfig = field(default_factory=LossConfig)
    warmup_loss: LossConfig = field(default_factory=lambda: LossConfig(wave=3.0, mel=0.3, tonal=1.0))
    adversarial_loss: LossConfig = field(default_factory=lambda: LossConfig(balance=True, adversarial=1.0, feature=1.0))
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    balancer: BalancerConfig = field(default_factory=BalancerConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@torch.no_grad()
def _initialise(network: torch.nn.Module) -> None:
    """Convolutions start as torch starts them, uniform ±1/√fan_in, smaller than the Kaiming start of `transformers`."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            weight = module.weight
            bound = weight[0].numel() ** -0.5
            module.weight = torch.empty_like(weight).uniform_(-bound, bound)  # type: ignore[assignment]


def _positive(verdicts: list[adversary.Verdict]) -> float:
    """Share of the patches that are taken for real."""
    return float(torch.stack([(v.logits.detach() > 0).float().mean() for v in verdicts]).mean())


class CodecModule(pl.LightningModule):
    """EnCodec under training; `validation_audio` is a list of `[C, N]` tracks that are never trained on."""

    def __init__(self, config: CodecTrainConfig, validation_audio: list[np.ndarray]) -> None:
        super().__init__()
        self.config = config
        self.shape = codecs.CODEC_SIZES[config.size]
        self.automatic_optimization = False
        torch.manual_seed(config.seed)
        self.network: Any = codecs.build(self.shape)
        _initialise(self.network)
        self.discriminator: Discriminator | None = None
        if config.adversarial_start is not None:
            self.discriminator = Discriminator(config.discriminator, self.shape.channels)
        self.balancer = Balancer(config.balancer)
        self.ema = [p.detach().clone() for p in self.network.parameters()]
        self.start_moments: list[dict[str, Any]] = []
        self.rebuild_sums = False
        self.validation_audio = validation_audio
        self.record: dict[str, float] = {}
        self._clock = time.monotonic()

    # --- one step ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        """One update on `batch [B, C, N]`; raises `FloatingPointError` before it when a loss is not finite."""
        step, config = self.global_step, self.config
        latents = self.network.encoder(batch)
        commitment = batch.new_zeros(())
        self.record = {}
        if step >= config.warmup_steps:
            result = quantiser.quantise(
                self.network.quantizer, latents, config.quantiser, train=True, seed=config.seed + 10 * step
            )
            latents, commitment = result.latents, result.commitment
            self.record |= {"train/commitment": float(commitment.detach())}
            self.record |= {"train/revived": float(sum(result.revived))}
        decoded = self.network.decoder(latents)[..., : batch.shape[-1]].float()
        gradient, weights = self._gradient(batch, decoded.detach(), step)
        self._check_finite(commitment, gradient, step)
        # The scalar whose gradient at the decoder's output is `gradient`.
        self._update(0, (decoded * gradient).sum() + weights.commitment * commitment, self.network)
        self._advance_ema(step + 1)

    def _gradient(self, batch: Tensor, decoded: Tensor, step: int) -> tuple[Tensor, LossConfig]:
        """What the losses ask of the decoder's output `[B, C, N]`, and the weights in force."""
        output = decoded.requires_grad_()
        weights = self.weights(step)
        losses = reconstruction_losses(batch, output, weights, self.shape.sample_rate_hz)
        if self._adversarial(step):
            losses |= self._hear(batch, output, step)
        factors = {name: self._ramp(name, step) * getattr(weights, name) for name in losses}
        losses = {name: loss for name, loss in losses.items() if factors[name]}
        gradients = {name: torch.autograd.grad(loss, output, retain_graph=True)[0] for name, loss in losses.items()}
        gradient, shares = self.balancer.combine(gradients, factors, balance=weights.balance)
        self.record |= {f"train/{name}": float(value.detach()) for name, value in losses.items()}
        self.record |= {f"share/{name}": share for name, share in shares.items()}
        return gradient, weights

    def _hear(self, batch: Tensor, output: Tensor, step: int) -> dict[str, Tensor]:
        """Update the discriminator where it is due, then let it judge: the codec's two adversarial losses."""
        critic: Any = self.discriminator
        length = round(self.config.discriminator.seconds * self.shape.sample_rate_hz) or batch.shape[-1]
        start = np.random.default_rng([self.config.seed, step]).integers(max(1, batch.shape[-1] - length + 1))
        batch, output = (wave[..., start : start + length] for wave in (batch, output))
        if (step - (self.config.adversarial_start or 0)) % self.config.discriminator.every == 0:
            real, fake = critic(batch), critic(output.detach())
            loss = adversary.hinge_loss([v.logits for v in real], [v.logits for v in fake])
            self._check_finite(loss, loss, step)
            self._update(1, loss, critic)
            self.record |= {
                "train/discriminator": float(loss.detach()),
                "train/real_taken_for_real": _positive(real),
                "train/decoded_taken_for_real": _positive(fake),
            }
        with torch.no_grad():
            real = critic(batch)
        fake = critic(output)
        return {"adversarial": adversary.adversarial_loss(fake), "feature": adversary.feature_loss(real, fake)}

    def _update(self, which: int, loss: Tensor, network: torch.nn.Module) -> None:
        """Back-propagate and step optimiser 0 (codec) or 1 (discriminator)."""
        optimisers: Any = self.optimizers(use_pl_optimizer=which == 0)
        schedules: Any = self.lr_schedulers()
        if self.discriminator is None:
            optimisers, schedules = [optimisers], [schedules]
        optimiser = optimisers[which]
        optimiser.zero_grad()
        self.manual_backward(loss)
        if which == 0 and self.config.clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.config.clip)
        # Lightning counts the steps of its own optimisers as steps of the run: only the codec's may count.
        optimiser.step()
        schedules[which].step()

    def _check_finite(self, loss: Tensor, gradient: Tensor, step: int) -> None:
        if not bool(torch.isfinite(loss) & torch.isfinite(gradient).all()):
            losses = {k.removeprefix("train/"): round(v, 4) for k, v in self.record.items() if k.startswith("train/")}
            raise FloatingPointError(
                f"codec loss or gradient is not finite at step {step} ({losses}); seed {self.config.seed}"
            )

    def weights(self, step: int) -> LossConfig:
        """The weights in force at a step."""
        if step < self.config.warmup_steps:
            return self.config.warmup_loss
        return self.config.adversarial_loss if self._adversarial(step) else self.config.loss

    def _adversarial(self, step: int) -> bool:
        start = self.config.adversarial_start
        return start is not None and step >= max(start, self.config.warmup_steps)

    def _ramp(self, name: str, step: int) -> float:
        if name not in ("adversarial", "feature") or not self.config.adversarial_ramp:
            return 1.0
        start = max(self.config.adversarial_start or 0, self.config.warmup_steps)
        return min(1.0, (step - start) / self.config.adversarial_ramp)

    def on_train_batch_start(self, batch: Tensor, batch_index: int) -> None:
        """Start the codebooks by k-means at the end of the warm-up; or, where they came without, their sums."""
        if self.global_step == self.config.warmup_steps and not self._initialised:
            quantiser.initialise(self.network.quantizer, self._latents(), self.config.quantiser, self.config.seed)
        if self.rebuild_sums:
            initial.rebuild_sums(self.network.quantizer, self._latents())
            self.rebuild_sums = False

    @torch.no_grad()
    def _advance_ema(self, steps: int) -> None:
        """Move the averaged weights after `steps` updates; part of the step, since a state may be written right after
        it and before Lightning's own hook."""
        decay = min(self.config.ema_decay, (1 + steps) / (10 + steps))
        self.ema = [e.to(p.device) for e, p in zip(self.ema, self.network.parameters(), strict=True)]
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.network.parameters()], 1 - decay)

    @property
    def _initialised(self) -> bool:
        return bool(self.network.quantizer.layers[0].codebook.embed.abs().sum() > 0)

    @torch.no_grad()
    def _latents(self) -> Tensor:
        """Latents `[N, H]` of training audio that no step sees."""
        stream = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        latents: list[Tensor] = []
        step = 0
        while sum(len(x) for x in latents) < self.config.quantiser.kmeans_latents:
            batch = stream.batch(10_000_000 + step).to(self.device)
            z = self.network.encoder(batch)
            latents.append(z.permute(0, 2, 1).reshape(-1, z.shape[1]))
            step += 1
        return torch.cat(latents)

    # --- optimiser --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Adam for the codec and, where there is one, the discriminator; constant rates and a linear cool-down."""
        config = self.config
        adams = [torch.optim.Adam(self.network.parameters(), lr=config.lr, betas=config.betas)]
        begins = [0]
        if self.discriminator is not None:
            own = config.discriminator
            adams.append(torch.optim.Adam(self.discriminator.parameters(), lr=own.lr, betas=own.betas))
            begins.append(max(config.adversarial_start or 0, config.warmup_steps))
        for adam, moments in zip(adams, self.start_moments, strict=False):
            adam.load_state_dict(adam.state_dict() | {"state": moments})

        def schedule(adam: torch.optim.Optimizer, begin: int, every: int) -> Any:
            def rate(updates: int) -> float:
                warm = min(1.0, (updates + 1) / 50)
                left = (config.steps - begin - updates * every) / max(1, config.cooldown_steps)
                return max(0.0, min(warm, left))

            return torch.optim.lr_scheduler.LambdaLR(adam, rate)

        everies = (1, config.discriminator.every)
        return adams, [schedule(*each) for each in zip(adams, begins, everies, strict=False)]

    # --- validation and state ---------------------------------------------------------------------------------

    def averaged(self) -> codecs.Codec:
        """A frozen codec with the averaged weights."""
        network = codecs.build(self.shape)
        network.load_state_dict(self.network.state_dict())
        with torch.no_grad():
            for parameter, mean in zip(network.parameters(), self.ema, strict=True):
                parameter.copy_(mean)
        return codecs.Codec(network, "under-training")

    def evaluate(self) -> dict[str, float]:
        """Log-mel distance, chroma agreement and the share of each codebook in use, over the validation tracks."""
        codec = self.averaged()
        mel, chroma = [], []
        used: list[set[int]] = [set() for _ in range(codec.num_codebooks)]
        for audio in self.validation_audio:
            wave = torch.from_numpy(audio)
            codes = codec.encode(wave[None])
            decoded = codec.decode(codes)[0, :, : wave.shape[-1]].mean(0).numpy()
            original = wave.mean(0).numpy()
            mel.append(log_mel_distance(original, decoded))
            chroma.append(chroma_agreement(original, decoded))
            for level in range(codec.num_codebooks):
                used[level].update(codes[0, level].tolist())
        result = {"valid/log_mel": float(np.mean(mel)), "valid/chroma": float(np.nanmean(chroma))}
        return result | {f"valid/used_{k + 1}": len(s) / codec.codebook_size for k, s in enumerate(used)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep EMA and balancer beside Lightning's state."""
        checkpoint["ema"] = self.ema
        checkpoint["balancer"] = self.balancer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take EMA and balancer back."""
        self.ema = checkpoint["ema"]
        self.balancer.load_state_dict(checkpoint["balancer"])
