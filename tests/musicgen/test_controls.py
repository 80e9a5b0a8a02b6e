"""Everything that a clip can be asked for beside text, through the code that users call: melody, attributes, scales,
an audio prompt, a stream; another one changes the output, and what the model lacks is refused in words."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from musicgen import generate, wav
from musicgen.attributes import AttributeConfig
from musicgen.chroma import chroma_bins
from musicgen.errors import UserError
from musicgen.sampling import SamplingConfig
from tests.musicgen.small_model import MELODY, TEXT, write_release

# The column of the key as releases had it that never heard one; they go on being read.
NAMED = (AttributeConfig("genre", values=("jazz", "folk")), AttributeConfig("tempo"), AttributeConfig("key", "key"))


def tune(hz: float, seconds: float = 1.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(32_000 * seconds)) / 32_000)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases `melody`, `named` (attributes beside text) and `text`, and two tunes."""
    folder = tmp_path_factory.mktemp("models")
    condition = replace(TEXT.condition, attributes=NAMED)
    for name, config in (("melody", MELODY), ("named", replace(TEXT, condition=condition)), ("text", TEXT)):
        write_release(folder / name, config)
    soundfile.write(folder / "a.flac", tune(440.0), 32_000)
    soundfile.write(folder / "c.ogg", tune(261.6), 32_000)
    soundfile.write(folder / "short.wav", tune(440.0, 0.3), 32_000)
    soundfile.write(folder / "click.wav", tune(440.0, 0.000125), 32_000)
    soundfile.write(folder / "silent.wav", np.zeros(32_000), 32_000)
    return folder


def bins(*tunes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([chroma_bins(t) for t in tunes]))


def test_melody_changes_the_music(folder: Path) -> None:
    model = generate.load(folder / "melody" / "release")

    def made(melodies: torch.Tensor | None, prompt: str | None = "waltz", **sampling: object) -> torch.Tensor:
        config = SamplingConfig(**sampling)  # type: ignore[arg-type]
        return generate.generate(model, [prompt], 0.6, [1], config, melodies=melodies)[1]

    a, c = bins(tune(440.0)), bins(tune(261.6))
    outputs = [made(a), made(c), made(None), made(a, None), made(a, guidance=1.0), made(a, "samba")]
    for i, one in enumerate(outputs):
        assert torch.equal(one, outputs[i]) and all(not torch.equal(one, o) for o in outputs[i + 1 :]), i
    batch = generate.generate(
        model, ["waltz", "waltz", "waltz"], 0.6, [1, 1, 1], melodies=torch.cat([a, c, c * 0 + 255])
    )
    assert torch.equal(batch[1], torch.cat(outputs[:3])), "alone and in a batch, with another melody each or none"


def test_three_way_scales(folder: Path) -> None:
    model = generate.load(folder / "melody" / "release")

    def made(**sampling: float) -> torch.Tensor:
        config = SamplingConfig(**sampling)  # type: ignore[arg-type]
        return generate.generate(model, ["waltz"], 0.6, [1], config, melodies=bins(tune(440.0)))[1]

    two = made(guidance=3.0)
    assert torch.equal(made(guidance=3.0, guidance_melody=3.0), two), "equal scales are the two-way form"
    assert not torch.equal(made(guidance=3.0, guidance_melody=1.0), two)
    assert not torch.equal(made(guidance=1.0, guidance_melody=3.0), two)
    assert torch.equal(made(guidance=1.0, guidance_melody=1.0), made(guidance=1.0))


def test_a_long_clip_follows_the_melody_in_time(folder: Path) -> None:
    """The second window hears the melody from its own start on: a change there leaves the first window alone."""
    model = generate.load(folder / "melody" / "release")
    same = bins(np.concatenate([tune(440.0), tune(440.0, 2.0)]))
    turns = bins(np.concatenate([tune(440.0, 1.6), tune(261.6, 1.4)]))
    assert torch.equal(same[:, :8], turns[:, :8]) and not torch.equal(same, turns)
    a, b = (generate.generate(model, ["waltz"], 2.0, [1], melodies=m)[1] for m in (same, turns))
    assert torch.equal(a[..., :50], b[..., :50]) and not torch.equal(a, b)


def test_attributes_change_the_music_beside_the_text(folder: Path) -> None:
    model = generate.load(folder / "named" / "release")

    def made(prompt: str | None = "waltz", **values: object) -> torch.Tensor:
        return generate.generate(model, [prompt], 0.6, [1], attributes=[values])[1]

    outputs = [
        made(),
        made(genre="jazz"),
        made(genre="folk"),
        made(tempo=60),
        made(tempo=180),
        made(None, genre="jazz"),
    ]
    for i, one in enumerate(outputs):
        assert all(not torch.equal(one, o) for o in outputs[i + 1 :]), i
    batch = generate.generate(model, ["waltz"] * 2, 0.6, [1, 1], attributes=[{"genre": "jazz"}, {}])[1]
    assert torch.equal(batch, torch.cat([outputs[1], outputs[0]]))


def test_what_the_model_lacks_is_said(folder: Path) -> None:
    model = generate.load(folder / "text" / "release")
    with pytest.raises(UserError, match=r"MELODY was given, but this model has no melody input"):
        generate.generate(model, ["waltz"], 0.6, [1], melodies=bins(tune(440.0)))
    with pytest.raises(UserError, match="attribute 'genre' was given, but this model has none"):
        generate.generate(model, ["waltz"], 0.6, [1], attributes=[{"genre": "jazz"}])


@pytest.mark.parametrize(
    ("melodies", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.uint8), "1 prompts need 1 melodies, got 2"),
        (torch.zeros(5, dtype=torch.uint8), r"melodies is \[5\] torch.uint8; give whole numbers of shape \[B, C\]"),
        (
            torch.zeros(1, 0, dtype=torch.uint8),
            r"melodies is \[1, 0\], which holds nothing; leave it out, or give a frame",
        ),
        (
            torch.tensor([[3, 255, 40]], dtype=torch.uint8),
            r"melodies holds 40; a pitch class is 0 \(C\) to 11 \(B\), or 255",
        ),
        (torch.tensor([[3, -1]]), "melodies holds -1; a pitch class is 0"),
    ],
)
def test_melodies_that_are_none_are_refused(folder: Path, melodies: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate.generate(generate.load(folder / "melody" / "release"), ["waltz"], 0.6, [1], melodies=melodies)


def test_a_number_is_no_label(folder: Path) -> None:
    model = generate.load(folder / "named" / "release")
    for value in (5, 1.5, None):
        with pytest.raises(
            UserError, match=f"attribute 'genre' is {value}; give a label or several in a list. Known: jazz, folk"
        ):
            generate.generate(model, ["waltz"], 0.6, [1], attributes=[{"genre": value}])


def command(folder: Path, model: str, *arguments: str) -> int:
    common = ["--model", str(folder / model / "release"), "--duration", "0.6", "--prompt", "waltz"]
    return generate.main([*common, "--out", str(folder / "out.wav"), *arguments])


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def test_command_follows_a_melody_file(folder: Path) -> None:
    made = []
    for name in ("a.flac", "c.ogg"):
        assert command(folder, "melody", "--melody", str(folder / name)) == 0
        made.append(soundfile.read(folder / "out.wav")[0])
    assert not np.array_equal(*made)
    melody = wav.read_marking(folder / "out.wav")["melody"]
    heard = melody.pop("pitch_classes_sha256")
    assert melody == {"stems": False, "frames": 8, "file_sha256": sha256((folder / "c.ogg").read_bytes())}
    model = generate.load(folder / "melody" / "release")
    sound = generate.listen.read(str(folder / "c.ogg"), 32_000, 1, what="MELODY")[0]
    request = generate.Request(["waltz"], 0.6, [0], melodies=bins(sound))
    assert generate.marking(model, request)["melody"] == {"frames": 8, "pitch_classes_sha256": heard}


def test_the_marking_tells_clips_apart(folder: Path, tmp_path: Path) -> None:
    """Two clips of one prompt and seed that differ in anything else differ in their marking, by command as by call."""
    soundfile.write(tmp_path / "a.wav", tune(440.0), 32_000)
    soundfile.write(tmp_path / "c.wav", tune(261.6), 32_000)
    marks = []
    for more in (
        ["--prompt_audio", f"{tmp_path}/a.wav"],
        ["--prompt_audio", f"{tmp_path}/c.wav"],
        ["--extend_stride", "0.4"],
        ["--extend_stride", "0.5"],
        ["--extend_stride", "0.001"],
        [],
    ):
        command(folder, "text", "--duration", "1.4", *more)
        marks.append(wav.read_marking(folder / "out.wav"))
        assert str(tmp_path) not in repr(marks[-1])
    assert [m["extend_stride"] for m in marks[2:]] == [0.4, 0.5, 0.02, 0.6], "one frame at least"
    assert [m["prompt_audio"]["file_sha256"] for m in marks[:2]] == [
        sha256((tmp_path / name).read_bytes()) for name in ("a.wav", "c.wav")
    ]
    command(folder, "text", "--extend_stride", "0.4")
    assert "extend_stride" not in wav.read_marking(folder / "out.wav"), "a clip of one window has none"

    model = generate.load(folder / "melody" / "release")
    given = torch.zeros(2, 4, 5, dtype=torch.long)
    given[1] = 1
    request = generate.Request(
        ["waltz"] * 2, 1.4, [1, 1], given=given, melodies=torch.cat([bins(tune(440.0)), torch.full((1, 8), 255)])
    )
    first, second = (generate.marking(model, request, row) for row in (0, 1))
    assert first["prompt_audio"] == {"seconds": 0.1, "codes_sha256": sha256(np.zeros((4, 5), np.int64).tobytes())}
    assert first["prompt_audio"] != second["prompt_audio"] and "melody" in first and "melody" not in second
    assert json.dumps(first) and first["precision"] == "float32"
    seeds: Any = np.arange(1)
    request = generate.Request(["waltz"], np.float32(0.6), seeds, attributes=[{"tempo": np.float32(90)}])
    assert json.dumps(generate.marking(model, request)), "with numpy's numbers too"


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("melody", ["--melody", "{}/short.wav"], r"is 0.30 s long; a melody needs at least 0.51 s"),
        ("melody", ["--melody", "{}/silent.wav"], "is silent throughout"),
        ("melody", ["--melody", "{}/gone.wav"], "MELODY=.* does not exist"),
        ("text", ["--melody", "{}/a.flac"], "no melody input"),
        ("named", ["--attributes.gener", "jazz"], "unknown attribute 'gener'; did you mean 'genre'"),
        ("named", ["--attributes.genre", "jaz"], "did you mean 'jazz'"),
        ("text", ["--prompt_audio", "{}/a.flac"], "counts it in, so nothing is left to make"),
        (
            "text",
            ["--prompt_audio", "{}/a.flac", "--prompt_seconds", "0.000001"],
            "prompt_seconds is 1e-06; an audio prompt needs at least 0.02 s, one frame of the codec, and 0 takes all",
        ),
        (
            "text",
            ["--prompt_audio", "{}/click.wav"],
            "AUDIO=.* is 0.000125 s long; an audio prompt needs at least 0.02 s",
        ),
        ("named", ["--attributes.genre", "r&b: soul"], "attribute 'genre' has no value 'r&b: soul'"),
        ("text", ["--precision", "int4"], "int4"),
        ("text", ["--prompt", "waltz " * 600], "PROMPT has .* tokens"),
    ],
)
def test_command_refuses_in_words(folder: Path, model: str, arguments: list[str], message: str) -> None:
    from musicgen.settings import SettingsError

    with pytest.raises((UserError, SettingsError), match=message):
        command(folder, model, *(a.format(folder) if a.startswith("{}") else a for a in arguments))


def test_of_a_long_file_the_command_reads_what_the_clip_can_hear(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}
    real = generate.listen.read

    def watched(*arguments: Any, what: str, max_seconds: float, digest: Any) -> np.ndarray:
        asked[what] = max_seconds
        return real(*arguments, what=what, max_seconds=max_seconds, digest=digest)

    monkeypatch.setattr(generate.listen, "read", watched)
    assert command(folder, "melody", "--melody", str(folder / "a.flac")) == 0
    with pytest.raises(UserError, match=r"AUDIO='.*' is 0.6 s long or longer and DURATION=0.6 counts it in"):
        command(folder, "text", "--prompt_audio", str(folder / "a.flac"))
    # The clip, and the prefix of 8 frames of the window that begins at its end.
    assert asked["MELODY"] == pytest.approx(0.6 + 8 * 0.128 + 0.512) and asked["AUDIO"] == pytest.approx(0.6)


def test_command_sets_attributes_continues_and_streams(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "named", "--attributes.genre", "jazz", "--attributes.key", "Bbm") == 0
    assert command(folder, "named", "--attributes.genre", "jazz", "--attributes.tempo", "90") == 0
    whole = (folder / "out.wav").read_bytes()
    assert wav.read_marking(folder / "out.wav")["attributes"] == {"genre": "jazz", "tempo": "90"}
    arguments = ["--attributes.genre", "jazz", "--attributes.tempo", "90", "--stream", "true", "--chunk_seconds", "0.1"]
    assert command(folder, "named", *arguments) == 0
    assert "first sound after" in capsys.readouterr().out
    streamed, rate = soundfile.read(folder / "out.wav", dtype="int16")
    (folder / "whole.wav").write_bytes(whole)
    expected, _ = soundfile.read(folder / "whole.wav", dtype="int16")
    assert rate == 32_000 and np.abs(streamed.astype(int) - expected.astype(int)).max() <= 1
    assert wav.read_marking(folder / "out.wav") == wav.read_marking(folder / "whole.wav")
    assert command(folder, "text", "--prompt_audio", str(folder / "a.flac"), "--prompt_seconds", "0.3") == 0
    mark = wav.read_marking(folder / "out.wav")
    assert mark["prompt_audio"]["seconds"] == pytest.approx(0.3)
    assert "marking" not in mark["prompt_audio"]
    assert b"from 0.3 s on; what comes before was given to it" in (folder / "out.wav").read_bytes()
    shutil.move(folder / "out.wav", folder / "earlier.wav")
    onward = ["--prompt_audio", str(folder / "earlier.wav"), "--prompt_seconds", "0.4"]
    assert command(folder, "text", *onward) == 0
    assert wav.read_marking(folder / "out.wav")["prompt_audio"]["marking"] == mark
    assert b"from 0.4 s on; what comes before is marked as generated too" in (folder / "out.wav").read_bytes()


@pytest.mark.parametrize("told", [b"{", b"[1]", b"[" * 100_000, b"\xff\xfe", b'{"a": "%s"}' % (b"x" * 2**16)])
def test_a_marking_that_somebody_made_up_is_not_carried_on(told: bytes, tmp_path: Path) -> None:
    sound = wav.encode(np.zeros((1, 100)), 32_000, {})
    at = sound.index(b"mgen")
    length = int.from_bytes(sound[at + 4 : at + 8], "little")
    (tmp_path / "a.wav").write_bytes(
        sound[: at + 4] + len(told).to_bytes(4, "little") + told + sound[at + 8 + length :]
    )
    assert wav.marking_of(str(tmp_path / "a.wav")) is None and wav.marking_of(str(tmp_path / "none.wav")) is None
    (tmp_path / "a.wav").write_bytes(sound)
    assert wav.marking_of(str(tmp_path / "a.wav")) is not None


def test_command_makes_several_clips_each_with_its_seed(folder: Path) -> None:
    assert command(folder, "text", "--clips", "3", "--seed", "4") == 0
    assert command(folder, "text", "--seed", "5") == 0
    alone = (folder / "out.wav").read_bytes()
    three = [(folder / f"out-{i}.wav").read_bytes() for i in (1, 2, 3)]
    assert three[1] == alone and len(set(three)) == 3, "a clip of a batch is the clip made alone, to the byte"


def test_make_streams_to_standard_output_and_writes_nothing_else_there(folder: Path) -> None:
    command_line = ["make", "--no-print-directory", "-o", "setup", "generate", f"BIN={Path(sys.executable).parent}"]
    command_line += [f"MODEL={folder / 'text' / 'release'}", "DURATION=0.6", "PROMPT=waltz", "STREAM=1", "OUT=-"]
    done = subprocess.run(command_line, capture_output=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (folder / "piped.wav").write_bytes(done.stdout)
    samples, _ = soundfile.read(folder / "piped.wav")
    assert samples.shape == (19_200,) and b"first sound after" in done.stderr
    assert command(folder, "text") == 0
    assert np.abs(soundfile.read(folder / "out.wav")[0] - samples).max() < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "float16", "int8"])
def test_precisions_generate(folder: Path, precision: str) -> None:
    model = generate.load(folder / "text" / "release", precision=precision)  # type: ignore[arg-type]
    exact = generate.load(folder / "text" / "release")
    a, b = (generate.generate(m, ["waltz"], 0.6, [1])[1] for m in (model, exact))
    assert a.shape == b.shape and (a[:, 0, :5] == b[:, 0, :5]).float().mean() > 0.5, "about the same model"
