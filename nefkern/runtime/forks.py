"""Forked processes work on one thread.

A fork copies the memory of a process, not its threads. GNU's OpenMP, whose threads PyTorch and the
kernels use, then waits for ever for those that its copied memory speaks of, if the parent has
computed on several before. PyTorch's own loading processes set one thread for that reason; here
every fork does, by :func:`os.fork` or :mod:`multiprocessing`. Results do not depend on the number
of threads. (A process that is spawned has all its threads.)
"""

from __future__ import annotations

import os

import torch


def _one_thread() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def work_after_forks() -> None:
    """Register this for the life of the process; a second call adds nothing."""
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)
        _registered = True


_registered = False
