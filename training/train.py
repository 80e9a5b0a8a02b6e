"""Command line: `python -m training.train --size demo --data URI --run runs/NAME`; the same run folder goes on.

Settings come from configs/train/<size>.yaml, then from the command line (`training.config`). The run folder keeps
config.yaml (settings, data version, codec and text encoder identities), metrics.jsonl, samples/, state/ to resume from
and release/, the averaged weights of the best validation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen.errors import UserError
from training import budget, devices, launch
from training.config import TrainConfig, read_config
from training.launch import EXIT_REQUEUE, Launched

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from training import callbacks, products, watch
    from training.module import MusicLMModule
    from training.record import Record
    from training.start import Start


def fit(config: TrainConfig, launched: Launched | None = None) -> Path:
    """Train or go on; returns the run's folder. Where all processes end for the same reason, rank 0 says it.

    Args:
        launched: this process among those that train together; as its environment says when None.

    Raises:
        UserError: bad data, a run of other settings, a codec that does not fit, a loss that is not finite.
        SystemExit: with `EXIT_REQUEUE`, when a signal asked the run to leave and its state is saved; with
            `EXIT_INTERRUPTED` where that was Ctrl-C.
        KeyboardInterrupt: a second Ctrl-C; nothing newer than the last state is kept.
    """
    from training import lineage, record, start, strategy

    _quiet_libraries()
    run = start.begin(config, launched or launch.here())
    if run.step >= run.stop:
        start.finish(run)
        return run.folder
    start.hold(run)
    module = start.module_of(run)
    journal = logger = None
    if run.is_zero:
        about: dict[str, Any] = {"git": lineage.git_state(), "plan": start.plan_lines(run.config, run.plan)}
        logger = record.wandb_logger(run.folder, run.run_id, run.identity, about) if run.run_id else None
        journal = record.Record(run.folder, run.step, logger)
        lineage.began(run.folder, step=run.step, steps=run.config.steps, ranks=run.config.hardware.world, **about)
    launch.end_with_the_first(run.launched)
    try:
        loader = _loader_of(run)
        watched = _watch(run, journal, loader)
        trainer = strategy.build_trainer(
            run.config.hardware,
            run.plan,
            steps=run.stop - run.step,
            callbacks=watched.callbacks,
            launched=run.launched,
            logger=logger,
        )
        trainer.fit(module, train_dataloaders=loader)
    except BaseException as error:
        interrupted = launch.was_interrupted(error)
        left = isinstance(error, SystemExit) and error.code == EXIT_REQUEUE
        if journal is not None:
            how = "interrupted" if interrupted else "left" if left else "failed"
            said = f"{type(error).__name__}: {error}"[:500] if how == "failed" else ""
            lineage.ended(run.folder, step=module.progress.step, how=how, error=said)
            journal.finish(exit_code=1)
        if interrupted:
            raise KeyboardInterrupt from None
        if not run.is_zero and isinstance(error, launch.SharedError):
            return run.folder
        raise
    if journal is not None:
        _close(run, module, watched, journal)
    return run.folder


@dataclass
class _Watched:
    """What looks on while a run trains, and acts: in the order in which Lightning calls them.

    The clock comes first, so that what the others do after a step lies outside of it.
    """

    profile: watch.Profile
    recorder: callbacks.Recorder
    validation: callbacks.Validation
    clips: callbacks.Clips
    states: callbacks.States
    bar: callbacks.Bar
    clock: watch.Stopwatch

    @property
    def callbacks(self) -> list[pl.Callback]:
        return [self.clock, self.profile, self.recorder, self.validation, self.clips, self.states, self.bar]


def _loader_of(run: Start) -> Any:
    """The run's batches, from the step on that it goes on with."""
    from training import callbacks, data

    config = run.config
    stream = data.Stream(
        run.shards,
        dataclasses.replace(config.batch, accumulate=run.plan.accumulate),
        seed=config.seed,
        start=run.step,
        rank=run.launched.rank,
        world=config.hardware.world,
        tokenize=run.encoder.tokenize,
        condition=config.lm.condition,
    )
    loader = data.training_loader(stream, pin_memory=config.hardware.uses_gpu)
    # The ranks hear of a batch that one of them cannot read at the end of the step after the next.
    loader.ahead, loader.needed = 2 * run.plan.accumulate, (run.stop - run.step) * run.plan.accumulate
    loader.agree = callbacks.one_answer
    return loader


def _watch(run: Start, journal: Record | None, loader: Any) -> _Watched:
    """The callbacks of a run, on rank 0 those that write."""
    from training import callbacks, data, products, watch

    config, plan, log = run.config, run.plan, run.config.log
    rank, world = run.launched.rank, config.hardware.world
    batches = data.validation_batches(run.shards, config.batch, rank=rank, world=world, condition=config.lm.condition)
    if not batches and run.is_zero:
        print("warning   DATA has no validation tracks: no validation, the release holds the last weights", flush=True)
    clock = watch.Stopwatch(plan.step_flop, devices.peak_of(plan.device, world, bf16=plan.task.bf16), loader)
    recorder = callbacks.Recorder(journal, log.every, config.steps, clock)
    validation = callbacks.Validation(
        journal,
        batches,
        log.valid_every,
        config.steps,
        sum(run.unigram) / len(run.unigram),
        run.release,
        clock,
        before=bool(config.init),
    )
    texts = [t for b in batches for t in b.texts]
    prompts = products.clip_prompts(log, texts) if run.is_zero else []
    describe = functools.partial(products.release_info, config=config, shards=run.shards, origin=run.origin)
    clips = callbacks.Clips(
        journal,
        log,
        config.steps,
        prompts,
        functools.partial(products.generator, codec=run.codec, info=describe),
        functools.partial(
            products.make_ceilings, batches=batches, prompts=prompts, codec=run.codec, seconds=log.clip_seconds
        ),
        clock,
    )
    background = _in_background(config, plan)
    folder = run.folder / "state"
    states = callbacks.States(folder, log, run.stop, clock, loader, background=background, elsewhere=run.launched.asked)
    profile = watch.Profile(run.folder / "profile", log.profile_at, log.profile_steps)
    bar = callbacks.Bar(recorder, validation, config.steps, config.steps)
    return _Watched(profile, recorder, validation, clips, states, bar, clock)


def _close(run: Start, module: MusicLMModule, watched: _Watched, journal: Record) -> None:
    """Write down how the run ended, on rank 0, and say it.

    Raises:
        UserError: the disk did not take the release or the clips to the end, or the data cannot be read any more.
        SystemExit: the run was asked to leave.
    """
    from training import lineage, words

    config, states = run.config, watched.states
    if states.unreadable is not None:
        said = f"{states.unreadable}. The run has saved its state of step {module.progress.step}"
        lineage.ended(run.folder, step=module.progress.step, how="failed", error=said[:500])
        journal.finish(exit_code=1)
        raise UserError(said)
    left = states.left_at is not None
    unwritten = None if left else _unwritten(run.release, watched.clips, run.folder, run.stop)
    if left:
        how = "interrupted" if states.asked == signal.SIGINT else "left"
    else:
        how = "failed" if unwritten else "done" if run.stop == config.steps else "paused"
    lineage.ended(run.folder, step=module.progress.step, how=how, error=str(unwritten or "")[:500])
    journal.finish(exit_code=1 if unwritten else 0)
    if unwritten is not None:
        raise unwritten
    if left:
        print(
            f"left      after step {states.left_at} of {config.steps}, asked by "
            f"{signal.Signals(states.asked).name}; the state is saved, run the same command again to go on",
            flush=True,
        )
        raise SystemExit(states.exit_code())
    words.summary(run.folder, module, watched.validation.latest, run.stop, config.steps, run.plan)


def _unwritten(release: products.Release, clips: callbacks.Clips, folder: Path, step: int) -> UserError | None:
    """What to tell of a release or of clips that the disk did not take to the end."""
    if release.waiting is not None:
        return release.sorry(folder / "state")
    if clips.missing:
        return UserError(
            f"the clips of step {step} could not be made in {folder / 'samples'}: {clips.missing}. State and "
            f"release are saved: free some room and make clips from the release, `make generate MODEL={release.folder}`"
        )
    return None


def _in_background(config: TrainConfig, plan: budget.Plan) -> bool:
    """Whether states are written beside the training: where the memory holds a copy of weights, average and moments."""
    if config.log.state_background != "auto":
        return config.log.state_background == "on"
    copy = 4.0 * (2 + plan.task.moments) * plan.task.trained / plan.shards
    here = plan.device.memory if plan.device.is_cpu else devices.host_memory() / config.hardware.devices
    return copy + (plan.needed if plan.device.is_cpu else 0) <= budget.USABLE * here


def _quiet_libraries() -> None:
    """Keep Lightning's hints out of the plan; what matters of them is ours to say."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    for pattern in (
        ".*torch.distributed is disabled.*",
        ".*does not have many workers.*",
        "This DataLoader will create",
        ".*IterableDataset.*__len__.*",
        ".*lr_scheduler.step.*",
        ".*`srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", category=FutureWarning)


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
    launch.run(main)
