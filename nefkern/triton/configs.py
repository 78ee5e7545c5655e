"""What the kernel modules share: launch configurations, and the list of what ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import triton

from nefkern.backends import interpreting


@dataclass(frozen=True)
class Shipped:
    """One kernel as a user can get it, to be compiled ahead of time and examined.

    Attributes:
        name: operator and variant, such as "spmm float32 K=64".
        kernel: the ``@triton.jit`` function.
        signature: Triton's type of every argument that isn't a constexpr: "*fp32", "i32", "i64".
        constexprs: the values of the others.
        product: whether it multiplies matrices and must use tensor cores.
        multiples: integer arguments taken to be multiples of 16, as sizes and strides mostly are:
            Triton compiles such a call anew, with wider loads.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    product: bool = False
    multiples: tuple[str, ...] = ()

    def for_multiples(self, *names: str) -> Shipped:
        """The same kernel where these arguments are multiples of 16."""
        return replace(self, name=f"{self.name}, multiples of 16", multiples=names)


class Tuned:
    """A kernel that is launched with the fastest of its configurations, as it is itself.

    The first call for each key and dtypes times them, by ``triton.autotune``. Where none may be
    timed it is the first one: in the interpreter, in the capture of a CUDA graph that no call came
    before, and under ``torch.use_deterministic_algorithms``, since another tile may sum in another
    order. Triton's autotuner is kept out of those calls, as some versions time even a single
    configuration; and out of all later ones, which it would cost more time than the launch.
    """

    def __init__(self, kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]):
        self.kernel, self.configs, self.arg_names = kernel, tuple(configs), kernel.arg_names
        self._places = tuple(kernel.arg_names.index(name) for name in key)
        self._timed = not interpreting() and len(configs) > 1
        self._tuner = triton.autotune(list(configs), list(key))(kernel) if self._timed else None
        self._fastest: dict[tuple, triton.Config] = {}

    def __getitem__(self, grid) -> Callable:
        return partial(self._launch, grid)

    def _launch(self, grid, *args, **options) -> None:
        """``args``: all that the key names, by position."""
        key = (*(args[i] for i in self._places), *(getattr(x, "dtype", None) for x in args))
        if config := self._known(key):
            self.kernel[grid](*args, **options, **config.all_kwargs())
        else:
            self._tuner[grid](*args, **options)
            self._fastest[key] = self._tuner.best_config

    def _known(self, key: tuple) -> triton.Config | None:
        """What needs no timing: None if there is no such configuration."""
        if not self._timed or torch.are_deterministic_algorithms_enabled():
            return self.configs[0]
        if key not in self._fastest and torch.cuda.is_current_stream_capturing():
            return self.configs[0]
        return self._fastest.get(key)


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Launches inside go to the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
