"""Handwritten digits without labels: ``python examples/digits.py``.

1,797 rows of 64 grey values, which scikit-learn brings. Clusters of two thirds of them, against
scikit-learn's on the same graph and K-means; then the held-out third, which scikit-learn's spectral
clustering cannot label: by Nyström's extension, and by a network. Figures are adjusted Rand indices
with the digits that were written: 1 is perfect, 0 is chance.
"""

from __future__ import annotations

import sklearn.cluster
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import train_test_split

from nefkern.estimators import NeuralSpectralClustering, SpectralClustering

DIGITS = 10


def main() -> dict[str, tuple[float, float | None]]:
    """Prints and returns the scores of every method, on the rows it saw and on new ones."""
    rows, new, truth, truth_of_new = train_test_split(
        *load_digits(return_X_y=True), test_size=1 / 3, random_state=0
    )
    methods = {
        "K-means": sklearn.cluster.KMeans(DIGITS, n_init=10, random_state=0),
        "scikit-learn spectral": sklearn.cluster.SpectralClustering(
            DIGITS, affinity="nearest_neighbors", random_state=0
        ),
        "nefkern spectral": SpectralClustering(DIGITS, random_state=0),
        "nefkern neural": NeuralSpectralClustering(DIGITS, max_iter=300, random_state=0),
    }
    scores = {}
    print(f"{'':24}{'seen':>8}{'new':>8}")
    for name, method in methods.items():
        seen, unseen = adjusted_rand_score(truth, method.fit_predict(rows)), None
        if hasattr(method, "predict"):
            unseen = adjusted_rand_score(truth_of_new, method.predict(new))
        scores[name] = seen, unseen
        print(f"{name:24}{seen:8.2f}{'-' if unseen is None else f'{unseen:.2f}':>8}")
    return scores


if __name__ == "__main__":
    main()
