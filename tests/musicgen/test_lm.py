"""The language model: sizes, initialisation, step against forward, conditions, and transformers as an oracle."""

import math
from dataclasses import replace

import pytest
import torch

from musicgen.config import SIZES, ConditionConfig, LMConfig, size
from musicgen.lm import MusicLM
from musicgen.transformer import sinusoid

TINY = LMConfig(
    dim=48, num_layers=3, num_heads=4, codebook_size=64, condition=ConditionConfig(text_encoder="minilm", text_dim=20)
)


def tiny(config: LMConfig = TINY, seed: int = 0) -> MusicLM:
    torch.manual_seed(seed)
    return MusicLM(config).eval()


def inputs(batch: int = 3, columns: int = 11, text: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 65, (batch, 4, columns), generator=g)
    return tokens, torch.randn(batch, text, 20, generator=g), torch.ones(batch, text, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "expected"), [("300m", 420_371_456), ("1.5b", 1_838_737_920), ("3.3b", 3_256_956_928), ("demo", None)]
)
def test_parameter_counts(name: str, expected: int | None) -> None:
    config = size(name)
    with torch.device("meta"):
        lm = MusicLM(config)
    assert lm.num_parameters() == config.num_parameters()
    if expected is not None:
        assert lm.num_parameters() == expected
    else:
        assert 2 * lm.num_parameters() <= 8e6  # the shipped demo model, float16


@pytest.mark.parametrize(
    ("name", "expected"), [("300m", 319_672_320), ("1.5b", 1_385_625_600), ("3.3b", 2_451_480_576)]
)
def test_melody_sizes_without_cross_attention(name: str, expected: int) -> None:
    config = replace(SIZES[name], cross_attention=False, condition=ConditionConfig(melody=True))
    with torch.device("meta"):
        lm = MusicLM(config)
    assert lm.num_parameters() == config.num_parameters() == expected


def test_names_are_those_of_the_reference() -> None:
    names = set(tiny().state_dict())
    for expected in (
        "emb.3.weight",
        "linears.0.weight",
        "out_norm.bias",
        "transformer.layers.2.self_attn.in_proj_weight",
        "transformer.layers.0.self_attn.out_proj.weight",
        "transformer.layers.0.cross_attention.in_proj_weight",
        "transformer.layers.1.norm_cross.weight",
        "transformer.layers.1.linear2.weight",
        "condition_provider.conditioners.description.output_proj.bias",
    ):
        assert expected in names
    biases = {n for n in names if n.endswith("bias")}
    assert all("norm" in n or "output_proj" in n for n in biases)


def test_initialisation_of_the_reference() -> None:
    torch.manual_seed(0)
    config = replace(TINY, dim=256, codebook_size=512)
    lm = MusicLM(config)
    cut = 0.9866  # standard deviation of a unit normal cut at three sigma
    d = config.dim

    def spread(name: str) -> float:
        return float(lm.get_parameter(name).std())

    assert spread("emb.1.weight") == pytest.approx(cut / math.sqrt(d), rel=0.02)
    assert spread("linears.2.weight") == pytest.approx(cut / math.sqrt(d), rel=0.02)
    for layer in range(3):
        depth = math.sqrt(2 * (layer + 1))
        prefix = f"transformer.layers.{layer}"
        assert spread(f"{prefix}.linear1.weight") == pytest.approx(cut / math.sqrt(d) / depth, rel=0.02)
        assert spread(f"{prefix}.linear2.weight") == pytest.approx(cut / math.sqrt(4 * d) / depth, rel=0.02)
        assert spread(f"{prefix}.cross_attention.out_proj.weight") == pytest.approx(
            cut / math.sqrt(d) / depth, rel=0.03
        )
        packed = lm.get_parameter(f"{prefix}.self_attn.in_proj_weight")
        assert float(packed.std()) == pytest.approx(1 / math.sqrt(3 * d), rel=0.02)  # uniform, without depth
        assert float(packed.abs().max()) <= 1 / math.sqrt(d)
    biggest = float(lm.get_parameter("emb.0.weight").abs().max())
    assert biggest <= 3 / math.sqrt(d)


def test_sinusoid() -> None:
    table = sinusoid(torch.arange(1504), 64)
    assert table.dtype == torch.float32
    assert torch.equal(table[0], torch.cat([torch.ones(32), torch.zeros(32)]))
    slowest = 1 / 10_000  # exponent 1 at index half - 1: the denominator is half - 1
    assert float(table[7, 63]) == pytest.approx(math.sin(7 * slowest), rel=1e-5)
    assert float(table[7, 32]) == pytest.approx(math.sin(7), rel=1e-5)
    assert len(torch.unique(table, dim=0)) == 1504


def test_positions_survive_bfloat16() -> None:
    lm = tiny().bfloat16()
    same = torch.zeros(1, 4, 600, dtype=torch.long)
    hidden = lm.hidden(same, torch.zeros(1, 1, 20, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.bool))
    assert hidden.dtype == torch.bfloat16 and torch.isfinite(hidden).all()


def melody_config(cross: bool = False, melody: bool = True, null: str = "zeros") -> LMConfig:
    condition = replace(TINY.condition, melody=melody, chroma_frames=7, null=null)  # type: ignore[arg-type]
    return replace(TINY, cross_attention=cross, condition=condition)


MELODY = torch.tensor([[0, 4, 7, 11, 255], [2, 2, 2, 9, 9], [255] * 5])


def test_the_future_is_not_seen() -> None:
    lm = tiny()
    tokens, text, mask = inputs()
    other = tokens.clone()
    other[..., 6:] = (other[..., 6:] + 1) % 64
    torch.testing.assert_close(lm(tokens, text, mask)[..., :6, :], lm(other, text, mask)[..., :6, :])
    assert not torch.allclose(lm(tokens, text, mask)[..., 6:, :], lm(other, text, mask)[..., 6:, :])


def test_text_changes_the_logits_and_padding_does_not() -> None:
    lm = tiny()
    tokens, text, mask = inputs()
    base = lm(tokens, text, mask)
    assert (lm(tokens, text + 0.5, mask) - base).abs().max() > 1e-3
    padded = torch.cat([text, torch.randn(3, 4, 20)], dim=1)
    wider = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(lm(tokens, padded, wider), base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("melody", [True, False])
def test_a_prefix_does_not_depend_on_padding(melody: bool) -> None:
    lm = tiny(melody_config(melody=melody))
    tokens, text, mask = inputs()
    chroma = MELODY if melody else None
    mask[1, 2:] = False
    mask[2] = False
    base = lm(tokens, text, mask, chroma)
    padded = torch.cat([text, torch.randn(3, 4, 20)], dim=1)
    wider = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(lm(tokens, padded, wider, chroma), base, atol=1e-5, rtol=1e-5)
    alone = lm(tokens[1:2], text[1:2, :2], mask[1:2, :2], None if chroma is None else chroma[1:2])
    torch.testing.assert_close(alone[0], base[1], atol=1e-5, rtol=1e-5)


def test_the_prefix_is_heard_and_the_future_is_not() -> None:
    lm = tiny(melody_config())
    tokens, text, mask = inputs()
    base = lm(tokens, text, mask, MELODY)
    assert ((lm(tokens, text + 0.5, mask, MELODY) - base).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    other = MELODY.clone()
    other[:, 4] = 5
    assert ((lm(tokens, text, mask, other) - base).abs().amax(dim=(1, 2, 3)) > 1e-4).all()
    later = tokens.clone()
    later[..., 6:] = (later[..., 6:] + 1) % 64
    torch.testing.assert_close(lm(later, text, mask, MELODY)[..., :6, :], base[..., :6, :])
    with_cross = tiny(melody_config(cross=True))
    heard = with_cross(tokens, text, mask, MELODY) - with_cross(tokens, text, mask, other)
    assert (heard.abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_a_melody_is_repeated_or_cut_to_its_frames() -> None:
    lm = tiny(melody_config())
    tokens, text, mask = inputs()
    base = lm(tokens, text, mask, MELODY)
    repeated = torch.cat([MELODY, MELODY[:, :2]], dim=1)
    assert torch.equal(lm(tokens, text, mask, repeated), base)
    assert torch.equal(lm(tokens, text, mask, torch.cat([repeated, MELODY], dim=1)), base)


@pytest.mark.parametrize(("null", "bin_"), [("zeros", None), ("released", 0)])
def test_a_missing_melody(null: str, bin_: int | None) -> None:
    lm = tiny(melody_config(null=null))
    tokens, text, mask = inputs()
    missing = lm(tokens, text, mask)
    assert torch.equal(missing, lm(tokens, text, mask, torch.full((3, 2), 255)))
    as_c = lm(tokens, text, mask, torch.zeros(3, 1))
    assert torch.equal(missing, as_c) == (bin_ == 0)
    mask[1] = False
    places = lm.null_places(torch.tensor([[True, True, False]]))
    assert places.tolist() == ([[True, True, False]] if null == "released" else [[True, False, False]])
    # A null text is one zero unless its places are given: zeros as long as the prompt are something else.
    one = torch.zeros(1, 6, dtype=torch.bool)
    one[0, 0] = True
    null_row = (tokens[1:2], text[1:2], mask[1:2], None)
    assert torch.equal(lm(*null_row), lm(*null_row, one))
    assert not torch.allclose(lm(*null_row), lm(*null_row, torch.ones(1, 6, dtype=torch.bool)))
    with pytest.raises(ValueError, match="no melody input"):
        tiny()(tokens, text, mask, MELODY)


def test_null_condition_is_exactly_zero() -> None:
    lm = tiny()
    tokens, text, mask = inputs()
    mask[1] = False
    block = lm.transformer.layers[0]
    of_text = torch.randn(3, 6, 48)  # masked places need not be zero
    out = block.cross_attention.cross(torch.randn(3, 5, 48), of_text, mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert (out[0].abs().sum() > 0) and torch.isfinite(out).all()
    # So its logits do not depend on what stands in the masked text, to the bit, nor on its length but for rounding.
    torch.testing.assert_close(lm(tokens, text * 3, mask)[1], lm(tokens, text, mask)[1], atol=0, rtol=0)
    nothing = lm(tokens[1:2], torch.zeros(1, 1, 20), torch.zeros(1, 1, dtype=torch.bool))
    torch.testing.assert_close(nothing[0], lm(tokens, text, mask)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, melody_config()])
def test_gradients_are_finite_with_null_rows(config: LMConfig) -> None:
    lm = tiny(config)
    tokens, text, mask = inputs()
    mask[0] = False
    lm(tokens, text, mask, MELODY if config.condition.melody else None).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lm.parameters())


def test_logits_equal_those_of_transformers() -> None:
    """MusicgenForCausalLM with our random weights: an implementation that is not ours says the same."""
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, num_layers=2)
    lm = tiny(config)
    oracle_config = transformers.MusicgenDecoderConfig(
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=192,
        num_codebooks=4,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=64,
        bos_token_id=64,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    oracle = transformers.MusicgenForCausalLM(oracle_config).eval()
    state = {}
    for key, value in lm.state_dict().items():
        if key.startswith("condition_provider"):
            continue
        if key.endswith("in_proj_weight"):
            stem = _their(key.removesuffix("in_proj_weight"))
            for name, part in zip("qkv", value.chunk(3)):
                state[f"{stem}{name}_proj.weight"] = part
        else:
            state[_their(key)] = value
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected and not [m for m in missing if "embed_positions" not in m]
    tokens, text, mask = inputs()
    mask[1, 4:] = False
    theirs = oracle(
        input_ids=tokens.reshape(12, 11),
        encoder_hidden_states=lm.project_text(text, mask),
        encoder_attention_mask=mask.long(),
    ).logits.reshape(3, 4, 11, 64)
    torch.testing.assert_close(lm(tokens, text, mask), theirs, atol=2e-5, rtol=1e-4)


def _their(key: str) -> str:
    for ours, name in (
        ("transformer.layers.", "model.decoder.layers."),
        ("emb.", "model.decoder.embed_tokens."),
        ("out_norm.", "model.decoder.layer_norm."),
        ("linears.", "lm_heads."),
        ("cross_attention.", "encoder_attn."),
        ("norm_cross.", "encoder_attn_layer_norm."),
        ("norm1.", "self_attn_layer_norm."),
        ("norm2.", "final_layer_norm."),
        ("linear1.", "fc1."),
        ("linear2.", "fc2."),
    ):
        key = key.replace(ours, name)
    return key
