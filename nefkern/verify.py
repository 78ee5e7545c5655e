"""``python -m nefkern.verify``: whether a run is what its record says."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nefkern.backends import check_environment
from nefkern.runtime.commandline import (
    add_device,
    add_run,
    add_seed,
    command_parser,
    log_to_stderr,
)
from nefkern.runtime.errors import UserError, command

DESCRIPTION = """\
Repeat parts of a run, and compare what comes out with what was recorded when it was made.

Training records hashes of every image of its first epoch, and for some steps, chosen by the seed,
the state before, and hashes of the batch, features, κ, ψ's outputs, gradients and ψ after it
(RUN/steps.jsonl, RUN/steps/). Repeated are the last step, whose result must be the checkpoint, and
--steps of the others. Of a run of --method spectral, κ is made anew from the kept rows, and
eigenpairs are held against it; the rows of --steps batches are computed anew, and so is K-means; of
a run with a teacher, or with the data set's edges, those too.

One line a check: ok, DIFFERS with what and by how much, or not checked with the reason. What
the machine decides is compared by numbers within a stated tolerance where its hash differs: another
processor, another version of PyTorch, or other --threads may round otherwise. Images, options,
weights before a step, and κ of equal features must be the same to the bit.
"""
EXAMPLES = """\
examples:
  python -m nefkern.verify runs/mine
  python -m nefkern.verify runs/mine --steps 20 --seed 1 --images 100000
  python -m nefkern.verify runs/mine --data-root DIR    the images lie elsewhere now

The exit code is 0 if nothing differs, 1 if something does, and 2 if that cannot be told: no such
run, no record, no images. It is to be trusted as far as the record is: who can change a run can
change its record, but not so that other weights come out of the same steps.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("verify", DESCRIPTION, EXAMPLES)
    add = result.add_argument
    add_run(result)
    add("--steps", type=int, default=5, metavar="N", help="steps, or batches, to repeat [5]")
    add("--images", type=int, default=1000, metavar="N", help="images to look at [1000]")
    add_seed(result, "what is looked at")
    add("--data-root", type=Path, metavar="DIR", help="the data set's folder [the run's]")
    add("--weights", metavar="FILE", help="of the backbone [the run's]")
    add("--threads", type=int, metavar="N", help="of the processor [as many as the run had]")
    add_device(result)
    return result


def check(arguments: argparse.Namespace) -> None:
    """Raise a UserError if an option is out of range."""
    for name, least in (("steps", 0), ("images", 0), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: expected at least {least}")


def verify(arguments: argparse.Namespace) -> bool:
    """Print a line a check; whether none differs.

    Raises:
        UserError: no such run, no record, images or weights that are not there.
    """
    from nefkern.training import verification
    from nefkern.training.runs import Run

    run = Run(arguments.run)
    options = run.options()
    options.device = arguments.device
    options.weights = arguments.weights or run.weights(options)
    if arguments.data_root:
        options.data_root = str(arguments.data_root)
    wishes = verification.Wishes(
        arguments.steps, arguments.images, arguments.seed, arguments.threads
    )
    found = []
    for one in verification.verify(run, options, wishes):
        print(one, flush=True)
        found.append(one.outcome)
    wrong = found.count(verification.DIFFERS)
    print(f"{run.folder}: {f'{wrong} of {len(found)} checks differ' if wrong else 'verified'}")
    return not wrong


@command
def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run."""
    parsed = parser().parse_args(arguments)
    check(parsed)
    check_environment()
    log_to_stderr()
    return 0 if verify(parsed) else 1


if __name__ == "__main__":
    sys.exit(main())
