"""The draw: known answers for the generator, the right distribution, and filters that do what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from musicgen import sampling
from musicgen.sampling import SamplingConfig


def _words(key: int, counter: int) -> list[int]:
    k, c = torch.tensor([key]), torch.tensor([counter])
    return [int(w) for w in sampling.philox((k, k), (c, c, c, c))]


def test_philox_known_answers() -> None:
    """From the authors' known-answer file (Random123)."""
    assert _words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _words(0xFFFFFFFF, 0xFFFFFFFF) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_noise_is_addressed_by_seed_step_and_codebook() -> None:
    seeds = torch.tensor([5, 9, -1, 2**40 + 5])
    batch = sampling.gumbel_noise(seeds, 3, 4, 2048)
    assert batch.shape == (4, 4, 2048) and bool(torch.isfinite(batch).all())
    for row, seed in enumerate(seeds):
        assert torch.equal(sampling.gumbel_noise(seed[None], 3, 4, 2048)[0], batch[row])
    assert torch.equal(sampling.gumbel_noise(seeds, 3, 2, 2048), batch[:, :2]), "fewer codebooks change nothing"
    assert torch.equal(sampling.gumbel_noise(seeds, 3, 4, 100), batch[..., :100])
    assert not torch.equal(sampling.gumbel_noise(seeds, 4, 4, 2048), batch)
    flat = batch.reshape(-1, 2048)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.12, "seeds and codebooks are independent (the upper half of the seed counts too)"


def test_noise_is_gumbel() -> None:
    noise = sampling.gumbel_noise(torch.arange(20), 0, 4, 2048).double()
    assert noise.mean() == pytest.approx(0.57722, abs=0.01)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)


def test_drawn_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 20000
    config = SamplingConfig(top_k=0)
    tokens = sampling.sample(logits.expand(draws, 1, 4), torch.arange(draws), 0, config)
    share = torch.bincount(tokens.flatten(), minlength=4) / draws
    assert torch.allclose(share, logits.softmax(0), atol=0.012)
    cold = sampling.sample(logits.expand(draws, 1, 4), torch.arange(draws), 0, SamplingConfig(top_k=0, temperature=0.5))
    assert torch.allclose(torch.bincount(cold.flatten(), minlength=4) / draws, (2 * logits).softmax(0), atol=0.012)


def test_top_k_keeps_k_and_ties() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert torch.isfinite(sampling.keep_top_k(logits, 1)).tolist() == [[True, False, False, False, False]]
    assert torch.isfinite(sampling.keep_top_k(logits, 2)).tolist() == [[True, False, True, True, False]]
    for everything in (0, 5, 99):
        assert torch.equal(sampling.keep_top_k(logits, everything), logits)
    tokens = sampling.sample(
        torch.randn(1, 1, 2048).expand(500, 1, 2048), torch.arange(500), 0, SamplingConfig(top_k=3)
    )
    assert len(tokens.unique()) == 3


def test_top_p_keeps_the_nucleus_and_replaces_top_k() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1]]))
    assert torch.isfinite(sampling.keep_top_p(logits, 0.45)).tolist() == [[False, True, False, False]]
    assert torch.isfinite(sampling.keep_top_p(logits, 0.6)).tolist() == [[False, True, True, False]]
    assert torch.isfinite(sampling.keep_top_p(logits, 1.0)).all()
    config = SamplingConfig(top_k=1, top_p=0.6)
    tokens = sampling.sample(logits[None].expand(500, 1, 4), torch.arange(500), 0, config)
    assert sorted(tokens.unique().tolist()) == [1, 2]


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(3, 4, 2048)
    tokens = sampling.sample(logits, torch.arange(3), 0, SamplingConfig(temperature=0.0))
    assert torch.equal(tokens, logits.argmax(-1))


def test_several_steps_of_noise_are_those_steps() -> None:
    seeds = torch.tensor([5, -1])
    ahead = sampling.gumbel_noise(seeds, torch.tensor([7, 8, 2**33]), 4, 100)
    assert ahead.shape == (2, 3, 4, 100)
    for i, step in enumerate((7, 8)):
        assert torch.equal(ahead[:, i], sampling.gumbel_noise(seeds, step, 4, 100))


def test_guidance_formula() -> None:
    parts = torch.randn(2, 2, 4, 8).unbind()
    conditional, unconditional = parts

    def guided(*scales: float) -> torch.Tensor:
        return sampling.guide(parts, torch.tensor(scales)[:, None])

    assert torch.allclose(guided(1.0), conditional, atol=1e-6)
    assert torch.equal(guided(0.0), unconditional)
    assert torch.allclose(guided(3.0), 3 * conditional - 2 * unconditional, atol=1e-5)


def test_three_way_guidance() -> None:
    parts = torch.randn(3, 2, 4, 8).unbind()
    both, melody, null = parts

    def guided(text: float, tune: float) -> torch.Tensor:
        return sampling.guide(parts, torch.tensor([[text], [tune]]))

    assert torch.allclose(guided(3.0, 3.0), null + 3 * (both - null), atol=1e-5), "equal scales are the two-way form"
    assert torch.allclose(guided(1.0, 1.0), both, atol=1e-6)
    assert torch.allclose(guided(0.0, 1.0), melody, atol=1e-6)
    assert torch.allclose(guided(2.0, 5.0), null + 5 * (melody - null) + 2 * (both - melody), atol=1e-5)


def test_guidance_over_time() -> None:
    config = SamplingConfig(guidance_over_time=[[2, 6], [4, 2], [5, 2]])  # type: ignore[arg-type]
    assert [config.guidance_at(t) for t in (0, 2, 3, 3.5, 4.7, 9)] == [6, 6, 4, 3, 2, 2]
    assert SamplingConfig(guidance=4.0).guidance_at(3.0) == 4.0
    assert config.guides() and not SamplingConfig(guidance=1.0).guides()
    assert SamplingConfig(guidance=1.0, guidance_over_time=((0, 1), (2, 3))).guides()
    assert not SamplingConfig(guidance=3.0, guidance_over_time=((0, 1),)).guides()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": -1}, "top_k is -1; give 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-39}, "temperature is 1e-39"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"guidance": 1e39}, r"guidance is 1e\+39; give 0 to 1000"),
        ({"guidance_melody": 1e39}, r"guidance_melody is 1e\+39"),
        ({"guidance_over_time": ((0, 1e39),)}, "scales from 0 to 1000"),
        ({"guidance_over_time": ((3, 2), (1, 2))}, "ascending seconds"),
        ({"guidance_over_time": ((0, -1),)}, r"give pairs"),
    ],
)
def test_nonsense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**values)


@pytest.mark.parametrize("values", [{"temperature": 1e-6}, {"temperature": 1e6}, {"guidance": 1000.0}])
def test_the_outermost_settings_that_are_taken_give_numbers(values: dict[str, Any]) -> None:
    config = SamplingConfig(**values)
    logits = 40 * torch.randn(2, 1, 4, 64, generator=torch.Generator().manual_seed(0))
    guided = sampling.guide(list(logits), torch.full((1, 1), config.guidance))
    assert bool((guided / config.temperature).isfinite().all())
    tokens = sampling.sample(guided, torch.tensor([3]), 0, config)
    if values.get("temperature") == 1e-6:
        assert torch.equal(tokens, guided.argmax(dim=-1))
