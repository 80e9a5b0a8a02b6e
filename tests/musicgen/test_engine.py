"""The fast step: the logits of the whole forward pass, on both of its ways and at every precision."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from musicgen import packing, seanet
from musicgen.conditions import Conditions
from musicgen.config import ConditionConfig, LMConfig
from musicgen.engine import Engine
from musicgen.lm import MusicLM
from musicgen.packing import PRECISIONS, OnGpu, Precision, pack, quantize_rows, stream_dtype

TINY = LMConfig(
    dim=48, num_layers=3, num_heads=4, codebook_size=64, condition=ConditionConfig(text_encoder="minilm", text_dim=20)
)


def tiny(config: LMConfig = TINY) -> MusicLM:
    torch.manual_seed(0)
    return MusicLM(config).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, text and mask of three rows: all of the text, some of it, none."""
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = False
    return torch.randint(0, 65, (3, 4, 11), generator=g), torch.randn(3, 6, 20, generator=g), mask


MELODY = torch.tensor([[0, 4, 7, 11, 255], [2, 2, 2, 9, 9], [255] * 5])


@torch.no_grad()
def stepped(
    engine: Engine, given: int = 1, span: int | None = None, chroma: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits `[B, K, S, V]` of the columns from `given - 1` on, the first `given` fed at once."""
    tokens, text, mask = inputs()
    conditions = Conditions(text, mask, chroma)
    cache = engine.start(conditions, columns=32)
    engine.listen(cache, conditions, chroma)
    out = [engine.feed(tokens[..., :given], cache)]
    for s in range(given, tokens.shape[-1]):
        out.append(engine.feed(tokens[..., s : s + 1], cache, span))
        cache.position += span is not None
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("melody", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_step_equals_forward(cross: bool, melody: bool, activation: str) -> None:
    """Text models and melody models, rows with all, some and none of the text; both ways of the cache."""
    condition = replace(TINY.condition, melody=melody, chroma_frames=7)
    lm = tiny(replace(TINY, cross_attention=cross, activation=activation, condition=condition))  # type: ignore[arg-type]
    chroma = MELODY if melody else None
    with torch.no_grad():
        whole = lm(*inputs(), chroma)
    engine = Engine(lm)
    torch.testing.assert_close(stepped(engine, chroma=chroma), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stepped(engine, given=5, chroma=chroma), whole[:, :, 4:], atol=1e-5, rtol=1e-5)
    on_device = stepped(engine, span=32, chroma=chroma)  # what a graph captures on a GPU
    torch.testing.assert_close(on_device, whole, atol=1e-5, rtol=1e-5)


def test_a_rewound_cache_starts_anew_and_a_full_one_is_refused() -> None:
    engine = Engine(tiny(replace(TINY, cross_attention=False)))
    tokens, text, mask = inputs()
    conditions = Conditions(text, mask)
    cache = engine.start(conditions, columns=3)
    engine.listen(cache, conditions, None)
    first = [engine.feed(tokens[..., s : s + 1], cache) for s in range(3)]
    with pytest.raises(ValueError, match="the cache holds 9 entries, of which 9 are used"):
        engine.feed(tokens[..., :1], cache)
    cache.rewind()
    assert torch.equal(engine.feed(tokens[..., :1], cache), first[0])


# Relative error of one product and of the logits after three layers: each form is only as far off as its bits say.
LIMITS = {"float32": (1e-5, 1e-5), "float16": (1e-3, 3e-3), "bf16": (1e-2, 3e-2), "int8": (3e-2, 8e-2)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: Precision) -> None:
    lm = tiny()
    torch.manual_seed(3)
    weight, x = torch.randn(96, 48), torch.randn(2, 5, 48)
    weight[7] *= 50  # one scale for the whole matrix would drown the other rows
    product = pack(weight, precision)(x.to(stream_dtype(precision, weight.device))).float()
    true = x @ weight.T
    rows = (product - true).norm(dim=(0, 1)) / true.norm(dim=(0, 1))
    assert product.shape == true.shape
    assert float(rows.max()) < 2 * LIMITS[precision][0]
    with torch.no_grad():
        whole = lm(*inputs())
    logits = stepped(Engine(lm, precision))
    error = float((logits - whole).norm() / whole.norm())
    assert logits.dtype == torch.float32 and error < LIMITS[precision][1]
    assert precision == "float32" or error > 1e-5, "the setting acts"


@pytest.mark.parametrize("multiplies", [True, False])
def test_bf16_is_packed_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, multiplies: bool) -> None:
    monkeypatch.setattr(packing, "cpu_multiplies_bf16", lambda: multiplies)
    packed: list[torch.dtype] = []
    monkeypatch.setattr(packing, "_onednn", lambda weight: packed.append(weight.dtype))
    pack(torch.randn(8, 8), "bf16")
    pack(torch.randn(8, 8), "float32")
    assert packed == [torch.bfloat16, torch.float32][not multiplies :]


def test_int8_of_a_gpu_is_the_product() -> None:
    """The form for GPUs, which runs on a CPU as well."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(2, 5, 64)
    product, true = OnGpu(*quantize_rows(weight))(x.bfloat16()).float(), x @ weight.T
    assert product.shape == true.shape and float((product - true).norm() / true.norm()) < 0.02


def test_rows_are_quantised_symmetrically() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    quantized, scale = quantize_rows(weight)
    assert quantized.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert torch.allclose(quantized * scale[:, None], weight, atol=0.01)


def test_bytes_of_a_step() -> None:
    """300M in float32: 14 d² per layer, the heads, two rows of cache and 32 text tokens."""
    with torch.device("meta"):
        lm = MusicLM(LMConfig())
    engine = Engine.__new__(Engine)
    engine.config, engine.precision, engine.dtype = lm.config, "float32", torch.float32
    weights = 4 * (24 * 14 * 1024**2 + 4 * 2048 * 1024)
    assert engine.step_bytes(rows=2, position=0, text=0) == weights
    assert engine.step_bytes(rows=2, position=100) - weights == 2 * 2 * 24 * 1024 * 132 * 4


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_a_codec_on_a_gpu_multiplies_whatever_was_asked_of_the_others(asked: str) -> None:
    """Of torch's two interfaces, set apart, every product of a GPU raises; asked here as a product asks."""
    before = torch.get_float32_matmul_precision()
    rounds: Callable[[], bool] = torch._C._get_cublas_allow_tf32
    try:
        torch.set_float32_matmul_precision(asked)
        with seanet._exact(torch.device("cuda")):
            assert not rounds()
        assert torch.get_float32_matmul_precision() == asked and rounds() == (asked != "highest")
    finally:
        torch.set_float32_matmul_precision(before)
