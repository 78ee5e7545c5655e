"""Input for training: decode and augment a batch of JPEGs in one process, images a second.

A step that takes t seconds for a batch of 16 does not wait for its input while the processes that
load (``--workers``) bring 16 / t images a second between them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from nefkern.data import ImageDataset, TrainTransform
from nefkern.data.constants import FLIP, RESIZE_RATIO
from nefkern.data.loader import train_loader

WIDTH, HEIGHT = 500, 375  # as Pascal Context's
# images a batch, base of the random resize, crop
BATCHES = {"small": (4, 104, 96), "paper": (16, 520, 480), "large": (16, 1024, 768)}


def write_photographs(folder: Path, count: int) -> list[Path]:
    """JPEGs with detail at every scale, as photographs have, of about 100 kB."""
    random, paths = np.random.default_rng(0), []
    for number in range(count):
        pixels = np.zeros((HEIGHT, WIDTH, 3))
        for cells in (4, 16, 64, 256):
            coarse = random.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
            layer = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels += np.asarray(layer) / 4
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class Torchvision:
    """The same augmentation as one writes it with torchvision's transforms."""

    def __init__(self, paths: list[Path], resize: int, crop: int, *, tensors: bool) -> None:
        low, high = (round(resize * ratio) for ratio in RESIZE_RATIO)
        self.paths = paths
        self.pipeline = v2.Compose(
            [
                *([v2.PILToTensor()] if tensors else []),
                v2.RandomResize(low, high + 1, antialias=True),
                # Constant: reflection cannot widen an image to more than thrice its size.
                v2.RandomCrop(crop, pad_if_needed=True),
                v2.RandomHorizontalFlip(FLIP),
                v2.RandomPhotometricDistort(p=0.5),
                *([] if tensors else [v2.PILToTensor()]),
            ]
        )

    def __call__(self) -> torch.Tensor:
        return torch.stack([self.pipeline(Image.open(p).convert("RGB")) for p in self.paths])


def assert_right(paths: list[Path], resize: int) -> None:
    """Without what is random but the position: windows of the image as PIL scales it."""
    dataset = ImageDataset(paths)
    plain = TrainTransform(resize, resize, ratio=(1, 1), flip=0, photometric=False)
    loader = train_loader(dataset, plain, batch_size=len(paths))
    (batch,) = loader
    width = round(WIDTH * resize / HEIGHT)
    whole = torch.stack(
        [
            v2.functional.pil_to_tensor(
                Image.open(path).resize((width, resize), Image.Resampling.BILINEAR)
            )
            for path in paths
        ]
    )
    windows = whole.unfold(3, resize, 1).permute(3, 0, 1, 2, 4)  # every position along the width
    for view in batch:
        distances = (windows.float() - view).abs().mean((2, 3, 4))
        # Levels of 255. Ours begin on whole source pixels, up to half of one beside PIL's; windows
        # of another image or place are 25 and more away.
        assert distances.min() < 5


def test_input(race, size, tmp_path):
    count, resize, crop = BATCHES[size]
    paths = write_photographs(tmp_path, count)
    assert_right(paths[:2], 200)  # no smaller: JPEGs would be decoded small
    loader = train_loader(
        ImageDataset(paths), TrainTransform(resize, crop), batch_size=count, workers=0
    )
    epochs = iter(range(10**9))

    def ours() -> torch.Tensor:
        loader.set_epoch(next(epochs))
        (batch,) = loader
        return batch

    contestants = {
        "nefkern": ours,
        "torchvision, tensors": Torchvision(paths, resize, crop, tensors=True),
        "torchvision, PIL": Torchvision(paths, resize, crop, tensors=False),
    }
    for contestant in contestants.values():
        batch = contestant()
        assert (batch.shape, batch.dtype) == ((count, 3, crop, crop), torch.uint8)
    race(
        "input: decode and augment",
        contestants,
        sizes={"images": count, "width": WIDTH, "height": HEIGHT, "crop": crop},
    )
