"""How an operator enters the PyTorch dispatcher, and how a backend's kernel is found for a call.

An operator is defined once, by :func:`define`, as ``torch.ops.nefkern.<name>``. Each backend then
adds its implementation with :func:`kernel`. A call runs the first backend that is preferred for the
device of the first tensor argument, available on this machine, and willing to take these arguments.

The public functions call operators by :func:`call`, which finds the way that PyTorch's transforms
(``torch.compile``, ``torch.func``) can follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nefkern import backends
from nefkern.ops import checks
from nefkern.runtime.forks import work_after_forks
from nefkern.runtime.precision import float32_products

work_after_forks()

_library = torch.library.Library("nefkern", "DEF")
_kernels: dict[str, dict[str, tuple[Callable, Callable | None]]] = {}
_floats: dict[str, tuple[tuple[int, str], ...]] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}


def define(schema: str, *, fake: Callable) -> None:
    """Define ``nefkern::<name>`` by its schema; ``fake`` computes the shapes of its results.

    With ``float`` arguments it gets a twin, ``<name>_dynamic``, that takes them as tensors of one
    number on the CPU: a number that changes can be an input of a compiled graph only as a tensor
    (see :func:`call`). (No overload: opcheck would ask which one is meant.)
    """
    name, _, signature = schema.partition("(")
    _kernels[name] = {}
    _library.define(schema)
    parameters = getattr(torch.ops.nefkern, name).default._schema.arguments
    _floats[name] = tuple((i, p.name) for i, p in enumerate(parameters) if str(p.type) == "float")
    if _floats[name]:
        _library.define(f"{name}_dynamic({signature.replace('float ', 'Tensor ')}")
    for twin in _twins(name):
        _library.impl(twin, lambda *args: _run(name, args), "CompositeExplicitAutograd")
        torch.library.register_fake(f"nefkern::{twin}", fake, lib=_library)


def new_size() -> torch.SymInt:
    """For fake kernels: a size that only the content tells.

    Raises:
        NotImplementedError: meta tensors, which have no content and no way to leave sizes open.
    """
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except RuntimeError:
        raise NotImplementedError(
            "expected tensors with content, which decides how many entries the graph has, got meta "
            "tensors"
        ) from None


def _twins(name: str) -> tuple[str, ...]:
    return (name, f"{name}_dynamic") if _floats[name] else (name,)


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

    Gradients of results that nothing asked for come as None. A formula of differentiable operations
    on saved inputs and results is itself differentiable, as often as wanted.
    """

    def remember(ctx, inputs, output):
        ctx.backend = backends.current()
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def same(ctx, *gradients):
        with backends.backend(ctx.backend), _full_precision(gradients):
            return backward(ctx, *gradients)

    for twin in _twins(name):
        torch.library.register_autograd(
            f"nefkern::{twin}", same, setup_context=remember, lib=_library
        )
    _functions[name] = _function(name, same, remember)


def _full_precision(gradients: tuple) -> contextlib.AbstractContextManager:
    """For a backward formula, too, TF32 is off; what torch.compile traces follows its own rule."""
    if torch.compiler.is_compiling() or not any(isinstance(g, Tensor) for g in gradients):
        return contextlib.nullcontext()
    return float32_products(_device(gradients), tf32=False)


def _function(name: str, backward: Callable, setup_context: Callable) -> type:
    """The operator for ``torch.func``: PyTorch's own registration is closed to it, because its
    ``autograd.Function`` sets up the context inside ``forward``."""
    members = {
        "forward": lambda *args: _operator(name, args),
        "setup_context": setup_context,
        "backward": backward,
        "jvp": lambda ctx, *tangents: _no_forward_mode(name),
        "vmap": lambda info, in_dims, *args: _one_by_one(name, info.batch_size, in_dims, args),
    }
    statics = {key: staticmethod(member) for key, member in members.items()}
    return type(name, (torch.autograd.Function,), statics)


def _one_by_one(name: str, size: int, dims: tuple, args: tuple) -> tuple[Any, Any]:
    """``torch.vmap``'s rule: a call for each of the ``size`` slices along ``dims``."""

    def slices(arg, dim):
        return [arg] * size if dim is None else arg.unbind(dim)

    if size == 0:
        raise NotImplementedError(f"{name}: torch.vmap over no slices is not implemented")
    calls = zip(*map(slices, args, dims), strict=True)
    results = [call(name, *one) for one in calls]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _no_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented")


def call(name: str, *args: Any) -> Any:
    """Run operator ``name``, by the way that the transform at work can follow.

    - ``torch.func``: by an ``autograd.Function``, if the operator has a backward formula. Forward
      mode too, for its error: the operator itself would drop the tangent.
    - ``torch.compile``: a number that may change from call to call goes into the graph as a tensor.
      To a ``float`` argument PyTorch would hand the number of today, and compile anew for the next.
    """
    if transformed() and name in _functions:
        return _functions[name].apply(*args)
    return _operator(name, args)


def transformed() -> bool:
    """Whether a transform of ``torch.func``, or forward mode, is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _operator(name: str, args: tuple) -> Any:
    """The dispatcher's operator, or its twin where a number changes."""
    places = [i for i, _ in _floats[name]]
    if any(_changes(args[i]) for i in places):
        name = f"{name}_dynamic"
        args = tuple(_as_tensor(a) if i in places else a for i, a in enumerate(args))
    return getattr(torch.ops.nefkern, name).default(*args)


def _changes(number: float | Tensor) -> bool:
    if isinstance(number, Tensor):
        return True
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # costs half a second

    return not has_static_value(number)


def _as_tensor(number: float | Tensor) -> Tensor:
    """A product: the one way in which a changing number becomes a tensor and stays one."""
    if isinstance(number, Tensor):
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def _as_floats(name: str, args: tuple) -> tuple:
    """The arguments of either twin as those of the first."""
    plain = list(args)
    for i, parameter in _floats[name]:
        if isinstance(plain[i], Tensor):
            plain[i] = checks.finite_number(parameter, plain[i].item())
    return tuple(plain)


def _run(name: str, args: tuple) -> Any:
    """Run the chosen implementation, outside autocast and TF32: it decides its own precision."""
    args = _as_floats(name, args)
    function = select(name, *args)
    device = _device(args)
    with float32_products(device, tf32=False):
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)


def _device(args: tuple) -> str:
    return next(a.device.type for a in args if isinstance(a, Tensor))


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
            if backend == "reference":
                _tell_what_is_missed(name, device, args)
            return function
    kinds = dict.fromkeys(
        str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, Tensor)
    )
    raise RuntimeError(
        f"{name}: backend {backends.current()!r} cannot take this call on device {device!r}, "
        f"with tensors of {', '.join(kinds)}"
        + (f": {reason}" if (reason := backends.why_not(backends.current())) else "")
    )


def _tell_what_is_missed(name: str, device: str, args: tuple) -> None:
    """Warn where only the lack of the extension keeps the device's compiled kernel from a call."""
    if backends.current() != backends.AUTO or device not in _kernels[name]:
        return
    reason = backends.why_not(device)  # the compiled backends are called as their devices
    accepts = _kernels[name][device][1]
    if reason and (accepts is None or accepts(*args)):
        backends.warn_of_reference(reason)


def implemented() -> dict[str, tuple[str, ...]]:
    """Every operator with the backends that implement it."""
    return {name: tuple(found) for name, found in _kernels.items()}
