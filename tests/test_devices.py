import pytest
import torch

from nefkern.devices import choose_device
from nefkern.errors import UserError


def test_devices():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device nonsense: not usable on this machine"):
        choose_device("nonsense")
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(UserError, match="--device cuda: not usable on this machine"):
            choose_device("cuda")
