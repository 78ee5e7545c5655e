"""Whether an exported file gives a run's clusters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nefkern.exporting.onnx_file import CLUSTERS, IMAGE
from nefkern.runtime.errors import UserError


class Exported:
    """A file run by onnxruntime, on the CPU.

    Raises:
        UserError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f"--check: needs onnxruntime ({error}); pip install onnxruntime"
            ) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # its warnings are about its own optimisations
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Clusters int64 ``[H, W]`` of uint8 pixels ``[3, H, W]``."""
        found = self.session.run([CLUSTERS], {IMAGE: pixels[None].numpy()})[0]
        return torch.from_numpy(found)[0].long()


def agreement(clusters: Tensor, others: Tensor) -> float:
    """The share of pixels with the same cluster."""
    return float((clusters == others).double().mean())
