"""The evaluate command: figures against an independent computation, options, files, mistakes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, jaccard_score
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from nefkern import segment, train
from nefkern.data import Views, eval_transform, open_dataset
from nefkern.evaluate import main, parser
from nefkern.evaluation.records import free_name
from nefkern.images.feature_cache import FeatureCache
from nefkern.images.graph import GraphConfig, image_kappa
from nefkern.runtime.errors import UserError
from nefkern.runtime.files import replace_file
from nefkern.runtime.tensor_files import packed
from nefkern.segmentation.metrics import count_matrix
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.options import TrainOptions
from nefkern.training.runs import CLUSTERS, Run
from nefkern.training.trainer import Trainer

CLASSES = ("red", "green", "blue", "grey")
COLOURS = np.array([[200, 40, 40], [40, 190, 60], [50, 60, 210], [128, 128, 128]])


def scene(width: int, height: int, seed: int) -> tuple[Image.Image, Image.Image]:
    """Noisy rectangles in the colours of the classes, with their masks and a rim of void."""
    random = np.random.default_rng(seed)
    mask = np.full((height, width), 3, np.uint8)
    for _ in range(6):
        y, x = random.integers(0, height - 10), random.integers(0, width - 10)
        mask[y : y + random.integers(8, 40), x : x + random.integers(8, 40)] = random.integers(3)
    pixels = COLOURS[mask] + random.normal(0, 25, (height, width, 3))
    mask[:2] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def write_folder(root: Path, images: dict[str, int]) -> Path:
    """An annotated data set with so many images a split."""
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split, count in images.items():
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for n in range(count):
            image, mask = scene(70 + 5 * n, 90 - 4 * n, seed=100 * len(split) + n)
            image.save(root / "images" / split / f"{n}.png")
            mask.save(root / "annotations" / split / f"{n}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "scenes", {"train": 6, "val": 4})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A run of a few seconds with a small random backbone, K = 6."""
    options = TrainOptions(
        data="folder", data_root=str(folder), out=str(tmp_path_factory.mktemp("runs") / "run"),
        backbone="test_vit", weights="random", crop=64, k="16", num_eigenfunctions=6,
        heads=3, mlp_hidden=96, epochs=1, batch_size=3, workers=0, pictures=0,
    )  # fmt: skip
    Trainer(options, Run.create(options)).train()
    return Path(options.out)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run, to write into."""
    copy = tmp_path / "run"
    copy.mkdir()
    for file in trained.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


@dataclass
class PointwiseMaps:
    logits: torch.Tensor
    hidden: torch.Tensor
    graph: torch.Tensor
    concat: torch.Tensor
    padded: tuple[int, int]


class Pointwise:
    """A segmenter that looks at single pixels: five clusters by colour, so figures are exact."""

    num_clusters, window, stride, patch = 5, 40, 24, 1
    clusterer = None
    options = TrainOptions(crop=64)
    device = torch.device("cpu")
    centres = torch.tensor(
        [[0.8, 0.2, 0.2], [0.2, 0.7, 0.2], [0.2, 0.2, 0.8], [0.5, 0.5, 0.5], [0.9, 0.1, 0.1]]
    )

    def __init__(self) -> None:
        self.passes = 0
        self.seen: list[tuple[int, int]] = []

    def cluster_logits(self, pixels):
        return -(pixels[:, None] - self.centres[:, :, None, None]).square().sum(2)

    def maps(self, images):
        self.passes += 1
        self.seen.append(tuple(images.shape[2:]))
        pixels = images.float() / 255
        logits = self.cluster_logits(pixels)
        size = tuple(images.shape[2:])
        return PointwiseMaps(logits, pixels, pixels, torch.cat([pixels] * 3, 1), size)

    def kappa(self, images, maps, *, per_image):
        assert per_image
        rows = maps.graph.movedim(1, -1).flatten(0, 2)
        return image_kappa(rows, images, maps.graph.shape[2:], GraphConfig(), 60)

    def pad(self, images):
        return images, tuple(images.shape[2:])

    def project(self, concat, grid):
        assert math.prod(grid) == concat.shape[1]
        return concat[..., :5] + concat[..., 1:6] ** 2, concat

    def untrained(self, seed):
        return self

    def check_size(self, pixels, name="image"):
        pass


@pytest.fixture
def pointwise(monkeypatch) -> Pointwise:
    """Stands in for the loaded run."""
    segmenter = Pointwise()
    monkeypatch.setattr(Segmenter, "load", lambda run, device, cache: segmenter)
    return segmenter


def evaluate(run: Path, folder: Path, *options: str) -> dict:
    """Run the command, on small crops, and read the file it wrote."""
    before = {p: p.stat().st_mtime_ns for p in run.glob("evaluation-*.json")}
    small = [] if "sliding" in options else ["--size", "48"]
    code = main([str(run), "--data", "folder", "--data-root", str(folder), *small, *options])
    assert code == 0
    after = {p: p.stat().st_mtime_ns for p in run.glob("evaluation-*.json")}
    changed = [p for p in after if after[p] != before.get(p)]
    assert len(changed) == 1
    return json.loads(changed[0].read_text())


def figures(result: dict, method: str = "ours", stage: str = "none", matching: str = "iou"):
    return result["methods"][method]["stages"][stage]["matchings"][matching]


def shorter_side_to(side: int, size: torch.Size) -> list[int]:
    return [round(side * length / min(size)) for length in size]


def by_hand(samples, segmenter, by, shorter=None):
    """Accuracy and mean IoU by scikit-learn, the vote by loops over boolean masks.

    With ``shorter``, of images seen at that shorter side, the logits resized to their own.
    """

    def clusters_of(image):
        size, pixels = image.shape[1:], image[None]
        if shorter:
            seen = shorter_side_to(shorter, size)
            pixels = resize(pixels, seen, InterpolationMode.BILINEAR, antialias=True)
        logits = segmenter.cluster_logits(pixels.float() / 255)
        return F.interpolate(logits, size, mode="bilinear").argmax(1).flatten()

    clusters = torch.cat([clusters_of(s.image) for s in samples]).numpy()
    labels = torch.cat([s.annotation.flatten() for s in samples]).numpy()
    clusters, labels = clusters[labels != 255], labels[labels != 255]
    vote = np.zeros(5, int)
    for k in range(5):
        merit = []
        for c in range(4):
            both = ((clusters == k) & (labels == c)).sum()
            merit.append(both / ((clusters == k) | (labels == c)).sum() if by == "iou" else both)
        vote[k] = np.argmax(merit)
    predicted = vote[clusters]
    return accuracy_score(labels, predicted), jaccard_score(labels, predicted, average="macro")


# ---- figures ----


@pytest.mark.parametrize("by", ["iou", "count"])
def test_sliding_figures_equal_an_independent_computation(run, folder, pointwise, by):
    result = evaluate(run, folder, "--protocol", "sliding", "--resize", "none")
    samples = list(open_dataset("folder", root=folder, split="val"))
    accuracy, mean_iou = by_hand(samples, pointwise, by)
    found = figures(result, matching=by)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found["mean_iou"] == pytest.approx(mean_iou, abs=1e-12)
    assert 0.6 < accuracy < 1  # neither trivial nor chance


@pytest.mark.parametrize(("options", "shorter"), [([], 69), (["--resize", "130"], 130)])
def test_protocol_b_sees_images_resized_and_scores_them_at_their_own(
    run, folder, pointwise, options, shorter
):
    """By default at the size that training starts from: 13/12 of its crop of 64."""
    result = evaluate(run, folder, "--protocol", "sliding", *options, "--methods", "ours,kmeans")
    samples = list(open_dataset("folder", root=folder, split="val"))
    accuracy, mean_iou = by_hand(samples, pointwise, "iou", shorter)
    assert figures(result)["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert figures(result)["mean_iou"] == pytest.approx(mean_iou, abs=2e-3)
    assert abs(accuracy - by_hand(samples, pointwise, "iou")[0]) > 5e-3, "scale matters here"
    assert sum(result["pixels"].values()) == sum((s.annotation != 255).sum() for s in samples)
    assert result["settings"]["resize"] == shorter


def test_protocol_b_fits_and_scores_at_one_scale(run, folder, pointwise):
    asked = ("--protocol", "sliding", "--resize", "130", "--window", "999", "--methods", "kmeans")
    evaluate(run, folder, *asked, "--fit-images", "plain")
    expected = {
        tuple(shorter_side_to(130, sample.image.shape[1:]))
        for split in ("train", "val")
        for sample in open_dataset("folder", root=folder, split=split)
    }
    assert set(pointwise.seen) == expected
    assert len(pointwise.seen) == 6 + 4


def test_crop320_figures_equal_an_independent_computation(run, folder, pointwise):
    result = evaluate(run, folder)
    cropped = map(
        eval_transform("crop320", size=48), open_dataset("folder", root=folder, split="val")
    )
    accuracy, mean_iou = by_hand(list(cropped), pointwise, "iou")
    assert figures(result)["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert figures(result)["mean_iou"] == pytest.approx(mean_iou, abs=1e-12)
    assert sum(result["pixels"].values()) == sum((s.annotation != 255).sum().item() for s in map(
        eval_transform("crop320", size=48), open_dataset("folder", root=folder, split="val")
    ))  # fmt: skip


def test_kmeans_finds_the_colours(run, folder, pointwise):
    result = evaluate(run, folder, "--methods", "kmeans,kmeans-concat,ours*,ours*-untrained")
    for method in ("kmeans", "ours*", "ours*-untrained"):
        assert figures(result, method, matching="count")["accuracy"] > 0.7
    assert list(result["methods"]) == ["kmeans", "kmeans-concat", "ours*", "ours*-untrained"]


def test_deep_spectral_finds_the_colours(run, folder, pointwise):
    first = evaluate(run, folder, "--methods", "deep-spectral")
    assert figures(first, "deep-spectral", matching="count")["accuracy"] > 0.7
    again = evaluate(run, folder, "--methods", "deep-spectral", "--batch-size", "1")
    assert again["methods"] == first["methods"]


def test_deep_spectral_of_a_real_run(run, folder):
    """With the run's own backbone and graph; windows of several sizes, not multiples of a patch."""
    options = ("--protocol", "sliding", "--window", "70", "--methods", "ours,deep-spectral")
    result = evaluate(run, folder, *options)
    matchings = figures(result, "deep-spectral")
    assert 0 < matchings["accuracy"] < 1


def test_methods_share_the_backbones_passes(run, folder, pointwise):
    evaluate(run, folder, "--methods", "ours")
    alone = pointwise.passes
    evaluate(
        run, folder, "--methods", "ours,ours*,kmeans,kmeans-concat,deep-spectral,ours-untrained"
    )
    assert alone == 4  # one an image of the val split
    assert pointwise.passes - alone == 12 / 4 + 4  # two views of six images, four at once


def test_pictures_beside_the_scores(run, folder, pointwise):
    evaluate(run, folder, "--methods", "ours,ours*", "--pictures", "3")
    (drawn,) = (path for path in run.glob("evaluation-*") if path.is_dir())
    names = sorted(path.name for path in drawn.iterdir())
    assert names[:3] == [f"{i:03d}-image-annotation-ours-ours_.png" for i in range(3)]
    assert names[3:] == ["classes.svg", "confusion-ours.svg", "confusion-ours_.svg", "iou.svg"]
    page = (run / "report.html").read_text()
    assert all(f"{drawn.name}/{name}" in page for name in names)
    evaluate(run, folder, "--methods", "ours,ours*", "--pictures", "0")
    assert sorted(path.name for path in drawn.iterdir()) != names


def test_ignored_classes_are_void_and_gone(run, folder, pointwise):
    asked = ("--protocol", "sliding", "--resize", "none", "--ignore-class", "grey")
    result = evaluate(run, folder, *asked)
    assert result["classes"] == ["red", "green", "blue"]
    samples = list(open_dataset("folder", root=folder, split="val", ignore_classes=["grey"]))
    accuracy, _ = by_hand(samples, pointwise, "iou")
    assert figures(result)["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert list(figures(result)["iou"]) == ["red", "green", "blue"]


def test_ignoring_a_class_in_the_middle_keeps_the_names_right(run, folder, pointwise):
    everything = evaluate(run, folder, "--protocol", "sliding")
    without = evaluate(run, folder, "--protocol", "sliding", "--ignore-class", "green")
    del everything["pixels"]["green"]
    assert without["pixels"] == everything["pixels"]
    assert figures(without)["iou"]["blue"] > 0.5


def test_hungarian_when_there_are_as_many_clusters_as_classes(run, folder, pointwise, capsys):
    evaluate(run, folder)
    assert "as many clusters as classes, got 5 clusters, 4 classes" in capsys.readouterr().out
    pointwise.num_clusters = 4
    pointwise.centres = pointwise.centres[:4]
    result = evaluate(run, folder, "--limit", "3")
    for matching in ("hungarian", "hungarian-iou"):
        assert sorted(figures(result, matching=matching)["assignment"]) == [0, 1, 2, 3]
    out = capsys.readouterr().out
    assert "as many clusters" not in out
    assert "Hungarian by IoU" in out


@pytest.mark.parametrize("on", ["clusters", "classes"])
def test_crf_is_scored_beside(run, folder, pointwise, on):
    """Noise of 25 levels: single pixels are often wrong, their neighbourhood never."""
    pytest.importorskip("pydensecrf")
    crf = ["--crf"] if on == "clusters" else ["--crf", "classes"]
    result = evaluate(run, folder, "--methods", "ours,kmeans", *crf)
    for method in ("ours", "kmeans"):
        assert set(result["methods"][method]["stages"]) == {"none", on}
        for matching in ("iou", "count"):
            before = figures(result, method, "none", matching)["accuracy"]
            after = figures(result, method, on, matching)["accuracy"]
            assert after > before - 0.02
    assert figures(result, "ours", on, "count") != figures(result, "ours", "none", "count")


def test_graph_is_scored_beside(run, folder, pointwise, capsys):
    """Each pixel is a patch of its own here: what is noise about an edge is smoothed away."""
    result = evaluate(run, folder, "--methods", "ours,kmeans", "--edges", "graph", "--boundary")
    for method in ("ours", "kmeans"):
        stages = result["methods"][method]["stages"]
        assert list(stages) == ["none", "graph"]
        for matching in ("iou", "count"):
            before = figures(result, method, "none", matching)["accuracy"]
            after = figures(result, method, "graph", matching)["accuracy"]
            assert after > before - 0.02
            assert all(0 < stages[s]["boundary"][matching]["f"] < 1 for s in stages)
    assert {d["second"] for d in result["differences"]} > {"ours+graph"}
    assert ["ours", "graph"] in [d["second"] for d in result["boundary_differences"]]
    assert result["settings"]["edges"] == result["asked"]["edges"] == "graph"
    assert result["graph"]["solves"] == 8
    out = capsys.readouterr().out
    assert "ours    graph  majority by IoU" in out
    assert "Boundary F-score (within 0.75% of the diagonal)" in out
    assert "edges on the pixel graph: 8 solves, each " in out


def test_graph_and_crf_beside_each_other(run, folder, pointwise, monkeypatch):
    """What changes nothing has the same figures, in both; boundaries too, after either CRF."""
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    monkeypatch.setattr("nefkern.segmentation.graph_edges.graph_edges", lambda image, p, *_: p)
    sliding = ("--protocol", "sliding", "--crf-workers", "0", "--boundary", "--edges")
    for options in (["graph,crf"], ["graph", "--crf"], ["crf, graph", "--crf", "classes"]):
        result = evaluate(run, folder, *sliding, *options)
        stages = result["methods"]["ours"]["stages"]
        on = "classes" if "classes" in options else "clusters"
        assert list(stages) == ["none", "graph", on]
        for stage in ("graph", on):
            assert figures(result, "ours", stage) == figures(result, "ours", "none")
            assert stages[stage]["boundary"] == stages["none"]["boundary"]


def test_boundaries_of_merged_clusters(continuous, folder, pointwise):
    result = evaluate(continuous, folder, "--merge", "2", "--boundary", "--edges", "graph")
    stages = result["methods"]["ours"]["stages"]
    assert all(0 <= stages[s]["boundary"]["iou"]["f"] <= 1 for s in ("none", "graph"))


def test_crf_on_classes_starts_from_the_matched_segmentation(run, folder, pointwise, monkeypatch):
    """With a CRF that changes nothing, nothing changes."""
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--crf", "classes", "--crf-workers", "0")
    result = evaluate(run, folder, "--methods", "ours,kmeans", *crf)
    for method in ("ours", "kmeans"):
        for matching in ("iou", "count"):
            before = figures(result, method, "none", matching)
            assert figures(result, method, "classes", matching) == before


def test_crf_on_clusters_starts_from_the_clusters(run, folder, pointwise, monkeypatch):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--protocol", "sliding", "--crf", "--crf-workers", "0")
    result = evaluate(run, folder, "--methods", "ours,kmeans", *crf)
    for method in ("ours", "kmeans"):
        assert figures(result, method, "clusters") == figures(result, method, "none")


@pytest.mark.parametrize("on", ["clusters", pytest.param("classes", marks=pytest.mark.long)])
def test_crf_in_worker_processes_gives_the_same_figures(run, folder, pointwise, on, capsys):
    pytest.importorskip("pydensecrf")
    asked = ("--methods", "ours,kmeans", "--crf", on, "--crf-workers")
    here = evaluate(run, folder, *asked, "0")
    capsys.readouterr()
    there = evaluate(run, folder, *asked, "2")
    assert there["methods"] == here["methods"]
    assert (there["settings"], there["asked"]) == (here["settings"], here["asked"])
    images, jobs = 4, 2 if on == "clusters" else 2 * 2  # by IoU and by count
    for result, workers in ((here, 0), (there, 2)):
        assert (result["crf"]["workers"], result["crf"]["inferences"]) == (workers, images * jobs)
        assert result["crf"]["seconds_per_image"] > 0
        assert result["crf"]["seconds_per_inference"] > 0
    out, err = capsys.readouterr()
    assert f"CRF: {there['crf']['seconds_per_image']:.2f} s an image" in out
    last = [line for line in err.replace("\r", "\n").splitlines() if "|" in line][-1]
    assert f"{images}/{images} [" in last
    assert "s/image]" in last


# ---- how sure the scores are ----


def test_scores_come_with_intervals_the_other_half_and_bounds(run, folder, pointwise, capsys):
    result = evaluate(run, folder, "--methods", "ours,kmeans,probe", "--bootstrap", "200")
    assert result["resampling"] == {"bootstrap": 200, "splits": 10, "seed": 0}
    for method, matching in (("ours", "iou"), ("kmeans", "count"), ("probe", "own")):
        stage = result["methods"][method]["stages"]["none"]
        found, cross = figures(result, method, matching=matching), stage["cross"][matching]
        for score in ("accuracy", "mean_iou"):
            low, high = stage["intervals"][matching][score]
            assert low <= found[score] <= high
            assert low < high
            low, high = cross["interval"][score]
            assert low <= cross[score] <= high
    bounds = {
        name: bound["stages"]["none"]["matchings"] for name, bound in result["bounds"].items()
    }
    assert bounds["patches"]["own"]["accuracy"] == 1, "patches of a pixel"
    floor = bounds["random-clusters"]["count"]["accuracy"]
    share = max(result["pixels"].values()) / sum(result["pixels"].values())
    assert floor == pytest.approx(share, abs=0.02)
    assert floor < figures(result)["accuracy"]
    printed = capsys.readouterr().out
    assert "other half" in printed
    assert "floor: random-segments" in printed
    assert "kmeans - ours" in printed


def test_differences_are_between_every_two_methods(run, folder, pointwise):
    result = evaluate(run, folder, "--methods", "ours,kmeans,probe", "--cross-match", "0")
    pairs = {(d["first"], d["second"], d["matching"]) for d in result["differences"]}
    names = [("ours", "kmeans"), ("ours", "probe"), ("kmeans", "probe")]
    assert pairs == {(*pair, matching) for pair in names for matching in ("iou", "count")}
    (found,) = (d for d in result["differences"] if (d["first"], d["second"], d["matching"]) ==
                ("ours", "kmeans", "iou"))  # fmt: skip
    before, after = (figures(result, name)["mean_iou"] for name in ("ours", "kmeans"))
    assert found["mean_iou"]["difference"] == pytest.approx(after - before, abs=1e-12)


def test_what_is_said_beside_the_scores_changes_none(run, folder, pointwise, capsys):
    full = evaluate(run, folder)
    assert next(run.glob("evaluation-*.npz")).stem == next(run.glob("evaluation-*.json")).stem
    off = ("--bootstrap", "0", "--cross-match", "0", "--no-bounds")
    capsys.readouterr()
    bare = evaluate(run, folder, *off)
    assert (bare["settings"], bare["asked"]) == (full["settings"], full["asked"])
    assert figures(bare) == figures(full)
    stage = bare["methods"]["ours"]["stages"]["none"]
    assert "intervals" not in stage
    assert "cross" not in stage
    assert "bounds" not in bare
    assert "How sure" not in capsys.readouterr().out
    assert not list(run.glob("evaluation-*.npz")), "those of the scores before are gone"


@pytest.mark.parametrize("on", ["clusters", "classes"])
def test_a_crf_has_intervals_and_differences_too(run, folder, pointwise, monkeypatch, on):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--protocol", "sliding", "--crf", on, "--crf-workers", "0")
    result = evaluate(run, folder, *crf)
    plain, refined = (result["methods"]["ours"]["stages"][stage] for stage in ("none", on))
    assert refined["intervals"] == plain["intervals"]
    assert ("cross" in refined) == (on == "clusters"), "classes are refined after one matching"
    found = [d for d in result["differences"] if d["second"] == "ours+crf"]
    assert found
    assert not any(d[score]["differs"] for d in found for score in ("accuracy", "mean_iou"))


# ---- what methods are fitted on ----


def test_kmeans_sees_the_runs_augmented_crops(run, folder, pointwise, monkeypatch):
    """Each image once a pass, in the views of the run's epochs, and no more than asked for."""
    seen = []
    maps = pointwise.maps
    monkeypatch.setattr(pointwise, "maps", lambda x: seen.extend(x) or maps(x))
    result = evaluate(run, folder, "--methods", "kmeans", "--fit-passes", "3", "--limit", "4")
    assert (result["settings"]["fit_images"], result["settings"]["fit_passes"]) == ("augmented", 3)
    options = Run(run).options()
    train_set = open_dataset("folder", root=folder, split="train")
    views = Views(train_set, options.transform(), seed=options.seed)
    expected = {views.view(e, i).image.numpy().tobytes() for e in range(3) for i in range(4)}
    assert len(seen) == 3 * 4 + 4
    assert {image.numpy().tobytes() for image in seen[:12]} == expected


def test_plain_crops_are_those_of_the_protocol(run, folder, pointwise, monkeypatch):
    seen = []
    maps = pointwise.maps
    monkeypatch.setattr(pointwise, "maps", lambda x: seen.extend(x) or maps(x))
    result = evaluate(run, folder, "--methods", "kmeans", "--fit-images", "plain")
    assert result["settings"]["fit_passes"] is None
    assert figures(result, "kmeans", matching="count")["accuracy"] > 0.7
    crops = map(eval_transform("crop320", size=48), open_dataset("folder", root=folder))
    expected = {sample.image.numpy().tobytes() for sample in crops}
    assert {image.numpy().tobytes() for image in seen[:6]} == expected


def test_maps_that_the_run_has_kept_are_not_computed_again(folder, tmp_path, monkeypatch):
    options = TrainOptions(
        data="folder", data_root=str(folder), out=str(tmp_path / "views"), views=2,
        backbone="test_vit", weights="random", crop=64, k="16", num_eigenfunctions=6,
        epochs=2, batch_size=3, workers=0, pictures=0,
    )  # fmt: skip
    Trainer(options, Run.create(options)).train()
    kept = sorted((tmp_path / "views" / "features").rglob("*.safetensors"))
    assert len(kept) == 2 * 6
    computed = []
    compute = FeatureCache._compute
    monkeypatch.setattr(FeatureCache, "_compute", lambda c, x: computed.extend(x) or compute(c, x))
    evaluate(tmp_path / "views", folder, "--methods", "ours,kmeans")
    assert len(computed) == 4, "the images that are scored"
    assert sorted((tmp_path / "views" / "features").rglob("*.safetensors")) == kept


# ---- linear probes ----


def test_probes_are_scored_by_their_own_classes(run, folder, pointwise, capsys):
    result = evaluate(run, folder, "--methods", "ours,linear-probe", "--flip")
    assert list(result["methods"]) == ["ours", "probe-ours", "probe"]
    for name in ("probe-ours", "probe"):
        assert set(result["methods"][name]["stages"]["none"]["matchings"]) == {"own"}
        found = figures(result, name, matching="own")
        assert found["assignment"] == [0, 1, 2, 3]
        assert found["accuracy"] > 0.98, "classes are colours, and noise is a fifth of their gaps"
    out = capsys.readouterr().out
    assert "its own classes" in out
    (drawn,) = (path for path in run.glob("evaluation-*") if path.is_dir())
    assert (drawn / "000-image-annotation-ours-probe-ours-probe.png").exists()
    assert (drawn / "confusion-probe.svg").exists()


def test_a_probe_on_windows_of_resized_images(run, folder, pointwise):
    options = ("--protocol", "sliding", "--resize", "60", "--methods", "probe")
    assert figures(evaluate(run, folder, *options), "probe", matching="own")["accuracy"] > 0.95


def test_a_probe_does_not_know_ignored_classes(run, folder, pointwise):
    result = evaluate(run, folder, "--methods", "probe", "--ignore-class", "green")
    assert list(figures(result, "probe", matching="own")["iou"]) == ["red", "blue", "grey"]
    assert figures(result, "probe", matching="own")["accuracy"] > 0.98


@pytest.mark.parametrize("on", ["clusters", "classes"])
def test_a_crf_that_changes_nothing_leaves_a_probe_alone(run, folder, pointwise, monkeypatch, on):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--crf", on, "--crf-workers", "0", "--protocol", "sliding")
    result = evaluate(run, folder, "--methods", "probe,ours", *crf)
    before = figures(result, "probe", "none", "own")
    assert figures(result, "probe", on, "own") == before


def test_a_probe_needs_annotations_to_fit(run, folder, tmp_path, pointwise, capsys):
    root = write_folder(tmp_path / "bare", {"train": 2, "val": 2})
    for file in (root / "annotations" / "train").iterdir():
        file.unlink()
    (root / "annotations" / "train").rmdir()
    line = failure(capsys, run, "--data-root", root, "--methods", "probe", "--size", "48")
    assert "--fit-split train: has no annotations" in line


# ---- flip averaging ----


def test_flip_asks_twice_and_changes_nothing_for_single_pixels(run, folder, pointwise):
    plain = evaluate(run, folder, "--methods", "ours")
    asked = pointwise.passes
    flipped = evaluate(run, folder, "--methods", "ours", "--flip")
    assert pointwise.passes == 3 * asked
    assert flipped["methods"] == plain["methods"]
    assert flipped["settings"]["flip"]
    assert len(list(run.glob("evaluation-*.json"))) == 2


# ---- continuous eigenfunctions ----


@pytest.fixture(scope="module")
def continuous(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "continuous"
    assert train.main([
        "--data", "folder", "--data-root", str(folder), "--out", str(out), "--crop", "64",
        "--backbone", "test_vit", "--weights", "random", "--k", "8", "-K", "6", "--no-gumbel",
        "--epochs", "1", "--batch-size", "3", "--workers", "0", "--pictures", "1",
    ]) == 0  # fmt: skip
    return out


def test_continuous_eigenfunctions_are_clustered_by_kmeans(continuous, folder):
    """What is scored are the run's own clusters, and they are K-means on unit rows."""
    own = ("--protocol", "sliding", "--resize", "none")
    result = evaluate(continuous, folder, *own, "--methods", "ours,kmeans")
    segmenter = Segmenter.load(continuous, "cpu")
    state = Run(continuous).load_clusters()
    counts = torch.zeros(6, 4, dtype=torch.int64)
    for sample in open_dataset("folder", root=folder, split="val"):
        maps = segmenter.maps(sample.image[None])
        outputs = maps.logits[0].flatten(1).T.double() * state["scale"].double()
        unit = outputs / outputs.norm(dim=1, keepdim=True)
        nearest = torch.cdist(unit, state["centers"].double()).argmin(1)
        found = segmenter.cluster_logits(maps)[0].flatten(1).argmax(0)
        assert torch.equal(found, nearest)
        assert not torch.equal(found, maps.logits[0].flatten(1).argmax(0))
        clusters = segmenter.logits(sample.image).argmax(0)
        counts += count_matrix(clusters, sample.annotation, 6, 4)
    accuracy = counts.amax(1).sum() / counts.sum()
    assert figures(result, matching="count")["accuracy"] == pytest.approx(accuracy.item(), abs=2e-3)
    assert "continuous" in result["methods"]["ours"]["title"]


def test_a_continuous_run_without_clusters(continuous, folder, tmp_path, capsys, caplog):
    """Refused in a line, fitted where there are images, and made by --resume as they were."""
    caplog.set_level("INFO")
    old = tmp_path / "old"
    shutil.copytree(continuous, old)
    (old / CLUSTERS).unlink()
    photo = str(folder / "images" / "val" / "0.png")
    assert segment.main([str(old), photo, "--out", str(tmp_path / "out")]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert "the run has none (clusters.safetensors)" in line
    assert "--resume" in line
    result = evaluate(old, folder)
    assert "keeps no clusters" in caplog.text
    assert figures(result)["accuracy"] > 0.25
    config = ["--config", str(old / "config.yaml"), "--out", str(old), "--resume"]
    assert train.main(config) == 0
    made, before = (load_file(folder / CLUSTERS) for folder in (old, continuous))
    assert made.keys() == before.keys()
    assert all(torch.equal(made[name], before[name]) for name in made)
    assert segment.main([str(old), photo, "--out", str(tmp_path / "out"), "--flip"]) == 0


def test_clusters_of_an_earlier_step_and_damaged_ones(continuous, tmp_path):
    run = Run(tmp_path / "old")
    shutil.copytree(continuous, run.folder)
    assert run.load_clusters() is not None
    save_file(load_file(run.path(CLUSTERS)), run.path(CLUSTERS), {"step": "1"})
    assert run.load_clusters() is None
    run.path(CLUSTERS).write_bytes(b"none")
    with pytest.raises(UserError, match="not a readable file of clusters"):
        run.load_clusters()


@pytest.mark.parametrize("options", [[], ["--crf", "classes"], ["--crf"]])
def test_all_of_evaluate_takes_a_continuous_run(continuous, folder, options):
    if options:
        pytest.importorskip("pydensecrf")
    names = "ours,ours-untrained,hidden"
    result = evaluate(continuous, folder, "--methods", names, "--limit", "2", *options)
    assert list(result["methods"]) == ["ours", "ours-untrained", "ours*"]


# ---- merged clusters ----


def test_merged_clusters_are_scored_as_segment_merges_them(continuous, folder, tmp_path, capsys):
    """Counts of the index images of segment --classes, matched by count."""
    run = tmp_path / "run"
    shutil.copytree(continuous, run, ignore=shutil.ignore_patterns("evaluation-*"))
    own = ("--protocol", "sliding", "--resize", "none")
    methods = ("--methods", "ours,kmeans,probe")
    whole = evaluate(run, folder, *own, *methods)
    result = evaluate(run, folder, *own, *methods, "--merge", "3")
    assert len(list(run.glob("evaluation-*.json"))) == 2
    assert (result["num_clusters"], result["settings"]["merge"]) == (3, 3)
    assert "merge" not in whole["settings"]
    assert "merge" not in whole["asked"]
    assert len(figures(result)["assignment"]) == len(figures(result, "kmeans")["assignment"]) == 3
    assert figures(result, "probe", matching="own") == figures(whole, "probe", matching="own")
    groups = Segmenter.load(run, "cpu").merged(3)
    assert groups.unique().tolist() == [0, 1, 2]
    images = str(folder / "images" / "val")
    for out, options in (("all", []), ("merged", ["--classes", "3"])):
        assert segment.main([str(run), images, "--out", str(tmp_path / out), *options]) == 0
    for n in range(4):
        before, after = (
            np.array(Image.open(tmp_path / out / f"{n}.clusters.png")) for out in ("all", "merged")
        )
        assert np.array_equal(groups.numpy()[before], after)
    segmenter, counts = Segmenter.load(run, "cpu"), torch.zeros(3, 4, dtype=torch.int64)
    for sample in open_dataset("folder", root=folder, split="val"):
        counts += count_matrix(groups[segmenter.logits(sample.image).argmax(0)],
                               sample.annotation, 3, 4)  # fmt: skip
    accuracy = counts.amax(1).sum() / counts.sum()
    assert figures(result, matching="count")["accuracy"] == pytest.approx(accuracy.item(), abs=2e-3)
    assert "How clusters merge" in (run / "report.html").read_text()


def test_a_crf_on_classes_of_merged_clusters(continuous, folder, monkeypatch):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr("nefkern.segmentation.mean_field.mean_field", lambda image, p, _: p)
    crf = ("--crf", "classes", "--crf-workers", "0", "--merge", "2", "--methods", "ours,kmeans")
    result = evaluate(continuous, folder, *crf)
    for method in ("ours", "kmeans"):
        before = figures(result, method, "none", "count")
        assert figures(result, method, "classes", "count") == before


def test_what_cannot_be_merged(run, continuous, folder, tmp_path, capsys):
    line = failure(capsys, continuous, "--data-root", folder, "--merge", "7")
    assert "--merge 7: expected 1 to 6, the run's clusters" in line
    line = failure(capsys, run, "--data-root", folder, "--merge", "3")
    assert "those of ours are ψ's own outputs" in line
    photo = str(folder / "images" / "val" / "0.png")
    for where, count, said in (
        (run, 3, "--classes 3: merges the clusters of K-means"),
        (continuous, 7, "--classes 7: expected 1 to 6, the run's clusters"),
        (continuous, 0, "--classes 0: expected 1 to 6, the run's clusters"),
    ):
        asked = [str(where), photo, "--out", str(tmp_path / "out"), "--classes", str(count)]
        assert segment.main(asked) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the paper's data sets ----


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    """Two splits in Cityscapes' layout; the labels are road, parking, car and ego vehicle."""
    for split in ("train", "val"):
        for n in range(2):
            image, mask = scene(90, 60, seed=n)
            frame = f"ulm_{n:06}_000019"
            for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
                folder = tmp_path / "data" / kind / split / "ulm"
                folder.mkdir(parents=True, exist_ok=True)
                picture = image if kind == "leftImg8bit" else mask.point([7, 9, 26, 1] + [0] * 252)
                picture.save(folder / f"{frame}_{suffix}.png")
    return tmp_path / "data"


def evaluate_cityscapes(run: Path, root: Path, *options: str) -> dict:
    before = set(run.glob("evaluation-*.json"))
    assert main([str(run), "--data", "cityscapes", "--data-root", str(root), *options]) == 0
    (written,) = set(run.glob("evaluation-*.json")) - before
    return json.loads(written.read_text()) | {"name": written.name}


@pytest.mark.parametrize(
    ("options", "classes", "parking"),
    [
        (["--size", "48"], 27, True),
        (["--size", "48", "--classes", "19"], 19, False),
        (["--protocol", "sliding"], 19, False),
        (["--protocol", "sliding", "--classes", "27"], 27, True),
    ],
)
def test_classes_follow_the_protocol_unless_given(
    run, cityscapes, pointwise, options, classes, parking
):
    pointwise.patch = 16
    result = evaluate_cityscapes(run, cityscapes, *options)
    assert len(result["classes"]) == result["settings"]["classes"] == classes
    protocol = "sliding" if "sliding" in options else "crop320"
    assert result["name"] == f"evaluation-cityscapes-{classes}-val-{protocol}.json"
    met = {name for name, pixels in result["pixels"].items() if pixels}
    assert met == {"road", "car"} | ({"parking"} if parking else set())


@pytest.mark.parametrize(
    ("patch", "options", "expected"),
    [
        (16, [], (768, 512, 1024)),
        (14, [], (770, 518, 1024)),  # on the patch grid
        (16, ["--window", "60", "--resize", "80"], (60, 40, 80)),
        (16, ["--stride", "384"], (768, 384, 1024)),
        (16, ["--window", "60", "--stride", "50", "--resize", "none"], (60, 50, None)),
    ],
)
def test_sliding_windows_are_the_paper_s_unless_given(
    run, cityscapes, pointwise, patch, options, expected
):
    pointwise.patch = patch
    settings = evaluate_cityscapes(run, cityscapes, "--protocol", "sliding", *options)["settings"]
    assert (settings["window"], settings["stride"], settings["resize"]) == expected


def test_data_sets_that_cannot_be_scored(run, cityscapes, pointwise, tmp_path, capsys):
    asked = [run, "--data", "cityscapes", "--data-root", cityscapes]
    assert "cityscapes has 19 or 27 classes" in failure(capsys, *asked, "--classes", "20")
    (cityscapes / "gtFine" / "val").rename(tmp_path / "elsewhere")
    line = failure(capsys, *asked)
    assert "no annotations for split 'val'; get gtFine_trainvaltest.zip" in line
    (tmp_path / "net" / "train" / "n01440764").mkdir(parents=True)
    scene(80, 80, 0)[0].save(tmp_path / "net" / "train" / "n01440764" / "a.JPEG")
    asked = [run, "--data", "imagenet", "--data-root", tmp_path / "net", "--split", "train"]
    assert "imagenet is only to train on" in failure(capsys, *asked)


def test_a_run_on_a_paper_s_data_set(cityscapes, tmp_path, capsys):
    """Trained by the command and scored, K-means fitted on the training split."""
    out = tmp_path / "city"
    assert train.main([
        "--data", "cityscapes", "--data-root", str(cityscapes), "--out", str(out), "--crop", "64",
        "--resize", "64", "--backbone", "test_vit", "--weights", "random", "--k", "8", "-K", "6",
        "--epochs", "1", "--batch-size", "2", "--workers", "0", "--pictures", "1",
    ]) == 0  # fmt: skip
    result = evaluate_cityscapes(out, cityscapes, "--size", "48", "--methods", "ours,kmeans")
    assert list(result["methods"]) == ["ours", "kmeans"]
    assert figures(result, matching="count")["accuracy"] > 0.3
    assert main([str(out), "--size", "48", "--methods", "ours,kmeans"]) == 0
    assert len(list(out.glob("evaluation-*.json"))) == 1, "the run knows its data set"
    (scene_root := tmp_path / "other").mkdir()
    assert main([str(out), "--data-root", str(scene_root)]) == 2
    assert "expected Cityscapes, with the folder leftImg8bit" in capsys.readouterr().err
    drawn = out / Path(result["name"]).stem
    picture = np.array(Image.open(next(drawn.glob("000-image-annotation-*.png"))))
    annotation = {tuple(rgb) for rgb in picture[:48, 56:104].reshape(-1, 3).tolist()}
    road, parking, car = (128, 64, 128), (250, 170, 160), (0, 0, 142)
    assert annotation == {road, parking, car, (0, 0, 0)}, "as the publisher paints them"
    names = (drawn / "classes.svg").read_text()
    assert "<!-- road -->" in names
    assert "<!-- train -->" not in names, "only what the pictures show"
    assert "classes.svg" in (out / "report.html").read_text()


def test_a_run_on_data_without_annotations_asks_for_some(run, cityscapes, pointwise, capsys):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("data: folder", "data: imagenet"))
    line = failure(capsys, run)
    assert "--data-root: expected the folder with the annotated images" in line
    assert "trained on imagenet" in line


# ---- the real segmenter ----


def test_all_methods_on_a_real_run(run, folder, capsys):
    names = "ours,ours*,kmeans,kmeans-concat,ours-untrained,ours*-untrained"
    result = evaluate(run, folder, "--methods", names)
    assert list(result["methods"]) == names.split(",")
    for method in result["methods"]:
        found = figures(result, method, matching="count")
        assert 0.25 < found["accuracy"] <= 1
        assert len(found["assignment"]) == 6
    assert result["versions"]["torch"] in torch.__version__
    printed = capsys.readouterr().out
    assert "majority by IoU" in printed
    assert all(name in printed for name in [*names.split(","), *CLASSES])
    assert "evaluation-scenes-val-crop320" in (run / "report.html").read_text()


def test_sliding_on_a_real_run_equals_its_logits(run, folder):
    result = evaluate(run, folder, "--protocol", "sliding", "--resize", "none")
    segmenter = Segmenter.load(run, "cpu")
    counts = torch.zeros(6, 4, dtype=torch.int64)
    for sample in open_dataset("folder", root=folder, split="val"):
        clusters, seen = segmenter.logits(sample.image).argmax(0), sample.annotation != 255
        pairs = clusters[seen] * 4 + sample.annotation[seen]
        counts += torch.bincount(pairs, minlength=24).view(6, 4)
    accuracy = counts.amax(1).sum() / counts.sum()
    assert figures(result, matching="count")["accuracy"] == pytest.approx(accuracy.item(), abs=2e-3)


def test_same_seed_same_figures(run, folder):
    names = ("--methods", "kmeans,untrained")
    first = evaluate(run, folder, *names, "--seed", "3")["methods"]
    assert evaluate(run, folder, *names, "--seed", "3")["methods"] == first
    other = evaluate(run, folder, *names, "--seed", "4")["methods"]
    for method in ("kmeans", "ours*-untrained"):
        assert other[method] != first[method]


def test_shorthands_add_methods(run, folder):
    result = evaluate(
        run, folder, "--baseline", "kmeans", "--features", "hidden", "--untrained", "--limit", "2"
    )
    assert list(result["methods"]) == ["ours", "kmeans", "ours*", "ours*-untrained"]
    assert result["images"] == 2


# ---- files ----


def test_only_the_same_settings_overwrite(run, folder, pointwise):
    for options in ([], ["--seed", "1"], [], ["--seed", "1"], ["--protocol", "sliding"]):
        evaluate(run, folder, *options)
    names = sorted(p.name for p in run.glob("evaluation-*.json"))
    assert names == [
        "evaluation-scenes-val-crop320-2.json",
        "evaluation-scenes-val-crop320.json",
        "evaluation-scenes-val-sliding.json",
    ]


def test_the_file_name_tells_what_is_ignored(run, folder, pointwise):
    ignored = CLASSES[0]
    evaluate(run, folder, "--ignore-class", ignored)
    assert [p.name for p in run.glob("evaluation-*.json")] == [
        f"evaluation-scenes-val-crop320-without-{ignored}.json"
    ]


def test_many_ignored_classes_fit_into_a_file_name(tmp_path):
    """The name is as long as a file system takes it, and lists that begin alike are told apart."""
    every = [f"class {i} of ours" for i in range(60)]
    settings = {"data_root": "voc", "split": "val", "protocol": "crop320", "ignored": every[:50]}
    first = free_name(tmp_path, settings)
    replace_file(first, json.dumps({"settings": settings}))
    assert free_name(tmp_path, settings) == first
    assert free_name(tmp_path, settings | {"ignored": every}) != first


def test_a_damaged_file_is_left_alone(run, folder, pointwise):
    damaged = run / "evaluation-scenes-val-crop320.json"
    damaged.write_text("{")
    evaluate(run, folder)
    assert damaged.read_text() == "{"
    assert (run / "evaluation-scenes-val-crop320-2.json").exists()
    assert "not readable" in (run / "report.html").read_text()


# ---- mistakes ----


def failure(capsys, *arguments: object) -> str:
    """The one line that a mistaken command ends with."""
    assert main([str(a) for a in arguments]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "kmean"], "probe, hidden, untrained, linear-probe; got 'kmean'"),
        (["--fit-passes", "0"], "--fit-passes 0: expected at least 1"),
        (["--fit-images", "plain", "--fit-passes", "2"], "--fit-passes: only for --fit-images"),
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--pictures", "-1"], "--pictures -1: expected 0 or more"),
        (["--merge", "0"], "--merge 0: expected at least 1"),
        (["--bootstrap", "-1"], "--bootstrap -1: expected 0 or more"),
        (["--cross-match", "-1"], "--cross-match -1: expected 0 or more"),
        (["--seed", "-1"], "argument --seed: expected a number from 0"),
        (["--size", "9"], "--size 9: expected at least 16, a patch"),
        (["--protocol", "sliding", "--window", "9"], "--window 9: expected at least 16, a patch"),
        (["--protocol", "sliding", "--resize", "9"], "--resize 9: expected at least 16, a patch"),
        (["--protocol", "sliding", "--resize", "-9"], "--resize -9: expected at least 1, or none"),
        (["--resize", "big"], "argument --resize: expected pixels or none, got 'big'"),
        (["--window", "64"], "--window, --stride, --resize: only for --protocol sliding"),
        (["--resize", "64"], "--window, --stride, --resize: only for --protocol sliding"),
        (["--protocol", "sliding", "--stride", "999"], "--stride 999: expected at most the window"),
        (["--split", "test"], "no split 'test', there is: train, val"),
        (["--baseline", "kmeans", "--fit-split", "test"], "no split 'test'"),
        (["--ignore-class", "pink"], "ignored class 'pink'"),
        ([f"--ignore-class={c}" for c in CLASSES], "--ignore-class: every class is ignored"),
        (["--data", "samples"], "invalid choice: 'samples'"),
        (["--device", "cuda:77"], "--device cuda:77: not usable"),
        (["--protocol", "tiles"], "invalid choice: 'tiles'"),
        (["--crf", "--crf-workers", "-1"], "--crf-workers -1: expected 0 to 256"),
        (["--crf", "--crf-workers", "999"], "--crf-workers 999: expected 0 to 256"),
        (["--edges", "sharp"], "--edges sharp: expected some of bilinear,graph,crf"),
        (["--crf-workers", "2"], "--crf-workers 2: expected --crf, or --edges crf, beside it"),
    ],
)
def test_mistaken_options_are_one_line(run, folder, capsys, options, message):
    line = failure(capsys, run, "--data-root", folder, *options)
    assert message in line


def test_no_run_there(folder, tmp_path, capsys):
    line = failure(capsys, tmp_path / "nothing", "--data-root", folder)
    assert "nothing: not a run folder" in line


def test_a_checkpoint_of_another_version(run, folder, capsys):
    weights, metadata = Run(run).load()
    weights.pop(next(iter(weights)))
    (run / "checkpoint.safetensors").write_bytes(packed(weights, metadata))
    assert "does not fit this version" in failure(capsys, run, "--data-root", folder)


def test_no_annotations(run, folder, tmp_path, capsys):
    (tmp_path / "bare" / "images" / "val").mkdir(parents=True)
    scene(80, 80, 0)[0].save(tmp_path / "bare" / "images" / "val" / "a.png")
    line = failure(capsys, run, "--data-root", tmp_path / "bare")
    assert "no annotations for split 'val'" in line


def test_too_few_patches_for_kmeans(run, folder, pointwise, capsys):
    pointwise.num_clusters = 10**6
    line = failure(capsys, run, "--data-root", folder, "--methods", "kmeans")
    assert "--fit-split train: cannot fit K-means" in line
    assert "n >= 1000000" in line


def test_a_bad_training_image_is_skipped_a_bad_annotated_one_is_not(
    run, tmp_path, pointwise, capsys, caplog
):
    root = write_folder(tmp_path / "mixed", {"train": 3, "val": 2})
    (root / "images" / "train" / "1.png").write_bytes(b"no image")
    evaluate(run, root, "--methods", "kmeans")
    assert "skipped: " in caplog.text
    assert "1.png" in caplog.text
    (root / "images" / "val" / "1.png").write_bytes(b"no image")
    assert "1.png" in failure(capsys, run, "--data-root", root)


def test_an_image_smaller_than_a_patch_is_named(run, tmp_path, capsys):
    root = write_folder(tmp_path / "small", {"val": 1})
    Image.new("RGB", (9, 30)).save(root / "images" / "val" / "0.png")
    Image.new("L", (9, 30)).save(root / "annotations" / "val" / "0.png")
    line = failure(capsys, run, "--data-root", root, "--protocol", "sliding")
    assert "at least one patch" in line
    assert line.startswith(f"error: {root / 'images' / 'val' / '0.png'}:")


@pytest.mark.parametrize("protocol", ["crop320", "sliding"])
def test_masks_of_0_and_255_are_told(run, tmp_path, pointwise, capsys, protocol):
    """The object, all of it void, would score as if it were not there."""
    root = write_folder(tmp_path / "masks", {"val": 2})
    (root / "classes.txt").write_text("ground\nobject\n")
    for path in (root / "annotations" / "val").iterdir():
        mask = np.zeros(Image.open(path).size[::-1], np.uint8)
        mask[:, : mask.shape[1] // 2] = 255
        Image.fromarray(mask).save(path)
    result = evaluate(run, root, "--protocol", protocol)
    assert result["pixels"]["object"] == 0
    share = result["void_pixels"] / (result["void_pixels"] + result["pixels"]["ground"])
    assert share == pytest.approx(0.5, abs=0.02)
    printed = capsys.readouterr().out
    assert f"note: no pixel is object (1), but {100 * share:.0f}% of the pixels are 255" in printed
    assert "(object: 1)" in printed
    result = evaluate(run, root, "--protocol", protocol, "--ignore-class", "object")
    assert "void_pixels" not in result
    assert "note:" not in capsys.readouterr().out


def test_nothing_is_noted_where_every_class_occurs(run, folder, pointwise, capsys):
    evaluate(run, folder)
    assert "note:" not in capsys.readouterr().out


def test_nothing_but_void(run, tmp_path, pointwise, capsys):
    root = write_folder(tmp_path / "void", {"val": 1})
    Image.new("L", (70, 90), 255).save(root / "annotations" / "val" / "0.png")
    assert "every annotated pixel is void" in failure(capsys, run, "--data-root", root)


def test_crf_without_its_package(run, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    assert "pip install pydensecrf2" in failure(capsys, run, "--data-root", folder, "--crf")


def test_help_teaches_and_is_light():
    text = parser().format_help()
    assert "examples:" in text
    assert "K-means on the graph features" in text
    assert "--crf-workers N" in text
    code = "import nefkern.evaluate as e, sys; e.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
