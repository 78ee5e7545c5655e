"""Switches of PyTorch's products, which callers may have set by new names or by old ones."""

import pytest
import torch

from nefkern.runtime.precision import exact_products, float32_products

SWITCHES = {
    "products": torch.backends.cuda.matmul,
    "processor's products": torch.backends.mkldnn.matmul,
    "convolutions": torch.backends.cudnn.conv,
    "recurrences": torch.backends.cudnn.rnn,
}


@pytest.fixture(autouse=True)
def _as_before():
    before = {name: switch.fp32_precision for name, switch in SWITCHES.items()}
    yield
    torch.set_float32_matmul_precision("highest")
    for name, kind in before.items():
        SWITCHES[name].fp32_precision = kind


def kinds() -> dict[str, str]:
    """ "none" is IEEE's, as nothing above it says otherwise."""
    return {
        name: switch.fp32_precision.replace("none", "ieee") for name, switch in SWITCHES.items()
    }


@pytest.mark.parametrize(
    "switched",
    [{}, {"convolutions": "ieee"}, {"recurrences": "ieee"}, {"products": "tf32"},
     {"processor's products": "bf16"}],
)  # fmt: skip
def test_what_was_switched_by_a_new_name_is_as_it_was(switched):
    """PyTorch then refuses to be asked for all of a kind by an old one."""
    for name, kind in switched.items():
        SWITCHES[name].fp32_precision = kind
    before = kinds()
    for allowed in (True, False):
        with float32_products("cuda", tf32=allowed):
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
            assert torch.backends.cudnn.allow_tf32 == allowed
        assert kinds() == before
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
        assert kinds() | {"products": "ieee", "processor's products": "ieee"} == kinds()
    assert kinds() == before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_was_switched_by_the_old_name_can_be_asked_for_by_it(precision):
    torch.set_float32_matmul_precision(precision)
    before = kinds()
    with exact_products(), float32_products("cuda", tf32=False):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision
    assert kinds() == before


def test_other_devices_have_no_such_switch():
    before = kinds()
    with float32_products("cpu", tf32=True):
        assert kinds() == before
