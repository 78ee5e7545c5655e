"""The precision of float32 matrix products and convolutions on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def float32_products(device: torch.device | str, *, tf32: bool) -> Iterator[None]:
    """Have those of PyTorch on ``device`` done in TF32 (11 significant bits), or in float32.

    The switch is the process's, so that autograd's threads see it too. Nothing is switched for
    devices other than CUDA's.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    # By the new name where the old one may refuse to be read, set by the old one, which sets both.
    before = products.fp32_precision == "tf32"
    apart: tuple[Any, ...] = ()
    kinds: list[str] = []
    try:
        convolved = convolutions.allow_tf32
    except RuntimeError:  # a caller has set convolutions and recurrences apart
        convolved, apart = tf32, (convolutions.conv, convolutions.rnn)
        kinds = [switch.fp32_precision for switch in apart]
    products.allow_tf32 = convolutions.allow_tf32 = tf32
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before, convolved
        _put_back(apart, kinds)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Have matrix products of float32 done in float32 on every device, whatever is switched on."""
    processor: Any = torch.backends.mkldnn
    switches = torch.backends.cuda.matmul, processor.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        by_old_name = torch.get_float32_matmul_precision()
    except RuntimeError:  # it refuses once a caller has used the new names
        by_old_name = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(by_old_name)
        _put_back(switches, before)


def _put_back(switches: tuple[Any, ...], before: list[str]) -> None:
    for switch, kind in zip(switches, before, strict=True):
        switch.fp32_precision = kind
