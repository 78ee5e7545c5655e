"""Every objective of :mod:`nefkern.spectral.losses` against known spectra: in how many steps?

    python -m bench.spectral_losses [--data-root DIR] [--steps 1200]

ψ is a table of free numbers [N, K], trained by Adam on the whole graph, so that what is seen is the
objective alone, without a network's limits. Every few steps the span of its first m functions is
held against that of the m leading eigenvectors, by the cosine of the largest principal angle; m is
at most 8 and the number with the widest gap after it, since a span is no better known than that.
Objectives that find a span as a whole (spectralnet) are turned onto its Ritz vectors first.

The cut is of the graph taken as an adjacency W with row sums d, so its memberships p are held
against the leading eigenvectors of D^(-1/2) W D^(-1/2), as D^(1/2) p. They are a partition, the
eigenvectors that of a relaxed one: the two agree where there are blocks, and cannot where the
vectors are waves (ring, moons). And unlike the others its objective has local minima: patches of
three images fall into three components, the cut that parts them is 0 and has a cosine of 1, and
descent from random memberships ends above it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nefkern.ops import CSRGraph, knn, normalized_adjacency, quadratic_form
from nefkern.spectral.losses import KINDS, spectral_loss

#: The most vectors looked at.
MOST = 8
#: What counts as found.
COSINE = 0.99
#: Functions learnt, more than the vectors that are looked at.
SPARE = 2
#: Steps between two looks.
EVERY = 10


def block_model(rows: int = 240, blocks: int = 4, seed: int = 0) -> CSRGraph:
    """Blocks of falling density, loosely joined: one leading eigenvector a block."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(rows) * blocks // rows
    inside = torch.linspace(0.8, 0.4, blocks)[label]
    chance = torch.where(label[:, None] == label, inside, torch.tensor(0.02))
    joined = torch.rand(rows, rows, generator=generator) < chance
    return _normalized(joined.float().triu(1))


def ring(rows: int = 200) -> CSRGraph:
    """A ring with one weak joint: its eigenvalues are those of a circle, pairs parted by it."""
    reach = rows // 10
    at = torch.arange(rows)
    upper = torch.zeros(rows, rows)
    for step in range(1, reach + 1):
        upper[at, (at + step) % rows] = 1.0
    upper[rows - reach :, :reach] *= 0.2
    return _normalized(upper)


def moons(rows: int = 300, neighbours: int = 30, seed: int = 0) -> CSRGraph:
    """scikit-learn's two moons, nearest neighbours by Gaussian weight: the waves of two strings."""
    from sklearn.datasets import make_moons

    points, _ = make_moons(rows, noise=0.06, random_state=seed)
    distances, near = knn(torch.tensor(points, dtype=torch.float32), neighbours, metric="euclidean")
    weights = (-(distances / distances.median()).square()).exp()
    return normalized_adjacency(near, weights, num_nodes=rows)


def patches(root: Path, images: int = 3) -> CSRGraph:
    """κ of real patches: a handful of images of ``root/images/train``, lite0's features."""
    from nefkern.data import eval_transform, open_dataset
    from nefkern.images.graph import GraphConfig, kappa
    from nefkern.images.loading import load_backbone

    dataset = open_dataset("folder", root=root, split="train")
    transform = eval_transform("crop320", size=224)
    batch = torch.stack([transform(dataset[i]).image for i in range(images)])
    maps = load_backbone("tf_efficientnet_lite0", "packaged")(batch)
    pairs = ((10, 2.0), (5, 0.1))
    return kappa(maps.high, batch, maps.grid, GraphConfig("20", 0.3, pairs))


def _normalized(upper: Tensor) -> CSRGraph:
    adjacency = upper + upper.T
    scale = adjacency.sum(1).clamp_min(1e-12).rsqrt()
    return CSRGraph.from_torch(scale[:, None] * adjacency * scale, symmetric=True)


@dataclasses.dataclass
class Target:
    """The m leading eigenvectors that one objective has for its own on a graph.

    Attributes:
        leading: [N, m].
        scale: [N], what ψ's rows are multiplied by before they are held against them.
        gap: λ_m − λ_{m+1}.
    """

    leading: Tensor
    scale: Tensor
    gap: float

    @classmethod
    def of(cls, graph: CSRGraph, kind: str) -> Target:
        dense = graph.to_dense().double()
        root = (
            dense.sum(1).clamp_min(1e-12).sqrt() if kind == "ncut" else dense.new_ones(len(dense))
        )
        values, vectors = torch.linalg.eigh(dense / root[:, None] / root)
        values, count = values.flip(0), widest_gap(values.flip(0))
        return cls(vectors.flip(1)[:, :count], root, float(values[count - 1] - values[count]))

    def cosine(self, psi: Tensor) -> float:
        """Of the largest principal angle between the spans of ψ and of the leading vectors."""
        q = torch.linalg.qr(psi.double() * self.scale[:, None]).Q
        return float(torch.linalg.svdvals(q.T @ self.leading).amin())


def widest_gap(values: Tensor) -> int:
    """The number of leading eigenvalues, 2 to :data:`MOST`, with the widest gap after them."""
    gaps = (values[:-1] - values[1:])[1:MOST]
    return int(gaps.argmax()) + 2


def ritz(psi: Tensor, graph: CSRGraph) -> Tensor:
    """The Ritz vectors of ψ's span, leading first."""
    q = torch.linalg.qr(psi).Q
    _, turned = torch.linalg.eigh(quadratic_form(q, graph).double())
    return q @ turned.flip(1).to(q)


def training(graph: CSRGraph, kind: str, count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """ψ after every :data:`EVERY` steps; memberships for ncut are a softmax of the table."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(graph.num_nodes, count, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    for step in range(1, steps + 1):
        psi = table.softmax(1) if kind == "ncut" else table
        optimizer.zero_grad()
        spectral_loss(psi, graph, kind, beta=20.0).backward()
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            yield (table.softmax(1) if kind == "ncut" else table).detach()


def steps_to(graph: CSRGraph, kind: str, steps: int, seed: int) -> tuple[float, int | None]:
    """The cosine at the end, and the step from which on it stayed above :data:`COSINE`."""
    target = Target.of(graph, kind)
    count = target.leading.shape[1]
    spare = 0 if kind == "ncut" else SPARE  # a cluster more would be another clustering
    first, cosine = None, 0.0
    for look, psi in enumerate(training(graph, kind, count + spare, steps, seed), 1):
        found = ritz(psi, graph) if kind == "spectralnet" else psi
        cosine = target.cosine(found[:, :count])
        first = None if cosine < COSINE else first or look * EVERY
    return cosine, first


def cell(graph: CSRGraph, kind: str, steps: int, seeds: int) -> str:
    """The least final cosine of all starts, and the most steps."""
    runs = [steps_to(graph, kind, steps, seed) for seed in range(seeds)]
    least = min(cosine for cosine, _ in runs)
    most = None if any(first is None for _, first in runs) else max(first for _, first in runs)
    return f"{least:.3f}, {'never' if most is None else f'step {most}'}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="images for real patches")
    parser.add_argument("--steps", type=int, default=1200, help="of Adam (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="starts; the worst is printed")
    options = parser.parse_args()
    graphs = {"block model": block_model(), "ring": ring(), "moons": moons()}
    if options.data_root:
        graphs["patches"] = patches(options.data_root)
    print(f"| graph | N | vectors | gap | {' | '.join(KINDS)} |")
    print("|---|---|---|---|" + "---|" * len(KINDS))
    for name, graph in graphs.items():
        target = Target.of(graph, "neuralef")
        known = f"{graph.num_nodes} | {target.leading.shape[1]} | {target.gap:.3f}"
        cells = [cell(graph, kind, options.steps, options.seeds) for kind in KINDS]
        print(f"| {name} | {known} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
