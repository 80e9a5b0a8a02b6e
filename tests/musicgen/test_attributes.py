"""Named attributes: what a value means, what is refused, and that each of them acts on its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from musicgen import attributes as named
from musicgen import settings
from musicgen.attributes import AttributeConfig
from musicgen.conditions import Conditions, stack
from musicgen.config import ConditionConfig, LMConfig
from musicgen.engine import Engine
from musicgen.errors import UserError
from musicgen.lm import MusicLM

GENRE = AttributeConfig("genre", values=("jazz", "folk", "Bossa Nova"))
ALL = (GENRE, AttributeConfig("tempo"), AttributeConfig("key"))
CONFIG = LMConfig(
    dim=48,
    num_layers=2,
    num_heads=4,
    codebook_size=64,
    condition=ConditionConfig(text_encoder="minilm", text_dim=20, attributes=ALL),
)


def test_labels_and_numbers() -> None:
    assert GENRE.weights("folk").tolist() == [0, 1, 0]
    assert GENRE.weights(" JAZZ, bossa  nova").tolist() == [0.5, 0, 0.5]
    assert GENRE.weights(["jazz", "folk"]).tolist() == [0.5, 0.5, 0]
    tempo = AttributeConfig("tempo")
    assert tempo.field == "bpm" and tempo.size == 51
    halfway = tempo.weights("122")
    assert halfway[20] == pytest.approx(0.5) and halfway[21] == pytest.approx(0.5) and halfway.sum() == 1
    assert tempo.weights(240.0)[50] == 1 and tempo.weights(40)[0] == 1
    key = AttributeConfig("key")
    assert np.array_equal(key.weights("Bb major"), key.weights("a# Major")) and key.size == 24
    assert AttributeConfig("tempo", values=("slow", "fast")).size == 2 and AttributeConfig("tempo", "pulse").size == 51


@pytest.mark.parametrize(
    ("given", "meant"),
    [("Am", "A minor"), ("a min", "A minor"), ("B♭ major", "A# major"), ("A-flat major", "G# major"), ("C", "C major"),
     ("Cb major", "B major"), ("E# minor", "F minor"), ("F♯m", "F# minor"), ("bbm", "A# minor"), ("Db", "C# major")],
)  # fmt: skip
def test_spellings_of_a_key(given: str, meant: str) -> None:
    key = AttributeConfig("key")
    assert key.field == "key_signature" and np.array_equal(key.weights(given), key.weights(meant))
    spelt = AttributeConfig("key", values=("Bb major", "A minor"))
    assert spelt.weights("A# major").tolist() == [1, 0] and spelt.weights("am").tolist() == [0, 1]


@pytest.mark.parametrize("given", ["a", "AM", "H major", "C dorian", "C7", "A, minor"])
def test_what_is_no_key_is_unknown(given: str) -> None:
    with pytest.raises(UserError, match="attribute 'key' has no value"):
        AttributeConfig("key").weights(given)


def test_a_label_with_commas_is_one() -> None:
    records = [{"genre": "Folk, World, & Country"}, {"genre": "Jazz"}, {"genre": "Folk"}]
    (genre,) = named.learned((AttributeConfig("genre"),), records)
    assert genre.values == ("Folk", "Folk, World, & Country", "Jazz")
    assert genre.weights("folk, world, & country").tolist() == [0, 1, 0] == genre.weights([genre.values[1]]).tolist()
    assert genre.weights("folk, jazz").tolist() == [0.5, 0, 0.5]
    assert [named.of_record([genre], record, [True]).argmax() for record in records] == [1, 2, 0]


def test_what_is_unknown_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown attribute 'gener'; did you mean 'genre'"):
        named.weights(ALL, {"gener": "jazz"})
    with pytest.raises(
        UserError, match=r"attribute 'genre' has no value 'jaz'; did you mean 'jazz'.* Known: jazz, folk"
    ):
        named.weights(ALL, {"genre": "jaz"})
    with pytest.raises(UserError, match=r"attribute 'genre' has no value 'quartz'\. Known: jazz, folk"):
        named.weights(ALL, {"genre": "quartz"})
    for wrong in ("fast", "300", "nan"):
        with pytest.raises(UserError, match="give a number from 40 to 240"):
            named.weights(ALL, {"tempo": wrong})
    with pytest.raises(UserError, match="this model has none; say it in the PROMPT"):
        named.weights((), {"genre": "jazz"})


def test_of_a_track() -> None:
    """The record's columns; what is not recorded, not kept or not known is not heard."""
    record = {"genre": "folk", "bpm": 122.0, "key": None, "moods": ["calm"]}
    whole = named.of_record(ALL, record, [True, True, True])
    assert np.array_equal(whole, named.weights(ALL, {"genre": "folk", "tempo": 122}))
    assert named.of_record(ALL, record, [False, True, True])[:3].sum() == 0
    assert not named.of_record(ALL, {"genre": "polka", "bpm": 400.0}, [True] * 3).any()


def test_labels_of_the_data_and_dropout() -> None:
    records = [{"genre": "Jazz", "moods": ["calm", "warm"]}, {"genre": "jazz"}, {"genre": "folk", "moods": []}]
    genre, mood, tempo = named.learned(
        (AttributeConfig("genre"), AttributeConfig("mood"), AttributeConfig("tempo")), records
    )
    assert genre.values == ("folk", "Jazz") and mood.values == ("calm", "warm") and tempo == AttributeConfig("tempo")
    with pytest.raises(UserError, match="attribute 'era' is in no track"):
        named.learned((AttributeConfig("era"),), records)
    mixed = (replace(GENRE, dropout=0.2), replace(ALL[1], dropout=0.8))
    draws = np.array([named.kept(mixed, (1, 2, i)) for i in range(4000)])
    assert np.allclose(draws.mean(axis=0), [0.8, 0.2], atol=0.03)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.05, "each on its own"
    assert named.kept(mixed, (1, 2, 3)) == named.kept(mixed, (1, 2, 3))


def test_attributes_that_no_track_has_are_found_by_reading_few() -> None:
    wrong = AttributeConfig("key", field="key")
    read: list[int] = []

    def records(n: int) -> Iterator[dict[str, object]]:
        for i in range(n):
            read.append(i)
            yield {"key": "3f9a" * 8, "key_signature": "G major", "bpm": 90.0 if i else None}

    assert named.unheard((AttributeConfig("key"), AttributeConfig("tempo")), records(50)) == [] and read == [0, 1]
    assert named.unheard((AttributeConfig("tempo"), wrong, GENRE), records(3)) == [wrong, GENRE]


def test_settings_travel(tmp_path: object) -> None:
    assert settings.from_dict(LMConfig, settings.to_dict(CONFIG)) == CONFIG
    assert LMConfig(condition=ConditionConfig(attributes=({"name": "tempo"},))).condition.attributes == (ALL[1],)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names one twice"):
        ConditionConfig(attributes=(GENRE, GENRE))
    with pytest.raises(ValueError, match="low < high"):
        AttributeConfig("energy", bins=4)


def given(**values: object) -> torch.Tensor:
    return torch.from_numpy(named.weights(ALL, values))[None]


@pytest.mark.parametrize("cross", [True, False])
def test_each_acts_and_the_step_follows_the_forward(cross: bool) -> None:
    torch.manual_seed(0)
    lm = MusicLM(replace(CONFIG, cross_attention=cross)).eval().requires_grad_(False)
    assert lm.num_parameters() == replace(CONFIG, cross_attention=cross).num_parameters()
    tokens = torch.randint(0, 65, (1, 4, 9))
    text, mask = torch.randn(1, 5, 20), torch.ones(1, 5, dtype=torch.bool)
    none = lm(tokens, text, mask)
    assert torch.equal(none, lm(tokens, text, mask, attributes=torch.zeros(1, named.size(ALL))))
    seen = [none]
    for values in ({"genre": "jazz"}, {"genre": "folk"}, {"tempo": 90}, {"tempo": 150}, {"key": "C minor"}):
        out = lm(tokens, text, mask, attributes=given(**values))
        assert all(float((out - other).abs().max()) > 1e-4 for other in seen), values
        seen.append(out)
    near = lm(tokens, text, mask, attributes=given(tempo=151))
    assert (near - seen[4]).norm() < 0.5 * (seen[3] - seen[4]).norm(), "near tempi sound alike"
    alone = lm(tokens, text, torch.zeros_like(mask), attributes=given(genre="jazz"))
    assert not torch.allclose(alone, lm(tokens, text, torch.zeros_like(mask))), "without any text as well"

    with_genre = Conditions(text, mask, attributes=given(genre="jazz", tempo=90))
    rows = stack([with_genre, with_genre.without_text(lm)])
    cache = (engine := Engine(lm)).start(rows, 9)
    engine.listen(cache, rows, None)
    steps = torch.stack([engine.feed(tokens[..., s : s + 1].repeat(2, 1, 1), cache) for s in range(9)], dim=2)
    whole = lm(tokens, text, mask, attributes=given(genre="jazz", tempo=90))
    torch.testing.assert_close(steps[:1], whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps[1:], lm(tokens, text, torch.zeros_like(mask)), atol=1e-5, rtol=1e-5)


def test_every_row_of_the_tables_learns() -> None:
    torch.manual_seed(0)
    lm = MusicLM(CONFIG)
    tokens, text = torch.randint(0, 65, (2, 4, 9)), torch.randn(2, 5, 20)
    shares = torch.cat([given(genre="jazz"), given(tempo=122)])
    lm(tokens, text, torch.ones(2, 5, dtype=torch.bool), attributes=shares).square().mean().backward()
    grad = lm.get_parameter("condition_provider.conditioners.attributes.embed.weight").grad
    assert grad is not None
    assert (grad.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == [0, 23, 24]
    with pytest.raises(ValueError, match="has no attributes"):
        MusicLM(LMConfig(dim=16, num_layers=1, num_heads=1))(
            tokens, torch.randn(2, 5, 768), torch.ones(2, 5, dtype=torch.bool), attributes=shares
        )
