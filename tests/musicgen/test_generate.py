"""Prompt to sound with a small random model: addressed by seed and prompt, equal in a batch, clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musicgen import codec as codecs
from musicgen import generate, patterns, wav, weights
from musicgen.conditions import Conditions
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.sampling import SamplingConfig
from tests.musicgen.small_model import write_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(release: Path) -> generate.MusicGen:
    return generate.load(release)


def codes_of(
    model: generate.MusicGen, prompts: list[str | None], seeds: list[int], config: SamplingConfig | None = None
) -> torch.Tensor:
    return generate.generate(model, prompts, 0.8, seeds, config)[1]


def test_shapes_and_range(model: generate.MusicGen) -> None:
    calls: list[tuple[int, int]] = []
    audio, codes = generate.generate(
        model, ["slow waltz", None], 0.81, [1, 2], progress=lambda done, total: calls.append((done, total))
    )
    assert audio.shape == (2, 1, round(0.81 * 32000)) and audio.dtype == torch.float32
    assert codes.shape == (2, 4, 41) and int(codes.min()) >= 0 and int(codes.max()) < 2048
    assert calls[0] == (0, 41) and calls[-1] == (41, 41) and calls == sorted(calls)
    assert torch.allclose(model.codec.decode(codes[1:])[..., : audio.shape[-1]], audio[1:], atol=1e-6)


def test_same_seed_same_tokens_other_seed_or_prompt_other_tokens(model: generate.MusicGen) -> None:
    base = codes_of(model, ["slow waltz"], [1])
    assert torch.equal(base, codes_of(model, ["slow waltz"], [1]))
    for prompts, seeds in ((["slow waltz"], [2]), (["loud samba"], [1]), ([None], [1])):
        other = codes_of(model, prompts, seeds)
        assert (other != base).float().mean() > 0.3
        assert (other[:, 0] != base[:, 0]).any()


def test_alone_equals_in_a_batch(model: generate.MusicGen) -> None:
    prompts = [
        "slow waltz",
        None,
        "a long description of a lively reel with fiddle, bodhran and guitar in D",
        "samba",
        "x",
    ]
    seeds = [1, -5, 2**63 + 11, 4, 5]
    batch = generate.generate(model, prompts, 0.8, seeds)
    for i in range(len(prompts)):
        audio, codes = generate.generate(model, prompts[i : i + 1], 0.8, seeds[i : i + 1])
        assert torch.equal(codes[0], batch[1][i])
        assert torch.equal(audio[0], batch[0][i])


def test_a_longer_clip_begins_like_the_shorter(model: generate.MusicGen) -> None:
    short = codes_of(model, ["slow waltz"], [1])
    long = generate.generate(model, ["slow waltz"], 1.2, [1])[1]
    assert torch.equal(short[:, 0], long[:, 0, :40])


def test_cached_sampling_follows_the_full_forward(model: generate.MusicGen) -> None:
    """Temperature 0 through the cache gives what the uncached, guided forward calls likeliest at every column."""
    codes = generate.generate(model, ["slow waltz"], 0.24, [0], SamplingConfig(temperature=0.0, guidance=2.0))[1]
    columns, cells = patterns.interleave(codes, 2048)
    text = generate.encode_prompts(model, ["slow waltz"])
    null = text.without_text(model.lm)
    with torch.no_grad():
        with_text = model.lm(columns[..., :-1], text.text, text.text_mask)
        without = model.lm(columns[..., :-1], null.text, null.text_mask)
    expected = (without + 2.0 * (with_text - without)).argmax(-1)
    inside = cells[None, :, 1:]
    assert torch.equal(expected[inside], columns[..., 1:][inside])


def test_guidance_one_is_no_guidance_and_more_changes_the_sound(model: generate.MusicGen) -> None:
    rows: list[int] = []
    start = Engine.start

    def counting(self: Engine, conditions: Conditions, columns: int) -> object:
        rows.append(len(conditions.text))
        return start(self, conditions, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "start", counting)
        plain = codes_of(model, ["slow waltz"], [1], SamplingConfig(guidance=1.0))
        strong = codes_of(model, ["slow waltz"], [1], SamplingConfig(guidance=6.0))
    assert rows == [1, 2], "without guidance no null row is computed"
    assert not torch.equal(plain, strong)
    near = codes_of(model, ["slow waltz"], [1], SamplingConfig(guidance=1.0 + 1e-9))
    assert torch.equal(plain, near), "the guided path at 1 gives the unguided tokens"
    assert torch.equal(
        codes_of(model, [None], [1], SamplingConfig(guidance=6.0)),
        codes_of(model, [None], [1], SamplingConfig(guidance=1.0)),
    ), "there is nothing to guide to without a prompt"


def test_negative_prompt_moves_the_music_away(model: generate.MusicGen) -> None:
    def made(negatives: list[str | None] | None, prompt: str | None = "slow waltz") -> torch.Tensor:
        return generate.generate(model, [prompt], 0.8, [1], negatives=negatives)[1]

    base = made(None)
    assert torch.equal(base, made([None])), "nothing to move away from is the null condition"
    assert not torch.equal(base, made(["loud samba"]))
    assert not torch.equal(made(["piano"]), made(["loud samba"]))
    assert not torch.equal(made(["loud samba"], None), made(None, None)), "also without a prompt"
    assert torch.equal(made(["slow waltz"]), codes_of(model, ["slow waltz"], [1], SamplingConfig(guidance=1.0)))


def test_guidance_over_time_acts_when_it_says(model: generate.MusicGen) -> None:
    """Scale 1 for the first 0.4 s, then 6: the codes leave those of scale 1 there and not before."""
    plain = codes_of(model, ["slow waltz"], [1], SamplingConfig(guidance=1.0))
    later = codes_of(
        model, ["slow waltz"], [1], SamplingConfig(guidance_over_time=((0.0, 1.0), (0.399, 1.0), (0.4, 6.0)))
    )
    assert torch.equal(plain[:, 0, :20], later[:, 0, :20])
    assert (plain[:, :, 20:] != later[:, :, 20:]).float().mean() > 0.3


def test_top_k_one_ignores_the_seed(model: generate.MusicGen) -> None:
    assert torch.equal(
        codes_of(model, ["slow waltz"], [1], SamplingConfig(top_k=1)),
        codes_of(model, ["slow waltz"], [2], SamplingConfig(temperature=0.0)),
    )


def test_every_column_draws_anew(model: generate.MusicGen) -> None:
    """So hot that only the noise decides: it must be another one at every column."""
    codes = codes_of(model, ["slow waltz"], [1], SamplingConfig(top_k=0, temperature=1e6, guidance=1.0))
    assert all(len(book.unique()) > 35 for book in codes[0]), "40 frames of fresh draws from 2048 codes"


@pytest.mark.parametrize("duration", [0.0, -3.0, float("nan"), float("inf"), 3601.0])
def test_impossible_durations(model: generate.MusicGen, duration: float) -> None:
    with pytest.raises(UserError, match=r"DURATION=.* is not possible; give seconds from 0.1 to 3600"):
        generate.generate(model, ["waltz"], duration, [1])


def test_shortest_clip_works(model: generate.MusicGen) -> None:
    assert generate.generate(model, ["waltz"], 0.1, [1])[0].shape == (1, 1, 3200)


def test_bad_requests(model: generate.MusicGen) -> None:
    with pytest.raises(UserError, match="PROMPT is empty"):
        generate.generate(model, ["  "], 1.0, [1])
    with pytest.raises(UserError, match="top_k is 5000, but a codebook has 2048 codes"):
        generate.generate(model, ["waltz"], 1.0, [1], SamplingConfig(top_k=5000))
    with pytest.raises(ValueError, match="2 prompts need 2 seeds, got 1"):
        generate.generate(model, ["a", "b"], 1.0, [1])
    for name, value in (("negatives", [None]), ("attributes", [{}]), ("given", torch.zeros(1, 4, 5, dtype=torch.long))):
        with pytest.raises(ValueError, match=f"2 prompts need 2 {name}, got 1"):
            generate.generate(model, ["a", "b"], 1.0, [1, 2], **{name: value})
    for codes, message in (
        (torch.full((1, 4, 5), 5000), r"codes must lie in 0…2047; got 5000…5000"),
        (torch.zeros(1, 3, 5, dtype=torch.long), r"takes codes of shape \[batch, 4, frames\]; got \[1, 3, 5\]"),
        (
            torch.zeros(4, 5, dtype=torch.long),
            r"given is \[4, 5\] torch.int64; give whole numbers of shape \[B, K, P\]",
        ),
        (torch.zeros(1, 4, 5), r"given is \[1, 4, 5\] torch.float32; give whole numbers of shape \[B, K, P\]"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            generate.generate(model, ["a"], 1.0, [1], given=codes)


def test_hints_for_unknown_script_and_length(model: generate.MusicGen) -> None:
    assert generate.hints(model, "slow waltz for piano", 1.0) == []
    (unknown,) = generate.hints(model, "ຂຶ້ນພູ ຟັງດົນຕີ ຂອງພູມໃຈ", 1.0)
    assert "does not know" in unknown and "%" in unknown
    (length,) = generate.hints(model, "slow waltz", 2.0)
    assert "learned from 1 s" in length


def test_another_codec_or_none_is_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trained on tokens of codec"):
        generate.load(release, codec=codecs.tiny(seed=3))
    with pytest.raises(UserError, match=r"needs codec .* could not be loaded.* Give its folder with --codec"):
        generate.load(release, codec=str(tmp_path / "gone"))


def _command(release: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PROMPT"} | environment
    return subprocess.run(
        [sys.executable, "-m", "musicgen.generate", "--model", str(release), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_same_seed_same_bytes_and_marking(release: Path, tmp_path: Path) -> None:
    """The prompt travels by the environment, so quotes, `$` and any script survive."""
    prompt = "a \"quoted\" $HOME 'waltz' — вальс"
    one, two = tmp_path / "one.wav", tmp_path / "two" / "clip.wav"
    common = ("--duration", "0.5", "--seed", "7")
    for out in (one, two):
        done = _command(release, *common, "--out", str(out), PROMPT=prompt)
        assert done.returncode == 0, done.stderr
    assert one.read_bytes() == two.read_bytes()
    samples, rate = soundfile.read(one)
    assert rate == 32000 and samples.shape == (16000,) and np.abs(samples).max() > 0
    mark = wav.read_marking(one)
    info = weights.read_info(release)
    assert mark["generated"] is True and mark["prompt"] == prompt and mark["seed"] == 7
    assert mark["model"]["sha256"] == info["weights"]["sha256"]
    assert mark["codec"] == info["codec"] | {"name": "codec"} and mark["data_version"] == "d1"
    sampling = {"top_k": 250, "top_p": 0.0, "temperature": 1.0, "guidance": 3.0}
    assert mark["sampling"] == sampling | {"guidance_melody": None, "guidance_style": None, "guidance_over_time": []}
    assert str(release.parent) not in repr(mark) and str(tmp_path) not in repr(mark)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--duration", "0"], "DURATION=0 is not possible"),
        (["--prompt", "x", "--duration", "ten"], "DURATION=ten is not a number; give seconds from 0.1 to 3600"),
        (["--prompt", "x", "--sampling.top_k", "-4"], "top_k is -4"),
        (["--prompt", "x", "--sampling.topk", "4"], "did you mean 'sampling.top_k'"),
        (["--prompt", "x", "--out", "song.mp3"], "must end in .wav"),
        (["--prompt", "x", "--device", "cuda:9"], "device 'cuda:9' cannot be used"),
        (["--prompt", "x", "--device", "meta"], "device 'meta' holds no numbers"),
        ([], "PROMPT is empty"),
    ],
)
def test_command_refuses_in_words(
    release: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from musicgen import settings

    monkeypatch.delenv("PROMPT", raising=False)
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(release), *arguments])
    with pytest.raises(SystemExit) as caught:
        settings.run(generate.main)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("stream", "end", "message"),
    [
        ([], "gone", "the program that read the output ended"),
        (["--stream", "true"], "/dev/full", "OUT=- cannot be written"),
    ],
)
def test_output_that_nobody_takes(release: Path, stream: list[str], end: str, message: str) -> None:
    argv = [sys.executable, "-m", "musicgen.generate", "--model", str(release), "--duration", "0.5", "--out", "-"]
    if end == "gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(end, os.O_WRONLY)
    done = subprocess.run(
        [*argv, "--prompt", "waltz", *stream], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300
    )
    os.close(writer)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_bytes_that_are_no_text(release: Path, tmp_path: Path) -> None:
    """A prompt in Latin-1 is refused; a file's name may be of any bytes, and the reader of its name may have gone."""
    argv = [sys.executable, "-m", "musicgen.generate", "--model", str(release), "--duration", "0.3"]
    env: dict[bytes, bytes] = {**os.environb, b"PROMPT": "café".encode("latin1")}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "error: PROMPT holds bytes that are no UTF-8, after 'caf'" in done.stderr
    out = os.fsencode(tmp_path) + b"/\xe9.wav"
    done = subprocess.run([*argv, "--prompt", "x", "--out", out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and r"\udce9.wav: 0.3 s" in done.stdout and os.path.exists(out), done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*argv, "--prompt", "x", "--out", tmp_path / "x.wav"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 0 and not done.stderr.strip() and (tmp_path / "x.wav").is_file()


def test_command_warns_of_an_unknown_script_and_still_plays(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.wav"
    argv = ["--model", str(release), "--duration", "0.3", "--out", str(out), "--prompt", "ຂຶ້ນພູ ຟັງດົນຕີ"]
    assert generate.main(argv) == 0
    assert "warning: the text encoder 'minilm' does not know" in capsys.readouterr().err
    assert out.is_file()
    assert generate.main([*argv[:-2], "--unconditional", "true"]) == 0
    assert wav.read_marking(out)["prompt"] is None
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--unconditional", "true"], "PROMPT is not heard"),
        (["--prompt_seconds", "2"], "prompt_seconds acts on an AUDIO; there is none"),
        (["--melody_stems", "true"], "melody_stems acts on a MELODY; there is none"),
        (["--sampling.guidance_style", "2"], "guidance_style acts on a STYLE; there is none"),
    ],
)
def test_command_says_which_setting_does_nothing(
    more: list[str], told: str, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(release), "--duration", "0.3", "--out", str(tmp_path / "x.wav"), "--prompt", "calm piano"]
    assert generate.main([*argv, *more]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and told in said[0]


def test_a_model_of_another_text_encoder_is_refused(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "other")
    about = json.loads((release / "config.json").read_text())
    about["text_encoder"]["identity"] = "0" * 64
    (tmp_path / "other" / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="trained with another text encoder than the 'minilm'"):
        generate.load(str(tmp_path / "other"))


@pytest.mark.parametrize("out", ["/dev/null/x.wav", "README.md/x.wav", "x" * 300 + ".wav"])
def test_a_place_that_takes_no_file_is_refused_before_the_clip_is_made(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        generate.main(["--prompt", "waltz", "--duration", "1", "--out", out, "--model", "nowhere"])


def test_importing_replaces_nothing(tmp_path: Path) -> None:
    from musicgen.interop import command

    kept = tmp_path / "mine" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years")
    for out in (kept.parent, kept, Path("/")):
        with pytest.raises(UserError, match="OUT="):
            command.import_model(command.ImportConfig(source="facebook/musicgen-small", out=str(out)))
    assert kept.read_text() == "years"
