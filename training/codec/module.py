"""The Lightning module of the codec: encode, quantise, decode, compare; thin on purpose.

For the first `warmup_steps` the quantiser is left out, so that the codebooks start by k-means from an encoder that
already says something. The learning rate is constant and falls linearly to zero over the last `cooldown_steps`; a run
can be lengthened by resuming with more steps. The weights that are validated and exported are an EMA.
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
from training.codec import quantiser
from training.codec.losses import LossConfig, reconstruction_losses
from training.codec.quantiser import QuantiserConfig


@dataclass(frozen=True)
class CodecTrainConfig:
    """Settings of `python -m training.codec.train`.

    Args:
        size: `demo` or `32khz` (see `musicgen.codec.CODEC_SIZES`).
        data: catalogue URI, or a folder holding a PCM cache.
        run: run folder; the same one resumes.
        steps: optimiser steps in all.
        cooldown_steps: last steps, over which the learning rate falls to zero.
        warmup_steps: first steps, without quantisation.
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
        splits: shares of the split groups (artist and work), as in the ingest of the same music.
    """

    size: str = "demo"
    data: str = ""
    run: str = "runs/codec"
    steps: int = 8000
    cooldown_steps: int = 1500
    warmup_steps: int = 1200
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
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)


@torch.no_grad()
def _initialise(network: torch.nn.Module) -> None:
    """Convolutions start as torch starts them, uniform ±1/√fan_in, smaller than the Kaiming start of `transformers`."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            weight = module.weight
            bound = weight[0].numel() ** -0.5
            module.weight = torch.empty_like(weight).uniform_(-bound, bound)  # type: ignore[assignment]


class CodecModule(pl.LightningModule):
    """EnCodec under training; `validation_audio` is a list of `[C, N]` tracks that are never trained on."""

    def __init__(self, config: CodecTrainConfig, validation_audio: list[np.ndarray]) -> None:
        super().__init__()
        self.config = config
        self.shape = codecs.CODEC_SIZES[config.size]
        torch.manual_seed(config.seed)
        self.network: Any = codecs.build(self.shape)
        _initialise(self.network)
        self.ema = [p.detach().clone() for p in self.network.parameters()]
        self.validation_audio = validation_audio
        self.record: dict[str, float] = {}
        self._clock = time.monotonic()

    # --- one step ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        """Loss of `batch [B, C, N]`; raises `FloatingPointError` before the update when it is not finite."""
        step, config = self.global_step, self.config
        latents = self.network.encoder(batch)
        losses: dict[str, Tensor] = {}
        if step >= config.warmup_steps:
            result = quantiser.quantise(
                self.network.quantizer, latents, config.quantiser, train=True, seed=config.seed + 10 * step
            )
            latents, losses["commitment"] = result.latents, result.commitment
            self.record["train/revived"] = float(sum(result.revived))
        decoded = self.network.decoder(latents)[..., : batch.shape[-1]]
        weights = config.loss if step >= config.warmup_steps else config.warmup_loss
        losses |= reconstruction_losses(batch, decoded, weights, self.shape.sample_rate_hz)
        total = sum((getattr(weights, name) * value for name, value in losses.items()), start=batch.new_zeros(()))
        if not bool(torch.isfinite(total)):
            raise FloatingPointError(f"codec loss is not finite at step {step} ({losses}); seed {config.seed}")
        self.record |= {f"train/{name}": float(value.detach()) for name, value in losses.items()}
        return total

    def on_train_batch_start(self, batch: Tensor, batch_index: int) -> None:
        """Start the codebooks by k-means at the end of the warm-up."""
        if self.global_step == self.config.warmup_steps and not self._initialised:
            self._kmeans_start()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_index: int) -> None:
        """Advance the EMA."""
        decay = min(self.config.ema_decay, (1 + self.global_step) / (10 + self.global_step))
        with torch.no_grad():
            self.ema = [e.to(p.device) for e, p in zip(self.ema, self.network.parameters(), strict=True)]
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.network.parameters()], 1 - decay)

    @property
    def _initialised(self) -> bool:
        return bool(self.network.quantizer.layers[0].codebook.embed.abs().sum() > 0)

    @torch.no_grad()
    def _kmeans_start(self) -> None:
        stream = self.trainer.train_dataloader.dataset  # type: ignore[union-attr]
        latents: list[Tensor] = []
        step = 0
        while sum(len(x) for x in latents) < self.config.quantiser.kmeans_latents:
            batch = stream.batch(10_000_000 + step).to(self.device)
            z = self.network.encoder(batch)
            latents.append(z.permute(0, 2, 1).reshape(-1, z.shape[1]))
            step += 1
        quantiser.initialise(self.network.quantizer, torch.cat(latents), self.config.quantiser, self.config.seed)

    # --- optimiser --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Adam with a constant rate and a linear cool-down, stepped per update."""
        config = self.config
        adam = torch.optim.Adam(self.network.parameters(), lr=config.lr, betas=config.betas)

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / 50)
            left = (config.steps - step) / max(1, config.cooldown_steps)
            return max(0.0, min(warm, left))

        schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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
        """Keep the EMA beside Lightning's state."""
        checkpoint["ema"] = self.ema

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the EMA back."""
        self.ema = checkpoint["ema"]
