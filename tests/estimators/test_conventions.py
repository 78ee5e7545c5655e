"""scikit-learn's own checks of an estimator; none is expected to fail."""

from __future__ import annotations

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from nefkern.estimators import (
    KNeighborsTransformer,
    NeuralSpectralClustering,
    NeuralSpectralEmbedding,
    SpectralClustering,
    SpectralEmbedding,
)

SMALL = {"hidden_layer_sizes": (16,), "max_iter": 5}
pytestmark = [
    # What the checks pass on purpose: few, equal, or unconnected rows.
    pytest.mark.filterwarnings("ignore:Graph is not fully connected"),
    pytest.mark.filterwarnings("ignore:Number of distinct clusters"),
    # Checks of kinds of input that an estimator doesn't take are skipped with this.
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning"),
]


@parametrize_with_checks(
    [
        SpectralEmbedding(),
        SpectralEmbedding(affinity="gaussian"),
        SpectralClustering(),
        SpectralClustering(affinity="cosine", assign_labels="kmeans"),
        KNeighborsTransformer(),
        KNeighborsTransformer(mode="connectivity", metric="cosine"),
        NeuralSpectralEmbedding(**SMALL),
        NeuralSpectralEmbedding(loss="neuralef", **SMALL),
        NeuralSpectralClustering(**SMALL),
        NeuralSpectralClustering(loss="neuralef", **SMALL),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)
