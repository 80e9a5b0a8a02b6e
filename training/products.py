"""What a run gives away: releases, and clips to hear on the way. Both are made from the averaged weights.

A disk that does not take a release does not end the training: see `Release`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen import about, files
from musicgen.errors import UserError
from training import folder as folder_of
from training import sources, state

if TYPE_CHECKING:
    from torch import Tensor

    from musicgen.codec import Codec
    from musicgen.conditioning import TextEncoder
    from musicgen.lm import MusicLM
    from musicgen.model import MusicGen
    from training.callbacks import LogConfig
    from training.config import TrainConfig
    from training.data import Batch
    from training.module import MusicLMModule
    from training.sources import Sources


MOVED = 1.3  # times its weights: the room on a GPU that a model needs to make clips there


def release_info(
    encoder: TextEncoder,
    progress: state.Progress,
    config: TrainConfig,
    shards: Sources,
    origin: dict[str, Any],
    valid_loss: float | None = None,
) -> dict[str, Any]:
    """What a release says about itself (see musicgen.weights).

    Args:
        origin: of `finetune.origin_of`; an adapter speaks through its base, and takes what belongs to it from there.
    """
    from musicgen import settings

    codec = shards.info["codec"]
    return {
        "codec": {"name": config.codec or codec["name"], "identity": codec["identity"]},
        "text_encoder": {"name": encoder.name, "identity": encoder.identity},
        "training": {
            "step": progress.step,
            "audio_seconds_seen": round(progress.audio_seconds_seen, 2),
            "data_version": shards.info["dataset_version"],
            "data_licences": sources.licences(shards),
            "valid_loss": valid_loss,
            "crop_seconds": config.batch.crop_seconds,
            **({"init": config.init} if config.init else {}),
            **({"selection": settings.to_dict(config.select)} if config.select else {}),
        },
        "licence": config.licence,
        **origin,
        "made_by": about.software(),
    }


@dataclass(frozen=True)
class _Waiting:
    """A release that the disk did not take: its averaged weights on the CPU, by name, and what is known of them."""

    weights: dict[str, Tensor]
    progress: state.Progress
    valid_loss: float | None
    error: str


class Release:
    """The run's release folder, written from the averaged weights; of an adapter the adapter alone.

    Where the disk does not take it, the release before stays whole, this one waits in memory, and the training goes on
    and tries again. A run that ended meanwhile writes it from a state.

    Args:
        folder: the release folder.
        base: of `adapters.base_of`, for an adapter.
        origin: of `finetune.origin_of`.

    Attributes:
        waiting: what the disk has not taken yet, on rank 0.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, shards: Sources, base: dict[str, Any], origin: dict[str, Any]
    ) -> None:
        self.folder, self.config, self.shards, self.base, self.origin = folder, config, shards, base, origin
        self.waiting: _Waiting | None = None

    def write(
        self, model: MusicLM, encoder: TextEncoder, progress: state.Progress, valid_loss: float | None = None
    ) -> None:
        """Write a model that holds the averaged weights of `progress.step`, or let it wait for room on the disk."""
        try:
            self._save(model, encoder, progress, valid_loss)
        except (OSError, UserError) as error:
            said = folder_of.refused_by_disk(error)
            self.waiting = _Waiting(self._copied(model), replace(progress), valid_loss, said)
            print(
                f"warning   the release of step {progress.step} could not be written to {self.folder}: {said}. What "
                "was there stays whole; training goes on and tries again",
                flush=True,
            )
        else:
            self.waiting = None

    def again(self, lm: MusicLM, encoder: TextEncoder) -> None:
        """Try to write what waits. Needs no other rank.

        Args:
            lm: the model in training, which has its own weights again afterwards.
        """
        held = self.waiting
        if held is None:
            return
        try:
            with _model_of(lm, held.weights) as model:
                self._save(model, encoder, held.progress, held.valid_loss)
        except (OSError, UserError) as error:
            self.waiting = replace(held, error=folder_of.refused_by_disk(error))
        else:
            self.waiting = None
            print(f"release   that of step {held.progress.step} is written now", flush=True)

    def from_state(self, states: Path, step: int, lm: MusicLM, encoder: TextEncoder) -> None:
        """Write the release from the average that a state of the run holds.

        Args:
            states: the run's `state/`.
            lm: the run's model, whole, with its adapter where it has one.
        """
        progress = state.read_progress(states, step)
        valid_loss = progress.best_loss if step == progress.best_step else None
        average = state.tensors(states / f"step-{step}", "ema/")
        with _model_of(lm, average) as model:
            self.write(model, encoder, progress, valid_loss)

    def is_behind(self, before: state.Progress) -> bool:
        """Whether the folder does not hold the best validation that the state knows of."""
        there = self._training()
        if not there or before.best_loss is None:
            return not there
        loss = there.get("valid_loss")
        return there.get("step") != before.step and (loss is None or loss > before.best_loss)

    def valid_loss(self) -> float | None:
        """The validation loss of the release that is there; None where there is none."""
        return self._training().get("valid_loss")

    def _training(self) -> dict[str, Any]:
        from musicgen.weights import read_info

        try:
            return dict(read_info(self.folder)["training"])
        except (UserError, KeyError, OSError):
            return {}

    def sorry(self, states: Path) -> UserError:
        """What to tell the user of a release that the disk did not take to the end."""
        assert self.waiting is not None
        kept = state.kept_in(states)
        todo = (
            f"The state of step {kept[-1]} is saved: free some room and run the same command again, which writes the "
            "release"
            if kept
            else "No state was kept (log.state_every is 0): free some room and train again"
        )
        return UserError(
            f"the release of step {self.waiting.progress.step} could not be written to {self.folder}: "
            f"{self.waiting.error}. {todo}"
        )

    def _save(self, model: MusicLM, encoder: TextEncoder, progress: state.Progress, valid_loss: float | None) -> None:
        import torch

        from musicgen import adapters
        from musicgen.weights import save_release

        info = release_info(encoder, progress, self.config, self.shards, self.origin, valid_loss)
        if adapters.is_adapted(model):
            adapters.save(self.folder, model, info, self.base)
            return
        save_release(self.folder, model, info, getattr(torch, self.config.release_dtype))

    def _copied(self, model: MusicLM) -> dict[str, Tensor]:
        import torch

        from musicgen import adapters
        from training.optim import trained

        dtype = torch.float32 if adapters.is_adapted(model) else getattr(torch, self.config.release_dtype)
        return {name: p.detach().to("cpu", dtype, copy=True) for name, p in trained(model).items()}


@contextmanager
def _model_of(lm: MusicLM, weights: dict[str, Tensor]) -> Iterator[MusicLM]:
    """A model with these weights: a new one, or `lm` itself for as long where they are those of its adapter."""
    import torch

    from musicgen import adapters
    from musicgen.lm import MusicLM
    from training.optim import trained

    if not adapters.is_adapted(lm):
        with torch.device("meta"):
            made = MusicLM(lm.config)
        made.load_state_dict(weights, assign=True)
        yield made.eval()
        return
    own = {name: p.detach().clone() for name, p in trained(lm).items()}

    def put(values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in trained(lm).items():
                p.copy_(values[name])

    put(weights)
    try:
        yield lm
    finally:
        put(own)


def generator(lm: MusicLM, module: MusicLMModule, *, codec: Codec | None, info: Any) -> MusicGen:
    """The averaged model, ready to make the clips of a step where the module stands.

    A copy that was put together from shards comes on the CPU, where a step of 3.3b takes half a second. A GPU takes it
    in 16 bits, where the activations have left the room.
    """
    import torch

    from musicgen import adapters, memory, model
    from musicgen.engine import Engine

    if codec is None:
        raise ValueError("clips need the codec")
    lm = adapters.merged(lm) if adapters.is_adapted(lm) else lm
    moves = next(lm.parameters()).device != module.device
    if moves:
        room = memory.free_bytes(module.device)
        moves = room is None or MOVED * 2 * sum(p.numel() for p in lm.parameters()) <= room
    if moves:
        lm = lm.to(module.device, torch.bfloat16)
    about = info(module.encoder, module.progress)
    return model.MusicGen(lm, codec, module.encoder, about, Engine(lm, "bf16" if moves else "float32"))


def make_clip(model: MusicGen, path: Path, prompt: str | None, seed: int, seconds: float) -> dict[str, Any]:
    """Generate one clip into `path`; returns what made it."""
    from musicgen import generate, wav
    from musicgen.sampling import SamplingConfig

    sampling = SamplingConfig(top_k=min(SamplingConfig().top_k, model.lm.config.codebook_size))
    audio, _ = generate.generate(model, [prompt], seconds, [seed], sampling)
    mark = generate.marking(model, generate.Request([prompt], seconds, [seed], sampling))
    wav.write(str(path), audio[0], model.codec.sample_rate, mark)
    return {"seed": seed, "duration_seconds": seconds}


def clip_prompts(config: LogConfig, validation_texts: Iterable[str | None]) -> list[str | None]:
    """Prompts of the clips: the given ones, or different descriptions of the validation crops."""
    if config.prompts:
        return list(config.prompts[: config.clips])
    texts = [text for text in dict.fromkeys(validation_texts) if text]
    stride = max(len(texts) // max(config.clips, 1), 1)
    chosen: list[str | None] = [*texts[::stride]]
    return (chosen or [None])[: config.clips]


def make_ceilings(
    folder: Path, *, batches: Iterable[Batch], prompts: Sequence[str | None], codec: Codec | None, seconds: float
) -> list[tuple[Path, str]]:
    """For every prompt a recording through the codec, the best that its clip can sound: the validation crop with that
    description, else another one. Returns files and captions."""
    from musicgen import wav

    if codec is None:
        raise ValueError("ceilings need the codec")
    crops = [
        (text, codes[:, : int(frames)], key)
        for batch in batches
        for text, codes, frames, key in zip(batch.texts, batch.codes, batch.valid.sum(1), batch.keys)
        if frames
    ]
    made = []
    for number, prompt in enumerate(prompts[: len(crops)]):
        text, codes, key = next((crop for crop in crops if crop[0] == prompt), crops[number])
        sound = codec.decode(codes[None, :, : round(seconds * codec.frame_rate)].long())[0].cpu()
        path, what = folder / f"ceiling-{number}.wav", "a held-out recording through the codec"
        mark = {"what": what, "track": key, "caption": text}
        files.write_bytes(path, wav.encode(sound, codec.sample_rate, mark, generated=False))
        made.append((path, f"{what}: {text or '(no description)'}"))
    return made
