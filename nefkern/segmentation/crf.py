"""A fully connected CRF that draws segments to the edges of the image (section 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nefkern.segmentation.mean_field import AUTHORS, CRFParameters, mean_field


def crf(
    image: Tensor,
    probabilities: Tensor,
    parameters: CRFParameters = AUTHORS,
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
    labels = torch.arange(len(probabilities), device=probabilities.device)
    if not all_labels:
        labels = winners(probabilities)
    refined = mean_field(*as_arrays(image, probabilities[labels]), parameters)
    result = torch.zeros_like(probabilities, dtype=torch.float32)
    result[labels] = torch.from_numpy(refined).to(result.device)
    return result


def winners(probabilities: Tensor) -> Tensor:
    """Labels of ``[K, ...]`` that are the most probable somewhere, int64 ``[n]`` ascending."""
    return probabilities.argmax(0).unique()


def check_probabilities(image: Tensor, probabilities: Tensor) -> None:
    """Raise a ValueError unless probabilities are floating point ``[K, H, W]`` without NaN, of an
    image ``[3, H, W]``."""
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"probabilities must be [K, {image.shape[1]}, {image.shape[2]}] like the image, "
            f"got {tuple(probabilities.shape)}"
        )
    if not probabilities.is_floating_point() or probabilities.isnan().any():
        raise ValueError("probabilities must be floating point without NaN")


def as_arrays(image: Tensor, probabilities: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`nefkern.segmentation.mean_field.mean_field` takes, from what :func:`crf` does.

    Raises:
        ValueError: as :func:`crf`.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {tuple(image.shape)}")
    check_probabilities(image, probabilities)
    pixels = image.permute(1, 2, 0).contiguous()
    return pixels.cpu().numpy(), probabilities.detach().float().cpu().numpy()
