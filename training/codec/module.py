"""The Lightning module of the codec: encode, quantise, decode, compare; thin on purpose.

For the first `warmup_steps` the quantiser is left out, so that the codebooks start by k-means from an encoder that
already says something. From `adversarial_start` on a discriminator listens too. The learning rate is constant and falls
linearly to zero over the last `cooldown_steps`; a run can be lengthened by resuming with more steps. The weights that
are validated and exported are an EMA.

Every loss is differentiated at the decoder's output, where the gradients are weighed, and only their sum goes through
the codec: that is one pass through the network, and says what each loss contributes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from musicgen import codec as codecs
from musicgen.errors import UserError
from musicgen.metrics.audio import chroma_agreement, log_mel_distance
from training.codec import discriminator as adversary
from training.codec import initial, quantiser
from training.codec.balancer import Balancer, mean_over_ranks
from training.codec.config import CodecTrainConfig
from training.codec.discriminator import Discriminator
from training.codec.losses import LossConfig, reconstruction_losses

CLIP_SECONDS = 10


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
        self.shape = config.network
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
        self.critic_record: dict[str, float] = {}  # of the discriminator's last update, which is not in every step

    # --- one step ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        """One update on `batch [B, C, N]`; raises `UserError` before it when a loss is not finite."""
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
        # The scalar whose gradient at the decoder's output is `gradient`. A balanced one has a norm per item, so it is
        # a sum over the batch, of which DDP takes the mean over ranks; commitment is a mean everywhere.
        ranks = self.trainer.world_size if weights.balance else 1
        self._update(0, ranks * (decoded * gradient).sum() + weights.commitment * commitment, self.network)
        self._advance_ema(step + 1)

    def _gradient(self, batch: Tensor, decoded: Tensor, step: int) -> tuple[Tensor, LossConfig]:
        """What the losses ask of the decoder's output `[B, C, N]`, and the weights in force."""
        output = decoded.requires_grad_()
        weights = self.weights(step)
        with torch.autocast(batch.device.type, enabled=False):
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
        if (step - (self.config.adversarial_begin or 0)) % self.config.discriminator.every == 0:
            real, fake = critic(batch), critic(output.detach())
            loss = adversary.hinge_loss([v.logits for v in real], [v.logits for v in fake])
            self._check_finite(loss, loss, step)
            self._update(1, loss, critic)
            self.critic_record = {
                "train/discriminator": float(loss.detach()),
                "train/real_taken_for_real": _positive(real),
                "train/decoded_taken_for_real": _positive(fake),
            }
        self.record |= self.critic_record
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
            raise UserError(
                f"codec loss or gradient is not finite at step {step} ({losses}); seed {self.config.seed}. Lower "
                "--lr and run again: it resumes from the last state"
            )

    def weights(self, step: int) -> LossConfig:
        """The weights in force at a step."""
        if step < self.config.warmup_steps:
            return self.config.warmup_loss
        return self.config.adversarial_loss if self._adversarial(step) else self.config.loss

    def _adversarial(self, step: int) -> bool:
        begin = self.config.adversarial_begin
        return begin is not None and step >= begin

    def _ramp(self, name: str, step: int) -> float:
        if name not in ("adversarial", "feature") or not self.config.adversarial_ramp:
            return 1.0
        return min(1.0, (step - (self.config.adversarial_begin or 0)) / self.config.adversarial_ramp)

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
        """Latents `[N, H]` of training audio that no step sees; the same on every rank."""
        stream = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        latents: list[Tensor] = []
        step = 0
        while sum(len(x) for x in latents) < self.config.quantiser.kmeans_latents:
            batch = stream.whole_batch(10_000_000 + step).to(self.device)
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
            begins.append(config.adversarial_begin or 0)
        for adam, moments in zip(adams, self.start_moments, strict=False):
            adam.load_state_dict(adam.state_dict() | {"state": moments})

        def schedule(adam: torch.optim.Optimizer, begin: int, every: int) -> Any:
            def rate(updates: int) -> float:
                warm = min(1.0, (updates + 1) / max(1, config.lr_warmup))
                left = (config.steps - begin - updates * every) / max(1, config.cooldown_steps)
                return max(0.0, min(warm, left))

            return torch.optim.lr_scheduler.LambdaLR(adam, rate)

        everies = (1, config.discriminator.every)
        return adams, [schedule(*each) for each in zip(adams, begins, everies, strict=False)]

    def whole_record(self) -> dict[str, float]:
        """The figures of the last step, averaged over the ranks; called on all of them."""
        names, values = list(self.record), torch.tensor(list(self.record.values()), device=self.device)
        return dict(zip(names, mean_over_ranks(values).tolist(), strict=True))

    # --- validation and state ---------------------------------------------------------------------------------

    def averaged(self) -> codecs.Codec:
        """A frozen codec with the averaged weights."""
        return codecs.Codec(self.averaged_network(), "under-training").to(self.device)

    @torch.no_grad()
    def averaged_network(self) -> Any:
        """A new network with the averaged weights, on the CPU."""
        network = codecs.build(self.shape)
        network.load_state_dict(self.network.state_dict())
        for parameter, mean in zip(network.parameters(), self.ema, strict=True):
            parameter.copy_(mean)
        return network

    def evaluate(self) -> tuple[dict[str, float], list[np.ndarray]]:
        """Log-mel distance, chroma agreement, share and perplexity of each codebook over the validation tracks; and
        the first `clips` of them through the codec, `[C, N]` each."""
        codec = self.averaged()
        mel, chroma = [], []
        heard: list[np.ndarray] = []
        counts = torch.zeros(codec.num_codebooks, codec.codebook_size)
        for audio in self.validation_audio:
            wave = torch.from_numpy(audio)
            codes = codec.encode(wave[None])
            decoded = codec.decode(codes)[0, :, : wave.shape[-1]].cpu().numpy()
            if len(heard) < self.config.clips:
                heard.append(decoded[:, : CLIP_SECONDS * codec.sample_rate])
            mel.append(log_mel_distance(audio.mean(0), decoded.mean(0)))
            chroma.append(chroma_agreement(audio.mean(0), decoded.mean(0)))
            for level, chosen in enumerate(codes[0].cpu()):
                counts[level] += torch.bincount(chosen, minlength=codec.codebook_size)
        result = {"valid/log_mel": float(np.mean(mel)), "valid/chroma": float(np.nanmean(chroma))}
        perplexity = torch.distributions.Categorical(counts).entropy().exp().tolist()
        used = (counts > 0).float().mean(1).tolist()
        for level in range(codec.num_codebooks):
            result |= {f"valid/used_{level + 1}": used[level], f"valid/perplexity_{level + 1}": perplexity[level]}
        return result, heard

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep EMA, balancer and the codec's shape beside Lightning's state."""
        checkpoint["network"] = dataclasses.asdict(self.shape) | {"ratios": list(self.shape.ratios)}
        checkpoint["ema"] = self.ema
        checkpoint["balancer"] = self.balancer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take EMA and balancer back."""
        self.ema = checkpoint["ema"]
        self.balancer.load_state_dict(checkpoint["balancer"])
