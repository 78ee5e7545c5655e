"""Reference of ``quadratic_form``: psi^T kappa phi."""

from __future__ import annotations

from torch import Tensor

from nefkern.reference.spmm import spmm_accumulated


def quadratic_form(
    row_offsets: Tensor, columns: Tensor, values: Tensor, psi: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """(psi^T kappa phi [K, J], kappa phi [N, J]); see :func:`nefkern.ops.quadratic_form`."""
    y = spmm_accumulated(row_offsets, columns, values, phi)
    return psi.to(y.dtype).T @ y, y
