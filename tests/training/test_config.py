"""Every layer of configs/train can be put on a size and says what its comment promises; the plan's codec is DATA's."""

from pathlib import Path

import pytest

from musicgen.errors import UserError
from tests.training.synthetic import write_dataset
from training.config import CONFIGS, TrainConfig, read_config, task_of


def layered(*layers: str, size: str = "300m") -> TrainConfig:
    paths = [word for name in layers for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return read_config(["--size", size, *paths], folders=False)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_layer_is_read_on_top_of_a_size(path: Path) -> None:
    small = path.stem == "demo" or path.stem.endswith(("-demo", "-long"))
    config = layered(path.stem, size="demo" if small else "300m")
    assert config.lm.num_parameters() > 1e6


def test_layers_turn_conditions_on() -> None:
    assert not layered().lm.condition.melody and layered("melody").lm.condition.melody
    assert [a.name for a in layered("attributes").lm.condition.attributes] == [
        "genre", "mood", "instrument", "tempo", "key",
    ]  # fmt: skip
    style = layered("style")
    assert (style.lm.condition.style.dim, style.batch.text_dropout, style.batch.style_dropout) == (64, 0.4, 0.4)
    both = layered("style", "attributes").lm.condition
    assert both.style.dim == 64 and len(both.attributes) == 5


def test_the_plan_reckons_with_the_codec_of_the_data(tmp_path: Path) -> None:
    fast, slow = (str(write_dataset(tmp_path / f"{rate}", codec={"frame_rate": rate})) for rate in (75, 25))
    argv = ["--size", "300m", "--batch.crop_seconds", "10"]
    frames = {data: task_of(read_config([*argv, "--data", data], folders=False)).frames for data in (fast, slow)}
    assert frames == {fast: 750, slow: 250}
    assert task_of(read_config(argv, folders=False)).frames == 500
    mixture = read_config([*argv, "--data", f"{slow}:1,{fast}:2"], folders=False)
    assert task_of(mixture).frames == 250 and task_of(mixture, 50.0).frames == 500
    with pytest.raises(UserError, match=r"DATA='.*none' does not exist"):
        task_of(read_config([*argv, "--data", str(tmp_path / "none")], folders=False))
