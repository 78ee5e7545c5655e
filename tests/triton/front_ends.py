"""``python -m tests.triton.front_ends``: errors of types that only some calls of a kernel have.

Triton compiles a kernel anew where an integer argument is 1, which then comes as a constant, or a
multiple of 16. What ships is taken through Triton's front end in all those forms and nothing is
assembled, so that it takes seconds. Prints JSON: the kernels, the number of forms, the errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from nefkern.triton.resources import front_end, shipped


def forms() -> Iterator[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """A Shipped's place, its arguments that are 1, and those that are multiples of 16.

    All of its integers at once. Of one variant of a kernel also each alone: a constant beside a
    variable has errors of its own.
    """
    seen, kernels = set(), set()
    for place, kernel in enumerate(shipped()):
        # Tiles and numbers of warps change no type.
        flags = {n: x for n, x in kernel.constexprs.items() if isinstance(x, bool | str)}
        variant = kernel.kernel.__name__, str(kernel.signature), str(flags)
        if variant in seen:
            continue
        seen.add(variant)
        integers = tuple(n for n, kind in kernel.signature.items() if kind in ("i32", "i64"))
        yield place, integers, ()
        yield place, (), integers
        if kernel.kernel.__name__ not in kernels and len(integers) > 1:
            kernels.add(kernel.kernel.__name__)
            for name in integers:
                yield place, (name,), ()


def error_of(form: tuple[int, tuple[str, ...], tuple[str, ...]]) -> str | None:
    place, ones, multiples = form
    kernel = replace(list(shipped())[place], multiples=multiples)
    try:
        front_end(kernel, "sm_90", ones)
    except Exception as error:  # whatever Triton raises is what is looked for
        of = f"{ones} = 1" if ones else f"{multiples} multiples of 16"
        return f"{kernel.name}, {of}: {type(error).__name__}: {error}"
    return None


def main() -> None:
    every = list(forms())
    with ProcessPoolExecutor() as pool:
        errors = [error for error in pool.map(error_of, every, chunksize=8) if error]
    kernels = {kernel.kernel.__name__ for kernel in shipped()}
    print(json.dumps({"kernels": sorted(kernels), "forms": len(every), "errors": errors}))


if __name__ == "__main__":
    main()
