"""What is recorded of a training step, on its way from the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nefkern.runtime import distributed
from nefkern.runtime.errors import UserError


class Record:
    """The figures of a step, which a GPU may still be working on.

    Args:
        number: of the step.
        rows: ``[graphs, 6 + K]``, see :class:`nefkern.training.step.Graph`: still on the device.
        known: what the host knows of the step.
    """

    def __init__(self, number: int, rows: Tensor, known: dict[str, float]) -> None:
        self.number, self.known = number, known
        self._copied: torch.cuda.Event | None = None
        if rows.device.type == "cuda":
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._rows = rows

    def ready(self) -> bool:
        """Whether :meth:`row` would not wait."""
        return self._copied is None or self._copied.query()

    def row(self) -> dict[str, float]:
        """The record; waits for the device.

        Raises:
            UserError: the loss was not finite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        figures = figures_of(self._rows)
        check_finite(figures["loss"], self.number)
        return {**figures, **self.known}


class KnownRecord(Record):
    """A record that is all there."""

    def __init__(self, number: int, figures: dict[str, float]) -> None:
        self.number, self.known, self._copied = number, figures, None

    def row(self) -> dict[str, float]:
        return self.known


def check_finite(loss: float, number: int) -> None:
    """Raise UserError if the loss of a step is not finite."""
    if not -float("inf") < loss < float("inf"):
        raise UserError(f"the loss is {loss} at step {number}; a lower --lr may help")


def figures_of(rows: Tensor) -> dict[str, float]:
    """A step's record over its graphs, those of other processes included.

    Means; but clusters are live if they win anywhere, and ``dead`` is the largest number.

    Args:
        rows: ``[graphs, 6 + K]``, on the host.
    """
    means = distributed.mean(rows[:, :5].double().mean(0)).tolist()
    loss, confidence, trace, penalty, off_diagonal = means
    dead, *live = distributed.largest(rows[:, 5:].amax(0).long()).tolist()
    return {
        "loss": loss,
        "trace": trace,
        "penalty": penalty,
        "live": sum(live),
        "dead": dead,
        "off_diagonal": off_diagonal,
        "confidence": confidence,
    }


class Underway:
    """Records in the order of their steps; the host is at most ``most`` steps ahead of the device.

    So the device always has work, and a failure is noticed soon.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._records: deque[tuple[dict[str, Any], Record, dict[str, Any]]] = deque()

    def add(self, record: Record, before: dict[str, Any], after: dict[str, Any]) -> None:
        """One more, and what stands before and after it in its row."""
        self._records.append((before, record, after))

    def arrived(self, *, all: bool = False) -> Iterator[dict[str, Any]]:
        """Records that are there, and as many as are too many; or, waiting for them, all."""
        while self._records and (
            all or len(self._records) > self.most or self._records[0][1].ready()
        ):
            before, record, after = self._records.popleft()
            yield before | record.row() | after
