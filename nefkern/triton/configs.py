"""What the kernel modules share: launches and their configurations, and the list of what ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

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
        architectures: those that it is launched on; none: all.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    product: bool = False
    multiples: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()

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
            launch(self.kernel, grid)(*args, **options, **config.all_kwargs())
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


#: What was compiled, by all that it may depend on; cleared where too many sizes came.
_COMPILED: dict[tuple, tuple[Any, tuple]] = {}
MOST_COMPILED = 4096


def launch(kernel: Any, grid: Any) -> Callable[..., None]:
    """``kernel[grid]``, which does not ask Triton again what was asked before.

    Triton works out for every call which of a kernel's forms it needs: dtypes, sizes that are 1 or
    multiples of 16, options. That cannot differ for the same integers, options, dtypes and
    alignments, whatever the tensors and floats; so it is kept by these, and what was compiled is
    started directly.

    Args:
        kernel: a ``@triton.jit`` function; what is none (interpreted) is called as it is.
        grid: a tuple, or a function of the arguments given by name.

    Returns:
        A function of the kernel's arguments: constexprs, warps and stages by name or last.
    """
    return partial(_launch, kernel, grid) if isinstance(kernel, JITFunction) else kernel[grid]


def _launch(kernel: JITFunction, grid: Any, *args: Any, **options: Any) -> None:
    device = driver.active.get_current_device()
    parts, values = [id(kernel), device, *options.values()], []
    for x in args:
        if isinstance(x, torch.Tensor):
            address = x.data_ptr()
            parts += (x.dtype, address % 16)
            values.append(address)
        else:
            parts.append(float if type(x) is float else x)
            values.append(x)
    key = tuple(parts)
    if key in _COMPILED:
        compiled, constants = _COMPILED[key]
        sizes = grid(options) if callable(grid) else grid
        stream = driver.active.get_current_stream(device)
        compiled[(*sizes, 1, 1)[:3]](*values, *constants, stream=stream)
    elif compiled := kernel[grid](*args, **options):
        if len(_COMPILED) >= MOST_COMPILED:
            _COMPILED.clear()
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _COMPILED[key] = compiled, constants


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Launches inside go to the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
