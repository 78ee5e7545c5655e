"""Rows of features kept for a fit, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

#: What the rows of one method may take: five million of 384 channels in half precision.
MAX_BYTES = 4 << 30

_LARGEST_HALF = 65504.0


class RowStore:
    """Rows that come batch by batch, until there are enough of them or the memory is full.

    They are kept in float32 while that fits, and then in half precision.

    Args:
        max_rows: how many are enough; the batch that brings them is kept whole.
        max_bytes: bound on the memory.
    """

    def __init__(self, max_rows: int, max_bytes: int = MAX_BYTES) -> None:
        self.max_rows, self.max_bytes = max_rows, max_bytes
        self._batches: list[Tensor] = []
        self._dtype = torch.float32

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    @property
    def full(self) -> bool:
        """Whether no further batch is wanted."""
        return len(self) >= self.max_rows or self._bytes() >= self.max_bytes

    def add(self, rows: Tensor) -> None:
        """Keep a batch ``[n, C]`` on the CPU."""
        self._batches.append(self._kept(rows.detach().cpu()))
        if self._dtype == torch.float32 and self._bytes() > self.max_bytes:
            self._dtype = torch.float16
            for number, batch in enumerate(self._batches):  # one by one, never all twice
                self._batches[number] = self._kept(batch)

    def take(self) -> Tensor:
        """All rows ``[n, C]``, float32 or float16; the store is empty afterwards."""
        if not self._batches:
            return torch.empty(0, 1)
        rows = torch.empty(len(self), self._batches[0].shape[1], dtype=self._dtype)
        begin = 0
        self._batches.reverse()
        while self._batches:  # each is freed as soon as it is copied
            batch = self._batches.pop()
            rows[begin : begin + len(batch)] = batch
            begin += len(batch)
        return rows

    def _kept(self, rows: Tensor) -> Tensor:
        if self._dtype == torch.float16:
            return rows.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
        return rows.float().clone()

    def _bytes(self) -> int:
        return sum(batch.nbytes for batch in self._batches)


def mean_and_std(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of every channel of rows ``[n, C]`` in any precision, float32 ``[C]`` each."""
    parts = rows.split(1 << 16)
    mean = sum(part.double().sum(0) for part in parts) / len(rows)
    squares = sum((part.double() - mean).square().sum(0) for part in parts)
    return mean.float(), (squares / max(1, len(rows) - 1)).sqrt().float()


def root_mean_square(rows: Tensor) -> Tensor:
    """Of every channel of rows ``[n, C]``, float32 ``[C]``."""
    squares = sum(part.double().square().sum(0) for part in rows.split(1 << 16))
    return (squares / len(rows)).sqrt().float()
