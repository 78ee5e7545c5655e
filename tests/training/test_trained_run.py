"""The trained run as a segmenter: what the trainer had, ψ of other shapes, forms of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nefkern.images.graph import kappa
from nefkern.runtime.errors import UserError
from nefkern.segmentation.segmenter import Segmenter
from nefkern.segmentation.upsample import upsample_at
from nefkern.segmentation.windows import Replay
from nefkern.training.runs import CONFIG, Run
from tests.training.outcomes import start


def test_segmenter_gives_what_the_trainer_had(tiny, images):
    options = tiny(amp=True, epochs=1)
    trainer = start(options)
    trainer.train()
    segmenter = Segmenter.load(options.out)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = trainer.backbone(images)
        hidden = trainer.psi.eval().hidden(features.concat, features.grid).float()
    logits = trainer.psi.head(hidden) / 0.3
    maps = segmenter.maps(images)
    assert maps.padded == (80, 112)
    assert maps.logits.shape == (2, 8, 5, 7)
    assert torch.equal(maps.logits.flatten(2).transpose(1, 2), logits.detach())
    assert torch.equal(maps.hidden.flatten(2).transpose(1, 2), hidden)
    assert torch.equal(maps.graph.flatten(2).transpose(1, 2), features.high)
    assert torch.equal(maps.concat.flatten(2).transpose(1, 2), features.concat)


def test_segmenter_of_resized_images_and_blocks_side_by_side(tiny, images):
    """Crops of 64 pixels seen at 80: cells of 12.8 pixels; F has two blocks."""
    options = tiny(epochs=1, input_size="80", high="block:3,block:5", views=1)
    trainer = start(options)
    trainer.train()
    assert (trainer.backbone.dim, trainer.backbone.concat_dim) == (128, 256)
    recorded = Run(options.out).config()["backbone"]
    assert recorded["high"] == "block:3,block:5"
    assert (recorded["input_size"], recorded["interpolation"]) == (80, "bicubic")
    segmenter = Segmenter.load(options.out)
    # Images of any size are seen, so that windows need not lie on a grid.
    assert (segmenter.patch, segmenter.window, segmenter.stride) == (1, 64, 43)
    features = trainer.backbone(images)
    maps = segmenter.maps(images)
    assert features.grid == maps.logits.shape[2:] == (5, 8)  # of 80 × 114, padded to 128
    assert maps.padded == (70, 128 * 100 / 114)
    # Images that training saw come from the run's cache, in half precision.
    rows = maps.graph.flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows, features.high, rtol=1e-3, atol=1e-3)
    graph = segmenter.kappa(images, maps)
    want = kappa(rows, trainer.backbone.seen(images), (5, 8), options.graph())
    assert torch.equal(graph.columns, want.columns)
    assert torch.equal(graph.values, want.values)
    own = segmenter.kappa(images, maps, per_image=True)
    assert own.num_nodes == 80
    whole = upsample_at(maps.logits[0], maps.padded, torch.arange(70), torch.arange(100))
    assert torch.equal(segmenter.logits(images[0], window=100).argmax(0), whole.argmax(0))
    assert segmenter(images[0][:, :, :70]).shape == (70, 70)
    # What draws edges hears of cells in the image's own pixels: 80 of the network's are 70.
    predict, *cut = segmenter.at_training_scale(images[0])
    job = segmenter.refinable(Replay(predict), *cut, segmenter.training_scale(images[0]), name="")
    assert job.patch == pytest.approx(16 * 70 / 80, rel=0.01)


def test_segmenter_takes_every_form_of_an_image(tiny, photos, tmp_path):
    options = tiny(epochs=1)
    start(options).train()
    segmenter = Segmenter.load(options.out)
    path = photos / "images" / "train" / "2.png"
    picture = Image.open(path)
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = segmenter(path)
    assert expected.shape == (picture.height, picture.width)
    assert expected.dtype == torch.int64
    assert 0 <= expected.min() <= expected.max() < 8
    for form in (str(path), picture, array, tensor):
        assert torch.equal(segmenter(form), expected), type(form)
    (agreement,) = [(segmenter(tensor.float() / 255) == expected).float().mean()]
    assert agreement > 0.99
    small = tmp_path / "small.png"
    Image.new("RGB", (40, 15)).save(small)
    with pytest.raises(UserError, match=f"{small}: 40 × 15 pixels, expected at least one patch"):
        segmenter(small)
    for wrong in (torch.zeros(1, 3, 20, 20), np.zeros((20, 20)), np.zeros((20, 20, 3))):
        with pytest.raises(UserError, match="image: expected"):
            segmenter(wrong)


# ---- ψ of other shapes


def test_a_run_of_an_earlier_shape_of_psi(tiny, images):
    """Heads and MLP followed the backbone, and ``config.yaml`` says it in the words of then."""
    options = tiny(epochs=1)
    start(options).train()
    expected = Segmenter.load(options.out).maps(images).logits
    path = Path(options.out) / CONFIG
    config = yaml.safe_load(path.read_text("utf-8"))
    for name in ("heads", "mlp_hidden", "psi"):
        del config["options"][name]
    config["options"]["mlp_ratio"] = 1.5  # of 64 channels; 3 heads of 64 cover three maps
    path.write_text(yaml.safe_dump(config))
    assert torch.equal(Segmenter.load(options.out).maps(images).logits, expected)
    with pytest.raises(UserError, match="--resume: this run had --heads 3, not 18"):
        start(tiny(epochs=1, resume=True, heads=18))
    with pytest.raises(UserError, match="--resume: this run had --psi transformer, not conv"):
        start(tiny(epochs=1, resume=True, psi="convolution"))
    assert start(tiny(epochs=1, resume=True)).finished
    del config["backbone"]["dim"]  # then nobody can tell
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="its checkpoint does not fit this version of nefkern"):
        Segmenter.load(options.out)


@pytest.mark.parametrize("amp", [False, True])
def test_a_psi_of_convolutions(tiny, images, amp):
    """Trains, resumes and segments; ``images`` have another grid than the training crops."""
    options = tiny(psi="convolution", epochs=1, amp=amp)
    last = start(options).train()
    assert last["trace"] > 0
    assert start(tiny(psi="convolution", epochs=1, amp=amp, resume=True)).finished
    segmenter = Segmenter.load(options.out)
    maps = segmenter.maps(images)
    assert maps.logits.shape == (2, 8, 5, 7)
    alone = torch.cat([segmenter.maps(image[None]).logits for image in images])
    torch.testing.assert_close(maps.logits, alone, rtol=1e-2 if amp else 1e-5, atol=1e-2)
    assert segmenter(images[0]).shape == (70, 100)
