"""MusicLM: K embeddings summed, a transformer that listens to text, K heads.

The model knows columns, not audio: `musicgen.patterns` lays codes out in columns, `musicgen.conditioning` turns
captions into the hidden states of a frozen encoder, and this file maps both to logits. Text enters by cross-attention
(the text models) or stands before the columns, `[melody | text | columns]` (the melody models of the reference). A row
of the text mask without any true value is the null condition: its cross-attention output is exactly zero.

`forward` scores a whole sequence; `musicgen.engine` goes column by column (generation) and gives the same logits.
Parameter names are audiocraft's flat names.

Source: Copet et al. 2023, section 3; audiocraft `models/lm.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen import attributes as named
from musicgen.chroma import NONE, NUM_CHROMA
from musicgen.config import LMConfig
from musicgen.transformer import Transformer, gaussian_


class MusicLM(nn.Module):
    """The language model of `config`; random weights come from torch's global generator."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        dim, rows = config.dim, config.codebook_size + 1
        self.emb = nn.ModuleList(nn.Embedding(rows, dim) for _ in range(config.num_codebooks))
        # Nested as in audiocraft, so that the projection has the key
        # condition_provider.conditioners.description.output_proj; it keeps PyTorch's default initialisation.
        conditioners = {"description": nn.ModuleDict({"output_proj": nn.Linear(config.condition.text_dim, dim)})}
        if config.condition.melody:
            conditioners["self_wav"] = nn.ModuleDict({"output_proj": nn.Linear(NUM_CHROMA, dim)})
        if config.condition.attributes:
            table = nn.Embedding(named.size(config.condition.attributes), dim)
            conditioners["attributes"] = nn.ModuleDict({"embed": table})
        self.condition_provider = nn.ModuleDict({"conditioners": nn.ModuleDict(conditioners)})
        self.transformer = Transformer(config)
        self.out_norm = nn.LayerNorm(dim)
        self.linears = nn.ModuleList(
            nn.Linear(dim, config.codebook_size, bias=False) for _ in range(config.num_codebooks)
        )
        tables = [conditioners["attributes"]["embed"]] if config.condition.attributes else []
        for table in [*self.emb, *self.linears, *tables]:
            gaussian_(table.weight, dim)
        if config.condition.style.dim:  # last, so that all else is drawn as without it
            from musicgen.style import StyleEncoder

            encoder = StyleEncoder(config.condition.style)
            self.condition_provider.get_submodule("conditioners").add_module("style", encoder)

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

    def project_text(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """`[B, L, E]` to `[B, L, D]`, zero where masked (the projection has a bias)."""
        return self.text_projection(text).masked_fill(~text_mask[..., None], 0.0)

    def _project_melody(self, chroma: Tensor | None, batch: int, like: Tensor) -> Tensor:
        """Bins `[B, C]` (or none at all) to `[B, chroma_frames, D]`; see `forward`."""
        condition = self.config.condition
        if chroma is None:
            chroma = torch.full((batch, 1), NONE, device=like.device)
        elif not condition.melody:
            raise ValueError("this model has no melody input (condition.melody is false)")
        times = -(-condition.chroma_frames // chroma.shape[1])
        bins = chroma.long().repeat(1, times)[:, : condition.chroma_frames]
        missing = bins == NONE
        one_hot = F.one_hot(bins.masked_fill(missing, 0), NUM_CHROMA).to(like.dtype)
        projected = self.get_submodule("condition_provider.conditioners.self_wav.output_proj")(one_hot)
        return projected if condition.null == "released" else projected.masked_fill(missing[..., None], 0.0)

    def null_places(self, text_mask: Tensor) -> Tensor:
        """Places `[B, L]` bool that a null text takes in the prefix when it stands against prompts of this mask.

        As zeros as long as the prompt (`null: released`), or as one zero, which is how training drops a text.
        """
        if self.config.condition.null == "released":
            return text_mask
        places = torch.zeros_like(text_mask)
        places[:, 0] = True
        return places

    def _attributes(self, shares: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """One vector per attribute, `[B, A, D]`, and which of them an item has, `[B, A]`."""
        given = self.config.condition.attributes
        table = self.get_parameter("condition_provider.conditioners.attributes.embed.weight")
        if shares is None:
            shares = like.new_zeros(like.shape[0], len(table))
        parts = shares.to(like.dtype).split([a.size for a in given], dim=1)
        rows = table.split([a.size for a in given])
        vectors = torch.stack([part @ row for part, row in zip(parts, rows)], dim=1)
        return vectors, torch.stack([part.any(dim=1) for part in parts], dim=1)

    def style_vector(self, latents: Tensor) -> Tensor:
        """Style vectors `[B, dim]` of excerpts, latents `[B, F, H]` of `style.Latents`; zero for a row of zeros.

        Raises:
            ValueError: this model has no style.
        """
        if not self.config.condition.style.dim:
            raise ValueError("this model has no style (condition.style.dim is 0)")
        return self.get_submodule("condition_provider.conditioners.style")(latents)

    def heard(
        self,
        text: Tensor,
        text_mask: Tensor,
        text_places: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Text and attributes as the transformer takes them; see `forward` for the arguments.

        Returns:
            states `[B, L + A, D]`, a mask `[B, L + A]` of what an item has, and the places `[B, L + A]` that it takes
            in a prefix.
        """
        states = self.project_text(text, text_mask)
        if text_places is None:
            is_null = ~text_mask.any(dim=1, keepdim=True)
            first = torch.arange(text_mask.shape[1], device=text_mask.device) == 0
            text_places = text_mask | (is_null & first)
        if self.config.condition.attributes:
            vectors, has = self._attributes(attributes, states)
            states = torch.cat([states, vectors], dim=1)
            text_mask, text_places = torch.cat([text_mask, has], dim=1), torch.cat([text_places, has], dim=1)
        elif attributes is not None:
            raise ValueError("this model has no attributes (condition.attributes is empty)")
        return states, text_mask, text_places

    def prefix(self, states: Tensor, places: Tensor, chroma: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What stands before the columns, `[B, P, D]`, and which of it an item has, `[B, P]`.

        Args:
            states, places: from `heard`.
            chroma: as in `forward`.
        """
        parts, visible = [], []
        if self.config.condition.melody or chroma is not None:
            parts.append(self._project_melody(chroma, states.shape[0], states))
            visible.append(torch.ones(parts[0].shape[:2], dtype=torch.bool, device=states.device))
        if not self.config.cross_attention:
            parts.append(states)
            visible.append(places)
        if not parts:
            return None, None
        return torch.cat(parts, dim=1), torch.cat(visible, dim=1)

    def hidden(
        self,
        tokens: Tensor,
        text: Tensor,
        text_mask: Tensor,
        chroma: Tensor | None = None,
        text_places: Tensor | None = None,
        attributes: Tensor | None = None,
        style: Tensor | None = None,
    ) -> Tensor:
        """What the heads read: `[B, S, D]`; see `forward` for the arguments."""
        states, mask, places = self.heard(text, text_mask, text_places, attributes)
        prefix, visible = self.prefix(states, places, chroma)
        if self.config.cross_attention:
            visible = None  # a melody alone: every item has all of it
        vectors = None if style is None else self.style_vector(style)
        return self.out_norm(self.transformer(self._embed(tokens), states, mask, prefix, visible, vectors))

    def forward(
        self,
        tokens: Tensor,
        text: Tensor,
        text_mask: Tensor,
        chroma: Tensor | None = None,
        text_places: Tensor | None = None,
        attributes: Tensor | None = None,
        style: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next column for every column.

        Args:
            tokens: `[B, K, S]` long, ids 0..V where V is the special token.
            text: `[B, L, E]` float, hidden states of the frozen text encoder.
            text_mask: `[B, L]` bool; a row without a true value is the null condition.
            chroma: `[B, C]` integers, the melody's pitch class per chroma frame (0..11, 255 for none), for models
                with a melody input; None is no melody. It is repeated or cut to `condition.chroma_frames`.
            text_places: `[B, L]` bool, places that the text takes in the prefix of a model without cross-attention:
                those of `text_mask`, and one zero for a null text, unless given (see `null_places`).
            attributes: `[B, N]` float, shares of the rows of the attributes' tables (`attributes.weights`); an
                attribute without any share is not heard, and none of them without this argument.
            style: `[B, F, H]` float, latents of an excerpt of music (`style.Latents`) in whose style to go on, zero
                where there is none.

        Returns:
            logits `[B, K, S, V]`.

        Raises:
            ValueError: a melody or a style for a model that has no input for it.
        """
        x = self.hidden(tokens, text, text_mask, chroma, text_places, attributes, style)
        return torch.stack([head(x) for head in self.linears], dim=1)
