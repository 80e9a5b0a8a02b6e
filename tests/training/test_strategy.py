"""What a run takes from the hardware that it finds."""

import pytest
import torch

from training.strategy import HardwareConfig


@pytest.mark.parametrize(("processor", "expected"), [("AVX2", "float32"), ("DEFAULT", "float32"), ("AVX512", "bf16")])
def test_bf16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, processor: str, expected: str) -> None:
    """Emulated bf16 trained the demo at a tenth of the speed of float32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    assert HardwareConfig(accelerator="cpu").number_format == expected
    assert HardwareConfig(accelerator="cpu", precision="bf16").number_format == "bf16"
    assert HardwareConfig(accelerator="gpu").number_format == "bf16"
