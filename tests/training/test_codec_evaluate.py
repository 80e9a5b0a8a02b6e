"""The evaluation of a codec: measures that tell better from worse, bits that were spent, a page that plays."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from musicgen import codec as codecs
from musicgen.errors import UserError
from tests.training import small_music
from tests.training.test_report import in_browser
from training.codec import data, evaluate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished evaluation of a random codec on a small catalogue."""
    root = tmp_path_factory.mktemp("evaluation")
    small_music.make_catalog(root / "music", 9, 4.0)
    small_music.make_codec(root / "codec")
    assert evaluate.main(arguments(root)) == 0
    return root


def arguments(root: Path) -> list[str]:
    argv = ["--codec", str(root / "codec"), "--data", str(root / "music" / "catalog.jsonl")]
    argv += ["--cache", str(root / "pcm"), "--out", str(root / "figures.json"), "--page", str(root / "index.html")]
    return [*argv, "--clips", "2", "--clip_seconds", "2", "--splits.train", "0.6", "--splits.valid", "0.4"]


def test_figures(made: Path) -> None:
    figures = json.loads((made / "figures.json").read_text())
    codec, low, high = figures["systems"].values()
    assert list(figures["systems"])[1:] == ["opus 6 kbit/s", "opus 12 kbit/s"]
    assert codec["bits_per_second"] == 4 * 50 * 11
    assert low["bits_per_second"] == pytest.approx(6000, rel=0.35)
    assert low["bits_per_second"] < high["bits_per_second"] == pytest.approx(12_000, rel=0.35)
    for measure in ("log_mel", "mel_scales"):
        assert high[measure] < low[measure] < codec[measure], "a codec that learned nothing is worst"
    assert high["si_sdr"] > low["si_sdr"] > codec["si_sdr"]
    assert high["chroma"] > codec["chroma"]
    assert len(figures["used"]) == 4 and all(0 < share <= 1 for share in figures["used"])
    assert 0 < figures["entropy_bits_per_second"] < codec["bits_per_second"]


def test_use_and_perplexity_are_of_all_codes(made: Path) -> None:
    codec = codecs.load(made / "codec")
    sound = (np.random.default_rng(0).normal(size=(1, 64_000)) * 0.1).astype(np.float32)
    pcm = data.Pcm((sound * 32_768).astype(np.int16), np.array([0, 32_000, 64_000]), ["a", "b"])
    used, perplexity = evaluate.codebook_use(codec, [pcm])
    codes = np.concatenate([codec.encode_track(pcm.track(i)) for i in (0, 1)], axis=1)
    for level in range(4):
        counts = np.unique(codes[level], return_counts=True)[1] / codes.shape[1]
        assert used[level] == pytest.approx(len(counts) / 2048)
        assert perplexity[level] == pytest.approx(np.exp(-(counts * np.log(counts)).sum()))


def test_the_page_is_whole_and_asks_nobody(made: Path) -> None:
    text = (made / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "http" not in text.replace("http-equiv", "")
    assert text.count("<audio") == text.count('alt="spectrogram"') == 2 * 4
    assert text.count('class="clip original"') == 2 and "Opus 12 kbit/s" in text
    figures = json.loads((made / "figures.json").read_text())
    for row in figures["systems"].values():
        assert f"<td>{row['log_mel']:.4f}</td>" in text and f"<td>{row['si_sdr']:.1f}</td>" in text


@pytest.mark.slow
def test_a_real_browser_can_play_every_clip(made: Path, tmp_path: Path) -> None:
    dom = in_browser(made / "index.html", tmp_path / "profile", "--dump-dom")
    assert re.search(r'id="state"[^>]*>8 clips ready to play<', dom)


def test_another_catalogue_is_decoded_anew(made: Path) -> None:
    """The cache belongs to one catalogue as it is now: what was decoded of it before is not measured again."""
    config = evaluate.CodecEvalConfig(data=str(made / "music" / "catalog.jsonl"), cache=str(made / "pcm"))
    codec = codecs.load(made / "codec")
    before = evaluate._cache(config, codec)
    path = made / "music" / "catalog.jsonl"
    text = path.read_text()
    path.write_text(text.replace("Artist 1", "Artist One"))
    assert evaluate._cache(config, codec) != before
    path.write_text(text)
    assert evaluate._cache(config, codec) == before


def test_data_that_is_none(tmp_path: Path) -> None:
    for name in ("gone", "gone.jsonl", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"neither a catalogue|does not exist|cannot be"):
            evaluate.main(["--data", str(tmp_path / name), "--cache", str(tmp_path / "pcm")])


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="6000 to 510000"):
        evaluate.CodecEvalConfig(opus=(100,))
    empty = data.Pcm(np.zeros((1, 0), np.int16), np.zeros(1, np.int64), [])
    with pytest.raises(UserError, match="no tracks to measure"):
        evaluate.measure(codecs.tiny(), empty, (6000,), 5.0)
