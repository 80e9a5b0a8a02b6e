"""`make assets` made small: music, codec, tokens and model follow from each other and go on where they were stopped."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from musicgen import codec as codecs
from musicgen import weights
from pipelines.demo.catalogue import plan_hours
from pipelines.demo.styles import split_side
from pipelines.shard import ShardSet
from training import assets, finetune_check, sources

CODEC = {
    "size": "demo", "batch_size": 2, "crop_seconds": 1.0, "warmup_steps": 2, "cooldown_steps": 2, "validate_every": 6,
    "validation_tracks": 1, "quantiser": {"kmeans_iterations": 1, "kmeans_latents": 2100},
}  # fmt: skip
REFINE = CODEC | {"warmup_steps": 0, "lr": 1.0e-4}
MODEL = {"batch": {"size": 2, "valid_crops": 2}, "log": {"valid_every": 3, "state_every": 3, "clips": 0}}


def test_figures_belong_to_the_weights_that_ship() -> None:
    """Whoever changes shipped weights measures them anew."""
    folder = codecs.DEMO_FOLDER.parent
    figures = json.loads((folder / "figures.json").read_text())
    for name, known in figures["sha256"].items():
        assert hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest() == known, name
    assert figures["codec"]["codec"]["identity"] == codecs.load().identity
    assert figures["music_check"]["passed"]


def test_held_out_music_is_by_artists_whom_the_demo_model_has_not_heard() -> None:
    shards = sources.open_data(str(codecs.DEMO_FOLDER.parent / "held_out"))
    assert shards.info["codec"]["identity"] == codecs.load().identity
    artists = set(shards.index.column("artist").to_pylist())
    assert len(artists) == 14 and {split_side(name) for name in artists} == {"valid"}
    assert not len(shards.rows("train")) and len({len(shards.meta(row)["captions"]) for row in range(len(shards))}) == 1
    assert len(finetune_check.unheard_artists(shards, 12.5)) < 14  # ten minutes to learn from, a fifth held out, a rest
    planned = plan_hours(0.5, assets.AssetsConfig().music_seed + 1, held_out=True)
    assert {track.track_id for track in planned} == set(shards.index.column("track_id").to_pylist())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_that_ships_is_rebuilt_in_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if shutil.which("fluidsynth") is None:
        pytest.skip("fluidsynth is not installed: music cannot be rendered")
    for name, tree in (("codec", CODEC), ("refine", REFINE), ("model", MODEL)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    shipped = tmp_path / "shipped"
    words = [
        "--work", str(tmp_path / "work"), "--shipped", str(shipped), "--hours", "0.5",
        "--held_out_hours", "0.02",
        "--codec_configs", f"[{tmp_path / 'codec.yaml'},{tmp_path / 'refine.yaml'}]", "--codec_steps", "[6,6]",
        "--model_config", str(tmp_path / "model.yaml"), "--model_steps", "3",
    ]  # fmt: skip
    assert assets.main([*words, "--only", "[music,codec]"]) == 0
    assert assets.main([*words, "--only", "[music,codec,tokens,held_out,model]"]) == 0
    told = capfd.readouterr().out
    assert told.count("music: already whole") == 1 and "codec: already whole" in told

    identity = codecs.load(shipped / "codec").identity
    tokens = ShardSet.open(str(tmp_path / "work" / "tokens"))
    assert tokens.info["codec"]["identity"] == identity and len(tokens) > 10
    held_out = ShardSet.open(str(shipped / "held_out"))
    assert held_out.info["codec"]["identity"] == identity and len(held_out.rows("valid")) == len(held_out) > 0
    _, info = weights.load_release(shipped / "model")
    assert info["codec"]["identity"] == identity
    assert info["training"]["data_version"] == tokens.info["dataset_version"]

    # Another codec: its tokens and its model are made anew, the music stays.
    config = json.loads(json.dumps(CODEC)) | {"seed": 7}
    (tmp_path / "codec.yaml").write_text(yaml.safe_dump(config))
    starts = {name: assets._start_of(name, _config(words)) for name in ("music", "tokens", "model")}
    assert assets.main([*words, "--only", "[music,codec]"]) == 0
    assert assets._start_of("music", _config(words)) == starts["music"]
    assert assets._start_of("tokens", _config(words)) != starts["tokens"]
    assert assets._start_of("model", _config(words)) != starts["model"]
    assert assets.main([*words, "--only", "[tokens]"]) == 0
    other = codecs.load(shipped / "codec").identity
    assert other != identity and ShardSet.open(str(tmp_path / "work" / "tokens")).info["codec"]["identity"] == other


def _config(words: list[str]) -> assets.AssetsConfig:
    from musicgen import settings

    return settings.parse(assets.AssetsConfig, words, prog="python -m training.assets")
