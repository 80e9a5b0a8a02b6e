"""MusicLM: K embeddings summed, a transformer that listens to text, K heads.

The model knows columns, not audio: `musicgen.patterns` lays codes out in columns, `musicgen.conditioning` turns
captions into the hidden states of a frozen encoder, and this file maps both to logits. A row of the text mask
without any true value is the null condition: its cross-attention output is exactly zero.

`forward` scores a whole sequence (training); `start_cache` and `step` go column by column (generation) and give the
same logits. Parameter names are audiocraft's flat names.

Source: Copet et al. 2023, section 3; audiocraft `models/lm.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from musicgen.config import LMConfig
from musicgen.transformer import Cache, Transformer, gaussian_


class MusicLM(nn.Module):
    """The language model of `config`; random weights come from torch's global generator."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        dim, rows = config.dim, config.codebook_size + 1
        self.emb = nn.ModuleList(nn.Embedding(rows, dim) for _ in range(config.num_codebooks))
        # Nested as in audiocraft, so that the projection has the key
        # condition_provider.conditioners.description.output_proj; it keeps PyTorch's default initialisation.
        description = nn.ModuleDict({"output_proj": nn.Linear(config.condition.text_dim, dim)})
        self.condition_provider = nn.ModuleDict({"conditioners": nn.ModuleDict({"description": description})})
        self.transformer = Transformer(config)
        self.out_norm = nn.LayerNorm(dim)
        self.linears = nn.ModuleList(
            nn.Linear(dim, config.codebook_size, bias=False) for _ in range(config.num_codebooks)
        )
        for table in [*self.emb, *self.linears]:
            gaussian_(table.weight, dim)

    @property
    def text_projection(self) -> nn.Linear:
        """The layer from the text encoder's width to the model's."""
        return self.get_submodule("condition_provider.conditioners.description.output_proj")  # type: ignore[return-value]

    def num_parameters(self) -> int:
        """Trained parameters (the frozen text encoder is not part of this module)."""
        return sum(p.numel() for p in self.parameters())

    def _embed(self, tokens: Tensor) -> Tensor:
        """Sum of the K embeddings: `[B, K, S]` ids to `[B, S, D]`."""
        x = self.emb[0](tokens[:, 0])
        for k in range(1, self.config.num_codebooks):
            x = x + self.emb[k](tokens[:, k])
        return x

    def _project_text(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """`[B, L, E]` to `[B, L, D]`, zero where masked (the projection has a bias)."""
        return self.text_projection(text).masked_fill(~text_mask[..., None], 0.0)

    def hidden(self, tokens: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """What the heads read: `[B, S, D]`; see `forward` for the arguments."""
        return self.out_norm(self.transformer(self._embed(tokens), self._project_text(text, text_mask), text_mask))

    def forward(self, tokens: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Logits of the next column for every column.

        Args:
            tokens: `[B, K, S]` long, ids 0..V where V is the special token.
            text: `[B, L, E]` float, hidden states of the frozen text encoder.
            text_mask: `[B, L]` bool; a row without a true value is the null condition.

        Returns:
            logits `[B, K, S, V]`.
        """
        x = self.hidden(tokens, text, text_mask)
        return torch.stack([head(x) for head in self.linears], dim=1)

    @torch.no_grad()
    def start_cache(self, text: Tensor, text_mask: Tensor, max_steps: int) -> Cache:
        """An empty cache for `max_steps` columns, with the text's keys and values computed once.

        Args:
            text, text_mask: as in `forward`.
            max_steps: columns that will be fed at most.
        """
        batch, heads = text.shape[0], self.config.num_heads
        cache = Cache(max_steps=max_steps, text_mask=text_mask)
        projected = self._project_text(text, text_mask)
        shape = (batch, heads, max_steps, self.config.dim // heads)
        for block in self.transformer.layers:
            cache.keys.append(projected.new_zeros(shape))
            cache.values.append(projected.new_zeros(shape))
            if self.config.cross_attention:
                keys, values = block.cross_attention.project_text(projected)  # type: ignore[union-attr, operator]
                cache.cross_keys.append(keys)
                cache.cross_values.append(values)
        return cache

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Feed one column and get the logits of the next; advances `cache.position`.

        Args:
            tokens: `[B, K]` long.
            cache: from `start_cache`, same batch.

        Returns:
            logits `[B, K, V]`, equal to `forward`'s at this column up to float rounding.

        Raises:
            ValueError: the cache is full.
        """
        if cache.position >= cache.max_steps:
            raise ValueError(
                f"the cache holds {cache.max_steps} columns and all are used; start it with more max_steps"
            )
        x = self.out_norm(self.transformer.step(self._embed(tokens[..., None]), cache))
        cache.position += 1
        return torch.stack([head(x[:, 0]) for head in self.linears], dim=1)
