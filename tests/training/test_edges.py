"""--edges dataset: R of the data set's κ estimated without bias, and training on such batches."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import scipy.sparse
import torch

from nefkern.data import ImageDataset
from nefkern.images.graph import pixel_graph
from nefkern.ops import CSRGraph, add, neuralef_loss, quadratic_form
from nefkern.reference.knn import unit_rows
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.spectral.embedding import adjacency, neighbour_lists
from nefkern.training.edges import DatasetGraph, GroupSampler, edges_of, partition
from nefkern.training.options import TrainOptions
from nefkern.training.runs import GRAPH, Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.step import TrainingStep
from nefkern.training.trainer import Trainer
from tests.training.outcomes import assert_same, broken_off, start

CELLS = 3


def small_graph(images: int, seed: int = 0) -> DatasetGraph:
    """Images of three patches; each is joined to some, more strongly to its neighbour in number."""
    generator = torch.Generator().manual_seed(seed)
    count = images * CELLS
    dense = torch.rand(count, count, generator=generator)
    dense *= torch.rand(count, count, generator=generator) < 0.4
    place = torch.arange(count) // CELLS // 2
    dense *= torch.where(place[:, None] == place, 10.0, 1.0)
    dense = (dense + dense.T).fill_diagonal_(0)
    graph = CSRGraph.from_scipy(scipy.sparse.csr_array(dense.numpy()))
    graph = CSRGraph(*graph.tensors(), count, symmetric=True)
    crops = torch.stack([torch.zeros(images, dtype=torch.int64), torch.arange(images)], 1)
    return DatasetGraph(graph, crops)


def estimate(graph: DatasetGraph, sampler: GroupSampler, crops: torch.Tensor, psi: torch.Tensor):
    """R̂ from one batch: what training sees, over p."""
    part = graph.part(crops, sampler.probability / sampler.inclusion(crops))
    nodes = (crops[:, None] * CELLS + torch.arange(CELLS)).flatten()
    return quadratic_form(psi[nodes], part) / sampler.probability


def every_batch(sampler: GroupSampler):
    """All batches there are, each as likely as any other."""
    for groups in sampler.groups:
        for chosen in itertools.combinations(range(sampler.num_groups), sampler.per_batch):
            yield torch.isin(groups, torch.tensor(chosen)).nonzero().flatten()


@pytest.mark.parametrize(("images", "batch_size"), [(8, 4), (9, 4), (7, 6), (12, 8), (5, 5)])
def test_the_mean_over_all_batches_is_r(images, batch_size):
    graph = small_graph(images)
    sampler = GroupSampler(graph.weights, batch_size, partitions=4)
    psi = torch.randn(images * CELLS, 4, generator=torch.Generator().manual_seed(1))
    found = [estimate(graph, sampler, crops, psi).double() for crops in every_batch(sampler)]
    exact = quadratic_form(psi, graph.kappa).double()
    torch.testing.assert_close(torch.stack(found).mean(0), exact, rtol=1e-4, atol=1e-3)


def test_without_weights_the_mean_is_another():
    """The test above can fail: κ of the batch as it is says something else."""
    graph = small_graph(8)
    sampler = GroupSampler(graph.weights, 4, partitions=4)
    psi = torch.ones(8 * CELLS, 1)
    found = []
    for crops in every_batch(sampler):
        part = graph.part(crops, torch.ones(len(crops), len(crops)))
        found.append(quadratic_form(torch.ones(len(crops) * CELLS, 1), part))
    mean = torch.stack(found).mean() / sampler.probability
    assert mean < 0.95 * quadratic_form(psi, graph.kappa).item()


def test_the_mean_over_drawn_batches_tends_to_r():
    """Of the batches that training draws: within four standard errors, epoch by epoch."""
    graph, epochs = small_graph(12), 600
    sampler = GroupSampler(graph.weights, 4, seed=5)
    psi = torch.randn(12 * CELLS, 3, generator=torch.Generator().manual_seed(1))
    found = torch.stack(
        [
            torch.stack(
                [
                    estimate(graph, sampler, sampler.batch(epoch, step), psi)
                    for step in range(sampler.batches)
                ]
            ).mean(0)
            for epoch in range(epochs)
        ]
    ).double()
    error = (found.mean(0) - quadratic_form(psi, graph.kappa).double()).abs()
    assert (error < 4 * found.std(0) / epochs**0.5).all()
    assert (found.std(0) / epochs**0.5 < 0.05 * found.mean(0).abs().max()).all()  # it says much


def test_images_and_pairs_are_drawn_as_often_as_said():
    graph, epochs = small_graph(10), 3000
    sampler = GroupSampler(graph.weights, 4, seed=2, partitions=8)
    counts = torch.zeros(10, 10, dtype=torch.float64)
    for epoch in range(epochs):
        crops = sampler.batch(epoch, 0)
        counts[crops[:, None], crops] += 1
    expected = sampler.inclusion(torch.arange(10))
    assert torch.allclose(expected.diagonal(), torch.tensor(sampler.probability).double())
    deviation = (expected * (1 - expected) / epochs).sqrt()
    assert ((counts / epochs - expected).abs() < 5 * deviation).all()


def test_joined_images_are_together_more_often():
    graph = small_graph(12)
    pairs = GroupSampler(graph.weights, 4).inclusion(torch.arange(12))
    neighbours = pairs[torch.arange(0, 12, 2), torch.arange(1, 12, 2)]
    assert neighbours.mean() > 2 * 4 * 3 / (12 * 11)  # what images drawn alone would have


def test_an_epoch_shows_every_image_once():
    sampler = GroupSampler(small_graph(10).weights, 4)
    assert (sampler.num_groups, sampler.per_batch, sampler.batches) == (5, 2, 2)
    batches = [sampler.batch(3, step) for step in range(2)]
    assert len(torch.cat(batches).unique()) == 8
    again = GroupSampler(small_graph(10).weights, 4)
    assert all(torch.equal(again.batch(3, step), batch) for step, batch in enumerate(batches))
    assert not torch.equal(torch.cat(batches), torch.cat([sampler.batch(4, s) for s in range(2)]))


def test_groups_of_images_without_edges():
    groups = partition(torch.zeros(7, 7), 3, torch.Generator().manual_seed(0))
    assert groups.bincount().tolist() == [3, 3, 1]


def test_a_batch_of_one_image_has_no_pairs():
    with pytest.raises(UserError, match="--batch-size 1: expected at least 2 with --edges dataset"):
        GroupSampler(torch.ones(4, 4), 1)
    assert GroupSampler(torch.ones(1, 1), 1).batch(0, 0).tolist() == [0]


def test_a_part_is_the_block_of_the_whole():
    graph = small_graph(6)
    crops, factors = torch.tensor([1, 2, 5]), torch.tensor([[1.0, 2, 3], [2, 1, 5], [3, 5, 1]])
    part = graph.part(crops, factors)
    part.validate()
    nodes = (crops[:, None] * CELLS + torch.arange(CELLS)).flatten()
    weights = factors.repeat_interleave(CELLS, 0).repeat_interleave(CELLS, 1)
    expected = graph.kappa.to_dense()[nodes[:, None], nodes] * weights
    assert torch.allclose(part.to_dense(), expected)
    assert neuralef_loss(torch.ones(9, 2), part, 0.1)[0].isfinite()


def test_weights_between_images():
    graph = small_graph(4)
    dense = graph.kappa.to_dense().view(4, CELLS, 4, CELLS).sum((1, 3)).double()
    assert torch.allclose(graph.weights, dense.fill_diagonal_(0))


# ---- training


@pytest.fixture
def joined(tiny):
    """joined(**changes): options of a run of seconds on the data set's edges."""

    def make(**changes) -> TrainOptions:
        return tiny(**{"edges": "dataset", "dataset_k": "8", "epochs": 2, **changes})

    return make


@pytest.mark.parametrize("views", [0, 2])
def test_the_graph_is_the_data_set_s(joined, views):
    """Its nodes are the crops that batches show, in their order."""
    options = joined(views=views, batch_size=4)
    trainer = start(options)
    trainer._look_at_the_data_set()
    edges = trainer.edges
    crops = edges.dataset_graph.crops.tolist()
    assert crops == [[v, i] for v in range(max(1, views)) for i in range(10)]
    loader = edges.loader(4, 0)
    images = torch.stack([loader.views.view(9, index).image for index in range(len(crops))])
    maps = trainer.parts.features(images)
    rows = unit_rows(maps.high.flatten(0, 1)).half()
    graph = adjacency(neighbour_lists(rows, 8, "cosine"))
    expected = add(graph, pixel_graph(images, maps.grid, options.graph().pixel_graphs), 0.3)
    found = edges.dataset_graph.kappa
    assert (found.to_dense() - expected.to_dense()).abs().max() < 1e-2
    loader.set_epoch(1)
    assert len(loader) == 2
    for step, batch in enumerate(loader):
        shown = edges._sampler(4).batch(1, step)
        assert torch.equal(batch, images[shown])
        assert edges.graph(4, 1, step).num_nodes == len(batch) * 16


def test_a_run_records_and_segments(joined, images):
    options = joined(epochs=3)
    last = start(options).train()
    run = Run(options.out)
    assert [row["step"] for row in run.metrics()] == list(range(1, 16))
    assert 0 < last["trace"] < 3
    assert run.path(GRAPH).exists()
    assert run.path("features").exists()  # crops come again
    assert Segmenter.load(run.folder, "cpu")(images[0]).shape == (70, 100)


def test_learning_raises_the_data_set_s_own_trace(joined):
    """The exact Rayleigh quotients over all patches, not the estimate's."""
    options = joined(epochs=12, batch_size=4, gumbel=False)
    trainer = start(options)
    trainer._look_at_the_data_set()
    images = torch.stack([trainer.edges.loader(4, 0).views.view(0, i).image for i in range(10)])
    maps, kappa = trainer.parts.features(images), trainer.edges.dataset_graph.kappa

    def trace() -> float:
        with torch.no_grad():
            rows = trainer.psi(maps.concat, maps.grid).flatten(0, 1)
        return quadratic_form(rows / rows.norm(dim=0), kappa).trace().item() / rows.shape[1]

    before = trace()
    trainer.train()
    assert trace() > before + 0.05


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (1, {}),
        (7, {"batch_size": 4, "views": 2, "epochs": 4}),
        (6, {"teacher": "spectral", "teacher_share": 0.5, "workers": 2}),
    ],
)
def test_resuming_equals_never_having_stopped(joined, tmp_path, monkeypatch, step, changes):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    start(joined(out=whole, **changes)).train()

    broken_off(step, joined(out=broken, **changes))
    monkeypatch.setattr(SpectralTrainer, "_features", lambda self: pytest.fail("made again"))
    start(joined(out=broken, resume=True, **changes)).train()
    assert_same(whole, broken)


def test_memory_that_runs_out_halves_the_batch(joined, monkeypatch):
    original = TrainingStep.__call__

    def stepping(self, images, progress, number, *graph):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(self, images, progress, number, *graph)

    monkeypatch.setattr(TrainingStep, "__call__", stepping)
    trainer = start(joined(batch_size=4))
    trainer.train()
    assert trainer.position.batch_size == 2
    assert trainer.finished


def test_an_unfinished_start_may_have_other_options(joined):
    """A graph that was kept before the first checkpoint may be of another k."""
    trainer = start(joined())
    trainer._look_at_the_data_set()
    again = joined(dataset_k="4", resume=True)
    other = edges_of(again, Run.create(again), trainer.parts).dataset_graph.kappa
    assert other.nnz < trainer.edges.dataset_graph.kappa.nnz


def test_unreadable_images_are_no_nodes(joined, photos, caplog):
    (photos / "images" / "train" / "3.png").write_bytes(b"no image")
    trainer = start(joined(epochs=1))
    trainer.train()
    assert trainer.edges.dataset_graph.crops[:, 1].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert "3.png" in caplog.text
    (photos / "images" / "train" / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"5\.png.*when the data set's κ was made"):
        trainer.edges.loader(2, 0).views.view(0, 4)


def test_a_view_that_could_not_be_read_keeps_its_number(joined, monkeypatch):
    """As of a file on a disk that is away for a moment."""
    read, failed = ImageDataset.image, []

    def image(self, index, **how):
        if index == 3 and not failed:
            failed.append(index)
            raise UserError("3.png: cannot read this image: the disk is away")
        return read(self, index, **how)

    monkeypatch.setattr(ImageDataset, "image", image)
    trainer = start(joined(views=2))
    trainer._look_at_the_data_set()
    crops = [[view, index] for view in range(2) for index in range(10)]
    crops.remove([0, 3])
    assert trainer.edges.dataset_graph.crops.tolist() == crops


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 500])
def test_a_damaged_graph(joined, content):
    options = joined(epochs=1)
    start(options).train()
    Run(options.out).path(GRAPH).write_bytes(content)
    with pytest.raises(UserError, match=f"{GRAPH}: .*remove it, and --resume makes it anew"):
        DatasetGraph.load(Run(options.out))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("crops", lambda crops: crops[:0]),
        ("crops", lambda crops: crops[:-1]),
        ("crops", lambda crops: crops.flatten()),
        ("columns", lambda columns: columns + 1000),
        ("values", lambda values: values * torch.nan),
        ("row_offsets", lambda offsets: offsets.flip(0)),
    ],
)
def test_a_graph_that_is_none(joined, name, changed):
    """Whole, with a checksum of its own, but of content that no graph has."""
    options = joined(epochs=1)
    start(options)._look_at_the_data_set()
    run = Run(options.out)
    tensors = run.load_tensors(GRAPH)
    assert DatasetGraph.load(run).kappa.symmetric
    run.save_tensors(GRAPH, {**tensors, name: changed(tensors[name])})
    with pytest.raises(UserError, match=f"{GRAPH}: not a graph .*{name}.*--resume makes it anew"):
        DatasetGraph.load(run)


def test_images_that_nothing_joins(joined):
    """All neighbours of every patch lie in its own image: a batch sees none of nothing."""
    trainer = start(joined(epochs=1))
    trainer._look_at_the_data_set()
    graph = trainer.edges.dataset_graph
    graph.__dict__["weights"] = torch.zeros_like(graph.weights)
    assert trainer.edges.covered(4) == (0, 0)


def test_gradients_of_several_graphs_are_refused(joined):
    with pytest.raises(UserError, match="--accumulate 2: expected 1 with --edges dataset"):
        joined(accumulate=2)
    with pytest.raises(UserError, match="--dataset-k 160: expected fewer than the 160 rows"):
        start(joined(dataset_k="160")).train()


def test_crops_are_plain_unless_views_are_asked_for(joined):
    assert not joined().augmented
    assert joined().num_views == 1
    assert joined(views=3).augmented
    assert Path(joined(views=3).out).name == "run"
    assert isinstance(start(joined()), Trainer)
