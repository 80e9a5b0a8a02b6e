"""Whether a request fits is asked of all that it allocates, and before anything is encoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from musicgen import generate, memory, request
from musicgen.conditions import Conditions
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.model import encode_prompts
from musicgen.sampler import Sampler
from musicgen.sampling import SamplingConfig
from musicgen.windows import Windows
from tests.musicgen.small_model import MELODY, TEXT, write_release


def _bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(part) for part in value)
    return 0


@pytest.mark.parametrize("config", [TEXT, replace(TEXT, pattern="flattening"), MELODY], ids=["text", "flat", "melody"])
def test_what_a_sampler_holds_is_counted(config: object, tmp_path: Path) -> None:
    """For many clips, where noise and logits outweigh the caches; what is counted is no more than a few times that."""
    model = generate.load(write_release(tmp_path, config))  # type: ignore[arg-type]
    engine, clips = Engine(model.lm), 40
    prompted = encode_prompts(model, ["waltz"] * clips)
    if model.lm.config.condition.melody:
        prompted = replace(prompted, chroma=torch.zeros(clips, 1, dtype=torch.uint8))
    branches: list[Conditions] = [prompted, prompted.without_text(model.lm)]
    windows = Windows(50, 50, 30, 50.0, 32_000)
    sampler = Sampler(
        engine, branches, list(range(clips)), SamplingConfig(), windows.window, frame_rate=50.0, sample_rate_hz=32_000
    )
    parts = [*vars(sampler).values(), *vars(sampler.cache).values(), *vars(sampler.conditions).values()]
    held = _bytes(parts)
    counted = memory.engine_bytes(engine, memory.Load(clips, 2, 32, 0, windows, 1.0))
    # Noise that is being made takes seven times what is kept.
    assert held + 7 * _bytes(sampler.noise) < counted < 2 * held + 8 * _bytes(sampler.noise)


def test_a_request_beyond_memory_is_refused_before_it_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = generate.load(write_release(tmp_path, MELODY))
    wanted = generate.Request(["waltz"] * 512, 1.0, range(512), melodies=torch.zeros(512, 8, dtype=torch.uint8))
    monkeypatch.setattr(request, "encode_prompts", lambda *_: pytest.fail("encoded first"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)  # the caches alone would fit
    with pytest.raises(UserError, match=r"DURATION=1 for 512 clips needs about .* give a shorter DURATION or fewer"):
        next(generate.codes(model, wanted))


def test_the_command_asks_before_it_reads_a_melody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = write_release(tmp_path, MELODY)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(generate.listen, "read", lambda *_, **__: pytest.fail("read first"))
    argv = ["--model", str(release), "--prompt", "x", "--duration", "1", "--melody", "tune.wav"]
    with pytest.raises(UserError, match="GiB are free"):
        generate.main([*argv, "--out", str(tmp_path / "x.wav")])


def test_a_prompt_too_long_for_an_encoder_without_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = generate.load(write_release(tmp_path, TEXT))
    model.text_encoder.tokenize.max_length = None
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**33)
    with pytest.raises(UserError, match=r"or a shorter PROMPT than 200.. tokens"):
        generate.codes(model, generate.Request(["la " * 20_000], 1.0, [1]))
