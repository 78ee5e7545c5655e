"""The precision of float32 matrix products and convolutions on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    # By the new name where the old one may refuse to be read, set by the old one, which sets both.
    before = products.fp32_precision == "tf32", convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = tf32
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
