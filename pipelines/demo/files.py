"""Audio files of the demo catalogue: lossless and lossy, same bytes every time, written in one step.

MP3, Opus and M4A go through PyAV with fixed settings and bit-exact flags, so no date, no random number and
no program version gets into a file. WAV, FLAC (16 bit) and Ogg Vorbis are written by libsndfile (PyAV's
builds have no Vorbis encoder); the random serial number of its Ogg stream is then set to a fixed one.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

#: suffix -> (container, encoder, sample format, bit rate in bit/s)
CODECS: dict[str, tuple[str, str, str, int]] = {
    ".mp3": ("mp3", "libmp3lame", "s16p", 48000),
    ".opus": ("ogg", "libopus", "s16", 35000),
    ".m4a": ("ipod", "aac", "fltp", 46000),
}


#: Vorbis: libsndfile's compression level, 0 the best sound, 1 the smallest file
VORBIS_LEVEL = 1.0


def pcm16(samples: np.ndarray) -> np.ndarray:
    """Float samples in [−1, 1] as int16, rounded."""
    return np.clip(np.rint(samples * 32767.0), -32768, 32767).astype(np.int16)


def write_lossless(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write float [frames, 2] as 16-bit WAV or FLAC (by suffix) through a temporary name."""
    temporary = path.with_name(path.name + ".part")
    soundfile.write(temporary, pcm16(samples), rate, format=path.suffix[1:].upper(), subtype="PCM_16")
    temporary.replace(path)


def write_vorbis(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write float [frames, 2] as Ogg Vorbis with a fixed stream number."""
    temporary = path.with_name(path.name + ".part")
    with soundfile.SoundFile(
        temporary, "w", rate, 2, format="OGG", subtype="VORBIS", compression_level=VORBIS_LEVEL
    ) as file:
        for start in range(0, len(samples), 8192):  # libsndfile's Vorbis encoder wants small blocks
            file.write(samples[start : start + 8192])
    temporary.write_bytes(with_serial(temporary.read_bytes(), 1))
    temporary.replace(path)


def with_serial(data: bytes, serial: int) -> bytes:
    """An Ogg file with the stream number of every page replaced and the pages' checksums made right."""
    out, at = bytearray(data), 0
    while at < len(out):
        if out[at : at + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {at}: the file is not Ogg")
        count = out[at + 26]
        end = at + 27 + count + sum(out[at + 27 : at + 27 + count])
        out[at + 14 : at + 18] = serial.to_bytes(4, "little")
        out[at + 22 : at + 26] = bytes(4)
        out[at + 22 : at + 26] = _ogg_crc(out[at:end]).to_bytes(4, "little")
        at = end
    return bytes(out)


def _crc_table() -> list[int]:
    """The byte table of Ogg's checksum: polynomial 0x04c11db7, not reflected."""
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


_CRC = _crc_table()


def _ogg_crc(page: bytes | bytearray) -> int:
    """Checksum of one Ogg page whose own checksum field is zero."""
    value = 0
    for byte in page:
        value = (value << 8 & 0xFFFFFFFF) ^ _CRC[value >> 24 ^ byte]
    return value


def encode(path: Path, samples: np.ndarray, rate: int, bit_rate: int = 0) -> None:
    """Write float [frames, 2] with the lossy codec of the suffix; ``bit_rate`` 0 takes the table's."""
    if path.suffix not in CODECS:
        raise ValueError(f"no encoder for {path.suffix!r}; allowed: .wav, .flac, .ogg, {', '.join(CODECS)}")
    container_name, codec, sample_format, usual = CODECS[path.suffix]
    temporary = path.with_name(path.name + ".part")
    with av.open(str(temporary), "w", format=container_name, options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout="stereo", format=sample_format)
        stream.bit_rate = bit_rate or usual
        stream.time_base = Fraction(1, rate)
        stream.codec_context.options = {"flags": "+bitexact"}
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        data = pcm16(samples)
        for start in range(0, len(data), size):
            block = data[start : start + size]
            container.mux(stream.encode(_frame(block, sample_format, rate, start)))
        container.mux(stream.encode(None))
    temporary.replace(path)


def _frame(block: np.ndarray, sample_format: str, rate: int, start: int) -> av.AudioFrame:
    """int16 [n, 2] as an audio frame in ``sample_format`` with its time stamp."""
    if sample_format == "s16":
        array = block.reshape(1, -1)
    elif sample_format == "s16p":
        array = block.T
    else:
        array = (block.T / np.float32(32768.0)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(array), format=sample_format, layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
    return frame


def write(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write float [frames, 2] in the format of the suffix."""
    if path.suffix in (".wav", ".flac"):
        write_lossless(path, samples, rate)
    elif path.suffix == ".ogg":
        write_vorbis(path, samples, rate)
    else:
        encode(path, samples, rate)


def decoded(path: Path) -> tuple[np.ndarray, int]:
    """All samples of a file as float32 [frames, channels], and its rate."""
    with av.open(str(path)) as container:
        parts = []
        rate = container.streams.audio[0].rate
        for frame in container.decode(audio=0):
            array = frame.to_ndarray()
            if not frame.format.is_planar:
                array = array.reshape(-1, frame.layout.nb_channels).T
            if array.dtype.kind == "i":
                array = array / float(2 ** (8 * array.dtype.itemsize - 1))
            parts.append(array.astype(np.float32))
    return np.concatenate(parts, axis=1).T, rate
