"""``python -m nefkern.atlas``: a page that shows every cluster of a run, to give it a name."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nefkern.backends import check_environment
from nefkern.runtime.commandline import (
    add_device,
    add_run,
    check_file,
    command_parser,
    log_to_stderr,
)
from nefkern.runtime.errors import UserError, command
from nefkern.spectrum import add_images

if TYPE_CHECKING:
    from nefkern.data import ImageDataset
    from nefkern.naming.names import Names
    from nefkern.naming.survey import Survey
    from nefkern.segmentation.segmenter import Segmenter

log = logging.getLogger(__name__)

PAGE, NAMES = "atlas.html", "names.yaml"

DESCRIPTION = """\
Write a page (RUN/atlas.html, one file that needs no network) with every cluster of a run: the
patches and segments that are most typical of it and those that are nearest to another cluster, its
size, the clusters near it in feature space, and where it lies in images. Names are typed into the
page; clusters of one name are one class. Save them there as names.yaml, which

  python -m nefkern.segment RUN IMAGE --out DIR --names names.yaml

takes. With --serve the page is also served to this machine alone (127.0.0.1), and saves names to
the file itself; Ctrl-C ends it.
"""
EXAMPLES = """\
examples:
  python -m nefkern.atlas runs/voc                            of the images it was trained on
  python -m nefkern.atlas runs/voc --serve                    open the address it prints
  python -m nefkern.atlas runs/voc --data-root holiday/ --first 200
  python -m nefkern.atlas runs/voc --annotated few/           names voted by annotated pictures

--annotated takes a folder like that of training (images/, annotations/ with a mask for each image,
classes.txt): each cluster takes the class that most of its pixels there have; one that meets none
takes that of the cluster most like it. Look at them on the page: they are a proposal.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("atlas", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add_run(result)
    add_images(result)
    add("--first", type=int, metavar="N", help="only N images, evenly spread over the set [all]")
    add("--out", type=Path, metavar="FILE", help=f"the page [RUN/{PAGE}]")
    add(
        "--names",
        type=Path,
        metavar="FILE",
        help=f"names to begin with, if it exists; --serve and --annotated write it [RUN/{NAMES}]",
    )
    add("--annotated", type=Path, metavar="DIR", help="vote names by the annotations in a folder")
    add("--serve", action="store_true", help="serve the page at 127.0.0.1, to save from it")
    add("--port", type=int, default=0, metavar="N", help="of --serve [a free one]")
    add_device(result)
    return result


def check(arguments: argparse.Namespace) -> None:
    """Raise a UserError that names the first option that cannot be used."""
    if arguments.out is not None:
        check_file("--out", arguments.out)
    if arguments.names is not None and (arguments.serve or arguments.annotated):
        check_file("--names", arguments.names)
    if arguments.first is not None and arguments.first < 1:
        raise UserError(f"--first {arguments.first}: expected at least 1")
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: expected 0 to 65535")
    if arguments.port and not arguments.serve:
        raise UserError(f"--port {arguments.port}: expected --serve beside it")
    names = arguments.names or arguments.run / NAMES
    if arguments.annotated and names.exists():
        raise UserError(
            f"--annotated {arguments.annotated}: would replace {names}; move it away, or give "
            "another --names"
        )


# ---- run ----


def chosen(count: int, first: int | None) -> list[int]:
    """At most ``first`` of ``count`` indices, evenly spread."""
    if first is None or first >= count:
        return list(range(count))
    return [i * count // first for i in range(first)]


def first_names(
    arguments: argparse.Namespace, segmenter: Segmenter, found: Survey
) -> tuple[Names, bool]:
    """The names that the page begins with, and whether they were voted just now."""
    from nefkern.naming.names import Names, fingerprint, read_names
    from nefkern.naming.voting import count_votes, vote, voted_names

    checkpoint = fingerprint(arguments.run)
    if arguments.annotated:
        dataset = open_annotated(arguments.annotated)
        counts = count_votes(segmenter, dataset)
        return voted_names(vote(counts, found.similarity), dataset, checkpoint), True
    if not arguments.names.exists():
        return Names(segmenter.num_clusters, {}, {}, checkpoint), False
    names = read_names(arguments.names)
    names.require_run(arguments.names, segmenter.num_clusters, checkpoint)
    return Names(names.num_clusters, names.names, names.colours, checkpoint), False


def open_annotated(folder: Path) -> ImageDataset:
    """The annotated images in ``folder``."""
    from nefkern.data.folder import open_folder

    dataset = open_folder(folder, split="train")
    if not dataset.annotated:
        raise UserError(
            f"--annotated {folder}: expected annotations/ with a mask for each image of images/"
        )
    return dataset


def atlas(arguments: argparse.Namespace) -> tuple[Callable[..., str], Names]:
    """Survey the images and write the page; returns what makes it, and its names."""
    from nefkern.naming.atlas_page import AtlasPage
    from nefkern.naming.names import write_names
    from nefkern.naming.survey import survey
    from nefkern.runtime.files import replace_file
    from nefkern.runtime.progress import image_bar
    from nefkern.segmentation.segmenter import Segmenter
    from nefkern.spectrum import open_images

    segmenter = Segmenter.load(arguments.run, arguments.device)
    segmenter.require_clusters()
    dataset, _ = open_images(arguments, segmenter.options)
    indices = chosen(len(dataset), arguments.first)
    with image_bar(len(indices)) as bar:

        def counted():
            for index in indices:
                yield index
                bar.update()

        found = survey(segmenter, dataset, counted(), len(indices))
    names, voted = first_names(arguments, segmenter, found)
    if voted:
        write_names(arguments.names, names)
        log.info(
            "%d of %d clusters named: %s", len(names.names), names.num_clusters, arguments.names
        )
    page = AtlasPage(f"{arguments.run.resolve().name}: clusters", found, dataset, names)
    replace_file(arguments.out, page.html(names))
    used = sum(cluster.patches > 0 for cluster in found.clusters)
    log.info("%d images, %d clusters in them: %s", found.images, used, arguments.out)
    return partial(page.html, serve=True), names


def serve(arguments: argparse.Namespace, page: Callable[..., str], names: Names) -> None:
    """Serve the page until it is interrupted."""
    from nefkern.naming.server import AtlasServer

    with AtlasServer(arguments.port, page, names, arguments.names) as server:
        print(f"{server.url}  saves to {arguments.names}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    parsed = parser().parse_args(arguments)
    check(parsed)
    parsed.out = parsed.out or parsed.run / PAGE
    parsed.names = parsed.names or parsed.run / NAMES
    log_to_stderr()
    check_environment()
    page, names = atlas(parsed)
    if parsed.serve:
        serve(parsed, page, names)


if __name__ == "__main__":
    sys.exit(main())
