"""κ against the formulas of section 3.3, written densely in float64."""

from __future__ import annotations

import math

import pytest
import torch

from nefkern import backend
from nefkern.images import graph as module
from nefkern.images.graph import (
    GraphConfig,
    feature_graph,
    image_kappa,
    kappa,
    pixel_graph,
    resolve_neighbours,
    standardized,
)
from nefkern.runtime.errors import UserError
from tests.ops.graph_common import backends_of, moved

H, W, B, C = 6, 7, 3, 24
PAIRS = ((10, 2.0), (5, 0.1))


def random_features(seed: int) -> torch.Tensor:
    return torch.randn(B * H * W, C, generator=torch.Generator().manual_seed(seed))


def clustered_features(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(5, C, generator=generator)
    which = torch.randint(5, (B * H * W,), generator=generator)
    return centres[which] + torch.randn(B * H * W, C, generator=generator)


def random_images(seed: int, factor: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, 3, H * factor, W * factor), generator=generator).byte()


# ---- the paper's formulas, entry by entry


def nearest(row: torch.Tensor, k: int, candidates: list[int], largest: bool) -> list[int]:
    return sorted(candidates, key=lambda j: -row[j].item() if largest else row[j].item())[:k]


def dense_feature_adjacency(features: torch.Tensor, k: int) -> torch.Tensor:
    x = features.double()
    norms = x.norm(dim=1, keepdim=True)
    x = torch.where(norms > 0, x / norms, 0)
    similarity = x @ x.T
    n = len(x)
    a = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in nearest(similarity[i], k, [j for j in range(n) if j != i], largest=True):
            a[i, j] = max(similarity[i, j].item(), 0.0)
    return (a + a.T) / 2


def bilinear(image: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """[3, H, W] at the centres of an h × w grid: four neighbours, weighted by distance."""
    out = torch.zeros(3, h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            y = min(max((i + 0.5) * image.shape[1] / h - 0.5, 0), image.shape[1] - 1)
            x = min(max((j + 0.5) * image.shape[2] / w - 0.5, 0), image.shape[2] - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, image.shape[1] - 1), min(x0 + 1, image.shape[2] - 1)
            dy, dx = y - y0, x - x0
            top = (1 - dx) * image[:, y0, x0] + dx * image[:, y0, x1]
            bottom = (1 - dx) * image[:, y1, x0] + dx * image[:, y1, x1]
            out[:, i, j] = (1 - dy) * top + dy * bottom
    return out


def dense_pixel_adjacency(images: torch.Tensor, pairs=PAIRS, h=H, w=W) -> torch.Tensor:
    n = len(images) * h * w
    a = torch.zeros(n, n, dtype=torch.float64)
    for b, image in enumerate(images):
        small = bilinear(image.double() / 255, h, w)
        for k, weight in pairs:
            points = []
            for i in range(h):
                for j in range(w):
                    x, y = j / max(w - 1, 1), i / max(h - 1, 1)
                    points.append([*small[:, i, j].tolist(), weight * x, weight * y])
            points = torch.tensor(points, dtype=torch.float64)
            distance = (points[:, None] - points[None]).norm(dim=2)
            for i in range(h * w):
                for j in nearest(distance[i], k, [j for j in range(h * w) if j != i], False):
                    a[b * h * w + i, b * h * w + j] = 1
    return torch.maximum(a, a.T)


def normalised(a: torch.Tensor) -> torch.Tensor:
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.clamp_min(1e-300).rsqrt(), 0)
    return scale[:, None] * a * scale[None]


@pytest.mark.parametrize("name", backends_of("kappa"))
@pytest.mark.parametrize("make", [random_features, clustered_features])
@pytest.mark.parametrize("k", [1, 12, B * H * W - 1])
def test_kappa_equals_the_dense_formulas(name, make, k, record_property):
    features, images = make(k), random_images(k)
    dense = normalised(dense_feature_adjacency(features, k))
    dense = dense + 0.3 * normalised(dense_pixel_adjacency(images))
    with backend(name):
        graph = kappa(*moved(name, features, images), (H, W), GraphConfig(k)).to("cpu")
    graph.validate()
    got = graph.to_dense().double()
    difference = (got - dense).abs().max().item()
    record_property("largest difference", difference)
    print(f"kappa, {make.__name__}, k = {k}: largest difference {difference:.1e}")
    assert difference < 2e-6
    assert torch.equal(got != 0, dense != 0), "the same entries are stored"
    assert torch.equal(got, got.T)


def test_batched_features_and_float_images_are_the_same():
    features, images = clustered_features(0), random_images(0)
    flat = kappa(features, images, (H, W), GraphConfig(12)).to_dense()
    batched = features.view(B, H * W, C)
    assert torch.equal(kappa(batched, images, (H, W), GraphConfig(12)).to_dense(), flat)
    floats = kappa(batched, images.float() / 255, (H, W), GraphConfig(12)).to_dense()
    assert torch.equal(floats, flat)


def test_feature_graph_joins_images_and_pixel_graph_does_not():
    features, images = clustered_features(1), random_images(1)
    image = torch.arange(B).repeat_interleave(H * W)
    across = image[:, None] != image[None]
    assert feature_graph(features, 12).to_dense()[across].count_nonzero() > 0
    assert pixel_graph(images, (H, W), PAIRS).to_dense()[across].count_nonzero() == 0


def test_zero_features_leave_empty_rows_and_no_nan():
    features = clustered_features(2)
    features[5] = 0
    features[7] = -features.mean(0) * 100  # negative similarity with nearly all
    graph = feature_graph(features, 12)
    dense = graph.to_dense()
    torch.testing.assert_close(
        dense.double(), normalised(dense_feature_adjacency(features, 12)), atol=2e-6, rtol=0
    )
    assert not dense[5].any()
    assert dense.isfinite().all()
    everywhere = kappa(torch.zeros(B * H * W, C), random_images(2), (H, W), GraphConfig(4))
    torch.testing.assert_close(
        everywhere.to_dense().double(),
        0.3 * normalised(dense_pixel_adjacency(random_images(2))),
        atol=1e-6,
        rtol=0,
    )


def test_one_colour_and_tiny_grids():
    grey = torch.full((2, 3, 8, 8), 99, dtype=torch.uint8)
    for grid in ((1, 1), (1, 2), (2, 2)):
        graph = pixel_graph(grey, grid, PAIRS)  # fewer candidates than neighbours
        n = grid[0] * grid[1]
        block = torch.ones(n, n, dtype=torch.float64) - torch.eye(n, dtype=torch.float64)
        dense = normalised(torch.block_diag(block, block))
        torch.testing.assert_close(graph.to_dense().double(), dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [GraphConfig(9, alpha=0.0), GraphConfig(9, pixel_graphs=())])
def test_without_pixel_graph(config):
    features = clustered_features(3)
    graph = kappa(features, random_images(3), (H, W), config)
    assert torch.equal(graph.to_dense(), feature_graph(features, 9).to_dense())


def test_features_carry_no_gradient_into_kappa():
    features = clustered_features(4).requires_grad_()
    assert not kappa(features, random_images(4), (H, W), GraphConfig(9)).values.requires_grad


@pytest.mark.parametrize("alpha", [0.3, 0.0])
@pytest.mark.parametrize("k", [9, 10**6])
def test_image_kappa_is_each_images_kappa_on_one_diagonal(alpha, k):
    features, images = random_features(8), random_images(8)
    config, n = GraphConfig(7, alpha), H * W
    whole = image_kappa(features, images, (H, W), config, k).validate().to_dense()
    own = GraphConfig(min(k, n - 1), alpha)
    for b in range(B):
        at = slice(b * n, (b + 1) * n)
        alone = kappa(features[at], images[b : b + 1], (H, W), own).to_dense()
        torch.testing.assert_close(whole[at, at], alone)
        whole[at, at] = 0
    assert not whole.any()


def test_image_kappa_of_a_single_patch_is_empty():
    graph = image_kappa(torch.ones(2, 5), random_images(0)[:2], (1, 1), GraphConfig(7), 3)
    assert (graph.num_nodes, graph.nnz) == (2, 0)


def test_standardized_channels():
    found = standardized(3 + 5 * random_features(6).view(B, H * W, C).bfloat16())
    assert found.shape == (B * H * W, C)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(0), torch.zeros(C), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(C))
    assert standardized(torch.ones(4, 2)).count_nonzero() == 0


def test_eigenvalues_lie_where_the_normalisation_puts_them():
    dense = kappa(clustered_features(5), random_images(5), (H, W), GraphConfig(12)).to_dense()
    values = torch.linalg.eigvalsh(dense.double())
    assert values.max() <= 1.3 + 1e-6
    assert values.max() > 1.0
    assert values.min() >= -1.3 - 1e-6


@pytest.mark.parametrize(
    ("text", "rows", "k"),
    [
        (256, 14400, 256),
        ("256", 300, 256),
        ("2%", 14400, 288),
        (" 1.5% ", 1000, 15),
        ("0.01%", 100, 1),
    ],
)
def test_k_is_a_number_or_a_share(text, rows, k):
    assert resolve_neighbours(text, rows) == k


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "-2%", "0%", "nan%", "inf%", "many", "%", "2.5", "1e3", "2 %%", "100%", "250%"],
)
def test_k_that_is_neither(text):
    with pytest.raises(UserError, match=r"--k .*: expected a number of neighbours, or a share"):
        resolve_neighbours(text, 1000)


@pytest.mark.parametrize("text", ["126", "200", "99.9%"])
def test_k_not_below_n(text):
    with pytest.raises(UserError, match=f"--k {text}: expected fewer than the 126 rows"):
        kappa(clustered_features(0), random_images(0), (H, W), GraphConfig(text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "--alpha -0.1: expected a weight of at least 0"),
        ({"alpha": math.nan}, "--alpha nan: expected"),
        ({"pixel_graphs": ((0, 1.0),)}, "--pixel-graphs 0:1.0: expected k̃ of at least 1"),
        ({"pixel_graphs": ((3, -1.0),)}, "--pixel-graphs 3:-1.0: expected"),
        ({"pixel_graphs": ((3, math.inf),)}, "--pixel-graphs 3:inf: expected"),
        ({"neighbours": "no"}, "--k no: expected"),
    ],
)
def test_config_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        GraphConfig(**arguments)


def test_positions_are_row_major():
    position = module.pixel_positions(random_images(0), (H, W), 2.0)
    assert position.shape == (B * H * W, 5)
    torch.testing.assert_close(position[W - 1, 3:], torch.tensor([2.0, 0.0]))  # end of row 0
    torch.testing.assert_close(position[H * W - 1, 3:], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(position[H * W, 3:], torch.tensor([0.0, 0.0]))  # the next image


def test_k_above_ten_thousand_is_fine_where_there_are_rows():
    assert resolve_neighbours(GraphConfig(12_000).neighbours, 14_400) == 12_000
