"""What makes functions of the backbone's maps: a trained ψ, or the data set's own eigenvectors."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nefkern.images.backbone import Features
from nefkern.runtime.precision import float32_products
from nefkern.segmentation.clusterer import Clusterer
from nefkern.segmentation.methods import SPECTRAL
from nefkern.spectral.eigenfunction import Eigenfunction
from nefkern.training.options import TrainOptions
from nefkern.training.spectral_model import SpectralModel


class Outputs(NamedTuple):
    """Of a batch, patch by patch.

    Attributes:
        functions: ``[B, h·w, m]`` float32: the functions themselves, in the scale they come in.
        logits: ``[B, h·w, K]`` float32: what cluster logits are made of.
        hidden: ``[B, h·w, D]``: features that one can cluster.
    """

    functions: Tensor
    logits: Tensor
    hidden: Tensor


class Head(Protocol):
    """What a :class:`nefkern.segmentation.segmenter.Segmenter` asks.

    Attributes:
        kind: "quantised", "continuous" or "spectral".
        num_functions: m.
    """

    kind: str
    num_functions: int

    def __call__(self, features: Features, images: Tensor) -> Outputs:
        """Outputs of a batch; ``images`` are the pixels behind the grid, ``[B, 3, H, W]``."""
        ...


class NeuralHead:
    """ψ, with its head's output over the final temperature as logits, if it is quantised."""

    def __init__(self, psi: Eigenfunction, options: TrainOptions) -> None:
        self.psi, self.amp, self.tf32 = psi.eval(), options.amp, options.tf32
        self.kind = options.kind
        self.temperature = options.temperatures()[1] if options.gumbel else 1.0
        self.num_functions = options.num_eigenfunctions

    def __call__(self, features: Features, images: Tensor) -> Outputs:
        """See :class:`Head`; pixels say nothing to ψ."""
        return self.project(features.concat, features.grid)

    def project(self, concat: Tensor, grid: tuple[int, int]) -> Outputs:
        """From ψ's input ``[B, h·w, D]`` on a grid of ``h × w`` patches."""
        with (
            torch.autocast(concat.device.type, torch.bfloat16, enabled=self.amp),
            float32_products(concat.device, tf32=self.tf32),
        ):
            hidden = self.psi.hidden(concat, grid).float()
        functions = self.psi.head(hidden)
        return Outputs(functions, functions / self.temperature, hidden)


class SpectralHead:
    """Extended eigenvectors; their cluster rows are hidden features, K-means' scores the logits.

    Args:
        model: with its K-means.

    Attributes:
        clusterer: the K-means, of hidden features.
    """

    kind = "spectral"

    def __init__(self, model: SpectralModel) -> None:
        # Runs from before it was kept have no temperature.
        self.model = model if model.temperature is not None else model.calibrated()
        self.num_functions = model.num_functions
        self.clusterer = Clusterer(SPECTRAL, model.kmeans.num_clusters).load(model.kmeans.state())
        self.clusterer.temperature = self.model.temperature

    def __call__(self, features: Features, images: Tensor) -> Outputs:
        """See :class:`Head`."""
        functions = self.model.functions(features, images)
        hidden = self.model.cluster_rows(functions)
        return Outputs(functions, self.model.kmeans.logits(hidden), hidden)
