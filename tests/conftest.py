"""What the tests of the pipeline share: photographs on disk, options of a run of seconds."""

from __future__ import annotations

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; read when torch is imported
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():  # before anything imports a kernel: that is when it is read
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nefkern.training.options import TrainOptions
from tests.backend_counts import (  # noqa: F401  hooks
    pytest_runtest_makereport,
    pytest_terminal_summary,
)

#: Folders of tests that need nothing of the pipeline.
OF_KERNELS = ("ops", "triton", "cuda", "emulator")
BLANK = '<svg xmlns="http://www.w3.org/2000/svg"/>'


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="the long proofs too, as make test-all does (with -m long, them alone)",
    )


@pytest.hookimpl(trylast=True)  # when all are marked
def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def _photograph(width: int, height: int, seed: int) -> Image.Image:
    """Discs of colour on a gradient, with a little noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x / width, y / height, (x + y) / (width + height)], -1) * 160
    for _ in range(4):
        centre, radius = random.uniform(0, [width, height]), random.uniform(8, 25)
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        pixels[inside] = random.uniform(0, 255, 3)
    pixels += random.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def one_thread_for_small_models(request):
    """The pipeline's models are so small here that threads cost more than they give, above all on
    a busy machine. The tests of operators and kernels keep them."""
    threads = torch.get_num_threads()
    if request.path.parent.name not in OF_KERNELS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def blank_charts(request, monkeypatch):
    """Charts are made and not drawn, but for the tests that look at them (``drawn``): most of the
    time of a command on a few small images would be matplotlib's. Fixtures of wider scope draw
    theirs."""
    if request.path.parent.name in OF_KERNELS or request.node.get_closest_marker("drawn"):
        return
    from nefkern.evaluation import report
    from nefkern.segmentation import charts

    for user in (charts, report):
        monkeypatch.setattr(user, "svg", lambda figure: BLANK)


@pytest.fixture(scope="session")
def photograph() -> Callable[[int, int, int], Image.Image]:
    """photograph(width, height, seed): a small colour picture."""
    return _photograph


@pytest.fixture
def unicode_names():
    """A locale in which file names can be of all letters."""
    if sys.getfilesystemencoding() != "utf-8":
        pytest.skip(f"file names are {sys.getfilesystemencoding()} here")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photographs in images/train, of different sizes."""
    folder = tmp_path / "photos" / "images" / "train"
    folder.mkdir(parents=True)
    for number in range(10):
        _photograph(70 + 3 * number, 90 - 2 * number, number).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def tiny(photos: Path, tmp_path: Path) -> Callable[..., TrainOptions]:
    """tiny(**changes): options of a run of 3 epochs of 5 steps, with a small random backbone."""

    def make(**changes) -> TrainOptions:
        options = TrainOptions(
            data="folder", data_root=str(photos), out=str(tmp_path / "run"),
            backbone="test_vit", weights="random", crop=64, k="16", num_eigenfunctions=8,
            heads=3, mlp_hidden=96, epochs=3, batch_size=2, workers=0, pictures=2,
            checkpoint_seconds=1000.0,
        )  # fmt: skip
        for name, value in changes.items():
            assert hasattr(options, name), name
            setattr(options, name, value)
        options.check()
        return options

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """Two photographs, uint8 [2, 3, 70, 100]: neither side a multiple of a patch of 16."""
    pictures = [np.array(_photograph(100, 70, seed)) for seed in (1, 2)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


@pytest.fixture
def annotated(photos: Path) -> Path:
    """The photographs with annotations of two classes."""
    for split in ("train", "val"):
        (photos / "annotations" / split).mkdir(parents=True)
        (photos / "images" / split).mkdir(exist_ok=True)
    for path in (photos / "images" / "train").iterdir():
        image = Image.open(path)
        image.save(photos / "images" / "val" / path.name)
        labels = Image.fromarray((np.array(image)[..., 0] > 100).astype(np.uint8))
        for split in ("train", "val"):
            labels.save(photos / "annotations" / split / path.name)
    (photos / "classes.txt").write_text("dark\nlight\n")
    return photos
