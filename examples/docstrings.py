"""Topics of a library's documentation, from the texts alone: ``python examples/docstrings.py``.

The rows are text embeddings: descriptions of scipy's public functions and classes, as TF-IDF of
their words, reduced to 64 channels (latent semantic analysis). Texts are compared by angle, so the
affinity is "cosine". The clusters are then held against the sub-package that each text is from
(adjusted Rand index: 1 is perfect, 0 is chance), and each is named by its most typical words.
"""

from __future__ import annotations

import importlib
import inspect
import re

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score

from nefkern.estimators import SpectralClustering

TOPICS = ("fft", "interpolate", "linalg", "ndimage", "optimize", "signal", "spatial", "special",
          "stats")  # fmt: skip


def texts() -> tuple[list[str], np.ndarray]:
    """Descriptions of what the sub-packages export, without notes and examples; their topics."""
    found, topics = {}, {}
    for number, topic in enumerate(TOPICS):
        module = importlib.import_module(f"scipy.{topic}")
        for name in module.__all__:
            text = inspect.getdoc(getattr(module, name)) or ""
            text = re.split(r"\n(?:References|Examples|See Also|Notes)\n-+\n", text)[0]
            if len(text) > 60:
                found.setdefault(text, number)
    topics = np.array(list(found.values()))
    return list(found), topics


def main() -> dict[str, float]:
    """Prints and returns the scores of K-means and spectral clustering."""
    documents, truth = texts()
    vectorizer = TfidfVectorizer(
        stop_words="english", token_pattern=r"[a-z]{3,}", min_df=3, max_df=0.3, sublinear_tf=True
    )
    words = vectorizer.fit_transform(documents)
    rows = TruncatedSVD(64, random_state=0).fit_transform(words)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    k = len(TOPICS)
    labels = {
        "K-means": KMeans(k, n_init=10, random_state=0).fit_predict(rows),
        "nefkern spectral": SpectralClustering(
            k, affinity="cosine", n_neighbors=16, random_state=0
        ).fit_predict(rows),
    }
    scores = {name: adjusted_rand_score(truth, found) for name, found in labels.items()}
    for name, score in scores.items():
        print(f"{name:24}{score:8.2f}")
    vocabulary = vectorizer.get_feature_names_out()
    print(f"\n{'texts':>6}  mostly from    typical words")
    for cluster in range(k):
        inside = labels["nefkern spectral"] == cluster
        mean = np.asarray(words[inside].mean(0) - words[~inside].mean(0)).ravel()
        typical = ", ".join(vocabulary[mean.argsort()[::-1][:5]])
        topic = TOPICS[np.bincount(truth[inside], minlength=k).argmax()]
        print(f"{inside.sum():6}  {topic:13}  {typical}")
    return scores


if __name__ == "__main__":
    main()
