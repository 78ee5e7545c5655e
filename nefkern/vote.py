"""``python -m nefkern.vote``: how many annotated pictures the names of clusters need."""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nefkern.backends import check_environment
from nefkern.runtime.commandline import (
    add_device,
    add_run,
    add_seed,
    check_file,
    command_parser,
    log_to_stderr,
)
from nefkern.runtime.errors import UserError, command

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nefkern.data import ImageDataset
    from nefkern.segmentation.image_counts import ImageCounts
    from nefkern.segmentation.segmenter import Segmenter

log = logging.getLogger(__name__)

#: More are a slip of the keyboard.
MAX_DRAWS = 100_000

DESCRIPTION = """\
Measure how good names are that a few annotated pictures vote, as they do for python -m
nefkern.atlas --annotated: draw so many pictures of one split at random, again and again, let them
name the run's clusters, and score every image of another split under these names. Beside that the
names that all pictures vote, and matching on the very images that are scored, which flatters.
"""
EXAMPLES = """\
examples:
  python -m nefkern.vote runs/voc                             the run's own data set
  python -m nefkern.vote runs/voc --data-root voc --pictures 1,3,30 --draws 50
  python -m nefkern.vote runs/voc --json vote.json            every draw's scores

the folder: images/{train,val}/*.jpg, annotations/{train,val}/<same name>.png (class indices,
255 = void), classes.txt (one name a line)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("vote", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add_run(result)
    add("--data-root", type=Path, metavar="DIR", help="annotated images [the run's data set]")
    add("--from-split", default="train", metavar="SPLIT", help="pictures that vote [train]")
    add("--split", default="val", help="images to score on [val]")
    add("--pictures", default="1,2,5,10", metavar="A,B,...", help="how many vote [1,2,5,10]")
    add("--draws", type=int, default=20, metavar="N", help="random choices of each number [20]")
    add("--json", type=Path, metavar="FILE", help="write the scores of every draw there too")
    add_seed(result, "the choices")
    add_device(result)
    return result


def check(arguments: argparse.Namespace) -> list[int]:
    """The numbers of pictures; a UserError that names the first option that cannot be used."""
    if not 1 <= arguments.draws <= MAX_DRAWS:
        raise UserError(f"--draws {arguments.draws}: expected 1 to {MAX_DRAWS}")
    if arguments.json is not None:
        check_file("--json", arguments.json)
    texts = arguments.pictures.split(",")
    if not all(re.fullmatch("[1-9][0-9]{0,8}", text.strip()) for text in texts):
        raise UserError(f"--pictures: expected numbers such as 1,2,5,10; got {arguments.pictures}")
    return sorted({int(text) for text in texts})


# ---- build ----


def open_annotated(root: Path, split: str) -> ImageDataset:
    """The annotated images of a split."""
    from nefkern.data.folder import open_folder

    dataset = open_folder(root, split=split)
    if not dataset.annotated:
        raise UserError(
            f"--data-root {root}: expected annotations/{split}/ with a mask for each image"
        )
    return dataset


def root_of(arguments: argparse.Namespace, segmenter: Segmenter) -> Path:
    """``--data-root``, or the run's folder."""
    options = segmenter.options
    if arguments.data_root is None and options.data != "folder":
        raise UserError(
            "--data-root: expected the folder with the annotated images; the run was trained on "
            f"{options.data}"
        )
    return arguments.data_root or Path(options.data_root)


# ---- run ----


def counted(segmenter: Segmenter, dataset: ImageDataset, title: str) -> ImageCounts:
    """How clusters and classes meet, picture by picture, at the pictures' own resolution."""
    from nefkern.runtime.progress import image_bar
    from nefkern.segmentation.image_counts import ImageCounts
    from nefkern.segmentation.metrics import count_matrix

    found = ImageCounts(segmenter.num_clusters, len(dataset.classes))
    with image_bar(len(dataset), title) as bar:
        for sample in dataset:
            segmenter.check_size(sample.image, sample.name)
            labels = sample.annotation.long()
            found.add(count_matrix(segmenter(sample.image), labels, *_shape(found)))
            bar.update()
    return found


def _shape(counts: ImageCounts) -> tuple[int, int]:
    return counts.num_clusters, counts.num_classes


def drawn(counts: ImageCounts, pictures: int, draws: int, seed: int) -> list[Tensor]:
    """Random choices of so many pictures with an annotated pixel: bool ``[I]`` each."""
    import torch

    usable = (counts.annotated() > 0).nonzero().flatten()
    if pictures > len(usable):
        raise UserError(f"--pictures {pictures}: expected at most {len(usable)}, all there are")
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        own = usable[torch.randperm(len(usable), generator=generator)[:pictures]]
        found.append(torch.zeros(len(counts), dtype=torch.bool).index_fill_(0, own, True))
    return found


def scored(counts: ImageCounts, classes: Tensor) -> dict[str, float]:
    """Accuracy and mean IoU of all images under the clusters' classes; what has none is wrong."""
    import torch

    from nefkern.evaluation.resampling import SCORES, figures, part

    ones = torch.ones(1, len(counts), dtype=torch.float64)
    values = figures([part(counts, classes)], ones)[:, 0].tolist()
    named = int((classes >= 0).sum())
    return {**dict(zip(SCORES, values, strict=True)), "named": named}


def measure(
    pictures: ImageCounts,
    images: ImageCounts,
    similarity: np.ndarray,
    numbers: list[int],
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A row for every number of pictures, all of them, and matching on the images themselves.

    Args:
        pictures: counts of those that vote.
        images: counts of those that are scored.
        similarity: of the clusters, see :func:`nefkern.naming.voting.vote`.
    """  # fmt: skip
    from nefkern.naming.voting import vote
    from nefkern.segmentation.matching import majority_vote

    rows = [
        {
            "pictures": number,
            "draws": [
                scored(images, vote(pictures.total(chosen), similarity))
                for chosen in drawn(pictures, number, draws, seed)
            ],
        }
        for number in numbers
    ]
    every = scored(images, vote(pictures.total(), similarity))
    rows.append({"pictures": f"all {len(pictures)}", "draws": [every]})
    for by in ("count", "iou"):
        own = scored(images, majority_vote(images.total(), by))
        rows.append({"pictures": f"none: matched on the scored images, by {by}", "draws": [own]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in percent: mean ± standard deviation over draws, and the extremes of mIoU."""
    from nefkern.summarize import spread

    lines = ["| annotated pictures | accuracy | mIoU | least to most | clusters named |"]
    lines.append("|---" * 5 + "|")
    for row in rows:
        draws = row["draws"]
        accuracy, mean_iou = ([100 * d[s] for d in draws] for s in ("accuracy", "mean_iou"))
        between = f"{min(mean_iou):.1f} to {max(mean_iou):.1f}" if len(draws) > 1 else ""
        named = statistics.fmean(d["named"] for d in draws)
        cells = [str(row["pictures"]), spread(accuracy), spread(mean_iou), between, f"{named:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(arguments: argparse.Namespace, numbers: list[int]) -> list[dict[str, Any]]:
    """Segment both splits, and measure."""
    from nefkern.naming.survey import survey
    from nefkern.runtime.progress import image_bar
    from nefkern.segmentation.segmenter import Segmenter

    segmenter = Segmenter.load(arguments.run, arguments.device)
    segmenter.require_clusters()
    root = root_of(arguments, segmenter)
    voting = open_annotated(root, arguments.from_split)
    dataset = open_annotated(root, arguments.split)
    if max(numbers) > len(voting):
        raise UserError(f"--pictures {max(numbers)}: expected at most {len(voting)}, all there are")
    with image_bar(len(voting), "likeness of clusters") as bar:

        def told():
            for index in range(len(voting)):
                yield index
                bar.update()

        similarity = survey(segmenter, voting, told(), len(voting)).similarity
    pictures = counted(segmenter, voting, "pictures that vote")
    images = counted(segmenter, dataset, "images to score")
    return measure(pictures, images, similarity, numbers, arguments.draws, arguments.seed)


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    from nefkern.runtime.files import replace_file

    parsed = parser().parse_args(arguments)
    numbers = check(parsed)
    log_to_stderr()
    check_environment()
    rows = run(parsed, numbers)
    print(table(rows))
    if parsed.json:
        replace_file(parsed.json, json.dumps(rows, indent=1))
        log.info("written: %s", parsed.json)


if __name__ == "__main__":
    sys.exit(main())
