"""One path from YAML and the command line to a dataclass; mistakes name the nearest setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from musicgen.settings import SettingsError, flat, from_dict, parse, split, to_dict
from training.config import read_config


@dataclass(frozen=True)
class Optim:
    """A group."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Config:
    """A command's settings."""

    seed: int = 1
    name: str | None = None
    words: dict[str, str] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)


def test_layers_then_overrides(tmp_path: Path) -> None:
    layer = tmp_path / "a.yaml"
    layer.write_text("optim:\n  lr: 3e-4\nseed: 4\n")
    config = parse(Config, ["--optim.lr", "1e-5"], layers=[layer])
    assert config == Config(seed=4, optim=Optim(lr=1e-5))
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    "text", ["jazz", "r&b: soul", "null", "[a]", "{a: b}", "# 1", "- x", '"q"', "5", "1e3", "a=b", "-3", "", " "]
)
def test_a_text_is_no_yaml(text: str, tmp_path: Path) -> None:
    """A text in a mapping of texts is taken as it was typed."""
    assert parse(Config, ["--words.genre", text, "--seed", "3"]) == Config(seed=3, words={"genre": text})
    assert parse(Config, [f"--words.genre={text}", "--words.mood", "sad"]).words == {"genre": text, "mood": "sad"}
    layer = tmp_path / "a.yaml"
    layer.write_text('words: {genre: folk, key: "a: b"}\n')
    both = parse(Config, ["--words.genre", text], layers=[layer])
    assert both.words == {"genre": text, "key": "a: b"}
    assert parse(Config, ["--words.genre", text, "--config", str(layer)]).words["genre"] == "folk", "later ones win"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--words.genre"], "expected (one|1) argument"),
        (["--words.genre", "--seed", "3"], "expected (one|1) argument"),
        (["--optim.lrr", "1"], "did you mean 'optim.lr'"),
        (["--lr", "1"], "did you mean 'optim.lr'"),
        (["--sed=3"], "did you mean 'seed'"),
        (["--optim.lr", "fast"], "optim.lr is 'fast'; it must be a number"),
        (["--seed", "1.5"], "seed is '1.5'; it must be a whole number"),
        (["--optim.betas", "fast"], "Parser key|must be a list"),
        (["--config", "nowhere.yaml"], "does not exist"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        parse(Config, argv)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--hardware.compile", "maybe"], "hardware.compile is 'maybe'; it must be one of auto, on, off"),
        (["--lm.condition.melody", "3"], "lm.condition.melody is '3'; it must be true or false"),
        (["--lr", "1"], "did you mean 'optim.lr'"),
        (["--nothing_like_it_at_all", "3"], "unknown setting 'nothing_like_it_at_all' .*--help lists"),
    ],
)
def test_mistakes_in_a_command_of_many_settings(argv: list[str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        read_config(argv, folders=False)


def test_a_list_of_pairs_is_shown_as_it_is_written() -> None:
    from musicgen.generate import GenerateConfig

    with pytest.raises(SettingsError, match=r"guidance_over_time '\[\[0, 1\], \[10, 11\]\]'"):
        parse(GenerateConfig, ["--sampling.guidance_over_time", "6"])
    with pytest.raises(SettingsError, match="guidance_melody is 'high'; it must be a number or null"):
        parse(GenerateConfig, ["--sampling.guidance_melody", "high"])


def test_mistakes_in_yaml(tmp_path: Path) -> None:
    layer = tmp_path / "a.yaml"
    layer.write_text("optim:\n  learning_rate: 1\n  beta: 2\n")
    with pytest.raises(SettingsError, match=r"optim.learning_rate.*\n.*optim.beta.*optim.betas"):
        parse(Config, [], layers=[layer])
    layer.write_text("- 1\n")
    with pytest.raises(SettingsError, match="expected a mapping"):
        parse(Config, [], layers=[layer])


def test_a_key_that_stands_twice_in_yaml_is_refused(tmp_path: Path) -> None:
    layer = tmp_path / "a.yaml"
    layer.write_text("optim:\n  lr: 0.1\nseed: 3\noptim:\n  betas: [0.1, 0.2]\n")
    with pytest.raises(SettingsError, match="'optim' stands there twice, in the mapping from line 1 on"):
        parse(Config, [], layers=[layer])
    layer.write_text("optim: {lr: 0.1, lr: 0.2}\n")
    with pytest.raises(SettingsError, match="'lr' stands there twice"):
        parse(Config, [], layers=[layer])


def test_on_and_off_want_quotes_in_yaml(tmp_path: Path) -> None:
    layer = tmp_path / "a.yaml"
    layer.write_text("hardware: {compile: off}\n")
    with pytest.raises(SettingsError, match=r"hardware.compile is 'False'; .* auto, on, off \(in YAML with quotes"):
        read_config(["--config", str(layer)], folders=False)
    layer.write_text('hardware: {compile: "off"}\n')
    assert read_config(["--config", str(layer)], folders=False).hardware.compile == "off"


def test_optimisers_that_find_the_rate_take_1_as_its_factor() -> None:
    assert read_config(["--optim.name", "prodigy"], folders=False).optim.lr == 1.0
    assert read_config(["--optim.name", "dadapt", "--optim.lr", "0.5"], folders=False).optim.lr == 0.5
    assert read_config(["--optim", '{"name": "dadapt", "lr": 0.5}'], folders=False).optim.lr == 0.5
    assert read_config(["--size", "demo"], folders=False).optim.lr == 2e-3


GROUPS = ["lm: 5", "batch: 3", "batch: null", "batch:", "optim: hello", "lora: 16", "log: null", "hardware: []"]


@pytest.mark.parametrize("text", [*GROUPS, "batch: {augment: 1}", "lm.condition: 5"])
def test_a_group_is_a_mapping(tmp_path: Path, text: str) -> None:
    """Anything else would put the whole group back to its defaults, the model's size included."""
    layer = tmp_path / "a.yaml"
    layer.write_text(text + "\n")
    name = "batch.augment" if "augment" in text else text.split(":")[0]
    with pytest.raises(SettingsError, match=rf"{name} is \S+ in .*a\.yaml, but it is a group, .*such as {name}\.\w+"):
        read_config(["--config", str(layer)], folders=False)


@pytest.mark.parametrize("argv", [["--batch", "3"], ["--batch=null"], ["--batch", '{"augment": 3}']])
def test_a_group_is_a_mapping_on_the_command_line(argv: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"batch(\.augment)? is .* in the command line .* it is a group"):
        read_config(argv, folders=False)
    assert read_config(["--batch", '{"size": 5}'], folders=False).batch.size == 5


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "null\n", "{}\n"])
def test_a_file_without_settings_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    for argv in (["--config", str(tmp_path / "a.yaml")], [f"--config={tmp_path / 'a.yaml'}"]):
        assert read_config(argv, folders=False) == read_config([], folders=False)
        assert parse(Config, [*argv, "--seed", "3"]) == Config(seed=3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 5000, "cannot be read: it is nested too deeply"),
        ("{a: " * 5000, "cannot be read: it is nested too deeply"),
        ("steps: 2026-99-99", "is not YAML: month must be"),
        ("steps: [", "is not YAML"),
        ("a: &a {b: *a}", "unknown setting 'a'"),
        ("false", "expected a mapping of settings, found bool"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingsError, match=told):
        read_config(["--config", str(tmp_path / "a.yaml")], folders=False)


@pytest.mark.parametrize("path", ["", "x" * 5000, "a\0b", "/"])
def test_a_file_that_is_none(path: str) -> None:
    with pytest.raises(SettingsError, match=r"settings file .* does not exist"):
        read_config(["--config", path], folders=False)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--select.artists", "nobody"],
            r"""select.artists is 'nobody'; it must be a list: .* '\["nobody"\]', or in YAML""",
        ),
        (["--log.prompts", "slow, sad"], r"""--log.prompts '\["slow", "sad"\]'"""),
        (["--log.prompts", "null"], r"""--log.prompts '\[\]'"""),
    ],
)
def test_a_list_is_shown_as_it_is_written(argv: list[str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        read_config(argv, folders=False)


@pytest.mark.parametrize("text", ["optim: {weight_decay: .nan}", "select: {minutes: .inf}", "lm: {dropout: -.inf}"])
def test_numbers_are_finite(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"\w+\.\w+ is -?(nan|inf); it must be"):
        read_config(["--config", str(tmp_path / "a.yaml")], folders=False)
    with pytest.raises(SettingsError, match=r"betas is nan; it must be a finite number"):
        parse(Config, ["--optim.betas", "[0.9, .nan]"])


def test_a_command_keeps_its_own_words_and_hands_on_the_rest() -> None:
    argv = ["--seed", "3", "--lm.dim", "8", "--seed=4", "--help", "-h", "--seedy", "1", "--seed"]
    assert split(Config, argv) == (
        ["--seed", "3", "--seed=4", "--help", "-h", "--seed"],
        ["--lm.dim", "8", "--seedy", "1"],
    )


def test_nested_settings_as_dotted_names() -> None:
    assert flat({"a": 1, "b": {"c": {"d": [2]}, "e": None}}) == {"a": 1, "b.c.d": [2], "b.e": None}
