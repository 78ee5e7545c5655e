"""What the kernel modules share: launch configurations, and the list of what ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
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


def autotune(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable:
    """``triton.autotune``; the first configuration where none may be timed.

    That is in the interpreter, in the capture of a CUDA graph that no call came before, and under
    ``torch.use_deterministic_algorithms``, since another tile may sum in another order.
    """
    return triton.autotune(
        configs=list(configs[:1] if interpreting() else configs),
        key=list(key),
        prune_configs_by={"early_config_prune": _may_be_timed},
    )


def _may_be_timed(configs: list, arguments: dict, **options) -> list:
    fixed = torch.are_deterministic_algorithms_enabled()
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return configs[:1] if fixed or capturing else configs


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Launches inside go to the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
