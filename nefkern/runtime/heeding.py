"""A forward and backward pass that can be left between its modules."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every_module


@contextlib.contextmanager
def heeding(heed: Callable[[], None]) -> Iterator[None]:
    """Within this block ``heed`` is called before any module computes, and before gradients pass
    through what it gave: what ``heed`` raises ends the pass. Other threads are left alone.

    Not for models that are compiled, which would be compiled with it.
    """
    owner = threading.get_ident()

    def before(module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == owner:
            heed()

    def back(gradient: Tensor) -> None:
        heed()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        ours = threading.get_ident() == owner
        if ours and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(back)

    with contextlib.ExitStack() as hooks:
        hooks.callback(every_module.register_module_forward_pre_hook(before).remove)
        hooks.callback(every_module.register_module_forward_hook(after).remove)
        yield
