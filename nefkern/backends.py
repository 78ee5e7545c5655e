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
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from nefkern.runtime.errors import UserError
from nefkern.version import __version__

AUTO = "auto"
BACKENDS = ("cuda", "triton", "cpu", "reference")
#: What the extension registers as ``torch.ops.nefkern_native``.
NATIVE_OPERATORS = (
    *("knn", "normalized_adjacency", "add", "kappa", "spmm", "sddmm", "linear_attention"),
    *("normalized_adjacency_backward", "add_backward", "linear_attention_backward"),
)
#: And these, where it is built with CUDA.
NATIVE_CUDA_OPERATORS = ("knn_cuda", "kappa_padded")
PACKAGE = Path(__file__).parent
#: Reasons that somebody chose, and need not be told.
CHOSEN = ("NEFKERN_NATIVE=0", "NEFKERN_CUDA=0")
_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

_forced: ContextVar[str | None] = ContextVar("nefkern_backend", default=None)


@functools.cache
def native_module():
    """The compiled extension ``nefkern._C``, or the reason (a string) why it cannot be loaded."""
    import torch  # its libraries, which the extension needs, are loaded by this

    try:
        module = importlib.import_module("nefkern._C")
    except ModuleNotFoundError:
        return _why_not_built()
    except ImportError as error:
        return f"the extension does not load: {str(error).splitlines()[0]}"
    info = module.build_info()
    built, wanted = info["version"], tuple(NATIVE_OPERATORS)
    wanted += NATIVE_CUDA_OPERATORS if info.get("cuda") else ()
    missing = [name for name in wanted if not hasattr(torch.ops.nefkern_native, name)]
    if built != __version__ or missing:
        lack = f", without {', '.join(missing)}" if missing else ""
        return f"the extension is of another version ({built}{lack}): install nefkern again"
    return module


def _why_not_built() -> str:
    if reason := failed_build():
        return f"the extension is not built: {reason}"
    others = ", ".join(path.name for path in sorted(PACKAGE.glob("_C.*")))
    if others:
        return f"the extension is built for another Python ({others}): install nefkern again"
    return "the extension is not built: this folder was not installed (pip install . builds it)"


def failed_build() -> str | None:
    """Why the last installation built no extension, as setup.py wrote it down; None if it did, or
    if one was built since."""
    try:
        record = PACKAGE / "_build.json"
        written = record.stat().st_mtime
        if any(module.stat().st_mtime > written for module in PACKAGE.glob("_C.*")):
            return None
        return str(json.loads(record.read_text("utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@functools.cache
def warn_of_reference(reason: str) -> None:
    """Say once that calls run on the reference which a compiled kernel would have taken."""
    if reason.endswith(CHOSEN):
        return
    remedy = ""
    if "is not built" in reason:
        remedy = "; NEFKERN_NATIVE=require pip install . shows all that the build says"
    warnings.warn(
        f"nefkern runs on its PyTorch reference, which is slower: {reason}{remedy}; "
        "NEFKERN_BACKEND=reference takes it without a warning",
        RuntimeWarning,
        stacklevel=2,
    )


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
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        return _why_not_these_gpus(built["cuda_architectures"])
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


def _why_not_these_gpus(architectures: str) -> str | None:
    """A GPU here for which no kernel was built, or None. ``architectures``: as "90a-real,..."."""
    import torch

    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if not serves(architectures, (major, minor)):
            return (
                f"the extension was built for {architectures}, {torch.cuda.get_device_name(i)} is "
                f"{major}.{minor}: TORCH_CUDA_ARCH_LIST={major}.{minor}, and install nefkern again"
            )
    return None


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for architectures, as "80-real,90a-real,100", runs on a GPU of that capability.

    Machine code ("real") runs within its generation on its own minor number or a later one, PTX
    ("virtual") on all that is later, an architecture without either has both; what is specific to
    an architecture (a) runs on no other, to a family (f) within it.
    """
    return any(_runs_on(one, capability) for one in architectures.split(","))


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(\d+)([af]?)(?:-(real|virtual))?", architecture)
    if found is None:
        raise ValueError(f"architecture: expected such as 90a or 100-virtual, got {architecture!r}")
    number, letter, kind = found.groups()
    own = divmod(int(number), 10)
    if letter == "a":
        return own == capability
    ptx = kind != "real" and not letter
    return own <= capability and (own[0] == capability[0] or ptx)


def takes(name: str, device_type: str) -> bool:
    """Whether backend ``name`` can run on tensors there: the compiled ones on those of their name,
    Triton on a GPU's, unless interpreting."""
    if name in ("cuda", "cpu"):
        return name == device_type
    return name != "triton" or device_type == "cuda" or interpreting()


def compiled(device_type: str) -> bool:
    """Whether kernels, and not the reference, take tensors on a device of that type."""
    found = (name for name in preference(device_type) if name != "reference")
    return any(why_not(name) is None and takes(name, device_type) for name in found)


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
