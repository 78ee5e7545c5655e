"""The spectrum command: its figures against an independent computation, files, report, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nefkern import train as train_command
from nefkern.data import Sample, eval_transform, open_dataset
from nefkern.evaluation.report import write_report
from nefkern.evaluation.spectrum_page import shown_rows
from nefkern.images.graph import kappa
from nefkern.segmentation.segmenter import Segmenter
from nefkern.spectrum import main, parser
from nefkern.training.options import TrainOptions
from nefkern.training.runs import Run
from nefkern.training.trainer import Trainer
from tests.data import publisher

K = 6


def train(options: TrainOptions) -> Path:
    Trainer(options, Run.create(options)).train()
    return Path(options.out)


@pytest.fixture
def run(tiny) -> Path:
    """A run of a second with a small random backbone."""
    return train(tiny(num_eigenfunctions=K, epochs=1, batch_size=5))


def result(run: Path, *options: object) -> dict:
    assert main([str(run), *map(str, options)]) == 0
    return json.loads((run / "spectrum.json").read_text("utf-8"))


def independent(run: Path, images: list[torch.Tensor], softmax: bool = True):
    """κ's dense eigenpairs and the trained ψ's outputs, from the parts that training uses."""
    segmenter = Segmenter.load(run, "cpu")
    pixels = torch.stack(images)
    features = segmenter.backbone(pixels)
    graph = kappa(features.high, pixels, features.grid, segmenter.options.graph())
    values, vectors = np.linalg.eigh(graph.to_dense().double().numpy())
    logits = segmenter.psi(features.concat, features.grid).flatten(0, 1).detach() / 0.3
    psi = (logits.softmax(1) if softmax else logits).double().numpy()
    return graph.to_dense().double().numpy(), values[::-1], vectors[:, ::-1], psi


def crops(photos: Path) -> list[torch.Tensor]:
    """All images as the command prepares them, in no particular order."""
    dataset, cut = open_dataset("folder", root=photos), eval_transform("crop320", size=64)
    return [cut(Sample("", dataset.image(i))).image for i in range(len(dataset))]


def test_figures_equal_an_independent_computation(run, photos):
    found = result(run, "--images", 10)
    dense, values, vectors, psi = independent(run, crops(photos))
    assert found["nodes"] == len(dense)
    assert found["eigenvalues"] == pytest.approx(values[:K], abs=1e-6)
    q = np.linalg.qr(psi)[0]
    ritz = np.linalg.eigvalsh(q.T @ dense @ q)[::-1]
    u = psi / np.linalg.norm(psi, axis=0)
    cosines = np.linalg.svd(q.T @ vectors[:, :K], compute_uv=False)
    fit = found["functions"]["ψ"]
    assert fit["ritz"] == pytest.approx(ritz, abs=1e-4)
    assert fit["rayleigh"] == pytest.approx(sorted(np.diag(u.T @ dense @ u))[::-1], abs=1e-4)
    assert np.cos(np.radians(fit["angles"])) == pytest.approx(cosines, abs=1e-3)
    inside = np.square(q.T @ vectors[:, :K]).sum(0)
    assert fit["inside"] == pytest.approx(inside, abs=1e-3)
    assert fit["captured"] == pytest.approx(ritz.sum() / values[:K].sum(), abs=1e-4)
    assert 0.1 < fit["captured"] < 1


def test_a_psi_of_convolutions(tiny):
    """The untrained one beside it is of the same kind."""
    run = train(tiny(num_eigenfunctions=K, epochs=1, psi="convolution"))
    functions = result(run, "--images", 3)["functions"]
    assert 0 < functions["untrained ψ"]["captured"] != functions["ψ"]["captured"] < 1


def test_indicators_of_the_clusters(run, photos):
    """Disjoint indicators are orthogonal: as many dimensions as clusters that win anywhere."""
    found = result(run, "--images", 10)["functions"]["argmax of ψ"]
    dense, _, _, psi = independent(run, crops(photos))
    clusters = psi.argmax(1)
    quotients = [
        dense[np.ix_(c, c)].sum() / c.sum() for c in (clusters == k for k in set(clusters))
    ]
    assert found["rank"] == len(set(clusters))
    assert found["rayleigh"] == pytest.approx(sorted(quotients)[::-1], abs=1e-5)


def test_continuous_outputs_are_taken_as_they_are(tiny, photos):
    run = train(tiny(num_eigenfunctions=K, epochs=1, gumbel=False))
    found = result(run, "--images", 10)
    dense, _, _, psi = independent(run, crops(photos), softmax=False)
    u = psi / np.linalg.norm(psi, axis=0)
    quotients = sorted(np.diag(u.T @ dense @ u))[::-1]
    assert found["functions"]["ψ"]["rayleigh"] == pytest.approx(quotients, abs=1e-4)
    assert not found["quantized"]


@pytest.mark.parametrize("graph_features", ["high", "all"])
def test_kappa_is_the_trainers(tiny, images, monkeypatch, graph_features):
    """The graph that a training step builds of the same images, whatever neighbours it takes."""
    from nefkern.training import step as module

    options = tiny(graph_features=graph_features, k="3%")
    trainer = Trainer(options, Run.create(options))
    graphs = []

    def keep(*args, **kwargs):
        graphs.append(kappa(*args, **kwargs))
        return graphs[-1]

    monkeypatch.setattr(module, "kappa", keep)
    trainer.step(images, 0.0, 1)
    segmenter = Segmenter(trainer.backbone, trainer.psi, trainer.options)
    found = segmenter.kappa(images, segmenter.maps(images))
    torch.testing.assert_close(found.to_dense(), graphs[0].to_dense())


@pytest.mark.parametrize("graph_features", ["high", "all"])
def test_kappa_of_a_spectral_run_is_of_its_scaled_channels(tiny, images, graph_features):
    options = tiny(method="spectral", k="8", num_eigenfunctions=4, graph_features=graph_features)
    segmenter = Segmenter.load(train_command.train(options))
    maps = segmenter.maps(images)
    near_by = maps.graph if graph_features == "high" else maps.concat
    rows = near_by.flatten(2).transpose(1, 2).flatten(0, 1)
    scale = segmenter.head.model.scale
    assert scale is not None
    seen, grid = segmenter.backbone.seen(images), tuple(maps.graph.shape[2:])
    expected = kappa(scale(rows), seen, grid, options.graph()).to_dense()
    found = segmenter.kappa(images, maps)
    torch.testing.assert_close(found.to_dense(), expected)
    unscaled = kappa(rows, seen, grid, options.graph()).to_dense()
    assert (unscaled - expected).abs().max() > 1e-3


def test_files_table_and_report(run, capsys):
    assert "Spectrum" not in write_report(Run(run)).read_text("utf-8")
    found = result(run)
    text = capsys.readouterr().out
    assert f"κ has {found['nodes']} nodes" in text
    assert f"{100 * found['functions']['ψ']['captured']:.1f} %" in text
    assert Image.open(run / "spectrum.png").size == (1430, 462)
    page = (run / "report.html").read_text("utf-8")
    assert "src='spectrum.png'" in page
    assert "captured trace" in page
    (run / "spectrum.json").write_text("{")
    assert "not readable" in write_report(Run(run)).read_text("utf-8")


def test_score_of_annotated_images(run, photos, photograph, capsys):
    for kind, image in (("images", photograph(80, 70, 1)), ("annotations", None)):
        (photos / kind / "val").mkdir(parents=True)
        for number in range(3):
            pixels = np.zeros((70, 80), np.uint8)
            pixels[:, 40:] = 1
            (image or Image.fromarray(pixels)).save(photos / kind / "val" / f"{number}.png")
    (photos / "classes.txt").write_text("left\nright\n")
    options = ("--data-root", photos, "--split", "val", "--images", 3, "--score")
    scores = result(run, *options)["scores"]
    assert len(scores) == 4
    assert next(iter(scores)) == "K-means on κ's exact eigenvectors"
    assert all(0.4 < score["accuracy"] <= 1 for score in scores.values())
    assert "every pixel with its patch's cluster" in capsys.readouterr().out
    found = result(run, *options, "--ignore-class", "left")
    assert found["settings"]["ignored"] == ["left"]
    assert all(score["accuracy"] == 1 for score in found["scores"].values())  # one class is left


def test_the_seed_chooses_the_images(run):
    first, again, other = (result(run, "--images", 4, "--seed", s) for s in (1, 1, 2))
    assert first["eigenvalues"] == again["eigenvalues"]
    assert first["functions"] == again["functions"]
    assert first["eigenvalues"] != other["eigenvalues"]


def test_other_images_and_a_bad_one(run, photograph, tmp_path, capsys, caplog):
    folder = tmp_path / "others" / "images" / "val"
    folder.mkdir(parents=True)
    for n in range(3):
        photograph(80, 70, 50 + n).save(folder / f"{n}.png")
    (folder / "1.png").write_bytes(b"no image")
    options = ("--data-root", tmp_path / "others", "--split", "val")
    assert result(run, *options, "--images", 2)["settings"]["split"] == "val"
    assert "1.png" in caplog.text
    capsys.readouterr()
    assert main([str(run), *map(str, options), "--images", "3"]) == 2
    assert "error: --images 3: expected at most 2, the readable images" in capsys.readouterr().err


def test_other_data_by_name(run, tmp_path, capsys):
    """A run on a folder looks at Cityscapes' images, and at their annotations."""
    root = publisher.cityscapes(tmp_path / "city", [7, 9, 26])
    asked = ("--data", "cityscapes", "--data-root", root, "--split", "train", "--images", 2)
    found = result(run, *asked, "--score")
    assert found["settings"]["data_root"] == str(root)
    assert found["nodes"] == 2 * 4 * 4
    assert "scores" in found
    assert main([str(run), "--data", "cityscapes"]) == 2
    assert "data 'cityscapes': expected a data root" in capsys.readouterr().err


def test_the_run_s_kind_of_data_at_another_place(run, tmp_path):
    config = run / "config.yaml"
    config.write_text(
        config.read_text("utf-8").replace("data: folder", "data: cityscapes"), "utf-8"
    )
    root = publisher.cityscapes(tmp_path / "city", [7, 9, 26])
    assert result(run, "--data-root", root, "--images", 2)["settings"]["split"] == "train"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "0"], "--images 0: expected at least 1"),
        (["--images", "11"], "--images 11: expected at most 10"),
        (["--seed", "-1"], "argument --seed: expected a number from 0"),
        (["--seed", "1e99"], "argument --seed: expected a number from 0"),
        (["--split", "test"], "no split 'test'"),
        (["--score"], "--score: expected annotated images"),
        (["--ignore-class", "sky"], "--ignore-class sky: expected --score beside it"),
        (["--data-root", "nowhere"], "nowhere"),
        (["--device", "cuda:77"], "--device cuda:77: not usable"),
        (["--images", "many"], "argument --images: invalid int value"),
    ],
)
def test_mistaken_options_are_one_line(run, capsys, options, message):
    assert main([str(run), *options]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (run / "spectrum.json").exists()


def test_no_run_there(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing: not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "rows"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_rows_shown(count, rows):
    assert shown_rows(count) == rows


def test_help_teaches_and_is_light():
    text = parser().format_help()
    assert "what to expect:" in text
    assert "captured trace" in text
    code = "import nefkern.spectrum as s, sys; s.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
