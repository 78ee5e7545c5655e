"""``nefkern COMMAND ...``, the same as ``python -m nefkern.COMMAND ...``."""

from __future__ import annotations

import difflib
import importlib
import sys

from nefkern.runtime import commandline
from nefkern.runtime.errors import UserError, command
from nefkern.version import __version__

#: What each command does, in the order of their use.
COMMANDS = {
    "train": "eigenfunctions and clusters of a folder of images, or of the samples",
    "verify": "repeat parts of a run, and compare them with its record",
    "segment": "overlays, index maps and annotation files of any images",
    "atlas": "a page that shows every cluster of a run, to give it a name",
    "vote": "how many annotated pictures the names of clusters need",
    "evaluate": "score a run against annotations, beside its baselines",
    "summarize": "scores of several runs as mean and spread",
    "eigenmaps": "what single eigenfunctions look like on images",
    "spectrum": "how well ψ spans the exact leading eigenvectors of κ",
    "export": "a run as one ONNX file, for programs without nefkern or PyTorch",
    "push": "a run as a repository on the model hub",
    "data": "check data sets, and prepare those that need it",
    "reproduce": "the paper's tables and figures, beside the paper's numbers",
    "info": "versions, devices, and which backends can run here",
}

#: Those that are not in the module of their name.
_MODULES = {"data": "nefkern.data.__main__"}

_HELP = """\
usage: nefkern COMMAND ...

{commands}

nefkern COMMAND --help explains each, with examples; python -m nefkern.COMMAND is the same.
Begin with nefkern train, which needs no option and no images of yours.
"""


def help_text() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    return _HELP.format(commands="\n".join(f"  {n:{width}}  {t}" for n, t in COMMANDS.items()))


@command
def main(arguments: list[str] | None = None) -> int:
    """Find the command and hand the other arguments to it."""
    given = sys.argv[1:] if arguments is None else arguments
    name, rest = (given[0], given[1:]) if given else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if name == "--version":
        print(f"nefkern {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise UserError(f"{name}: no such command{hint} nefkern --help lists them")
    commandline.PROGRAM = "nefkern "
    return importlib.import_module(_MODULES.get(name, f"nefkern.{name}")).main(rest)


if __name__ == "__main__":
    sys.exit(main())
