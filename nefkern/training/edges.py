"""``--edges dataset``: batches drawn along the edges of the data set's κ, R estimated without bias.

κ over the patches of all n images (crops, where there are several views) is computed once, and a
batch S of images sees its own part of it. With Ψ_a the rows of image a and κ_ab the block of κ
between images a and b, what the objective is made of is a sum over pairs of images,

    R = Ψᵀ κ Ψ = Σ_ab Ψ_aᵀ κ_ab Ψ_b,

and if a pair is in a batch with probability π_ab > 0, then

    R̂ = Σ_{a,b ∈ S} Ψ_aᵀ κ_ab Ψ_b / π_ab

has the expectation R, whatever Ψ: each term is there with probability π_ab, and then weighs 1/π_ab
(Horvitz, Thompson, "A generalization of sampling without replacement from a finite universe", JASA
47, 1952). Its variance falls the more of κ lies between images that are often together. So images
are not drawn one by one but in groups of joined ones: :class:`GroupSampler`, whose π_ab is known
exactly.

Every image is as likely as any other, p, so that squared norms of Ψ_S's columns have p times the
expectation of Ψ's. With κ_ab weighted by p/π_ab, R of columns scaled to unit norm over the batch,
as the objective takes it, is p R̂ over the estimate of p times the squared norms.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nefkern.data import ImageDataset, TrainLoader, TrainTransform, View, Views
from nefkern.data.loader import generator_of
from nefkern.ops import CSRGraph
from nefkern.reference.csr import row_of_entry
from nefkern.runtime.errors import UserError, first_line
from nefkern.runtime.states import FLOATS, INTEGERS, check_state
from nefkern.spectral.embedding import neighbour_lists
from nefkern.training.digests import graph_digest
from nefkern.training.options import TrainOptions
from nefkern.training.parts import Parts
from nefkern.training.runs import GRAPH, Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.teacher import spectral_options

log = logging.getLogger(__name__)

#: Images of a group at most. Larger ones leave fewer groups to a batch, and pairs across groups,
#: which then are rarer, weigh more: on 160 photographs, batches of 16, R̂ − R is larger with 4.
_GROUP = 3
#: Partitions into groups, of which every epoch takes one.
_PARTITIONS = 32


class GroupSampler:
    """Batches of images, joined ones together, with known probabilities of every pair.

    Beforehand the n images are divided, at random T times over, into G = ⌈n/g⌉ groups of g (the
    last one of each partition may be smaller): an image that is left and g − 1 of the others that
    are left, drawn by the weights of their edges to it. An epoch takes one of the partitions and
    goes through its groups in random order, b = B/g of them a batch. A batch is then b groups drawn
    without replacement from a partition drawn at random: an image is in it with probability
    p = b/G, and two images that share their group in a share s of the partitions with

        π = p (s + (1 − s) (b − 1)/(G − 1)).

    Batch ``step`` of ``epoch`` is a function of the seed, both numbers and the weights.

    Args:
        weights: of the edges between images, ``[n, n]``, symmetric, at least 0; the diagonal does
            not count.
        batch_size: B, from 2 to n; 1 if there is only one image. Batches with the smaller group
            have fewer images.
        seed: any integer.
        partitions: T.

    Attributes:
        groups: int64 ``[T, n]``, the group of each image in every partition.
        probability: p.

    Raises:
        UserError: a batch of one image, which has no pairs.
    """

    def __init__(
        self, weights: Tensor, batch_size: int, *, seed: int = 0, partitions: int = _PARTITIONS
    ) -> None:
        images = len(weights)
        if batch_size < min(2, images):
            raise UserError(
                f"--batch-size {batch_size}: expected at least 2 with --edges dataset, whose "
                "batches are made of pairs of images"
            )
        self.seed = seed
        size = _group_size(batch_size)
        self.num_groups = -(-images // size)
        self.per_batch = min(batch_size // size, self.num_groups)
        self.probability = self.per_batch / self.num_groups
        generator = generator_of(seed, 0, partitions)
        self.groups = torch.stack([partition(weights, size, generator) for _ in range(partitions)])

    @property
    def batches(self) -> int:
        """Batches that a partition gives."""
        return self.num_groups // self.per_batch

    def batch(self, epoch: int, step: int) -> Tensor:
        """The images of a batch, int64, ascending; ``step`` is below :attr:`batches`."""
        groups, order = self._order(epoch)
        chosen = order[step * self.per_batch : (step + 1) * self.per_batch]
        return torch.isin(groups, chosen).nonzero().flatten()

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The partition of an epoch, and its groups in their order."""
        generator = generator_of(self.seed, 1, epoch)
        which = torch.randint(len(self.groups), (), generator=generator)
        return self.groups[which], torch.randperm(self.num_groups, generator=generator)

    def inclusion(self, images: Tensor) -> Tensor:
        """π of all pairs of some images, float64 ``[B, B]``: p on the diagonal."""
        together = torch.zeros(len(images), len(images), dtype=torch.int64)
        for groups in self.groups[:, images]:
            together += groups[:, None] == groups
        share = together.double() / len(self.groups)
        apart = (self.per_batch - 1) / max(1, self.num_groups - 1)
        return self.probability * (share + (1 - share) * apart)


def _group_size(batch_size: int) -> int:
    """The largest divisor of B that is no more than a group may have, with two groups a batch."""
    most = max(1, min(_GROUP, batch_size // 2))
    return max(size for size in range(1, most + 1) if batch_size % size == 0)


def partition(weights: Tensor, size: int, generator: Generator) -> Tensor:
    """Images in groups of joined ones, the last one perhaps smaller.

    Args:
        weights: ``[n, n]``, see :class:`GroupSampler`.
        size: g, images of a group.
        generator: what is random is drawn from.

    Returns:
        int64 ``[n]``, each image's group, 0 to ⌈n/g⌉ − 1.
    """
    images = len(weights)
    groups = torch.full((images,), -1)
    number = 0
    for first in torch.randperm(images, generator=generator).tolist():
        if groups[first] >= 0:
            continue
        groups[first] = number
        left = (groups < 0).nonzero().flatten()
        drawn = _drawn(weights[first, left], min(size - 1, len(left)), generator)
        groups[left[drawn]] = number
        number += 1
    return groups


def _drawn(weights: Tensor, count: int, generator: Generator) -> Tensor:
    """``count`` places drawn by their weights without replacement (Efraimidis, Spirakis, "Weighted
    random sampling with a reservoir", 2006); those of weight 0 last, in random order."""
    noise = torch.rand(len(weights), dtype=torch.float64, generator=generator).clamp_min(1e-16)
    return (noise.log() / weights.double().clamp_min(1e-280)).topk(count).indices


#: Of the file that :meth:`DatasetGraph.save` writes.
_STATE = {
    "row_offsets": (INTEGERS, "N"),
    "columns": (INTEGERS, "E"),
    "values": (FLOATS, "E"),
    "crops": (INTEGERS, "n 2"),
}


@dataclass
class DatasetGraph:
    """The data set's κ, and which crops its nodes are patches of.

    Attributes:
        kappa: over n · c nodes: those of crop 0, of crop 1, ...
        crops: int64 ``[n, 2]``: view and image of each crop.
    """

    kappa: CSRGraph
    crops: Tensor

    @property
    def cells(self) -> int:
        """c, patches of a crop."""
        return self.kappa.num_nodes // len(self.crops)

    @functools.cached_property
    def weights(self) -> Tensor:
        """Σ κ between the patches of two crops, float64 ``[n, n]``, 0 for a crop with itself."""
        graph, count = self.kappa, len(self.crops)
        rows = row_of_entry(graph.row_offsets, graph.nnz) // self.cells
        pairs = rows * count + graph.columns.long() // self.cells
        total = torch.bincount(pairs, graph.values.double(), count * count).view(count, count)
        return total.fill_diagonal_(0).cpu()

    def part(self, crops: Tensor, factors: Tensor) -> CSRGraph:
        """κ among the patches of some crops, times a factor for every pair of them.

        Args:
            crops: int64 ``[B]``, ascending.
            factors: ``[B, B]``, symmetric.
        """
        graph, cells = self.kappa, self.cells
        crops, factors = crops.to(graph.device), factors.to(graph.device, graph.dtype)
        place = torch.full((len(self.crops),), -1, device=graph.device)
        place[crops] = torch.arange(len(crops), device=graph.device)
        nodes = (crops[:, None] * cells + torch.arange(cells, device=graph.device)).flatten()
        first, counts = graph.row_offsets[nodes], graph.row_offsets.diff()[nodes]
        rows = torch.repeat_interleave(counts)  # in the part
        begin = counts.cumsum(0) - counts
        entries = torch.arange(len(rows), device=graph.device) + (first - begin)[rows]
        columns = graph.columns[entries].long()
        other = place[columns // cells]
        inside = (other >= 0).nonzero().flatten()
        rows, other, columns = rows[inside], other[inside], columns[inside]
        values = graph.values[entries[inside]] * factors[rows // cells, other]
        offsets = torch.zeros(len(nodes) + 1, dtype=torch.int64, device=graph.device)
        offsets[1:] = torch.bincount(rows, minlength=len(nodes)).cumsum(0)
        columns = (other * cells + columns % cells).int()
        return CSRGraph(offsets, columns, values, len(nodes), symmetric=graph.symmetric)

    def to(self, device: torch.device | str) -> DatasetGraph:
        """The same, with κ on a device."""
        return DatasetGraph(self.kappa.to(device), self.crops)

    def save(self, run: Run) -> None:
        """Keep it in the run's folder."""
        names = ("row_offsets", "columns", "values")
        tensors = dict(zip(names, self.kappa.tensors(), strict=True))
        run.save_tensors(GRAPH, {**tensors, "crops": self.crops})

    @classmethod
    def load(cls, run: Run) -> DatasetGraph | None:
        """That of a run's folder; None where there is none.

        Raises:
            UserError: the file is damaged.
        """
        found = run.load_tensors(GRAPH)
        if found is None:
            return None
        try:
            check_state(found, _STATE)
            crops, nodes = found["crops"], len(found["row_offsets"]) - 1
            if not len(crops) or nodes % len(crops):
                raise ValueError(f"crops: expected a divisor of {nodes} nodes, got {len(crops)}")
            offsets, columns, values = (found[n] for n in ("row_offsets", "columns", "values"))
            graph = CSRGraph(offsets, columns, values, nodes).validate()
            return cls(dataclasses.replace(graph, symmetric=True), crops)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{run.path(GRAPH)}: not a graph ({first_line(error)}); remove it, and --resume "
                "makes it anew"
            ) from None


class DatasetEdges:
    """What training takes from the data set's κ: batches, and their part of it.

    Args:
        graph: the data set's.
        dataset: its images.
        options: of the run.
    """

    def __init__(self, graph: DatasetGraph, dataset: ImageDataset, options: TrainOptions) -> None:
        self.dataset_graph, self.dataset, self.options = graph, dataset, options
        self._sampler = functools.lru_cache(maxsize=1)(self._made_sampler)

    def _made_sampler(self, batch_size: int) -> GroupSampler:
        return GroupSampler(self.dataset_graph.weights, batch_size, seed=self.options.seed)

    def loader(self, batch_size: int, workers: int, *, pin_memory: bool = False) -> TrainLoader:
        """Batches of crops, those that :meth:`graph` joins; an epoch has as many as it takes to
        show as many crops as there are images."""
        options, graph = self.options, self.dataset_graph
        views = _Crops(
            self.dataset,
            options.transform(),
            graph.crops.tolist(),
            seed=options.seed,
            distinct=options.num_views,
        )
        return TrainLoader(
            views,
            batch_size=batch_size,
            workers=workers,
            pin_memory=pin_memory,
            steps=_Steps(self._sampler(batch_size), options.num_views),
        )

    def graph(self, batch_size: int, epoch: int, step: int) -> CSRGraph:
        """κ among the patches of a batch, each pair of crops weighted by p/π."""
        sampler = self._sampler(batch_size)
        crops = sampler.batch(epoch, step)
        factors = sampler.probability / sampler.inclusion(crops)
        return self.dataset_graph.part(crops, factors)

    def covered(self, batch_size: int) -> tuple[float, float]:
        """How much of κ between images a batch sees on average: the share, and how many times that
        of a batch of images drawn one by one."""
        sampler, weights = self._sampler(batch_size), self.dataset_graph.weights
        images = len(weights)
        seen = (sampler.inclusion(torch.arange(images)) * weights).sum()
        seen = seen / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)  # perhaps no edge
        size = min(batch_size, images)
        alone = size * (size - 1) / max(1, images * (images - 1))
        return float(seen), float(seen) / max(alone, 1e-12)


class _Crops(Views):
    """The crops that are the graph's, by their number, in whatever epoch."""

    def __init__(
        self,
        dataset: ImageDataset,
        transform: TrainTransform,
        crops: list[list[int]],
        *,
        seed: int,
        distinct: int,
    ) -> None:
        super().__init__(dataset, transform, seed=seed, distinct=distinct)
        self.crops = crops

    def view(self, epoch: int, index: int) -> View:
        """Crop ``index``; in place of one that cannot be read there is no other."""
        found = super().view(*self.crops[index])
        if found.problems:
            raise UserError(
                f"{found.problems[0]}; it could be read when the data set's κ was made, start anew "
                "with another --out"
            )
        return found


class _Steps:
    """What :class:`nefkern.data.TrainLoader` goes through: (epoch, crops) of every batch."""

    def __init__(self, sampler: GroupSampler, views: int) -> None:
        self.sampler = sampler
        self.per_epoch = max(1, sampler.batches // views)
        self.begin = (0, 0)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, first = self.begin
        while True:
            for step in range(first, self.per_epoch):
                yield epoch, self.sampler.batch(epoch, step).tolist()
            epoch, first = epoch + 1, 0


class _GraphTrainer(SpectralTrainer):
    """The first stages of ``--method spectral``, as far as the graph; nothing is written."""

    flag, k_flag, way_out = "--edges dataset", "--dataset-k", "take --edges batch"

    def _open(self) -> tuple[dict[str, Tensor], int]:
        return {}, 0

    def graph(self) -> DatasetGraph:
        """The data set's κ."""
        with self.interrupts.noted():
            self.tensors, _ = self._features()
            rows = self.tensors["rows"].to(self.parts.device)
            self._heed()
            kappa = self._kappa(neighbour_lists(rows, self._neighbours(len(rows)), "cosine"))
            self._heed()
        return DatasetGraph(kappa, torch.tensor(self.crops))


def computed_graph(options: TrainOptions, run: Run, parts: Parts) -> DatasetGraph:
    """The data set's κ, as batches are drawn along it; nothing is written.

    Raises:
        UserError: options that the data set cannot carry.
        KeyboardInterrupt: after a signal.
    """
    views = options.views if options.augment else 0
    # The κ of the batches, seen whole: features as they come, of every image.
    whole = {"standardize": False, "graph_images": len(parts.dataset)}
    asked = spectral_options(options, run.folder, views=views, **whole)
    return _GraphTrainer(asked, run, parts).graph()


def edges_of(options: TrainOptions, run: Run, parts: Parts) -> DatasetEdges:
    """Compute the data set's κ, or take up what the run has kept of it.

    Raises:
        UserError: options that the data set cannot carry, a damaged file.
        KeyboardInterrupt: after a signal.
    """
    graph = DatasetGraph.load(run) if run.is_begun else None  # else perhaps of other options
    if graph is None:
        graph = computed_graph(options, run, parts)
        run.append_step({"step": 0, "dataset_kappa": graph_digest(graph.kappa)})
        graph.save(run)
    edges = DatasetEdges(graph.to(parts.device), parts.dataset, options)
    share, times = edges.covered(min(options.batch_size, len(graph.crops)))
    log.info(
        "the data set's κ: %d crops, %d entries; a batch sees %.2g %% of what joins different "
        "images, %.1f times as much as one of images drawn alone",
        *(len(graph.crops), graph.kappa.nnz, 100 * share, times),
    )
    return edges
