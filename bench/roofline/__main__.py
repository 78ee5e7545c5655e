"""``python -m bench.roofline``: what the kernels should take on a GPU, into docs/gpu.md.

Everything is computed from the paper's size and the rates of data sheets: an estimate, to be held
against what ``pytest bench/ --benchmark`` measures where there is a GPU. ``--resources`` compiles
every kernel ahead of time, Triton's and those of csrc/cuda (which takes nvcc), and writes what each
needs; that takes minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.report import with_table
from bench.roofline.resources import cuda_resources, triton_resources
from bench.roofline.tables import estimates
from nefkern.runtime.errors import ArgumentParser, command
from nefkern.runtime.files import replace_file

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"

#: The generated parts of the page, by the name in their markers.
PARTS = {
    "estimates": estimates, "resources": triton_resources, "cuda-resources": cuda_resources,
}  # fmt: skip


def written(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers of its generated part ``name``."""
    begin = f"<!-- {name}: written by python -m bench.roofline -->"
    return with_table(page, text, path=PAGE, begin=begin, end=f"<!-- end of {name} -->")


@command
def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--resources", nargs="?", const="all", choices=("all", "triton", "cuda"),
        help="compile the kernels (all, or those of one kind): write those parts instead",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    names = {
        None: ["estimates"], "all": ["resources", "cuda-resources"],
        "triton": ["resources"], "cuda": ["cuda-resources"],
    }[options.resources]  # fmt: skip
    for name in names:
        replace_file(PAGE, written(PAGE.read_text("utf-8"), name, PARTS[name]()))
        print(f"{PAGE}: {name} written")


if __name__ == "__main__":
    sys.exit(main())
