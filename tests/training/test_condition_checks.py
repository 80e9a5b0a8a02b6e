"""The parts of style_check and melody_check that decide what is compared with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from musicgen.adapters import AdapterConfig
from musicgen.chroma import NONE
from musicgen.config import ConditionConfig, LMConfig, StyleConfig
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.style import NONE as NO_CODE
from tests.musicgen.test_degrade import RATE, tones
from training import finetune, melody_check, style_check, train
from training.data import Batch


def batch(first: int, count: int) -> Batch:
    codes = torch.zeros(count, 4, 8, dtype=torch.int16)
    style = torch.arange(first, first + count, dtype=torch.int16)[:, None, None].expand(count, 4, 3)
    frames = np.full(count, 8)
    return Batch(codes, torch.ones(count, 8).bool(), [None] * count, frames, -1, ["k"] * count, style=style)


def test_excerpts_of_another_track_and_none() -> None:
    batches = [batch(0, 4), batch(4, 2)]

    def numbers(of: str) -> list[list[int]]:
        found = style_check.with_styles(batches, of)
        return [made.style[:, 0, 0].tolist() for made in found if made.style is not None]

    assert numbers("own") == [[0, 1, 2, 3], [4, 5]]
    assert numbers("other") == [[3, 4, 5, 0], [1, 2]]
    assert numbers("none") == [[NO_CODE] * 4, [NO_CODE] * 2]


def test_guides_are_worse_in_one_way_each_and_the_same_by_seed() -> None:
    sound = tones(12.0)
    made, again, other = (melody_check.guides(sound, RATE, seed) for seed in (5, 5, 6))
    assert set(made) == set(melody_check.GUIDES)
    assert all(np.array_equal(made[name], again[name]) for name in made)
    assert any(not np.array_equal(made[name], other[name]) for name in made)
    lost = made["holes"] == NONE
    assert 0.1 < lost.mean() < 0.5 and np.array_equal(made["holes"][~lost], made["clean"][~lost])
    assert 0 < (made["jitter"] != made["clean"]).mean() < 0.3, "only where the note changes"


def test_an_adapter_does_not_leave_a_new_input_untrained() -> None:
    plain = LMConfig(dim=16, num_layers=1, num_heads=2, codebook_size=8, condition=ConditionConfig("minilm", 384))
    style = StyleConfig(dim=4, latent_dim=4, width=8, layers=1)
    wider = replace(plain, condition=replace(plain.condition, style=style))
    config = train.TrainConfig(init="x", lm=wider, lora=AdapterConfig(rank=2))
    weights = MusicLM(plain).state_dict()
    with pytest.raises(UserError, match=r"has no .*style.*LORA=2 trains an adapter alone"):
        finetune.check_inputs(config, MusicLM(wider), weights)
    finetune.check_inputs(replace(config, lora=AdapterConfig()), MusicLM(wider), weights)
    finetune.check_inputs(config, MusicLM(plain), weights)
