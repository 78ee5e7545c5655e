"""``python -m nefkern.train``: eigenfunctions of a folder of images, or of the samples."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nefkern.runtime.commandline import command_parser, log_to_stderr
from nefkern.runtime.errors import command
from nefkern.training.option_parsing import add_arguments, resolve
from nefkern.training.options import TrainOptions

if TYPE_CHECKING:
    from nefkern.data import ImageDataset
    from nefkern.segmentation.segmenter import Segmenter
    from nefkern.training.runs import Run

DESCRIPTION = """\
Segments of your images without labels, from the leading eigenfunctions of the graph of their
patches. With no option at all: a short run on photographs that come inside installed packages.

For your own pictures the eigenfunctions are computed (--method spectral): one graph over the
patches of all images, its exact leading eigenvectors, K-means on them, and their extension to any
other image by Nyström's formula. For the paper's data sets, or with any option of ψ, they are
learnt by a small network, batch by batch (--method neural); their argmax is the segmentation. The
folder that a run leaves serves every other command, whatever the method.

Between the two: --teacher spectral computes those eigenvectors first (RUN/teacher) and lets ψ learn
them by regression, on augmented views too; --edges dataset trains by the paper's objective, on
batches of images that the data set's graph joins, with its edges instead of the batch's own.
"""
EXAMPLES = """\
examples:
  python -m nefkern.train                                      a few minutes, no GPU needed
  python -m nefkern.train --data folder --data-root photos     your images, photos/images/train/*
  python -m nefkern.train --data folder --data-root voc --backbone vit_small_patch14_dinov2 \\
      --crop 280 -K 128 --amp --out runs/voc
  python -m nefkern.train --data cityscapes --data-root DIR    one of the paper's data sets
  python -m nefkern.train --method neural --data folder --data-root voc --k 2% --epochs 20 ...
  python -m nefkern.train --teacher spectral --no-gumbel --data folder --data-root voc \\
      --backbone vit_small_patch14_dinov2 --crop 280 -K 128 --views 2 --epochs 12 --amp
  torchrun --standalone --nproc_per_node=2 -m nefkern.train --data folder --data-root voc ...
  python -m nefkern.train --config runs/voc/config.yaml --seed 1 --out runs/voc-1
  python -m nefkern.train --out runs/voc --config runs/voc/config.yaml --resume
  python -m nefkern.train --out runs/voc --config runs/voc/config.yaml --resume --epochs 40
                                                               a finished run, trained longer

afterwards: open report.html in the run folder;
  python -m nefkern.segment RUN IMAGE... --out DIR
  python -m nefkern.evaluate RUN --data folder --data-root DIR --split val
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("train", DESCRIPTION, EXAMPLES)
    result.add_argument("--config", type=Path, metavar="FILE", help="YAML of options; flags win")
    add_arguments(result)
    return result


def train(options: TrainOptions, *, longer: bool = False) -> Path:
    """Train or compute, draw the overlays and the report; returns the run folder.

    Args:
        options: all of them; checked.
        longer: a run to resume may be of fewer epochs, and is then trained on.

    Raises:
        UserError: an option, an image or a weights file that cannot be used.
    """
    from nefkern.backends import check_environment
    from nefkern.runtime import distributed
    from nefkern.segmentation.segmenter import Segmenter
    from nefkern.training.runs import Run
    from nefkern.training.spectral import SpectralTrainer
    from nefkern.training.trainer import Trainer

    check_environment()
    with distributed.process_group(options.device):
        if not distributed.is_main():
            logging.getLogger().setLevel(logging.WARNING)
        run = distributed.from_main(lambda: Run.create(options, longer=longer))
        trainer = (SpectralTrainer if options.method == "spectral" else Trainer)(options, run)
        if trainer.finished:
            logging.info("%s: training is complete", run.folder)
        result = trainer.train()
    if distributed.is_main():
        trained = trainer.psi if isinstance(trainer, Trainer) else result
        seen = run.feature_cache(options)
        _finish(run, Segmenter(trainer.backbone, trained, options, seen=seen), trainer.dataset)
    return run.folder


def _finish(run: Run, segmenter: Segmenter, dataset: ImageDataset) -> None:
    """Clusters of a continuous ψ, overlays, report."""
    from nefkern.baselines.fitting import fit_clusters
    from nefkern.evaluation.report import write_eigenfunctions, write_overlays, write_report
    from nefkern.segmentation.segmenter import clusters_of

    if segmenter.kind == "continuous":
        segmenter.clusterer = clusters_of(run, segmenter.options, segmenter.device)
        if segmenter.clusterer is None:
            logging.info("K-means on the continuous eigenfunctions")
            segmenter.clusterer = fit_clusters(segmenter, dataset)
            run.save_clusters(segmenter.clusterer.state())
    write_overlays(run, segmenter, dataset, segmenter.options.pictures)
    write_eigenfunctions(run, segmenter, dataset)
    logging.info("report: %s", write_report(run))


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    flags = vars(parser().parse_args(arguments))
    config = flags.pop("config")
    log_to_stderr()
    # Only if asked for by the flag: one forgotten would train a short run to the default's 40.
    train(resolve(flags, config), longer="epochs" in flags)


if __name__ == "__main__":
    sys.exit(main())
