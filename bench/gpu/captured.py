"""A training step as one CUDA graph: recorded once, then replayed on other images."""

from __future__ import annotations

import torch
from torch import Tensor

from nefkern.runtime.precision import float32_products
from nefkern.training.step import TrainingStep

WARM = 3  # steps before the recording: what compiles, tunes and allocates may not do so in it


class CapturedStep:
    """``step.update`` as one CUDA graph.

    Learning rate (``step.optimizer.param_groups``) and ``step.temperature`` are numbers on the
    device, which a replay reads anew; so it does with ψ and Adam's state, which it changes.

    Args:
        step: of one process, on a GPU; it is trained by the steps before the recording.
        images: uint8 ``[accumulate · B, 3, crop, crop]``, on the host or the device: the first
            ones. All others have their shape.
    """

    def __init__(self, step: TrainingStep, images: Tensor, warm: int = WARM) -> None:
        device = step.device
        self.step = step
        self.images = torch.empty(images.shape, dtype=images.dtype, device=device)
        self.images.copy_(images, non_blocking=True)
        batches = self.images.chunk(step.options.accumulate)
        side = torch.cuda.Stream(device)
        with float32_products(device, tf32=step.options.tf32):
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(warm):
                    step.update(batches, step.temperature)
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.rows = step.update(batches, step.temperature)

    def __call__(self, images: Tensor) -> Tensor:
        """One step on these images, enqueued.

        Returns:
            ``[accumulate, 6 + K]``, what is recorded of it, which the next step overwrites.
        """
        self.images.copy_(images, non_blocking=True)
        self.graph.replay()
        return self.rows
