"""Exported files, run by onnxruntime."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from nefkern import export
from nefkern.data import read_image
from nefkern.naming.names import Names, fingerprint, write_names
from nefkern.segmentation.pictures import palette
from nefkern.segmentation.segmenter import Segmenter
from tests.exporting.conftest import SIZES

pytest.importorskip("onnxscript", reason="needs nefkern[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs nefkern[export]")


def shares(text: str) -> list[list[float]]:
    """The percentages in every line."""
    return [
        [float(share) for share in re.findall(r"([\d.]+)%", line)] for line in text.splitlines()
    ]


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture
def fails(capsys):
    """fails(arguments): the one line that the command ends with."""

    def run(*arguments) -> str:
        assert export.main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


NAMES = Names(6, {0: "sky", 1: "road", 2: "sky", 5: "road"}, {"road": None, "sky": "#0080ff"})


QUANTISED = pytest.param("quantised", marks=pytest.mark.long)


@pytest.fixture(scope="module", params=[QUANTISED, "native"])
def exported(request, run_of, tmp_path_factory):
    """A run of either method and its file, with names inside. The spectral run's backbone sees
    images resized once more."""
    run, folder = run_of(request.param), tmp_path_factory.mktemp("exported")
    write_names(folder / "names.yaml", NAMES)
    arguments = ["--out", str(folder / "x.onnx"), "--names", str(folder / "names.yaml")]
    if request.param == "native" and torch.__version__ < (2, 11):
        pytest.skip("this PyTorch exports a backbone that resizes for one size only")
    assert export.main([str(run), *arguments]) == 0
    return Segmenter.load(run, "cpu"), session(folder / "x.onnx")


def test_the_same_clusters_at_every_size(exported, pictures):
    segmenter, found = exported
    for name in SIZES:
        pixels = read_image(pictures / name)
        # A batch: the image, and its mirror image.
        batch = torch.stack([pixels, pixels.flip(-1)])
        clusters = found.run(["clusters"], {"image": batch.numpy()})[0]
        assert clusters.shape == (2, *pixels.shape[1:])
        expected = torch.stack([segmenter(image) for image in batch])
        assert (torch.from_numpy(clusters) == expected).float().mean() >= 0.999
        assert len(expected.unique()) > 1, "nothing to compare"


def test_names_and_colours_are_inside(exported, pictures, tmp_path):
    facts = exported[1].get_modelmeta().custom_metadata_map
    classes = json.loads(facts["nefkern.classes"])
    assert [c["name"] for c in classes] == ["road", "sky"]
    assert classes[1]["colour"] == "#0080ff"
    assert json.loads(facts["nefkern.class_of"]) == [1, 0, 1, 255, 255, 0]
    colours = json.loads(facts["nefkern.colours"])
    assert [tuple(bytes.fromhex(c[1:])) for c in colours] == [tuple(c) for c in palette(6).tolist()]
    image = read_image(pictures / "wide.png").numpy()[None]
    outputs = exported[1].run(["clusters", "classes"], {"image": image})
    assert (NAMES.class_of()[outputs[0]] == outputs[1]).all()
    assert not any(str(tmp_path.parent) in value for value in facts.values())


def test_names_of_another_run_are_refused(run_of, tmp_path, fails):
    names = tmp_path / "names.yaml"
    write_names(names, Names(7, {0: "sky"}))
    line = fails(run_of("spectral"), "--out", tmp_path / "x.onnx", "--names", names)
    assert "names those of a run of 7, this run has 6" in line
    write_names(names, Names(6, {0: "sky"}, {}, fingerprint(run_of("quantised"))))
    line = fails(run_of("spectral"), "--out", tmp_path / "x.onnx", "--names", names)
    assert "names the clusters of another training" in line
    assert not (tmp_path / "x.onnx").exists()


def test_of_one_size(run_of, pictures, tmp_path, capsys):
    run, path = run_of("quantised"), tmp_path / "run.onnx"
    image = pictures / "wide.png"
    arguments = ["--size", "70", "120", "--check", str(image)]
    assert export.main([str(run), "--out", str(path), *arguments]) == 0
    assert shares(capsys.readouterr().out)[0][0] >= 99.9
    found = session(path)
    assert found.get_inputs()[0].shape == ["batch", 3, 70, 120]
    other = read_image(pictures / "tall.jpg").numpy()[None]
    with pytest.raises(Exception, match="invalid dimensions"):
        found.run(["clusters"], {"image": other})
    assert export.main([str(run), "--out", str(path), *arguments, str(pictures / "tall.jpg")]) == 2
    told = "tall.jpg: 130 pixels high and 80 wide, expected 70 and 120, as --size has them"
    assert told in capsys.readouterr().err


@pytest.mark.long
def test_a_run_in_bfloat16_is_compared_in_float32_too(run_of, pictures, tmp_path, capsys):
    """What the file computes is the run in float32; in bfloat16 that differs."""
    run = tmp_path / "run"
    shutil.copytree(run_of("spectral"), run)
    config = run / "config.yaml"
    assert "amp: false" in config.read_text("utf-8")
    config.write_text(config.read_text("utf-8").replace("amp: false", "amp: true"), "utf-8")
    images = [str(pictures / name) for name in SIZES]
    assert export.main([str(run), "--check", *images]) == 0
    out = capsys.readouterr().out
    half, exact = zip(*shares(out), strict=True)
    assert all("that of the run in float32" in line for line in out.splitlines())
    assert min(exact) >= 99.9
    assert min(half) < 100, "bfloat16 rounds otherwise, or it was not used"


@pytest.mark.long
def test_a_convolutional_backbone(pictures, tmp_path, capsys):
    from nefkern import train

    where = ["--data-root", str(pictures), "--out", str(tmp_path / "run")]
    options = ["--data", "folder", "--backbone", "resnet10t", "--weights", "random", "--crop", "64"]
    options += ["--method", "spectral", "--k", "6", "-K", "6", "--workers", "0", "--pictures", "0"]
    assert train.main([*options, *where]) == 0
    capsys.readouterr()
    images = [str(pictures / name) for name in SIZES]
    assert export.main([str(tmp_path / "run"), "--check", *images]) == 0
    found = shares(capsys.readouterr().out)
    assert len(found) == len(SIZES)
    assert min(share for (share,) in found) >= 99.9


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(31, 53), (90, 57), (64, 48), (7, 200)])
def test_resizing_is_torchvisions(interpolation, size):
    """Of bytes: to the last bit where PyTorch has its kernel for them, else to rounding."""
    import onnx
    from onnx import TensorProto, helper

    from nefkern.exporting import graph

    text = "sides = Identity (before) exact = Cast <to = 11> (image)"
    text += graph._resized("exact", "result", "sides", "after", interpolation)
    inputs = "uint8[B, 3, H, W] image, double[2] before, double[2] after"
    kept = {"image", "before", "after", "result"}
    nodes = graph.nodes(text, inputs, "double[B, 3, h, w] result", kept)
    value = helper.make_tensor_value_info
    before = value("before", TensorProto.DOUBLE, [2]), value("after", TensorProto.DOUBLE, [2])
    image = value("image", TensorProto.UINT8, [1, 3, "H", "W"])
    result = value("result", TensorProto.DOUBLE, [1, 3, "h", "w"])
    made = helper.make_graph(nodes, "resize", [image, *before], [result])
    opsets = [helper.make_opsetid("", graph.OPSET)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=graph.IR_VERSION)
    onnx.checker.check_model(model)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (1, 3, 64, 48), generator=generator, dtype=torch.uint8)
    found = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(
        None,
        {
            "image": pixels.numpy(),
            "before": np.array([64.0, 48.0]),
            "after": np.array(size, dtype=np.float64),
        },
    )[0]
    expected = resize(pixels, list(size), InterpolationMode(interpolation), antialias=True)
    difference = (torch.from_numpy(found) - expected).abs()
    exact = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert difference.max() <= (0 if exact else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0", "7"], "--size 0 7: expected at least 1 pixel"),
        (["--out", "{tmp}"], "--out {tmp}: is a folder; expected a file to write"),
        (["--out", "{tmp}/no/x.onnx"], "--out {tmp}/no/x.onnx: there is no folder {tmp}/no"),
        (["--names", "{tmp}/none.yaml"], "{tmp}/none.yaml: no such file"),
        (["--out", "{tmp}/x.onnx", "--check", "{tmp}/none.png"], "none.png"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(arguments, message, run_of, tmp_path, fails):
    filled = [a.format(tmp=tmp_path) for a in arguments]
    line = fails(run_of("quantised"), *filled)
    assert line.startswith("error: ")
    assert message.format(tmp=tmp_path) in line


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_the_packages(package, run_of, tmp_path, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    line = fails(run_of("quantised"), "--out", tmp_path / "x.onnx")
    assert "pip install onnx onnxscript" in line


def test_help_is_light():
    import subprocess

    code = "import nefkern.export as e, sys; e.parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
