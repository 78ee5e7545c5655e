"""scikit-learn's face of the spectral core: estimators for rows of numbers.

Parameters, attributes and errors follow scikit-learn; rows may be NumPy arrays, anything that
scikit-learn turns into one, or torch tensors on any device (what methods return is then a tensor
there too); affinities may be precomputed, dense or sparse. New rows are welcome: ``transform`` and
``predict`` extend the eigenvectors by Nyström's method, or evaluate a network.
"""

from __future__ import annotations

from nefkern.estimators.neighbours import KNeighborsTransformer
from nefkern.estimators.neural import NeuralSpectralClustering, NeuralSpectralEmbedding
from nefkern.estimators.spectral import SpectralClustering, SpectralEmbedding

__all__ = [
    "KNeighborsTransformer",
    "NeuralSpectralClustering",
    "NeuralSpectralEmbedding",
    "SpectralClustering",
    "SpectralEmbedding",
]
