"""The plan: one global batch for any number of ranks, crops on the grid, every draw from (seed, step, item)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen import patterns
from training import plan


def tracks(frames: list[int], weights: list[float] | None = None) -> plan.Tracks:
    rows = np.arange(10, 10 + len(frames), dtype=np.int64)
    return plan.Tracks(rows, np.array(frames, dtype=np.int64), np.array(weights or [1.0] * len(frames)))


@settings(max_examples=50, deadline=None)
@given(
    frames=st.lists(st.integers(1, 2000), min_size=1, max_size=12),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**32),
    world=st.sampled_from([1, 2, 4, 8]),
    crop=st.sampled_from([32, 100, 500, 1500]),
)
def test_global_batch_is_the_same_for_any_world(frames: list[int], step: int, seed: int, world: int, crop: int) -> None:
    rule = plan.CropRule(frames=crop)
    whole, valid = plan.batch(step, seed, tracks(frames), rule, size=16)
    parts = [plan.batch(step, seed, tracks(frames), rule, size=16, rank=r, world=world) for r in range(world)]
    assert [item for items, _ in parts for item in items] == whole
    assert all(np.array_equal(v, valid) for _, v in parts)
    for item in whole:
        total = frames[item.row - 10]
        assert item.start % plan.GRID_FRAMES == 0
        assert item.start >= 0 and 1 <= item.frames <= crop and item.start + item.frames <= total
        if total >= 0.8 * crop:
            assert item.frames >= 0.8 * crop
        else:
            assert item.start == 0 and item.frames == total


def test_items_depend_on_seed_step_and_index_alone() -> None:
    rule, set_ = plan.CropRule(500), tracks([3000] * 50)
    first, _ = plan.batch(7, 1, set_, rule, size=8)
    assert plan.batch(7, 1, set_, rule, size=16)[0][:8] == first  # neighbours do not matter
    assert plan.batch(8, 1, set_, rule, size=8)[0] != first
    assert plan.batch(7, 2, set_, rule, size=8)[0] != first
    assert len({(i.row, i.start) for i in first}) > 5


def test_every_item_of_every_step_has_draws_of_its_own() -> None:
    """Words, melody, attributes and excerpt are dropped by this seed: none may come back at the next step."""
    items = [item for step in (7, 8) for item in plan.batch(step, 1, tracks([3000]), plan.CropRule(500), size=8)[0]]
    assert len({item.words[:-1] for item in items}) == len(items) == 16


def test_draws_are_spread_as_stated() -> None:
    set_ = tracks([1000, 3000, 3000], [1.0, 1.0, 2.0])
    for by, expected in (("tracks", [0.25, 0.25, 0.5]), ("seconds", [0.1, 0.3, 0.6])):
        rule = plan.CropRule(500, sample_by=by, condition_dropout=0.2)  # type: ignore[arg-type]
        items = [i for step in range(60) for i in plan.batch(step, 0, set_, rule, size=64)[0]]
        shares = np.bincount([i.row - 10 for i in items], minlength=3) / len(items)
        assert shares == pytest.approx(expected, abs=0.03)
        assert np.mean([not i.keep_condition for i in items]) == pytest.approx(0.2, abs=0.02)
        starts = {i.start for i in items if i.row == 11}
        # 3000 frames, at least 400 of a crop inside: starts 0, 32, .. 2592, all of them reached
        assert starts == set(range(0, 2601, 32)) and plan.num_starts(3000, rule) == len(starts)


def test_crops_leave_the_tails_of_tracks_out() -> None:
    """No crop reaches into the last 100 frames, but of a track too short for that."""
    rule = plan.CropRule(500, tail_frames=100)
    items = [i for step in range(40) for i in plan.batch(step, 0, tracks([1000, 550, 420]), rule, size=16)[0]]
    ends = {row: max(i.start + i.frames for i in items if i.row == row) for row in (10, 11, 12)}
    assert ends == {10: 900, 11: 450, 12: 400}
    assert min(i.frames for i in items) >= 400
    fixed = plan.validation(tracks([1000, 550, 420]), rule, limit=100)
    assert [(i.row, i.start, i.frames) for i in fixed] == [(10, 0, 500), (10, 500, 400), (11, 0, 450), (12, 0, 400)]


def test_targets_of_both_tails() -> None:
    full, reference = (patterns.scored_frames(500, 4, tail=tail) for tail in ("full", "reference"))
    assert plan.num_targets([500, 500], full).tolist() == [1000] * 4
    assert plan.num_targets([500], reference).tolist() == [500, 499, 498, 497]
    assert plan.num_targets([498, 100], reference).tolist() == [598, 598, 598, 597]


def test_validation_crops_are_fixed_and_cover() -> None:
    rule = plan.CropRule(500)
    items = plan.validation(tracks([1000, 1450, 300, 1300]), rule, limit=100)
    assert [(i.row, i.start, i.frames) for i in items] == [
        (10, 0, 500), (10, 500, 500), (11, 0, 500), (11, 500, 500),
        (11, 1000, 450), (12, 0, 300), (13, 0, 500), (13, 500, 500),
    ]  # fmt: skip
    thinned = plan.validation(tracks([1000, 1450, 300, 1300]), rule, limit=3)
    assert [(i.row, i.start) for i in thinned] == [(10, 0), (11, 1000), (13, 500)]
    assert all(i.keep_condition for i in items)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        plan.batch(0, 0, tracks([100]), plan.CropRule(32), size=6, world=4)
