"""Charts of the page, drawn: the axes' titles and the clusters that the tree names."""

import pytest
import torch

from nefkern.evaluation.report import dendrogram, eigenvalues

pytestmark = pytest.mark.drawn


def test_a_tree_names_every_cluster():
    centers = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    text = dendrogram(centers, torch.arange(12) + 1)
    assert text.startswith("<svg")
    assert all(f"<!-- {cluster} -->" in text for cluster in range(12))


def test_eigenvalues_and_residuals_are_drawn_even_of_zero():
    text = eigenvalues(torch.linspace(1, 0.5, 6), torch.zeros(6))
    assert "<!-- Eigenvalues λ_j -->" in text
    assert "<!-- Residuals |κv_j − λ_j v_j| -->" in text
