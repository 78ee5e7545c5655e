"""A forward and backward pass that can be left between its modules."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextlib.contextmanager
def heeding(heed: Callable[[], None]) -> Iterator[None]:
    """Within this block ``heed`` is called before every module's forward pass, and in the backward
    pass before gradients go through its output. What ``heed`` raises ends the pass.

    Modules that are called in other threads are left alone. Not for compiled models: a change of
    hooks would compile them anew.
    """
    owner = threading.get_ident()

    def before(module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() == owner:
            heed()

    def back(gradient: Tensor) -> None:
        heed()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        ours = threading.get_ident() == owner
        # A parameter that is handed through would keep the hook.
        if ours and isinstance(output, Tensor) and output.grad_fn is not None:
            output.register_hook(back)

    with contextlib.ExitStack() as hooks:
        hooks.callback(register_module_forward_pre_hook(before).remove)
        hooks.callback(register_module_forward_hook(after).remove)
        yield
