"""Codebook patterns: anchors of the reference, and what must hold for any clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen import patterns
from musicgen.config import LMConfig

S = 2048
STEREO = [name for name in patterns.PATTERNS if name.startswith("stereo")]


def rows_of(columns: torch.Tensor) -> list[str]:
    return ["".join("S" if v == S else str(v) for v in row) for row in columns[0].tolist()]


def clip(frames: int, books: int = 4) -> torch.Tensor:
    return torch.arange(1, frames + 1).repeat(1, books, 1)


def drawn(layout: patterns.Layout) -> list[str]:
    return ["".join("S" if t < 0 else str(t + 1) for t in row) for row in layout.frames.tolist()]


def test_full_layout_is_the_generation_layout_of_the_reference() -> None:
    columns, mask = patterns.interleave(clip(6), S)
    assert rows_of(columns) == ["S123456SSS", "SS123456SS", "SSS123456S", "SSSS123456"]
    assert torch.equal(mask, columns[0] != S)


def test_reference_tail_is_the_training_layout_of_the_reference() -> None:
    columns, _ = patterns.interleave(clip(6), S, tail="reference")
    assert rows_of(columns) == ["S123456", "SS12345", "SSS1234", "SSSS123"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("parallel", ["S123", "S123", "S123", "S123"]),
        ("partial_delay", ["S123S", "SS123", "SS123", "SS123"]),
        ("flattening", ["S1SSS2SSS3SSS", "SS1SSS2SSS3SS", "SSS1SSS2SSS3S", "SSSS1SSS2SSS3"]),
        ("partial_flattening", ["S1S2S3S", "SS1S2S3", "SS1S2S3", "SS1S2S3"]),
        ("coarse_first", ["S123SSS", "SSSS123", "SSSS123", "SSSS123"]),
        ("musiclm", ["S1S2S3SSSSSSS", "SS1S2S3SSSSSS", "SSSSSSS1S2S3S", "SSSSSSSS1S2S3"]),
    ],
)
def test_three_frames(name: str, rows: list[str]) -> None:
    columns, mask = patterns.interleave(clip(3), S, pattern=name)
    assert rows_of(columns) == rows
    assert torch.equal(mask, columns[0] != S)


def test_stereo_orders() -> None:
    partial = patterns.layout("stereo_partial_delay", 8, 5)
    assert (partial.length, partial.valid) == (9, 6)
    assert drawn(partial)[:4] == ["S12345SSS", "S12345SSS", "SS12345SS", "SS12345SS"]
    assert drawn(partial)[6:] == ["SSSS12345", "SSSS12345"]
    assert drawn(patterns.layout("stereo_delay", 8, 2)) == [("S" * (1 + q) + "12" + "S" * (7 - q)) for q in range(8)]
    with pytest.raises(ValueError, match="even number of codebooks"):
        patterns.layout("stereo_delay", 5, 2)


def test_unrolling_with_delays() -> None:
    layout = patterns.spread(patterns.unroll_steps(4, [0, 1, 1], [0, 3, 3]), 3, 4)
    assert drawn(layout) == ["S123S4SSSSSS", "SSSS1S2S3S4S", "SSSS1S2S3S4S"]
    assert layout.valid == 9
    with pytest.raises(ValueError, match="share a delay"):
        patterns.unroll_steps(4, [0, 1, 1], [0, 3, 2])


@pytest.mark.parametrize(
    ("name", "length", "valid"),
    [
        ("delay", 1504, 1501),
        ("partial_delay", 1502, 1501),
        ("parallel", 1501, 1501),
        ("flattening", 6001, 6001),
        ("partial_flattening", 3001, 3001),
        ("coarse_first", 3001, 3001),
        ("musiclm", 6001, 6001),
    ],
)
def test_thirty_seconds(name: str, length: int, valid: int) -> None:
    layout = patterns.layout(name, 4, 1500)
    assert (layout.length, layout.valid) == (length, valid)
    codes = torch.zeros(1, 4, 1500, dtype=torch.long)
    inputs, _, mask = patterns.training_columns(codes, S, pattern=name)
    assert inputs.shape[-1] == length - 1
    assert mask.sum(dim=-1).tolist() == [[1500] * 4]


def test_targets_of_the_reference() -> None:
    codes = torch.zeros(1, 4, 1500, dtype=torch.long)
    inputs, _, mask = patterns.training_columns(codes, S, tail="reference")
    assert inputs.shape[-1] == 1501
    assert mask.sum(dim=-1).tolist() == [[1500, 1499, 1498, 1497]]
    stereo = patterns.scored_frames(5, 8, pattern="stereo_partial_delay", tail="reference")
    assert stereo == [5, 5, 4, 4, 3, 3, 2, 2]


any_clip = given(
    name=st.sampled_from(list(patterns.PATTERNS)),
    frames=st.integers(1, 40),
    books=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    tail=st.sampled_from(["full", "reference"]),
)


@settings(max_examples=150, deadline=None)
@any_clip
def test_any_clip(name: str, frames: int, books: int, seed: int, tail: patterns.Tail) -> None:
    books += books % 2 if name in STEREO else 0
    codes = torch.randint(0, S, (2, books, frames), generator=torch.Generator().manual_seed(seed))
    columns, mask = patterns.interleave(codes, S, pattern=name)
    assert columns.shape[-1] == patterns.num_columns(frames, books, pattern=name)
    assert torch.equal(patterns.deinterleave(columns, pattern=name), codes)
    assert (columns[:, ~mask] == S).all() and (columns[:, mask] != S).all() and not mask[:, 0].any()
    inputs, targets, scored = patterns.training_columns(codes, S, pattern=name, tail=tail)
    # A target is the code that stands in the next column of the full layout, and never one the model has already read.
    width = inputs.shape[-1]
    following = torch.cat([columns, torch.full_like(columns[..., :1], S)], dim=-1)[..., 1 : width + 1]
    assert torch.equal(torch.where(scored, targets, S), torch.where(scored, following, S))
    assert torch.equal(inputs, columns[..., :width])
    limits = patterns.scored_frames(frames, books, pattern=name, tail=tail)
    assert scored.sum(dim=-1).tolist() == [limits, limits]
    if tail == "full":
        assert limits == [frames] * books


@settings(max_examples=150, deadline=None)
@any_clip
def test_each_code_once_and_never_before_what_it_builds_on(
    name: str, frames: int, books: int, seed: int, tail: patterns.Tail
) -> None:
    books += books % 2 if name in STEREO else 0
    layout = patterns.layout(name, books, frames)
    place: dict[tuple[int, int], int] = {}
    for q, row in enumerate(layout.frames.tolist()):
        for s, t in enumerate(row):
            if t >= 0:
                assert (t, q) not in place
                place[t, q] = s
    assert len(place) == frames * books
    for (t, q), s in place.items():
        assert s >= 1
        if t:  # time goes forward in every codebook
            assert place[t - 1, q] < s
        if q:  # the coarser code of a frame never comes after the finer one
            assert place[t, q - 1] <= s
    for frame in (0, frames // 2, frames - 1):
        first = layout.first_column(frame)
        assert first == min(place[frame, q] for q in range(books))
    done = layout.complete().tolist()
    last = [max(place[t, q] for q in range(books)) for t in range(frames)]
    for s in range(layout.length):
        whole = 0
        while whole < frames and last[whole] <= s:
            whole += 1
        assert done[s] == whole


@pytest.mark.parametrize("name", list(patterns.PATTERNS))
def test_padded_frames_are_special_and_unscored(name: str) -> None:
    codes = torch.randint(0, S, (1, 4, 8))
    valid = torch.arange(8)[None] < 5
    inputs, targets, scored = patterns.training_columns(codes, S, valid=valid, pattern=name)
    assert scored.sum(dim=-1).tolist() == [[5, 5, 5, 5]]
    held = patterns.layout(name, 4, 8).frames
    assert (inputs[0][held[:, :-1] >= 5] == S).all()
    for q in range(4):
        assert torch.equal(targets[0, q][scored[0, q]], codes[0, q, :5])


def test_unknown_cells_survive() -> None:
    unknown = torch.full((1, 4, 3), -1)
    columns, mask = patterns.interleave(unknown, S)
    assert (columns[0][mask] == -1).all() and (columns[0][~mask] == S).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="ascending"):
        patterns.delay_steps(3, [0, 2, 1])
    with pytest.raises(ValueError, match="hold no frame"):
        patterns.deinterleave(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="no whole number of frames"):
        patterns.deinterleave(torch.zeros(1, 4, 8), pattern="flattening")
    with pytest.raises(ValueError, match="at least one frame"):
        patterns.layout("delay", 4, 0)
    with pytest.raises(ValueError, match=r"unknown pattern 'delayed'; allowed: parallel, delay"):
        LMConfig(pattern="delayed")
    with pytest.raises(ValueError, match="even number"):
        LMConfig(pattern="stereo_partial_delay", num_codebooks=5)
