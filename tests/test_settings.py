"""One path from YAML and the command line to a dataclass; mistakes name the nearest setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from musicgen.settings import SettingsError, from_dict, parse, to_dict


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
    optim: Optim = field(default_factory=Optim)


def test_layers_then_overrides(tmp_path: Path) -> None:
    layer = tmp_path / "a.yaml"
    layer.write_text("optim:\n  lr: 3e-4\nseed: 4\n")
    config = parse(Config, ["--optim.lr", "1e-5"], layers=[layer])
    assert config == Config(seed=4, optim=Optim(lr=1e-5))
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--optim.lrr", "1"], "did you mean 'optim.lr'"),
        (["--lr", "1"], "did you mean 'optim.lr'"),
        (["--sed=3"], "did you mean 'seed'"),
        (["--optim.lr", "fast"], "float"),
        (["--config", "nowhere.yaml"], "does not exist"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        parse(Config, argv)


def test_mistakes_in_yaml(tmp_path: Path) -> None:
    layer = tmp_path / "a.yaml"
    layer.write_text("optim:\n  learning_rate: 1\n  beta: 2\n")
    with pytest.raises(SettingsError, match=r"optim.learning_rate.*\n.*optim.beta.*optim.betas"):
        parse(Config, [], layers=[layer])
    layer.write_text("- 1\n")
    with pytest.raises(SettingsError, match="expected a mapping"):
        parse(Config, [], layers=[layer])
