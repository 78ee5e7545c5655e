"""Several processes that work as one: who is who, and what they tell each other.

All of it works without ``torch.distributed`` too: then there is one process, of rank 0, that
agrees with itself at no cost. Flags, figures and errors travel through gloo on the CPU; only what
lies on a GPU goes through NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """The number of this process, 0 to :func:`ranks` - 1."""
    return dist.get_rank() if _started() else 0


def ranks() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _started() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and shows the bar."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if ranks() > 1 else 0


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(device: str, *, patience: datetime.timedelta | None = None) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, for the length of a ``with`` block.

    Args:
        device: what ``--device`` says; "cpu" needs no NCCL.
        patience: how long a process waits for another before it gives up; None: torch's default.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _started():
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=patience)
    try:
        yield
    finally:
        # This joins gloo's threads, as long as nothing else holds the group. Where something does,
        # as a DistributedDataParallel would, they meet the end of the interpreter, and one that
        # then lets go of a tensor ends the process by std::terminate.
        dist.destroy_process_group()


# ---- agreement ----

_FINE, _OUT_OF_MEMORY, _FAILED = range(3)

#: torchrun ends all processes when one has failed: the others give it time to say why.
_LAST_WORDS_SECONDS = 1.0


class SharedOutOfMemory(torch.OutOfMemoryError):
    """Memory ran out in one process or more, and all know of it."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that succeeds in every process or fails in every process.

    Nothing inside may communicate. If one process fails, none waits for it in vain: the first that
    did raises its own error, and the others leave quietly with the exit code of a mistake.

    Raises:
        SystemExit: code 2: another process has failed, and says why.
        SharedOutOfMemory: in all processes, where memory ran out and nothing else went wrong.
    """
    if ranks() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    mine = _FINE if error is None else _OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED
    codes = [int(code) for code in gather_rows(torch.tensor([mine]))]
    worst = max(codes)
    if worst == _FINE:
        return
    first = codes.index(worst)
    if worst == _OUT_OF_MEMORY:
        raise SharedOutOfMemory(f"out of memory in process {first}") from error
    if first == rank():
        raise error
    time.sleep(_LAST_WORDS_SECONDS)
    raise SystemExit(2)


def agreed(items: Iterable[T]) -> Iterator[T]:
    """``items``, of which every process has as many, with errors in making them shared."""
    iterator, end = iter(items), object()
    while True:
        with together():
            item = next(iterator, end)
        if item is end:
            return
        yield item


def from_main(make: Callable[[], T]) -> T:
    """What ``make()`` returns in the main process, in all; an error there ends all."""
    if ranks() == 1:
        return make()
    made: list[Any] = [None]
    with together():
        if is_main():
            made = [make()]
    dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
    return made[0]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true in some process."""
    return bool(largest(torch.tensor([flag], dtype=torch.int64)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "out of memory" in text
        or "can't allocate memory" in text
        or "not enough memory" in text
    )


# ---- objects ----


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This process's share of ``items``, dealt out one by one."""
    return items[rank() :: ranks()]


def collected(share: list[T]) -> list[T]:
    """What was dealt out, in its old order, in the main process; in the others their share."""
    if ranks() == 1:
        return share
    shares = [None] * ranks() if is_main() else None
    dist.gather_object(share, shares, dst=0)
    if shares is None:
        return share
    rounds = itertools.zip_longest(*([(item,) for item in its] for its in shares), fillvalue=())
    return [item for one_each in rounds for dealt_out in one_each for item in dealt_out]


# ---- tensors ----


def gather_rows(x: Tensor) -> Tensor:
    """``[n, ...] → [ranks · n, ...]``: the rows of all processes in their order, no gradients."""
    if ranks() == 1:
        return x
    x = x.detach().contiguous()
    out = x.new_empty(ranks() * x.shape[0], *x.shape[1:])
    dist.all_gather(list(out.chunk(ranks())), x)
    return out


def own_rows(count: int) -> slice:
    """Which of ``count`` gathered rows are this process's; ``count`` is a multiple of ranks."""
    n = count // ranks()
    return slice(rank() * n, (rank() + 1) * n)


def total(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, without gradients; exact for integers."""
    return _reduced(x, dist.ReduceOp.SUM) if ranks() > 1 else x


def largest(x: Tensor) -> Tensor:
    """The largest ``x`` of all processes, element by element."""
    return _reduced(x, dist.ReduceOp.MAX) if ranks() > 1 else x


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes, without gradients."""
    return total(x) / ranks()


def _reduced(x: Tensor, operation: Any) -> Tensor:
    out = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, operation)
    return out


class _Total(torch.autograd.Function):
    """Forward and backward are the same sum: each process adds its part, and each one's loss, all
    being the same loss, depends on the whole."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return differentiable_total(grad)  # so that it can be differentiated again


def differentiable_total(x: Tensor) -> Tensor:
    """:func:`total` for one loss that all processes compute together, part by part.

    Process r has the gradient of the common loss with respect to its own ``x`` by what its own rows
    add to it; the sum of these is the gradient with respect to every ``x``.
    """
    return _Total.apply(x)


def total_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over all processes: one message for all of them."""
    if ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = total(torch.cat([g.flatten() for g in gradients]))
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
