"""`make assets`: rebuild everything that ships, in order, and resume wherever it was stopped.

    audio -> codec -> tokens -> demo model -> figures
                   -> held-out tokens

Ten hours of music of the demo's kind are rendered, the codec is trained on them, they become tokens of that codec, the
demo model is trained on those and measured, and `musicgen/assets/figures.json` keeps what was measured, so that a test
can tell when an asset and its figures part. Half an hour by the artists whom the model has not heard ships as tokens:
`make check-finetune` learns from it. Whoever changes the codec or the demo music runs this. Every step is one of
our own commands, which skips what is already whole; a step's stamp in the work folder keeps a hash of what it started
from: another codec makes other tokens, another model, other figures. On two CPU cores the whole takes some hours,
nearly all of it in the two trainings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from musicgen import codec as codecs
from musicgen import settings, weights
from musicgen.errors import UserError
from pipelines.shard import ShardSet

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = codecs.DEMO_FOLDER.parent / "catalogue"
CODEC_BYTES_AT_MOST = 8_000_000
MODELS_BYTES_AT_MOST = 14_000_000


@dataclass(frozen=True)
class AssetsConfig:
    """Settings of `python -m training.assets`.

    Args:
        work: folder for the music, runs and stamps.
        hours: music to render for training.
        music_seed: seed of that music; the next one is that of the held-out music.
        held_out_hours: music by artists of the validation side, which ships as tokens.
        codec_steps: steps of the codec's training, from the start and from there with a discriminator.
        model_steps: steps of the demo model's training.
        embedded: also render the embedded catalogue anew (its bytes depend on the fluidsynth that is installed).
        shipped: where what ships is put.
        codec_configs: settings of the codec's two trainings.
        model_config: settings of the demo model's training, on top of those of its size.
        only: do just these steps (music, codec, tokens, held_out, model, figures); empty for all.
    """

    work: str = "data/assets"
    hours: float = 12.0
    music_seed: int = 1
    held_out_hours: float = 0.5
    codec_steps: tuple[int, int] = (5400, 13000)
    model_steps: int = 2800
    embedded: bool = False
    shipped: str = "musicgen/assets"
    codec_configs: tuple[str, str] = ("configs/codec/demo.yaml", "configs/codec/demo-refine.yaml")
    model_config: str = "configs/train/demo-long.yaml"
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.only) - set(STEPS)
        if unknown:
            raise ValueError(f"unknown steps {sorted(unknown)}; allowed: {', '.join(STEPS)}")


STEPS = ("music", "codec", "tokens", "held_out", "model", "figures")
# What a step leaves in the work folder; another start makes it anew, for runs and sets refuse other settings.
LEAVES = {"codec": ("codec", "codec-refined"), "tokens": ("tokens",), "held_out": ("held-out",), "model": ("model",)}


def _shipped(config: AssetsConfig) -> Path:
    return ROOT / config.shipped  # an absolute path stands for itself


def _codec_name(config: AssetsConfig) -> str:
    """What the tokens' manifest calls the codec: `demo` where it ships with the program, else its folder."""
    folder = _shipped(config) / "codec"
    return "demo" if folder == codecs.DEMO_FOLDER else str(folder)


def _command(module: str, *words: str, fine: Sequence[int] = (0,)) -> None:
    ended = subprocess.run([sys.executable, "-m", module, *words], check=False, cwd=ROOT)
    if ended.returncode not in fine:
        raise UserError(f"python -m {module} {' '.join(words)} ended with exit code {ended.returncode}; see above")


def _hash(*parts: str | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _ship(release: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(release / name, target / name)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def music(config: AssetsConfig, work: Path) -> None:
    """Render the hours of music, and the embedded catalogue when asked."""
    if config.embedded:
        _command("pipelines.demo.catalogue", "--embedded", "--out", str(CATALOGUE))
    _command(
        "pipelines.demo.catalogue", "--out", str(work / "music"), "--hours", f"{config.hours:g}",
        "--seed", str(config.music_seed),
    )  # fmt: skip


def codec(config: AssetsConfig, work: Path) -> None:
    """Train the codec, go on from its weights with a discriminator, and ship the best averaged weights of that."""
    first, refined = work / "codec", work / "codec-refined"
    _command(
        "training.codec.train", "--config", str(ROOT / config.codec_configs[0]), "--data",
        str(work / "music" / "catalog.jsonl"), "--run", str(first), "--steps", str(config.codec_steps[0]),
    )  # fmt: skip
    _command(
        "training.codec.train", "--config", str(ROOT / config.codec_configs[1]), "--data", str(first / "pcm"),
        "--init", str(first / "release"), "--run", str(refined), "--steps", str(config.codec_steps[1]),
    )  # fmt: skip
    target = _shipped(config) / "codec"
    _ship(refined / "release", target, ("config.json", "model.safetensors"))
    if _size(target) > CODEC_BYTES_AT_MOST:
        raise UserError(f"the codec has {_size(target):,} bytes; at most {CODEC_BYTES_AT_MOST:,} ship")


def tokens(config: AssetsConfig, work: Path) -> None:
    """Turn the hours of music into shards with the shipped codec."""
    _command(
        "pipelines.ingest", "--config", str(ROOT / "configs/ingest/demo.yaml"), "--catalog",
        str(work / "music" / "catalog.jsonl"), "--out", str(work / "tokens"), "--codec", _codec_name(config),
    )  # fmt: skip


def held_out(config: AssetsConfig, work: Path) -> None:
    """Render music by artists whom the demo model has not heard, and ship its tokens."""
    music, made, target = work / "held-out-music", work / "held-out", _shipped(config) / "held_out"
    _command(
        "pipelines.demo.catalogue", "--out", str(music), "--hours", f"{config.held_out_hours:g}",
        "--seed", str(config.music_seed + 1), "--held-out",
    )  # fmt: skip
    _command(
        "pipelines.ingest", "--config", str(ROOT / "configs/ingest/demo.yaml"), "--catalog",
        str(music / "catalog.jsonl"), "--out", str(made), "--codec", _codec_name(config), "--buckets", "1",
        fine=(0, 1),  # it says that the set has no track to train on: all are validation's
    )  # fmt: skip
    shards = ShardSet.open(str(made))
    if not len(shards.rows("valid")):
        raise UserError(f"{made} holds no track; see above")
    shutil.rmtree(target, ignore_errors=True)
    _ship(made, target, ["index.parquet", "sources.parquet", *shards.info["shards"], "dataset.json"])


def model(config: AssetsConfig, work: Path) -> None:
    """Train the demo model for longer and ship the step with the lowest validation loss."""
    _command(
        "training.train", "--size", "demo", "--data", str(work / "tokens"), "--run", str(work / "model"),
        "--config", str(ROOT / config.model_config), "--steps", str(config.model_steps),
    )  # fmt: skip
    shipped = _shipped(config)
    _ship(work / "model" / "release", shipped / "model", ("config.json", "model.safetensors"))
    both = _size(shipped / "codec") + _size(shipped / "model")
    if both > MODELS_BYTES_AT_MOST:
        raise UserError(f"codec and model have {both:,} bytes together; at most {MODELS_BYTES_AT_MOST:,} ship")


def figures(config: AssetsConfig, work: Path) -> None:
    """Measure what ships and keep the figures beside it."""
    shipped = _shipped(config)
    codec_json, music_json = work / "codec.json", work / "music_check.json"
    _command(
        "training.codec.evaluate", "--codec", _codec_name(config), "--data", str(CATALOGUE / "catalog.jsonl"),
        "--cache", str(work / "eval-pcm"), "--out", str(codec_json),
    )  # fmt: skip
    model_name = "demo" if shipped / "model" == weights.DEMO else str(shipped / "model")
    _command("training.music_check", "--model", model_name, "--data", str(work / "tokens"), "--out", str(music_json))
    checked = json.loads(music_json.read_text())
    kept = {
        "codec": json.loads(codec_json.read_text()),
        "music_check": {k: v for k, v in checked.items() if k not in ("generated", "real", "settings")},
        "sha256": {
            name: hashlib.sha256((shipped / name / "model.safetensors").read_bytes()).hexdigest()
            for name in ("codec", "model")
        },
    }
    (shipped / "figures.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def _start_of(step: str, config: AssetsConfig) -> str:
    """Hash of what a step starts from: its settings, and the weights that it uses of those that ship."""
    codec_weights = _shipped(config) / "codec" / "model.safetensors"
    model_weights = _shipped(config) / "model" / "model.safetensors"
    hours = f"{config.hours:g} h, seed {config.music_seed}"
    parts: dict[str, tuple[str | Path, ...]] = {
        "music": (hours, str(config.embedded)),
        "codec": (hours, str(config.codec_steps), *(ROOT / path for path in config.codec_configs)),
        "tokens": (hours, codec_weights, ROOT / "configs/ingest/demo.yaml"),
        "held_out": (
            f"{config.held_out_hours:g} h, seed {config.music_seed + 1}", codec_weights,
            ROOT / "configs/ingest/demo.yaml",
        ),
        "model": (
            hours, codec_weights, str(config.model_steps), ROOT / "configs/train/demo.yaml", ROOT / config.model_config,
        ),
        "figures": (codec_weights, model_weights),
    }  # fmt: skip
    return _hash(step, *(part for part in parts[step] if not isinstance(part, Path) or part.is_file()))


def main(argv: list[str]) -> int:
    """Run the steps whose inputs changed since their stamp; 0 when all are whole."""
    config = settings.parse(AssetsConfig, argv, prog="python -m training.assets")
    work = Path(config.work)
    work.mkdir(parents=True, exist_ok=True)
    actions: dict[str, Callable[[AssetsConfig, Path], None]] = {
        "music": music, "codec": codec, "tokens": tokens, "held_out": held_out, "model": model,
        "figures": figures,
    }  # fmt: skip
    for name in STEPS:
        if config.only and name not in config.only:
            continue
        came_from = _start_of(name, config)
        stamp = work / f"{name}.done"
        if stamp.is_file() and stamp.read_text() == came_from:
            print(f"{name}: already whole")
            continue
        if stamp.is_file():
            for folder in LEAVES.get(name, ()):
                shutil.rmtree(work / folder, ignore_errors=True)
            stamp.unlink()
        print(f"{name} …", flush=True)
        actions[name](config, work)
        stamp.write_text(came_from)
    shipped = _shipped(config)
    print(f"shipped: {_size(shipped / 'codec'):,} bytes of codec, {_size(shipped / 'model'):,} bytes of model")
    return 0


if __name__ == "__main__":
    settings.run(main)
