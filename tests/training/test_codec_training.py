"""Codec training: codebooks that follow and revive, addressed crops, a loss that falls, exact resume."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from musicgen import codec as codecs
from musicgen import settings, wav
from musicgen.errors import UserError
from tests.training.wandb_file import history as wandb_history
from training.codec import data, initial, quantiser, train
from training.codec.balancer import BalancerConfig
from training.codec.config import CodecTrainConfig, read_config
from training.codec.discriminator import DiscriminatorConfig
from training.codec.initial import start_from
from training.codec.module import CodecModule
from training.codec.quantiser import QuantiserConfig

SMALL = ["--batch_size", "2", "--crop_seconds", "0.5", "--warmup_steps", "3", "--quantiser.kmeans_latents", "200"]
SMALL += ["--network.num_filters", "4", "--network.hidden_size", "16", "--network.codebook_size", "64"]
SMALL += ["--quantiser.kmeans_iterations", "2", "--validation_tracks", "1", "--hardware.threads", "1", "--clips", "1"]
SMALL_CRITIC = ["--discriminator.windows", "[256, 512]", "--discriminator.filters", "2", "--adversarial_ramp", "2"]


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


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    """A run that stops in the middle."""


def stop_after_first_validation(argv: list[str]) -> None:
    """Run until the first state is on the disk, then die."""
    real = train.Watch._save

    def save_and_die(self: train.Watch, trainer: object) -> None:
        real(self, trainer)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Watch, "_save", save_and_die)
        train.main(argv)


def state(run: Path) -> dict:
    """The last state of a run, read as data."""
    return torch.load(run / "state" / "last.ckpt", weights_only=True)


def flat(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor and number of a state, by path."""
    if isinstance(tree, dict | list | tuple):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in pairs for k, v in flat(value, f"{path}/{key}").items()}
    return {path: torch.as_tensor(tree)} if isinstance(tree, torch.Tensor | int | float) else {}


def test_trains_resumes_and_exports(cache: Path, tmp_path: Path) -> None:
    """With the discriminator from the middle of the first half on, every other step."""
    argv = ["--data", str(cache), *SMALL, *SMALL_CRITIC, "--steps", "12", "--cooldown_steps", "4"]
    argv += ["--validate_every", "6", "--adversarial_start", "4", "--discriminator.every", "2"]
    assert train.main([*argv, "--run", str(tmp_path / "whole")]) == 0
    lines = metrics(tmp_path / "whole")
    assert {"valid/log_mel", "valid/chroma", "valid/used_4", "valid/perplexity_4"} <= set(lines[-1])
    assert {"train/adversarial", "train/feature", "train/commitment", "train/mel"} <= set(lines[-2])
    clips = sorted(p.name for p in (tmp_path / "whole" / "samples").iterdir())
    assert clips == ["v0-original.wav", "v0-step-0000006.wav", "v0-step-0000012.wav"]
    assert wav.read_marking(tmp_path / "whole" / "samples" / clips[1])["what"] == "reconstruction by the codec"
    [file] = (tmp_path / "whole" / "wandb").glob("offline-run-*/*.wandb")
    sent = [list(row) for row in wandb_history(file)]
    assert any(key.startswith("samples") for keys in sent for key in keys) and any(
        "share/feature" in keys for keys in sent
    )
    # The last step, an odd one, has no update of the discriminator: the figures of the one before stand there.
    assert {"train/discriminator", "train/real_taken_for_real", "train/decoded_taken_for_real"} <= set(lines[-2])
    shares = {k: v for k, v in lines[-2].items() if k.startswith("share/")}
    assert shares.keys() == {f"share/{name}" for name in ("wave", "mel", "tonal", "chroma", "adversarial", "feature")}
    assert sum(shares.values()) == pytest.approx(1.0)
    codec = codecs.load(tmp_path / "whole" / "release")
    assert codec.encode(torch.from_numpy(melody(3))[None]).shape == (1, 4, 200)

    stop_after_first_validation([*argv, "--run", str(tmp_path / "cut")])
    assert train.main([*argv, "--run", str(tmp_path / "cut")]) == 0
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "ema", "balancer", "global_step")
    a, b = (flat({k: state(tmp_path / name)[k] for k in kept}) for name in ("whole", "cut"))
    assert a.keys() == b.keys() and any("/optimizer_states/1/" in k for k in a)
    other = [k for k in a if not torch.equal(a[k], b[k])]
    assert not other, "6 steps, stopped, 6 more = 12 at once, bit for bit"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_even_in_the_warm_up_and_asks_to_be_run_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it
    argv = ["--data", str(cache), *SMALL, "--steps", "8", "--cooldown_steps", "2", "--validate_every", "100"]
    assert train.main([*argv, "--run", str(tmp_path / "whole")]) == 0
    before, end = signal.getsignal(number), train.Watch.on_train_batch_end

    def asked(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), number)
        end(self, trainer, *rest)

    monkeypatch.setattr(train.Watch, "on_train_batch_end", asked)
    with pytest.raises(SystemExit) as left:
        train.main([*argv, "--run", str(tmp_path / "cut")])
    assert left.value.code == code and signal.getsignal(number) == before
    assert state(tmp_path / "cut")["global_step"] == 2
    monkeypatch.setattr(train.Watch, "on_train_batch_end", end)
    assert train.main([*argv, "--run", str(tmp_path / "cut")]) == 0
    a, b = (flat(state(tmp_path / name)["state_dict"]) for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_release_is_the_best_since_the_discriminator_listens(cache: Path, tmp_path: Path) -> None:
    """What was better by figures that know no texture is replaced, and a worse one of the same phase is not taken."""
    run = tmp_path / "run"
    argv = ["--data", str(cache), *SMALL, *SMALL_CRITIC, "--run", str(run), "--validate_every", "2"]
    argv += ["--warmup_steps", "2", "--adversarial_start", "4"]

    def released(steps: int) -> int:
        assert train.main([*argv, "--steps", str(steps)]) == 0
        return int(json.loads((run / "release" / "training.json").read_text())["step"])

    def pretend(score: float, *more: dict[str, float]) -> None:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines[-1]["valid/score"] = score
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))

    assert released(4) == 4
    pretend(-99.0)
    assert released(6) == 4, "the last update still had less than the discriminator's whole weight"
    assert released(8) == 8
    pretend(-99.0)
    assert released(10) == 8
    lines = (run / "metrics.jsonl").read_text().replace("-99.0", "NaN")
    (run / "metrics.jsonl").write_text(lines)
    pretend(math.nan, {"step": 11, "valid/score": -99.0})  # of after the state, as a kill leaves it: it does not count
    assert released(12) == 12, "what is no number is no rival"


def test_starts_from_another_run(cache: Path, tmp_path: Path) -> None:
    """A codec trained with reconstruction losses goes on with the discriminator, from its state or its release."""
    first = ["--data", str(cache), *SMALL, "--steps", "6", "--validate_every", "6", "--cooldown_steps", "1"]
    assert train.main([*first, "--run", str(tmp_path / "first")]) == 0
    before = state(tmp_path / "first")
    more = ["--data", str(cache), *SMALL, *SMALL_CRITIC, "--warmup_steps", "0", "--adversarial_start", "0"]
    more += ["--seed", "1"]
    config = train_config([*more, "--steps", "3"])
    module = CodecModule(config, [])
    start_from(module, str(tmp_path / "first"))
    module.configure_optimizers()
    name = "network.quantizer.layers.1.codebook.embed_avg"
    assert torch.equal(module.state_dict()[name], before["state_dict"][name])
    assert all(torch.equal(a, b) for a, b in zip(module.ema, before["ema"], strict=True))
    adam = module.configure_optimizers()[0][0].state_dict()
    assert torch.equal(adam["state"][3]["exp_avg"], before["optimizer_states"][0]["state"][3]["exp_avg"])

    fresh = CodecModule(config, []).state_dict()
    for source in ("first/state/last.ckpt", "first/release"):
        run = tmp_path / source.replace("/", "-")
        assert train.main([*more, "--steps", "3", "--init", str(tmp_path / source), "--run", str(run)]) == 0
        after = state(run)["state_dict"]
        for name in ("encoder.layers.3.conv.parametrizations.weight.original1", "decoder.layers.0.conv.bias"):
            then, now, other = (s["network." + name] for s in (before["state_dict"], after, fresh))
            assert 0 < (now - then).norm() < 0.5 * (other - then).norm(), "went on from there, not from scratch"


def test_starts_from_a_folder_of_transformers(tmp_path: Path) -> None:
    """What `save_pretrained` writes, as on the hub: the same network, through the same three methods."""
    theirs = codecs.build(train_config(SMALL).network)
    for layer in theirs.quantizer.layers:
        layer.codebook.embed.normal_()
    theirs.save_pretrained(tmp_path)
    module = CodecModule(train_config([*SMALL, "--seed", "5"]), [])
    start_from(module, str(tmp_path))
    for name, tensor in theirs.state_dict().items():
        assert name.endswith(codecs.TRAINING_BUFFERS) or torch.equal(module.network.state_dict()[name], tensor), name
    hub, ours = codecs.load(tmp_path), module.averaged()
    sound = torch.from_numpy(melody(2))[None]
    codes = hub.encode(sound)
    assert hub.identity == ours.identity and torch.equal(codes, ours.encode(sound))
    assert torch.equal(hub.decode(codes), ours.decode(codes))


def test_sums_of_a_release_are_rebuilt() -> None:
    """Releases lack the running sums: an entry must stay where it is as long as the latents stay the same."""
    torch.manual_seed(0)
    books, config = quantizer(), QuantiserConfig()
    latents = torch.randn(8, 8, 500)
    vectors = latents.permute(0, 2, 1).reshape(-1, 8)
    quantiser.initialise(books, vectors, config, seed=0)
    wanted = [layer.codebook.embed.clone() for layer in books.layers]
    for layer in books.layers:
        layer.codebook.embed_avg.zero_()
        layer.codebook.cluster_size.zero_()
    initial.rebuild_sums(books, vectors)
    result = quantiser.quantise(books, latents, config, train=True)
    assert sum(result.revived) <= 2
    for layer, entries in zip(books.layers, wanted, strict=True):
        moved = (layer.codebook.embed - entries).norm(dim=1) / entries.norm(dim=1)
        assert (moved < 0.02).float().mean() > 0.95


def test_start_of_another_shape_is_refused(tmp_path: Path) -> None:
    module = CodecModule(train_config([]), [])
    with pytest.raises(UserError, match="holds no codec"):
        start_from(module, str(tmp_path))
    small = codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), codebook_size=256)
    codecs.save(codecs.build(small), tmp_path / "small")
    with pytest.raises(UserError, match=r"4 codebooks of 256 entries × 16 numbers; .* needs 4 codebooks of 2048"):
        start_from(module, str(tmp_path / "small"))
    slim = codecs.CodecConfig(num_filters=4, hidden_size=64, ratios=(4, 4, 5, 8), num_lstm_layers=1)
    codecs.save(codecs.build(slim), tmp_path / "slim")
    with pytest.raises(UserError, match=r"codec of another shape: decoder"):
        start_from(module, str(tmp_path / "slim"))
    faster = dataclasses.replace(codecs.CODEC_SIZES["demo"], sample_rate_hz=48_000)
    codecs.save(codecs.build(faster), tmp_path / "faster")
    with pytest.raises(UserError, match="sampling_rate is 48000 there, 32000 in this run"):
        start_from(module, str(tmp_path / "faster"))
    (tmp_path / "last.ckpt").write_bytes(b"no state")
    with pytest.raises(UserError, match="is not the state of a codec run"):
        start_from(module, str(tmp_path / "last.ckpt"))


def test_bad_input(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="unknown codec SIZE"):
        train.main(["--size", "48khz"])
    with pytest.raises(UserError, match="DATA is missing"):
        train.main([])
    with pytest.raises(UserError, match="does not exist"):
        train.main(["--data", str(tmp_path / "no.jsonl"), "--run", str(tmp_path / "r")])
    short = ["--data", str(cache), "--crop_seconds", "0.2"]
    with pytest.raises(UserError, match=r"crop_seconds is 0.2 \(6400 samples\); (warmup_)?loss needs at least 0.256 s"):
        train.main(short)
    with pytest.raises(UserError, match=r"hears 0.01 s of each crop; it needs at least its longest window \(0.064 s\)"):
        train.main(["--data", str(cache), "--adversarial_start", "5", "--discriminator.seconds", "0.01"])
    mute = [f"--loss.{name}" for name in ("wave", "mel", "tonal", "chroma")]
    with pytest.raises(UserError, match="loss gives no weight to any of wave"):
        train.main(["--data", str(cache), *(word for name in mute for word in (name, "0"))])
    with pytest.raises(UserError, match="2 processes cannot share"):
        train.main(["--data", str(cache), "--batch_size", "3", "--hardware.devices", "2"])
    with pytest.raises(UserError, match=r"PCM of 32000 Hz and 1 channel.* takes 32000 Hz and 2"):
        train.main(["--data", str(cache), "--network.channels", "2", "--run", str(tmp_path / "stereo")])
    with pytest.raises(settings.SettingsError, match="a codec is mono"):
        train.main(["--data", str(cache), "--network.channels", "3"])
    (tmp_path / "torn" / "state").mkdir(parents=True)
    (tmp_path / "torn" / "state" / "last.ckpt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read .* --init"):
        train.main(["--data", str(cache), *SMALL, "--run", str(tmp_path / "torn")])
    with pytest.raises(UserError, match=r"lr: 0.002 there, 0.5 now"):
        run = ["--data", str(cache), "--run", str(tmp_path / "s"), *SMALL]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(train._plain(train_config(run))))
        train._check_config(tmp_path, train_config(run))
        train._check_config(tmp_path, train_config([*run, "--lr", "0.5"]))
    (tmp_path / "config.yaml").write_text("size: 300m\n")
    with pytest.raises(UserError, match="that is none of a codec run"):
        train._check_config(tmp_path, train_config(run))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"RUN='.*file' cannot be made"):
        train.main(["--data", str(cache), "--run", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("network.num_filters", "0", "at least 2"),
        ("network.hidden_size", "0", "at least 1"),
        ("network.num_lstm_layers", "0", "at least 1"),
        ("network.num_codebooks", "0", "at least 1"),
        ("network.ratios", "[4, 0]", "at least 1"),
        ("network.ratios", "[]", "at least 1"),
        ("network.sample_rate_hz", "0", "at least 1000"),
        ("ema_decay", "1.0", "at least 0 and less than 1"),
        ("ema_decay", "-0.1", "at least 0 and less than 1"),
        ("ema_decay", ".nan", "at least 0 and less than 1"),
        ("lr", ".inf", "more than 0"),
        ("lr", "0", "more than 0"),
        ("betas", "[0.9, 1.5]", "at least 0 and less than 1"),
        ("crop_seconds", ".nan", "at least 0.001"),
        ("quantiser.decay", "2", "at least 0 and less than 1"),
        ("discriminator.dilations", "[1, 0]", "at least 1"),
        ("balancer.total_norm", "-1", "more than 0"),
        ("loss.mel", "-1", "at least 0"),
        ("loss.mel_windows", "[0]", "at least 16"),
    ],
)
def test_numbers_that_no_training_can_have(name: str, value: str, allowed: str) -> None:
    with pytest.raises(settings.SettingsError, match=rf"{name} is .*; it must be {allowed}"):
        read_config(["--data", "x", f"--{name}={value}"])


def test_a_start_that_fails_leaves_the_run_folder_free(cache: Path, tmp_path: Path) -> None:
    argv = ["--data", str(cache), *SMALL, "--steps", "5", "--run", str(tmp_path / "run")]
    with pytest.raises(UserError, match="holds no codec"):
        train.main([*argv, "--init", str(tmp_path / "nowhere"), "--lr", "0.5"])
    train._check_config(tmp_path / "run", train_config(argv))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_state_of_another_rate_is_refused(tmp_path: Path) -> None:
    """Tensors of equal shapes; by what the state says, and for one of before it did by its run's settings."""
    module, config = CodecModule(train_config(SMALL), []), train_config([*SMALL, "--network.sample_rate_hz", "24000"])
    checkpoint: dict[str, Any] = {}
    CodecModule(config, []).on_save_checkpoint(checkpoint)
    (tmp_path / "state").mkdir()
    kept = {"state_dict": module.state_dict(), "optimizer_states": [{"state": {}}], "global_step": 3, "ema": module.ema}
    torch.save(kept | {"network": checkpoint["network"]}, tmp_path / "state" / "last.ckpt")
    with pytest.raises(UserError, match="another kind of codec: sample_rate_hz is 24000 there, 32000 in this run"):
        start_from(module, str(tmp_path))
    torch.save(kept, tmp_path / "state" / "last.ckpt")
    assert "step 3" in start_from(module, str(tmp_path))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(train._plain(config)))
    with pytest.raises(UserError, match="sample_rate_hz is 24000 there"):
        start_from(module, str(tmp_path))


def test_sizes_have_their_settings() -> None:
    """The numbers of the reference's recipe for the paper's size; the demo is that of its own file."""
    config = read_config(["--data", "x", "--size", "32khz"])
    assert config.network == codecs.CodecConfig() == codecs.CODEC_SIZES["32khz"]
    assert (config.lr, config.betas, config.batch_size, config.crop_seconds) == (3e-4, (0.5, 0.9), 64, 1.0)
    assert (config.steps, config.ema_decay, config.clip, config.warmup_steps) == (400_000, 0.99, 0.0, 0)
    first = config.adversarial_loss
    used = {k: v for k, v in dataclasses.asdict(first).items() if isinstance(v, float) and v and k != "tonal_max_hz"}
    assert used == {"l1": 0.1, "msspec": 2.0, "adversarial": 4.0, "feature": 4.0, "commitment": 1.0}
    assert first.balance and config.adversarial_start == 0
    assert config.discriminator == DiscriminatorConfig() and config.balancer == BalancerConfig(0.999, 1.0)
    assert (config.quantiser.decay, config.quantiser.epsilon, config.quantiser.kmeans_iterations) == (0.99, 1e-5, 50)
    assert config.hardware.precision == "auto"
    demo = read_config(["--data", "x", "--network.channels", "2"])
    assert demo.network == dataclasses.replace(codecs.CODEC_SIZES["demo"], channels=2)
    assert demo.hardware.precision == "float32" and demo.warmup_steps == 1000


def test_recipe_of_the_paper_runs_in_stereo_and_bf16(tmp_path: Path) -> None:
    """The paper's recipe, from its first step on, with a small network; weights and codebooks stay float32."""
    both = ((f"t{i}", np.concatenate([melody(i), melody(i + 50)])) for i in range(3))
    data.write_cache(tmp_path / "pcm", "train", both, 2)
    data.write_cache(tmp_path / "pcm", "valid", iter([("v", np.concatenate([melody(7), melody(8)]))]), 2)
    argv = ["--size", "32khz", "--data", str(tmp_path / "pcm"), *SMALL, *SMALL_CRITIC, "--warmup_steps", "0"]
    argv += ["--network.channels", "2", "--steps", "3", "--hardware.accelerator", "cpu"]
    argv += ["--hardware.precision", "bf16"]
    assert train.main([*argv, "--run", str(tmp_path / "run")]) == 0
    last = metrics(tmp_path / "run")[-2]
    shares = {k.removeprefix("share/") for k in last if k.startswith("share/")}
    assert shares == {"l1", "msspec", "adversarial", "feature"}
    assert all(np.isfinite(v) for v in last.values())
    kept = state(tmp_path / "run")["state_dict"]
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    codec = codecs.load(tmp_path / "run" / "release")
    assert codec.channels == 2
    sound = torch.from_numpy(np.concatenate([melody(7), melody(8)]))[None]
    assert codec.decode(codec.encode(sound)).shape == (1, 2, 128_000)


def test_quantisation_is_float32_under_bf16() -> None:
    torch.manual_seed(0)
    books, latents = quantizer(), torch.randn(2, 8, 50)
    quantiser.initialise(books, latents.permute(0, 2, 1).reshape(-1, 8), QuantiserConfig(), seed=0)
    plain = quantiser.quantise(books, latents, QuantiserConfig(), train=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = quantiser.quantise(books, latents, QuantiserConfig(), train=False)
    assert torch.equal(plain.codes, mixed.codes) and torch.equal(plain.latents, mixed.latents)


def test_transformers_chooses_the_codes_of_training(cache: Path) -> None:
    """`EncodecModel.encode` of the network under training gives the codes that training quantises with."""
    module = CodecModule(train_config(SMALL), [])
    sound = torch.from_numpy(np.stack([melody(1), melody(2)]))[..., :32_000]
    with torch.no_grad():
        latents = module.network.encoder(sound)
        vectors = latents.permute(0, 2, 1).reshape(-1, latents.shape[1])
        quantiser.initialise(module.network.quantizer, vectors, QuantiserConfig(), seed=0)
        ours = quantiser.quantise(module.network.quantizer, latents, QuantiserConfig(), train=False).codes
        theirs = module.network.eval().encode(sound).audio_codes[0]
    assert (ours == theirs).float().mean() > 0.99 and len(ours.unique()) > 30


def test_a_small_codec_improves_on_held_out_audio(cache: Path, tmp_path: Path) -> None:
    """A thousand frames a second and two strides: easy enough to be learned in seconds, quantiser and all."""
    argv = ["--data", str(cache), *SMALL, "--network.ratios", "[8, 4]", "--network.num_filters", "8"]
    argv += ["--crop_seconds", "0.3", "--steps", "120", "--warmup_steps", "40", "--validate_every", "60"]
    argv += ["--cooldown_steps", "30", "--ema_decay", "0.9", "--lr", "0.005"]
    held_out = data.open_cache(cache, "valid").track(0)
    before, _ = CodecModule(train_config(argv), [held_out]).evaluate()
    assert train.main([*argv, "--run", str(tmp_path / "run")]) == 0
    seen = [line for line in metrics(tmp_path / "run") if "valid/log_mel" in line]
    assert seen[-1]["valid/log_mel"] < 0.7 * before["valid/log_mel"]
    assert seen[-1]["valid/log_mel"] < seen[0]["valid/log_mel"]
    assert min(seen[-1][f"valid/used_{level}"] for level in (1, 2, 3, 4)) > 0.3


def train_config(argv: list[str]) -> CodecTrainConfig:
    """Parsed settings."""
    return read_config(["--data", "unused", *argv])
