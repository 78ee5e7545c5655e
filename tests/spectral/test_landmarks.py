"""Landmarks: the sum over all rows, sampled."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nefkern.spectral.embedding import embed
from nefkern.spectral.landmarks import landmarks


@pytest.fixture(scope="module")
def embedding():
    """Of four clouds on the sphere, 600 rows."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(4, 8).repeat_interleave(150, 0)
    rows = centers + 0.25 * torch.randn(600, 8, generator=generator)
    return embed(rows, 4, k=40)


def test_values_keep_their_size_and_place(embedding):
    generator = torch.Generator().manual_seed(1)
    new = torch.eye(4, 8).repeat(5, 1) + 0.2 * torch.randn(20, 8, generator=generator)
    whole, few = embedding.extend(new), landmarks(embedding, 300, seed=3).extend(new)
    assert torch.nn.functional.cosine_similarity(whole, few).min() > 0.98
    # 1 / sqrt(1/2) times as large without the scale of the degrees.
    assert few.norm() / whole.norm() == pytest.approx(1, abs=0.1)


def test_a_share_of_the_neighbours_but_no_handful(embedding):
    half = landmarks(embedding, 300)
    assert (half.k, len(half.rows), len(half.vectors), len(half.degrees)) == (20, 300, 300, 300)
    assert landmarks(embedding, 60).k == 8
    assert landmarks(embedding, 5).k == 5


def test_the_seed_decides_and_all_are_all(embedding):
    first, again, other = (landmarks(embedding, 50, seed) for seed in (1, 1, 2))
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)
    assert landmarks(embedding, 600) is landmarks(embedding, 9999) is embedding


def test_mistakes_are_named(embedding):
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        landmarks(embedding, 0)
    with pytest.raises(TypeError, match="count: expected an int, got float"):
        landmarks(embedding, 2.5)
    bare = dataclasses.replace(embedding, rows=None)
    with pytest.raises(ValueError, match="expected one with rows"):
        landmarks(bare, 5)
