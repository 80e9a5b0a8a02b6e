"""Text encoders: the packaged one, a T5 made on the spot, the null condition, word dropout, and what users see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musicgen import conditioning
from musicgen.conditioning import TextEncoder, drop_words
from musicgen.errors import UserError


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder.load("minilm")


def tokenizer(start: str | None = None) -> Any:
    """A word-level tokenizer that ends every caption, and begins it where asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "slow", "fast", "piano", "waltz", "drums", "<s>"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A </s>" if start is None else f"{start} $A </s>"
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<s>", 8)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def small(kind: str) -> Any:
    """A small random encoder of each kind that the settings allow, as transformers builds it."""
    import transformers as tf

    torch.manual_seed(0)
    shape = {"vocab_size": 9, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    if kind == "t5":
        return tf.T5EncoderModel(tf.T5Config(**shape))
    if kind == "flan-t5":
        return tf.T5EncoderModel(tf.T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    if kind == "mt5":
        return tf.MT5EncoderModel(tf.MT5Config(**shape))
    if kind == "umt5":
        return tf.UMT5EncoderModel(tf.UMT5Config(**shape))
    if kind == "whole t5":  # as the hub's folders: encoder and decoder together, of which we want the encoder
        return tf.T5ForConditionalGeneration(tf.T5Config(**shape))
    text = tf.ClapTextConfig(
        vocab_size=9, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=90, projection_dim=32, pad_token_id=0,
    )  # fmt: skip
    if kind == "clap text":
        return tf.ClapTextModelWithProjection(text)
    audio = {"depths": [1, 1], "num_attention_heads": [1, 1], "patch_embeds_hidden_size": 8, "hidden_size": 16}
    audio |= {"num_hidden_layers": 2, "spec_size": 64, "num_mel_bins": 16, "projection_dim": 32, "window_size": 4}
    return tf.ClapModel(tf.ClapConfig(text_config=text.to_dict(), audio_config=audio, projection_dim=32))


def saved(kind: str, folder: Path) -> Path:
    small(kind).save_pretrained(folder)
    tokenizer("<s>" if "clap" in kind else None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random T5 with a word-level tokenizer, saved as transformers saves any."""
    return saved("t5", tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("kind", ["t5", "flan-t5", "mt5", "umt5", "whole t5", "clap text", "clap"])
def test_every_encoder_of_the_settings(kind: str, tmp_path: Path) -> None:
    encoder = TextEncoder.load(str(saved(kind, tmp_path)))
    assert encoder.dim == 32 and encoder.name == str(tmp_path)
    captions = ["slow piano waltz", "drums", None]
    hidden, mask = encoder.encode(captions)
    given = encoder.tokenizer(captions[:2], padding=True, return_tensors="pt")
    given.pop("token_type_ids", None)
    model = small(kind)
    with torch.no_grad():
        if "clap" in kind:  # one normalised embedding per caption
            model = model.eval()
            expected = (
                model(**given).text_embeds if kind == "clap text" else model.get_text_features(**given).pooler_output
            )
            expected = torch.nn.functional.normalize(expected, dim=-1)[:, None]
            assert hidden.shape == (3, 1, 32) and mask.tolist() == [[True], [True], [False]]
            torch.testing.assert_close(hidden[:2].norm(dim=-1), torch.ones(2, 1))
            assert encoder.encode(["piano " * 200])[0].shape == (1, 1, 32)
        else:
            half = model.get_encoder() if kind == "whole t5" else model
            expected = half.eval()(**given).last_hidden_state
            assert hidden.shape == (3, 4, 32) and mask.sum(dim=1).tolist() == [4, 2, 0]
            expected = expected.masked_fill(~mask[:2, :, None], 0.0)
            # Relative positions: nothing is cut.
            assert encoder.encode(["piano " * 700])[0].shape[1] == 701
    torch.testing.assert_close(hidden[:2], expected, atol=1e-5, rtol=1e-4)
    assert (hidden[2] == 0).all() and not torch.allclose(hidden[0], hidden[1])
    assert not any(p.requires_grad for p in encoder.model.parameters())


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


def test_words_a_t5_does_not_know(t5_folder: Path) -> None:
    assert TextEncoder.load(str(t5_folder)).unknown_share("slow xylophone") == 0.5


def test_identity_follows_the_weights(t5_folder: Path, tmp_path: Path) -> None:
    first = TextEncoder.load(str(t5_folder))
    again = TextEncoder.load(str(t5_folder))
    assert first.identity == again.identity
    with torch.no_grad():
        next(again.model.parameters())[0, 0] += 1
    assert TextEncoder("changed", again.model, again.tokenizer).identity != first.identity


def test_identity_follows_the_vocabulary(t5_folder: Path) -> None:
    """The same weights behind words of other numbers hear other captions."""
    first, other = (TextEncoder.load(str(t5_folder)) for _ in range(2))
    other.tokenizer.add_tokens(["xylophone"])
    assert first.identity != other.identity


def test_an_encoder_hears_in_float32_whatever_the_training_computes_in(t5_folder: Path) -> None:
    encoder = TextEncoder.load(str(t5_folder))
    plain, _ = encoder.encode(["slow piano waltz"])
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = encoder.encode(["slow piano waltz"])
    assert torch.equal(plain, under)


@pytest.mark.parametrize(("length", "expected"), [(1, 8), (7, 8), (8, 8), (9, 16)])
def test_captions_are_padded_up_to_a_multiple_with_what_nobody_hears(length: int, expected: int) -> None:
    hidden, mask = conditioning.padded(torch.ones(2, length, 3), torch.ones(2, length, dtype=torch.bool), 8)
    assert hidden.shape == (2, expected, 3) and mask.shape == (2, expected)
    assert mask[:, :length].all() and not mask[:, length:].any() and not hidden[:, length:].any()


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
