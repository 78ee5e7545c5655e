"""How an operator enters the PyTorch dispatcher, and how a backend's kernel is found for a call.

An operator is defined once, by :func:`define`, as ``torch.ops.nefkern.<name>``. Each backend then
adds its implementation with :func:`kernel`. A call runs the first backend that is preferred for the
device of the first tensor argument, available on this machine, and willing to take these arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nefkern import backends

_library = torch.library.Library("nefkern", "DEF")
_kernels: dict[str, dict[str, tuple[Callable, Callable | None]]] = {}


def define(schema: str, *, fake: Callable) -> None:
    """Define ``nefkern::<name>`` by its schema; ``fake`` computes the shapes of its results."""
    name = schema.partition("(")[0]
    _kernels[name] = {}
    _library.define(schema)
    _library.impl(name, lambda *args: _run(name, args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"nefkern::{name}", fake, lib=_library)


def kernel(name: str, backend: str, *, accepts: Callable[..., bool] | None = None) -> Callable:
    """Decorator: the implementation of operator ``name`` by ``backend``.

    Args:
        accepts: called with the operator's arguments; False leaves the call to the next backend.
    """

    def add(function: Callable) -> Callable:
        _kernels[name][backend] = (function, accepts)
        return function

    return add


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give operator ``name`` its backward formula, which runs with the backend of the forward pass.

    A ``with backend(...)`` around it would not do: it may have ended, and autograd's thread for a
    GPU never sees it.
    """

    def remember(ctx, inputs, output):
        ctx.backend = backends.current()
        setup_context(ctx, inputs, output)

    def same(ctx, *gradients):
        with backends.backend(ctx.backend):
            return backward(ctx, *gradients)

    torch.library.register_autograd(f"nefkern::{name}", same, setup_context=remember, lib=_library)


def _run(name: str, args: tuple) -> Any:
    """Run the chosen implementation, outside autocast: it decides its own precision."""
    function = select(name, *args)
    device = _device(args)
    if not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


def _device(args: tuple) -> str:
    return next(a.device.type for a in args if isinstance(a, torch.Tensor))


def select(name: str, *args: Any) -> Callable:
    """The implementation that a call of operator ``name`` with ``args`` runs.

    Raises:
        RuntimeError: a backend was forced that cannot take this call.
    """
    device = _device(args)
    for backend in backends.preference(device):
        function, accepts = _kernels[name].get(backend, (None, None))
        runs = function and not backends.why_not(backend) and backends.takes(backend, device)
        if runs and (accepts is None or accepts(*args)):
            return function
    raise RuntimeError(
        f"{name}: backend {backends.current()!r} cannot take this call on device {device!r}"
        + (f": {reason}" if (reason := backends.why_not(backends.current())) else "")
    )


def implemented() -> dict[str, tuple[str, ...]]:
    """Every operator with the backends that implement it."""
    return {name: tuple(found) for name, found in _kernels.items()}
