"""A fully connected CRF that draws segments to the edges of the image (section 4).

Krähenbühl and Koltun, *Efficient inference in fully connected CRFs with Gaussian edge potentials*,
NeurIPS 2011, through the optional package pydensecrf. The defaults are those of the paper's
authors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nefkern.errors import UserError


@dataclass(frozen=True)
class CRFParameters:
    """Weights and standard deviations of the two pairwise kernels; positions in pixels."""

    iterations: int = 10
    gaussian_weight: float = 3.0
    gaussian_xy: float = 1.0
    bilateral_weight: float = 4.0
    bilateral_xy: float = 67.0
    bilateral_rgb: float = 3.0


def require_pydensecrf():
    """The module ``pydensecrf.densecrf``.

    Raises:
        UserError: it isn't installed; says how to.
    """
    try:
        from pydensecrf import densecrf
    except ImportError:
        raise UserError(
            "CRF post-processing needs pydensecrf: pip install pydensecrf2 (same module, "
            "builds with current compilers)"
        ) from None
    return densecrf


def crf(
    image: Tensor,
    probabilities: Tensor,
    parameters: CRFParameters = CRFParameters(),
    *,
    all_labels: bool = False,
) -> Tensor:
    """Refine the probabilities of one image by mean-field inference.

    Time and memory grow with the number of labels, and of hundreds of clusters an image shows a
    few dozen. Labels that are the most probable at no pixel are therefore left out unless
    ``all_labels``; their probability in the result is 0.

    Args:
        image: uint8 ``[3, H, W]``, RGB.
        probabilities: floating point ``[K, H, W]``, K ≥ 1, not negative.

    Returns:
        float32 ``[K, H, W]`` on the device of ``probabilities``, sums to 1 over K.

    Raises:
        ValueError: wrong dtype or shape, or a probability that is NaN.
        UserError: pydensecrf isn't installed.
    """
    _check(image, probabilities)
    num_labels, height, width = probabilities.shape
    labels = torch.arange(num_labels, device=probabilities.device)
    if not all_labels:
        labels = probabilities.argmax(0).unique()
    result = torch.zeros_like(probabilities, dtype=torch.float32)
    if len(labels) == 1:
        result[labels] = 1.0
        return result
    refined = _mean_field(image, probabilities[labels], parameters)
    result[labels] = torch.from_numpy(refined).view(-1, height, width).to(result.device)
    return result


def refine_clusters(
    image: Tensor,
    clusters: Tensor,
    probabilities: Callable[[Tensor], Tensor],
    parameters: CRFParameters = CRFParameters(),
) -> Tensor:
    """Refine a cluster map by the CRF, over the clusters that win a pixel of this image.

    Args:
        image: uint8 ``[3, H, W]``, RGB.
        clusters: int64 ``[H, W]``.
        probabilities: from those clusters, int64 ``[n]`` ascending, to their probabilities
            ``[n, H, W]``; so those of the hundreds of others never fill the memory.

    Returns:
        int64 ``[H, W]``, of the same clusters.

    Raises:
        ValueError, UserError: as :func:`crf`.
    """
    winners = clusters.unique()
    refined = crf(image, probabilities(winners), parameters, all_labels=True)
    return winners[refined.argmax(0)]


def _mean_field(image: Tensor, probabilities: Tensor, p: CRFParameters) -> np.ndarray:
    densecrf = require_pydensecrf()
    num_labels, height, width = probabilities.shape
    # Clipped like pydensecrf's own unary_from_softmax: certainty stays within reach of evidence.
    unary = -probabilities.float().clamp(1e-5, 1.0).log().flatten(1)
    field = densecrf.DenseCRF2D(width, height, num_labels)
    field.setUnaryEnergy(np.ascontiguousarray(unary.cpu().numpy()))
    field.addPairwiseGaussian(sxy=p.gaussian_xy, compat=p.gaussian_weight)
    field.addPairwiseBilateral(
        sxy=p.bilateral_xy,
        srgb=p.bilateral_rgb,
        rgbim=np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()),
        compat=p.bilateral_weight,
    )
    return np.array(field.inference(p.iterations), dtype=np.float32)


def _check(image: Tensor, probabilities: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {tuple(image.shape)}")
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"probabilities must be [K, {image.shape[1]}, {image.shape[2]}] like the image, "
            f"got {tuple(probabilities.shape)}"
        )
    if not probabilities.is_floating_point() or probabilities.isnan().any():
        raise ValueError("probabilities must be floating point without NaN")
