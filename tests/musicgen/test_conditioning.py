"""Text encoders: the packaged one, a T5 made on the spot, the null condition, word dropout, and what users see."""

from pathlib import Path

import numpy as np
import pytest
import torch

from musicgen import conditioning
from musicgen.conditioning import TextEncoder, drop_words
from musicgen.errors import UserError


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder.load("minilm")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random T5 with a word-level tokenizer, saved as transformers saves any."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "slow", "fast", "piano", "waltz", "drums"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_minilm_is_the_published_one(minilm: TextEncoder) -> None:
    assert minilm.dim == 384
    hidden, mask = minilm.encode(["slow waltz for piano", "a much longer caption: brass, drums and strings, 120 bpm"])
    assert hidden.dtype == torch.float32 and hidden.shape[:2] == mask.shape and hidden.shape[2] == 384
    assert mask[0].sum() < mask[1].sum() == hidden.shape[1]
    assert (hidden[0, ~mask[0]] == 0).all()
    assert not any(p.requires_grad for p in minilm.model.parameters())


def test_minilm_means_something(minilm: TextEncoder) -> None:
    hidden, mask = minilm.encode(["a fast jazz tune", "quick jazz music", "a court ruling on taxes"])
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    near, far = (torch.cosine_similarity(mean[0], mean[i], dim=0) for i in (1, 2))
    assert near > 0.6 and far < near - 0.3


def test_altered_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditioning, "MINILM_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not the published ones"):
        TextEncoder.load("minilm")


def test_null_condition(minilm: TextEncoder) -> None:
    hidden, mask = minilm.encode([None, "", "  "])
    assert hidden.shape[1] >= 1 and not mask.any() and (hidden == 0).all()
    hidden, mask = minilm.encode(["jazz", None, "jazz"])
    assert mask[0].any() and not mask[1].any() and (hidden[1] == 0).all()
    assert torch.equal(hidden[0], hidden[2])


def test_neighbours_do_not_change_a_caption(minilm: TextEncoder) -> None:
    alone, _ = minilm.encode(["slow waltz"])
    among, mask = minilm.encode(["slow waltz", "a caption with very many more words than the other one has"])
    torch.testing.assert_close(among[0, mask[0]], alone[0], atol=1e-5, rtol=1e-4)


def test_a_very_long_caption_is_cut_not_fatal(minilm: TextEncoder) -> None:
    hidden, mask = minilm.encode(["piano and strings " * 400])
    assert hidden.shape[1] == 512 and mask.all()


def test_unknown_share(minilm: TextEncoder) -> None:
    assert minilm.unknown_share("slow waltz for piano") == 0
    assert minilm.unknown_share("") == 0 and minilm.unknown_share(None) == 0
    assert minilm.unknown_share("ქართული ხალხური სიმღერა") > 0.5
    assert 0 < minilm.unknown_share("jazz piano ქართული") < 0.5


def test_t5_from_a_folder(t5_folder: Path) -> None:
    encoder = TextEncoder.load(str(t5_folder))
    assert encoder.dim == 32
    hidden, mask = encoder.encode(["slow piano waltz", "drums", None])
    assert mask.sum(dim=1).tolist() == [4, 2, 0]  # words and the end token
    assert hidden.dtype == torch.float32 and (hidden[2] == 0).all()
    again, _ = encoder.encode(["fast piano waltz"])
    assert not torch.allclose(again[0], hidden[0])
    assert encoder.unknown_share("slow xylophone") == 0.5
    # T5 has relative positions: nothing is cut.
    assert encoder.encode(["piano " * 700])[0].shape[1] == 701


def test_identity_follows_the_weights(t5_folder: Path, tmp_path: Path) -> None:
    first = TextEncoder.load(str(t5_folder))
    again = TextEncoder.load(str(t5_folder))
    assert first.identity == again.identity
    with torch.no_grad():
        next(again.model.parameters())[0, 0] += 1
    assert TextEncoder("changed", again.model, again.tokenizer).identity != first.identity


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def no_network() -> None:
        raise OSError("no network")

    monkeypatch.setattr(conditioning, "_reach_hub", no_network)
    with pytest.raises(UserError, match=r"(?s)'no-such/encoder'.*hf download no-such/encoder.*minilm"):
        TextEncoder.load("no-such/encoder")


def test_missing_or_broken_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        TextEncoder.load(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot be read.*config\.json"):
        TextEncoder.load(str(tmp_path / "empty"))


def test_word_dropout() -> None:
    text = " ".join(f"w{i}" for i in range(4000))
    kept = drop_words(text, 0.3, np.random.default_rng(0)).split(" ")
    assert len(kept) / 4000 == pytest.approx(0.7, abs=0.03)
    assert [w for w in text.split(" ") if w in set(kept)] == kept  # order kept
    assert drop_words(text, 0.3, np.random.default_rng(0)) == " ".join(kept)
    assert drop_words(text, 0.3, np.random.default_rng(1)) != " ".join(kept)
    assert drop_words(text, 0.0, np.random.default_rng(0)) == text
    assert drop_words("piano", 1.0, np.random.default_rng(0)) == ""
