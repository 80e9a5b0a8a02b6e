"""Stereo end to end: ingest of two channels, a mono model widened and trained on, generation to a stereo wav."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musicgen import chroma, generate, weights
from musicgen import codec as codecs
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.lm import MusicLM
from pipelines import ingest
from pipelines.shard import ShardSet
from tests.pipelines.conftest import TODAY, row, tone, wav, write_rows
from training import train


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> codecs.Codec:
    """A small random mono codec in a folder."""
    torch.manual_seed(0)
    shape = codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1)
    model = codecs.build(shape)
    spread = float(model.encoder(torch.randn(1, 1, 32_000) * 0.1).std())  # so that other sounds have other codes
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=spread)
    return codecs.load(codecs.save(model, tmp_path_factory.mktemp("codec") / "small"))


def test_from_catalogue_to_stereo_wav(
    local_ray: str, codec: codecs.Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "audio").mkdir()
    for number in range(6):
        left, right = tone(number), 0.5 * tone(number + 100) + 0.5 * tone(number)
        (tmp_path / f"audio/t{number:03d}.wav").write_bytes(wav(np.concatenate([left, right], axis=1)))
    catalogue = write_rows(tmp_path, [row(n) for n in range(6)])
    common = shlex.split(
        f"--channels 2 --codec {codec.name} --analysis builtin --rights.today {TODAY} --run.codec_actors 1 "
        f"--run.workers 1 --run.address {local_ray} --splits.train 1 --splits.valid 0 --splits.test 0"
    )
    assert ingest.main(["--catalog", catalogue, "--out", str(tmp_path / "set"), *common]) == 0

    shards = ShardSet.open(str(tmp_path / "set"))
    made_by = shards.info["codec"]
    assert (made_by["channels"], made_by["num_codebooks"], made_by["name"]) == (2, 8, f"stereo:{codec.name}")
    for i in range(len(shards)):
        from pipelines import audio

        name = shards.meta(i)["track_id"]
        decoded = audio.decode_bytes((tmp_path / f"audio/{name}.wav").read_bytes(), 60)
        sound = audio.prepare(decoded.pcm, decoded.sample_rate_hz, 32_000, 2)
        codes = shards.codes(i)
        assert np.array_equal(codes[0::2], codec.encode_track(sound[:1]))
        assert np.array_equal(codes[1::2], codec.encode_track(sound[1:]))
        assert not np.array_equal(codes[0::2], codes[1::2])
        assert np.array_equal(shards.chroma(i), chroma.chroma_bins(sound.mean(0)))

    # A mono model of the same codec, released, widened by INIT.
    torch.manual_seed(1)
    lm = MusicLM(LMConfig(dim=32, num_layers=2, num_heads=2, condition=ConditionConfig("minilm", 384)))
    info = {
        "codec": {"name": codec.name, "identity": codec.identity},
        "text_encoder": {"name": "minilm", "identity": TextEncoder.load("minilm").identity},
        "training": {"step": 0},
        "licence": "CC-BY-NC-4.0",
    }
    mono = weights.save_release(tmp_path / "mono", lm, info)
    run = tmp_path / "run"
    small = shlex.split(
        "--lm.dim 32 --lm.num_layers 2 --lm.num_heads 2 --lm.num_codebooks 8 --lm.pattern stereo_partial_delay "
        "--batch.crop_seconds 1.28 --batch.size 4 --steps 3 --log.clips 1 --log.clips_every 3 --log.clip_seconds 0.64 "
        "--hardware.precision float32 --hardware.accelerator cpu --optim.lr 1e-9"
    )
    argv = ["--size", "demo", "--data", str(tmp_path / "set"), "--run", str(run), "--init", str(mono), *small]
    assert train.main(argv) == 0
    trained, info = weights.load_release(run / "release")
    torch.testing.assert_close(trained.emb[5].weight, lm.emb[2].weight.half().float(), atol=1e-3, rtol=0)
    assert info["inherited"] == [{"model": str(mono), "licence": "CC-BY-NC-4.0"}]
    assert "CC-BY-NC-4.0; not for commercial use" in capsys.readouterr().err
    [clip] = (run / "samples").rglob("*.wav")
    assert soundfile.info(str(clip)).channels == 2

    out = tmp_path / "out.wav"
    argv = ["--model", str(run / "release"), "--duration", "0.7", "--out", str(out), "--prompt", "a quiet piece"]
    assert generate.main(argv) == 0
    sound, rate = soundfile.read(out)
    assert rate == 32_000 and sound.shape == (22_400, 2) and not np.allclose(sound[:, 0], sound[:, 1])
    assert json.loads((run / "release/config.json").read_text())["codec"]["name"] == f"stereo:{codec.name}"
