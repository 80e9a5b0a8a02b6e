"""Decoding, channels, resampling: arrays in, arrays out.

Native decoders crash and hang on damaged files, so decoding happens in one long-lived child process per worker, under
a time and a memory limit; a crash costs one file and a restart of the child. The child runs this very file
(`python -m pipelines.audio`) and speaks length-prefixed messages over its pipes, so it imports nothing heavy.

Inside the child a packet loop recovers what a damaged stream still holds, a guard drops frames whose rate, channels or
format differ from the first (damaged AAC otherwise crashes the conversion), and demuxers are limited to audio
containers, so that no playlist can make the decoder open other files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from musicgen.files import AUDIO_CONTAINERS
from pipelines.checks import CheckConfig

_REQUEST = struct.Struct("<Qdd")
_ANSWER = struct.Struct("<QQ")
_MAX_CHANNELS = 8
_GRACE_SECONDS = 5.0  # the child ends itself in time; the parent only watches that it does
_XING = re.compile(rb"Xing|Info|VBRI")


class DecodeError(Exception):
    """A file that gave no usable sound; `code` is a reject code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class DecodeConfig:
    """Limits of decoding one file. They say how long we are willing to try, so they are no part of a set's identity.

    Args:
        timeout_seconds: a file that takes longer is rejected as `timeout`.
        memory_mb: address space of the decoding process; more is rejected as `oom`.
    """

    timeout_seconds: float = 120.0
    memory_mb: int = 8192


@dataclass(frozen=True)
class Decoded:
    """Sound as it was delivered.

    Attributes:
        pcm: [C, N] float32, full scale = 1, not clamped.
        sample_rate_hz: of the source.
        codec: name of the source's codec, such as `mp3`.
        declared_seconds: length that the container states; None when it states none.
        end_seconds: time stamp at which the last decoded sound ends.
        bad_packets: packets that could not be decoded.
        packets: all packets of the stream.
        cut: why the container itself looks cut off; empty when it does not.
    """

    pcm: np.ndarray
    sample_rate_hz: int
    codec: str
    declared_seconds: float | None
    end_seconds: float
    bad_packets: int
    packets: int
    cut: str

    @property
    def seconds(self) -> float:
        """Length of the decoded sound."""
        return self.pcm.shape[1] / self.sample_rate_hz


def pcm_sha256(decoded: Decoded) -> str:
    """Hash of the decoded sound: equal for equal samples in any lossless container."""
    digest = hashlib.sha256(f"{decoded.sample_rate_hz}:{decoded.pcm.shape[0]}:".encode())
    digest.update(np.ascontiguousarray(decoded.pcm).data)
    return digest.hexdigest()


def verify(decoded: Decoded, limits: CheckConfig) -> None:
    """Compare what came out with what the file declares. Raises `DecodeError`: truncated, decode, duration_mismatch."""
    declared, seconds = decoded.declared_seconds, decoded.seconds
    if decoded.cut:
        raise DecodeError("truncated", f"{decoded.cut}; {seconds:.1f} s could be decoded")
    least = min(declared or 0.0, limits.max_seconds) * 0.999 - 0.1
    if declared is not None and seconds < least <= decoded.end_seconds:
        raise DecodeError("decode", f"{declared:.1f} s long, but {declared - seconds:.1f} s in it are damaged")
    if seconds < least:
        raise DecodeError("truncated", f"the file declares {declared:.1f} s, {seconds:.1f} s could be decoded")
    if decoded.bad_packets > limits.max_bad_packets * decoded.packets:
        raise DecodeError("decode", f"{decoded.bad_packets} of {decoded.packets} packets are damaged")
    if declared is not None and seconds > declared * 1.05 + 1.0:
        raise DecodeError("duration_mismatch", f"the file declares {declared:.1f} s but holds {seconds:.1f} s")


def to_channels(pcm: np.ndarray, channels: int) -> np.ndarray:
    """pcm [C, N] as [1, N] (mean of the channels) or [2, N] (stereo kept, anything else its mean twice)."""
    if channels == pcm.shape[0]:
        return pcm
    if channels not in (1, 2):
        raise ValueError(f"channels must be 1 or 2, got {channels}")
    return np.repeat(pcm.mean(0, keepdims=True, dtype=np.float32), channels, axis=0)


def resample(pcm: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """pcm [C, N] at another rate, soxr HQ (stop-band -140 dB). The number of samples is round(N · to / from)."""
    if from_hz == to_hz:
        return np.ascontiguousarray(pcm, dtype=np.float32)
    import soxr

    out = soxr.resample(np.ascontiguousarray(pcm.T, dtype=np.float32), from_hz, to_hz, quality="HQ")
    return np.ascontiguousarray(out.reshape(-1, pcm.shape[0]).T)


def prepare(pcm: np.ndarray, sample_rate_hz: int, to_hz: int, channels: int) -> np.ndarray:
    """Source sound [C, N] as the codec takes it: [channels, N'] float32 at `to_hz`. Levels are left as they are."""
    return resample(to_channels(pcm, channels), sample_rate_hz, to_hz)


# --- the parent's side ------------------------------------------------------------------------------------------


class Decoder:
    """A decoding child process that is kept between files and replaced after a crash or a timeout."""

    def __init__(self, limits: DecodeConfig, max_seconds: float, command: list[str] | None = None) -> None:
        """`command` starts the child; the default runs this file."""
        self.limits = limits
        self.max_seconds = max_seconds
        self._command = command or [sys.executable, "-m", "pipelines.audio", str(limits.memory_mb)]
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child; None before the first file."""
        return self._child.pid if self._child else None

    def decode(self, data: bytes) -> Decoded:
        """Decode one file held in memory.

        A file on which the child ends is given to a second, fresh child before it is called a `crash`, so that no
        file pays for what another one left behind.

        Raises:
            DecodeError: with a reject code; after `crash` and `timeout` the next call starts a new child.
        """
        try:
            return self._ask(data)
        except DecodeError as error:
            if error.code != "crash":
                raise
            return self._ask(data)

    def _ask(self, data: bytes) -> Decoded:
        child = self._start()
        assert child.stdin is not None and child.stdout is not None
        deadline = time.monotonic() + self.limits.timeout_seconds + _GRACE_SECONDS
        try:
            child.stdin.write(_REQUEST.pack(len(data), self.limits.timeout_seconds, self.max_seconds))
            child.stdin.write(data)
            child.stdin.flush()
            header_size, pcm_size = _ANSWER.unpack(_read_until(child.stdout, _ANSWER.size, deadline))
            header = json.loads(bytes(_read_until(child.stdout, header_size, deadline)))
            pcm = np.frombuffer(_read_until(child.stdout, pcm_size, deadline), dtype=np.float32)
        except (EOFError, BrokenPipeError, TimeoutError) as error:
            raise self._lost(error) from None
        if "code" in header:
            raise DecodeError(header["code"], header["message"])
        return Decoded(pcm=pcm.reshape(header.pop("channels"), -1), **header)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).resolve().parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        return self._child

    def _lost(self, error: Exception) -> DecodeError:
        assert self._child is not None
        if isinstance(error, TimeoutError):
            self._child.kill()
        with contextlib.suppress(BrokenPipeError):
            self._child.communicate()
        status = self._child.returncode
        self._child = None
        if isinstance(error, TimeoutError) or status == -signal.SIGALRM:
            return DecodeError("timeout", f"decoding took longer than {self.limits.timeout_seconds:g} s")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return DecodeError("crash", f"the decoder ended with {how} on this file")


def _read_until(stream: Any, size: int, deadline: float) -> bytearray:
    """Exactly `size` bytes from a pipe. Raises `EOFError` or `TimeoutError`."""
    data = bytearray(size)
    view, got, handle = memoryview(data), 0, stream.fileno()
    while got < size:
        if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        count = os.readv(handle, [view[got : got + (1 << 20)]])
        if count == 0:
            raise EOFError
        got += count
    return data


# --- the child's side -------------------------------------------------------------------------------------------


def decode_bytes(data: bytes, max_seconds: float) -> Decoded:
    """Decode in this process. Meant for the child; raises `DecodeError`.

    Decoding stops a little after `max_seconds`, which the length check then sees.
    """
    import av

    cut = container_cut(data)
    try:
        container = av.open(io.BytesIO(data), mode="r", options={"format_whitelist": AUDIO_CONTAINERS})
    except (av.error.FFmpegError, ValueError) as error:
        if cut:
            raise DecodeError("truncated", cut) from error
        raise DecodeError("not_audio", f"no audio container: {_words(error)}; begins with {data[:12]!r}") from error
    with container:
        if not container.streams.audio:
            kinds = ", ".join(sorted({str(s.type) for s in container.streams})) or "nothing"
            raise DecodeError("not_audio", f"{container.format.name} without an audio stream (holds {kinds})")
        stream = container.streams.audio[0]
        # mp3 without a Xing or VBRI header and raw AAC state no length; the demuxer's guess is not a declaration
        guessed = container.format.name == "aac" or (
            container.format.name == "mp3" and not _XING.search(data, 0, 1 << 20)
        )
        declared = None if guessed else _declared_seconds(container, stream)
        blocks, rate, end, packets, bad = _packets(container, stream, max_seconds)
        codec = stream.codec_context.name
    if not blocks:
        if cut:
            raise DecodeError("truncated", cut)
        raise DecodeError("not_audio", f"no sound could be decoded ({codec}, {bad} of {packets} packets damaged)")
    return Decoded(np.concatenate(blocks, axis=1), rate, codec, declared, end, bad, packets, cut)


def _packets(container: Any, stream: Any, max_seconds: float) -> tuple[list[np.ndarray], int, float, int, int]:
    """Every packet decoded by itself: blocks [C, n], sample rate, end in seconds, packets, packets that failed."""
    import av

    blocks: list[np.ndarray] = []
    first: tuple[int, int, str] | None = None
    samples = packets = bad = 0
    end = 0.0
    start = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    demuxer = container.demux(stream)
    while True:
        try:
            packet = next(demuxer)
        except StopIteration:
            break
        except av.error.FFmpegError:
            bad, packets = bad + 1, packets + 1
            break
        packets += 1
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, ValueError):
            bad += 1
            continue
        for frame in frames:
            layout = (frame.sample_rate, frame.layout.nb_channels, frame.format.name)
            first = first or layout
            if layout != first or layout[1] > _MAX_CHANNELS or frame.samples == 0:
                bad += frame.samples > 0
                continue
            blocks.append(_as_float(frame.to_ndarray(), layout[1], frame.format.is_planar))
            samples += frame.samples
            if frame.pts is not None and frame.time_base:
                end = float(frame.pts * frame.time_base) - start + frame.samples / frame.sample_rate
        if first and samples > (max_seconds + 1.0) * first[0]:
            break
    rate = first[0] if first else 1
    return blocks, rate, max(end, samples / rate), packets, bad


def _as_float(block: np.ndarray, channels: int, planar: bool) -> np.ndarray:
    """A decoded block of any sample format as [C, n] float32."""
    if not planar:
        block = block.reshape(-1, channels).T
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128.0) / 128.0
    if np.issubdtype(block.dtype, np.integer):
        scale = float(np.iinfo(block.dtype).max) + 1.0
        return (block.astype(np.float64) / scale).astype(np.float32) if scale > 2**24 else block / np.float32(scale)
    return block.astype(np.float32)


def _declared_seconds(container: Any, stream: Any) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / 1e6
    else:
        return None
    return seconds if 0 < seconds < 1e7 else None


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def container_cut(data: bytes) -> str:
    """Why a file looks cut off, judged from the container's own structure; empty when it looks whole.

    Knows RIFF/WAVE (size of the data chunk), ISO media such as m4a (a box that reaches beyond the end, no moov box),
    Ogg (an incomplete last page, or one that does not end the stream), and raw mp3 and AAC (an incomplete last frame).
    FLAC, Matroska and mp3 with a Xing header state a duration besides, which `verify` compares.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _cut_wave(data)
    if data[4:8] == b"ftyp":
        return _cut_boxes(data)
    if data[:4] == b"OggS":
        at = data.rfind(b"OggS")
        table = data[at + 27 : at + 27 + data[at + 26]] if at + 27 <= len(data) else b""
        if at + 27 > len(data) or len(table) < data[at + 26] or len(data) < at + 27 + len(table) + sum(table):
            return "the last Ogg page is incomplete"
        return "" if data[at + 5] & 4 else "the Ogg stream has no end page"
    return _cut_frames(data)


# A data chunk of 0, or of so many bytes that are not there, is of a program that could not seek back to write its size:
# FFmpeg leaves 0xFFFFFFFF or 0, SoX 0x7FFFF000, others about 0x7FFFFFFF.
_STREAMED = 0x7FFF0000


def _cut_wave(data: bytes) -> str:
    at = 12
    while at + 8 <= len(data):
        size = struct.unpack_from("<I", data, at + 4)[0]
        if data[at : at + 4] == b"data":
            missing = at + 8 + size - len(data)
            streamed = size == 0 or size >= _STREAMED
            return f"{missing} bytes of the data chunk are missing" if missing > 1 and not streamed else ""
        at += 8 + size + (size & 1)
    return "the wave file ends before its data chunk"


_MP3_KBIT = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2
    0: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2.5
}
_MP3_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _frame_bytes(data: bytes, at: int) -> int:
    """Length of the layer III or ADTS frame that begins at `at`; 0 when none does."""
    head = data[at : at + 7]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    if head[1] & 0xF6 == 0xF0:  # ADTS: layer bits are zero
        return ((head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5) if len(head) >= 6 else 0
    version, layer, rate, hz = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    if layer != 1 or version == 1 or rate in (0, 15) or hz == 3:
        return 0
    return (144 if version == 3 else 72) * _MP3_KBIT[version][rate] * 1000 // _MP3_HZ[version][hz] + (head[2] >> 1 & 1)


def _cut_frames(data: bytes) -> str:
    """The walk from frame to frame ends exactly at the end of a whole mp3 or AAC file, or at a tag."""
    at = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        at = 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9])
    count = 0
    while size := _frame_bytes(data, at):
        at, count = at + size, count + 1
    if count >= 3 and at > len(data):
        return f"{at - len(data)} bytes of the last frame are missing"
    return ""


def _cut_boxes(data: bytes) -> str:
    at, seen = 0, set()
    while at + 8 <= len(data):
        size = struct.unpack_from(">I", data, at)[0]
        kind = data[at + 4 : at + 8]
        if size == 1 and at + 16 <= len(data):
            size = struct.unpack_from(">Q", data, at + 8)[0]
        elif size == 0:  # to the end of the file
            size = len(data) - at
        if size < 8:
            return f"box {kind!r} has the impossible size {size}"
        if at + size > len(data):
            return f"{at + size - len(data)} bytes of the {kind.decode('latin1')} box are missing"
        seen.add(kind)
        at += size
    return "" if seen & {b"moov", b"moof"} else "the moov box is missing"


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The child's loop: one request, one answer, until the parent closes the pipe."""
    import av

    av.logging.set_level(av.logging.PANIC)
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        size, timeout_seconds, max_seconds = _REQUEST.unpack(head)
        # The default action of the alarm ends the process, also inside native code and when the parent is gone.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        data = requests.read(size)
        pcm = np.zeros((1, 0), np.float32)
        try:
            decoded = decode_bytes(data, max_seconds)
            pcm = decoded.pcm
            header: dict[str, Any] = {k: v for k, v in decoded.__dict__.items() if k != "pcm"}
            header["channels"] = pcm.shape[0]
        except DecodeError as error:
            header = {"code": error.code, "message": error.message}
        except MemoryError:
            header = {"code": "oom", "message": "decoding needs more memory than allowed"}
        del data
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = json.dumps(header).encode()
        answers.write(_ANSWER.pack(len(text), pcm.nbytes))
        answers.write(text)
        answers.write(pcm.tobytes())
        answers.flush()


if __name__ == "__main__":
    import resource

    _limit = int(sys.argv[1]) * 2**20
    with contextlib.suppress(ValueError, OSError):  # some systems know no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_limit, _limit))
    _serve(sys.stdin.buffer, sys.stdout.buffer)
