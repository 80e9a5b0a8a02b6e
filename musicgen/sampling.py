"""From logits to tokens: guidance, temperature, top-k, top-p, and randomness that is addressed, not consumed.

Every function is pure. The noise for one token is a function of (seed, step, codebook) and the code's index alone,
through the counter-based generator Philox4x32-10, so that an item draws the same tokens alone, in any batch, and
after a restart in the middle. A token is drawn by the Gumbel-max rule: argmax(log p + g) has distribution p.

Sources: Copet et al. 2023, section 3.4 (top-k 250, temperature 1, guidance 3); Salmon et al. 2011 for Philox.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_STREAM = 0x6D67656E  # sets sampling apart from any other use of the same seed
MAX_SCALE = 1000.0  # of guidance: logits are tens, and float32 must hold them scaled
LEAST_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn.

    Args:
        top_k: keep the k likeliest codes; 0 keeps all.
        top_p: keep the likeliest codes up to this total probability; 0 switches it off; when set, it replaces top_k.
        temperature: 1 samples from the model's distribution, lower is safer, 0 always takes the likeliest code.
        guidance: how far to go from the unconditional prediction towards the prompt's; 1 is none.
        guidance_melody: a scale of its own for the melody, `guidance` being that of the text; none guides by both
            together.
        guidance_style: the same for the style by example.
        guidance_over_time: pairs of second and scale, such as [[0, 6], [10, 2]], between which the scale goes
            straight and outside of which it stays; replaces `guidance`.
    """

    top_k: int = 250
    top_p: float = 0.0
    temperature: float = 1.0
    guidance: float = 3.0
    guidance_melody: float | None = None
    guidance_style: float | None = None
    guidance_over_time: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (all codes) or a number of codes such as 250")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; give 0 (off) up to 1")
        if not (self.temperature == 0.0 or LEAST_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE):
            raise ValueError(
                f"temperature is {self.temperature}; give 0 (likeliest code), or {LEAST_TEMPERATURE:g} to "
                f"{MAX_TEMPERATURE:g}, such as 1.0"
            )
        if not 0.0 <= self.guidance <= MAX_SCALE:
            raise ValueError(f"guidance is {self.guidance}; give 0 to {MAX_SCALE:g}, such as 3.0 (1 is no guidance)")
        for name in ("guidance_melody", "guidance_style"):
            own = getattr(self, name)
            if own is not None and not 0.0 <= own <= MAX_SCALE:
                raise ValueError(f"{name} is {own}; give 0 to {MAX_SCALE:g}, or leave it out")
        points = tuple((float(second), float(scale)) for second, scale in self.guidance_over_time)
        object.__setattr__(self, "guidance_over_time", points)  # YAML and JSON give lists
        seconds = [second for second, _ in points]
        in_bounds = all(0.0 <= second < math.inf and 0.0 <= scale <= MAX_SCALE for second, scale in points)
        if seconds != sorted(set(seconds)) or not in_bounds:
            raise ValueError(
                f"guidance_over_time is {[list(p) for p in points]}; give pairs of ascending seconds from 0 on and "
                f"scales from 0 to {MAX_SCALE:g}, such as [[0, 6], [10, 2]]"
            )

    def guides(self) -> bool:
        """Whether any scale differs from 1."""
        scales = [scale for _, scale in self.guidance_over_time] or [self.guidance]
        scales += [own for own in (self.guidance_melody, self.guidance_style) if own is not None]
        return any(scale != 1.0 for scale in scales)

    def guidance_at(self, seconds: float) -> float:
        """The guidance scale at a time of the clip."""
        points = self.guidance_over_time
        if not points:
            return self.guidance
        if seconds <= points[0][0]:
            return points[0][1]
        for (a, low), (b, high) in itertools.pairwise(points):
            if seconds <= b:
                return low + (high - low) * (seconds - a) / (b - a)
        return points[-1][1]


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words, as int64 tensors, for each key and counter (int64, broadcast together)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap; masking after an arithmetic shift still gives the true upper 32 bits.
        p0, p1 = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel_noise(seeds: Tensor, steps: int | Tensor, num_codebooks: int, size: int) -> Tensor:
    """Standard Gumbel noise, float32, a function of (seed, step, codebook, code) only.

    Args:
        seeds: int64 [B], one seed per item (all 64 bits count).
        steps: column of the pattern, 0 for the first predicted one; or several, int64 [S].

    Returns:
        [B, K, size] for one step, [B, S, K, size] for several.
    """
    device = seeds.device
    blocks = (size + 3) // 4
    counted = torch.full((1,), steps, device=device) if isinstance(steps, int) else steps
    seeds, step = seeds.view(-1, 1, 1, 1), counted.view(1, -1, 1, 1) & _MASK
    block = torch.arange(blocks, device=device).view(1, 1, 1, -1)
    codebook = torch.arange(num_codebooks, device=device).view(1, 1, -1, 1)
    constant = torch.full_like(block, _STREAM)
    words = philox((seeds & _MASK, (seeds >> 32) & _MASK), (block, codebook, step, constant))
    shape = (seeds.shape[0], step.shape[1], num_codebooks, blocks)
    bits = torch.stack([w.expand(shape) for w in words], dim=-1).flatten(-2)[..., :size]
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23  # strictly inside (0, 1), exact in float32
    noise = -torch.log(-torch.log(uniform))
    return noise[:, 0] if isinstance(steps, int) else noise


def guide(parts: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Classifier-free guidance on raw logits, over the branches of one batch.

    Two parts (prompted, null) and one scale: null + scale x (prompted - null). With more parts each lacks one more
    condition than the one before and each step has a scale of its own: of (text and melody, melody alone, null),
    null + melody scale x (melody - null) + text scale x (both - melody). Equal scales are the two-part form.

    Args:
        parts: logits `[B, K, V]` of each branch, the fullest first, the null last.
        scales: `[branches - 1, ...]`, broadcast over the logits.
    """
    guided = parts[-1]
    for more, less, scale in zip(parts[-2::-1], parts[:0:-1], reversed(list(scales))):
        guided = guided + scale * (more - less)
    return guided


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [..., V] with all but the k likeliest set to -inf; ties with the k-th stay; 0 or k >= V keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [..., V]: likeliest first, a code stays while the probability before it is at most p."""
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probability = torch.softmax(ordered, dim=-1)
    drop = probability.cumsum(dim=-1) - probability > p
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)


def draw(logits: Tensor, noise: Tensor | None, config: SamplingConfig) -> Tensor:
    """Tokens [B, K] from logits [B, K, V] (already guided) and Gumbel noise of their shape.

    Without noise, or at temperature 0, the likeliest code.
    """
    logits = logits.float()
    if noise is None or config.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits / config.temperature
    if config.top_p > 0.0:
        logits = keep_top_p(logits, config.top_p)
    else:
        logits = keep_top_k(logits, config.top_k)
    return (logits + noise).argmax(dim=-1)


def sample(logits: Tensor, seeds: Tensor, step: int, config: SamplingConfig) -> Tensor:
    """Tokens [B, K] drawn from logits [B, K, V] (already guided) with noise addressed by (seed, step, codebook)."""
    return draw(logits, gumbel_noise(seeds, step, logits.shape[1], logits.shape[2]), config)
