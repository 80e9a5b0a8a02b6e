"""Codec training on two processes (gloo): codebooks stay equal to the bit, and two ranks do what one does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from musicgen import codec as codecs
from training.codec import quantiser
from training.codec.quantiser import QuantiserConfig

CONFIG = QuantiserConfig(decay=0.5, kmeans_iterations=3)
BUFFERS = ("embed", "embed_avg", "cluster_size")


def learn(latents: torch.Tensor, start: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three steps of four small codebooks on this process's `latents [steps, B, H, T]`, one entry dead at first."""
    books = codecs.build(codecs.CodecConfig(num_filters=2, hidden_size=8, codebook_size=32)).quantizer
    quantiser.initialise(books, start, CONFIG, seed=0)
    for name in BUFFERS:
        getattr(books.layers[0].codebook, name)[5] = 0.0
    revived = [quantiser.quantise(books, z, CONFIG, train=True, seed=i).revived for i, z in enumerate(latents)]
    found = {f"{k}.{name}": getattr(b.codebook, name) for k, b in enumerate(books.layers) for name in BUFFERS}
    return {**found, "revived": torch.tensor(revived)}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    latents = torch.load(f"{folder}/latents.pt", weights_only=True)
    half = latents.shape[1] // 2
    start = torch.load(f"{folder}/start.pt", weights_only=True) + rank  # ranks that disagree follow the first
    torch.save(learn(latents[:, rank * half : (rank + 1) * half], start), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_codebooks_are_equal_on_both_ranks_and_those_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    latents, start = torch.randn(3, 4, 8, 50), torch.randn(400, 8)
    torch.save(latents, tmp_path / "latents.pt")
    torch.save(start, tmp_path / "start.pt")
    alone = learn(latents, start)
    multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert alone["revived"].sum() > 0
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
