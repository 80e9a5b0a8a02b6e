"""Does the model make music, and its own? A check with numbers, over prompts in ten styles.

    python -m training.music_check --model demo --data runs/demo/data

Prompts are descriptions of held-out tracks (of training tracks where a style has too few), four for each of the ten
commonest styles. For every generated clip: is the nearest style centroid (codec embedding, centroids from training
tracks) the one that was asked for; is it silent; is it noise; is a 5-second window of its first-codebook codes at least
80 % equal to a training track's. Real held-out clips pass through the same measures and stand beside them as the
ceiling. The last line is the verdict, the exit code says it too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from musicgen import files, generate, settings, wav
from musicgen.errors import UserError
from musicgen.metrics import audio as measures
from musicgen.metrics import style
from musicgen.sampling import SamplingConfig
from pipelines.shard import ShardSet

SILENT_SHARE = 0.5  # a clip that is silent for half its length
NOISE_FLATNESS = 0.35  # white noise is 0.56; tonal music below 0.1, drums alone up to 0.2
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class MusicCheckConfig:
    """What to check.

    Args:
        model: `demo`, a release folder or its URI.
        data: the data set the model was trained on (folder or URI).
        styles: how many of the commonest styles of the training tracks.
        prompts_per_style: clips generated for each style.
        duration: seconds of each clip; at least 5 for the memorisation window.
        seed: seeds of the clips count up from here, and the choice of prompts depends on it.
        batch: clips generated at a time.
        out: where to write the result as JSON, if anywhere.
        clips: a folder for the generated clips, if they are to be kept.
        device: cpu, cuda or auto.
        sampling: as in generation.
    """

    model: str = "demo"
    data: str = "runs/demo/data"
    styles: int = 10
    prompts_per_style: int = 4
    duration: float = 10.0
    seed: int = 0
    batch: int = 20
    out: str | None = None
    clips: str | None = None
    device: str = "cpu"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.styles < 2 or self.prompts_per_style < 1 or self.batch < 1:
            raise ValueError("give at least 2 styles, 1 prompt for each, and a batch of at least 1")
        if self.duration < style.WINDOW_FRAMES / 50:
            raise ValueError(f"duration is {self.duration:g} s; the memorisation window needs at least 5 s")


@dataclass(frozen=True)
class Clip:
    """One measured clip: the style asked for and the one it is nearest to, its levels, its likest training window."""

    asked: str
    nearest: str
    prompt: str
    seed: int | None
    silence: float
    flatness: float
    match: style.Match

    @property
    def hit(self) -> bool:
        """In the style that was asked for."""
        return self.asked == self.nearest


def commonest_styles(data: ShardSet, count: int) -> list[str]:
    """The `count` styles (genres) with most training tracks, alphabetical.

    Raises:
        UserError: the set has fewer than two styles.
    """
    genre = data.index.column("genre").to_pylist()
    found = Counter(genre[row] for row in data.rows("train") if genre[row])
    if len(found) < 2:
        raise UserError(f"DATA has {len(found)} style(s) in its training tracks; a check of styles needs at least 2")
    return sorted(sorted(found, key=lambda g: (-found[g], g))[:count])


def choose_prompts(data: ShardSet, styles: Sequence[str], per_style: int, seed: int) -> list[tuple[str, str]]:
    """(style, prompt) pairs: descriptions of held-out tracks first, of training tracks where those do not suffice."""
    genre, language = (data.index.column(c).to_pylist() for c in ("genre", "language"))
    keys = data.index.column("key").to_pylist()
    held_out = {int(row): split for split in ("valid", "test", "train") for row in data.rows(split)}
    order = {"valid": 0, "test": 1, "train": 2}
    chosen: list[tuple[str, str]] = []
    for name in styles:
        rows = sorted(
            (row for row in held_out if genre[row] == name),
            key=lambda r: (order[held_out[r]], hashlib.sha256(f"{seed} {keys[r]}".encode()).hexdigest()),
        )
        texts: list[str] = []
        for row in rows:
            written = data.meta(row)["descriptions"]
            english = [d["text"] for d in written if d.get("language", language[row]) == "en"]
            texts += [t for t in english[:1] if t not in texts]
            if len(texts) == per_style:
                break
        texts = texts or [name]
        chosen += [(name, texts[i % len(texts)]) for i in range(per_style)]
    return chosen


def embed_clips(model: generate.MusicGen, codes: np.ndarray, frames: int) -> list[np.ndarray]:
    """Embeddings of the windows of `frames` frames that fit one after the other into codes [K, T]."""
    count = max(1, codes.shape[1] // frames)
    latents = model.codec.embed(torch.from_numpy(codes.astype(np.int64))[None])[0]
    return [style.embedding(latents[:, i * frames : (i + 1) * frames]) for i in range(count)]


def measure(
    model: generate.MusicGen,
    styles: style.Styles,
    index: style.CodeIndex,
    codes: np.ndarray,
    audio: np.ndarray,
    **labels: Any,
) -> Clip:
    """All measures of one clip: codes [K, T], audio [C, N]; `labels` are asked, prompt, seed."""
    return Clip(
        nearest=styles.nearest(embed_clips(model, codes, codes.shape[1])[0])[0],
        silence=measures.silence_share(audio),
        flatness=measures.spectral_flatness(audio),
        match=index.best_match(codes),
        **labels,
    )


def check(config: MusicCheckConfig, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Run the check; the result as plain data, with `passed` and, per clip, every measure.

    Raises:
        UserError: data set and model are of different codecs, or there are too few styles.
    """
    say = progress or (lambda what, done, total: None)
    data = ShardSet.open(config.data)
    model = generate.load(config.model, device=config.device)
    if data.info["codec"]["identity"] != model.codec.identity:
        raise UserError(
            f"DATA={config.data!r} holds tokens of codec {data.info['codec']['name']!r} "
            f"({data.info['codec']['identity'][:12]}…), MODEL={config.model!r} speaks those of {model.codec.name!r} "
            f"({model.codec.identity[:12]}…); give the data set the model was trained on"
        )
    frames = round(config.duration * model.codec.frame_rate)
    genre, key = (data.index.column(c).to_pylist() for c in ("genre", "key"))
    names = commonest_styles(data, config.styles)
    train = [int(r) for r in data.rows("train")]
    vectors, labels = [], []
    for i, row in enumerate(train):
        if genre[row] in names:
            for vector in embed_clips(model, data.codes(row), frames):
                vectors.append(vector)
                labels.append(genre[row])
        say("training tracks", i + 1, len(train))
    styles = style.style_centroids(np.stack(vectors), labels)
    index = style.CodeIndex((key[row], data.codes(row)) for row in train)

    generated = _generated(config, model, data, styles, index, say)
    real = []
    held_out = [int(r) for r in data.rows("valid") if genre[r] in names and data.codes(r).shape[1] >= frames]
    for i, row in enumerate(held_out):
        codes = np.asarray(data.codes(row)[:, :frames])
        audio = model.codec.decode(torch.from_numpy(codes.astype(np.int64))[None])[0].cpu().numpy()
        real.append(measure(model, styles, index, codes, audio, asked=genre[row], prompt="", seed=None))
        say("held-out clips", i + 1, len(held_out))
    return result(config, model, data, names, generated, real)


def _generated(
    config: MusicCheckConfig,
    model: generate.MusicGen,
    data: ShardSet,
    styles: style.Styles,
    index: style.CodeIndex,
    say: Callable[[str, int, int], None],
) -> list[Clip]:
    """Generate every prompt and measure the clips; writes them when a folder is given."""
    asked = choose_prompts(data, styles.names, config.prompts_per_style, config.seed)
    clips: list[Clip] = []
    for start in range(0, len(asked), config.batch):
        part = asked[start : start + config.batch]
        seeds = [config.seed + start + i for i in range(len(part))]

        def columns(done: int, total: int, start: int = start, count: int = len(part)) -> None:
            say("generated clips", start * total + count * done, len(asked) * total)

        prompts: list[str | None] = [prompt for _, prompt in part]
        audio, codes = generate.generate(model, prompts, config.duration, seeds, config.sampling, columns)
        for (name, prompt), seed, sound, tokens in zip(part, seeds, audio.numpy(), codes.numpy()):
            clips.append(measure(model, styles, index, tokens, sound, asked=name, prompt=prompt, seed=seed))
            if config.clips:
                path = files.join(config.clips, f"{name.replace('/', '-').replace(' ', '-')}-{seed}.wav")
                mark = generate.marking(model, generate.Request([prompt], config.duration, [seed], config.sampling))
                wav.write(path, sound, model.codec.sample_rate, mark)
    return clips


def result(
    config: MusicCheckConfig,
    model: generate.MusicGen,
    data: ShardSet,
    names: Sequence[str],
    generated: Sequence[Clip],
    real: Sequence[Clip],
) -> dict[str, Any]:
    """The figures and the verdict as plain data."""
    hits, trials = sum(c.hit for c in generated), len(generated)
    p = style.binomial_p(hits, trials, 1 / len(names))
    verdict = {
        "in_style": p < SIGNIFICANT,
        "no_silence": all(c.silence < SILENT_SHARE for c in generated),
        "no_noise": all(c.flatness < NOISE_FLATNESS for c in generated),
        "nothing_memorised": not any(c.match.copied for c in generated),
    }

    def row(clip: Clip) -> dict[str, Any]:
        return {
            "asked": clip.asked,
            "nearest": clip.nearest,
            "prompt": clip.prompt,
            "seed": clip.seed,
            "silence": round(clip.silence, 4),
            "flatness": round(clip.flatness, 4),
            "equal_codes": round(clip.match.share, 4),
            "likest_track": clip.match.track,
        }

    return {
        "model": {"name": config.model, "sha256": model.info.get("weights", {}).get("sha256")},
        "data_version": data.info.get("dataset_version"),
        "codec": model.info["codec"],
        "settings": settings.to_dict(config),
        "styles": list(names),
        "hits": hits,
        "clips": trials,
        "binomial_p": p,
        "ceiling_hits": sum(c.hit for c in real),
        "ceiling_clips": len(real),
        "verdict": verdict,
        "passed": all(verdict.values()),
        "generated": [row(c) for c in generated],
        "real": [row(c) for c in real],
    }


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Generated clips by style, held-out clips (codec reconstructions) beside them")
    headings = ("style", "in style", "held-out in style", "silence", "flatness", "held-out flatness", "equal codes")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "style" else "right")
    for name in found["styles"]:
        made = [c for c in found["generated"] if c["asked"] == name]
        real = [c for c in found["real"] if c["asked"] == name]
        table.add_row(
            name,
            f"{sum(c['asked'] == c['nearest'] for c in made)}/{len(made)}",
            f"{sum(c['asked'] == c['nearest'] for c in real)}/{len(real)}" if real else "–",
            f"{max(c['silence'] for c in made):.0%}",
            f"{max(c['flatness'] for c in made):.3f}",
            f"{max(c['flatness'] for c in real):.3f}" if real else "–",
            f"{max(c['equal_codes'] for c in made):.0%}",
        )
    console = Console()
    console.print(table)
    console.print(
        "silence, flatness (noise is 0.56) and equal codes (5 s window, training tracks): largest of the clips"
    )
    chance = len(found["generated"]) / len(found["styles"])
    console.print(
        f"in the style asked for: {found['hits']} of {found['clips']} (by luck {chance:.0f}; p = "
        f"{found['binomial_p']:.2g}); held-out clips {found['ceiling_hits']} of {found['ceiling_clips']}"
    )
    failed = [name.replace("_", " ") for name, good in found["verdict"].items() if not good]
    console.print("passed" if found["passed"] else f"NOT passed: {', '.join(failed)}")


def main(argv: Sequence[str]) -> int:
    """`python -m training.music_check`: see `MusicCheckConfig`. Exit code 1 when the check is not passed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    config = settings.parse(MusicCheckConfig, argv, prog="python -m training.music_check")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def say(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        found = check(config, say)
    _print(found)
    if config.out:
        files.write_bytes(config.out, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    settings.run(main)
