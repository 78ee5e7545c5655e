"""The methods that evaluate compares: their passes, what they are fitted on, probes, flips."""

from __future__ import annotations

import torch

from nefkern.data import Views, eval_transform, open_dataset
from nefkern.images.feature_cache import FeatureCache
from nefkern.training.options import TrainOptions
from nefkern.training.runs import Run
from nefkern.training.trainer import Trainer
from tests.evaluation.command import evaluate, failure, figures
from tests.evaluation.scenes import CLASSES, write_folder


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
    assert "evaluation-scenes-val-crop320" in (run / "report.html").read_text("utf-8")


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
