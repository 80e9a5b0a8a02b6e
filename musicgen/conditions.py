"""What the rows of a batch listen to, in one value: text, melody, style, and what stands for them where missing.

Source: Copet et al. 2023, section 2.3; the null conditions are those of the model's `ConditionConfig.null`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musicgen.chroma import HOP, NONE
from musicgen.lm import MusicLM


@dataclass(frozen=True)
class Conditions:
    """What B rows listen to.

    Attributes:
        text: `[B, L, E]` hidden states.
        text_mask: `[B, L]` bool; a row without a true value is the null condition.
        chroma: `[B, C]` uint8, the melody's pitch classes from the start of the clip, 255 for none; None for a model
            without melody input.
        attributes: `[B, N]` float, shares of the attributes' rows (`attributes.weights`); None for none.
        style: `[B, dim]` float, style vectors (`MusicLM.style_vector`), zeros for none; None for none at all.
        places: `[B, L]` bool, places of the text in a prefix where they differ from `text_mask` (`null_places`).
    """

    text: Tensor
    text_mask: Tensor
    chroma: Tensor | None = None
    places: Tensor | None = None
    attributes: Tensor | None = None
    style: Tensor | None = None

    def rows(self, index: Tensor) -> Conditions:
        """These rows, in this order."""
        chroma = self.chroma[index] if self.chroma is not None else None
        places = self.places[index] if self.places is not None else None
        attributes = self.attributes[index] if self.attributes is not None else None
        style = self.style[index] if self.style is not None else None
        return Conditions(self.text[index], self.text_mask[index], chroma, places, attributes, style)

    def without_text(self, lm: MusicLM) -> Conditions:
        """The same melody and style, without attributes, with a null text in the places that the model's null takes."""
        places = None if lm.config.cross_attention else lm.null_places(self.text_mask)
        none = torch.zeros_like(self.text), torch.zeros_like(self.text_mask)
        return Conditions(*none, self.chroma, places, None, self.style)

    def without_melody(self) -> Conditions:
        """The same text without a melody."""
        return replace(self, chroma=None if self.chroma is None else torch.full_like(self.chroma, NONE))

    def without_style(self) -> Conditions:
        """The same text and melody without a style."""
        return replace(self, style=None)

    def is_null(self) -> bool:
        """Whether no row has a condition."""
        has_attributes = self.attributes is not None and bool(self.attributes.any())
        return not (bool(self.text_mask.any()) or self.has_melody() or has_attributes or self.has_style())

    def has_style(self) -> bool:
        """Whether any row has a style."""
        return self.style is not None and bool(self.style.any())

    def has_melody(self) -> bool:
        """Whether any row has a melody."""
        return self.chroma is not None and bool((self.chroma != NONE).any())

    def chroma_from(self, seconds: float, sample_rate_hz: int) -> Tensor | None:
        """The melody from a time of the clip on; it begins again where it ends, as in the reference."""
        if self.chroma is None:
            return None
        return self.chroma.roll(-round(seconds * sample_rate_hz / HOP), dims=1)


def stack(parts: Sequence[Conditions]) -> Conditions:
    """The rows of all parts, one after the other; texts are padded to the longest. Melodies are of one length."""
    longest = max(p.text.shape[1] for p in parts)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], longest - x.shape[1], *x.shape[2:])], dim=1)

    def places(p: Conditions) -> Tensor:
        if p.places is not None:
            return p.places
        null = ~p.text_mask.any(dim=1, keepdim=True)  # one zero stands for a null text, as training drops it
        first = torch.arange(p.text_mask.shape[1], device=null.device) == 0
        return p.text_mask | (null & first)

    melodies = [p.chroma for p in parts if p.chroma is not None]

    def together(rows: Sequence[Tensor | None]) -> Tensor | None:
        """Rows of all parts, zeros for those of a part that has none; None where no part has any."""
        like = next((r for r in rows if r is not None), None)
        if like is None:
            return None
        return torch.cat([like.new_zeros(len(p.text), like.shape[1]) if r is None else r for r, p in zip(rows, parts)])

    return Conditions(
        torch.cat([padded(p.text) for p in parts]),
        torch.cat([padded(p.text_mask) for p in parts]),
        torch.cat(melodies) if melodies else None,
        torch.cat([padded(places(p)) for p in parts]),
        together([p.attributes for p in parts]),
        together([p.style for p in parts]),
    )
