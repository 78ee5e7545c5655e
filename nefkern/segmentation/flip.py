"""Predictions averaged over an image and its mirror image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nefkern.segmentation.windows import Predictor

Extent = tuple[float, float]


def flip_averaged(predict: Predictor, pad: Callable[[Tensor], tuple[Tensor, Extent]]) -> Predictor:
    """A predictor whose logits are the mean over crops and their mirror images.

    Args:
        predict: the predictor to ask twice.
        pad: completes crops ``[n, 3, h, w]`` to whole patches, and says what these span in pixels
            of the crops. It is done before the mirroring: patches of both passes then lie on the
            same pixels, which they would not if the mirrored crop were padded at its own right.
    """

    def averaged(crops: Tensor) -> tuple[Tensor, Extent]:
        padded, extent = pad(crops)
        here, there = (_logits(predict(images)) for images in (padded, padded.flip(-1)))
        return (here + there.flip(-1)) / 2, extent

    return averaged


def _logits(answer: Tensor | tuple[Tensor, Extent]) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer
