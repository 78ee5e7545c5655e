"""``python -m bench.gpu.one_call CASE SIZE``: one call of an operator, for a profiler to see.

It is told when the call begins and ends; what compiles and warms up comes before.
"""

from __future__ import annotations

import sys

import torch

from bench.gpu import inputs, operators
from nefkern import backends


def main(case: str, size: str) -> None:
    name, backend, dtype, *sizes = case.split("/")
    check = operators.check_of(name, dtype, inputs.sizes_of(sizes[0] if sizes else size, size))
    call = check.forward or check.call
    with backends.backend(backend):
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
