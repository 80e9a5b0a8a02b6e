"""The listening table: the same prompts through several models, beside the codec's ceiling and the originals.

For each of some held-out tracks of different styles four clips are made: what the model just trained plays for the
track's description, what the shipped model plays for the same prompt and seed, the track through the codec and back
(no model on these tokens can sound better), and the original. Every generated clip carries its marking. `clips.json`
records what was made from what; clips that are already there for the same models and data are not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musicgen import files, generate, wav
from musicgen.codec import Codec
from musicgen.metrics import audio as measures
from musicgen.sampling import SamplingConfig
from pipelines import audio as sources
from pipelines import catalog
from pipelines.shard import ShardSet

KINDS = ("run", "shipped", "codec", "original")
Say = Callable[[int, int], None]


@dataclass(frozen=True)
class Track:
    """A track that is listened to: its row in the data set, its id in the catalogue, and the prompt made of it."""

    row: int
    track_id: str
    title: str
    artist: str
    style: str
    split: str
    prompt: str


@dataclass(frozen=True)
class Clip:
    """One clip: `kind` is run, shipped, codec or original; `file` lies beside clips.json.

    `mel` and `chroma` compare codec clips with their original (None elsewhere, or without an original).
    """

    kind: str
    file: str
    track_id: str
    title: str
    artist: str
    style: str
    split: str
    prompt: str
    seed: int | None
    seconds: float
    silence: float
    flatness: float
    mel: float | None = None
    chroma: float | None = None


def choose_tracks(data: ShardSet, count: int, seconds: float) -> list[Track]:
    """Up to `count` tracks at least `seconds` long: held-out ones first, a new style each time while there are any."""
    order = {split: i for i, split in enumerate(("valid", "test", "train"))}
    split_of = {int(row): split for split in order for row in data.rows(split)}
    genre, key, frames = (data.index.column(c).to_pylist() for c in ("genre", "key", "frames"))
    need = seconds * data.info["codec"]["frame_rate"]
    waiting = sorted(
        (row for row in split_of if frames[row] >= need),
        key=lambda r: (order[split_of[r]], hashlib.sha256(key[r].encode()).hexdigest()),
    )
    chosen: list[Track] = []
    heard: dict[str, int] = {}
    while waiting and len(chosen) < count:
        row = min(waiting, key=lambda r: (order[split_of[r]], heard.get(genre[r], 0)))
        waiting.remove(row)
        meta = data.meta(row)
        written = meta.get("descriptions") or []
        english = [d["text"] for d in written if d.get("language", "en") == "en"]
        texts = english or [d["text"] for d in written]
        if not texts:
            continue
        heard[genre[row]] = heard.get(genre[row], 0) + 1
        chosen.append(
            Track(
                row=row,
                track_id=meta["track_id"],
                title=meta.get("title") or meta["track_id"],
                artist=meta.get("artist") or "",
                style=genre[row] or "",
                split=split_of[row],
                prompt=texts[0],
            )
        )
    return chosen


def originals(catalog_uri: str, tracks: Sequence[Track], codec: Codec, seconds: float) -> dict[str, np.ndarray]:
    """The beginnings of the tracks' own sound as the codec takes it, [C, N] by track id; what is gone is left out."""
    book = catalog.read(catalog_uri)
    wanted = {t.track_id for t in tracks}
    found: dict[str, np.ndarray] = {}
    decoder = sources.Decoder(sources.DecodeConfig(), max_seconds=3600.0)
    try:
        for row in book.rows:
            if row.track_id not in wanted:
                continue
            try:
                decoded = decoder.decode(book.folder.join(row.values["uri"]).read())
            except (OSError, sources.DecodeError):
                continue
            sound = sources.prepare(decoded.pcm, decoded.sample_rate_hz, codec.sample_rate, codec.channels)
            found[str(row.track_id)] = sound[:, : round(seconds * codec.sample_rate)]
    finally:
        decoder.close()
    return found


def _describe(kind: str, file: str, track: Track, seed: int | None, sound: np.ndarray, rate: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "file": file,
        "track_id": track.track_id,
        "title": track.title,
        "artist": track.artist,
        "style": track.style,
        "split": track.split,
        "prompt": track.prompt,
        "seed": seed,
        "seconds": sound.shape[-1] / rate,
        "silence": round(measures.silence_share(sound), 4),
        "flatness": round(measures.spectral_flatness(sound), 4),
    }


def make_clips(
    folder: Path,
    models: dict[str, generate.MusicGen],
    data: ShardSet,
    catalog_uri: str,
    *,
    count: int = 6,
    seconds: float = 10.0,
    seed: int = 0,
    config: SamplingConfig | None = None,
    say: Say | None = None,
) -> list[Clip]:
    """Make (or find) the clips in `folder`; one WAV each and clips.json.

    Args:
        models: by kind: `run`, and `shipped` where there is one. The first one's codec gives the ceiling.
        catalog_uri: where the originals are found by their track id.
        say: called with (done, total).
    """
    config = config or SamplingConfig()
    tracks = choose_tracks(data, count, seconds)
    inputs = {
        "models": {kind: m.info["weights"]["sha256"] for kind, m in models.items()},
        "dataset_version": data.info["dataset_version"],
        "codec": data.info["codec"]["identity"],
        "tracks": [asdict(t) for t in tracks],
        "seconds": seconds,
        "seed": seed,
        "sampling": asdict(config),
    }
    known = read_clips(folder, inputs)
    if known is not None:
        return known
    codec = next(iter(models.values())).codec
    clips: list[dict[str, Any]] = []
    prompts: list[str | None] = [t.prompt for t in tracks]
    seeds = [seed + i for i in range(len(tracks))]
    for number, (kind, model) in enumerate(models.items()):

        def columns(done: int, total: int, number: int = number) -> None:
            if say:
                say(number * total + done, len(models) * total)

        sound, _ = generate.generate(model, prompts, seconds, seeds, config, columns)
        for i, (track, clip) in enumerate(zip(tracks, sound.numpy())):
            file = f"{i:02d}-{kind}.wav"
            mark = generate.marking(model, generate.Request([track.prompt], seconds, [seeds[i]], config))
            wav.write(folder / file, clip, model.codec.sample_rate, mark)
            clips.append(_describe(kind, file, track, seeds[i], clip, model.codec.sample_rate))
    real = originals(catalog_uri, tracks, codec, seconds)
    frames = round(seconds * codec.frame_rate)
    for i, track in enumerate(tracks):
        tokens = torch.from_numpy(np.asarray(data.codes(track.row)[:, :frames]).astype(np.int64))
        ceiling = codec.decode(tokens[None])[0].cpu().numpy()
        original = real.get(track.track_id)
        for kind, audio in (("codec", ceiling), ("original", original)):
            if audio is None:
                continue
            file = f"{i:02d}-{kind}.wav"
            how = "reconstruction by the codec" if kind == "codec" else "excerpt of a recording"
            mark = {"generated": False, "what": how, "track_id": track.track_id, "title": track.title}
            files.write_bytes(folder / file, wav.encode(audio, codec.sample_rate, mark, generated=False))
            clip = _describe(kind, file, track, None, audio, codec.sample_rate)
            if kind == "codec" and original is not None:
                length = min(original.shape[-1], audio.shape[-1])
                pair = original[:, :length], audio[:, :length]
                clip |= {"mel": measures.log_mel_distance(*pair), "chroma": measures.chroma_agreement(*pair)}
            clips.append(clip)
    made = [Clip(**c) for c in sorted(clips, key=lambda c: (c["file"][:2], KINDS.index(c["kind"])))]
    document = {"inputs": inputs, "clips": [asdict(c) for c in made]}
    files.write_bytes(
        folder / "clips.json", (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    )
    return made


def read_clips(folder: Path, inputs: dict[str, Any] | None = None) -> list[Clip] | None:
    """The clips of a folder; None when there are none, one is missing, or they were made from other `inputs`."""
    try:
        document = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if inputs is not None and document["inputs"] != json.loads(json.dumps(inputs)):
        return None
    clips = [Clip(**c) for c in document["clips"]]
    return clips if all((folder / c.file).is_file() for c in clips) else None
