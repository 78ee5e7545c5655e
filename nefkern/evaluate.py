"""``python -m nefkern.evaluate``: score a run against annotations, beside its baselines."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

from nefkern.backends import check_environment
from nefkern.runtime.commandline import (
    EDGES,
    add_crf_workers,
    add_device,
    add_ignore_class,
    add_run,
    add_seed,
    check_crf_workers,
    command_parser,
    log_to_stderr,
)
from nefkern.runtime.errors import UserError, command
from nefkern.segmentation.methods import ALIASES, METHODS, Method, parse_methods
from nefkern.training.presets import ANNOTATED, PRESETS

DESCRIPTION = """\
Score a trained run on annotated images. Clusters have no names: each is first matched to a class
over all images, in up to four ways: majority vote by IoU, as the paper's authors do, or by count;
and, where there are as many clusters as classes, Hungarian by count, as the authors do, or by IoU.
Pixel accuracy and mean IoU are then those of one confusion matrix. Baselines are fitted on the
training split; all methods share each pass of the backbone. A linear probe has classes of its own:
it is trained on the annotations of the training split, and nothing is matched.

Mean IoU is over the classes that occur in the annotations or in the prediction.

Matching on the images that are scored flatters, the more so the more clusters there are. So each
score is told a second time with classes matched on one half of the images and scored on the other,
with the interval in which it would lie for other images of the kind (bootstrap over images,
matchings held), between what random clusters get (floor) and what the right class of every patch
would (ceiling: the grid's; bilinear up-sampling may go a little above). A difference between two
methods is called one only if its own, paired interval excludes zero.
"""
EXAMPLES = """\
methods:
  {methods}
  {aliases}

examples:
  python -m nefkern.evaluate runs/voc                        on the data set it was trained on
  python -m nefkern.evaluate runs/voc --data folder --data-root camvid --split val
  python -m nefkern.evaluate runs/voc --data-root voc --methods ours,hidden,kmeans,untrained
  python -m nefkern.evaluate runs/voc --data-root voc --baseline kmeans --features hidden
  python -m nefkern.evaluate runs/voc --data-root voc --ignore-class background
  python -m nefkern.evaluate runs/voc --data-root voc --protocol sliding --crf
  python -m nefkern.evaluate runs/voc --data-root voc --protocol sliding --resize none
  python -m nefkern.evaluate runs/voc --data-root voc --crf classes --crf-workers 4
  python -m nefkern.evaluate runs/voc --data-root voc --edges graph,crf --boundary
  python -m nefkern.evaluate runs/imagenet --data cityscapes --data-root DIR
  python -m nefkern.evaluate runs/voc --data-root voc --methods ours,linear-probe --flip
  python -m nefkern.evaluate runs/spectral --data-root voc --merge 20
  torchrun --standalone --nproc_per_node=2 -m nefkern.evaluate runs/voc --data-root voc

the folder: images/{{train,val}}/*.jpg, annotations/{{train,val}}/<same name>.png (class indices,
255 = void), classes.txt (one name a line)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    width = max(map(len, METHODS))
    methods = "\n  ".join(f"{m.name:{width}}  {m.title}" for m in METHODS.values())
    aliases = "; ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    aliases += "\n  the star needs quotes in a shell, these names do not"
    examples = EXAMPLES.format(methods=methods, aliases=aliases)
    result = command_parser("evaluate", DESCRIPTION, examples)
    add_run(result)
    _add_data(result.add_argument_group("data"))
    _add_methods(result.add_argument_group("methods"))
    _add_protocol(result.add_argument_group("protocol"))
    _add_honesty(result.add_argument_group("how sure the scores are"))
    result.add_argument(
        "--pictures",
        type=int,
        default=8,
        metavar="N",
        help="draw the first N images beside their annotation and every method's classes [8]",
    )
    add_device(result)
    result.add_argument(
        "--feature-cache", type=Path, metavar="DIR", help="keep the backbone's maps in this folder"
    )
    add_seed(result, "K-means and untrained ψ")
    return result


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        choices=tuple(name for name in PRESETS if name != "samples"),
        help=f"[the run's, if that is one of {', '.join(ANNOTATED)}; else folder]",
    )
    group.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="the data set's folder [the run's, if it was trained on this data set]",
    )
    group.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="59 or 60 (with background) of pascal_context, 27 or 19 of cityscapes [59 and 27 with "
        "crop320, 60 and 19 with sliding], 21 or 20 (without background) of voc2012 [21], 3 or 6 "
        "of potsdam [3]",
    )
    group.add_argument("--split", default="val", help="images to score on [val]")
    group.add_argument(
        "--fit-split", default="train", help="images to fit K-means and probes on [train]"
    )
    add_ignore_class(group)
    group.add_argument("--limit", type=int, metavar="N", help="only the first N images of a split")


def _add_methods(group: Any) -> None:
    group.add_argument("--methods", metavar="A,B,...", help="which, as listed below [ours]")
    group.add_argument(
        "--baseline",
        action="append",
        default=[],
        choices=("kmeans", "kmeans-concat", "deep-spectral"),
        help="add this baseline",
    )
    group.add_argument("--features", choices=("hidden",), help="add ours*, on the hidden features")
    group.add_argument(
        "--untrained", action="store_true", help="add ours*-untrained, the control of ours*"
    )
    group.add_argument(
        "--merge",
        type=int,
        metavar="N",
        help="score the clusters of every K-means merged to N, as segment --classes N merges them "
        "(--classes here counts those of a data set) [all K]",
    )
    group.add_argument(
        "--fit-images",
        default="augmented",
        choices=("augmented", "plain"),
        help="what K-means is fitted on: augmented crops, as the run was trained on and as the "
        "paper's authors do; plain: the crops that are scored, of the other split [augmented]",
    )
    group.add_argument(
        "--fit-passes",
        type=int,
        metavar="N",
        help="augmented views of each image that K-means sees [the run's --views, whose maps it "
        "has kept; 2 where it drew new ones in every epoch]",
    )
    group.add_argument(
        "--sample-rows",
        type=int,
        default=5_000_000,
        metavar="N",
        help="patches K-means is fitted on before its one pass over the rest, at most 4 GiB of "
        "them a method, in half precision where they fill it; also those of a probe [5000000]",
    )


def _add_protocol(group: Any) -> None:
    group.add_argument(
        "--protocol",
        default="crop320",
        choices=("crop320", "sliding"),
        help="crop320: shorter side to 320 pixels, centre crop (tables 1 and 2); sliding: "
        "shorter side to --resize, overlapping windows averaged, logits resized back to the "
        "image's own resolution and scored there (tables 3 and 4) [crop320]",
    )
    group.add_argument("--size", type=int, default=320, help="of crop320 [320]")
    group.add_argument(
        "--resize",
        type=_resize,
        metavar="PX",
        help="of sliding: shorter side at which the network sees an image, in pixels; none: its "
        "own [the paper's for its data sets, 520, 1024 and 512; else that of training]",
    )
    group.add_argument(
        "--window",
        type=int,
        metavar="PX",
        help="of sliding [the paper's for its data sets, else the training crop]",
    )
    group.add_argument(
        "--stride",
        type=int,
        metavar="PX",
        help="of sliding [the paper's for its data sets and windows, else 2/3 of the window]",
    )
    group.add_argument(
        "--flip",
        action="store_true",
        help="average every method's logits over the image and its mirror image: twice the time",
    )
    group.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="windows in one pass [4]"
    )
    group.add_argument(
        "--crf",
        nargs="?",
        const="clusters",
        choices=("clusters", "classes"),
        help="score a second time after a CRF: on the clusters, before they are matched, as the "
        "paper's numbers are; or, faster for many clusters and with a second pass over the images, "
        "on the matched classes [clusters]",
    )
    add_crf_workers(group)
    group.add_argument(
        "--edges",
        metavar="A,B",
        help="score a second time, or a third, with the edges of clusters drawn otherwise than by "
        "bilinear up-sampling, which is always scored: graph, by a solve on the image's pixels; "
        "crf, the same as --crf; or both [bilinear]",
    )
    group.add_argument(
        "--boundary",
        action="store_true",
        help="tell the boundary F-score too (Csurka et al. 2013, within 0.75%% of an image's "
        "diagonal)",
    )


def _add_honesty(group: Any) -> None:
    group.add_argument(
        "--cross-match",
        type=int,
        default=10,
        metavar="N",
        help="halve the images at random N times; clusters take their classes on one half and are "
        "scored on the other, and the mean over halves is told; 0: no such scores [10]",
    )
    group.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="resamples of the images for 95%% intervals, of scores and of differences between "
        "methods; 0: none [1000]",
    )
    group.add_argument(
        "--bounds",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score random clusters and random segments too, as many as the first method has, and "
        "each patch and each superpixel with its most frequent class [yes]",
    )


def _resize(text: str) -> int | str:
    if text != "none" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected pixels or none, got {text!r}")
    return text if text == "none" else int(text)


def chosen_methods(arguments: argparse.Namespace) -> list[Method]:
    """The methods that the command line asks for, in a stable order."""
    names = (arguments.methods or "ours").split(",")
    names += arguments.baseline
    names += ["ours*"] if arguments.features else []
    names += ["ours*-untrained"] if arguments.untrained else []
    return parse_methods([name.strip() for name in names])


def check(arguments: argparse.Namespace) -> None:
    """Raise a UserError that names the first option out of range."""
    names = ("limit", "sample_rows", "fit_passes", "classes", "size", "window", "stride")
    for name in (*names, "batch_size", "merge"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if arguments.fit_passes and arguments.fit_images == "plain":
        raise UserError("--fit-passes: only for --fit-images augmented")
    if isinstance(arguments.resize, int) and arguments.resize < 1:
        raise UserError(f"--resize {arguments.resize}: expected at least 1, or none")
    for name in ("pictures", "cross_match", "bootstrap"):
        value = getattr(arguments, name)
        if value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 0 or more")
    check_edges(arguments)
    check_crf_workers(arguments)
    sliding = arguments.window or arguments.stride or arguments.resize
    if arguments.protocol == "crop320" and sliding:
        raise UserError("--window, --stride, --resize: only for --protocol sliding")


def check_edges(arguments: argparse.Namespace) -> None:
    """``--edges``: which is asked for beside the bilinear one, "graph" or None; a CRF by --crf."""
    names = [name.strip() for name in (arguments.edges or "bilinear").split(",")]
    for name in names:
        if name not in EDGES:
            raise UserError(f"--edges {name}: expected some of {','.join(EDGES)}")
    arguments.edges = "graph" if "graph" in names else None
    if "crf" in names:
        arguments.crf = arguments.crf or "clusters"


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    options = parser().parse_args(arguments)
    methods = chosen_methods(options)
    check(options)
    log_to_stderr()

    check_environment()
    from nefkern.evaluation.evaluator import Evaluator
    from nefkern.runtime import distributed
    from nefkern.segmentation.tables import describe

    # K-means is fitted by one process, and the others wait.
    with distributed.process_group(options.device, patience=datetime.timedelta(days=1)):
        result = Evaluator(options, methods).run()
        if distributed.is_main():
            print(f"\n{describe(result)}")


if __name__ == "__main__":
    sys.exit(main())
