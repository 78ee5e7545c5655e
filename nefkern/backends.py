"""Which implementation of an operator runs, and why another one cannot.

Every operator has up to four implementations, named here from the fastest to the most general:
``cuda`` (the compiled extension on a GPU), ``triton`` (just-in-time kernels on a GPU), ``cpu`` (the
compiled extension on the processor) and ``reference`` (pure PyTorch, any device and dtype).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar

from nefkern.runtime.errors import UserError
from nefkern.version import __version__

AUTO = "auto"
BACKENDS = ("cuda", "triton", "cpu", "reference")
#: What the extension registers as ``torch.ops.nefkern_native``.
NATIVE_OPERATORS = (
    *("knn", "normalized_adjacency", "add", "kappa", "spmm", "sddmm", "linear_attention"),
    *("normalized_adjacency_backward", "add_backward", "linear_attention_backward"),
)
_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

_forced: ContextVar[str | None] = ContextVar("nefkern_backend", default=None)


@functools.cache
def native_module():
    """The compiled extension ``nefkern._C``, or the reason (a string) why it cannot be loaded."""
    import torch  # its libraries, which the extension needs, are loaded by this

    try:
        module = importlib.import_module("nefkern._C")
    except ModuleNotFoundError:
        return "the extension is not built (no C++ compiler or no PyTorch headers at install time)"
    except ImportError as error:
        return f"the extension does not load: {str(error).splitlines()[0]}"
    built = module.build_info()["version"]
    missing = [name for name in NATIVE_OPERATORS if not hasattr(torch.ops.nefkern_native, name)]
    if built != __version__ or missing:
        lack = f", without {', '.join(missing)}" if missing else ""
        return f"the extension is of another version ({built}{lack}): install nefkern again"
    return module


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def why_not(name: str) -> str | None:
    """Why backend ``name`` cannot run on this machine, or None when it can."""
    import torch  # here: the commands' --help should not wait for it

    native = native_module()
    if name == "cpu":
        return native if isinstance(native, str) else None
    if name == "cuda":
        if isinstance(native, str):
            return native
        built = native.build_info()
        if not built["cuda"]:
            reason = built.get("why_no_cuda", "by an older version")
            return f"the extension was built without CUDA: {reason}"
        return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if importlib.util.find_spec("nefkern.triton") is None:
            return "this version has no Triton kernels"
        if interpreting() or torch.cuda.is_available():
            return None
        return (
            "PyTorch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
        )
    return None


def takes(name: str, device_type: str) -> bool:
    """Whether backend ``name`` can run on tensors there: Triton on a GPU's, unless interpreting."""
    return name != "triton" or device_type == "cuda" or interpreting()


def available() -> dict[str, str | None]:
    """Every backend's name with None where it can run here, or one line that says why not."""
    return {name: why_not(name) for name in BACKENDS}


def current() -> str:
    """The backend asked for: innermost :func:`backend`, else ``NEFKERN_BACKEND``, else "auto"."""
    return _forced.get() or _check(os.environ.get("NEFKERN_BACKEND") or AUTO)


def check_environment(*, runnable: bool = True) -> None:
    """For commands: raise a UserError if ``NEFKERN_BACKEND`` names no backend.

    Args:
        runnable: also if it names one that cannot run here.
    """
    name = os.environ.get("NEFKERN_BACKEND") or AUTO
    if name not in (*BACKENDS, AUTO):
        expected = ", ".join((*BACKENDS, AUTO))
        raise UserError(f"NEFKERN_BACKEND={name}: expected one of {expected}")
    if runnable and (reason := why_not(name)):
        raise UserError(f"NEFKERN_BACKEND={name}: not available: {reason}")


def preference(device_type: str) -> tuple[str, ...]:
    """The backends to try, in order, for tensors on ``device_type`` ("cpu", "cuda", ...)."""
    name = current()
    return _PREFERENCE.get(device_type, ("reference",)) if name == AUTO else (name,)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block: "cuda", "triton", "cpu", "reference" or "auto".

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: the backend cannot run on this machine; the message says why.
    """
    _check(name)
    reason = why_not(name)
    if reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _check(name: str) -> str:
    if name not in (*BACKENDS, AUTO):
        raise ValueError(f"backend: expected one of {', '.join((*BACKENDS, AUTO))}, got {name!r}")
    return name
