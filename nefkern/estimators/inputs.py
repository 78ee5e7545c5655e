"""What users pass: arrays, tensors, sparse matrices; and results of the same kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data
from torch import Tensor

from nefkern.ops import CSRGraph

_BLOCK = 1 << 22  # numbers converted at once


def as_array(X):
    """``X`` as what scikit-learn's checks take: tensors as NumPy arrays, graphs as scipy's."""
    if isinstance(X, CSRGraph):
        return X.to_scipy()
    if not isinstance(X, Tensor):
        return X
    X = X.detach().cpu()
    X = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X
    return X.numpy() if X.layout == torch.strided else _as_scipy(X)


def _as_scipy(X: Tensor):
    from scipy.sparse import coo_array

    X = X.to_sparse_coo().coalesce()
    return coo_array((X.values().numpy(), tuple(X.indices().numpy())), shape=tuple(X.shape)).tocsr()


def device_of(X) -> torch.device:
    """Where to compute: where the tensor is, or on the CPU."""
    return X.device if isinstance(X, Tensor | CSRGraph) else torch.device("cpu")


def like(X, result: Tensor | np.ndarray, dtype=None):
    """``result`` as a tensor beside ``X`` if that is a tensor, else as a NumPy array of ``dtype``,
    the tensor's too."""
    if isinstance(X, Tensor):
        result = torch.as_tensor(result).to(X.device)
        return result if dtype is None else result.to(_torch_dtype(dtype))
    result = result.cpu().numpy() if isinstance(result, Tensor) else result
    return result if dtype is None else result.astype(dtype, copy=False)


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.float64 if dtype == np.float64 else torch.float32


def valid_rows(estimator, X, *, fitting: bool) -> np.ndarray:
    """Checked rows ``[n, C]``, float32 or float64; records or compares the number of features."""
    return validate_data(
        estimator,
        as_array(X),
        dtype=[np.float64, np.float32],
        reset=fitting,
        ensure_min_samples=2 if fitting else 1,
    )


def seed_of(random_state) -> int:
    """A seed for torch and the solver from what scikit-learn takes for a random state."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


@dataclass(frozen=True)
class Units:
    """Rows in float32 with little loss: moved to the origin and scaled before they are rounded.

    Attributes:
        centre: float64 ``[C]``.
        scale: the largest magnitude after centring.
    """

    centre: np.ndarray
    scale: float

    @classmethod
    def of(cls, rows: np.ndarray, metric: str) -> Units:
        """Of ``rows``; those compared by angle keep their origin."""
        centre = rows.mean(0, dtype=np.float64) * (metric != "cosine")
        scale = max(np.abs(rows.max(0) - centre).max(), np.abs(rows.min(0) - centre).max())
        return cls(centre, float(scale) or 1.0)

    def rows(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """``[n, C]`` float32 on the device.

        Raises:
            ValueError: new rows are farther from those of :meth:`of` than float32 can tell.
        """
        scaled = torch.empty(rows.shape, dtype=torch.float32)
        step = max(1, _BLOCK // rows.shape[1])
        for first in range(0, len(rows), step):
            block = (rows[first : first + step] - self.centre) / self.scale
            scaled[first : first + step] = torch.from_numpy(block)
        if not bool(scaled.isfinite().all()):
            most = torch.finfo(torch.float32).max
            raise ValueError(f"X: expected rows within {most:.1e} times the fitted ones' size")
        return scaled.to(device)
