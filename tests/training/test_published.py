"""A published model by its hub name, as users name it: fine-tuned whole and by an adapter, from the machine's copy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from musicgen import generate, settings, weights
from musicgen.sampling import SamplingConfig
from musicgen.settings import flat
from tests.musicgen.test_interop import foreign, hub, tokenizer  # noqa: F401
from tests.training.synthetic import write_dataset
from training import record, train

NAME = "facebook/musicgen-small"


@pytest.mark.parametrize("lora", [0, 4])
def test_training_starts_from_a_hub_name(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int) -> None:  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", "disabled")
    copy = hub / "models--facebook--musicgen-small"
    foreign("mono").save_pretrained(copy / "snapshots" / ("a" * 40))
    tokenizer().save_pretrained(copy / "snapshots" / ("a" * 40))
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("a" * 40)
    lm, info = weights.load_release(NAME)
    codec = {"name": weights.place_of(NAME, info, "codec"), "identity": info["codec"]["identity"]}
    data = write_dataset(tmp_path / "data", size=lm.config.codebook_size, codec=codec)
    condition = dataclasses.replace(lm.config.condition, text_encoder=weights.place_of(NAME, info, "text_encoder"))
    shape = flat({"lm": settings.to_dict(dataclasses.replace(lm.config, condition=condition))})
    argv = [f"--{key}={json.dumps(v) if isinstance(v, (list, tuple)) else v}" for key, v in shape.items()]
    argv += ["--size", "demo", "--data", str(data), "--run", str(tmp_path / "run"), "--init", NAME]
    argv += ["--steps", "4", "--batch.size", "4", "--batch.crop_seconds", "1.28", "--batch.workers", "0"]
    argv += ["--log.valid_every", "2", "--log.clips", "0", "--hardware.accelerator", "cpu", "--optim.lr", "1e-3"]
    argv += ["--optim.ema_every", "1", "--optim.ema_decay", "0.5", "--optim.warmup_steps", "1"]
    argv += ["--hardware.precision", "float32", "--licence", "MIT", *(["--lora.rank", str(lora)] if lora else [])]
    assert train.main([*argv, "--stop_at", "2"]) == 0
    assert train.main(argv) == 0
    losses = [
        row["valid/loss"] for row in record.read_metrics(tmp_path / "run" / "metrics.jsonl") if "valid/loss" in row
    ]
    assert len(losses) == 3 and min(losses[1:]) < losses[0], "better than the model it starts from"
    made = weights.read_info(tmp_path / "run" / "release")
    assert made["inherited"] == [{"model": NAME, "licence": "CC-BY-NC-4.0"}]
    assert (made["base"]["name"] == NAME) if lora else ("base" not in made)
    audio, _ = generate.generate(
        generate.load(str(tmp_path / "run" / "release")), [None], 0.3, [1], SamplingConfig(top_k=0)
    )
    assert audio.shape == (1, 1, 9600)
