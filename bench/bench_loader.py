"""Input for training: JPEGs decoded and augmented in one process, alone and beside a step.

A step that takes t seconds for a batch of 16 does not wait for its input while the processes that
load (``--workers``) bring 16 / t images a second between them. The second case lets two processes
load beside steps that leave the processor alone, as those of a GPU do, and take as long as
docs/gpu.md expects of the paper's card with ``--amp``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bench.harness import Work
from nefkern.data import ImageDataset, TrainTransform
from nefkern.data.constants import FLIP, RESIZE_RATIO
from nefkern.data.loader import train_loader

WIDTH, HEIGHT = 500, 375  # as Pascal Context's
SECONDS_AN_IMAGE = 0.095 / 16  # of a training step on an RTX 3090
STEPS = 12
PROCESSES = 2
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


class Torchvision(Dataset):
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

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, step: int) -> torch.Tensor:
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

    tensors, images = (Torchvision(paths, resize, crop, tensors=t) for t in (True, False))
    contestants = {
        "nefkern": ours,
        "torchvision, tensors": lambda: tensors[0],
        "torchvision, PIL": lambda: images[0],
    }
    for contestant in contestants.values():
        batch = contestant()
        assert (batch.shape, batch.dtype) == ((count, 3, crop, crop), torch.uint8)
    race(
        "input: decode and augment",
        contestants,
        sizes={"images": count, "width": WIDTH, "height": HEIGHT, "crop": crop},
        clock="wall",
    )


def ours_in_processes(paths: list[Path], resize: int, crop: int) -> Iterator[torch.Tensor]:
    loader = train_loader(
        ImageDataset(paths), TrainTransform(resize, crop), batch_size=len(paths), workers=PROCESSES
    )
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def torchvision_in_processes(paths: list[Path], resize: int, crop: int) -> Iterator[torch.Tensor]:
    batches = Torchvision(paths, resize, crop, tensors=True)
    return iter(DataLoader(batches, batch_size=None, num_workers=PROCESSES))


def test_input_beside_a_step(race, size, tmp_path):
    count, resize, crop = BATCHES[size]
    paths = write_photographs(tmp_path, count)
    seconds = count * SECONDS_AN_IMAGE

    def steps(batches: Iterator[torch.Tensor]) -> None:
        for images in itertools.islice(batches, STEPS):
            assert images.shape == (count, 3, crop, crop)
            time.sleep(seconds)

    ours, others = (
        make(paths, resize, crop) for make in (ours_in_processes, torchvision_in_processes)
    )
    race(
        f"input beside {STEPS} steps of a GPU",
        {"nefkern": lambda: steps(ours), "torchvision, tensors": lambda: steps(others)},
        sizes={"images": STEPS * count, "width": WIDTH, "height": HEIGHT, "crop": crop},
        work=Work(seconds=STEPS * seconds),
        clock="wall",
    )
