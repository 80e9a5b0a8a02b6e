"""What a run takes from the hardware that it finds."""

import pytest

from training import strategy
from training.strategy import HardwareConfig


@pytest.mark.parametrize(("multiplies", "expected"), [(False, "float32"), (True, "bf16")])
def test_bf16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, multiplies: bool, expected: str) -> None:
    """Emulated bf16 trained the demo at a tenth of the speed of float32."""
    monkeypatch.setattr(strategy, "cpu_multiplies_bf16", lambda: multiplies)
    assert HardwareConfig(accelerator="cpu").number_format == expected
    assert HardwareConfig(accelerator="cpu", precision="bf16").number_format == "bf16"
    assert HardwareConfig(accelerator="gpu").number_format == "bf16"
