"""``python -m nefkern.push``: a run as a repository on the model hub."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nefkern.backends import check_environment
from nefkern.runtime import hub
from nefkern.runtime.commandline import add_run, command_parser, log_to_stderr, make_output_folder
from nefkern.runtime.errors import UserError, command, first_line

if TYPE_CHECKING:
    from nefkern.training.runs import Run

log = logging.getLogger(__name__)

DESCRIPTION = """\
Upload a run to the model hub as OWNER/NAME: its checkpoint and clusters (safetensors), its options,
names.yaml if it has one, and a model card (README.md) with settings, classes and scores. Paths and
devices of this machine are left out. Whoever has nefkern then says

  Segmenter.load("OWNER/NAME")                                 in Python
  python -m nefkern.segment hf://OWNER/NAME photo.jpg --out DIR

The upload is by huggingface_hub and its login (HF_TOKEN, or its command line).
"""
EXAMPLES = """\
examples:
  python -m nefkern.push runs/voc me/voc-clusters
  python -m nefkern.push runs/voc me/voc-clusters --private --license cc-by-4.0
  python -m nefkern.push runs/voc me/voc-clusters --to preview     write the files, upload nothing

A run with the backbone's weights from a file (--weights FILE) brings them along; others name the
backbone, whose weights come from the hub or a package, unless --with-backbone adds them. Whether
you may pass on images' clusters and a backbone's weights is for their licences to say.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("push", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add_run(result)
    add("repository", metavar="OWNER/NAME", help="made if it is not there")
    add("--private", action="store_true", help="make it a private one")
    add("--license", metavar="ID", help="for the card's header, as the hub writes it: cc-by-4.0")
    add("--with-backbone", action="store_true", help="upload the backbone's weights too")
    add("--message", default="A run of nefkern", metavar="TEXT", help="of the commit")
    add("--to", type=Path, metavar="DIR", help="write the files to an empty folder, upload nothing")
    return result


def check(arguments: argparse.Namespace) -> None:
    """Raise a UserError that names the first argument that cannot be used."""
    name = arguments.repository.removeprefix(hub.SCHEME)
    if not hub.is_repository(name):
        raise UserError(f"{name}: expected OWNER/NAME")
    arguments.repository = name
    if arguments.to is not None:
        make_output_folder(arguments.to)
        if any(arguments.to.iterdir()):
            raise UserError(f"--to {arguments.to}: expected an empty folder")


def write(run: Run, folder: Path, arguments: argparse.Namespace) -> None:
    """Write the repository's files."""
    from nefkern.exporting.repository import write_repository

    write_repository(
        run,
        folder,
        arguments.repository,
        with_backbone=arguments.with_backbone,
        licence=arguments.license,
    )


def upload(folder: Path, arguments: argparse.Namespace) -> str:
    """Upload a folder; returns the address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    client = hub.client()
    hub.go_offline_without_network()
    try:
        api = client.HfApi(library_name="nefkern")
        # None leaves a repository that exists as private or public as it is.
        private = arguments.private or None
        api.create_repo(arguments.repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=arguments.repository,
            folder_path=folder,
            commit_message=arguments.message,
            allow_patterns=[*hub.KINDS, "README.md"],
        )
    except Exception as error:  # hub, network and login errors come in dozens of classes
        raise UserError(
            f"{arguments.repository}: could not be uploaded "
            f"({type(error).__name__}: {first_line(error)}); --to DIR writes the files"
        ) from error
    return f"{client.constants.ENDPOINT}/{arguments.repository}"


@command
def main(arguments: list[str] | None = None) -> None:
    """Parse, build, run."""
    parsed = parser().parse_args(arguments)
    check(parsed)
    log_to_stderr()
    check_environment()
    from nefkern.training.runs import Run

    run = Run(parsed.run)
    if parsed.to is not None:
        write(run, parsed.to, parsed)
        log.info("%s: %s", parsed.to, ", ".join(sorted(p.name for p in parsed.to.iterdir())))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(run, Path(folder), parsed)
        print(upload(Path(folder), parsed))


if __name__ == "__main__":
    sys.exit(main())
