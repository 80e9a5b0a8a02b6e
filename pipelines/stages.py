"""The life of one track as plain functions, without Ray.

    fetch -> decode -> checks -> 32 kHz -> analysis, chroma   `prepare`  (CPU tasks)
    -> codes                                                  `encode`   (codec actors)

Each track ends as a `Result`: its codes, chroma and facts, or a reject with its reason. A result is one small file in
the work folder, whole or absent, so that a killed run continues with what is missing. What depends on other tracks
(duplicates, splits) and on the words of the catalogue (captions) is decided afterwards, in `pipelines.ingest`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from musicgen import codec as codecs
from musicgen import stems, stereo
from musicgen.errors import UserError
from pipelines import analysis, audio, checks
from pipelines.checks import CheckConfig, Reject
from pipelines.store import Place

STEM_SECONDS = 0.25  # a stem may be longer or shorter than its track by this much: lossy codecs add some padding
STEM_LIKENESS = 0.1  # of the stems' sum and the track


@dataclass(frozen=True)
class Job:
    """A track to be prepared and encoded.

    Attributes:
        track_id: the catalogue's id.
        source: where the audio is.
        work_id: name of its result; changes with the source, the settings and the codec.
        size: bytes of the source, to make batches of similar work.
        stems: name and place of each stem that the catalogue names, where the settings ask for stems.
        taken_down: the recording was taken down: only its hashes are wanted, to know it under another row.
    """

    track_id: str
    source: Place
    work_id: str
    size: int = 0
    stems: tuple[tuple[str, Place], ...] = ()
    taken_down: bool = False


@dataclass(frozen=True)
class TrackSettings:
    """What decides a track's facts and codes, and the limits of decoding it.

    `codec` is a name for `load_codec`; `codec_identity` is what that name must mean on every machine. Of
    `chroma_variants` degraded versions the chroma is kept as well, with `chroma_stems` of other mixes of the stems;
    with `melody_stems` the track's own chroma is that of its stems without drums and bass.
    """

    checks: CheckConfig
    decode: audio.DecodeConfig
    analysis: str
    codec: str
    codec_identity: str
    sample_rate_hz: int
    channels: int
    chroma_variants: int = 0
    chroma_stems: bool = False
    melody_stems: bool = False


@dataclass(frozen=True)
class Prepared:
    """A track on its way to the codec: audio [C, N] float32 at the codec's rate, chroma uint8, facts.

    Chroma is [T_c], or [1 + n, T_c] with n variants.
    """

    job: Job
    audio: np.ndarray
    chroma: np.ndarray
    facts: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Length of the track."""
        return float(self.facts["duration_seconds"])


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        facts: source_sha256 and, for a track, pcm_sha256, duration_seconds, analysis, source,
            frames; for a reject, reject; of a recording that was taken down, pcm_sha256.
        codes: [K, T] int16; None without a track.
        chroma: [T_c] uint8, or [1 + n, T_c] with n variants; None without a track.
    """

    facts: dict[str, Any]
    codes: np.ndarray | None = None
    chroma: np.ndarray | None = None

    @property
    def reject(self) -> Reject | None:
        """The reason of a rejection; None for a track."""
        return reject_of(self.facts)


def reject_of(facts: dict[str, Any]) -> Reject | None:
    """The `Reject` inside a track's facts; None when there is none."""
    return Reject(**facts["reject"]) if "reject" in facts else None


def rejected(stage: str, code: str, message: str, source_sha256: str | None = None) -> Result:
    """A result that is a reject."""
    return Result({"source_sha256": source_sha256, "reject": asdict(Reject(stage, code, message))})


def fetch(source: Place, attempts: int = 3) -> bytes:
    """The source's bytes; a store that stumbles is asked again. Raises `FileNotFoundError` or the last `OSError`."""
    for attempt in range(attempts):
        try:
            return source.read()
        except (FileNotFoundError, IsADirectoryError):
            raise
        except OSError:
            if attempt == attempts - 1:
                raise
            time.sleep(0.5 * 4**attempt)
    raise AssertionError("unreachable")


def prepare(job: Job, settings: TrackSettings, decoder: audio.Decoder) -> Prepared | Result:
    """Everything before the codec for one track; a `Result` when it is rejected or was taken down."""
    try:
        data = fetch(job.source)
    except (FileNotFoundError, IsADirectoryError):
        return rejected("source", "missing", f"no file at {job.source}")
    except OSError as error:
        return rejected("source", "missing", f"{job.source} cannot be read: {error}")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return _prepare(job, settings, decoder, data, sha256)
    except audio.DecodeError as error:
        return rejected("decode", error.code, error.message, sha256)
    except StemError as error:
        return rejected(error.stage, error.code, str(error), sha256)
    except MemoryError:
        return rejected("prepare", "oom", "preparing the track needs more memory than there is", sha256)
    except UserError:
        raise
    except Exception as error:  # one odd file must not end a run; the reason is kept and counted
        return rejected("prepare", "crash", f"{type(error).__name__}: {error}", sha256)


def _prepare(job: Job, settings: TrackSettings, decoder: audio.Decoder, data: bytes, sha256: str) -> Prepared | Result:
    from musicgen.chroma import chroma_bins

    decoded = decoder.decode(data)
    if job.taken_down:
        return Result({"source_sha256": sha256, "pcm_sha256": audio.pcm_sha256(decoded)})
    audio.verify(decoded, settings.checks)
    problem = checks.first(decoded.pcm, decoded.sample_rate_hz, settings.checks)
    if problem is not None:
        return rejected(problem.stage, problem.code, problem.message, sha256)
    sound = audio.prepare(decoded.pcm, decoded.sample_rate_hz, settings.sample_rate_hz, settings.channels)
    mono = sound.mean(0, dtype=np.float32) if sound.shape[0] > 1 else sound[0]
    facts: dict[str, Any] = {
        "source_sha256": sha256,
        "pcm_sha256": audio.pcm_sha256(decoded),
        "duration_seconds": decoded.seconds,
        "analysis": analysis.analyse(mono, settings.sample_rate_hz, settings.analysis),
        "source": {
            "codec": decoded.codec,
            "sample_rate_hz": decoded.sample_rate_hz,
            "channels": decoded.pcm.shape[0],
            "bytes": len(data),
        },
    }
    parts: dict[str, np.ndarray] = {}
    if settings.chroma_stems or settings.melody_stems:
        parts, facts["stems"] = stems_of(job, decoded, mono, settings, decoder)
    melody = mono
    if settings.melody_stems:
        parts = {name: part for name, part in parts.items() if stems.has_melody(name)}
        melody = sum(parts.values(), np.zeros_like(mono))
    chroma = chroma_bins(melody, settings.sample_rate_hz)
    if settings.chroma_variants:  # of what the chroma is of
        mixed = list(parts.values()) if settings.chroma_stems and parts else None
        chroma = np.stack([chroma, *variants(melody, mixed, facts["pcm_sha256"], settings)])
    return Prepared(job, sound, chroma, facts)


class StemError(Exception):
    """A stem of the catalogue is missing, unreadable, of another length or recording, or none of them has a melody."""

    def __init__(self, stage: str, code: str, message: str) -> None:
        super().__init__(message)
        self.stage, self.code = stage, code


def stems_of(
    job: Job, decoded: audio.Decoded, mono: np.ndarray, settings: TrackSettings, decoder: audio.Decoder
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Stems of a track, each mono as long as `mono` [N], by name, and where they are from: the catalogue, or Demucs.

    Raises:
        StemError: of the catalogue's stems.
        UserError: the catalogue names none, and demucs or its weights are missing.
    """
    rate = settings.sample_rate_hz
    if not job.stems:
        wide = audio.prepare(decoded.pcm, decoded.sample_rate_hz, stems.SAMPLE_RATE, 2)
        apart = stems.separate(wide, rate, separator("melody_stems" if settings.melody_stems else "chroma_stems"))
        return {name: _fitted(part, len(mono)) for name, part in apart.items()}, {"from": stems.MODEL}
    if settings.melody_stems and not any(stems.has_melody(name) for name, _ in job.stems):
        message = (
            f"the stems {', '.join(name for name, _ in job.stems)} are drums and bass, by their names; the melody is"
        )
        raise StemError("check", "no_melody", f"{message} taken from the others: name them as well, or no stems at all")
    parts, hashes = {}, {}
    for name, place in job.stems:
        try:
            data = fetch(place)
            found = decoder.decode(data)
            audio.verify(found, settings.checks)
        except OSError as error:
            raise StemError("source", "missing", f"stem {name!r} at {place} cannot be read: {error}") from error
        except audio.DecodeError as error:
            raise StemError("decode", error.code, f"stem {name!r}: {error.message}") from error
        if abs(found.seconds - decoded.seconds) > STEM_SECONDS:
            message = f"stem {name!r} lasts {found.seconds:.2f} s, the track {decoded.seconds:.2f} s"
            raise StemError("check", "stem_mismatch", message)
        part = audio.prepare(found.pcm, found.sample_rate_hz, rate, 1)[0]
        parts[name], hashes[name] = _fitted(part, len(mono)), hashlib.sha256(data).hexdigest()
    alike = stems.likeness(mono, np.sum(list(parts.values()), axis=0), rate, STEM_SECONDS)
    if alike < STEM_LIKENESS:
        message = f"the stems are not of this track: their sum correlates with it by {alike:.2f}, expected 0.2 to 1"
        raise StemError("check", "stem_mismatch", message)
    return parts, {"from": "catalogue", "sha256": hashes}


def variants(
    mono: np.ndarray, parts: list[np.ndarray] | None, pcm_sha256: str, settings: TrackSettings
) -> list[np.ndarray]:
    """Chroma [T_c] of the degraded versions of a track [N] (or of its stems), drawn by its sound alone."""
    from musicgen.chroma import chroma_bins
    from musicgen.degrade import degraded

    rate, seed = settings.sample_rate_hz, int(pcm_sha256[:16], 16)
    return [
        chroma_bins(degraded(mono, (seed, number), rate, parts), rate)
        for number in range(1, settings.chroma_variants + 1)
    ]


def _fitted(part: np.ndarray, samples: int) -> np.ndarray:
    """A stem as long as the track: resampling rounds a length up or down."""
    return np.pad(part[:samples], (0, max(0, samples - len(part))))


@functools.cache
def separator(setting: str) -> Any:
    """The separator of this process; raises `UserError` naming the setting where demucs or its weights are missing."""
    return stems.load(setting)


def encode(prepared: Prepared, codec: codecs.Codec) -> Result:
    """Codes of a prepared track."""
    if not np.isfinite(prepared.audio).all():
        sha256 = prepared.facts["source_sha256"]
        return rejected("codec", "codec_nonfinite", "the prepared audio holds values that are not finite", sha256)
    codes = codec.encode_track(prepared.audio)
    facts = {**prepared.facts, "frames": int(codes.shape[1])}
    return Result(facts, codes.astype(np.int16), prepared.chroma)


def load_codec(name: str) -> codecs.Codec:
    """The codec of a setting: `demo`, `tiny` (small, random, for trying a catalogue out), a folder or a hub name.

    `stereo:` before the name encodes left and right apart.
    """
    if name == f"{stereo.PREFIX}tiny":
        return stereo.StereoCodec(codecs.tiny())
    return codecs.tiny() if name == "tiny" else codecs.load(name)


# --- results in the work folder -----------------------------------------------------------------------------------

_SUFFIX = ".npz"


def save(work: Place, work_id: str, result: Result) -> None:
    """Keep a result, whole or not at all. Raises `DiskFull`."""
    out = io.BytesIO()
    arrays = {} if result.codes is None else {"codes": result.codes, "chroma": result.chroma}
    facts = np.frombuffer(json.dumps(result.facts).encode(), dtype=np.uint8)
    np.savez(out, facts=facts, **arrays)  # type: ignore[arg-type]
    (work / f"{work_id}{_SUFFIX}").write(out.getvalue())


def load(work: Place, work_id: str) -> Result:
    """A kept result. Raises `FileNotFoundError`, and `UserError` where it is damaged."""
    place = work / f"{work_id}{_SUFFIX}"
    data = place.read()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return Result(facts, arrays["codes"], arrays["chroma"]) if "codes" in arrays else Result(facts)
    except Exception as error:  # numpy, zip and JSON each raise kinds of their own
        raise UserError(
            f"{place} is damaged ({error}). Delete this file and run the same command again, which makes it anew"
        ) from error


def kept(work: Place) -> set[str]:
    """Ids of all results in the work folder."""
    return {name.removesuffix(_SUFFIX) for name in work.list(_SUFFIX)}
