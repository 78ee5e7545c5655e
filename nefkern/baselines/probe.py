"""A linear probe: how much of the classes frozen features hold, by a classifier with labels.

The paper's authors watch one beside training; here it is fitted once, on annotated images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nefkern.segmentation.clusterer import SAMPLE_ROWS
from nefkern.segmentation.methods import Method
from nefkern.segmentation.rows import RowStore, mean_and_std
from nefkern.segmentation.upsample import cells_of
from nefkern.spectral.kmeans import Blocks

NO_LABEL = -1
"""The label of a patch without annotated pixels."""

_DECAY = 1e-4  # of the weights, beside the mean cross-entropy
_MAX_ITER = 200


def patch_labels(
    annotation: Tensor, grid: tuple[int, int], padded: tuple[float, float], num_classes: int
) -> Tensor:
    """The class of most pixels of every patch.

    Args:
        annotation: uint8 ``[H, W]`` of class indices; what is no class, as 255, is void.
        grid: ``(h, w)``, patches.
        padded: ``(H', W')``, pixels that the grid spans, at least H and W, whole or not.
        num_classes: C.

    Returns:
        int64 ``[h, w]``: ties go to the lower class, a patch that is all void or padding gets
        :data:`NO_LABEL`.
    """
    (h, w), (height, width) = grid, annotation.shape
    rows, columns = cells_of(height, h, padded[0]), cells_of(width, w, padded[1])
    labels = annotation.cpu().long()
    cells = (rows[:, None] * w + columns) * num_classes + labels
    counts = torch.bincount(cells[labels < num_classes], minlength=h * w * num_classes)
    most, found = counts.view(h, w, num_classes).max(-1)
    return torch.where(most > 0, found, NO_LABEL)


class Probe:
    """Softmax regression from a map to classes, patch by patch.

    Patches of the annotated training images come through :meth:`observe`, up to ``sample_rows`` or
    4 GiB of them. Channels are standardised; the mean cross-entropy plus 5e-5 times the squared
    weights is minimised by L-BFGS from zero, in float64 outside the products: the problem is
    convex, nothing is drawn, and nothing depends on the number of threads.

    Args:
        method: which map.
        num_classes: C.
        sample_rows: patches that are looked at.
    """

    def __init__(self, method: Method, num_classes: int, *, sample_rows: int = SAMPLE_ROWS) -> None:
        self.method, self.channels = method, num_classes
        self._rows = RowStore(sample_rows)
        self._labels: list[Tensor] = []
        self._weight: Tensor | None = None  # float32 [C, D], of the features as they come
        self._bias: Tensor | None = None  # float32 [C]

    @property
    def fitted(self) -> bool:
        """Whether :meth:`logits` can be asked for."""
        return self._weight is not None

    def observe(self, maps: dict[str, Tensor], labels: Tensor) -> None:
        """Take annotated patches into account.

        Args:
            maps: of a batch, ``[B, D, h, w]`` each.
            labels: int64 ``[B, h, w]``, of :func:`patch_labels`.
        """
        if self._rows.full:
            return
        rows = maps[self.method.map_name].movedim(1, -1).flatten(0, 2)
        labels = labels.flatten()
        known = labels != NO_LABEL
        self._rows.add(rows[known.to(rows.device)])
        self._labels.append(labels[known])

    def finish(self, device: torch.device | str) -> Probe:
        """Fit to what was observed; the probe moves to ``device``.

        Raises:
            ValueError: no annotated patch.
        """
        if self.fitted:
            return self.to(device)
        rows = self._rows.take()
        if not len(rows):
            raise ValueError("no annotated patch")
        labels = torch.cat(self._labels)
        self._labels.clear()
        mean, std = mean_and_std(rows)
        scale = 1 / std.clamp(min=1e-6)
        weight, bias = _softmax_regression(rows, labels, self.channels, mean, scale)
        self._weight = weight * scale
        self._bias = bias - self._weight @ mean
        return self.to(device)

    def to(self, device: torch.device | str) -> Probe:
        """Move to a device, in place."""
        self._weight, self._bias = self._weight.to(device), self._bias.to(device)
        return self

    def logits(self, maps: dict[str, Tensor]) -> Tensor:
        """Class logits ``[B, C, h, w]`` of a batch's maps."""
        rows = maps[self.method.map_name].movedim(1, -1).float()
        return F.linear(rows, self._weight, self._bias).movedim(-1, 1)

    def probabilities(self, logits: Tensor, dim: int = 0) -> Tensor:
        """Class logits as probabilities."""
        return logits.softmax(dim)


def _softmax_regression(
    rows: Tensor, labels: Tensor, num_classes: int, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights ``[C, D]`` and bias ``[C]`` of standardised rows ``[n, D]``."""
    from scipy.optimize import minimize

    shape, n = (num_classes, rows.shape[1] + 1), len(rows)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        solution = torch.from_numpy(flat).view(shape)
        weight, bias = solution[:, :-1].float(), solution[:, -1].float()

        def of_block(block: Tensor, label: Tensor) -> tuple[float, Tensor]:
            x = (block.float() - mean) * scale
            logs = torch.addmm(bias, x, weight.T).log_softmax(1)
            loss = -float(logs.gather(1, label[:, None]).sum(dtype=torch.float64))
            error = logs.exp() - F.one_hot(label, num_classes)
            return loss, torch.cat([error.T @ x, error.sum(0)[:, None]], dim=1)

        gradient, loss = torch.zeros(shape, dtype=torch.float64), 0.0
        for part, slope in blocks.map(of_block, rows, labels):
            loss += part
            gradient += slope
        gradient /= n
        gradient[:, :-1] += _DECAY * solution[:, :-1]
        penalty = 0.5 * _DECAY * float(solution[:, :-1].square().sum())
        return loss / n + penalty, gradient.flatten().numpy()

    with Blocks(rows.device) as blocks:
        found = minimize(
            objective,
            np.zeros(shape).ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": _MAX_ITER},
        )
    solution = torch.from_numpy(found.x).view(shape).float()
    return solution[:, :-1].contiguous(), solution[:, -1].contiguous()
