"""From a score to sound: a MIDI file, FluidSynth with FluidR3_GM, levels and a fade, then samples.

FluidSynth (the command-line program) runs single-threaded and writes floating point, so nothing clips
and two runs give the same bytes. The result is cut to the score's exact length, its last 0.7 s fade,
and its peak is set to a level between −6 and −1.5 dBFS that the caller names. `render_stems` does the same to
drums, bass, melody and accompaniment apart, which add up to the piece.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import soundfile

from pipelines.demo.arranger import LEAD_IN, Score, Voice

TICKS = 480
MAX_OFFSET = 0.012
"""Mean level, as a share of the peak, from which on a piece is freed of it: some pad samples lie off zero."""
SOUNDFONTS = ("FluidR3_GM.sf2", "/usr/share/sounds/sf2/FluidR3_GM.sf2", "/usr/share/soundfonts/FluidR3_GM.sf2")


def soundfont() -> Path | None:
    """FluidR3_GM.sf2: from the environment variable MUSICGEN_SOUNDFONT, else where Linux packages put it."""
    for name in (os.environ.get("MUSICGEN_SOUNDFONT", ""), *SOUNDFONTS):
        if name and Path(name).is_file():
            return Path(name)
    return None


def available() -> bool:
    """Whether this machine has FluidSynth and the soundfont."""
    return shutil.which("fluidsynth") is not None and soundfont() is not None


def _varint(value: int) -> bytes:
    """A MIDI variable-length number."""
    out = [value & 127]
    while value := value >> 7:
        out.append(value & 127 | 128)
    return bytes(reversed(out))


def midi_bytes(score: Score) -> bytes:
    """The score as a format-1 MIDI file, 480 ticks a quarter, one track a voice."""
    offset = LEAD_IN * score.quarter_bpm / 60.0
    micros = round(60e6 / score.quarter_bpm)
    num, den = score.meter
    end = round(score.seconds * score.quarter_bpm / 60.0 * TICKS)
    head = [
        (0, b"\xff\x51\x03" + micros.to_bytes(3, "big")),
        (0, b"\xff\x58\x04" + bytes((num, den.bit_length() - 1, 24, 8))),
    ]
    tracks = [_track(head, end)]
    channels = iter([c for c in range(16) if c != 9])
    for voice in score.voices:
        channel = 9 if voice.drum else next(channels)
        events: list[tuple[int, bytes]] = [
            (0, bytes((0xB0 | channel, 7, 100))),
            (0, bytes((0xB0 | channel, 10, max(0, min(127, round(64 + 60 * voice.pan)))))),
            (0, bytes((0xB0 | channel, 91, round(110 * voice.reverb)))),
            (0, bytes((0xB0 | channel, 93, 0))),
            (0, bytes((0xC0 | channel, voice.program))),
        ]
        spans: dict[int, list[tuple[int, int, int]]] = {}
        for event in voice.events:
            start = round((event.start + offset) * TICKS)
            stop = max(start + 12, round((event.start + event.dur + offset) * TICKS))
            spans.setdefault(event.pitch, []).append((start, stop, event.velocity))
        for pitch, rows in spans.items():
            rows.sort()
            for index, (start, stop, velocity) in enumerate(rows):
                if index + 1 < len(rows):
                    if rows[index + 1][0] <= start:
                        continue
                    stop = min(stop, rows[index + 1][0] - 1)
                events.append((start, bytes((0x90 | channel, pitch, velocity))))
                events.append((max(stop, start + 1), bytes((0x80 | channel, pitch, 0))))
        tracks.append(_track(events, end))
    return b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), TICKS) + b"".join(tracks)


def _track(events: list[tuple[int, bytes]], end: int) -> bytes:
    """One MIDI track from (tick, message) pairs; note-offs go before note-ons of the same tick."""
    order = sorted(enumerate(events), key=lambda row: (row[1][0], (row[1][1][0] & 0xF0) == 0x90, row[0]))
    body, now = b"", 0
    parts = []
    for _, (tick, message) in order:
        parts.append(_varint(tick - now) + message)
        now = tick
    parts.append(_varint(max(0, end - now)) + b"\xff\x2f\x00")
    body = b"".join(parts)
    return b"MTrk" + struct.pack(">I", len(body)) + body


def high_pass(samples: np.ndarray, rate: int, corner: float = 20.0) -> np.ndarray:
    """Samples [frames, 2] without what lies below ``corner`` Hz (second order, no phase shift)."""
    spectrum = np.fft.rfft(samples, axis=0)
    square = (np.arange(len(spectrum)) * rate / len(samples) / corner) ** 2
    spectrum *= (square / (1.0 + square))[:, None]
    return np.fft.irfft(spectrum, len(samples), axis=0).astype(np.float32)


def render(score: Score, rate: int = 32000, peak_db: float = -1.5) -> np.ndarray:
    """Samples float32 [frames, 2] of the score at ``rate`` Hz, peak at ``peak_db`` dBFS."""
    return _finished([_played(score, rate)], rate, peak_db)[0]


def render_stems(score: Score, rate: int = 32000, peak_db: float = -1.5) -> dict[str, np.ndarray]:
    """The score by parts, each float32 [frames, 2]: drums, bass, melody, accompaniment, as far as it has them.

    Their sum is the piece as `render` makes it, as far as the synthesiser adds its voices.
    """
    parts: dict[str, list[Voice]] = {}
    for voice in score.voices:
        parts.setdefault(part_of(voice), []).append(voice)
    sounds = [_played(replace(score, voices=voices), rate) for voices in parts.values()]
    return dict(zip(parts, _finished(sounds, rate, peak_db)))


def part_of(voice: Voice) -> str:
    """The stem that a voice belongs to; a bass is what mostly plays below C3 without having the melody."""
    if voice.drum or voice.lead:
        return "drums" if voice.drum else "melody"
    return "bass" if voice.events and median(event.pitch for event in voice.events) < 48 else "accompaniment"


def _played(score: Score, rate: int) -> np.ndarray:
    """What FluidSynth makes of a score, float32 [frames, 2] of the score's length."""
    font = soundfont()
    if font is None or shutil.which("fluidsynth") is None:
        raise FileNotFoundError(
            "rendering needs the program fluidsynth and FluidR3_GM.sf2: install the packages "
            "fluidsynth and fluid-soundfont-gm, or set MUSICGEN_SOUNDFONT to the file"
        )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.mid"), Path(folder, "a.wav")
        source.write_bytes(midi_bytes(score))
        settings = {
            "cpu-cores": "1", "reverb.room-size": "0.5", "reverb.level": "0.5", "reverb.damp": "0.3",
            "reverb.width": "0.8", "polyphony": "200", "dynamic-sample-loading": "1",
        }  # fmt: skip
        command = ["fluidsynth", "-ni", "-q", "-r", str(rate), "-g", "0.5", "-C", "0", "-R", "1"]
        for name, value in settings.items():
            command += ["-o", f"synth.{name}={value}"]
        command += ["-O", "float", "-T", "wav", "-F", str(target), str(font), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not target.is_file():
            raise RuntimeError(f"fluidsynth ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        samples = soundfile.read(target, dtype="float32", always_2d=True)[0]
    out = np.zeros((round(score.seconds * rate), 2), np.float32)
    count = min(len(out), len(samples))
    out[:count] = samples[:count]
    return out


def _finished(parts: list[np.ndarray], rate: int, peak_db: float) -> list[np.ndarray]:
    """Parts [frames, 2] of one piece without offset, faded out, all at the level at which their sum has the peak."""
    out = []
    whole = parts[0] if len(parts) == 1 else np.sum(parts, axis=0)
    offset = np.abs(whole.mean(0)).max() > MAX_OFFSET * np.abs(whole).max()
    fade = round(0.7 * rate)
    for part in parts:
        sound = high_pass(part, rate) if offset else part
        sound[-fade:] *= (np.cos(np.linspace(0, np.pi, fade, dtype=np.float32)) * 0.5 + 0.5)[:, None]
        out.append(sound)
    peak = float(np.abs(out[0] if len(out) == 1 else np.sum(out, axis=0)).max())
    if peak < 1e-4:
        raise RuntimeError("the rendered piece is silent: the soundfont may lack these instruments")
    return [sound * np.float32(10 ** (peak_db / 20) / peak) for sound in out]
