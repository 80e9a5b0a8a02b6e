"""The report plays what was made: in a real browser, from file://, with nothing fetched from outside."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from musicgen import codec as codecs
from musicgen import generate, settings, wav, weights
from musicgen.conditioning import TextEncoder
from musicgen.config import ConditionConfig, LMConfig
from musicgen.lm import MusicLM
from pipelines.shard import ShardSet
from tests.training import small_music
from training import listening, report
from training.data import BatchConfig

BOOKS = 4


def _release(folder: Path, codec: codecs.Codec, seed: int, step: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = MusicLM(LMConfig(dim=32, num_layers=1, num_heads=2, condition=ConditionConfig("minilm", 384)))
    info = {
        "codec": {"name": codec.name, "identity": codec.identity},
        "text_encoder": {"name": "minilm", "identity": TextEncoder.load("minilm").identity},
        "training": {"step": step, "audio_seconds_seen": 60.0, "crop_seconds": 2.0, "valid_loss": 7.5},
        "licence": "CC0-1.0",
        "made_by": "tests",
    }
    return weights.save_release(folder, lm, info, torch.float16)


def _run(folder: Path) -> None:
    """The record of a run whose losses fall: codebook k lies 0.1 k above the first."""
    lines = []
    for step in range(5, 65, 5):
        values = [8.0 - step / 50 + 0.1 * k for k in range(BOOKS)]
        for split in ("train", "valid") if step % 20 == 0 else ("train",):
            losses = {f"{split}/loss_q{k + 1}": v for k, v in enumerate(values)}
            lines.append({"step": step, f"{split}/loss": float(np.mean(values)), **losses})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = settings.to_dict(BatchConfig(crop_seconds=2.0, size=2, workers=0, valid_crops=4, valid_batch=2))
    (folder / "config.yaml").write_text(yaml.safe_dump({"settings": {"batch": batch}}))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> report.ReportConfig:
    """A demo folder with data, run, shipped model and the finished report."""
    root = tmp_path_factory.mktemp("demo")
    codec = codecs.load(small_music.make_codec(root / "codec"))
    catalog = small_music.make_catalog(root / "music", 9)
    small_music.make_data(root / "data", catalog, codec, valid=3)
    _release(root / "run" / "release", codec, 0, 60)
    _run(root / "run")
    _release(root / "shipped", codec, 1, 9000)
    config = report.ReportConfig(
        folder=str(root), catalog=str(catalog), shipped=str(root / "shipped"), clips=3, seconds=2.0
    )
    report.build(config, [{"name": "train", "seconds": 75.2, "text": "60 steps & more"}])
    return config


@pytest.fixture(scope="module")
def text(demo: report.ReportConfig) -> str:
    return (Path(demo.folder) / "report" / "index.html").read_text(encoding="utf-8")


def test_clips_are_four_of_a_kind_and_marked(demo: report.ReportConfig) -> None:
    folder = Path(demo.folder) / "clips"
    clips = listening.read_clips(folder)
    assert clips is not None and len(clips) == 12
    assert [c.kind for c in clips] == ["run", "shipped", "codec", "original"] * 3
    assert sorted(c.style for c in clips if c.kind == "run") == sorted(small_music.STYLES)
    assert {c.split for c in clips} == {"valid"}
    by_kind = {kind: [c for c in clips if c.kind == kind] for kind in listening.KINDS}
    assert [c.seed for c in by_kind["run"]] == [c.seed for c in by_kind["shipped"]] == [0, 1, 2]
    shas = set()
    for clip in clips:
        mark = wav.read_marking(folder / clip.file)
        assert mark["generated"] is (clip.kind in ("run", "shipped"))
        assert ("digital_source_type" in mark) is mark["generated"]
        shas.add((folder / clip.file).read_bytes())
    assert len(shas) == 12
    original = next(c for c in clips if c.kind == "original")
    catalog = Path(demo.catalog)
    source, _ = soundfile.read(catalog.parent / "audio" / f"{original.track_id[1:]}.wav", dtype="float32")
    shown, _ = soundfile.read(folder / original.file, dtype="float32")
    assert np.abs(shown - source[: len(shown)]).max() < 1e-3, "the original is the track it says"
    ceiling = next(c for c in clips if c.kind == "codec" and c.track_id == original.track_id)
    assert ceiling.mel is not None and ceiling.mel > 0 and ceiling.chroma is not None


def test_the_run_clip_is_what_generate_makes_for_its_prompt_and_seed(demo: report.ReportConfig) -> None:
    clip = next(c for c in listening.read_clips(Path(demo.folder) / "clips") or [] if c.kind == "run")
    model = generate.load(demo.run_folder / "release")
    audio, _ = generate.generate(model, [clip.prompt], 2.0, [clip.seed or 0])
    shown, _ = soundfile.read(Path(demo.folder) / "clips" / clip.file, dtype="int16")
    assert np.array_equal(shown, wav.pcm16(audio[0])[0])


def test_second_time_keeps_the_clips_and_another_seed_makes_new_ones(demo: report.ReportConfig) -> None:
    folder = Path(demo.folder) / "clips"
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    report.make_clips(demo)
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    data = ShardSet.open(demo.data_uri)
    assert listening.read_clips(folder, {"seed": 1}) is None
    (folder / "00-run.wav").rename(folder / "gone")
    assert listening.read_clips(folder) is None, "a missing file is noticed"
    (folder / "gone").rename(folder / "00-run.wav")
    assert len(listening.choose_tracks(data, 20, 2.0)) == 9
    assert listening.choose_tracks(data, 3, 60.0) == []


def test_page_holds_everything_and_names_no_outside_address(text: str) -> None:
    assert text.count("<audio ") == 12 and text.count('src="data:audio/mpeg;base64,') == 12
    assert text.count('<img src="data:image/png;base64,') == 12
    assert text.count("<svg") == 1 + BOOKS
    allowed = ("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/ns#")
    outside = [u for u in re.findall(r"https?://[^\s\"'<>)]+", text) if not u.startswith(allowed)]
    assert outside == [], "namespaces of SVG aside, nothing points outside"
    assert not re.search(r"(src|href)=\"(?!data:|#|\.\./clips/)", text)
    for word in ("This run", "Shipped model", "Codec ceiling", "Original", "1 min 15 s", "60 steps &amp; more"):
        assert word in text
    assert "Waltz no." in text and "&lt;in C&gt;" in text and "<in C>" not in text, "titles are escaped"
    assert html.escape("<p id=card>The data card's own text") in text


def test_curves_hold_the_run_the_unigram_and_the_shipped_model(demo: report.ReportConfig, text: str) -> None:
    data = ShardSet.open(demo.data_uri)
    shipped = generate.load(demo.shipped)
    found = report.learning(demo.run_folder, data, shipped)
    assert found.train[0].tolist() == list(range(5, 65, 5)) and found.valid[0].tolist() == [20, 40, 60]
    assert found.valid[1][-1].tolist() == pytest.approx([6.95, 6.8, 6.9, 7.0, 7.1])
    assert found.shipped is not None and found.shipped[0] == pytest.approx(found.shipped[1:].mean())
    assert 7.0 < found.shipped[0] < 9.0, "an untrained model knows about log 2048 = 7.6 nats"
    assert not np.array_equal(found.unigram[1:], found.unigram[:-1])
    assert f"{found.shipped[2]:.3f}" in text and f"{found.unigram[1]:.3f}" in text and ">6.950<" in text
    svg = report.loss_svg(found, 1, wide=False)
    assert svg == report.loss_svg(found, 1, wide=False) and "currentColor" in svg


def test_without_a_shipped_model_the_page_says_so(demo: report.ReportConfig, tmp_path: Path) -> None:
    for part in ("data", "run"):
        shutil.copytree(Path(demo.folder) / part, tmp_path / part)
    config = report.ReportConfig(
        folder=str(tmp_path), catalog=demo.catalog, shipped=str(tmp_path / "nowhere"), clips=1, seconds=1.0
    )
    page = report.build(config).read_text(encoding="utf-8")
    assert "The shipped model could not be compared" in page and "nowhere" in page
    assert page.count("<audio ") == 3


def test_mp3_and_spectrogram() -> None:
    tone = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(64000) / 32000)[None]
    sound = report.mp3(tone.astype(np.float32), 32000)
    import io

    from PIL import Image

    read, rate = soundfile.read(io.BytesIO(sound))
    assert rate == 32000 and abs(len(read) / 32000 - 2.0) < 0.1
    picture = np.asarray(Image.open(io.BytesIO(report.spectrogram_png(tone, 32000))).convert("L")).astype(float)
    brightest = picture.mean(axis=1).argmax() / (len(picture) - 1)
    assert brightest == pytest.approx(1 - np.log(1000 / 60) / np.log(16000 / 60), abs=0.02), "1 kHz at its height"


def browser() -> str:
    """A Chromium to drive, or skip saying so."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: the page was not looked at in a browser (CI installs one)")
    return found


def in_browser(page: Path, profile: Path, *arguments: str) -> str:
    """Open a page headless and return the DOM after its scripts ran."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", *arguments, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.mark.slow
def test_a_real_browser_can_play_every_clip(demo: report.ReportConfig, tmp_path: Path) -> None:
    """Every clip's sound is decoded to its length by a real browser."""
    page = Path(demo.folder) / "report" / "index.html"
    dom = in_browser(page, tmp_path / "profile", "--dump-dom")
    assert re.search(r'id="state"[^>]*>12 clips ready to play<', dom)
    seconds = [float(s) for s in re.findall(r'data-seconds="([\d.]+)"', dom)]
    assert len(seconds) == 12 and all(abs(s - 2.0) < 0.15 for s in seconds)
