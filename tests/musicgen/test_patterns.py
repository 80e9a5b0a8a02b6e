"""The delay pattern: anchors of the reference, and what must hold for any clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen import patterns

S = 2048


def rows_of(columns: torch.Tensor) -> list[str]:
    return ["".join("S" if v == S else str(v) for v in row) for row in columns[0].tolist()]


def clip(frames: int, books: int = 4) -> torch.Tensor:
    return torch.arange(1, frames + 1).repeat(1, books, 1)


def test_full_layout_is_the_generation_layout_of_the_reference() -> None:
    columns, mask = patterns.interleave(clip(6), S)
    assert rows_of(columns) == ["S123456SSS", "SS123456SS", "SSS123456S", "SSSS123456"]
    assert torch.equal(mask, columns[0] != S)


def test_reference_tail_is_the_training_layout_of_the_reference() -> None:
    columns, _ = patterns.interleave(clip(6), S, tail="reference")
    assert rows_of(columns) == ["S123456", "SS12345", "SSS1234", "SSSS123"]


def test_thirty_seconds() -> None:
    codes = torch.zeros(1, 4, 1500, dtype=torch.long)
    assert patterns.interleave(codes, S)[0].shape[-1] == 1504
    inputs, _, mask = patterns.training_columns(codes, S, tail="reference")
    assert inputs.shape[-1] == 1501
    assert mask.sum(dim=-1).tolist() == [[1500, 1499, 1498, 1497]]
    inputs, _, mask = patterns.training_columns(codes, S, tail="full")
    assert inputs.shape[-1] == 1503  # T + K - 1
    assert mask.sum(dim=-1).tolist() == [[1500] * 4]


def test_stereo_delays() -> None:
    delays = [0, 0, 1, 1, 2, 2, 3, 3]
    columns, _ = patterns.interleave(clip(5, 8), S, delays=delays)
    assert columns.shape[-1] == 9
    assert patterns.training_columns(clip(5, 8), S, tail="reference", delays=delays)[0].shape[-1] == 6
    assert torch.equal(patterns.deinterleave(columns, delays=delays), clip(5, 8))


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 40),
    books=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    tail=st.sampled_from(["full", "reference"]),
)
def test_any_clip(frames: int, books: int, seed: int, tail: patterns.Tail) -> None:
    codes = torch.randint(0, S, (2, books, frames), generator=torch.Generator().manual_seed(seed))
    columns, mask = patterns.interleave(codes, S)
    assert torch.equal(patterns.deinterleave(columns), codes)
    assert (columns[:, ~mask] == S).all() and (columns[:, mask] != S).all()
    inputs, targets, scored = patterns.training_columns(codes, S, tail=tail)
    # A target is the code that stands in the next column of the full layout, and never one the model has already read.
    width = inputs.shape[-1]
    following = torch.cat([columns, torch.full_like(columns[..., :1], S)], dim=-1)[..., 1 : width + 1]
    assert torch.equal(torch.where(scored, targets, S), torch.where(scored, following, S))
    assert torch.equal(inputs, columns[..., :width])
    expected = [frames if tail == "full" else max(frames - q, 0) for q in range(books)]
    assert scored.sum(dim=-1).tolist() == [expected, expected]


def test_padded_frames_are_special_and_unscored() -> None:
    codes = torch.randint(0, S, (1, 4, 8))
    valid = torch.arange(8)[None] < 5
    inputs, targets, scored = patterns.training_columns(codes, S, valid=valid)
    assert scored.sum(dim=-1).tolist() == [[5, 5, 5, 5]]
    short, short_targets, short_scored = patterns.training_columns(codes[..., :5], S)
    assert torch.equal(inputs[..., : short.shape[-1]], short)
    assert (inputs[..., short.shape[-1] :] == S).sum() >= 4 * 2
    assert torch.equal(targets[scored], short_targets[short_scored])


def test_unknown_cells_survive() -> None:
    unknown = torch.full((1, 4, 3), -1)
    columns, mask = patterns.interleave(unknown, S)
    assert (columns[0][mask] == -1).all() and (columns[0][~mask] == S).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="ascending"):
        patterns.delays_of(3, [0, 2, 1])
    with pytest.raises(ValueError, match="hold no frame"):
        patterns.deinterleave(torch.zeros(1, 4, 4))
