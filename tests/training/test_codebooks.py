"""A start from the codec's codebooks: the reference's scale, and neighbours that stay neighbours."""

import pytest
import torch

from musicgen import codec as codecs
from musicgen.config import LMConfig
from musicgen.lm import MusicLM
from training.codebooks import start_from_codebooks


def test_rows_are_the_codebooks_turned() -> None:
    torch.manual_seed(0)
    codec = codecs.tiny()
    lm = MusicLM(LMConfig(dim=64, num_layers=1, num_heads=2))
    special = [table.weight[2048].clone() for table in lm.emb]
    start_from_codebooks(lm, codec)
    for k in range(4):
        vectors = codec.model.quantizer.layers[k].codebook.embed
        for rows in (lm.emb[k].weight[:2048], lm.linears[k].weight):
            assert abs(rows.std().item() * 8 - 1) < 0.02
            ratio = torch.cdist(rows[:50], rows[:50]) / torch.cdist(vectors[:50], vectors[:50]).clamp(min=1e-9)
            off = ~torch.eye(50, dtype=torch.bool)
            assert (ratio[off] / ratio[off].mean() - 1).abs().max() < 1e-3, "distances keep their proportions"
        assert torch.equal(lm.emb[k].weight[2048], special[k])
    assert not torch.allclose(lm.linears[0].weight, lm.linears[1].weight)


@pytest.mark.parametrize("books", [4, 8])
def test_rows_lie_around_zero_and_left_and_right_of_a_level_start_alike(books: int) -> None:
    """Stereo tokens stand 1L 1R 2L 2R …, both of a level's codebook."""
    torch.manual_seed(0)
    codec = codecs.tiny()
    for layer in codec.model.quantizer.layers:
        layer.codebook.embed.add_(3.0)  # off the middle, as trained codebooks are
    lm = MusicLM(LMConfig(dim=64, num_layers=1, num_heads=2, num_codebooks=books))
    start_from_codebooks(lm, codec)
    for k in range(books):
        rows = lm.linears[k].weight
        assert rows.mean(0).abs().max() < 1e-4
        vectors = codec.model.quantizer.layers[k * 4 // books].codebook.embed[:50]
        ratio = torch.cdist(rows[:50], rows[:50])[0, 1:] / torch.cdist(vectors, vectors)[0, 1:]
        assert (ratio / ratio.mean() - 1).abs().max() < 1e-3
