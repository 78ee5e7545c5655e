"""Scores of clusterings of patches, and what is clustered."""

from __future__ import annotations

import torch

from nefkern.evaluation.patch_scores import clusterings, patch_score


def test_pixels_have_their_patchs_cluster_and_void_does_not_count():
    # Two images of 2 × 2 patches of 2 pixels, the last column of pixels beyond the image.
    annotations = torch.tensor([[[0, 0, 1], [0, 0, 1], [2, 2, 1]], [[1, 1, 1]] * 3]).byte()
    annotations[0, 2, 0] = 255
    clusters = torch.tensor([0, 1, 2, 1, 1, 1, 1, 0])
    found = patch_score(clusters, annotations, (2, 2), (4, 4), 3)
    # Cluster 0: 4 pixels of class 0 and 1 of class 1; 1: 3 + 8 of class 1; 2: 1 of class 2.
    assert found.accuracy == found.accuracy_by_count == 16 / 17
    assert abs(found.mean_iou - (4 / 5 + 11 / 12 + 1) / 3) < 1e-12


def test_patches_of_no_whole_number_of_pixels():
    """Three cells over 8 pixels: pixel i belongs to the cell in which its middle lies."""
    cells = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    annotations = (3 * cells[:, None] + cells).byte()[None]
    found = patch_score(torch.arange(9), annotations, (3, 3), (8.0, 8.0), 9)
    assert found.accuracy == found.mean_iou == 1


def test_the_two_votes_differ_where_a_small_cluster_lies_in_a_large_class():
    annotations = torch.zeros(1, 4, 4, dtype=torch.uint8)
    annotations[0, 0, 0] = 1
    clusters = torch.tensor([0, 1, 1, 1])  # a quarter of 4 pixels of which 1 is the rare class
    found = patch_score(clusters, annotations, (2, 2), (4, 4), 2)
    assert found.accuracy_by_count == 15 / 16
    assert found.accuracy == 13 / 16


def test_eigenvectors_and_maps_are_clustered_each_by_itself():
    half = torch.arange(8) % 2  # what the eigenvectors see
    side = torch.arange(8) // 4  # what F sees
    vectors = torch.nn.functional.one_hot(half, 2).double() * torch.linspace(0.5, 2, 8)[:, None]
    maps = {
        "logits": torch.nn.functional.one_hot((half + side) % 2, 2).T.reshape(1, 2, 2, 4).float(),
        "graph": side.float().reshape(1, 1, 2, 4),
        "concat": torch.stack([half, -half, side * 0]).float().reshape(1, 3, 2, 4),
    }
    exact, ours, on_f, on_all = clusterings(maps, vectors, seed=0).values()
    for found, truth in ((exact, half), (ours, (half + side) % 2), (on_f, side), (on_all, half)):
        assert torch.equal(found, truth) or torch.equal(found, 1 - truth)
