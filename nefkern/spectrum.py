"""``python -m nefkern.spectrum``: how well ψ spans the exact leading eigenvectors of κ."""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nefkern.backends import check_environment
from nefkern.runtime.commandline import (
    add_device,
    add_ignore_class,
    add_run,
    add_seed,
    command_parser,
    log_to_stderr,
)
from nefkern.runtime.errors import UserError, command
from nefkern.training.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

    from nefkern.data import ImageDataset, Sample
    from nefkern.ops import CSRGraph
    from nefkern.segmentation.segmenter import Maps, Segmenter
    from nefkern.training.options import TrainOptions

log = logging.getLogger(__name__)

_TOL = 1e-5  # of residuals, as a share of ‖κ‖

DESCRIPTION = """\
Hold a run's ψ against what it stands in for: the K leading eigenvectors v_j of κ on a batch of
images, each to a residual |κv − λv| of 1e-5 ‖κ‖. The table, for single j and in all:
  λ_j       exact eigenvalues, descending
  Ritz      eigenvalues of κ restricted to the span of ψ's K outputs: the best eigenvalues the span
            has to offer, each at most λ_j; their sum over Σ λ_j is the captured trace
  Rayleigh  uᵀκu of the single outputs, scaled to unit norm and sorted
  inside    |Qᵀv_j|², the part of v_j that lies in the span: 1 all of it, 0 nothing
  angle     principal angles between the span and that of the v_j, in degrees, ascending
for ψ, for the argmax of ψ (the clusters' indicator functions) and for a freshly initialised ψ,
which says how much the features alone give.

Of a run of --method spectral: for the data set's eigenvectors, extended to the batch, and for the
indicator functions of their clusters. κ of the batch alone is another graph: it joins fewer images.
"""
EXAMPLES = """\
examples:
  python -m nefkern.spectrum runs/voc                        a batch of the images it was trained on
  python -m nefkern.spectrum runs/voc --split val            of others, that it has not seen
  python -m nefkern.spectrum runs/voc --data-root DIR --images 4
  python -m nefkern.spectrum runs/voc --data cityscapes --data-root DIR --split val
  python -m nefkern.spectrum runs/voc --data-root DIR --split val --images 60 --score

what to expect:
  A quantised ψ (training's default) gives indicator-like functions: near 1 on the patches of a
  cluster, near 0 elsewhere. They are no eigenvectors and have no order. The Rayleigh quotient of
  an indicator is about 1 + α times the share of the cluster's edges that stay inside it. What
  such functions can do is span eigenvectors: those that are nearly constant on clusters lie
  inside (small angles, Ritz values close to λ_j), the finer ones of high j do not (angles up to
  90 degrees). Captured traces of 30 to 55 % were met in trials, 100 % is out of reach; what
  training added is the difference from the untrained ψ.
  A continuous ψ (--no-gumbel) can approach the eigenvectors themselves, in their order, if the
  penalty is strong enough: β t of 1/λ_K or more. The paper's is 0.0008 at K = 256: with that,
  and without the noise of quantisation, many outputs become v_1 before any becomes v_2.
  The figures do not say how good the segments are: python -m nefkern.evaluate does.

It writes spectrum.json and spectrum.png to the run folder and shows both in report.html.
"""


# ---- parse ----


def add_images(group: Any) -> None:
    """``--data``, ``--data-root`` and ``--split``: what :func:`open_images` reads."""
    add = group.add_argument
    add("--data", choices=tuple(PRESETS), help="[the run's]")
    add(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="the data set's folder [the run's, if it was trained on this data set]",
    )
    add("--split", help="which images [the run's split; train of other data]")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("spectrum", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add_run(result)
    add_images(result)
    add("--images", type=int, metavar="N", help="images of the batch [the run's batch size]")
    add_seed(result, "images, untrained ψ and K-means")
    add(
        "--score",
        action="store_true",
        help="of annotated images: whether κ's spectrum is semantic. K-means on the exact "
        "eigenvectors of their patches, on F and on all maps, scored beside the argmax of ψ",
    )
    add_ignore_class(result)
    add_device(result)
    return result


# ---- run ----


def spectrum(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare, write the files, and return what was written to ``spectrum.json``.

    Raises:
        UserError: a run, data set or option that cannot be used.
    """
    from nefkern.evaluation.report import write_report
    from nefkern.evaluation.spectrum_page import PLOT, RESULT, draw
    from nefkern.runtime.files import replace_file
    from nefkern.segmentation.segmenter import Segmenter
    from nefkern.training.runs import Run, versions

    started = time.perf_counter()
    if arguments.images is not None and arguments.images < 1:
        raise UserError(f"--images {arguments.images}: expected at least 1")
    if arguments.ignore_class and not arguments.score:
        raise UserError(f"--ignore-class {arguments.ignore_class[0]}: expected --score beside it")
    segmenter = Segmenter.load(arguments.run, arguments.device)
    dataset, where = open_images(arguments, segmenter.options, arguments.ignore_class)
    count = arguments.images or min(segmenter.options.batch_size, len(dataset))
    if arguments.score and not dataset.annotated:
        raise UserError(f"--score: expected annotated images, {where['data_root']} has none")
    samples = choose_samples(dataset, count, segmenter, arguments.seed, arguments.score)
    result = {
        "settings": {**where, "images": count, "seed": arguments.seed},
        **compare(segmenter, samples, arguments.seed, num_classes=len(dataset.classes)),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
    }
    run = Run(arguments.run)
    replace_file(run.path(PLOT), draw(result))
    replace_file(run.path(RESULT), json.dumps(result, indent=1, ensure_ascii=False))
    write_report(run)
    log.info("written: %s, %s", run.path(RESULT), run.path(PLOT))
    return result


def open_images(
    arguments: argparse.Namespace, options: TrainOptions, ignored: Sequence[str] = ()
) -> tuple[ImageDataset, dict[str, Any]]:
    """The data set that ``--data``, ``--data-root`` and ``--split`` ask for, else the run's, and
    how to name it.

    Args:
        arguments: what the command line parsed.
        options: of the run.
        ignored: classes that are read as void.

    Raises:
        UserError: no such data.
    """
    from nefkern.data import open_dataset

    name, root, split = arguments.data or options.data, options.data_root, options.split
    if arguments.data_root is not None:
        root, split = str(arguments.data_root), "train"
        if name == "samples" and not arguments.data:
            name = "folder"
    elif name != options.data:
        root, split = None, "train"
    split = arguments.split or split
    dataset = open_dataset(name, root=root, split=split, ignore_classes=ignored)
    return dataset, {"data_root": root or name, "split": split, "ignored": list(ignored)}


def choose_samples(
    dataset: ImageDataset, count: int, segmenter: Segmenter, seed: int, annotated: bool = False
) -> list[Sample]:
    """``count`` images drawn by the seed, ``[3, crop, crop]``; bad ones are skipped.

    Each is resized to the training crop by its shorter side and cut to its centre, and so is its
    annotation if they are to be ``annotated``.

    Raises:
        UserError: fewer images than asked for.
    """
    from nefkern.data import Sample, eval_transform

    transform = eval_transform("crop320", size=segmenter.options.crop)
    chosen: list[Sample] = []
    for index in random.Random(seed).sample(range(len(dataset)), len(dataset)):
        try:
            whole = (
                dataset[index] if annotated else Sample(dataset.names[index], dataset.image(index))
            )
            chosen.append(transform(whole))
        except UserError as error:
            log.warning("skipped: %s", error)
        if len(chosen) == count:
            return chosen
    raise UserError(f"--images {count}: expected at most {len(chosen)}, the readable images")


def compare(
    segmenter: Segmenter, samples: list[Sample], seed: int, *, num_classes: int = 0
) -> dict[str, Any]:
    """Exact eigenvalues, and the fit of ψ, of its argmax and of an untrained ψ; JSON-ready.

    With annotated samples, of ``num_classes`` classes, "scores" too: see
    :mod:`nefkern.evaluation.patch_scores`.
    """
    import torch

    from nefkern.spectral.eigenpairs import leading_eigenpairs

    images = torch.stack([sample.image for sample in samples])
    maps = segmenter.maps(images)
    graph = segmenter.kappa(images, maps)
    count = min(segmenter.num_functions, graph.num_nodes)
    log.info("%d eigenvectors of %s", count, graph)
    pairs = leading_eigenpairs(graph, count, tol=_TOL, seed=seed)
    values, vectors = pairs.values, pairs.vectors.cpu()
    result = {
        "num_eigenfunctions": segmenter.num_functions,
        "nodes": graph.num_nodes,
        "edges": graph.nnz,
        "quantized": segmenter.kind == "quantised",
        "kind": segmenter.kind,
        "eigenvalues": values.tolist(),
        "functions": {
            name: _fit(psi, graph, vectors, values, segmenter.options.min_norm)
            for name, psi in _functions(segmenter, maps, seed).items()
        },
    }
    if samples[0].annotation is not None:
        annotations = torch.stack([sample.annotation for sample in samples])
        result["scores"] = _scores(segmenter, maps, vectors, annotations, num_classes, seed)
    return result


def _fit(
    psi: Tensor, graph: CSRGraph, vectors: Tensor, values: Tensor, min_norm: float
) -> dict[str, Any]:
    from nefkern.spectral.eigenpairs import span_fit

    fit = span_fit(psi, graph, vectors)
    return {
        "captured": (fit.ritz.sum() / values.sum()).item(),
        "dead": int((psi.norm(dim=0) < min_norm).sum()),
        "rank": fit.rank,
        "ritz": fit.ritz.tolist(),
        "rayleigh": fit.rayleigh.tolist(),
        "inside": fit.inside.tolist(),
        "angles": fit.angles.tolist(),
    }


def _scores(
    segmenter: Segmenter,
    maps: Maps,
    vectors: Tensor,
    annotations: Tensor,
    num_classes: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    from nefkern.evaluation.patch_scores import clusterings, patch_scores

    log.info("K-means on eigenvectors and features")
    found = clusterings(
        {name: getattr(maps, name).cpu() for name in ("logits", "hidden", "graph", "concat")},
        vectors,
        seed=seed,
        kind=segmenter.kind,
    )
    grid = tuple(maps.graph.shape[2:])
    return patch_scores(found, annotations, grid, maps.padded, num_classes)


def _functions(segmenter: Segmenter, maps: Maps, seed: int) -> dict[str, Tensor]:
    """The outputs to compare by name, ``[N, K]`` each, as training saw them but without noise."""
    import torch.nn.functional as F

    def outputs(logits: Tensor) -> Tensor:
        rows = logits.flatten(0, 1)
        return rows.softmax(1) if segmenter.kind == "quantised" else rows

    logits = maps.logits.flatten(2).transpose(1, 2)
    if segmenter.kind == "spectral":
        clusters = F.one_hot(logits.flatten(0, 1).argmax(1), logits.shape[-1])
        extended = maps.functions.flatten(2).transpose(1, 2).flatten(0, 1)
        return {"data set's eigenvectors": extended, "their clusters": clusters.float()}
    concat, grid = maps.concat.flatten(2).transpose(1, 2), tuple(maps.concat.shape[2:])
    untrained, _ = segmenter.untrained(seed).project(concat, grid)
    clusters = F.one_hot(logits.flatten(0, 1).argmax(1), logits.shape[-1])
    functions = {"ψ": outputs(logits), "argmax of ψ": clusters.float()}
    return {**functions, "untrained ψ": outputs(untrained)}


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, compare, print."""
    parsed = parser().parse_args(arguments)
    log_to_stderr()
    check_environment()
    from nefkern.evaluation.spectrum_page import describe

    print(f"\n{describe(spectrum(parsed))}")


if __name__ == "__main__":
    sys.exit(main())
