"""Mean-field inference in a fully connected CRF, on NumPy arrays.

Krähenbühl and Koltun, *Efficient inference in fully connected CRFs with Gaussian edge potentials*,
NeurIPS 2011, through the optional package pydensecrf. The defaults are those of the paper's
authors. Their code hands it the image in [0, 1] in protocol A, which as uint8 is black: what the
paper says of the CRF's gain there was measured without colours. Here it sees them.

Free of torch, so that a process that does nothing else starts at once and stays small.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from nefkern.runtime.errors import UserError


@dataclass(frozen=True)
class CRFParameters:
    """Weights and standard deviations of the two pairwise kernels; positions in pixels."""

    iterations: int = 10
    gaussian_weight: float = 3.0
    gaussian_xy: float = 1.0
    bilateral_weight: float = 4.0
    bilateral_xy: float = 67.0
    bilateral_rgb: float = 3.0


AUTHORS = CRFParameters()
"""What the paper's authors take."""


def require_pydensecrf():
    """The module ``pydensecrf.densecrf``.

    Raises:
        UserError: it isn't installed; says how to.
    """
    try:
        from pydensecrf import densecrf
    except ImportError:
        raise UserError(
            "CRF post-processing needs pydensecrf: pip install pydensecrf2 (same module; for "
            "Python up to 3.12); segment --edges graph needs nothing"
        ) from None
    return densecrf


def mean_field(image: np.ndarray, probabilities: np.ndarray, p: CRFParameters) -> np.ndarray:
    """The label probabilities after ``p.iterations`` steps.

    Args:
        image: uint8 ``[H, W, 3]``, RGB.
        probabilities: float32 ``[K, H, W]``, K ≥ 1, not negative, without NaN.

    Returns:
        float32 ``[K, H, W]``, sums to 1 over K.

    Raises:
        UserError: pydensecrf isn't installed.
    """
    if len(probabilities) == 1:
        return np.ones_like(probabilities)
    densecrf = require_pydensecrf()
    num_labels, height, width = probabilities.shape
    # Clipped like pydensecrf's own unary_from_softmax: certainty stays within reach of evidence.
    unary = -np.log(probabilities.clip(1e-5, 1.0)).reshape(num_labels, -1)
    field = densecrf.DenseCRF2D(width, height, num_labels)
    field.setUnaryEnergy(np.ascontiguousarray(unary))
    field.addPairwiseGaussian(sxy=p.gaussian_xy, compat=p.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=p.bilateral_xy,
        srgb=p.bilateral_rgb,
        rgbim=np.require(image, requirements=["C", "W"]),  # it takes no read-only view
        compat=p.bilateral_weight,
    )
    inferred = np.array(field.inference(p.iterations), dtype=np.float32)
    return inferred.reshape(probabilities.shape)


def best_labels(
    image: np.ndarray, probabilities: np.ndarray, p: CRFParameters
) -> tuple[np.ndarray, float]:
    """The most probable label of every pixel after :func:`mean_field`, and the seconds it took.

    Returns:
        int64 ``[H, W]``, the lowest of labels that tie; seconds.
    """
    started = time.perf_counter()
    labels = mean_field(image, probabilities, p).argmax(0)
    return labels, time.perf_counter() - started
