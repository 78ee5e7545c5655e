"""The CRF over many images, in worker processes or in this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nefkern.runtime.devices import cores
from nefkern.runtime.errors import UserError, first_line
from nefkern.segmentation.crf import as_arrays
from nefkern.segmentation.mean_field import AUTHORS, CRFParameters, best_labels

#: Workers that are started unasked: each holds several copies of an image's probabilities.
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Job:
    """An image to refine.

    Attributes:
        name: of the image, for messages.
        image: uint8 ``[3, H, W]``, RGB.
        probabilities: floating point ``[n, H, W]``.
        labels: int64 ``[n]``, what the n maps are the probabilities of.
        context: handed back with the result.
        patch: side in pixels of what the probabilities were interpolated between.
    """

    name: str
    image: Tensor
    probabilities: Tensor
    labels: Tensor
    context: Any = None
    patch: float = 1.0


class Refined(NamedTuple):
    """A job's result: int64 ``[H, W]`` of its ``labels`` on their device, and its context."""

    labels: Tensor
    context: Any


class _Pending(NamedTuple):
    """A job whose arrays are on their way, so that nothing here holds them."""

    name: str
    labels: Tensor
    context: Any
    future: Future


def default_workers() -> int:
    """One less than this process's share of the processor's cores, 0 to 8.

    The main process needs a core to feed the workers.
    """
    return min(_MOST_WORKERS, cores() - 1)


class Refiner:
    """Refines jobs by the CRF; results come in the order of the jobs, whoever computes them.

    A worker process imports NumPy and pydensecrf, not torch, and inference is single-threaded
    there as it is here: the result does not depend on ``workers``. Of the jobs taken and not yet
    handed back there are never more than ``workers + 2``, so memory stays flat however many follow.

    Args:
        workers: processes; 0: in this one. None: :func:`default_workers`.
        parameters: of the CRF.

    Attributes:
        workers: as given.
        inferences: how many have come back.
        seconds: what they took, added up over the processes.
    """

    def __init__(self, workers: int | None = 0, parameters: CRFParameters = AUTHORS) -> None:
        self.workers = default_workers() if workers is None else workers
        self.parameters = parameters
        self.inferences, self.seconds = 0, 0.0

    @contextlib.contextmanager
    def __call__(self, jobs: Iterable[Job]) -> Iterator[Iterator[Refined]]:
        """``with refiner(jobs) as results``: the workers end with the block, however it is left.

        Raises:
            UserError: a worker process died; names the images it may have died of. And whatever
                ``jobs`` raises.
            ValueError: a job's dtype or shape, see :func:`nefkern.segmentation.crf.crf`.
            RuntimeError: inference failed; names the image.
        """
        with contextlib.closing(self._pooled(jobs) if self.workers else self._here(jobs)) as found:
            yield found

    def _here(self, jobs: Iterable[Job]) -> Iterator[Refined]:
        for job in jobs:
            arrays = as_arrays(job.image, job.probabilities)
            with _told(job.name):
                outcome = best_labels(*arrays, self.parameters)
            yield self._finished(job.labels, job.context, *outcome)

    def _pooled(self, jobs: Iterable[Job]) -> Iterator[Refined]:
        # A fork would copy the locks of torch's threads without the threads.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=_begin_worker)
        pending: deque[_Pending] = deque()
        try:
            for job in jobs:
                if len(pending) > self.workers:
                    yield self._next(pending)
                arrays = as_arrays(job.image, job.probabilities)
                with _told(job.name, *(p.name for p in pending)), _interrupts_held_back():
                    future = pool.submit(best_labels, *arrays, self.parameters)
                pending.append(_Pending(job.name, job.labels, job.context, future))
                del job, arrays
            while pending:
                yield self._next(pending)
        finally:
            pool.shutdown(cancel_futures=True)

    def _next(self, pending: deque[_Pending]) -> Refined:
        with _told(*(p.name for p in pending)):
            outcome = pending[0].future.result()
        done = pending.popleft()
        return self._finished(done.labels, done.context, *outcome)

    def _finished(self, labels: Tensor, context: Any, best: np.ndarray, seconds: float) -> Refined:
        self.inferences += 1
        self.seconds += seconds
        return Refined(labels[torch.from_numpy(best).to(labels.device)], context)


@contextlib.contextmanager
def _told(first: str, *others: str) -> Iterator[None]:
    """Name the image in errors of inference, or all that a dead worker may have died of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{first}: {error}") from None
    except BrokenProcessPool as error:
        names = ", ".join(dict.fromkeys((first, *others)))
        raise UserError(
            f"CRF: a worker process died with one of these in hand: {names} (out of memory?); a "
            "smaller --crf-workers takes less, and 0 refines in the main process"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RuntimeError(f"{first}: the CRF failed ({reason})") from error


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; workers born in it never hear of it: while they import
    they would end with a traceback."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    # Ctrl-C reaches every process of the terminal. A worker that it ended halfway through sending a
    # result would leave the main process waiting for the rest, for ever; so a worker finishes what
    # it is at, and the main process, which is interrupted, sends it away.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    """A killed main process leaves its workers waiting for jobs that nobody sends."""
    multiprocessing.parent_process().join()
    os._exit(1)
