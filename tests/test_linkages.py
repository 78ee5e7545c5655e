"""bench.linkages, on clusters whose classes are known."""

from __future__ import annotations

import pytest
import torch

from bench.linkages import WAYS, figures, table


def clusters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nine clusters in three directions, pure in their classes; a direction's sizes are unequal."""
    spread = torch.linspace(-0.05, 0.05, 3, dtype=torch.float64)
    centers = torch.cat([torch.roll(torch.eye(3)[0], c)[None] + spread[:, None] for c in range(3)])
    sizes = torch.tensor([90.0, 20, 10, 5, 60, 7, 30, 30, 3], dtype=torch.float64)
    pixels = torch.zeros(9, 3, dtype=torch.int64)
    pixels[torch.arange(9), torch.arange(3).repeat_interleave(3)] = sizes.long()
    return centers.double(), sizes, pixels


@pytest.mark.parametrize("name", WAYS)
def test_every_way_finds_what_is_apart(name):
    centers, sizes, pixels = clusters()
    groups = WAYS[name](centers, sizes, 3)
    assert figures(pixels, groups) == [(100.0, 100.0)] * 3
    wrong = groups.clone()
    wrong[0] = groups[3]
    assert figures(pixels, wrong)[1][0] < 100


def test_the_table_tells_every_way():
    told = table([clusters(), clusters()])
    assert [line.count("100.0 ± 0.0") for line in told.splitlines()[2:]] == [6] * len(WAYS)
