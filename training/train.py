"""Command line: `python -m training.train --size demo --data URI --run runs/NAME`; the same run folder goes on.

Settings come from configs/train/<size>.yaml, then from the command line. The run folder keeps config.yaml (settings,
data version, codec and text encoder identities), metrics.jsonl, samples/, state/ to resume from and release/, the
averaged weights of the best validation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from musicgen import settings
from musicgen.adapters import AdapterConfig, num_parameters
from musicgen.config import SIZES, LMConfig, size
from musicgen.errors import UserError
from training import budget, devices, finetune, forecast, launch, products, state, words
from training import folder as folder_of
from training.callbacks import Clips, LogConfig
from training.data import BatchConfig
from training.launch import EXIT_REQUEUE, Launched, RayConfig
from training.optim import MOMENTS, OptimConfig
from training.selection import Selection
from training.state import Progress
from training.strategy import HardwareConfig

if TYPE_CHECKING:
    from musicgen.codec import Codec
    from musicgen.conditioning import TextEncoder
    from training.sources import Sources

SEEDS = 2**63
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
    name = _value_of("size", argv, "demo")
    if name not in SIZES:
        raise UserError(f"unknown SIZE {name!r}; allowed: {', '.join(SIZES)}")
    shape = [f"--{key}={_word(value)}" for key, value in folder_of.flat({"lm": settings.to_dict(size(name))}).items()]
    adapter = _value_of("lora.rank", argv, "0") != "0"
    layers = finetune.layers(CONFIGS, name, init=bool(_value_of("init", argv)), adapter=adapter)
    config = settings.parse(TrainConfig, [*shape, *argv], layers=layers, prog="python -m training.train")
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
    read = {"size": name, "init": bool(_value_of("init", argv)), "lora.rank": adapter}
    for key, found in (("size", config.size), ("init", bool(config.init)), ("lora.rank", bool(config.lora.rank))):
        if found != read[key]:  # of which the settings files of the run's size, of fine-tuning and of adapters follow
            raise UserError(f"{key} was given in a form that is not read here; give --{key} on the command line")
    return config


def _word(value: Any) -> str:
    """A setting's value as the command line takes it."""
    return json.dumps(value) if isinstance(value, (list, tuple)) else str(value)


def _value_of(name: str, argv: Sequence[str], default: str = "") -> str:
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
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return default
    found = folder_of.flat(tree).get(name, default) if isinstance(tree, dict) else default
    return "" if found is None else str(found)


def load_codec(shards: Sources, name: str) -> Codec:
    """The codec that made the data set's tokens.

    Raises:
        UserError: it is not here, or the one here is another one.
    """
    from musicgen import codec as codecs

    made_by = shards.info["codec"]
    name = name or made_by["name"]
    try:
        codec = codecs.load(name)
    except (UserError, OSError) as error:
        raise UserError(
            f"DATA holds tokens of codec {made_by['name']!r}, and {name!r} could not be loaded: {error}. "
            "Give its folder with --codec, or train without it: --log.clips 0 --codebook_init false"
        ) from error
    if codec.identity != made_by["identity"]:
        raise UserError(
            f"DATA holds tokens of codec {made_by['name']!r} (identity {made_by['identity'][:12]}…), but codec "
            f"{name!r} here is another one (identity {codec.identity[:12]}…), which would turn them into noise. "
            "Ingest again with this codec, or give the right one with --codec"
        )
    return codec


def _quiet_libraries() -> None:
    """Keep Lightning's hints out of the plan; what matters of them is ours to say."""
    import logging

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    for pattern in (
        ".*torch.distributed is disabled.*",
        ".*does not have many workers.*",
        ".*IterableDataset.*__len__.*",
        ".*lr_scheduler.step.*",
        ".*`srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", category=FutureWarning)


def task_of(config: TrainConfig, frame_rate: float = 50.0) -> budget.Task:
    """What the plan needs to know of a run's settings."""
    return budget.Task(
        config.lm,
        config.batch.size,
        round(config.batch.crop_seconds * frame_rate),
        config.steps,
        bf16=config.hardware.number_format == "bf16",
        moments=MOMENTS[config.optim.name],
        crop_seconds=config.batch.crop_seconds,
        adapter=num_parameters(config.lm, config.lora.rank),
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


def lay_out(config: TrainConfig, shards: Sources, before: Progress | None, *, speaks: bool) -> budget.Plan:
    """The plan of this run on this machine, printed where it `speaks`.

    Args:
        before: of the state resumed from; on as many ranks the run keeps its parts per step, so that it goes on to the
            bit whatever memory the machine has now.

    Raises:
        UserError: it cannot fit.
    """
    hardware = config.hardware
    wanted = layout_settings(config)
    if before is not None and before.ranks == hardware.world and not config.batch.accumulate:
        wanted["accumulate"] = before.accumulate
    device = devices.device_here(hardware.devices, hardware.uses_gpu)
    task = task_of(config, shards.info["codec"]["frame_rate"])
    plan = budget.choose(task, device, hardware.world, nodes=hardware.nodes, **wanted)
    if speaks:
        print("\n".join(plan_lines(config, plan)), flush=True)
    if not plan.fits:
        raise UserError(
            f"SIZE={config.size} does not fit {hardware.world} x {device.name} with {device.memory / 2**30:.1f} GiB; "
            f"see the plan above. What fits: {forecast.what_fits(plan)}"
        )
    return plan


def plan_lines(config: TrainConfig, plan: budget.Plan) -> list[str]:
    """The plan as text, with the time it should take here."""
    mfu = 0.6 if plan.device.is_cpu else devices.expected_mfu(config.lm.dim)
    rate, said = devices.rate_of(plan.device, bf16=plan.task.bf16, mfu=mfu, assumed=False)
    return forecast.lines(plan, name=config.size, rate=rate, rate_said=said)


def _load_encoder(config: TrainConfig) -> TextEncoder:
    from musicgen.conditioning import TextEncoder

    encoder = TextEncoder.load(config.lm.condition.text_encoder)
    if encoder.dim != config.lm.condition.text_dim:
        raise UserError(
            f"text encoder {encoder.name!r} has width {encoder.dim}, the setting says "
            f"{config.lm.condition.text_dim}; set --lm.condition.text_dim {encoder.dim}"
        )
    return encoder


def fit(config: TrainConfig, launched: Launched | None = None) -> Path:
    """Train or go on; returns the run's folder.

    Args:
        launched: this process among those that train together; as its environment says when None.

    Raises:
        UserError: bad data, a run of other settings, a codec that does not fit, a loss that is not finite.
        SystemExit: with `EXIT_REQUEUE`, when a signal asked the run to leave and its state is saved; with
            `EXIT_INTERRUPTED` where that was Ctrl-C.
        KeyboardInterrupt: a second Ctrl-C; nothing newer than the last state is kept.
    """
    import torch

    from musicgen import adapters
    from musicgen.lm import MusicLM
    from musicgen.style import Latents
    from musicgen.weights import initial_state
    from training import callbacks, controls, data, lineage, record, selection, sources, strategy, watch
    from training.codebooks import start_from_codebooks
    from training.module import MusicLMModule

    _quiet_libraries()
    launched = launched or launch.here()
    rank, hardware = launched.rank, launch.fitted(config.hardware, launched)
    config = dataclasses.replace(config, hardware=hardware)
    is_zero = rank == 0
    strategy.let_memory_grow(hardware)
    strategy.check(hardware)
    shards = sources.open_data(config.data, config.cache, rank=launched.local_rank)
    selection.apply(shards, config.select)
    books, codes = config.lm.num_codebooks, config.lm.codebook_size
    data.check(shards, config.batch, world=hardware.world, num_codebooks=books, codebook_size=codes)
    labelled = controls.with_labels(config.lm, shards, data.tracks_of(shards, "train").rows)
    styled = config.lm.condition.style.dim > 0
    latents = Latents(load_codec(shards, config.codec)) if styled else None
    config = dataclasses.replace(config, lm=controls.with_latents(labelled, latents))
    folder = Path(config.run)
    before = folder_of.last_progress(folder)
    plan = lay_out(config, shards, before, speaks=is_zero)
    encoder = _load_encoder(config)
    base, origin = finetune.base_of(config), finetune.origin_of(config, folder)
    identity = {
        "settings": yaml.safe_load(yaml.safe_dump(folder_of.plain(settings.to_dict(config)))),
        "dataset_version": shards.info["dataset_version"],
        "sources": sources.identities(shards),
        "codec": {key: shards.info["codec"][key] for key in ("name", "identity")},
        "text_encoder": {"name": encoder.name, "identity": encoder.identity},
        **({"base": base} if base else {}),
        **({"origin": origin} if origin else {}),
    }
    run_id, start = folder_of.find_run(config.run, identity, folder_of.plain(settings.to_dict(TrainConfig())))
    stop = min(config.stop_at or config.steps, config.steps)
    codec = load_codec(shards, config.codec) if config.log.clips and is_zero else None
    # Where the model is sharded, rank 0 sends its weights; a state holds what is trained, so an adapter needs its base.
    takes = config.init and (base or not start) and (is_zero or plan.shards == 1)
    weights = initial_state(config.init, config.lm, shards.info["codec"], identity["text_encoder"]) if takes else None
    if run_id is None and is_zero:
        run_id = folder_of.make_run(config.run, identity)
    release = products.Release(folder / "release", config, shards, base, origin)
    behind = before is not None and start > 0 and release.is_behind(before)
    unigram = data.unigram_loss(shards, config.batch).tolist()
    if is_zero:
        print("\n".join(words.data_lines(config, encoder, shards, start, unigram)), flush=True)
    if start >= stop:
        todo = behind and (start == config.steps or (before is not None and before.best_loss is not None))
        print(
            f"{folder} has already made {start} of {stop} steps; "
            + ("only its release is not there yet" if todo else "nothing to do"),
            flush=True,
        )
        if not (todo and is_zero):
            return folder
    if is_zero:
        folder_of.hold(folder)
        folder_of.clear_leftovers(folder)

    torch.manual_seed(config.seed)
    lm = strategy.build_model(functools.partial(MusicLM, config.lm), plan, rank)
    if weights is not None:
        finetune.check_inputs(config, lm, weights)
        lm.load_state_dict(lm.state_dict() | weights)  # an input that the release lacks keeps its start
    elif config.codebook_init and not start and (is_zero or plan.shards == 1):
        start_from_codebooks(lm, load_codec(shards, config.codec))
    if base:
        adapters.attach(lm, config.lora)
    if start >= stop:
        from_step = _release_step(before, folder / "state") or start
        release.from_state(folder / "state", from_step, lm, encoder)
        if release.waiting is not None:
            raise release.sorry(folder / "state")
        print(f"release   written to {release.folder} from the state of step {from_step}", flush=True)
        return folder
    if behind and before is not None and before.best_loss is not None:
        best = _release_step(before, folder / "state")
        if best and is_zero:
            release.from_state(folder / "state", best, lm, encoder)
        elif not best:  # those weights are gone: the next validation is released instead, unless it is worse than this
            before.best_loss, before.best_step = release.valid_loss(), None
    rule = data.crop_rule(config.batch, shards.info["codec"]["frame_rate"])
    module = MusicLMModule(
        lm,
        encoder,
        config.optim,
        total_steps=config.steps,
        crop_frames=rule.frames,
        accumulate=plan.accumulate,
        frame_rate=shards.info["codec"]["frame_rate"],
        seed=config.seed,
        prepare=lambda model, device, traffic: strategy.prepare(model, hardware, plan, device, traffic),
        resume=folder / "state" if start else None,
        latents=latents,
        compiled=hardware.compiles,
    )
    if before is not None:
        module.progress = dataclasses.replace(before, accumulate=plan.accumulate)

    start_of: dict[str, Any] = {}
    if is_zero:
        start_of = {"git": lineage.git_state(), "plan": plan_lines(config, plan)}
    logger = record.wandb_logger(folder, run_id, identity, start_of) if run_id and is_zero else None
    journal = record.Record(folder, start, logger) if is_zero else None
    if is_zero:
        lineage.began(folder, step=start, steps=config.steps, ranks=hardware.world, **start_of)
    condition = config.lm.condition
    batches = data.validation_batches(shards, config.batch, rank=rank, world=hardware.world, condition=condition)
    if not batches and is_zero:
        print("warning   DATA has no validation tracks: no validation, the release holds the last weights", flush=True)
    batch = dataclasses.replace(config.batch, accumulate=plan.accumulate)
    stream = data.Stream(
        shards,
        batch,
        seed=config.seed,
        start=start,
        rank=rank,
        world=hardware.world,
        tokenize=encoder.tokenize,
        condition=condition,
    )
    loader = data.training_loader(stream, pin_memory=hardware.uses_gpu)
    clock = watch.Stopwatch(plan.step_flop, devices.peak_of(plan.device, hardware.world, bf16=plan.task.bf16), loader)
    recorder = callbacks.Recorder(journal, config.log.every, config.steps, clock)
    validation = callbacks.Validation(
        journal,
        batches,
        config.log.valid_every,
        config.steps,
        sum(unigram) / len(unigram),
        release,
        clock,
        before=bool(config.init),
    )
    prompts = products.clip_prompts(shards, config.log, [t for b in batches for t in b.texts]) if is_zero else []
    describe = functools.partial(products.release_info, config=config, shards=shards, origin=origin)
    clips = callbacks.Clips(
        journal,
        config.log,
        config.steps,
        prompts,
        functools.partial(products.make_clip, codec=codec, info=describe),
        functools.partial(
            products.make_ceilings, batches=batches, prompts=prompts, codec=codec, seconds=config.log.clip_seconds
        ),
        clock,
    )
    background = _in_background(config, plan)
    states = callbacks.States(
        folder / "state", config.log, stop, clock, background=background, elsewhere=launched.asked
    )
    profile = watch.Profile(folder / "profile", config.log.profile_at, config.log.profile_steps)
    bar = callbacks.Bar(recorder, validation, config.steps, config.steps)
    trainer = strategy.build_trainer(
        hardware,
        plan,
        steps=stop - start,
        callbacks=[profile, recorder, validation, clips, states, bar, clock],
        launched=launched,
        logger=logger,
    )
    try:
        trainer.fit(module, train_dataloaders=loader)
    except BaseException as error:
        interrupted = launch.was_interrupted(error)
        left = isinstance(error, SystemExit) and error.code == EXIT_REQUEUE
        if journal is not None:
            how = "interrupted" if interrupted else "left" if left else "failed"
            said = f"{type(error).__name__}: {error}"[:500] if how == "failed" else ""
            lineage.ended(folder, step=module.progress.step, how=how, error=said)
            journal.finish(exit_code=1)
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    if journal is not None:
        left = states.left_at is not None
        unwritten = None if left else _unwritten(release, clips, folder, stop)
        if left:
            how = "interrupted" if states.asked == signal.SIGINT else "left"
        else:
            how = "failed" if unwritten else "done" if stop == config.steps else "paused"
        lineage.ended(folder, step=module.progress.step, how=how, error=str(unwritten or "")[:500])
        journal.finish(exit_code=1 if unwritten else 0)
        if unwritten is not None:
            raise unwritten
        if states.left_at is not None:
            print(
                f"left      after step {states.left_at} of {config.steps}, asked by "
                f"{signal.Signals(states.asked).name}; the state is saved, run the same command again to go on",
                flush=True,
            )
            raise SystemExit(launch.EXIT_INTERRUPTED if states.asked == signal.SIGINT else EXIT_REQUEUE)
        words.summary(folder, module, validation.latest, stop, config.steps, plan)
    return folder


def _unwritten(release: products.Release, clips: Clips, folder: Path, step: int) -> UserError | None:
    """What to tell of a release or of clips that the disk did not take to the end."""
    if release.waiting is not None:
        return release.sorry(folder / "state")
    if clips.missing:
        return UserError(
            f"the clips of step {step} could not be written to {folder / 'samples'}: {clips.missing}. State and "
            f"release are saved: free some room and make clips from the release, `make generate MODEL={release.folder}`"
        )
    return None


def _release_step(before: Progress | None, states: Path) -> int | None:
    """The step of the best validation, where its state is kept."""
    step = before.best_step if before is not None else None
    return step if step in state.steps_in(states) else None


def _in_background(config: TrainConfig, plan: budget.Plan) -> bool:
    """Whether states are written beside the training: where the memory holds a copy of weights, average and moments."""
    if config.log.state_background != "auto":
        return config.log.state_background == "on"
    copy = 4.0 * (2 + plan.task.moments) * plan.task.trained / plan.shards
    here = plan.device.memory if plan.device.is_cpu else devices.host_memory() / config.hardware.devices
    return copy + (plan.needed if plan.device.is_cpu else 0) <= budget.USABLE * here


def main(argv: Sequence[str]) -> int:
    """Train or resume; see `TrainConfig`."""
    config = read_config(argv)
    if config.ray.address:
        from training import on_ray

        on_ray.fit(config)
    else:
        with launch.outside_steps():
            fit(config)
    return 0


if __name__ == "__main__":
    settings.run(main)
