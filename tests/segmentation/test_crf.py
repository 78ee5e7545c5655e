import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from nefkern.runtime.errors import UserError
from nefkern.segmentation.crf import as_arrays, crf
from nefkern.segmentation.mean_field import CRFParameters, mean_field, require_pydensecrf


@pytest.fixture(scope="module")
def photograph():
    """A real photograph, 3 x 128 x 128 (scikit-image's astronaut, every fourth pixel)."""
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(data.astronaut()[::4, ::4].copy()).permute(2, 0, 1)


def blurred_halves(height, width, blocks=16):
    """Two labels, the border between them in a coarse grid of probabilities."""
    coarse = torch.linspace(0.05, 0.95, width // blocks).expand(height // blocks, -1)
    first = coarse.repeat_interleave(blocks, 0).repeat_interleave(blocks, 1)
    return torch.stack([first, 1 - first])


def test_segments_snap_to_an_edge():
    """Red and blue meet at column 40; the coarse probabilities put the border at column 32."""
    pytest.importorskip("pydensecrf")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[0, :, :40], image[2, :, 40:] = 255, 255
    probabilities = blurred_halves(64, 64)
    before = probabilities.argmax(0)
    assert (before[:, :32] == 1).all()
    assert (before[:, 32:] == 0).all()
    after = crf(image, probabilities).argmax(0)
    assert (after[:, :40] == 1).all()
    assert (after[:, 40:] == 0).all()


def test_real_photograph_against_pydensecrf_itself(photograph):
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    utils = pytest.importorskip("pydensecrf.utils")
    grey = photograph.float().mean(0) / 255
    probabilities = torch.stack([grey, (1 - grey) * 0.6, (1 - grey) * 0.4])
    field = densecrf.DenseCRF2D(128, 128, 3)
    field.setUnaryEnergy(utils.unary_from_softmax(probabilities.numpy()))
    field.addPairwiseGaussian(sxy=1, compat=3)
    pixels = np.ascontiguousarray(photograph.permute(1, 2, 0).numpy())
    field.addPairwiseBilateral(sxy=67, srgb=3, rgbim=pixels, compat=4)
    expected = torch.from_numpy(np.array(field.inference(10))).view(3, 128, 128)
    assert_close(crf(photograph, probabilities, all_labels=True), expected)


def test_real_photograph_is_smoother_and_still_a_distribution(photograph):
    pytest.importorskip("pydensecrf")
    grey = photograph.float().mean(0) / 255
    noise = torch.rand(128, 128, generator=torch.Generator().manual_seed(0)) - 0.5
    bright = (grey + noise).clamp(0.01, 0.99)
    probabilities = torch.stack([bright, 1 - bright])
    refined = crf(photograph, probabilities)

    def borders(index):
        return (index[:, 1:] != index[:, :-1]).sum() + (index[1:] != index[:-1]).sum()

    assert borders(refined.argmax(0)) < 0.5 * borders(probabilities.argmax(0))
    assert_close(refined.sum(0), torch.ones(128, 128))


def test_labels_that_win_nowhere_are_left_out(photograph):
    """Dropping them changes nearly nothing, and their probability is exactly 0."""
    pytest.importorskip("pydensecrf")
    grey = photograph.float().mean(0) / 255
    two = torch.stack([grey, 1 - grey])
    probabilities = torch.cat([two * 0.97, torch.full((3, 128, 128), 0.01)])
    few = crf(photograph, probabilities)
    every = crf(photograph, probabilities, all_labels=True)
    assert (few[2:] == 0).all()
    assert (few.argmax(0) == every.argmax(0)).float().mean() > 0.99


def test_arrays_that_cannot_be_written_to(photograph):
    pytest.importorskip("pydensecrf")
    image, probabilities = as_arrays(photograph, torch.full((2, 128, 128), 0.5))
    expected = mean_field(image, probabilities, CRFParameters())
    for array in (image, probabilities):
        array.flags.writeable = False
    np.testing.assert_array_equal(mean_field(image, probabilities, CRFParameters()), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3)])
def test_tiny_images(size):
    pytest.importorskip("pydensecrf")
    image = torch.zeros(3, *size, dtype=torch.uint8)
    probabilities = torch.rand(3, *size, generator=torch.Generator().manual_seed(1)).softmax(0)
    assert_close(crf(image, probabilities).sum(0), torch.ones(size))


def test_one_label_needs_no_inference():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert_close(crf(image, torch.ones(1, 4, 4)), torch.ones(1, 4, 4))


def test_deterministic_and_inputs_untouched(photograph):
    pytest.importorskip("pydensecrf")
    grey = photograph.float().mean(0) / 255
    probabilities = torch.stack([grey, 1 - grey])
    image_before, probabilities_before = photograph.clone(), probabilities.clone()
    first = crf(photograph, probabilities, CRFParameters(iterations=3))
    assert torch.equal(first, crf(photograph, probabilities, CRFParameters(iterations=3)))
    assert torch.equal(photograph, image_before)
    assert torch.equal(probabilities, probabilities_before)


@pytest.mark.parametrize(
    ("image", "probabilities", "message"),
    [
        (torch.zeros(3, 4, 4), torch.ones(2, 4, 4), "image must be uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), torch.ones(2, 4, 4), "image must be uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(2, 4, 5), r"\[K, 4, 4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(2, 4, 4).long(), "floating point"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((2, 4, 4), torch.nan), "NaN"),
    ],
)
def test_wrong_input_is_named(image, probabilities, message):
    with pytest.raises(ValueError, match=message):
        crf(image, probabilities)


def test_absent_package_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(UserError, match="pip install pydensecrf2") as error:
        require_pydensecrf()
    assert "\n" not in str(error.value)
