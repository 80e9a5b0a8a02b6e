"""How a run begins, on each of its ranks: data, plan, text encoder, what was made before, and from it the model.

`begin` reads and checks all of that and prints what the user should know before the first step; `finish` ends a run
that has nothing left to train; `module_of` builds what trains. Nothing here makes a step.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from musicgen import adapters, settings
from musicgen import codec as codecs
from musicgen.codec import Codec
from musicgen.conditioning import TextEncoder
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.style import Latents
from musicgen.weights import initial_state
from training import (
    budget,
    controls,
    data,
    devices,
    finetune,
    forecast,
    launch,
    lineage,
    products,
    selection,
    sources,
    state,
    strategy,
    words,
)
from training import folder as folder_of
from training.codebooks import start_from_codebooks
from training.config import TrainConfig, layout_settings, task_of
from training.launch import Launched
from training.module import MusicLMModule
from training.sources import Sources
from training.state import Progress


@dataclass
class Start:
    """A run before its first step, as one rank sees it.

    Attributes:
        config: complete: with the labels of the data, the width of the codec's latents, the hardware of this launch.
        launched: this process among those that train together.
        folder: the run's.
        shards: its data.
        unigram: loss of a unigram model on the validation crops, by codebook.
        encoder: of its texts.
        latents: of its style, if it has one.
        codec: of its clips; on rank 0, where it makes clips.
        plan: how it is laid out.
        weights: what the model starts from, where that is INIT.
        base: of an adapter, `adapters.base_of`.
        origin: of a fine-tuning, `finetune.origin_of`.
        identity: what the run folder remembers of all this.
        run_id: of W&B; None on other ranks of a new run.
        before: of the newest state.
        step: steps made already.
        stop: the step to stop at.
        release: what it gives away.
        behind: the release is not that of the best validation so far.
    """

    config: TrainConfig
    launched: Launched
    folder: Path
    shards: Sources
    unigram: list[float]
    encoder: TextEncoder
    latents: Latents | None
    codec: Codec | None
    plan: budget.Plan
    weights: dict[str, torch.Tensor] | None
    base: dict[str, Any]
    origin: dict[str, Any]
    identity: dict[str, Any]
    run_id: str | None
    before: Progress | None
    step: int
    stop: int
    release: products.Release
    behind: bool

    @property
    def is_zero(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.launched.rank == 0


def begin(config: TrainConfig, launched: Launched) -> Start:
    """Read, check and say all that comes before the model; rank 0 makes the run's folder.

    Raises:
        UserError: bad data, a run of other settings, a codec that does not fit, a plan that does not.
    """
    hardware = launch.fitted(config.hardware, launched)
    config = dataclasses.replace(config, hardware=hardware)
    is_zero = launched.rank == 0
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
    encoder = load_encoder(config)
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
    run_id, step = folder_of.find_run(config.run, identity, folder_of.plain(settings.to_dict(TrainConfig())))
    begun = run_id is not None
    codec = load_codec(shards, config.codec) if config.log.clips and is_zero else None
    # Where the model is sharded, rank 0 sends its weights; a state holds what is trained, so an adapter needs its base.
    takes = config.init and (base or not step) and (is_zero or plan.shards == 1)
    weights = initial_state(config.init, config.lm, shards.info["codec"], identity["text_encoder"]) if takes else None
    if run_id is None and is_zero:
        run_id = folder_of.make_run(config.run, identity)
    if is_zero:
        lineage.keep_tracks(folder, shards)
    release = products.Release(folder / "release", config, shards, base, origin)
    behind = before is not None and step > 0 and release.is_behind(before)
    unigram = data.unigram_loss(shards, config.batch).tolist()
    if is_zero:
        print("\n".join(words.data_lines(config, encoder, shards, step, unigram, begun=begun)), flush=True)
    return Start(
        config=config,
        launched=launched,
        folder=folder,
        shards=shards,
        unigram=unigram,
        encoder=encoder,
        latents=latents,
        codec=codec,
        plan=plan,
        weights=weights,
        base=base,
        origin=origin,
        identity=identity,
        run_id=run_id,
        before=before,
        step=step,
        stop=min(config.stop_at or config.steps, config.steps),
        release=release,
        behind=behind,
    )


def finish(start: Start) -> None:
    """A run whose steps are made: say so, and write its release where a run that ended at once left none.

    Raises:
        UserError: the disk does not take the release.
    """
    before, folder = start.before, start.folder
    todo = start.behind and (start.step == start.config.steps or (before is not None and before.best_loss is not None))
    if not start.is_zero:
        return
    print(
        f"{folder} has already made {start.step} of {start.stop} steps; "
        + ("only its release is not there yet" if todo else "nothing to do"),
        flush=True,
    )
    if not todo:
        return
    hold(start)
    lm = model_of(start)
    step = _release_step(before, folder / "state") or start.step
    start.release.from_state(folder / "state", step, lm, start.encoder)
    if start.release.waiting is not None:
        raise start.release.sorry(folder / "state")
    print(f"release   written to {start.release.folder} from the state of step {step}", flush=True)


def hold(start: Start) -> None:
    """Keep the run's folder for this process. Raises `UserError` where another one trains there."""
    if start.is_zero:
        folder_of.hold(start.folder)
        folder_of.clear_leftovers(start.folder)


def model_of(start: Start) -> MusicLM:
    """The model at the run's beginning; a state that the run goes on from is loaded later, on all ranks together."""
    config = start.config
    torch.manual_seed(config.seed)
    lm = strategy.build_model(functools.partial(MusicLM, config.lm), start.plan, start.launched.rank)
    if start.weights is not None:
        finetune.check_inputs(config, lm, start.weights)
        lm.load_state_dict(lm.state_dict() | start.weights)  # an input that the release lacks keeps its start
    elif config.codebook_init and not start.step and (start.is_zero or start.plan.shards == 1):
        start_from_codebooks(lm, load_codec(start.shards, config.codec))
    if start.base:
        adapters.attach(lm, config.lora)
    return lm


def catch_up(start: Start, lm: MusicLM) -> None:
    """Write the release of the best validation so far, where the run ended before it was written."""
    before, states = start.before, start.folder / "state"
    if not (start.behind and before is not None and before.best_loss is not None):
        return
    best = _release_step(before, states)
    if best and start.is_zero:
        start.release.from_state(states, best, lm, start.encoder)
    elif not best:  # those weights are gone: the next validation is released instead, unless it is worse than this
        before.best_loss, before.best_step = start.release.valid_loss(), None


def module_of(start: Start) -> MusicLMModule:
    """What trains: the model with its encoder, its place in the run and its layout."""
    config, plan, rate = start.config, start.plan, start.shards.info["codec"]["frame_rate"]
    lm = model_of(start)
    catch_up(start, lm)
    module = MusicLMModule(
        lm,
        start.encoder,
        config.optim,
        total_steps=config.steps,
        crop_frames=data.crop_rule(config.batch, rate).frames,
        accumulate=plan.accumulate,
        frame_rate=rate,
        seed=config.seed,
        prepare=lambda model, device, traffic: strategy.prepare(model, config.hardware, plan, device, traffic),
        resume=start.folder / "state" if start.step else None,
        latents=start.latents,
        compiled=config.hardware.compiles,
        shares_casts=plan.shares_casts,
    )
    if start.before is not None:
        module.progress = dataclasses.replace(start.before, accumulate=plan.accumulate)
    return module


def load_codec(shards: Sources, name: str) -> Codec:
    """The codec that made the data set's tokens.

    Raises:
        UserError: it is not here, or the one here is another one.
    """
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


def load_encoder(config: TrainConfig) -> TextEncoder:
    """The run's text encoder. Raises `UserError` where it is not here, or of another width than the setting says."""
    encoder = TextEncoder.load(config.lm.condition.text_encoder)
    if encoder.dim != config.lm.condition.text_dim:
        raise UserError(
            f"text encoder {encoder.name!r} has width {encoder.dim}, the setting says "
            f"{config.lm.condition.text_dim}; set --lm.condition.text_dim {encoder.dim}"
        )
    return encoder


def _release_step(before: Progress | None, states: Path) -> int | None:
    """The step of the best validation, where its state is kept."""
    step = before.best_step if before is not None else None
    return step if step in state.steps_in(states) else None
