"""Sound that a user hands in (an audio prompt, a melody), from any file that PyAV reads, as the model takes it.

The file is the user's own, so it is decoded in this process, by audio demuxers only, so that no playlist can make the
decoder open other files. Of a long file no more is held than is asked for: it is read while it is decoded, its channels
are mixed block by block, and decoding ends where the sound that is wanted does. Frames whose rate, channels or format
differ from the first are left out: damaged AAC otherwise crashes the conversion.
"""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from musicgen import files
from musicgen.errors import UserError
from musicgen.files import AUDIO_CONTAINERS

MAX_SECONDS = 3600.0
_MAX_PIPE = 2**30  # bytes of what is no file, such as a pipe, which has to be read whole
_MARGIN_SECONDS = 0.5  # around an excerpt, so that resampling begins and ends outside of it


def read(
    path: str,
    sample_rate_hz: int,
    channels: int,
    *,
    what: str,
    max_seconds: float = MAX_SECONDS,
    digest: hashlib._Hash | None = None,
) -> np.ndarray:
    """Sound of a file as float32 `[channels, N]` at `sample_rate_hz`.

    Args:
        path: a path or URI.
        channels: 1 (mean of the file's channels) or 2.
        what: how the user named it, such as `MELODY`.
        max_seconds: the rest of a longer file is left out, not decoded.
        digest: one of hashlib's, to take up the bytes of the whole file.

    Raises:
        UserError: no such file, not audio, no sound in it, or samples that are not finite.
    """
    name = f"{what}={path!r}"
    with _opened(path, what, digest) as file:
        parts, samples, rate = [], 0, 0
        for pcm, rate in _blocks(file, name):
            parts.append(_mixed(pcm, channels, name))
            samples += pcm.shape[1]
            if samples >= max_seconds * rate:
                break
    pcm = np.concatenate(parts, axis=1)[:, : round(max_seconds * rate)]
    return _resample(pcm, rate, sample_rate_hz)


def read_middle(
    path: str, sample_rate_hz: int, channels: int, *, what: str, seconds: float, digest: hashlib._Hash | None = None
) -> tuple[np.ndarray, float]:
    """An excerpt of so many seconds from the middle of a file, the whole of a shorter one, and the file's seconds.

    The file is decoded twice, once for its length, which containers state wrongly or not at all; of more than an hour
    the first hour counts. For arguments and errors see `read`.
    """
    name = f"{what}={path!r}"
    with _opened(path, what, digest) as file:
        length, rate = 0, 1
        for pcm, rate in _blocks(file, name):
            length = min(length + pcm.shape[1], round(MAX_SECONDS * rate))
            if length >= MAX_SECONDS * rate:
                break
        total = (length * sample_rate_hz + rate // 2) // rate  # samples at the rate asked for
        wanted = min(round(seconds * sample_rate_hz), total)
        begin = (total - wanted) // 2
        # A whole number of samples at both rates, so that the excerpt is that of the whole file resampled.
        step = rate // int(np.gcd(rate, sample_rate_hz))
        margin = round(_MARGIN_SECONDS * rate)
        first = max(0, begin * rate // sample_rate_hz - margin) // step * step
        last = min(length, (begin + wanted) * rate // sample_rate_hz + margin)
        file.seek(0)
        parts, at = [], 0
        for pcm, _ in _blocks(file, name):
            if at + pcm.shape[1] > first:
                parts.append(_mixed(pcm[:, max(0, first - at) : last - at], channels, name))
            at += pcm.shape[1]
            if at >= last:
                break
    sound = _resample(np.concatenate(parts, axis=1), rate, sample_rate_hz)
    start = begin - first * sample_rate_hz // rate
    return sound[:, start : start + wanted], length / rate


@contextmanager
def _opened(path: str, what: str, digest: hashlib._Hash | None) -> Iterator[BinaryIO]:
    """The file, to be read from any place in it, after `digest` has taken up its bytes."""
    local = files.local_path(path)
    try:
        if local is None:
            yield _digested(io.BytesIO(files.read_bytes(path)), digest)
            return
        with local.open("rb") as file:
            if stat.S_ISREG(local.stat().st_mode):
                yield _digested(file, digest)
                return
            raw = file.read(_MAX_PIPE + 1)
        if len(raw) > _MAX_PIPE:
            raise UserError(f"{what}={path!r} is no file and does not end within 1 GiB; give an audio file")
        yield _digested(io.BytesIO(raw), digest)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what}={path!r} does not exist; give an audio file") from None
    except OSError as error:
        raise UserError(f"{what}={path!r} cannot be read: {error.strerror or error}; give an audio file") from None


def _digested(file: Any, digest: hashlib._Hash | None) -> BinaryIO:
    """The file at its start, its bytes taken up by `digest`."""
    if digest is not None:
        hashlib.file_digest(file, lambda: digest)
        file.seek(0)
    return file


def _blocks(file: BinaryIO, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Sound as it is decoded, float32 `[C, n]`, and its rate; at least one block with a sample."""
    import av

    advice = f"give an audio file ({', '.join(AUDIO_CONTAINERS.split(',')[:7])} …)"
    first, found = None, False
    try:
        with av.open(file, "r", options={"format_whitelist": AUDIO_CONTAINERS}) as container:
            if not container.streams.audio:
                raise UserError(f"{name} holds no sound; {advice}")
            resampler = av.AudioResampler(format="flt")  # in turn: PyAV crashes on eight channels one after the other
            frames = container.decode(container.streams.audio[0])
            while (frame := _next(frames, found)) is not None:
                key = (frame.sample_rate, frame.layout.name, frame.format.name)
                first = first or key
                if key != first:
                    continue
                for piece in resampler.resample(frame):
                    if piece.samples:
                        found = True
                        yield piece.to_ndarray().reshape(piece.samples, -1).T.astype(np.float32, copy=False), first[0]
    except (av.error.FFmpegError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is not audio that can be read ({_words(error)}); {advice}") from None
    if not found:
        raise UserError(f"{name} holds no sound; {advice}")


def _next(frames: Iterator[Any], found: bool) -> Any:
    """The next frame; None at the end, and at damage behind sound: no reason to refuse what came before."""
    import av

    try:
        return next(frames, None)
    except av.error.FFmpegError:
        if not found:
            raise
        return None


def _mixed(pcm: np.ndarray, channels: int, name: str) -> np.ndarray:
    """`[C, n]` in so many channels: as it is, or the mean in each of them."""
    if not np.isfinite(pcm).all():
        raise UserError(f"{name} holds samples that are not finite (NaN or infinity); export it again")
    if pcm.shape[0] == channels:
        return pcm
    return np.repeat(pcm.mean(axis=0, keepdims=True, dtype=np.float32), channels, axis=0)


def _words(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0][:120]


def _resample(pcm: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    if from_hz == to_hz:
        return np.ascontiguousarray(pcm)
    import soxr

    out = soxr.resample(np.ascontiguousarray(pcm.T), from_hz, to_hz, quality="HQ")
    return np.ascontiguousarray(out.reshape(-1, pcm.shape[0]).T, dtype=np.float32)
