"""The settings of a training: those of its size, of fine-tuning and of adapters, then the command line.

`read_config` puts them together from configs/train/ and what a user gives; `task_of` and `layout_settings` pick what
`training.budget` plans with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from musicgen import settings
from musicgen.adapters import AdapterConfig
from musicgen.config import SIZES, LMConfig, size
from musicgen.errors import UserError
from musicgen.settings import SettingsError
from training import budget, finetune, sources
from training.callbacks import LogConfig
from training.data import BatchConfig
from training.launch import RayConfig
from training.optim import MOMENTS, OptimConfig
from training.selection import Selection
from training.strategy import HardwareConfig

SEEDS = 2**63
PAPER_FRAME_RATE = 50.0  # of EnCodec at 32 kHz
CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "train"


@dataclass(frozen=True)
class TrainConfig:
    """Train a MusicGen language model on a data set made by ingest.

    Args:
        size: demo, 300m, 1.5b or 3.3b; chooses configs/train/<size>.yaml and the model's shape.
        data: the data set, a folder or URI written by ingest, or a mixture of several: `a:0.7,b:0.3`.
        cache: folder for sets fetched from an object store; the user's cache folder when empty.
        run: the run's folder; the same folder resumes.
        init: release folder or hub name whose weights the run starts from (fine-tuning); all else starts anew. A mono
            model is widened for a stereo one. Defaults then come from configs/train/finetune.yaml too.
        lora: with a rank, the run trains an adapter on `init` and leaves the rest as it is (configs/train/lora.yaml).
        select: a part of the data: an artist, a style, some minutes.
        steps: length of the training, and of the learning rate's schedule.
        stop_at: stop at this step and keep the schedule of `steps`; 0 goes to the end.
        codebook_init: embeddings and heads start from the codec's codebooks (see `training.codebooks`); else, as in the
            reference, at random.
        seed: of the initial weights and of everything drawn.
        codec: name or folder of the codec for the clips, where it is not the one the data set names.
        licence: licence of the weights, written into the release.
        release_dtype: type of the weights in the release.
        lm: the model's shape, that of `size` unless changed.
        batch: what a step reads.
        optim: how the weights move.
        log: when the run looks at itself.
        hardware: where it computes.
        ray: whether a Ray cluster runs it.
    """

    size: str = "demo"
    data: str = ""
    cache: str = ""
    run: str = ""
    init: str = ""
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    select: Selection = field(default_factory=Selection)
    codebook_init: bool = False
    steps: int = 1_000_000
    stop_at: int = 0
    seed: int = 2036
    codec: str = ""
    licence: str = "not stated"
    release_dtype: Literal["float32", "float16"] = "float32"
    lm: LMConfig = field(default_factory=LMConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    ray: RayConfig = field(default_factory=RayConfig)


def read_config(argv: Sequence[str], *, folders: bool = True) -> TrainConfig:
    """Settings of a run: the shape of its size, configs/train/<size>.yaml, those of fine-tuning, the command line.

    Args:
        folders: whether DATA and RUN must be given; a plan needs neither.

    Raises:
        UserError: unknown SIZE, no DATA, no RUN.
        SettingsError: unknown setting or a value that is not allowed.
    """
    name = value_of("size", argv, "demo")
    if name not in SIZES:
        raise UserError(f"unknown SIZE {name!r}; allowed: {', '.join(SIZES)}")
    shape = [f"--{key}={_word(value)}" for key, value in settings.flat({"lm": settings.to_dict(size(name))}).items()]
    adapter = value_of("lora.rank", argv, "0") != "0"
    layers = finetune.layers(CONFIGS, name, init=bool(value_of("init", argv)), adapter=adapter)
    config = settings.parse(TrainConfig, [*shape, *argv], layers=layers, prog="python -m training.train")
    if MOMENTS[config.optim.name] > 2 and not value_of("optim.lr", argv) and '"lr"' not in value_of("optim", argv):
        # They find the rate themselves and take this one as a factor of it.
        config = replace(config, optim=replace(config.optim, lr=1.0))
    if folders and not config.data:
        raise UserError("DATA is missing; give a data set made by `make ingest`, such as DATA=data/demo")
    if folders and not config.run:
        raise UserError("RUN is missing; give a folder for the run, such as RUN=runs/first; the same folder resumes")
    if "://" in config.run:
        raise UserError(f"RUN={config.run!r}: a run is a folder of this machine or of a shared file system, no store")
    if config.steps < 1 or config.stop_at < 0:
        raise UserError(f"steps is {config.steps} and stop_at {config.stop_at}; give steps >= 1 and stop_at >= 0")
    if not 0 <= config.seed < SEEDS:
        raise UserError(f"seed is {config.seed}; give a whole number from 0 to 2**63 - 1 ({SEEDS - 1})")
    read = {"size": name, "init": bool(value_of("init", argv)), "lora.rank": adapter}
    for key, found in (("size", config.size), ("init", bool(config.init)), ("lora.rank", bool(config.lora.rank))):
        if found != read[key]:  # of which the settings files of the run's size, of fine-tuning and of adapters follow
            raise UserError(f"{key} was given in a form that is not read here; give --{key} on the command line")
    return config


def _word(value: Any) -> str:
    """A setting's value as the command line takes it."""
    return json.dumps(value) if isinstance(value, (list, tuple)) else str(value)


def value_of(name: str, argv: Sequence[str], default: str = "") -> str:
    """The last value of a setting: `--name VALUE`, `--name=VALUE`, or what a `--config FILE` has for it."""
    found = default
    for i, token in enumerate(argv):
        key, equals, value = token.partition("=")
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        if key == f"--{name}":
            found = value
        elif key == "--config":
            found = _value_in(Path(value), name, found)
    return found


def _value_in(file: Path, name: str, default: str) -> str:
    """A setting in a YAML file; what is wrong with the file is for `settings.parse` to say."""
    try:
        found = settings.flat(settings.read_yaml(file)).get(name, default)
    except (SettingsError, RecursionError):
        return default
    return "" if found is None else str(found)


def task_of(config: TrainConfig, frame_rate: float = 0.0) -> budget.Task:
    """What the plan needs to know of a run's settings.

    Args:
        frame_rate: the codec's; without one that of DATA's, and without DATA the paper's 50.

    Raises:
        UserError: there is no finished data set at DATA.
    """
    rate = frame_rate or (sources.frame_rate(config.data) if config.data else PAPER_FRAME_RATE)
    return budget.Task(
        config.lm,
        config.batch.size,
        round(config.batch.crop_seconds * rate),
        config.steps,
        bf16=config.hardware.number_format == "bf16",
        moments=MOMENTS[config.optim.name],
        crop_seconds=config.batch.crop_seconds,
        lora=config.lora,
    )


def layout_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that narrow the plan's choice, as `budget.choose` takes them."""
    hardware = config.hardware
    return {
        "strategy": hardware.strategy,
        "checkpointing": hardware.checkpointing,
        "accumulate": config.batch.accumulate,
        "shard_group": hardware.shard_group,
    }
