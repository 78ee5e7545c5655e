"""Which device a command runs on, and how many cores and how much memory it has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError, first_line


def choose_device(name: str) -> torch.device:
    """The device of ``--device``; "auto" is CUDA where there is one.

    Of several processes on a machine each has the GPU of its number.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.ranks() > 1 and name.startswith("cuda"):
        if ":" in name:
            raise UserError(f"--device {name}: expected cuda; each process takes a GPU of its own")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:  # its own message lists twenty kinds, most of them of no use here
        device = None
    if device is None or device.type == "meta":  # of tensors without content
        raise UserError(f"--device {name}: expected auto, cpu, cuda, or a GPU such as cuda:1")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name}: not usable on this machine ({first_line(error)})"
        ) from None
    return device


def memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the machine's, or less where its control group has a limit,
    as those of containers and batch jobs do.

    Args:
        root: where the system's files are.
    """
    return min([_machine_memory(), *_memory_limits(root)])


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return 1 << 62


def _memory_limits(root: Path) -> Iterator[int]:
    """Those of this process's control group and of all groups that hold it, version 2 and 1.

    A container sees its own group as the root, whatever the path that the kernel tells."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            mount, name = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for folder in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                yield int((root / mount / folder / name).read_text())


def cores() -> int:
    """This process's share of the processor's cores, at least 1.

    The processes that torchrun starts on a machine share its cores.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
