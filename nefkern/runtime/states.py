"""Tensors from a file that anyone may have written, checked before they are worked with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_KINDS = {
    "floating point": torch.Tensor.is_floating_point,
    "integers": lambda tensor: tensor.dtype in (torch.int32, torch.int64),
    "bool": lambda tensor: tensor.dtype == torch.bool,
    "numbers": lambda tensor: tensor.dtype != torch.bool and not tensor.is_complex(),
}
FLOATS, INTEGERS, BOOL, NUMBERS = _KINDS


def check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[str, str]]
) -> dict[str, int]:
    """Raise unless a state's tensors are of their kinds and shapes, and finite.

    Args:
        state: may hold others beside these.
        expected: of each tensor its kind and its dimensions; a letter is one size everywhere, and
            a name in brackets is that of a tensor that may be missing.

    Returns:
        The letters' sizes.

    Raises:
        ValueError: names the tensor, what was expected and what came.
    """
    sizes: dict[str, int] = {}
    for entry, (kind, letters) in expected.items():
        name = entry.strip("[]")
        tensor = state.get(name)
        if tensor is None:
            if name != entry:
                continue
            raise ValueError(f"{name} is missing")
        if not _KINDS[kind](tensor):
            raise ValueError(f"{name}: expected {kind}, got {tensor.dtype}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got others")
        wanted = letters.split()
        fits = tensor.ndim == len(wanted) and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(wanted, tensor.shape, strict=True)
        )
        if not fits:
            known = ", ".join(str(sizes.get(letter, letter)) for letter in wanted)
            raise ValueError(f"{name}: expected shape [{known}], got {list(tensor.shape)}")
    return sizes
