"""The kernels of a GPU's generation step, run by Triton's interpreter: what torch's operations give."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not here (it has wheels for Linux on x86-64)")

from musicgen import fused, kernels, sampling
from musicgen.conditions import Conditions
from musicgen.config import ConditionConfig, LMConfig
from musicgen.engine import Engine
from musicgen.lm import MusicLM
from musicgen.packing import Precision, quantize_rows
from musicgen.sampler import Sampler
from musicgen.sampling import SamplingConfig

TYPES = {torch.float32: 1e-5, torch.float16: 2e-3}  # the interpreter's matrix product knows no bfloat16
CPU = torch.device("cpu")


def check(found: torch.Tensor, true: torch.Tensor, limit: float) -> None:
    assert found.shape == true.shape
    assert float((found.float() - true.float()).norm() / true.float().norm()) < limit


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17])
@pytest.mark.parametrize(("outputs", "inputs"), [(36, 48), (40, 1064)])
def test_products(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """With a norm and an activation, added to a residual, and in int8; sizes that no tile divides."""
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    gain, bias = torch.randn(2, inputs).to(dtype)
    normed = F.layer_norm(x.float(), (inputs,), gain.float(), bias.float())
    for kind, function in (("gelu", F.gelu), ("relu", F.relu)):
        linear = kernels.Linear(weight, norm=(gain, bias, 1e-5), activation=kind)
        check(linear(x, torch.empty(rows, outputs, dtype=dtype)), function(normed @ weight.float().T), TYPES[dtype])
    residual = torch.randn(rows, outputs).to(dtype)
    true = residual.float() + x.float() @ weight.float().T
    check(kernels.Linear(weight)(x, residual.clone(), add=True), true, TYPES[dtype])
    small, scale = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs)
    found = kernels.Linear(small, scale, (gain, bias, 1e-5))(x, torch.empty(rows, outputs, dtype=dtype))
    check(found, normed @ (small.float() * scale[:, None]).T, TYPES[dtype])


def test_both_ways_of_a_product_at_a_large_mean() -> None:
    """Mean and deviation are gathered beside the product; a stream far from zero must not lose them."""
    x, weight = torch.randn(2, 256) + 5, torch.randn(40, 256)
    gain, bias = torch.randn(2, 256)
    true = F.layer_norm(x, (256,), gain, bias) @ weight.T
    for units in (False, True):
        linear = kernels.Linear(weight, norm=(gain, bias, 1e-5))
        check(linear(x, torch.empty(2, 40), cut=kernels.Cut(64, 16, 4, units=units)), true, 1e-4)


@pytest.mark.parametrize("units", [False, True])
def test_a_stream_without_variance_gives_numbers(units: bool) -> None:
    """Of equal inputs the mean square less the squared mean may come out below zero, by more than epsilon."""
    x, weight = torch.linspace(100, 3000, 16)[:, None].repeat(1, 1000), torch.randn(8, 1000)
    linear = kernels.Linear(weight, norm=(torch.ones(1000), torch.ones(1000), 1e-5))
    for some in x[None] if units else x.split(2):
        found = linear(some, torch.empty(len(some), 8), cut=kernels.Cut(64, 16, 4, units=units))
        assert bool(found.isfinite().all())


class _LittleMemory:
    """A kernel on a GPU with less shared memory than it asks for."""

    def __init__(self, kernel: Any, most: int) -> None:
        self.kernel, self.most, self.asked = kernel, most, list[int]()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*given: Any, TILE: int, **options: Any) -> None:
            self.asked.append(TILE)
            if self.most < TILE:
                raise kernels.triton.OutOfResources(160_000, 101_376, "shared memory")
            self.kernel[grid](*given, TILE=TILE, **options)

        return launch


def test_products_are_cut_as_the_gpu_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consumer cards have 99 KB of shared memory where a product is cut for twice that; it is asked for once only."""
    little = _LittleMemory(kernels._some_rows, 128)
    monkeypatch.setattr(kernels, "_some_rows", little)
    x, weight = torch.randn(4, 300), torch.randn(40, 300)
    linear = kernels.Linear(weight)
    for _ in range(2):
        check(linear(x, torch.empty(4, 40)), x @ weight.T, 1e-5)
    assert little.asked == [128, 128]  # float32
    linear, little.most, little.asked = kernels.Linear(weight.half()), 64, []
    for _ in range(2):
        check(linear(x.half(), torch.empty(4, 40).half()), x @ weight.T, 2e-3)
    assert little.asked == [256, 128, 64, 64]
    little.most = 32
    with pytest.raises(kernels.triton.OutOfResources):
        kernels.Linear(weight)(x, torch.empty(4, 40))
    with pytest.raises(kernels.triton.OutOfResources):  # a cut that was given is taken as it is
        linear(x, torch.empty(4, 40), cut=kernels.Cut(64, 16, 4, units=True))


def test_nothing_is_copied_behind_a_product_of_many_rows() -> None:
    """A copy is no kernel: in a graph the next kernel could not start beside it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(operation)
            return operation(*args, **(kwargs or {}))

    asked: list[Any] = []
    small, scale = torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8)
    x = torch.randn(17, 16)
    with Operations():
        found = kernels.Linear(small, scale, activation="relu")(x, torch.empty(17, 8))
    check(found, (x @ (small.float() * scale[:, None]).T).relu(), 1e-5)
    assert torch.ops.aten.copy_.default not in asked


@pytest.mark.parametrize("reach", [64, 128, 256])
@pytest.mark.parametrize("hides", [False, True])
def test_attention_reads_to_the_position_and_writes_it(reach: int, hides: bool) -> None:
    """One part and several, at the edges of the steps; entries beyond the position hold NaN and are not touched."""
    rows, heads, capacity, width = 3, 2, 256, 12
    scratch = kernels.Scratch(CPU, rows, heads, capacity, width, reach)
    for position in (0, 63, 64, 130, 255):
        keys, values = torch.randn(2, rows, heads, capacity, width)
        visible = torch.rand(rows, capacity) < 0.7 if hides else None
        if visible is not None:
            visible[:, position] = True
            visible[0, :64] = position < 64  # nothing to see in the first steps
        q, k, v = torch.randn(3, rows, heads, width)
        keys[:, :, position:], values[:, :, position:] = float("nan"), float("nan")
        qkv = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
        out, at = torch.empty(rows, heads * width), torch.tensor([position])
        kernels.attend(qkv, keys, values, visible, at, scratch, out)
        assert torch.equal(keys[:, :, position], k) and torch.equal(values[:, :, position], v)
        assert bool(keys[:, :, position + 1 :].isnan().all()) and not bool(scratch.arrived.any())
        mask = None if visible is None else visible[:, None, None, : position + 1]
        seen = keys[:, :, : position + 1], values[:, :, : position + 1]
        check(out, F.scaled_dot_product_attention(q[:, :, None], *seen, attn_mask=mask).flatten(1), 1e-5)


@pytest.mark.parametrize("tokens", [1, 20, 70])
def test_cross_attention_is_zero_without_text(tokens: int) -> None:
    q, keys, values = torch.randn(3, 24), torch.randn(3, 2, tokens, 12), torch.randn(3, 2, tokens, 12)
    seen, has_text = torch.rand(3, tokens) < 0.6, torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1)
    seen[:, 0] = True
    found = kernels.hear(q, keys, values, seen.view(3, 1, 1, tokens), has_text, torch.empty(3, 24))
    true = F.scaled_dot_product_attention(q.view(3, 2, 1, 12), keys, values, attn_mask=seen[:, None, None])
    check(found, true.flatten(1) * has_text[:, 0], 1e-5)
    assert not bool(found[2].any())


def test_a_long_text_compiles_in_a_loop(tmp_path: Any) -> None:
    """T5's texts have no limit; 4096 tokens unrolled took Triton minutes. A compiler of its own, without a GPU."""
    words = """
import triton
from triton.backends.compiler import GPUTarget
from musicgen import kernels
pointers = dict.fromkeys(("q", "keys", "values", "has_text", "out"), "*bf16")
types = {**pointers, "seen": "*i1", "tokens": "i32", "scale": "fp32"}
sizes = dict(HEADS=16, WIDTH=64, PADDED=64, STEP=64, STEPS=64, OVERLAP=True)
names = kernels._hear.arg_names
source = triton.compiler.ASTSource(
    kernels._hear, {n: types.get(n, "constexpr") for n in names}, {(names.index(n),): v for n, v in sizes.items()}
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert "scf.for" in made.asm["ttir"] and "griddepcontrol.wait" in made.asm["ptx"]
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", words], env=env, check=True, timeout=120)


@pytest.mark.parametrize("shift", [None, torch.tensor([[0], [-2], [-3]])])
def test_embeddings(shift: torch.Tensor | None) -> None:
    tokens, tables, positions = torch.randint(0, 65, (3, 4)), torch.randn(4 * 65, 48), torch.randn(32, 48)
    found = kernels.embed(tokens, tables, positions, torch.tensor([7]), shift, torch.empty(3, 48))
    places = torch.full((3,), 7) if shift is None else 7 + shift[:, 0]
    check(found, tables[tokens + 65 * torch.arange(4)].sum(1) + positions[places], 1e-6)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize(("top_k", "temperature"), [(0, 1.0), (1, 0.7), (5, 1.3), (64, 1.0), (3, 0.0)])
def test_draws_are_those_of_torch(branches: int, top_k: int, temperature: float) -> None:
    """Also among ties and signed zeros; a code that is given already stays."""
    logits = torch.randn(branches * 2, 4, 64).round(decimals=1)
    logits[0, 0, :9] = torch.tensor([0.0, -0.0, 0.0] * 3)
    scales, noise = torch.rand(max(branches - 1, 1), 9) * 3, torch.randn(2, 32, 4, 64)
    columns, column = torch.full((2, 4, 9), -1), torch.tensor([3])
    columns[0, 1, 4] = 17
    guided = sampling.guide(logits.chunk(branches), scales[:, 3:4]) if branches > 1 else logits
    config = SamplingConfig(top_k=top_k, temperature=temperature)
    drawn = sampling.draw(guided, noise[:, 3] if temperature else None, config)
    true = columns.clone()
    true[..., 4] = torch.where(columns[..., 4] == -1, drawn, columns[..., 4])
    kernels.say(
        logits, scales, noise if temperature else None, columns, column, -1, top_k=top_k, temperature=temperature
    )
    assert torch.equal(columns, true)


def test_the_two_zeros_are_one_in_the_draw() -> None:
    """The likeliest one is +0 and a -0 ties with it, so both may be drawn."""
    logits, noise = torch.full((1, 1, 16), -1.0), torch.zeros(1, 32, 1, 16)
    logits[0, 0, 3], logits[0, 0, 9] = 0.0, -0.0
    noise[..., 9] = 1.0
    columns = torch.full((1, 1, 3), -1)
    kernels.say(logits, torch.ones(1, 3), noise, columns, torch.tensor([0]), -1, top_k=1, temperature=1.0)
    drawn = sampling.draw(logits, noise[:, 0], SamplingConfig(top_k=1))
    assert int(columns[0, 0, 1]) == int(drawn) == 9


TINY = LMConfig(
    dim=16, num_layers=1, num_heads=2, codebook_size=16, condition=ConditionConfig(text_encoder="minilm", text_dim=20)
)


def window_of(lm: MusicLM, precision: Precision, clips: int, config: SamplingConfig, frames: int = 6) -> torch.Tensor:
    """Codes of a window, stepped as a GPU steps it."""
    text, mask = torch.randn(clips, 6, 20, generator=torch.Generator().manual_seed(1)), torch.ones(clips, 6).bool()
    mask[-1, 3:] = False
    prompted = Conditions(text, mask)
    sampler = Sampler(
        Engine(lm, precision), [prompted, prompted.without_text(lm)], range(clips), config, frames, frame_rate=50,
        sample_rate_hz=32_000, scales=torch.full((1, frames), 3.0),
    )  # fmt: skip
    sampler.begin(torch.full((clips, 4, frames), -1))
    while not sampler.done:
        sampler._noise(sampler.known)
        sampler.advance_in_spans()
        sampler.known += 1
    return sampler.codes(0, frames)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(("clips", "config"), [(1, SamplingConfig(top_k=5)), (9, SamplingConfig(top_p=0.8))])
def test_a_window_of_kernels_is_the_window_of_torch(
    cross: bool, clips: int, config: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same codes over a whole window: few rows and many, text beside the columns and before them."""
    lm, made = MusicLM(replace(TINY, cross_attention=cross)).eval(), []
    steps: list[int] = []
    call: Callable[..., torch.Tensor] = fused.FusedStep.__call__
    monkeypatch.setattr(fused.FusedStep, "__call__", lambda *given: steps.append(1) or call(*given))
    for runs in (True, False):
        monkeypatch.setattr(fused, "runs_kernels", lambda _, runs=runs: runs)
        made.append(window_of(lm, "float32", clips, config))
    assert steps and torch.equal(*made)


def test_int8_takes_the_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads the stored weights: its logits are those of the rounded ones, not those of float32."""
    lm = MusicLM(TINY).eval()
    monkeypatch.setattr(fused, "runs_kernels", lambda _: True)
    conditions, tokens = Conditions(torch.randn(1, 6, 20), torch.ones(1, 6).bool()), torch.randint(0, 17, (1, 4, 1))
    made = []
    for precision in ("int8", "float32"):
        engine = Engine(lm, precision)  # type: ignore[arg-type]
        cache = engine.start(conditions, 4)
        engine.listen(cache, conditions, None)
        made.append(engine.feed(tokens, cache, 4))
        for block in lm.transformer.layers:  # what int8 stood for, in float32
            for name, weight in block.named_parameters():
                if name.endswith(("in_proj_weight", "weight")) and weight.ndim == 2:
                    rounded, scale = quantize_rows(weight)
                    weight.data = rounded * scale[:, None]
    check(made[0], made[1], 1e-2)


def test_a_style_keeps_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Styles modulate every norm, which the kernels fold into their products."""
    from musicgen.config import StyleConfig

    monkeypatch.setattr(fused, "runs_kernels", lambda _: True)
    shape = replace(TINY, condition=replace(TINY.condition, style=StyleConfig(dim=8, latent_dim=4)))
    engine = Engine(MusicLM(shape).eval())
    mask = torch.ones(2, 6, dtype=torch.bool)
    plain, styled = Conditions(torch.randn(2, 6, 20), mask), Conditions(torch.randn(2, 6, 20), mask)
    styled = replace(styled, style=torch.randn(2, 8))
    assert engine.start(plain, 8).room is not None and engine.start(styled, 8).room is None


@pytest.mark.parametrize("fails", ["_few_rows", "_embed", "ACTIVATIONS"])
def test_where_a_kernel_does_not_run_torch_goes_on(
    fails: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No C compiler, a Triton that knows other launches, too little shared memory: said in one line, once."""
    lm, config = MusicLM(TINY).eval(), SamplingConfig(top_k=5)
    monkeypatch.setattr(fused, "runs_kernels", lambda _: False)
    true = window_of(lm, "float32", 1, config)
    monkeypatch.setattr(fused, "runs_kernels", lambda _: True)
    monkeypatch.delattr(kernels, fails)
    engine = Engine(lm)
    conditions = Conditions(torch.randn(1, 6, 20), torch.ones(1, 6).bool())
    assert engine.start(conditions, 8).room is None and engine.start(conditions, 8).room is None
    words = capsys.readouterr().err
    assert words.count("\n") == 1 and words.startswith("warning: Triton's kernels don't run here (NameError: ")
    assert torch.equal(window_of(lm, "float32", 1, config), true)


def test_a_full_memory_is_no_reason_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(fused, "runs_kernels", lambda _: True)
    monkeypatch.setattr(fused, "Room", full)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(MusicLM(TINY).eval()).start(Conditions(torch.randn(1, 6, 20), torch.ones(1, 6).bool()), 8)


def test_amd_keeps_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert fused.runs_kernels(torch.device("cuda")) and not fused.runs_kernels(CPU)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not fused.runs_kernels(torch.device("cuda"))


def test_kernels_run_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be the model's (`--device cuda:1`)."""
    inside: list[bool] = []

    @contextmanager
    def device_of(_: torch.Tensor) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def checked(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            ran.append(bool(inside))
            return kernel(*given, **options)

        return run

    ran: list[bool] = []
    monkeypatch.setattr(fused, "runs_kernels", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("embed", "attend", "hear", "say"):
        monkeypatch.setattr(kernels, name, checked(getattr(kernels, name)))
    window_of(MusicLM(TINY).eval(), "float32", 1, SamplingConfig(top_k=5), frames=2)
    assert len(ran) > 8 and all(ran)
