"""``python -m bench.million_rows``: spectral clustering of a million rows of 64 channels, exact.

Generates clustered rows, clusters them with :class:`nefkern.estimators.SpectralClustering`, and
prints the seconds of every stage, the agreement with the truth, and the process's peak memory.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from nefkern.estimators import SpectralClustering
from nefkern.runtime.errors import ArgumentParser, command


def clustered(n: int, columns: int, clusters: int, dimensions: int = 4):
    """float32 [n, columns] rows, made in blocks, and their clusters, which spread in a few
    directions of their own and touch."""
    random = np.random.default_rng(0)
    centres = 0.08 * random.normal(size=(clusters, columns)).astype(np.float32)
    directions = random.normal(size=(clusters, dimensions, columns)).astype(np.float32)
    directions *= 2 / np.sqrt(columns)
    which = random.integers(clusters, size=n)
    rows = np.empty((n, columns), np.float32)
    for first in range(0, n, 16384):
        block = which[first : first + 16384]
        place = random.normal(size=(len(block), 1, dimensions)).astype(np.float32)
        noise = 0.1 * random.standard_normal((len(block), columns), np.float32)
        rows[first : first + 16384] = centres[block] + (place @ directions[block])[:, 0] + noise
    return rows, which


def parser() -> argparse.ArgumentParser:
    options = ArgumentParser(prog="python -m bench.million_rows", description=__doc__)
    options.add_argument("--rows", type=int, default=1_000_000, help="default: a million")
    options.add_argument("--columns", type=int, default=64, help="default: 64")
    options.add_argument("--clusters", type=int, default=16, help="default: 16")
    options.add_argument(
        "--neighbours", type=int, default=10, help="of a row, itself counted; default: 10"
    )
    options.add_argument("--predict", type=int, default=1000, help="new rows after; default: 1000")
    return options


def gigabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@command
def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    rows, truth = clustered(options.rows + options.predict, options.columns, options.clusters)
    new, rows = rows[options.rows :], rows[: options.rows]
    print(
        f"{options.rows:,} rows of {options.columns} channels, {options.clusters} clusters, "
        f"{torch.get_num_threads()} threads; rows alone: {gigabytes():.1f} GB",
        flush=True,
    )
    start = time.perf_counter()
    found = SpectralClustering(
        options.clusters, n_neighbors=options.neighbours, random_state=0, verbose=True
    ).fit(rows)
    print(f"all of fit: {time.perf_counter() - start:.1f} s, peak {gigabytes():.1f} GB")
    print(f"adjusted Rand index: {adjusted_rand_score(truth[: options.rows], found.labels_):.4f}")
    print(f"largest residual: {found.residuals_.max():.1e}")
    start = time.perf_counter()
    labels = found.predict(new)
    print(
        f"{options.predict} new rows: {time.perf_counter() - start:.1f} s, adjusted Rand index "
        f"{adjusted_rand_score(truth[options.rows :], labels):.4f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
