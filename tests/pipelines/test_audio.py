"""Decoding in a child, damage, resampling, and the checks of sound."""

from __future__ import annotations

import io
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator

import av
import numpy as np
import pytest

from pipelines import audio, checks
from pipelines.checks import CheckConfig
from tests.pipelines.conftest import tone, wav

RATE = 44_100
LIMITS = CheckConfig(max_seconds=30.0)


def encoded(samples: np.ndarray, container: str, codec: str, rate: int = RATE, **options: str) -> bytes:
    """Samples [N, C] through PyAV's own encoders."""
    out = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(out, "w", format=container, options=options) as target:
        stream = target.add_stream(codec, rate=rate)
        stream.layout = layout
        planes = np.ascontiguousarray(samples.T)
        for at in range(0, planes.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes[:, at : at + 1024]), "fltp", layout)
            frame.sample_rate, frame.pts = RATE, at
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return out.getvalue()


def files() -> dict[str, bytes]:
    sound = tone(1, 3.0, RATE, 2) + np.random.default_rng(0).normal(size=(3 * RATE, 2)).astype(np.float32) * 0.02
    return {
        "wav": wav(sound, RATE),
        "wav24": wav(sound, RATE, subtype="PCM_24"),
        "wavfloat": wav(sound, RATE, subtype="FLOAT"),
        "flac": wav(sound, RATE, "FLAC"),
        "vorbis": wav(sound, RATE, "OGG", "VORBIS"),
        "mp3": encoded(sound, "mp3", "libmp3lame"),
        "mp3 without a header": encoded(sound, "mp3", "libmp3lame", write_xing="0"),
        "opus": encoded(sound, "ogg", "libopus", 48_000),
        "m4a": encoded(sound, "ipod", "aac"),
        "adts": encoded(sound, "adts", "aac"),
        "webm": encoded(sound, "webm", "libopus", 48_000),
    }


FILES = files()


@pytest.fixture(scope="module")
def decoder() -> Iterator[audio.Decoder]:
    child = audio.Decoder(audio.DecodeConfig(timeout_seconds=30), 60)
    yield child
    child.close()


@pytest.mark.parametrize("name", FILES)
def test_whole_files_decode_and_cut_files_are_caught(name: str, decoder: audio.Decoder) -> None:
    whole = decoder.decode(FILES[name])
    audio.verify(whole, LIMITS)
    assert whole.pcm.shape[0] == 2 and whole.pcm.dtype == np.float32
    assert abs(whole.seconds - 3.0) < 0.06
    assert 0.03 < float(np.sqrt((whole.pcm**2).mean())) < 0.3
    for share in (0.5, 0.8):
        with pytest.raises(audio.DecodeError) as caught:
            audio.verify(decoder.decode(FILES[name][: int(len(FILES[name]) * share)]), LIMITS)
        assert caught.value.code == "truncated"


@pytest.mark.parametrize("size", [0, 0x7FFF_0000, 0x7FFF_F000, 0x7FFF_FFFF - 36, 0x8000_0000, 0xFFFF_FFFF])
def test_a_wave_written_through_a_pipe_is_whole(size: int, decoder: audio.Decoder) -> None:
    whole = FILES["wav"]
    assert whole[36:40] == b"data"
    riff = min(size + 36, 0xFFFF_FFFF)
    piped = whole[:4] + struct.pack("<I", riff) + whole[8:40] + struct.pack("<I", size) + whole[44:]
    decoded = decoder.decode(piped)
    audio.verify(decoded, LIMITS)
    assert np.array_equal(decoded.pcm, decoder.decode(whole).pcm)
    with pytest.raises(audio.DecodeError, match="bytes of the data chunk are missing"):
        audio.verify(decoder.decode(whole[:40] + struct.pack("<I", 0x7FFE_FFFF) + whole[44:]), LIMITS)


def test_the_hash_sees_sound_and_not_the_container(decoder: audio.Decoder) -> None:
    hashes = {name: audio.pcm_sha256(decoder.decode(FILES[name])) for name in ("wav", "flac", "wav24", "mp3")}
    assert hashes["wav"] == hashes["flac"]
    assert len(set(hashes.values())) == 3


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>404</html>" * 50, b"text, no sound\n" * 90, np.random.default_rng(1).bytes(50_000),
     b"\xff\xd8\xff\xe0JFIF", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9\nfile:///etc/passwd\n"],
)  # fmt: skip
def test_what_is_not_audio(data: bytes, decoder: audio.Decoder) -> None:
    with pytest.raises(audio.DecodeError) as caught:
        decoder.decode(data)
    assert caught.value.code == "not_audio"


@pytest.mark.parametrize("name", ["vorbis", "opus", "adts", "flac"])
def test_a_hole_in_the_middle_is_damage_and_no_early_end(name: str, decoder: audio.Decoder) -> None:
    data = bytearray(FILES[name])
    hole = slice(len(data) * 4 // 10, len(data) * 5 // 10)
    data[hole] = np.random.default_rng(2).bytes(len(data[hole]))
    with pytest.raises(audio.DecodeError) as caught:
        audio.verify(decoder.decode(bytes(data)), LIMITS)
    assert caught.value.code == "decode"


def test_damage_never_ends_the_process(decoder: audio.Decoder) -> None:
    rng = np.random.default_rng(5)
    first = decoder.decode(FILES["wav"]) and decoder.pid
    for name in ("m4a", "adts", "mp3", "vorbis", "opus", "flac"):
        for _ in range(3):
            data = bytearray(FILES[name])
            for at in rng.integers(len(data) // 10, len(data), 60):
                data[at] ^= 1 << int(rng.integers(8))
            try:
                decoded = decoder.decode(bytes(data))
                audio.verify(decoded, LIMITS)
                checks.first(decoded.pcm, decoded.sample_rate_hz, LIMITS)
            except audio.DecodeError as error:
                assert error.code in ("decode", "truncated", "not_audio", "duration_mismatch")
    assert decoder.pid == first


def test_a_crash_costs_one_file_and_the_child_is_replaced(decoder: audio.Decoder) -> None:
    script = "import os,sys;sys.stdin.buffer.read(40);os.kill(os.getpid(),11)"
    crashing = audio.Decoder(audio.DecodeConfig(), 60, [sys.executable, "-c", script])
    with pytest.raises(audio.DecodeError, match="SIGSEGV") as caught:
        crashing.decode(b"x" * 1000)
    assert caught.value.code == "crash"

    decoder.decode(FILES["wav"])
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGSEGV)
    time.sleep(0.2)
    assert abs(decoder.decode(FILES["flac"]).seconds - 3.0) < 0.01  # the next file does not pay for it


def test_a_child_that_dies_while_it_works_is_asked_once_more(decoder: audio.Decoder) -> None:
    long = wav(np.zeros((40 * RATE, 2), np.float32), RATE)
    decoder.decode(FILES["wav"])
    killer = threading.Timer(0.01, os.kill, (decoder.pid, signal.SIGSEGV))
    killer.start()
    assert abs(decoder.decode(long).seconds - 40.0) < 0.01


def test_a_file_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = audio.Decoder(audio.DecodeConfig(timeout_seconds=0.0005), 60)  # the child's own alarm ends it
    with pytest.raises(audio.DecodeError) as caught:
        slow.decode(wav(np.zeros((55 * RATE, 2), np.float32), RATE))
    assert caught.value.code == "timeout"
    slow.close()

    monkeypatch.setattr(audio, "_GRACE_SECONDS", 0.1)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]  # not even the alarm works in this one
    hanging = audio.Decoder(audio.DecodeConfig(timeout_seconds=0.2), 60, command)
    with pytest.raises(audio.DecodeError) as caught:
        hanging.decode(b"x" * 1000)
    assert caught.value.code == "timeout" and hanging.pid is None


def test_resampling_keeps_pitch_level_and_length() -> None:
    t = np.arange(RATE * 2) / RATE
    sound = np.stack([0.5 * np.sin(2 * np.pi * 1000 * t), 0.5 * np.sin(2 * np.pi * 18_000 * t)]).astype(np.float32)
    out = audio.resample(sound, RATE, 32_000)
    assert out.shape == (2, 64_000) and out.dtype == np.float32
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(64_000) / 32_000)
    assert np.abs(out[0, 1000:-1000] - expected[1000:-1000]).max() < 1e-4
    assert np.abs(out[1, 1000:-1000]).max() < 1e-5  # what lies above the new band does not fold back
    mono = audio.prepare(sound, RATE, 32_000, 1)
    assert np.allclose(mono[0], out.mean(0), atol=1e-5)
    assert audio.prepare(mono, 32_000, 32_000, 2).shape == (2, 64_000)


def music(seconds: float = 4.0) -> np.ndarray:
    return tone(3, seconds, 16_000, 2).T.copy()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, None),
        (lambda x: x[:, :16_000], "too_short"),
        (lambda x: np.tile(x, 8), "too_long"),
        (lambda x: x * 0, "silent"),
        (lambda x: x * np.r_[np.ones(6000), np.zeros(x.shape[1] - 6000)], "silent"),
        (lambda x: x * np.r_[np.ones(40_000), np.zeros(x.shape[1] - 40_000)], None),
        (lambda x: np.clip(x * 30, -1, 1), "clipped"),
        (lambda x: x * 4.9, None),
        (lambda x: x + 0.15, "dc"),
        (lambda x: x * np.array([[1], [-1]]), "phase"),
        (lambda x: x[:1], None),
        (lambda x: np.where(np.arange(x.shape[1]) == 9, np.nan, x), "decode"),
        (lambda x: np.where(np.arange(x.shape[1]) == 9, 56.0, x), "decode"),
    ],
)
def test_checks(change: object, expected: str | None) -> None:
    sound = np.asarray(change(music()), dtype=np.float32)  # type: ignore[operator]
    reject = checks.first(sound, 16_000, LIMITS)
    assert (reject.code if reject else None) == expected


def test_a_loud_float_file_is_told_from_a_clipped_one() -> None:
    clipped, loud = (checks.first(sound, 16_000, LIMITS) for sound in (np.clip(music() * 30, -1, 1), music() * 20))
    assert clipped is not None and clipped.message.endswith("sit at full scale")
    assert loud is not None and "or above it: peak" in loud.message and "a lower level would pass" in loud.message


def test_only_known_codes() -> None:
    with pytest.raises(ValueError, match="unknown reject code"):
        checks.Reject("check", "strange", "")
