"""What the commands have in common: how they read their options, and how they speak."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from nefkern.runtime import hub
from nefkern.runtime.errors import ArgumentParser, UserError, visible

#: The largest seed that PyTorch's generators take.
MAX_SEED = 2**63 - 1

_MODULE = "python -m nefkern."

#: How commands are called: what stands before their names.
PROGRAM = _MODULE

#: More processes than this are a slip of the keyboard, and bring a machine to its knees.
MAX_WORKERS = 256


def command_parser(name: str, description: str, examples: str) -> ArgumentParser:
    """The parser of a command; both texts are shown as they are laid out."""
    return _CommandParser(
        prog=f"{PROGRAM}{name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _CommandParser(ArgumentParser):
    """Its help names all commands as this one was called."""

    def format_help(self) -> str:
        return super().format_help().replace(_MODULE, PROGRAM)


def log_to_stderr() -> None:
    """Messages as plain lines, beside the output; timm's own only where they warn."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[AboveBars()])
    logging.getLogger("timm").setLevel(logging.WARNING)


class AboveBars(logging.Handler):
    """Lines on standard error; a progress bar makes way for them and is drawn again below."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        from tqdm import tqdm  # here: --help should not wait for it

        try:
            lines = self.format(record).split("\n")
            tqdm.write("\n".join(map(visible, lines)), file=sys.stderr)
        except Exception:
            self.handleError(record)


def make_output_folder(folder: Path) -> None:
    """Make the folder of ``--out``; a UserError where something else has its name."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; expected a folder to make")
    folder.mkdir(parents=True, exist_ok=True)


def check_file(flag: str, file: Path) -> None:
    """Raise a UserError unless a file can be made there: before the work, not after it."""
    if file.is_dir():
        raise UserError(f"{flag} {file}: is a folder; expected a file to write")
    if not file.parent.is_dir():
        raise UserError(f"{flag} {file}: there is no folder {file.parent}")


# ---- options that several commands have ----


def add_run(parser: Any) -> None:
    """``RUN``, the run folder to work on."""
    text = f"folder of a trained run; or {hub.SCHEME}OWNER/NAME, one on the model hub"
    parser.add_argument("run", type=_run, metavar="RUN", help=text)


def _run(text: str) -> Path:
    # Without the scheme a slip in a folder's name would ask the network for it.
    return hub.run_folder(text) if text.startswith(hub.SCHEME) else Path(text)


def add_device(parser: Any, beside: str = "") -> None:
    """``--device``; ``beside`` is what its help has to add."""
    text = "cpu, cuda, cuda:1 ..." + (f"; {beside}" if beside else "")
    parser.add_argument("--device", default="auto", help=f"{text} [auto]")


def add_seed(parser: Any, of: str) -> None:
    """``--seed``, of commands that draw something."""
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help=f"of {of} [0]")


def _seed(text: str) -> int:
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {MAX_SEED}, got {text!r}")
    return seed


def add_ignore_class(parser: Any) -> None:
    """``--ignore-class``, of commands that score."""
    parser.add_argument(
        "--ignore-class",
        action="append",
        default=[],
        metavar="NAME",
        help="a class, by name or index, whose pixels are void; may be repeated",
    )


#: What draws the edges of segments.
EDGES = ("bilinear", "graph", "crf")


def add_crf_workers(parser: Any) -> None:
    """``--crf-workers``, where there is a CRF."""
    parser.add_argument(
        "--crf-workers",
        type=int,
        metavar="N",
        help="processes that refine images by the CRF, side by side; 0: the main process does; the "
        "result is the same [one less than the processor's cores, at most 8]",
    )


def check_crf_workers(arguments: argparse.Namespace) -> None:
    """Raise a UserError if ``--crf-workers`` is out of range, or has no CRF beside it."""
    if arguments.crf_workers is None:
        return
    if not 0 <= arguments.crf_workers <= MAX_WORKERS:
        raise UserError(f"--crf-workers {arguments.crf_workers}: expected 0 to {MAX_WORKERS}")
    if not arguments.crf:
        raise UserError(
            f"--crf-workers {arguments.crf_workers}: expected --crf, or --edges crf, beside it"
        )
