"""Sound that a user hands in (an audio prompt, a melody), from any file that PyAV reads, as the model takes it.

The file is the user's own, so it is decoded in this process, by audio demuxers only, so that no playlist can make the
decoder open other files, and no longer than asked. Frames whose rate, channels or format differ from the first are
left out: damaged AAC otherwise crashes the conversion.
"""

from __future__ import annotations

import io

import numpy as np

from musicgen import files
from musicgen.errors import UserError

_FORMATS = "wav,w64,rf64,aiff,caf,au,flac,mp3,ogg,mov,mp4,m4a,matroska,webm,aac,asf,ape,wv,tta,mpc,mpc8,ac3,eac3"
MAX_SECONDS = 3600.0


def read(path: str, sample_rate_hz: int, channels: int, *, what: str, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Sound of a file as float32 `[channels, N]` at `sample_rate_hz`.

    Args:
        path: a path or URI.
        channels: 1 (mean of the file's channels) or 2.
        what: how the user named it, such as `MELODY`.
        max_seconds: the rest of a longer file is left out.

    Raises:
        UserError: no such file, not audio, no sound in it, or samples that are not finite.
    """
    try:
        raw = files.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what}={path!r} does not exist; give an audio file") from None
    except OSError as error:
        raise UserError(f"{what}={path!r} cannot be read: {error.strerror or error}; give an audio file") from None
    pcm, rate = _decode(raw, f"{what}={path!r}", max_seconds)
    if not np.isfinite(pcm).all():
        raise UserError(f"{what}={path!r} holds samples that are not finite (NaN or infinity); export it again")
    if pcm.shape[0] != channels:
        pcm = np.repeat(pcm.mean(axis=0, keepdims=True, dtype=np.float32), channels, axis=0)
    return _resample(pcm, rate, sample_rate_hz)


def _decode(raw: bytes, name: str, max_seconds: float) -> tuple[np.ndarray, int]:
    import av

    advice = f"give an audio file ({', '.join(_FORMATS.split(',')[:7])} …)"
    try:
        with av.open(io.BytesIO(raw), "r", options={"format_whitelist": _FORMATS}) as container:
            if not container.streams.audio:
                raise UserError(f"{name} holds no sound; {advice}")
            first, parts, samples = None, [], 0
            resampler = av.AudioResampler(format="fltp")
            try:
                for frame in container.decode(container.streams.audio[0]):
                    key = (frame.sample_rate, frame.layout.name, frame.format.name)
                    first = first or key
                    if key != first:
                        continue
                    for piece in resampler.resample(frame):
                        parts.append(piece.to_ndarray())
                        samples += piece.samples
                    if samples >= max_seconds * frame.sample_rate:
                        break
            except av.error.FFmpegError:
                if not parts:  # a damaged end is no reason to refuse what came before
                    raise
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is not audio that can be read ({_words(error)}); {advice}") from None
    if first is None or samples == 0:
        raise UserError(f"{name} holds no sound; {advice}")
    pcm = np.concatenate(parts, axis=1)[:, : round(max_seconds * first[0])]
    return pcm.astype(np.float32), first[0]


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0][:120]


def _resample(pcm: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    if from_hz == to_hz:
        return np.ascontiguousarray(pcm)
    import soxr

    out = soxr.resample(np.ascontiguousarray(pcm.T), from_hz, to_hz, quality="HQ")
    return np.ascontiguousarray(out.reshape(-1, pcm.shape[0]).T, dtype=np.float32)
