"""``python -m nefkern.evaluate``: score a run against annotations, beside its baselines."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nefkern.baselines.methods import METHODS, Method, parse_methods
from nefkern.errors import ArgumentParser, UserError, command

if TYPE_CHECKING:
    from torch import Tensor

    from nefkern.baselines.comparison import Comparison, Windows
    from nefkern.data import ImageDataset, Sample
    from nefkern.segmenter import Segmenter

log = logging.getLogger(__name__)

DESCRIPTION = """\
Score a trained run on annotated images. Clusters have no names: each is first matched to a class
over all images, in up to three ways (majority vote by IoU, the paper's; by count; Hungarian, where
there are as many clusters as classes), then pixel accuracy and mean IoU are those of one confusion
matrix. Baselines are fitted on the training split and share the backbone's pass.

Mean IoU is over the classes that occur in the annotations or in the prediction.
"""
EXAMPLES = """\
methods:
  {methods}

examples:
  python -m nefkern.evaluate runs/voc --data folder --data-root voc --split val
  python -m nefkern.evaluate runs/voc --data-root voc --methods ours,ours*,kmeans,kmeans-concat
  python -m nefkern.evaluate runs/voc --data-root voc --baseline kmeans --features hidden
  python -m nefkern.evaluate runs/voc --data-root voc --ignore-class background
  python -m nefkern.evaluate runs/voc --data-root voc --protocol sliding --crf

the folder: images/{{train,val}}/*.jpg, annotations/{{train,val}}/<same name>.png (class indices,
255 = void), classes.txt (one name a line)
"""


# ---- parse ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    width = max(map(len, METHODS))
    methods = "\n  ".join(f"{m.name:{width}}  {m.title}" for m in METHODS.values())
    result = ArgumentParser(
        prog="python -m nefkern.evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(methods=methods),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    _add_data(result.add_argument_group("data"))
    _add_methods(result.add_argument_group("methods"))
    _add_protocol(result.add_argument_group("protocol"))
    result.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... [auto]")
    result.add_argument(
        "--feature-cache", type=Path, metavar="DIR", help="keep the backbone's maps in this folder"
    )
    result.add_argument("--seed", type=int, default=0, help="of K-means and untrained ψ [0]")
    return result


def _add_data(group: Any) -> None:
    group.add_argument("--data", default="folder", choices=("folder",), help="[folder]")
    group.add_argument("--data-root", type=Path, metavar="DIR", help="the folder")
    group.add_argument("--split", default="val", help="images to score on [val]")
    group.add_argument("--fit-split", default="train", help="images to fit K-means on [train]")
    group.add_argument(
        "--ignore-class",
        action="append",
        default=[],
        metavar="NAME",
        help="a class, by name or index, whose pixels are void; may be repeated",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N images of a split")


def _add_methods(group: Any) -> None:
    group.add_argument("--methods", metavar="A,B,...", help="which, as listed below [ours]")
    group.add_argument(
        "--baseline",
        action="append",
        default=[],
        choices=("kmeans", "kmeans-concat"),
        help="add this baseline",
    )
    group.add_argument("--features", choices=("hidden",), help="add ours*, on the hidden features")
    group.add_argument(
        "--untrained", action="store_true", help="add ours*-untrained, the control of ours*"
    )
    group.add_argument(
        "--sample-rows",
        type=int,
        default=1 << 16,
        metavar="N",
        help="patches K-means is fitted on before its one pass over the rest [65536]",
    )


def _add_protocol(group: Any) -> None:
    group.add_argument(
        "--protocol",
        default="crop320",
        choices=("crop320", "sliding"),
        help="crop320: shorter side to 320 pixels, centre crop (tables 1 and 2); sliding: own "
        "resolution, overlapping windows averaged (tables 3 and 4) [crop320]",
    )
    group.add_argument("--size", type=int, default=320, help="of crop320 [320]")
    group.add_argument("--window", type=int, metavar="PX", help="of sliding [the training crop]")
    group.add_argument("--stride", type=int, metavar="PX", help="of sliding [2/3 of the window]")
    group.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="windows in one pass [4]"
    )
    group.add_argument(
        "--crf",
        nargs="?",
        const="clusters",
        choices=("clusters", "classes"),
        help="score a second time after a CRF on the clusters or, faster for many clusters and "
        "with a second pass over the images, on the matched classes",
    )


def chosen_methods(arguments: argparse.Namespace) -> list[Method]:
    """The methods that the command line asks for, in a stable order."""
    names = (arguments.methods or "ours").split(",")
    names += arguments.baseline
    names += ["ours*"] if arguments.features else []
    names += ["ours*-untrained"] if arguments.untrained else []
    return parse_methods([name.strip() for name in names])


def check(arguments: argparse.Namespace) -> None:
    """Raise a UserError that names the first option out of range."""
    for name in ("limit", "sample_rows", "size", "window", "stride", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if arguments.data_root is None:
        raise UserError("--data-root: expected the folder with the annotated images")
    if arguments.protocol == "crop320" and (arguments.window or arguments.stride):
        raise UserError("--window, --stride: only for --protocol sliding")


# ---- build ----


def windows(arguments: argparse.Namespace, segmenter: Segmenter) -> Windows:
    """How the protocol cuts images; crop320 has one window."""
    from nefkern.baselines.comparison import Windows

    if arguments.protocol == "crop320":
        return Windows(arguments.size, arguments.size, arguments.batch_size)
    window = arguments.window or segmenter.window
    stride = arguments.stride or (segmenter.stride if not arguments.window else -(-2 * window // 3))
    if stride > window:
        raise UserError(f"--stride {stride}: expected at most the window, {window}")
    return Windows(window, stride, arguments.batch_size)


def open_split(arguments: argparse.Namespace, split: str) -> ImageDataset:
    """One split of the data set, annotated or not."""
    from nefkern.data import open_dataset

    return open_dataset(
        arguments.data,
        root=arguments.data_root,
        split=split,
        ignore_classes=arguments.ignore_class,
    )


def open_annotated(arguments: argparse.Namespace) -> ImageDataset:
    """The split to score on.

    Raises:
        UserError: it has no annotations, or every class is ignored.
    """
    dataset = open_split(arguments, arguments.split)
    if not dataset.annotated:
        raise UserError(
            f"--data-root {arguments.data_root}: no annotations for split {arguments.split!r}; "
            "scores need annotations/<split>/<image name>.png"
        )
    if not classes_scored(dataset):
        raise UserError("--ignore-class: every class is ignored, there is nothing to score")
    return dataset


def classes_scored(dataset: ImageDataset) -> list[int]:
    """Indices of the classes that aren't ignored."""
    return [i for i in range(len(dataset.classes)) if i not in dataset.ignored]


def comparison(
    arguments: argparse.Namespace, methods: list[Method], segmenter: Segmenter
) -> Comparison:
    """The methods on one backbone, not yet fitted."""
    from nefkern.baselines.comparison import Comparison

    control = None if all(m.trained for m in methods) else segmenter.untrained(arguments.seed)

    return Comparison(
        segmenter,
        methods,
        windows(arguments, segmenter),
        control=control,
        seed=arguments.seed,
        sample_rows=arguments.sample_rows,
    )


# ---- run ----


def read_ahead(
    read: Callable[[int], Sample], indices: Sequence[int], arguments: argparse.Namespace, title: str
) -> Iterator[Future[Sample]]:
    """Samples as the protocol transforms them, each read while the one before is worked on."""
    from tqdm import tqdm

    from nefkern.data import eval_transform

    protocol = "full" if arguments.protocol == "sliding" else "crop320"
    transform = eval_transform(protocol, size=arguments.size)
    ahead: deque[Future[Sample]] = deque()
    with ThreadPoolExecutor(1) as pool, tqdm(total=len(indices), desc=title, unit="image") as bar:
        for index in indices:
            ahead.append(pool.submit(lambda i=index: transform(read(i))))
            if len(ahead) == 2:
                yield ahead.popleft()
                bar.update()
        for last in ahead:
            yield last
            bar.update()


def training_images(
    dataset: ImageDataset, segmenter: Segmenter, arguments: argparse.Namespace
) -> Iterator[Tensor]:
    """Images to fit on, in an order drawn by the seed; unusable ones are reported and skipped."""
    from nefkern.data import Sample

    indices = list(range(len(dataset)))[: arguments.limit]
    random.Random(arguments.seed).shuffle(indices)

    def read(index: int) -> Sample:
        return Sample(dataset.names[index], dataset.image(index))

    for future in read_ahead(read, indices, arguments, "fitting"):
        try:
            sample = future.result()
            segmenter.check_size(sample.image, sample.name)
        except UserError as error:
            log.warning("skipped: %s", error)
            continue
        yield sample.image


def annotated_images(
    dataset: ImageDataset, segmenter: Segmenter, arguments: argparse.Namespace, title: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels to score on; an unusable one ends the evaluation.

    Labels count the classes that aren't ignored, so that no trace of the others is left.
    """
    import torch

    renumbered = torch.full((256,), 255, dtype=torch.uint8)
    kept = classes_scored(dataset)
    renumbered[kept] = torch.arange(len(kept), dtype=torch.uint8)
    indices = range(len(dataset))[: arguments.limit]
    for future in read_ahead(dataset.__getitem__, indices, arguments, title):
        sample = future.result()
        segmenter.check_size(sample.image, sample.name)
        yield sample.image, renumbered[sample.annotation.int()]


def fit(arguments: argparse.Namespace, compared: Comparison, segmenter: Segmenter) -> None:
    """Fit what has to be fitted, on the training split."""
    dataset = open_split(arguments, arguments.fit_split)
    try:
        compared.fit(training_images(dataset, segmenter, arguments))
    except ValueError as error:
        raise UserError(f"--fit-split {arguments.fit_split}: cannot fit K-means, {error}") from None


def score(
    arguments: argparse.Namespace,
    compared: Comparison,
    dataset: ImageDataset,
    segmenter: Segmenter,
) -> dict[str, Any]:
    """Every method's figures without and with CRF, and the pixels of each class; JSON-ready."""
    from nefkern.segmentation.evaluation import Matched, match

    classes = [dataset.classes[i] for i in classes_scored(dataset)]

    def pairs(title: str) -> Iterator[tuple[Tensor, Tensor]]:
        return annotated_images(dataset, segmenter, arguments, title)

    counts = compared.count(pairs("scoring"), len(classes), refine=arguments.crf == "clusters")
    pixels = next(iter(counts.values()))["none"].sum(0)
    if not pixels.any():
        raise UserError(
            f"--split {arguments.split}: every annotated pixel is void, nothing to score"
        )
    stages: dict[str, dict[str, Matched]] = {
        name: {stage: match(table) for stage, table in tables.items()}
        for name, tables in counts.items()
    }
    if arguments.crf == "classes":
        plain = {name: matched["none"] for name, matched in stages.items()}
        confusions = compared.count_refined_classes(
            pairs("CRF"), {name: m.assignments for name, m in plain.items()}, len(classes)
        )
        for name, by_matching in confusions.items():
            stages[name]["classes"] = plain[name].rescored(by_matching)
    return {
        "classes": classes,
        "pixels": dict(zip(classes, pixels.tolist(), strict=True)),
        "methods": {
            name: {
                "title": compared.clusterers[name].method.title,
                "stages": {stage: m.as_dict(classes) for stage, m in matched.items()},
            }
            for name, matched in stages.items()
        },
    }


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit, score and write; returns what was written."""
    from nefkern.runs import Run, versions
    from nefkern.segmenter import Segmenter

    methods = chosen_methods(arguments)
    check(arguments)
    if arguments.crf:
        from nefkern.segmentation.crf import require_pydensecrf

        require_pydensecrf()
    segmenter = Segmenter.load(arguments.run, arguments.device, cache=arguments.feature_cache)
    dataset = open_annotated(arguments)
    compared = comparison(arguments, methods, segmenter)
    started = time.perf_counter()
    if compared.needs_fit:
        fit(arguments, compared, segmenter)
    found = score(arguments, compared, dataset, segmenter)
    result = {
        "settings": settings(arguments, methods, compared.windows),
        "num_clusters": segmenter.num_clusters,
        "images": len(range(len(dataset))[: arguments.limit]),
        **found,
        "seconds": round(time.perf_counter() - started, 1),
        "device": str(segmenter.device),
        "versions": versions(),
    }
    write(Run(arguments.run).folder, result)
    return result


def settings(
    arguments: argparse.Namespace, methods: list[Method], windows: Windows
) -> dict[str, Any]:
    """What decides the figures, beside the run and the images."""
    return {
        "data_root": str(arguments.data_root),
        "split": arguments.split,
        "fit_split": arguments.fit_split,
        "ignored": arguments.ignore_class,
        "limit": arguments.limit,
        "methods": [m.name for m in methods],
        "protocol": arguments.protocol,
        "window": windows.window,
        "stride": windows.stride,
        "crf": arguments.crf,
        "seed": arguments.seed,
        "sample_rows": arguments.sample_rows,
    }


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write ``evaluation-*.json`` into the run folder; only the same settings are overwritten."""
    from nefkern.files import replace_file
    from nefkern.report import write_report
    from nefkern.runs import Run

    path = free_name(folder, result["settings"])
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False))
    write_report(Run(folder))
    log.info("written: %s", path)


def free_name(folder: Path, settings: dict[str, Any]) -> Path:
    """The file of an earlier evaluation with these settings, or one that isn't taken."""
    data = Path(settings["data_root"]).resolve().name
    stem = f"evaluation-{data}-{settings['split']}-{settings['protocol']}"
    for number in itertools.count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            return path
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            if json.loads(path.read_text())["settings"] == settings:
                return path
    raise AssertionError  # count() never ends


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    parsed = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("timm").setLevel(logging.WARNING)
    result = evaluate(parsed)
    from nefkern.segmentation.tables import describe

    print(f"\n{describe(result)}")


if __name__ == "__main__":
    sys.exit(main())
