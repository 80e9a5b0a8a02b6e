"""Where codec training gets its audio: a catalogue, or shards of audio files with their catalogue rows.

Audio shards are WebDataset tars: per track `<key>.flac` (or wav, mp3, ogg, opus, m4a) and `<key>.json`, the track's
catalogue row. They are read through their member offsets, so a track's bytes travel once and only when it is admitted.
Either way rows pass the rights gate, the decoder, the level checks and the split of ingest: a track that may not become
tokens may not train a codec, a file without a row has no rights, and what was taken down stays out under other rows.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from musicgen.codec import CodecConfig
from musicgen.errors import UserError
from pipelines import audio, stages, takedown
from pipelines.assemble import SplitConfig, split_groups, split_of
from pipelines.catalog import FORMATS, Row, loads, validate
from pipelines.catalog import read as read_catalog
from pipelines.checks import CheckConfig
from pipelines.checks import first as first_problem
from pipelines.rights import RightsConfig, admit
from pipelines.store import Place

SPLITS = ("train", "valid")
AUDIO_SUFFIXES = ("flac", "wav", "mp3", "ogg", "opus", "m4a")


@dataclass(frozen=True)
class Track:
    """A row and the way to its audio file's bytes."""

    row: Row
    read: Callable[[], bytes]


@dataclass
class Selection:
    """Admitted tracks by split, what was refused (reason by track id), and what was taken down (with reject code)."""

    splits: dict[str, list[Track]]
    rejects: dict[str, str]
    taken_down: list[tuple[Track, str]]

    def digest(self, shape: CodecConfig, splits: SplitConfig) -> str:
        """Hash of everything that decides the decoded audio; a cache of another one is made anew."""
        parts = {split: [track.row.digest for track in tracks] for split, tracks in self.splits.items()}
        gone = [track.row.digest for track, _ in self.taken_down]
        rules = [shape.sample_rate_hz, shape.channels, repr(splits), repr(CheckConfig())]
        text = json.dumps([parts, *rules, *([gone] if gone else [])])
        return hashlib.sha256(text.encode()).hexdigest()


def select(source: str, splits: SplitConfig) -> Selection:
    """The tracks of a catalogue or of audio shards that may train a codec.

    Raises:
        UserError: neither of the two, or no admissible track in a split that is needed.
    """
    place = Place.at(source)
    if place.name.lower().endswith(FORMATS):
        catalog = read_catalog(source)
        tracks = [Track(row, _file(catalog.folder, row)) for row in catalog.rows]
        rejects: dict[str, str] = {}
    elif (place / "dataset.json").is_file():
        raise UserError(f"DATA {source!r} holds tokens; a codec learns from audio: give the catalogue or audio shards")
    else:
        tars = [place] if place.name.endswith(".tar") and place.is_file() else [place / n for n in place.list(".tar")]
        if not tars:
            raise UserError(
                f"DATA {source!r} is neither a catalogue ({', '.join(FORMATS)}), nor a folder of audio shards (.tar), "
                "nor a PCM cache made by this command"
            )
        tracks, rejects = _from_shards(tars)
    rights = RightsConfig()
    admitted = []
    for track in tracks:
        name = str(track.row.track_id or f"row {track.row.number}")
        refused = admit(track.row.rights, rights, rights.day()) if not track.row.problems else None
        if track.row.problems:
            rejects[name] = "; ".join(track.row.problems)
        elif refused is not None:
            rejects[name] = refused.message
        else:
            admitted.append(track)
    groups = split_groups([track.row for track in admitted])
    chosen = {
        split: [t for t in admitted if split_of(groups[str(t.row.track_id)], splits) == split] for split in SPLITS
    }
    for split, members in chosen.items():
        if not members:
            raise UserError(
                f"DATA {source!r} has no admissible track in split {split!r} ({len(rejects)} of "
                f"{len(tracks) or len(rejects)} refused{_first_reason(rejects)}); codec training needs both splits"
            )
    gone = [(track, code) for track in tracks if (code := takedown.code_of(track.row))]
    return Selection(chosen, rejects, gone)


def _first_reason(rejects: dict[str, str]) -> str:
    return next((f", the first one, {name}: {reason}" for name, reason in rejects.items()), "")


def _file(folder: Place, row: Row) -> Callable[[], bytes]:
    return lambda: folder.join(row.values["uri"]).read()


def _from_shards(tars: list[Place]) -> tuple[list[Track], dict[str, str]]:
    """Tracks of audio shards in order, and files without a row."""
    rows: list[Any] = []
    reads: list[Callable[[], bytes]] = []
    rejects: dict[str, str] = {}
    for tar in tars:
        for key, members in _members(tar).items():
            sound = next((members[s] for s in AUDIO_SUFFIXES if s in members), None)
            if sound is None or "json" not in members:
                missing = (
                    "no catalogue row (.json), so no rights" if sound else f"no audio ({', '.join(AUDIO_SUFFIXES)})"
                )
                rejects[f"{tar.name}/{key}"] = f"{missing} beside {', '.join(sorted(members))}"
                continue
            try:
                row = loads(tar.read_range(*members["json"]))
            except ValueError as error:
                row = f"{tar.name}/{key}.json is no row: {error}"
            rows.append({"uri": f"{tar.name}/{key}", **row} if isinstance(row, dict) else row)
            reads.append(lambda tar=tar, sound=sound: tar.read_range(*sound))  # type: ignore[misc]
    checked = validate(rows, "the audio shards' rows")
    return [Track(row, read) for row, read in zip(checked, reads, strict=True)], rejects


def _members(tar: Place) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and size of every file of a tar, by WebDataset key and suffix."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tar.fs.open_input_file(tar.path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if member.isfile() and dot:
                    key = f"{folder}/{stem}" if folder else stem
                    found.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"audio shard {tar} cannot be read: {error}") from error
    return found


def sounds_taken_down(chosen: Selection, known: dict[str, list[str]], workers: int) -> dict[str, tuple[str, str]]:
    """What was taken down, by the SHA-256 of its file and of its sound -> track id and reject code.

    Args:
        known: hashes by track id from earlier, when the file may still have been there; those found now are added.
        workers: files that are read at a time.

    Raises:
        UserError: a file that is there cannot be read now, so that its sound would not be known again.
    """
    from concurrent.futures import ThreadPoolExecutor
    from threading import local

    limits, mine = CheckConfig(), local()

    def hashes(track: Track) -> set[str]:
        if not hasattr(mine, "decoder"):
            mine.decoder = audio.Decoder(audio.DecodeConfig(), limits.max_seconds)
        try:
            data = stages.fetch(track)  # type: ignore[arg-type]  # it reads, as a place does
        except (FileNotFoundError, IsADirectoryError, UserError):
            return set()
        except OSError as error:
            raise UserError(
                f"track {track.row.track_id!r} was taken down and its file cannot be read ({error}), by which the same "
                "recording would be known under another row; run the same command again when it can"
            ) from error
        try:
            return {hashlib.sha256(data).hexdigest(), audio.pcm_sha256(mine.decoder.decode(data))}
        except audio.DecodeError:
            return {hashlib.sha256(data).hexdigest()}

    gone = [track for track, _ in chosen.taken_down]
    with ThreadPoolExecutor(workers) as pool:
        for track, found in zip(gone, pool.map(hashes, gone), strict=True):
            known[str(track.row.track_id)] = sorted({*known.get(str(track.row.track_id), ()), *found})
    if unknown := [str(track.row.track_id) for track in gone if not known[str(track.row.track_id)]]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        print(
            f"note: the sound of {', '.join(unknown[:5])}{more} is not known (no file, and never read here): it was "
            "taken down, but the same recording in another row would not be recognised",
            flush=True,
        )
    ids = {str(track.row.track_id): code for track, code in chosen.taken_down}
    return {sha256: (track_id, code) for track_id, code in ids.items() for sha256 in known[track_id]}


def decode(
    tracks: list[Track],
    shape: CodecConfig,
    rejects: dict[str, str],
    workers: int,
    split: str,
    barred: dict[str, tuple[str, str]],
    known: dict[str, list[str]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Decoded, checked and resampled tracks `(track_id, [C, N])` in order, with a bar.

    Args:
        rejects: refusals are added to it.
        barred: of `sounds_taken_down`.
        known: the hashes of each track's file and sound are added to it.
    """
    from concurrent.futures import ThreadPoolExecutor
    from threading import local

    from rich.progress import track as progress

    limits, mine = CheckConfig(), local()

    def one(track: Track) -> np.ndarray | str:
        if not hasattr(mine, "decoder"):
            mine.decoder = audio.Decoder(audio.DecodeConfig(), limits.max_seconds)
        try:
            data = track.read()
            decoded = mine.decoder.decode(data)
            audio.verify(decoded, limits)
        except (audio.DecodeError, OSError) as error:
            return str(error)
        own = known[str(track.row.track_id)] = [hashlib.sha256(data).hexdigest(), audio.pcm_sha256(decoded)]
        if twin := next((barred[sha256] for sha256 in own if sha256 in barred), None):
            return f"the same sound as track {twin[0]!r}, which is refused as {twin[1]}"
        refused = first_problem(decoded.pcm, decoded.sample_rate_hz, limits)
        if refused is not None:
            return refused.message
        return audio.prepare(decoded.pcm, decoded.sample_rate_hz, shape.sample_rate_hz, shape.channels)

    with ThreadPoolExecutor(workers) as pool:
        for start in progress(range(0, len(tracks), 16), description=f"decoding {split}"):
            some = tracks[start : start + 16]
            for track, result in zip(some, pool.map(one, some), strict=True):
                if isinstance(result, str):
                    rejects[str(track.row.track_id)] = result
                else:
                    yield str(track.row.track_id), result
