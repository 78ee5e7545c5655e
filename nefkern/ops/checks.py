"""Argument checks shared by the operators: each names the argument, what was expected, what came.

The checks of shapes and dtypes run in the public functions and trace under ``torch.compile``; those
that must read values (:func:`offsets`, :func:`finite`) run inside the operators.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)

_MAX_INT = 2**63 - 1  # of the dispatcher's integers


def tensor(name: str, value: object) -> Tensor:
    """``value``, if it is a dense tensor; else TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")
    return value


def shape(name: str, value: Tensor, *expected: int | str) -> None:
    """The dimensions of ``value``: a number is exact, a letter stands for any size."""
    fits = value.dim() == len(expected) and all(
        isinstance(want, str) or got == want
        for got, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(want) for want in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")


def dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """The element type of ``value`` is one of ``allowed``; else TypeError."""
    if value.dtype not in allowed:
        names = ", ".join(str(one).removeprefix("torch.") for one in allowed)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected one of {names}, got {got}")


def device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """``value`` is on the device of ``like``."""
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected the device of {like_name}, {like.device}, got {value.device}"
        )


def integer(name: str, value: Any, least: int) -> int:
    """``value`` as an int not below ``least``: any integer, NumPy's too, but no bool. Traces."""
    number = _as_int(value)
    if number is None:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {_shown(number)}")
    if isinstance(number, int) and number > _MAX_INT:
        raise ValueError(f"{name}: expected less than 2^63, got {_shown(number)}")
    return number


def _shown(number: Any) -> str:
    """Python writes no integer of more than 4,300 digits."""
    if isinstance(number, int) and number.bit_length() > 128:
        return f"an integer of {number.bit_length()} bits"
    return str(number)


def flag(name: str, value: object) -> bool:
    """``value``, if it is a bool, NumPy's too; else TypeError."""
    if _is_bool(value):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def _is_bool(value: object) -> bool:
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def _as_int(value: Any) -> Any:
    if _is_bool(value) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None  # NumPy 1.26's are integers too, with a warning
    if isinstance(value, (int, torch.SymInt)):  # operator.index would fix a size while tracing
        return value
    try:
        return operator.index(value)
    except TypeError:
        return None


def finite_number(name: str, value: Any, least: float = -math.inf) -> float:
    """``value`` as a finite float not below ``least``: any real number, NumPy's and a tensor of one
    too, but no bool. Traces."""
    number = value
    if not isinstance(value, (float, torch.SymFloat)):
        if isinstance(value, bool) or not _is_real(value):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:  # an integer, or a fraction, beyond the largest float
            number = math.inf if value > 0 else -math.inf
    if not (-math.inf < number < math.inf and number >= least):
        wanted = (
            "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
        )
        raise ValueError(f"{name}: expected {wanted}, got {number}")
    return number


def factor(name: str, value: Any, dtype: torch.dtype) -> float:
    """``value`` as a finite float that values of ``dtype`` can be multiplied by: kernels of float32
    take it as one. Traces."""
    number = finite_number(name, value)
    if dtype != torch.float64 and abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: expected a number that float32 can hold, got {number}")
    return number


def _is_real(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return isinstance(value, (int, torch.SymInt, numbers.Real))


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """``value`` is one of the strings ``allowed``."""
    if value not in allowed:
        wanted = " or ".join(repr(one) for one in allowed)
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def offsets(name: str, value: Tensor, total: int) -> list[int]:
    """CSR-style offsets [S + 1] from 0 to ``total``, never falling, read as a list."""
    found = value.tolist()
    if not found or found[0] != 0 or found[-1] != total:
        ends = f"{found[0]} to {found[-1]}" if found else "no offsets"
        raise ValueError(f"{name}: expected offsets from 0 to {total}, got {ends}")
    for i in range(1, len(found)):
        if found[i] < found[i - 1]:
            raise ValueError(
                f"{name}: expected offsets that never fall, "
                f"got {found[i]} after {found[i - 1]} at position {i}"
            )
    return found


def finite(name: str, value: Tensor) -> None:
    """No entry of ``value`` is NaN or infinite; names the first row that has one."""
    if not bool(value.isfinite().all()):
        row = int((~value.isfinite()).flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(f"{name}: expected finite values, got NaN or inf in row {row}")
