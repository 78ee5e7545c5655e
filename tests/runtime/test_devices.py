import pytest
import torch

from nefkern.runtime.devices import choose_device
from nefkern.runtime.errors import UserError


def test_devices():
    assert choose_device("cpu").type == "cpu"
    for name in ("nonsense", "cuda:x", "meta", ""):
        with pytest.raises(UserError, match=f"^--device {name}: expected auto, cpu, cuda"):
            choose_device(name)
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(UserError, match="--device cuda: not usable on this machine"):
            choose_device("cuda")
