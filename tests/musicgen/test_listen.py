"""What a user hands in: any audio file is read, anything else refused in words."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from musicgen import codec as codecs
from musicgen import listen, stems
from musicgen.errors import UserError

CATALOGUE = codecs.DEMO_FOLDER.parent / "catalogue" / "audio"


@pytest.mark.parametrize(
    "name", ["demo-0001.opus", "demo-0002.m4a", "demo-0004.ogg", "demo-0006.mp3", "demo-0033.flac"]
)
def test_formats(name: str) -> None:
    sound = listen.read(str(CATALOGUE / name), 32_000, 1, what="MELODY", max_seconds=2.0)
    assert sound.shape == (1, 64_000) and sound.dtype == np.float32
    assert 0.01 < np.abs(sound).max() < 1.5


@pytest.mark.parametrize(
    ("suffix", "coder"),
    [("avi", "pcm_s16le"), ("flv", "mp3"), ("ts", "mp2"), ("mpg", "mp2"), ("voc", "pcm_s16le")],
)
def test_containers_of_films_and_old_cards(suffix: str, coder: str, tmp_path: Path) -> None:
    """Whatever holds one stream of sound will do."""
    import av

    path = tmp_path / f"tone.{suffix}"
    with av.open(str(path), "w", format={"ts": "mpegts"}.get(suffix)) as container:
        stream: Any = container.add_stream(coder, rate=44_100)
        t = np.arange(2 * 44_100) / 44_100
        data = (16_000 * np.sin(2 * np.pi * 440 * t)).astype(np.int16)
        for start in range(0, len(data), 1024):
            block = np.ascontiguousarray(data[None, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate = 44_100
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sound = listen.read(str(path), 32_000, 1, what="MELODY", max_seconds=1.0)[0]
    assert np.argmax(np.abs(np.fft.rfft(sound[:32_000]))) == 440


def test_rate_and_channels(tmp_path: Path) -> None:
    t = np.arange(22_050) / 22_050
    left, right = np.sin(2 * np.pi * 440 * t), np.zeros_like(t)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 22_050, subtype="FLOAT")
    mono = listen.read(str(tmp_path / "stereo.wav"), 32_000, 1, what="AUDIO")[0]
    assert len(mono) == 32_000
    assert np.argmax(np.abs(np.fft.rfft(mono))) == 440 and np.abs(mono).max() == pytest.approx(0.5, abs=0.02)
    assert listen.read(str(tmp_path / "stereo.wav"), 22_050, 2, what="AUDIO").shape == (2, 22_050)


def test_what_is_not_audio_is_refused_in_words(tmp_path: Path) -> None:
    text = tmp_path / "notes.mp3"
    text.write_text("do re mi\n" * 200)
    with pytest.raises(UserError, match=r"MELODY='.*notes.mp3' is not audio that can be read .*give an audio file"):
        listen.read(str(text), 32_000, 1, what="MELODY")
    with pytest.raises(UserError, match=r"AUDIO='.*gone.wav' does not exist; give an audio file"):
        listen.read(str(tmp_path / "gone.wav"), 32_000, 1, what="AUDIO")
    with pytest.raises(UserError, match="cannot be read"):
        listen.read(str(tmp_path), 32_000, 1, what="AUDIO")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 32_000)
    with pytest.raises(UserError, match="no sound"):
        listen.read(str(tmp_path / "empty.wav"), 32_000, 1, what="AUDIO")
    soundfile.write(tmp_path / "nan.wav", np.full(32_000, np.nan), 32_000, subtype="FLOAT")
    with pytest.raises(UserError, match="not finite"):
        listen.read(str(tmp_path / "nan.wav"), 32_000, 1, what="AUDIO")


def test_playlists_open_nothing(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "secret.wav", np.zeros(32_000), 32_000)
    for name, text in (
        ("list.ffconcat", f"ffconcat version 1.0\nfile {tmp_path / 'secret.wav'}\n"),
        ("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path / 'secret.wav'}\n#EXT-X-ENDLIST\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="not audio"):
            listen.read(str(tmp_path / name), 32_000, 1, what="AUDIO")


def test_a_cut_file_gives_what_it_holds(tmp_path: Path) -> None:
    raw = (CATALOGUE / "demo-0006.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(raw[: len(raw) // 3])
    assert listen.read(str(tmp_path / "cut.mp3"), 32_000, 1, what="AUDIO").shape[1] > 32_000


@pytest.mark.parametrize("rate", [44_100, 32_000, 48_000])
@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_the_middle_of_a_file_is_that_of_the_whole(tmp_path: Path, rate: int, suffix: str) -> None:
    rng = np.random.default_rng(0)
    path = str(tmp_path / f"long.{suffix}")
    soundfile.write(path, 0.1 * rng.normal(size=(7 * rate + 1234, 2)), rate)
    whole = listen.read(path, 32_000, 1, what="STYLE")
    middle, seconds = listen.read_middle(path, 32_000, 1, what="STYLE", seconds=3.0)
    assert seconds == pytest.approx(7 + 1234 / rate) and middle.shape == (1, 96_000)
    start = (whole.shape[1] - 96_000) // 2
    assert np.abs(middle - whole[:, start : start + 96_000]).max() < 1e-4
    digest = hashlib.sha256()
    short, _ = listen.read_middle(path, 32_000, 1, what="STYLE", seconds=60.0, digest=digest)
    assert np.abs(short - whole).max() < 1e-4
    assert digest.hexdigest() == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_of_a_long_file_no_more_is_held_than_is_asked_for(tmp_path: Path) -> None:
    """Ten minutes on the disk; a second of it is a second in memory, the file's bytes included."""
    import tracemalloc

    path = str(tmp_path / "long.wav")
    soundfile.write(path, 0.1 * np.ones(600 * 32_000), 32_000, subtype="FLOAT")
    for read in (
        lambda: listen.read(path, 32_000, 1, what="MELODY", max_seconds=1.0),
        lambda: listen.read_middle(path, 32_000, 1, what="STYLE", seconds=1.0)[0],
    ):
        tracemalloc.start()
        assert read().shape[1] == 32_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * 2**20, peak


def test_many_channels_are_mixed_while_they_are_read(tmp_path: Path) -> None:
    import tracemalloc

    path = str(tmp_path / "wide.wav")
    soundfile.write(path, np.full((20 * 32_000, 8), 0.1), 32_000)
    tracemalloc.start()
    assert listen.read(path, 32_000, 1, what="MELODY").shape == (1, 640_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 640_000 * 4


def test_what_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_MAX_PIPE", 2**20)
    with pytest.raises(UserError, match=r"AUDIO='/dev/zero' is no file and does not end"):
        listen.read("/dev/zero", 32_000, 1, what="AUDIO")


def test_stems_are_told_by_the_words_of_their_names() -> None:
    left_out = (
        "drums/Drums 2/bass/ Bass guitar/synth-bass/KICK/percussion (live)/Hi-Hat/HiHats/open hats/hihat/HH/cymbal"
    )
    left_out += "/Cymbals/crash cymbals/tom/Toms/tom-tom/perc/Percs 2/808/808s/TR-808/Sub/SubBass/sub_bass/bassdrum"
    left_out += (
        "/bass drum/kickdrum/KickDrum/snareDrum/drumkit/Drum Kit/drum_loop/kicks/snares/basses/bassline/bass line"
    )
    left_out += "/bassguitar/E-Bass/double bass/contrabass/claps/Shaker/Bass2/Bass vocals + drums"
    for name in left_out.split("/"):
        assert not stems.has_melody(name), name
    melody = "vocals/bassoon/Bassoons/other/lead/strings/Gitarre/ベル/Bass clarinet/Voice bass/bass voice/Bass-Clarinet"
    melody += "/BassVox/bass trombone/basset horn/brass/chat/custom/phantom/subtle pad/rhodes/trim/piano 8/"
    for name in melody.split("/"):
        assert stems.has_melody(name), name


def test_a_part_is_like_its_recording_and_another_is_not() -> None:
    rng = np.random.default_rng(0)
    voice, band, other = rng.normal(size=(3, 40 * 8000)).astype(np.float32)
    mix = 0.3 * voice + band
    late = np.concatenate([np.zeros(400, np.float32), voice])[: len(voice)]
    assert stems.likeness(mix, mix, 8000, 0.25) == pytest.approx(1)
    assert stems.likeness(mix, late, 8000, 0.25) == pytest.approx(0.3 / np.sqrt(1.09), abs=0.02)
    assert stems.likeness(mix, late, 8000, 0.01) < 0.05 and stems.likeness(mix, other, 8000, 0.25) < 0.05
    assert stems.likeness(mix, np.zeros_like(mix), 8000, 0.25) == 1 == stems.likeness(mix[:0], mix[:0], 8000, 0.25)


def test_stems_need_demucs_and_say_so() -> None:
    try:
        import demucs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"melody_stems needs the package demucs.*leave --melody_stems out"):
            stems.melody(np.zeros((2, 44_100), np.float32), 32_000)
    else:
        from demucs.htdemucs import HTDemucs

        small = HTDemucs(["drums", "bass", "other", "vocals"], channels=16, t_layers=1).eval()
        sound = np.random.default_rng(0).normal(size=(2, 44_100)).astype(np.float32)
        mono = stems.melody(sound, 32_000, small)
        assert mono.shape == (32_000,) and np.array_equal(mono, stems.melody(sound, 32_000, small))
