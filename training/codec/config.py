"""Settings of codec training, and what about them can be seen to be wrong before anything is read.

configs/codec/<size>.yaml comes first, then the command line. Three sets of weights follow each other: `warmup_loss`
without the quantiser, `loss` with it, `adversarial_loss` once the discriminator listens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from musicgen import codec as codecs
from musicgen import settings
from musicgen.errors import UserError
from pipelines.assemble import SplitConfig
from training.codec.balancer import BalancerConfig
from training.codec.discriminator import DiscriminatorConfig
from training.codec.losses import RECONSTRUCTION, LossConfig, shortest
from training.codec.quantiser import QuantiserConfig
from training.strategy import HardwareConfig

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "codec"


_MOST, _ABOVE_ZERO, _BELOW_ONE = 1e9, 1e-12, math.nextafter(1.0, 0.0)
# What a number of each setting, or each of several, must lie between; NaN and infinity lie nowhere.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("lr", "discriminator.lr", "balancer.total_norm", "quantiser.epsilon"), (_ABOVE_ZERO, _MOST)),
    **dict.fromkeys(("clip", "discriminator.seconds", "discriminator.slope", "quantiser.dead_share"), (0, _MOST)),
    **dict.fromkeys(
        ("betas", "discriminator.betas", "ema_decay", "balancer.decay", "quantiser.decay"), (0, _BELOW_ONE)
    ),
    **dict.fromkeys(("quantiser.kmeans_iterations", "quantiser.kmeans_latents"), (1, _MOST)),
    "crop_seconds": (0.001, 3600),
    "discriminator.dilations": (1, 1024),
    "discriminator.windows": (16, 65_536),
    "network.sample_rate_hz": (1000, 384_000),
    "network.num_filters": (2, 4096),
    "network.hidden_size": (1, 4096),
    "network.ratios": (1, 1024),
    "network.num_lstm_layers": (1, 64),
    "network.num_codebooks": (1, 64),
    "network.codebook_size": (2, 32_768),  # an entry is an int16 in the shards
}
_LOSS_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys((*RECONSTRUCTION, "adversarial", "feature", "commitment"), (0, _MOST)),
    **dict.fromkeys(("mel_windows", "tonal_windows"), (16, 65_536)),
    "tonal_max_hz": (1, _MOST),
}


def _check_range(name: str, config: Any, low: float, high: float) -> None:
    """Raises `ValueError` where the number, or one of the numbers, of a setting of `config` lies outside."""
    value = functools.reduce(getattr, name.split("."), config)
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(low <= number <= high for number in numbers) or (name == "network.ratios" and not numbers):
        least = "more than 0" if low == _ABOVE_ZERO else f"at least {low:g}"
        most = " and less than 1" if high == _BELOW_ONE else "" if high == _MOST else f" and at most {high:g}"
        shown = list(value) if isinstance(value, list | tuple) else value
        raise ValueError(f"{name} is {shown}; it must be {least}{most}")


@dataclass(frozen=True)
class CodecTrainConfig:
    """Settings of `python -m training.codec.train`.

    Args:
        size: `demo` or `32khz`; chooses configs/codec/<size>.yaml and the network.
        data: URI of a catalogue or of audio shards, or a folder holding a PCM cache.
        run: run folder; the same one resumes.
        init: start from the weights of a codec folder, of another run, or of a run's state/last.ckpt; empty for none.
        steps: optimiser steps in all.
        lr_warmup: first updates, over which the learning rates rise.
        cooldown_steps: last steps, over which the learning rates fall to zero; 0 keeps them constant.
        warmup_steps: first steps, without quantisation.
        adversarial_start: first step with the discriminator, after the warm-up at the earliest; null for none.
        adversarial_ramp: steps over which the weights of its two losses rise from zero, while it learns to hear.
        batch_size: crops per step, over all ranks.
        crop_seconds: length of a crop.
        lr: Adam learning rate.
        betas: Adam betas.
        clip: gradient norm limit of the codec; 0 for none.
        ema_decay: decay of the averaged weights per step.
        validate_every: steps between validations, which also write a checkpoint.
        validation_tracks: tracks looked at in a validation, twenty seconds of each.
        clips: reconstructions to listen to at each validation, ten seconds of the first of these tracks.
        seed: addresses every random choice.
        loss: weights of the losses.
        warmup_loss: weights during the warm-up, where the waveform leads.
        adversarial_loss: weights from `adversarial_start` on.
        balancer: how gradients are balanced, where the weights in force ask for it.
        discriminator: its shape and training.
        network: the codec's shape, that of `size` unless changed; channels 2 makes it stereo.
        hardware: where it computes; quantisation and losses stay float32 under bf16.
        splits: shares of the split groups (artist and work), as in the ingest of the same music.
    """

    size: str = "demo"
    data: str = ""
    run: str = "runs/codec"
    init: str = ""
    steps: int = 8000
    lr_warmup: int = 50
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
    clips: int = 3
    seed: int = 2036
    splits: SplitConfig = field(default_factory=lambda: SplitConfig(0.85, 0.15, 0.0))
    loss: LossConfig = field(default_factory=LossConfig)
    warmup_loss: LossConfig = field(default_factory=lambda: LossConfig(wave=3.0, mel=0.3, tonal=1.0))
    adversarial_loss: LossConfig = field(default_factory=lambda: LossConfig(balance=True, adversarial=1.0, feature=1.0))
    quantiser: QuantiserConfig = field(default_factory=QuantiserConfig)
    balancer: BalancerConfig = field(default_factory=BalancerConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    network: codecs.CodecConfig = field(default_factory=codecs.CodecConfig)
    hardware: HardwareConfig = field(default_factory=lambda: HardwareConfig(precision="float32"))

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1), ("batch_size", 1), ("validate_every", 1), ("validation_tracks", 1), ("lr_warmup", 0),
            ("cooldown_steps", 0), ("warmup_steps", 0), ("adversarial_start", 0), ("adversarial_ramp", 0), ("clips", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name, (low, high) in _RANGES.items():
            _check_range(name, self, low, high)
        for phase in ("loss", "warmup_loss", "adversarial_loss"):
            for name, (low, high) in _LOSS_RANGES.items():
                _check_range(f"{phase}.{name}", self, low, high)
        if self.network.channels not in (1, 2):
            raise ValueError(f"network.channels is {self.network.channels}; a codec is mono (1) or stereo (2)")
        if self.network.codebook_size & (self.network.codebook_size - 1) or self.network.codebook_size < 2:
            raise ValueError(f"network.codebook_size is {self.network.codebook_size}; it must be a power of two")

    @property
    def adversarial_begin(self) -> int | None:
        """First step with the discriminator, None for none."""
        return None if self.adversarial_start is None else max(self.adversarial_start, self.warmup_steps)

    @property
    def crop_samples(self) -> int:
        """Samples of a crop: whole frames."""
        return int(self.crop_seconds * self.network.sample_rate_hz) // self.network.hop * self.network.hop


def check(config: CodecTrainConfig) -> None:
    """Raises `UserError` where crops are too short for the losses, or a batch cannot be shared among the ranks."""
    rate, ranks = config.network.sample_rate_hz, config.hardware.world
    if config.batch_size % ranks:
        raise UserError(
            f"batch_size is {config.batch_size}, which {ranks} processes cannot share evenly; "
            f"give a multiple of {ranks}"
        )
    if config.steps <= config.warmup_steps:
        raise UserError(
            f"steps is {config.steps}, and the first {config.warmup_steps} (warmup_steps) train without the quantiser; "
            "give more steps or a shorter warm-up"
        )
    if config.quantiser.kmeans_latents < config.network.codebook_size and config.warmup_steps:
        raise UserError(
            f"quantiser.kmeans_latents is {config.quantiser.kmeans_latents}; k-means needs at least one for each of "
            f"the {config.network.codebook_size} entries"
        )
    for name, allowed in (("strategy", "ddp"), ("checkpointing", "none"), ("compile", "off")):
        value = getattr(config.hardware, name)
        if value not in ("auto", allowed):
            raise UserError(f"hardware.{name} is {value!r}; a codec trains with 'auto' or {allowed!r}")
    phases = {"loss": config.loss}
    if config.warmup_steps:
        phases["warmup_loss"] = config.warmup_loss
    if config.adversarial_start is not None:
        phases["adversarial_loss"] = config.adversarial_loss
    for name, weights in phases.items():
        if not any(getattr(weights, loss) for loss in RECONSTRUCTION):
            raise UserError(f"{name} gives no weight to any of {', '.join(RECONSTRUCTION)}; one of them must lead")
    needs = {name: shortest(weights) for name, weights in phases.items()} | {"hop": config.network.hop}
    name = max(needs, key=lambda n: needs[n])
    if config.crop_samples < needs[name]:
        raise UserError(
            f"crop_seconds is {config.crop_seconds:g} ({config.crop_samples} samples); {name} needs at least "
            f"{needs[name] / rate:.3f} s. Give longer crops, or losses with shorter windows"
        )
    if config.adversarial_start is not None:
        heard = round(config.discriminator.seconds * rate) or config.crop_samples
        longest = max(config.discriminator.windows)
        if not longest <= heard <= config.crop_samples:
            raise UserError(
                f"the discriminator hears {heard / rate:g} s of each crop; it needs at least its longest window "
                f"({longest / rate:g} s) and at most the crop ({config.crop_samples / rate:g} s). Set "
                "discriminator.seconds, discriminator.windows or crop_seconds"
            )


def read_config(argv: Sequence[str]) -> CodecTrainConfig:
    """Settings of a run: configs/codec/<size>.yaml, then the command line.

    Raises:
        UserError: unknown SIZE, no DATA, crops too short, a batch that cannot be shared.
        SettingsError: unknown setting or a value that is not allowed.
    """
    prog = "python -m training.codec.train"
    size = settings.parse(CodecTrainConfig, argv, prog=prog).size
    if size not in codecs.CODEC_SIZES:
        raise UserError(f"unknown codec SIZE {size!r}; allowed: {', '.join(codecs.CODEC_SIZES)}")
    network = [f"--network.{key}={value}" for key, value in asdict(codecs.CODEC_SIZES[size]).items()]
    network = [word.replace("(", "[").replace(")", "]") for word in network]
    config = settings.parse(CodecTrainConfig, [*network, *argv], layers=[CONFIGS / f"{size}.yaml"], prog=prog)
    if not config.data:
        raise UserError(
            "DATA is missing: give the URI of a catalogue (catalog.jsonl) or of a folder of audio shards (.tar), or a "
            "PCM cache"
        )
    if config.init and not any(token.startswith("--warmup_steps") for token in argv):
        # Trained codebooks would be left behind by an encoder that warms up without them.
        config = replace(config, warmup_steps=0)
    check(config)
    return config
