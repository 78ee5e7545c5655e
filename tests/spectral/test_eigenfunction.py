"""ψ: shapes, attention against a dense float64 computation, the head, Gumbel-Softmax."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nefkern.runtime.errors import UserError
from nefkern.spectral.eigenfunction import (
    KINDS,
    Convolution,
    Eigenfunction,
    EigenfunctionConfig,
    SelfAttention,
    annealed_temperature,
    live_clusters,
)

WIDTH, K = 132, 10  # no multiple of the head dimension
GRID = (5, 7)


def build(**changes) -> Eigenfunction:
    torch.manual_seed(0)
    width = changes.pop("width", WIDTH)
    small = {"num_eigenfunctions": K, "heads": 3, "mlp_hidden": 66}
    return Eigenfunction(width, EigenfunctionConfig(**{**small, **changes}))


def tokens(b: int = 2, n: int = 35, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(b, n, width, generator=torch.Generator().manual_seed(1))


def dense_attention(layer: SelfAttention, x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Each head's N × N matrix of weights, written out in float64."""
    weight, bias = layer.qkv.weight.double(), layer.qkv.bias.double()
    qkv = x.double() @ weight.T + bias
    inner = layer.heads * layer.head_dim
    outputs = []
    for head in range(layer.heads):
        part = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        q, k, v = (qkv[..., i * inner : (i + 1) * inner][..., part] for i in range(3))
        if feature_map == "elu":
            phi_q = torch.where(q > 0, q + 1, q.exp())
            phi_k = torch.where(k > 0, k + 1, k.exp())
            weights = torch.einsum("bnd,bmd->bnm", phi_q, phi_k)
            weights = weights / weights.sum(2, keepdim=True)
        else:
            phi_q = q.exp() / q.exp().sum(2, keepdim=True) / math.sqrt(layer.head_dim)
            phi_k = k.exp() / k.exp().sum(1, keepdim=True)
            weights = torch.einsum("bnd,bmd->bnm", phi_q, phi_k)
        outputs.append(weights @ v)
    joined = torch.cat(outputs, 2)
    return joined @ layer.project.weight.double().T + layer.project.bias.double()


def attention(width: int, heads: int, head_dim: int, feature_map: str) -> SelfAttention:
    torch.manual_seed(0)
    config = EigenfunctionConfig(heads=heads, head_dim=head_dim, feature_map=feature_map)
    return SelfAttention(width, config)


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
@pytest.mark.parametrize(
    ("width", "heads", "head_dim"), [(128, 2, 64), (WIDTH, 3, 64), (20, 1, 64), (48, 7, 7)]
)
def test_attention_is_the_dense_formula(feature_map, width, heads, head_dim, record_property):
    layer = attention(width, heads, head_dim, feature_map)
    x = 2 * tokens(width=width)
    with torch.no_grad():
        exact = dense_attention(layer, x, feature_map)
        difference = (layer(x) - exact).abs().max().item()
    record_property("largest difference", difference)
    print(f"{feature_map}, width {width}, head {head_dim}: largest difference {difference:.1e}")
    assert difference < 3e-6 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_attention_gradients_are_those_of_the_dense_formula(feature_map):
    layer = attention(WIDTH, 3, 64, feature_map)
    x = tokens(n=12).requires_grad_()
    (layer(x) ** 2).sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad}
    layer.zero_grad()
    exact_x = x.detach().clone().requires_grad_()
    (dense_attention(layer, exact_x, feature_map) ** 2).sum().backward()
    exact = {name: p.grad for name, p in layer.named_parameters()} | {"x": exact_x.grad}
    for name, gradient in got.items():
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(gradient, exact[name], atol=1e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_mix(kind):
    psi = build(kind=kind).eval()
    x = tokens()
    changed = x.clone()
    changed[1] = changed[1].flip(1)  # a shift of all channels would be lost in the LayerNorm
    with torch.no_grad():
        torch.testing.assert_close(psi(x, GRID)[0], psi(changed, GRID)[0])


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
def test_shapes_and_the_pre_norm_order(blocks, feature_map):
    psi = build(blocks=blocks, feature_map=feature_map)
    x = tokens()
    y = x
    for block in psi.blocks:
        y = y + block.attention(block.norm1(y))
        y = y + block.mlp(block.norm2(y))
    y = F.layer_norm(y, (WIDTH,), psi.norm.weight, psi.norm.bias)
    torch.testing.assert_close(psi.hidden(x, GRID), y)
    logits = psi(x, GRID)
    assert logits.shape == (2, 35, K)
    torch.testing.assert_close(logits, F.linear(y, psi.head.weight, psi.head.bias))


@pytest.mark.parametrize(("channels", "millions"), [(384, 13.6), (768, 27.2), (1024, 36.2)])
def test_the_authors_sizes_on_vit_s_b_and_l(channels, millions):
    with torch.device("meta"):
        psi = Eigenfunction(3 * channels, EigenfunctionConfig(orthogonal=False))
    assert round(sum(p.numel() for p in psi.parameters()) / 1e6, 1) == millions
    assert len(psi.blocks) == 2
    for block in psi.blocks:
        assert (block.attention.heads, block.attention.head_dim) == (18, 64)
        assert block.mlp[0].out_features == 576
    assert psi.head.weight.shape == (256, 3 * channels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orthogonal", [True, False])
def test_weights_start_from_a_normal_of_std_0_02_and_biases_from_zero(kind, orthogonal):
    psi = build(kind=kind, width=384, orthogonal=orthogonal)
    layers = {n: m for n, m in psi.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert len(layers) == (9 if kind == "transformer" else 11)
    for name, layer in layers.items():
        assert not layer.bias.any(), name
        if name == "head" and orthogonal:
            torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(K))
        else:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            # A uniform distribution of this std ends at 0.035.
            assert layer.weight.abs().max() > 0.05, name


def test_convolution_sees_its_neighbours_in_the_grid_and_no_more():
    """Two blocks of 3 × 3: a patch reaches two rows and two columns, with no way round an edge."""
    psi, grid = build(kind="convolution").double().eval(), (7, 9)
    x = tokens(b=1, n=63).double()
    changed = x.clone().unflatten(1, grid)
    changed[0, 3, 7] = changed[0, 3, 7].flip(0)
    with torch.no_grad():
        moved = psi(changed.flatten(1, 2), grid) - psi(x, grid)
    reached = moved.abs().amax(2).unflatten(1, grid)[0] > 1e-12
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[1:6, 5:9] = True
    assert torch.equal(reached, expected)


def test_convolution_is_the_sum_over_neighbours():
    """A group's output at a patch, written out in float64."""
    torch.manual_seed(0)
    config = EigenfunctionConfig(heads=2, head_dim=3)
    layer, (h, w) = Convolution(WIDTH, config).double(), GRID
    x = tokens(b=1).double()
    y = F.pad(layer.expand(x).unflatten(1, GRID)[0], (0, 0, 1, 1, 1, 1))
    mixed = torch.zeros(h, w, 6, dtype=torch.float64)
    for i, j, out in itertools.product(range(h), range(w), range(6)):
        group = slice(out // 3 * 3, out // 3 * 3 + 3)
        near = y[i : i + 3, j : j + 3, group]
        weight = layer.mix.weight[out].permute(1, 2, 0)
        mixed[i, j, out] = (near * weight).sum() + layer.mix.bias[out]
    expected = layer.project(F.gelu(mixed.flatten(0, 1)))
    torch.testing.assert_close(layer(x, GRID)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_of_other_patches_is_refused(kind):
    with pytest.raises(ValueError, match=r"grid: expected .* of 35 patches, got 5 × 8"):
        build(kind=kind)(tokens(), (5, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_psi_compiles_as_one_graph(kind):
    psi = build(kind=kind)
    compiled = torch.compile(psi, fullgraph=True, backend="aot_eager")
    for n, grid in ((35, GRID), (24, (4, 6))):
        x = tokens(n=n)
        torch.testing.assert_close(compiled(x, grid), psi(x, grid))


def train_a_little(psi: Eigenfunction) -> torch.Tensor:
    optimizer = torch.optim.Adam(psi.parameters(), lr=0.05)
    target = torch.randn(2, 35, K, generator=torch.Generator().manual_seed(2))
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(psi(tokens(), GRID), target).backward()
        optimizer.step()
    return psi.head.weight.detach().double()


def test_orthogonal_head_stays_orthogonal_and_learns():
    psi = build()
    before = psi.head.weight.detach().clone()
    weight = train_a_little(psi)
    assert (weight - before).abs().max() > 0.01
    difference = (weight @ weight.T - torch.eye(K)).abs().max().item()
    print(f"orthogonal head after 5 steps: largest difference from I {difference:.1e}")
    assert difference < 1e-5


def test_free_head_does_not():
    weight = train_a_little(build(orthogonal=False))
    assert (weight @ weight.T - torch.eye(K)).abs().max() > 0.1


def test_state_dict_brings_the_same_head_back():
    psi = build()
    train_a_little(psi)
    torch.manual_seed(9)
    other = Eigenfunction(WIDTH, psi.config)
    other.load_state_dict(psi.state_dict())
    with torch.no_grad():
        assert torch.equal(other(tokens(), GRID), psi(tokens(), GRID))


def test_gumbel_softmax_quantises():
    psi = build()
    logits = psi(tokens(), GRID).detach().bfloat16()
    torch.manual_seed(4)
    soft = psi.quantize(logits, 1.0)
    torch.manual_seed(4)
    hard = psi.quantize(logits, 0.05)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, 35))
    assert soft.amax(-1).mean() < 0.6 < 0.9 < hard.amax(-1).mean()
    assert torch.equal(soft.argmax(-1), hard.argmax(-1)), "the same noise, another temperature"
    # The largest of logits + Gumbel noise is a draw from their softmax.
    draws = torch.stack([psi.quantize(logits[0, 0].float(), 0.3).argmax() for _ in range(4000)])
    share = draws.bincount(minlength=K) / 4000
    assert (share - logits[0, 0].float().softmax(0)).abs().max() < 0.04


def test_without_gumbel_outputs_are_the_logits():
    psi = build(quantize=False)
    logits = psi(tokens(), GRID)
    assert psi.quantize(logits, 0.3) is logits


def test_temperature_anneals_on_a_cosine():
    assert annealed_temperature(0) == 1.0
    assert annealed_temperature(1) == pytest.approx(0.3)
    assert annealed_temperature(0.5) == pytest.approx(0.65)
    assert annealed_temperature(2) == annealed_temperature(1)
    assert annealed_temperature(-1) == 1.0
    steps = [annealed_temperature(i / 20) for i in range(21)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] - steps[1] < steps[9] - steps[10]
    assert annealed_temperature(1, 2.0, 0.5) == pytest.approx(0.5)


def test_live_clusters():
    logits = torch.full((2, 3, 5), -1.0)
    logits[0, :, 2] = 1
    logits[1, :, 4] = 1
    assert live_clusters(logits).tolist() == [False, False, True, False, True]


def test_bfloat16_autocast_stays_close():
    psi = build().eval()
    with torch.no_grad():
        exact = psi(tokens(), GRID)
        with torch.autocast("cpu", torch.bfloat16):
            half = psi(tokens(), GRID)
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_eigenfunctions": 1}, "--num-eigenfunctions 1: expected at least 2"),
        ({"num_eigenfunctions": WIDTH + 1}, f"expected at most {WIDTH}, the width of ψ's input"),
        ({"kind": "recurrent"}, "--psi recurrent: expected transformer or convolution"),
        ({"feature_map": "relu"}, "--feature-map relu: expected elu or softmax"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_more_columns_than_width_without_orthogonality():
    assert (
        build(num_eigenfunctions=WIDTH + 1, orthogonal=False)(tokens(), GRID).shape[2] == WIDTH + 1
    )
    square = build(num_eigenfunctions=WIDTH).head.weight
    assert (square @ square.T - torch.eye(WIDTH)).abs().max() < 1e-4


def test_standardize_scales_the_input_of_the_batch_it_was_fitted_on():
    torch.manual_seed(0)
    x = torch.randn(2, 50, 64) * torch.logspace(-2, 2, 64) + 3
    psi = Eigenfunction(64, EigenfunctionConfig(4, blocks=0, standardize=True))
    psi.fit_scale(x)
    seen = (x - psi.shift) * psi.scale
    torch.testing.assert_close(seen.flatten(0, 1).mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.flatten(0, 1).std(0), torch.ones(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(psi.hidden(x, (5, 10)), psi.norm(seen))


def test_without_standardize_the_input_is_taken_as_it_is():
    x = torch.randn(2, 50, 64) * 100
    psi = Eigenfunction(64, EigenfunctionConfig(4, blocks=0))
    psi.fit_scale(x)
    torch.testing.assert_close(psi.hidden(x, (5, 10)), psi.norm(x))
