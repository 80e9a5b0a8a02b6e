"""Codec training: codebooks that follow and revive, addressed crops, a loss that falls, exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen import codec as codecs
from musicgen.errors import UserError
from training.codec import data, quantiser, train
from training.codec.quantiser import QuantiserConfig

SMALL = ["--batch_size", "2", "--crop_seconds", "0.5", "--warmup_steps", "3", "--quantiser.kmeans_latents", "2100"]
SMALL += ["--quantiser.kmeans_iterations", "2", "--validation_tracks", "1", "--threads", "1"]


def melody(seed: int, seconds: float = 4.0) -> np.ndarray:
    """A short plucked melody `[1, N]` at 32 kHz."""
    rng = np.random.default_rng(seed)
    note = np.arange(8000) / 32_000
    parts = [
        sum(np.sin(2 * np.pi * 220 * 2 ** (k / 12) * h * note) / h for h in (1, 2, 3)) * np.exp(-note * 8)
        for k in rng.integers(0, 24, int(seconds * 4))
    ]
    return (0.2 * np.concatenate(parts))[None].astype(np.float32)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A PCM cache with six training tracks and one held out."""
    data.write_cache(tmp_path / "pcm", "train", ((f"t{i}", melody(i)) for i in range(6)), 1)
    data.write_cache(tmp_path / "pcm", "valid", ((f"v{i}", melody(100 + i)) for i in range(1)), 1)
    return tmp_path / "pcm"


def quantizer(size: int = 64, width: int = 8) -> torch.nn.Module:
    """An untrained quantiser of four levels."""
    return codecs.build(codecs.CodecConfig(num_filters=2, hidden_size=width, codebook_size=size)).quantizer


def test_codebooks_learn_the_latents() -> None:
    torch.manual_seed(0)
    centres = torch.randn(50, 8) * 3
    latents = (centres[torch.randint(50, (2000,))] + 0.05 * torch.randn(2000, 8)).reshape(20, 100, 8).permute(0, 2, 1)
    books, config = quantizer(), QuantiserConfig()
    quantiser.initialise(books, latents.permute(0, 2, 1).reshape(-1, 8), config, seed=0)
    first = quantiser.quantise(books, latents, config, train=True)
    error = (first.latents - latents).square().mean()
    assert error < 0.02 * latents.square().mean()
    codes = books.encode(latents).transpose(0, 1)
    again = quantiser.quantise(books, latents, config, train=False)
    assert (codes == again.codes).float().mean() > 0.99, "training and transformers choose the same entries"


def test_revived_entries_stay_where_they_were_put() -> None:
    """The reference's revival is undone by the EMA of the same step; ours must be used in the next one."""
    torch.manual_seed(0)
    books, config = quantizer(), QuantiserConfig()
    latents = torch.randn(4, 8, 100)
    quantiser.initialise(books, latents.permute(0, 2, 1).reshape(-1, 8), config, seed=0)
    book = books.layers[0].codebook
    book.embed[10] = 1000.0
    book.embed_avg[10] = 0.0
    book.cluster_size[10] = 0.0
    moved = quantiser.quantise(books, latents, config, train=True, seed=1)
    assert moved.revived[0] >= 1
    assert book.embed[10].abs().max() < 10
    again = quantiser.quantise(books, latents, config, train=False)
    assert (again.codes[:, 0] == 10).any()


def test_gradient_passes_straight_through() -> None:
    books, config = quantizer(), QuantiserConfig()
    for layer in books.layers:
        layer.codebook.embed.normal_()
    latents = torch.randn(2, 8, 10, requires_grad=True)
    quantiser.quantise(books, latents, config, train=False).latents.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_crops_are_addressed(cache: Path) -> None:
    pcm = data.open_cache(cache, "train")
    ask = {"seed": 1, "rank": 0, "num_samples": 16_000}
    four = data.crops(pcm, step=7, batch_size=4, **ask)
    assert np.array_equal(four, data.crops(pcm, step=7, batch_size=4, **ask))
    assert not np.array_equal(four, data.crops(pcm, step=8, batch_size=4, **ask))
    halves = [data.crops(pcm, step=7, batch_size=2, **(ask | {"rank": r})) for r in (0, 1)]
    assert np.array_equal(four, np.concatenate(halves)), "one rank with four crops sees what two ranks with two see"


def test_trains_resumes_and_exports(cache: Path, tmp_path: Path) -> None:
    argv = ["--data", str(cache), *SMALL, "--steps", "12", "--cooldown_steps", "4", "--validate_every", "6"]
    assert train.main([*argv, "--run", str(tmp_path / "whole")]) == 0
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"valid/log_mel", "valid/chroma", "valid/used_4"} <= set(lines[-1])
    codec = codecs.load(tmp_path / "whole" / "release")
    assert codec.encode(torch.from_numpy(melody(3))[None]).shape == (1, 4, 200)

    class Killed(Exception):
        pass

    real = train.Watch._validate

    def stop_after_first(self: train.Watch, trainer: object, module: object, step: int) -> None:
        real(self, trainer, module, step)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Watch, "_validate", stop_after_first)
        train.main([*argv, "--run", str(tmp_path / "cut")])
    assert train.main([*argv, "--run", str(tmp_path / "cut")]) == 0
    a, b = (
        torch.load(tmp_path / name / "state" / "last.ckpt", weights_only=False)["state_dict"]
        for name in ("whole", "cut")
    )
    assert all(torch.equal(a[k], b[k]) for k in a), "6 steps, stopped, 6 more = 12 at once, bit for bit"


def test_bad_input(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="unknown codec SIZE"):
        train.main(["--size", "48khz"])
    with pytest.raises(UserError, match="DATA is missing"):
        train.main([])
    with pytest.raises(UserError, match="does not exist"):
        train.main(["--data", str(tmp_path / "no.jsonl"), "--run", str(tmp_path / "r")])
    with pytest.raises(UserError, match=r"lr: 0.002 there, 0.5 now"):
        run = ["--data", str(cache), "--run", str(tmp_path / "s"), *SMALL]
        train._keep_config(tmp_path, train_config(run))
        train._keep_config(tmp_path, train_config([*run, "--lr", "0.5"]))


def train_config(argv: list[str]) -> object:
    """Parsed settings."""
    from musicgen import settings
    from training.codec.module import CodecTrainConfig

    return settings.parse(CodecTrainConfig, argv)
