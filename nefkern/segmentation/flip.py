"""Predictions averaged over an image and its mirror image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nefkern.segmentation.windows import Predictor


def flip_averaged(predict: Predictor, pad: Callable[[Tensor], Tensor]) -> Predictor:
    """A predictor whose logits are the mean over crops and their mirror images.

    Args:
        predict: the predictor to ask twice.
        pad: completes crops ``[n, 3, h, w]`` to whole patches. It is done before the mirroring:
            patches of both passes then lie on the same pixels, which they would not if the mirrored
            crop were padded at its own right.
    """

    def averaged(crops: Tensor) -> Tensor | tuple[Tensor, tuple[float, float]]:
        padded = pad(crops)
        extent = tuple(padded.shape[2:])
        here, there = (_logits(predict(images)) for images in (padded, padded.flip(-1)))
        return (here + there.flip(-1)) / 2, extent

    return averaged


def _logits(answer: Tensor | tuple[Tensor, tuple[float, float]]) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer
