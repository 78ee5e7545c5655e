"""--method spectral, end to end on a small random backbone: stages, resumption, the commands."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern import eigenmaps, evaluate, segment, spectrum, summarize, train, vote
from nefkern.images.graph import pixel_graph
from nefkern.ops import add
from nefkern.reference.knn import unit_rows
from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.spectral.embedding import adjacency, neighbour_lists
from nefkern.training.option_parsing import resolve
from nefkern.training.options import TrainOptions
from nefkern.training.runs import CHECKPOINT, STAGES, Run
from nefkern.training.spectral import SpectralTrainer
from nefkern.training.spectral_model import ChannelScale
from tests.training.outcomes import assert_same

K = 5


@pytest.fixture
def spectral(tiny):
    """spectral(**changes): options of a run of a second."""

    def make(**changes) -> TrainOptions:
        return tiny(**{"method": "spectral", "num_eigenfunctions": K, "k": "8", **changes})

    return make


def computed(options: TrainOptions) -> Path:
    SpectralTrainer(options, Run.create(options)).train()
    return Path(options.out)


def test_the_stages_and_what_is_recorded(spectral):
    options = spectral()
    run = Run(computed(options))
    rows = run.metrics()
    assert [row["stage"] for row in rows] == list(STAGES)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (rows[0]["images"], rows[0]["patches"]) == (10, 10 * 16)
    assert 0 < rows[1]["smallest"] <= rows[1]["largest"] <= 1.3001
    assert rows[1]["residual"] < 2e-3
    assert rows[1]["nnz"] > 160 * 8
    assert (rows[2]["clusters"], rows[2]["kept"]) == (K, 160)
    assert run.is_trained(options)
    assert run.options() == options
    assert not run.path("features").exists()


@pytest.mark.parametrize(
    ("features", "standardize"), [("high", None), ("high", False), ("all", None)]
)
def test_eigenpairs_are_those_of_the_data_set_s_kappa(spectral, features, standardize):
    options = spectral(
        graph_features=features, standardize=standardize, keep="all", eigenvectors=K, alpha=0.3
    )
    trainer = SpectralTrainer(options, Run.create(options))
    model = trainer.train()
    images = torch.cat(list(trainer._batches()))
    maps = trainer.backbone(images)
    rows = maps.high.flatten(0, 1) if features == "high" else maps.concat.flatten(0, 1)
    if standardize is None:
        rows = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6)
    graph = adjacency(neighbour_lists(unit_rows(rows), 8, "cosine"))
    graph = add(graph, pixel_graph(images, maps.grid, options.graph().pixel_graphs), 0.3)
    dense = graph.to_dense().double()
    values = torch.linalg.eigvalsh(dense).flip(0)[:K]
    found = model.embedding
    assert torch.allclose(found.values, values, atol=1e-4)
    vectors = found.vectors.double()
    assert (dense @ vectors - vectors * found.values).norm(dim=0).max() < 5e-3


def test_a_row_of_the_data_set_is_extended_to_about_its_own_value(spectral):
    """By its k neighbours and itself instead of k neighbours: near, and of the same sign."""
    options = spectral()
    trainer = SpectralTrainer(options, Run.create(options))
    model = trainer.train()
    images = torch.cat(list(trainer._batches()))
    found = model.functions(trainer.backbone(images), images).flatten(0, 1)
    known = model.embedding.vectors / model.embedding.vectors.square().mean().sqrt()
    cosines = torch.nn.functional.cosine_similarity(found, known, dim=0)
    assert cosines.min() > 0.95


def test_images_of_a_batch_do_not_influence_each_other(spectral, images):
    segmenter = Segmenter.load(computed(spectral()), "cpu")
    together = segmenter.maps(images)
    for index, image in enumerate(images):
        alone = segmenter.maps(image[None])
        for name in ("functions", "hidden", "logits"):
            expected = getattr(together, name)[index]
            assert torch.allclose(getattr(alone, name)[0], expected, atol=1e-4), name


def test_maps_are_what_they_say(spectral, images):
    segmenter = Segmenter.load(computed(spectral(eigenvectors=7)), "cpu")
    maps = segmenter.maps(images)
    assert segmenter.kind == "spectral"
    assert maps.functions.shape[1] == segmenter.num_functions == 7
    assert maps.logits.shape[1] == segmenter.num_clusters == K
    vectors, told = maps.hidden[:, :7], maps.hidden[:, 7:]
    assert told.shape[1] == segmenter.backbone.dim
    assert torch.allclose(vectors.norm(dim=1), torch.ones(()), atol=1e-5)
    assert torch.allclose(told.norm(dim=1), torch.tensor(0.7), atol=1e-5)
    centers = segmenter.head.model.kmeans.centers
    rows = maps.hidden.movedim(1, -1).flatten(0, 2)
    nearest = torch.cdist(rows, centers).argmin(1)
    assert torch.equal(maps.logits.argmax(1).flatten(), nearest)
    assert torch.allclose(segmenter.probabilities(maps.logits[0]).sum(0), torch.ones(()), atol=1e-5)


def test_features_as_far_as_the_eigenvectors_span_them(spectral):
    """Those that K-means sees beside the eigenvectors are the rows' projection V Vᵀ X."""
    options = spectral(keep="all")
    model = SpectralTrainer(options, Run.create(options)).train()
    vectors, rows = model.embedding.vectors.double(), model.embedding.rows.double()
    expected = torch.nn.functional.normalize(vectors @ (vectors.mT @ rows), dim=1)
    found = model.cluster_rows(model.embedding.vectors)[:, model.num_functions :]
    assert torch.allclose(found.double() / 0.7, expected, atol=1e-4)


def test_maps_side_by_side_have_the_same_weight():
    rows = torch.randn(500, 8) * torch.tensor([9.0, 4, 3, 2, 1, 5, 6, 7]) + 3
    scaled = ChannelScale.of(rows, (2, 6))(rows)
    assert torch.allclose(scaled.mean(0), torch.zeros(8), atol=1e-5)
    variances = scaled.var(0)
    assert torch.allclose(variances, torch.tensor([2.0] * 2 + [2 / 3] * 6), atol=1e-4)


def test_the_temperature_foretells_the_clusters_of_neighbours(spectral, images):
    """Kept with the run, computed for one from before; the argmax is the same at any."""
    run = Run(computed(spectral()))
    segmenter = Segmenter.load(run.folder, "cpu")
    model = segmenter.head.model
    kept = model.temperature
    assert run.metrics()[2]["temperature"] == pytest.approx(kept, rel=0.01)
    assert segmenter.clusterer.temperature == kept != pytest.approx(model.kmeans.variance, rel=0.1)

    near = model.embedding.neighbours(model.embedding.rows)
    others = near.indices != torch.arange(160)[:, None]
    weights = near.similarities * others
    rows = model.cluster_rows(model.embedding.vectors)
    clusters = model.kmeans.predict(rows)[near.indices.long()]

    def likelihood(temperature):
        shares = (model.kmeans.logits(rows) / temperature).log_softmax(1).gather(1, clusters)
        return float((weights / weights.sum(1, keepdim=True) * shares).sum())

    assert likelihood(kept) > max(likelihood(0.9 * kept), likelihood(1.1 * kept))

    tensors, _ = run.load()
    del tensors["temperature"]
    run.save_stage(tensors, STAGES[-1], len(STAGES))
    older = Segmenter.load(run.folder, "cpu")
    assert older.clusterer.temperature == pytest.approx(kept)
    logits = older.logits(images[0])
    assert torch.equal(older.probabilities(logits).argmax(0), logits.argmax(0))


def test_clusters_of_the_eigenvectors_alone(spectral, images):
    segmenter = Segmenter.load(computed(spectral(cluster_on="vectors")), "cpu")
    maps = segmenter.maps(images)
    assert maps.hidden.shape[1] == segmenter.num_functions
    assert torch.allclose(maps.hidden.norm(dim=1), torch.ones(()), atol=1e-5)


def test_a_graph_of_some_images(spectral):
    """Evenly spread ones; the clusters of the others are the extension's."""
    options = spectral(graph_images=2)
    trainer = SpectralTrainer(options, Run.create(options))
    images = len(trainer.dataset)
    assert trainer.chosen == [0, images // 2]
    model = trainer.train()
    assert len(model.embedding.vectors) == 2 * trainer._cells()
    assert Run(options.out).metrics()[0]["images"] == 2


def test_same_seed_same_result_another_seed_another_clustering(spectral, tmp_path):
    folders = [str(tmp_path / name) for name in "abc"]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        computed(spectral(out=folder, seed=seed))
    assert_same(*folders[:2])
    names = [(Path(f) / CHECKPOINT).read_bytes() for f in folders]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_killed_after_any_stage_goes_on_to_the_same_result(spectral, stage, tmp_path):
    whole, killed = str(tmp_path / "whole"), spectral(out=str(tmp_path / "killed"))
    computed(spectral(out=whole))
    trainer = SpectralTrainer(killed, Run.create(killed))
    names = ("_features", "_eigenpairs", "_clusters")

    def kill() -> None:
        raise RuntimeError("killed")

    for name in names[stage:]:
        setattr(trainer, name, kill)
    if stage == len(STAGES):
        trainer.train()
    else:
        with pytest.raises(RuntimeError, match="killed"):
            trainer.train()
        if stage:
            with pytest.raises(UserError, match=r"is not complete; .* --resume goes on"):
                Segmenter.load(killed.out, "cpu")
            assert not Run(killed.out).is_trained(killed)
    killed.resume = True
    again = SpectralTrainer(killed, Run.create(killed))
    assert again.reached == stage
    again.train()
    assert_same(whole, killed.out)


@pytest.mark.parametrize("inside", ["_pixel_lists", "_kappa", "_model"])
def test_ctrl_c_keeps_the_stages_before(spectral, monkeypatch, inside, tmp_path):
    options, original = spectral(), getattr(SpectralTrainer, inside)

    def interrupted(self, *args):
        if not self.interrupts.received:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SpectralTrainer, inside, interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
            computed(options)
    computed(spectral(resume=True))
    computed(spectral(out=str(tmp_path / "whole")))
    assert_same(options.out, tmp_path / "whole")


def test_resume_refuses_other_options(spectral):
    computed(spectral())
    with pytest.raises(UserError, match="this run had --k 8, not 9"):
        Run.create(spectral(k="9", resume=True))
    with pytest.raises(UserError, match="this run had --method spectral, not neural"):
        Run.create(spectral(method="neural", resume=True))


def test_landmarks_make_a_smaller_checkpoint_that_segments(spectral, images, tmp_path):
    whole = computed(spectral(out=str(tmp_path / "all"), k="24"))
    few = computed(spectral(out=str(tmp_path / "few"), k="24", keep="landmarks:50%"))
    assert Run(few).metrics()[-1]["kept"] == 80
    assert len(Run(few).load()[0]["embedding.rows"]) == 80
    assert (few / CHECKPOINT).stat().st_size < 0.75 * (whole / CHECKPOINT).stat().st_size
    segmenters = [Segmenter.load(run, "cpu") for run in (whole, few)]
    assert [s.head.model.neighbours for s in segmenters] == [24, 24]
    assert [s.head.model.embedding.k for s in segmenters] == [24, 12]
    graphs = [s.kappa(images, s.maps(images), per_image=True) for s in segmenters]
    assert graphs[0].nnz == graphs[1].nnz  # an image's own κ is not thinned
    maps = [segmenter.maps(images).hidden for segmenter in segmenters]
    assert (maps[0] * maps[1]).sum(1).mean() > 0.5


def test_views_and_no_pixel_graph(spectral):
    run = Run(computed(spectral(views=2, alpha=0.0)))
    assert run.metrics()[0]["patches"] == 2 * 160
    assert Segmenter.load(run.folder, "cpu").head.model.embedding.alpha == 0


def test_unreadable_images_are_skipped(spectral, photos, caplog):
    (photos / "images" / "train" / "3.png").write_bytes(b"no image")
    run = Run(computed(spectral()))
    assert run.metrics()[0]["images"] == 9
    assert "3.png" in caplog.text


@pytest.mark.parametrize(
    ("changes", "patches", "count"),
    [
        ({}, 160, 2 * K),
        ({}, 6400, 64),
        ({}, 64000, 256),
        ({"num_eigenfunctions": 200}, 64000, 400),
        ({"eigenvectors": 7}, 64000, 7),
    ],
)
def test_few_clusters_have_eigenvectors_enough(spectral, changes, patches, count):
    options = spectral(**changes)
    trainer = SpectralTrainer.__new__(SpectralTrainer)
    trainer.options = options
    assert trainer._eigenvectors(patches) == count


def test_eigenvectors_without_an_extension_are_left_out(spectral, caplog):
    run = Run(computed(spectral(alpha=1.0, eigenvectors=120)))
    row = run.metrics()[1]
    assert 2 <= row["eigenvectors"] < 120
    assert row["smallest"] > 1.01
    assert "a lower --alpha keeps more" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": "160"}, "--k 160: expected fewer than the 160 rows .* of the data set"),
        ({"num_eigenfunctions": 161}, "--num-eigenfunctions 161: expected at most 160"),
        ({"eigenvectors": 161}, "--eigenvectors 161: expected at most 160"),
        ({"crop": 8}, "--crop 8: expected at least 16"),
        ({"alpha": 1e6}, "--alpha 1e\\+06: expected a weight below"),
    ],
)
def test_what_the_data_set_cannot_carry(spectral, changes, message):
    options = spectral(**changes)
    with pytest.raises(UserError, match=message):
        computed(options)


def test_more_than_memory_is_refused(spectral, monkeypatch):
    monkeypatch.setattr("nefkern.training.spectral.memory", lambda: 1 << 10)
    with pytest.raises(UserError, match=r"needs about .* GiB.*--method neural"):
        computed(spectral())


def test_several_processes_are_refused(spectral, monkeypatch):
    options = spectral()
    run = Run.create(options)
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    with pytest.raises(UserError, match="--method spectral: works in one process, not in 2"):
        SpectralTrainer(options, run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "spectral", "epochs": 3}, "--epochs: is an option of --method neural"),
        ({"method": "spectral", "lr": 0.1}, "--lr: is an option of --method neural"),
        ({"method": "spectral", "gumbel": False}, "--gumbel: is an option of --method neural"),
        ({"method": "neural", "keep": "all"}, "--keep: is an option of --method spectral"),
        ({"epochs": 1, "eigenvectors": 3}, "--eigenvectors: is an option of --method spectral"),
        ({"method": "spectral", "keep": "most"}, "--keep most: expected all, float16, or landm"),
        ({"method": "spectral", "keep": "landmarks:0"}, "--keep landmarks:0: expected"),
        ({"method": "spectral", "keep": "landmarks:120%"}, "--keep landmarks:120%: expected"),
        ({"method": "spectral", "eigenvectors": 0}, "--eigenvectors 0: expected at least 1"),
    ],
)
def test_options_of_no_use(flags, message):
    with pytest.raises(UserError, match=message):
        resolve(flags)


def test_defaults_of_the_method_give_way_to_what_is_said():
    assert (resolve({"method": "spectral"}).k, resolve({"method": "spectral"}).views) == ("64", 0)
    assert resolve({"method": "spectral", "k": "9", "views": 3}).k == "9"
    assert not resolve({"method": "spectral"}).augmented
    assert resolve({"method": "spectral", "views": 3}).augmented
    assert resolve({"method": "spectral", "data": "folder", "data_root": "x"}).k == "64"


# ---- the commands ----


def test_all_commands_work_on_a_run(annotated, tmp_path, capsys):
    run = tmp_path / "run"
    common = ["--data", "folder", "--data-root", str(annotated), "--crop", "64", "--k", "8"]
    common += ["--backbone", "test_vit", "--weights", "random", "-K", str(K), "--pictures", "2"]
    assert train.main(["--method", "spectral", *common, "--out", str(run)]) == 0
    page = (run / "report.html").read_text("utf-8")
    assert "leading eigenvectors, were computed" in page
    assert "Eigenvalues" in page
    assert "Objective" not in page
    assert len(list((run / "overlays").glob("*.png"))) == 2
    methods = "ours,ours*,kmeans,kmeans-concat,deep-spectral,linear-probe"
    crf = importlib.util.find_spec("pydensecrf") is not None
    edges = "graph,crf" if crf else "graph"
    asked = ["--methods", methods, "--size", "64", "--edges", edges, "--boundary"]
    assert evaluate.main([str(run), *asked]) == 0
    scores = json.loads(next(run.glob("evaluation-*.json")).read_text("utf-8"))["methods"]
    assert "K-means on the data set's eigenvectors" in scores["ours"]["title"]
    assert scores["ours"]["stages"] == scores["ours*"]["stages"]
    assert 0.5 < scores["ours"]["stages"]["none"]["matchings"]["iou"]["accuracy"] <= 1
    sliding = [str(run), "--protocol", "sliding", "--window", "48", "--flip"]
    assert evaluate.main(sliding) == 0
    photo = str(annotated / "images" / "val" / "1.png")
    flipped = [str(run), photo, "--out", str(tmp_path / "s"), "--flip"]
    assert segment.main(flipped + ["--crf"] * crf) == 0
    assert np.array(Image.open(tmp_path / "s" / "1.clusters.png")).max() < K
    graph = [str(run), photo, "--out", str(tmp_path / "g"), "--edges", "graph"]
    assert segment.main(graph) == 0
    assert np.array(Image.open(tmp_path / "g" / "1.clusters.png")).max() < K
    drawn = [str(run), "--pictures", "1,2", "--draws", "3", "--json", str(tmp_path / "vote.json")]
    assert vote.main(drawn) == 0
    voted = json.loads((tmp_path / "vote.json").read_text("utf-8"))
    assert [len(row["draws"]) for row in voted] == [3, 3, 1, 1, 1]
    assert spectrum.main([str(run), "--images", "6", "--score"]) == 0
    found = json.loads((run / "spectrum.json").read_text("utf-8"))
    assert list(found["functions"]) == ["data set's eigenvectors", "their clusters"]
    assert 0.2 < found["functions"]["data set's eigenvectors"]["captured"] <= 1
    assert found["kind"] == "spectral"
    assert eigenmaps.main([str(run), photo, "--exact"]) == 0
    assert (run / "eigenmaps" / "1.eigenmaps.png").exists()
    assert summarize.main([str(run)]) == 0
    assert "| ours |" in capsys.readouterr().out


def test_an_untrained_control_is_refused_in_one_line(annotated, spectral, capsys):
    run = computed(spectral())
    assert evaluate.main([str(run), "--untrained", "--size", "64"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --methods ours*-untrained: the run is of --method spectral")


def test_a_neural_checkpoint_under_a_spectral_configuration_is_named(spectral):
    run = Run(computed(spectral()))
    run.save_stage({"x": torch.zeros(1)}, "clusters", 3)
    with pytest.raises(UserError, match="not a checkpoint of --method spectral"):
        Segmenter.load(run.folder, "cpu")
