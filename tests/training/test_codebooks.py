"""A start from the codec's codebooks: the reference's scale, and neighbours that stay neighbours."""

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
