"""The check tells styles apart, finds a planted copy, silence and noise, and does not praise a random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen import codec as codecs
from musicgen import generate, wav, weights
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.metrics import style
from pipelines import shard
from training import music_check

STYLES = ("reel", "waltz", "samba")


def _codes(rng: np.random.Generator, name: str, frames: int) -> np.ndarray:
    """Codes of a style: each style has its own 200 entries."""
    low = 200 * STYLES.index(name)
    return rng.integers(low, low + 200, (4, frames))


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> codecs.Codec:
    folder = tmp_path_factory.mktemp("codec")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = codecs.build(
            codecs.CodecConfig(num_filters=4, hidden_size=16, ratios=(4, 4, 5, 8), num_lstm_layers=1)
        )
        for layer in network.quantizer.layers:
            layer.codebook.embed.normal_(std=0.1)
    return codecs.load(codecs.save(network, folder / "codec"))


@pytest.fixture(scope="module")
def data(codec: codecs.Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 30 tracks in three styles, as ingest lays it out."""
    root = tmp_path_factory.mktemp("data")
    (root / "shards").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 24), ("valid", 6)):
        records, metas = [], []
        for i in range(count):
            name = STYLES[i % 3]
            codes = _codes(rng, name, 500 + 10 * i)
            text = [{"text": f"a {name}, number {i} of {split}", "language": "en"}]
            metas.append({"key": f"{split}{i:03d}", "genre": name, "descriptions": text, "frames": codes.shape[1]})
            records.append(shard.make_record(codes, np.zeros(codes.shape[1] // 6, np.uint8), metas[-1]))
        path = f"shards/{split}-00000.tar"
        for meta, extent in zip(metas, shard.write_tar(str(root / path), records)):
            frames = meta["frames"]
            fixed = {"track_id": meta["key"], "artist": "a", "work": "w", "language": "en", "licence": "CC0-1.0"}
            more = {"shard": path, "split": split, "genre": meta["genre"], "frames": frames, "withdrawn": False}
            rows.append({**fixed, **more, **extent, "weight": 1.0, "duration_seconds": frames / 50})
    index = shard.index_table(rows)
    (root / "index.parquet").write_bytes(shard.table_bytes(index))
    info = {
        "schema_version": shard.SCHEMA_VERSION,
        "codec": codecs.describe(codec),
        "dataset_version": shard.dataset_version(index),
    }
    (root / "dataset.json").write_text(json.dumps(info))
    return root


@pytest.fixture(scope="module")
def release(codec: codecs.Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = MusicLM(LMConfig(dim=32, num_layers=1, num_heads=2, condition=ConditionConfig("minilm", 384)))
    info = {
        "codec": {"name": codec.name, "identity": codec.identity},
        "text_encoder": {"name": "minilm", "identity": TextEncoder.load("minilm").identity},
        "training": {"step": 0, "crop_seconds": 10.0},
    }
    return weights.save_release(tmp_path_factory.mktemp("model") / "release", lm, info)


def test_command_tells_a_random_model_from_real_clips(
    release: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    argv = ["--model", str(release), "--data", str(data), "--duration", "5", "--out", str(out)]
    assert music_check.main([*argv, "--clips", str(tmp_path / "clips")]) == 1
    found = json.loads(out.read_text())
    assert found["clips"] == 12 and found["styles"] == sorted(STYLES)
    assert found["ceiling_hits"] == found["ceiling_clips"] == 6
    assert found["binomial_p"] > 0.01 and not found["verdict"]["in_style"] and found["verdict"]["nothing_memorised"]
    assert found["binomial_p"] == pytest.approx(style.binomial_p(found["hits"], 12, 1 / 3))
    text = capsys.readouterr().out
    assert "NOT passed: in style" in text and "held-out clips 6 of 6" in text
    clips = sorted((tmp_path / "clips").iterdir())
    assert len(clips) == 12 and wav.read_marking(clips[0])["generated"] is True
    assert all(c["prompt"].startswith(f"a {c['asked']}, number") for c in found["generated"])


def test_prompts_are_held_out_first_then_training_and_fixed_by_the_seed(data: Path) -> None:
    opened = shard.ShardSet.open(str(data))
    chosen = music_check.choose_prompts(opened, ["reel", "samba"], 4, 0)
    assert [name for name, _ in chosen] == ["reel"] * 4 + ["samba"] * 4
    assert len(set(chosen)) == 8
    assert ["valid" in text for _, text in chosen] == [True, True, False, False] * 2
    assert chosen == music_check.choose_prompts(opened, ["reel", "samba"], 4, 0)
    assert chosen != music_check.choose_prompts(opened, ["reel", "samba"], 4, 1)
    assert music_check.commonest_styles(opened, 2) == ["reel", "samba"]


def test_a_copy_silence_and_noise_fail_the_verdict(release: Path, data: Path) -> None:
    model = generate.load(release)
    opened = shard.ShardSet.open(str(data))
    train = [int(r) for r in opened.rows("train")]
    genre, key = (opened.index.column(c).to_pylist() for c in ("genre", "key"))
    vectors = [music_check.embed_clips(model, np.asarray(opened.codes(r)), 250)[0] for r in train]
    styles = style.style_centroids(np.stack(vectors), [genre[r] for r in train])
    index = style.CodeIndex((key[r], opened.codes(r)) for r in train)
    config = music_check.MusicCheckConfig(duration=5.0)
    rng = np.random.default_rng(5)
    t = np.arange(160000) / 32000
    tone = (0.1 * np.sin(2 * np.pi * 440 * t) + 0.05 * np.sin(2 * np.pi * 660 * t)).astype(np.float32)[None]

    def verdict(copied: bool = False, audio: np.ndarray = tone) -> dict[str, bool]:
        clips = []
        for i in range(12):
            codes = _codes(rng, STYLES[i % 3], 300)
            if copied and i == 7:
                codes[0, 20:280] = opened.codes(train[4])[0, 100:360]
            labels = {"asked": STYLES[i % 3], "prompt": "", "seed": i}
            clips.append(music_check.measure(model, styles, index, codes, audio, **labels))
        return music_check.result(config, model, opened, STYLES, clips, [])["verdict"]

    assert verdict() == {"in_style": True, "no_silence": True, "no_noise": True, "nothing_memorised": True}
    assert not verdict(copied=True)["nothing_memorised"]
    assert not verdict(audio=0 * tone)["no_silence"]
    assert not verdict(audio=rng.normal(0, 0.1, tone.shape).astype(np.float32))["no_noise"]


def test_data_of_another_codec_and_short_clips_are_refused(release: Path, data: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(data, tmp_path / "other")
    info = json.loads((other / "dataset.json").read_text())
    info["codec"]["identity"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"holds tokens of codec .*give the data set the model was trained on"):
        music_check.check(music_check.MusicCheckConfig(model=str(release), data=str(other)))
    with pytest.raises(ValueError, match="at least 5 s"):
        music_check.MusicCheckConfig(duration=2.0)
