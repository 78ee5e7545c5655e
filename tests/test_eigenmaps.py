"""The eigenmaps command: which functions it draws, exact eigenvectors, files, mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from nefkern.data import read_image, resize_shorter
from nefkern.eigenmaps import (
    chosen_functions,
    eigenvectors,
    main,
    parser,
    ranked_functions,
    varying_functions,
)
from nefkern.runtime.errors import UserError
from nefkern.segmentation import charts
from nefkern.segmentation.segmenter import Segmenter
from nefkern.training.runs import Run
from nefkern.training.trainer import Trainer

K = 6


@pytest.fixture
def make_run(tiny):
    """make_run(**options): the folder of a run of a second with a small random backbone."""

    def make(**changes) -> Path:
        options = tiny(num_eigenfunctions=K, epochs=1, batch_size=5, pictures=0, **changes)
        Trainer(options, Run.create(options)).train()
        return Path(options.out)

    return make


@pytest.fixture
def run(make_run) -> Path:
    return make_run()


@pytest.fixture
def picture(photograph, tmp_path) -> Path:
    """A photograph of the user's, neither side a multiple of a patch or of the crop."""
    photograph(120, 75, 3).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


@pytest.fixture
def drawn(monkeypatch):
    """The rows of every sheet: heads, values, whether signed."""
    sheets, sheet = [], charts.function_sheet
    monkeypatch.setattr(
        charts, "function_sheet", lambda *args: sheets.append(args[1]) or sheet(*args)
    )
    return sheets


def test_raw_outputs_of_any_image(run, picture, drawn, tmp_path):
    assert main([str(run), str(picture), "--count", "3", "--out", str(tmp_path / "maps")]) == 0
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["mine.eigenmaps.png"]
    ((row,),) = drawn
    segmenter = Segmenter.load(run, "cpu")
    crop = resize(read_image(picture), [64, 102], antialias=True)
    features = segmenter.backbone(crop[None])
    outputs = segmenter.psi(features.concat, features.grid)[0].detach()
    outputs = outputs.T.unflatten(1, features.grid)
    assert features.grid == (4, 7)
    numbers = [int(head.removeprefix("ψ ")) for head in row.heads]
    torch.testing.assert_close(row.values, outputs[numbers], atol=0.05, rtol=0)
    wins = outputs.flatten(1).argmax(0).bincount(minlength=K)
    assert wins[numbers].tolist() == wins.sort(descending=True).values[:3].tolist()
    assert not row.signed, "a quantised ψ's outputs are on no scale of their own"


def test_exact_eigenvectors_below(run, picture, drawn):
    assert main([str(run), str(picture), "--exact", "--functions", "4,2"]) == 0
    ((outputs, exact),) = drawn
    assert outputs.heads == ["ψ 4", "ψ 2"]
    assert exact.signed
    segmenter = Segmenter.load(run, "cpu")
    pixels = resize_shorter(read_image(picture), 64)[None]
    graph = segmenter.kappa(pixels, segmenter.maps(pixels), per_image=True)
    dense = graph.to_dense().double().numpy()
    values, vectors = np.linalg.eigh(dense)
    assert exact.heads == [f"v {j}, λ = {values[-j]:.3f}" for j in (1, 2)]
    for j in (1, 2):
        cosine = vectors[:, -j] @ exact.values[j - 1].flatten().numpy()
        assert abs(cosine) == pytest.approx(1, abs=1e-4)


def test_eigenvectors_lean_to_the_positive(run, images):
    segmenter = Segmenter.load(run, "cpu")
    values, vectors = eigenvectors(segmenter, images[0], segmenter.maps(images[:1]), 4)
    assert vectors.shape == (4, 5, 7)
    assert (vectors.pow(3).sum((1, 2)) > 0).all()
    assert values.tolist() == sorted(values.tolist(), reverse=True)


def test_continuous_functions_are_the_first_and_signed(make_run, picture, drawn):
    run = make_run(gumbel=False)
    assert main([str(run), str(picture), "--count", "2"]) == 0
    ((row,),) = drawn
    assert row.heads == ["ψ 0", "ψ 1"]
    assert row.signed


def test_images_of_the_run_and_the_report(run, drawn):
    assert main([str(run), "--first", "2"]) == 0
    names = sorted(path.name for path in (run / "eigenmaps").iterdir())
    assert names == ["0.eigenmaps.png", "1.eigenmaps.png"]
    assert [len(row.heads) for (row,) in drawn] == [5, 5]
    page = (run / "report.html").read_text("utf-8")
    assert all(f"eigenmaps/{name}" in page for name in names)
    picture = Image.open(run / "eigenmaps" / names[0])
    assert picture.width > 5 * 100


def test_a_folder_with_a_bad_image(run, photos, tmp_path, capsys):
    folder = photos / "images" / "train"
    (folder / "3.png").write_bytes(b"no image")
    assert main([str(run), str(folder), "--out", str(tmp_path / "maps")]) == 2
    assert "1 of 10 images could not be drawn" in capsys.readouterr().err
    assert len(list((tmp_path / "maps").iterdir())) == 9


def test_ranking():
    logits = torch.tensor([[0.0, 0.0, 9.0], [5.0, 5.0, 0.0], [4.0, 0.0, 0.0], [3.0, 4.0, 1.0]])
    ranked = ranked_functions(logits[:, None], 9, quantized=True)
    assert ranked == [1, 0, 3, 2], "by patches won, then by mean"
    assert ranked_functions(logits[:, None], 2, quantized=False) == [0, 1]


def test_functions_by_number():
    assert chosen_functions("3, 0", 4) == [3, 0]
    for text in ("4", "a", "", "1,,2", "-1"):
        with pytest.raises(UserError, match="expected numbers from 0 to 3"):
            chosen_functions(text, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "--count 0: expected at least 1"),
        (["--first", "0"], "--first 0: expected at least 1"),
        (["--functions", "99"], "--functions 99: expected numbers from 0 to 5, as 3,17"),
        (["--split", "test"], "no split 'test'"),
        (["a.png", "--split", "val"], "--split: is for a data set; expected no IMAGE"),
        (["--device", "cuda:77"], "--device cuda:77: not usable"),
    ],
)
def test_mistaken_options_are_one_line(run, capsys, options, message):
    assert main([str(run), *options]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_help_teaches_and_is_light():
    text = parser().format_help()
    assert "raw outputs" in text
    assert "--exact" in text
    code = "import nefkern.eigenmaps as e, sys; e.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_of_a_spectral_run_those_that_vary_within_the_image_are_shown():
    ramp = torch.linspace(-1, 1, 6).view(1, 2, 3)
    outputs = torch.cat([torch.full_like(ramp, 9), ramp, 3 * ramp, ramp])
    assert varying_functions(outputs, 3) == [2, 1, 3]
