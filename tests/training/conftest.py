"""What several modules of these tests start from: a small data set and a run on it. A module may have its own."""

from pathlib import Path

import pytest

from musicgen import codec as codecs
from tests.training.small_run import go
from tests.training.synthetic import small_codec, write_dataset


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> codecs.Codec:
    return small_codec(tmp_path_factory.mktemp("codec") / "small")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, codec: codecs.Codec) -> Path:
    identity = {"name": codec.name, "identity": codec.identity}
    return write_dataset(tmp_path_factory.mktemp("data") / "set", size=64, codec=identity)


@pytest.fixture
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return go(data, tmp_path_factory.mktemp("runs") / "whole")
